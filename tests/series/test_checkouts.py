# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""The whole committed series on checkouts of upstream: apply, export again, take out, and run its tests.

The user's checkouts are cloned at the pinned commits and not written to. Of a base whose commits they do not
have, the tests are skipped.
"""

import json
import os
import re
import subprocess
import sys

import pytest

from netqueue import ROOT, environment
from netqueue.lab.oecore import clone
from netqueue.series.checkout import BRANCH, bitbake_version, change, current_branch, find_targets, oecore_version
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
# What may be applied without the rest, and the whole
STATES = ["0", "1", "1-2", "1-3", "1-4", "1-5", "1-6", "0-7"]

# The first commits of a release on which all patches fit: 2.18.0, one of December 2024, and of the releases themselves
FIRST = [("wrynose", "bitbake", "33581c84f3a85008239acbd940501a35de48dc91"),
         ("scarthgap", "bitbake", "28569e9796d4b34d7b77b4f79074ab7854850386"),
         ("wrynose", "openembedded-core", "42fa856a00ac16b2a7a83d7ecfa60a5be192b16c"),
         ("scarthgap", "openembedded-core", "e38a0f1a5e515651173b1aa21d38f2b3924de8b2")]
# The heads of branches that are no bases, and what is said of them
UNKNOWN = [("a9f09b9e2f187f07a6f6dfd1caa3fd2f3d564a8a", "this is bitbake 2.0.0; bases are"),
           ("ac097300921590ed6a814f2c3fa08a59f4ded92d", "this is bitbake 2.12.1; bases are"),
           ("713fbbdb9ecc195ceb2216a2345e0d79dbee2135", "this is bitbake 2.16.0; bases are")]
# 2.8.0 of October 2024, before the first commit on which all patches fit
TOO_OLD = ("scarthgap", "377eba2361850adfb8ce7e761ef9c76be287f88c")
# In poky the base's commits are not known by their names
POKY = {"scarthgap": "1d54d1c4736a114e1cecbe85a0306e3814d5ce70"}
UNKNOWN_POKY = {"walnascar": "d0b46a6624ec9c61c47270745dd0b2d5abbe6ac1",
                "kirkstone": "58f9b898daef8272184b1be176a18428f9f9d9b3"}

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


@pytest.mark.parametrize("base, part, first", FIRST)
def test_each_commit_of_a_release(bitbake_checkout, oecore_checkout, tmp_path, base, part, first):
    """That changes a file which the series does"""
    tree = clone_of(dict(zip(PARTS, (bitbake_checkout, oecore_checkout)))[part], tmp_path / part, part, base)
    paths = {section.path for patch in load_series(base, part) for section in patch.sections if not section.is_new}
    commits = git(tree, "rev-list", first + "..HEAD", "--", *sorted(paths)).split()
    assert commits
    for commit in [first, *commits]:
        git(tree, "checkout", "--quiet", commit)
        targets = find_targets(tree)
        assert "base %s," % base in change(targets, reverse=False, dry_run=True)[0]


def refused(tree):
    """The line with which scripts/apply refuses a tree that it leaves as it was"""
    before = state(tree)
    done = run("apply", tree, project=ROOT)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done.stderr
    assert state(tree) == before
    return done.stderr


@pytest.mark.parametrize("commit, why", UNKNOWN)
def test_unknown_releases(bitbake_checkout, tmp_path, commit, why):
    line = refused(clone_at(bitbake_checkout, tmp_path / "bitbake", commit))
    assert why in line and all(base in line for base in BASES)


def test_commit_before_the_first_that_fits(bitbake_checkout, tmp_path):
    base, commit = TOO_OLD
    pin = BASES[base]["bitbake"]["commit"]
    tree = clone_of(bitbake_checkout, tmp_path / "bitbake", "bitbake", base)
    git(tree, "checkout", "--quiet", commit)
    count = git(tree, "rev-list", "--count", commit + ".." + pin).strip()
    assert re.search(r"lib/bb/\S+ differs at line \d+ \(this is 2\.8\.0, %s commits before %s\)" % (count, pin[:12]),
                     refused(tree))


def clone_at(source, target, commit):
    """A clone at any commit; skips the test if the checkout does not have it."""
    if not git_ok(source, "cat-file", "-e", commit + "^{commit}"):
        pytest.skip("%s does not have the commit %s" % (source, commit[:12]))
    git(target.parent, "clone", "--quiet", "--shared", "--no-checkout", str(source), str(target))
    git(target, "checkout", "--quiet", "-b", "base", commit)
    return target


def test_bases_do_not_mix(bitbake_checkout, oecore_checkout, tmp_path):
    others = [base for base in BASES if base != MASTER]
    clone_of(bitbake_checkout, tmp_path / "one", "bitbake", others[0])
    clone_of(oecore_checkout, tmp_path / "two", "openembedded-core", MASTER)
    done = run("apply", tmp_path, project=ROOT)
    assert done.returncode == 1 and "they do not go together" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("base, topics, version", [(base, topics, None) for base in BASES for topics in STATES]
                         + [("scarthgap", STATES[-1], "3.8"), ("wrynose", STATES[-1], "3.9")])
def test_unit_tests(bitbake_checkout, tmp_path, base, topics, version):
    """Those that these topics bring, with its bitbake; version: of the oldest Python that the base supports"""
    python = interpreter(version) if version else sys.executable
    if python is None:
        pytest.skip("Python %s is not installed, or not complete" % version)
    tree = clone_of(bitbake_checkout, tmp_path / "bitbake", "bitbake", base)
    assert run("apply", tree, "--topics", topics, project=ROOT).returncode == 0
    modules = ["bb.tests." + name for name in ALL_MODULES if (tree / "lib" / "bb" / "tests" / (name + ".py")).exists()]
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "LC_ALL": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1"}
    assert len(modules) == len(ALL_MODULES) or topics != STATES[-1]
    done = subprocess.run([python, "-m", "unittest", *modules], cwd=tree / "lib", env=env, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=280)
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
    # openembedded-core has none of some topics
    for tree in [tree for tree in trees if git(tree, "branch", "--list", "netqueue")]:
        done = run("apply", tree, "--reverse", project=ROOT)
        assert done.returncode == 0, done.stderr
        assert tree != trees[0] or "%s: %d patches taken out" % (tree, len(subjects)) in done.stdout
    assert [state(tree) for tree in trees] == before


@pytest.mark.parametrize("base", POKY)
def test_poky(poky_checkout, tmp_path, base):
    tree = clone_at(poky_checkout, tmp_path / "poky", POKY[base])
    before = state(tree)
    done = run("apply", tree, project=ROOT)
    assert done.returncode == 0, done.stderr
    applied = git(tree, "rev-parse", "netqueue^{tree}")
    assert run("apply", tree, "--reverse", project=ROOT).returncode == 0
    assert state(tree) == before
    assert run("format-patch", base, tmp_path / "out", "--poky", project=ROOT).returncode == 0
    git_am(tree, tmp_path / "out", tmp_path)
    assert git(tree, "rev-parse", "HEAD^{tree}") == applied


@pytest.mark.parametrize("release", UNKNOWN_POKY)
def test_unknown_poky(poky_checkout, tmp_path, release):
    line = refused(clone_at(poky_checkout, tmp_path / "poky", UNKNOWN_POKY[release]))
    assert "%s: this is poky %s with bitbake 2." % (tmp_path / "poky", release) in line
    assert all(base in line for base in BASES)


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


def test_bitbake_setup(bitbake_checkout, oecore_checkout, tmp_path):
    """What its own bitbake-setup makes of the base master, from repositories with one commit each."""
    if not environment.has_locale():
        pytest.skip("the locale %s is missing" % environment.LOCALE)
    sources = {}
    for part, source in zip(PARTS, (bitbake_checkout, oecore_checkout)):
        git(tmp_path, "init", "--quiet", part)
        borrow_objects(tmp_path / part, [source])
        commit = git(tmp_path / part, "commit-tree", BASES[MASTER][part]["commit"] + "^{tree}", "-m", "base").strip()
        git(tmp_path / part, "update-ref", "refs/heads/release", commit)
        git(tmp_path / part, "symbolic-ref", "HEAD", "refs/heads/release")
        sources[part] = {"git-remote": {"uri": "file://%s" % (tmp_path / part), "branch": "release", "rev": "release"}}
    configuration = {"name": "nodistro", "description": "nodistro", "setup-dir-name": "setup", "bb-layers": ["openembedded-core/meta"]}
    (tmp_path / "one.conf.json").write_text(json.dumps({"description": "one", "version": "1.0", "sources": sources,
                                                        "bitbake-setup": {"configurations": [configuration]}}))
    program = clone_of(bitbake_checkout, tmp_path / "program", "bitbake", MASTER) / "bin/bitbake-setup"
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "LC_ALL": "en_US.UTF-8", "PYTHONDONTWRITEBYTECODE": "1"}
    # It rebases, for which git wants to know who does
    (tmp_path / ".gitconfig").write_text("[user]\nname = somebody\nemail = somebody@example.com\n")

    def bitbake_setup(*arguments):
        done = subprocess.run([sys.executable, str(program), "--setting", "default", "top-dir-prefix", str(tmp_path), "--setting",
                               "default", "top-dir-name", "top", *map(str, arguments)], cwd=tmp_path, env=env, text=True, timeout=280,
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert done.returncode == 0, done.stdout[-4000:]

    bitbake_setup("init", "--non-interactive", tmp_path / "one.conf.json", "nodistro")
    trees = [tmp_path / "top/setup/layers" / part for part in PARTS]
    before = [state(tree) for tree in trees]
    done = run("apply", tmp_path / "top/setup", project=ROOT)
    assert done.returncode == 0, done.stderr
    for tree, part in zip(trees, PARTS):
        assert git(tree, "rev-list", "--count", "release..netqueue").strip() == str(len(load_series(MASTER, part)))
    assert run("apply", tmp_path / "top/setup", "--reverse", project=ROOT).returncode == 0
    assert [state(tree) for tree in trees] == before

    # Its update rebases the series onto what is new upstream
    assert run("apply", tmp_path / "top/setup", project=ROOT).returncode == 0
    upstream = tmp_path / "bitbake"
    commit = git(upstream, "commit-tree", "release^{tree}", "-p", "release", "-m", "new").strip()
    git(upstream, "update-ref", "refs/heads/release", commit)
    bitbake_setup("update", "--setup-dir", tmp_path / "top/setup")
    assert current_branch(trees[0]) == BRANCH
    assert git(trees[0], "rev-list", "--count", commit + "..HEAD").strip() == str(len(load_series(MASTER, "bitbake")))


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
