# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""The whole committed series on checkouts of upstream: apply, export again, take out.

The user's checkouts are cloned at the pinned commit and not written to.
"""

import pytest

from netqueue import ROOT
from netqueue.lab.oecore import clone
from netqueue.series.checkout import bitbake_version, oecore_version
from netqueue.series.git import git
from netqueue.series.patches import load_bases, parse_topics, patch_files
from series.synthetic import run, state

pytestmark = pytest.mark.checkout
PINS = load_bases()["master"]


def round_trip(tree, parts, repos):
    before = [state(repo) for repo in repos]
    patches = {part: patch_files("master", part) for part in parts}
    if not any(patches.values()):
        pytest.skip("there are no patches for %s yet" % " and ".join(parts))
    for command in (("apply", tree, "--check"), ("apply", tree), ("export", tree, "--check"),
                    ("apply", tree, "--reverse")):
        done = run(*command, project=ROOT)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
    assert [state(repo) for repo in repos] == before


def test_bitbake(bitbake_checkout, tmp_path):
    tree = clone(bitbake_checkout, tmp_path / "bitbake", "bitbake")
    assert bitbake_version(tree) == PINS["bitbake"]["version"]
    round_trip(tree, ["bitbake"], [tree])


def test_openembedded_core(oecore_checkout, tmp_path):
    tree = clone(oecore_checkout, tmp_path / "oecore", "openembedded-core")
    assert oecore_version(tree) == " ".join(PINS["openembedded-core"]["series"])
    round_trip(tree, ["openembedded-core"], [tree])


def test_both(bitbake_checkout, oecore_checkout, tmp_path):
    trees = [clone(bitbake_checkout, tmp_path / "one", "bitbake"),
             clone(oecore_checkout, tmp_path / "two", "openembedded-core")]
    round_trip(tmp_path, ["bitbake", "openembedded-core"], trees)


@pytest.mark.parametrize("topics, variables", [
    ("0", "none"), ("1", "none"), ("1-3", "BB_NUMBER_NETWORK_THREADS, BB_CONNECTION_CACHE, BB_CONNECTION_CACHE_MAX")])
def test_some_topics(bitbake_checkout, oecore_checkout, tmp_path, topics, variables):
    """Those at the head of the series do not need each other, nor the others those after them"""
    trees = [clone(bitbake_checkout, tmp_path / "one", "bitbake"),
             clone(oecore_checkout, tmp_path / "two", "openembedded-core")]
    before = [state(tree) for tree in trees]
    done = run("apply", tmp_path, "--topics", topics, project=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "variables: " + variables
    subjects = git(trees[0], "log", "--format=%s", PINS["bitbake"]["commit"] + "..").splitlines()
    assert len(subjects) == len(patch_files("master", "bitbake", topics=parse_topics(topics)))
    assert run("apply", tmp_path, "--topics", topics, "--reverse", project=ROOT).returncode == 0
    assert [state(tree) for tree in trees] == before


def test_poky(poky_checkout, tmp_path):
    """A poky of a base is applied to; of any other, it is refused and not touched."""
    tree = tmp_path / "poky"
    git(tmp_path, "clone", "--quiet", "--shared", str(poky_checkout), str(tree))
    before = state(tree)
    known = (bitbake_version(tree / "bitbake") == PINS["bitbake"]["version"]
             and oecore_version(tree) == " ".join(PINS["openembedded-core"]["series"]))
    done = run("apply", tree, project=ROOT)
    if known:
        assert done.returncode == 0, done.stderr
        assert run("apply", tree, "--reverse", project=ROOT).returncode == 0
    else:
        assert done.returncode == 1 and "no patches for bitbake" in done.stderr
        assert done.stderr.count("\n") == 1
    assert state(tree) == before


def test_poky_layout(bitbake_checkout, oecore_checkout, tmp_path):
    """Both pinned trees as one repository, which is how poky is laid out."""
    tree = tmp_path / "poky"
    tree.mkdir()
    git(tree, "init", "--quiet")
    git(tree, "checkout", "--quiet", "-b", "base")
    sources = {"openembedded-core": oecore_checkout, "bitbake": bitbake_checkout}
    borrow_objects(tree, sources.values())
    for part, folder in (("openembedded-core", ""), ("bitbake", "bitbake/")):
        git(tree, "read-tree", "--prefix=" + folder, PINS[part]["commit"])
    git(tree, "commit", "--quiet", "--message", "poky")
    git(tree, "reset", "--quiet", "--hard")
    before = state(tree)
    for options in ((), ("--reverse",)):
        done = run("apply", tree, *options, project=ROOT)
        assert done.returncode == 0, done.stderr
        if not options:
            count = sum(len(patch_files("master", part)) for part in PINS)
            assert git(tree, "rev-list", "--count", "base..netqueue").strip() == str(count)
    assert state(tree) == before


def borrow_objects(repo, sources):
    """As clone --shared does, but from more than one. Fetching would copy, and needs all of the history."""
    folders = [source / git(source, "rev-parse", "--git-path", "objects").strip() for source in sources]
    (repo / ".git/objects/info/alternates").write_text("".join("%s\n" % folder.resolve() for folder in folders))
