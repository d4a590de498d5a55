# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""The whole committed series on checkouts of upstream: apply, export again, take out, and run its tests.

The user's checkouts are cloned at the pinned commits and not written to. Of a base whose commits they do not
have, the tests are skipped.
"""

import os
import subprocess
import sys

import pytest

from netqueue import ROOT
from netqueue.lab.oecore import clone
from netqueue.series.checkout import bitbake_version, oecore_version
from netqueue.series.git import git, git_ok
from netqueue.series.overrides import MASTER, read_record
from netqueue.series.patches import PARTS, load_bases, load_series, parse_topics
from series.synthetic import run, state
from series.test_format_patch import git_am
from series.test_pythons import MODULES, interpreter

pytestmark = pytest.mark.checkout
BASES = load_bases()
# Also of those that need more than the package from PyPI has
ALL_MODULES = sorted([*MODULES, "data", "siggen"])

# The release, the oldest commit on which all patches fit, and the one that was in poky in February 2026
OTHER_COMMITS = [("wrynose", "33581c84f3a85008239acbd940501a35de48dc91"),
                 ("scarthgap", "28569e9796d4b34d7b77b4f79074ab7854850386"),
                 ("scarthgap", "10118785e4a670bce4980e1044c0888a8b6e84af")]

each_base = pytest.mark.parametrize("base", BASES)


def clone_of(source, target, part, base):
    """As clone(), but skips the test if a base other than master is not in the checkout."""
    pin = BASES[base][part]["commit"]
    if base != MASTER and not git_ok(source, "cat-file", "-e", pin + "^{commit}"):
        pytest.skip("%s does not have the commit %s of the base %s" % (source, pin[:12], base))
    return clone(source, target, part, base)


def round_trip(tree, base, parts, repos):
    before = [state(repo) for repo in repos]
    assert all(load_series(base, part) for part in parts)
    for command in (("apply", tree, "--check"), ("apply", tree), ("export", tree, "--check"),
                    ("apply", tree, "--reverse")):
        done = run(*command, project=ROOT)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
    assert [state(repo) for repo in repos] == before


@each_base
def test_bitbake(bitbake_checkout, tmp_path, base):
    tree = clone_of(bitbake_checkout, tmp_path / "bitbake", "bitbake", base)
    assert bitbake_version(tree) == BASES[base]["bitbake"]["version"]
    round_trip(tree, base, ["bitbake"], [tree])


@each_base
def test_openembedded_core(oecore_checkout, tmp_path, base):
    tree = clone_of(oecore_checkout, tmp_path / "oecore", "openembedded-core", base)
    assert oecore_version(tree) == " ".join(BASES[base]["openembedded-core"]["series"])
    round_trip(tree, base, ["openembedded-core"], [tree])


@each_base
def test_both(bitbake_checkout, oecore_checkout, tmp_path, base):
    trees = [clone_of(bitbake_checkout, tmp_path / "one", "bitbake", base),
             clone_of(oecore_checkout, tmp_path / "two", "openembedded-core", base)]
    round_trip(tmp_path, base, PARTS, trees)


@pytest.mark.parametrize("base, commit", OTHER_COMMITS)
def test_other_commits(bitbake_checkout, tmp_path, base, commit):
    tree = clone_of(bitbake_checkout, tmp_path / "bitbake", "bitbake", base)
    git(tree, "checkout", "--quiet", commit)
    done = run("apply", tree, "--check", project=ROOT)
    assert done.returncode == 0, done.stderr
    assert "base %s," % base in done.stdout


def test_bases_do_not_mix(bitbake_checkout, oecore_checkout, tmp_path):
    others = [base for base in BASES if base != MASTER]
    clone_of(bitbake_checkout, tmp_path / "one", "bitbake", others[0])
    clone_of(oecore_checkout, tmp_path / "two", "openembedded-core", MASTER)
    done = run("apply", tmp_path, project=ROOT)
    assert done.returncode == 1 and "they do not go together" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("base, version", [(base, None) for base in BASES] + [("scarthgap", "3.8"), ("wrynose", "3.9")])
def test_unit_tests(bitbake_checkout, tmp_path, base, version):
    """Those that the series brings, with its bitbake; version: of the oldest Python that the base supports"""
    python = interpreter(version) if version else sys.executable
    if python is None:
        pytest.skip("Python %s is not installed, or not complete" % version)
    tree = clone_of(bitbake_checkout, tmp_path / "bitbake", "bitbake", base)
    assert run("apply", tree, project=ROOT).returncode == 0
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "LC_ALL": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([python, "-m", "unittest", *("bb.tests." + name for name in ALL_MODULES)], cwd=tree / "lib",
                          env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-4000:]


@each_base
@pytest.mark.parametrize("topics, variables", [
    ("0", "none"), ("1", "none"), ("1-3", "BB_NUMBER_NETWORK_THREADS, BB_CONNECTION_CACHE, BB_CONNECTION_CACHE_MAX")])
def test_some_topics(bitbake_checkout, oecore_checkout, tmp_path, base, topics, variables):
    """Those at the head of the series do not need each other, nor the others those after them"""
    trees = [clone_of(bitbake_checkout, tmp_path / "one", "bitbake", base),
             clone_of(oecore_checkout, tmp_path / "two", "openembedded-core", base)]
    before = [state(tree) for tree in trees]
    done = run("apply", tmp_path, "--topics", topics, project=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "variables: " + variables
    subjects = git(trees[0], "log", "--format=%s", BASES[base]["bitbake"]["commit"] + "..").splitlines()
    assert len(subjects) == len(load_series(base, "bitbake", topics=parse_topics(topics)))
    assert run("apply", tmp_path, "--topics", topics, "--reverse", project=ROOT).returncode == 0
    assert [state(tree) for tree in trees] == before


def test_poky(poky_checkout, tmp_path):
    """A poky of a base is applied to if all patches fit; any other is refused and not touched."""
    tree = tmp_path / "poky"
    git(tmp_path, "clone", "--quiet", "--shared", str(poky_checkout), str(tree))
    before = state(tree)
    done = run("apply", tree, project=ROOT)
    if done.returncode == 0:
        assert run("apply", tree, "--reverse", project=ROOT).returncode == 0
    else:
        assert done.returncode == 1 and ("no patches for bitbake" in done.stderr or "does not apply" in done.stderr)
        assert done.stderr.count("\n") == 1
    assert state(tree) == before


@each_base
def test_poky_layout(bitbake_checkout, oecore_checkout, tmp_path, base):
    """Both pinned trees as one repository, which is how poky is laid out."""
    tree = poky_of(bitbake_checkout, oecore_checkout, tmp_path / "poky", base)
    before = state(tree)
    for options in ((), ("--reverse",)):
        done = run("apply", tree, *options, project=ROOT)
        assert done.returncode == 0, done.stderr
        if not options:
            count = sum(len(load_series(base, part)) for part in PARTS)
            assert git(tree, "rev-list", "--count", "base..netqueue").strip() == str(count)
    assert state(tree) == before


@each_base
def test_format_patch(bitbake_checkout, oecore_checkout, tmp_path, base):
    """What plain git am makes of the folders is what scripts/apply makes, and what is recorded of the base."""
    trees = {part: clone_of(source, tmp_path / part, part, base)
             for part, source in zip(PARTS, (bitbake_checkout, oecore_checkout))}
    poky = poky_of(bitbake_checkout, oecore_checkout, tmp_path / "poky", base)
    starts = {tree: git(tree, "rev-parse", "HEAD").strip() for tree in (*trees.values(), poky)}
    for options, name in ((), "apart"), (("--poky",), "together"):
        assert run("format-patch", base, tmp_path / name, *options, project=ROOT).returncode == 0
    for part, tree in trees.items():
        git_am(tree, tmp_path / "apart" / part, tmp_path)
    git_am(poky, tmp_path / "together", tmp_path)
    made = [git(tree, "rev-parse", "HEAD^{tree}") for tree in starts]
    if base != MASTER:
        assert made[:2] == [read_record(ROOT / "patches" / base / part).tree + "\n" for part in PARTS]
    for (tree, start), wanted in zip(starts.items(), made):
        git(tree, "reset", "--quiet", "--hard", start)
        assert run("apply", tree, project=ROOT).returncode == 0
        assert git(tree, "rev-parse", "netqueue^{tree}") == wanted


def poky_of(bitbake, oecore, tree, base):
    """The pinned trees of two checkouts as one repository; skips the test if they do not have them."""
    tree.mkdir()
    git(tree, "init", "--quiet")
    git(tree, "checkout", "--quiet", "-b", "base")
    sources = {"openembedded-core": oecore, "bitbake": bitbake}
    for part, source in sources.items():
        if base != MASTER and not git_ok(source, "cat-file", "-e", BASES[base][part]["commit"] + "^{commit}"):
            pytest.skip("%s does not have the commit of the base %s" % (source, base))
    borrow_objects(tree, sources.values())
    for part, folder in (("openembedded-core", ""), ("bitbake", "bitbake/")):
        git(tree, "read-tree", "--prefix=" + folder, BASES[base][part]["commit"])
    git(tree, "commit", "--quiet", "--message", "poky")
    git(tree, "reset", "--quiet", "--hard")
    return tree


def borrow_objects(repo, sources):
    """As clone --shared does, but from more than one. Fetching would copy, and needs all of the history."""
    folders = [source / git(source, "rev-parse", "--git-path", "objects").strip() for source in sources]
    (repo / ".git/objects/info/alternates").write_text("".join("%s\n" % folder.resolve() for folder in folders))
