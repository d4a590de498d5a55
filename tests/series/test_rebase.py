# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""scripts/rebase on small trees: a base that moves to a later commit."""

import json
import shutil

import pytest

from netqueue.series.git import GitError, git
from netqueue.series.patches import load_bases, load_series
from series.synthetic import change_line, commit, files, put, run, state
from series.test_overrides import assert_refused, exported, older  # noqa: F401

PATH = "lib/bb/runqueue.py"


def rebase(made, tree, *arguments):
    done = run("rebase", tree, *arguments, project=made.project)
    assert "Traceback" not in done.stderr
    return done


def pin(made, part="bitbake", base="master"):
    return load_bases(made.project)[base][part]


@pytest.fixture
def upstream(made):
    """A function that makes a commit on master of a checkout, and gives its name; the old one is checked out again."""
    def make(edit, tree=made.bitbake):
        git(tree, "checkout", "--quiet", "master")
        edit(tree)
        new = commit(tree, "upstream: change something")
        git(tree, "checkout", "--quiet", "--detach", "HEAD^")
        return new
    return make


def new_line_at_the_top(tree):
    put(tree, PATH, "a new line\n" + (tree / PATH).read_text())


def same_as_the_series(tree):
    """What one of its patches does"""
    put(tree, "doc/manual.rst", "the manual, longer\n")


def beside_the_series(tree):
    change_line(tree, PATH, 31, "another line")


def test_moved(made, upstream):
    def newer(tree):
        new_line_at_the_top(tree)
        put(tree, "lib/bb/__init__.py", '__version__ = "2.19.1"\n')
    new = upstream(newer)
    done = rebase(made, made.bitbake, new)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert [line.split()[2] for line in lines[:4]] == ["="] * 4
    assert lines[-1].startswith("master: bitbake is at %s now; " % new[:12])
    assert (pin(made)["commit"], pin(made)["version"]) == (new, "2.19.1")
    assert pin(made, "openembedded-core")["series"] == ["wrynose", "blacksail"]
    assert git(made.bitbake, "merge-base", "HEAD", "master").strip() == new
    assert run("export", made.bitbake, "--check", project=made.project).returncode == 0
    assert run("apply", made.bitbake, "--reverse", project=made.project).returncode == 0
    assert git(made.bitbake, "rev-parse", "HEAD").strip() == new


def test_openembedded_core(made, upstream):
    new = upstream(lambda tree: put(tree, "meta/conf/layer.conf", 'LAYERSERIES_CORENAMES = "blacksail"\n'), made.oecore)
    done = rebase(made, made.oecore, "master")
    assert done.returncode == 0, done.stderr
    assert (pin(made, "openembedded-core")["commit"], pin(made, "openembedded-core")["series"]) == (new, ["blacksail"])


def test_patch_that_upstream_has_taken(made, upstream):
    done = rebase(made, made.bitbake, upstream(same_as_the_series))
    assert done.returncode == 0, done.stderr
    assert [line.split()[2] for line in done.stdout.splitlines() if "doc: describe" in line] == ["<"]
    assert [patch.name.rpartition("/")[2][:4] for patch in load_series("master", "bitbake", made.project)] == [
        "0001", "0002", "0003"]


def test_conflict(made, upstream):
    new = upstream(beside_the_series)
    before = files(made.project)
    assert_refused(rebase(made, made.bitbake, new), "conflict in lib/bb/runqueue.py (runqueue: use the pool)",
                   "git rebase --continue")
    assert_refused(rebase(made, made.bitbake, new), "a rebase is in progress")
    assert files(made.project) == before
    put(made.bitbake, PATH, git(made.bitbake, "show", new + ":" + PATH))
    change_line(made.bitbake, PATH, 5, "line five")
    change_line(made.bitbake, PATH, 30, "line thirty")
    git(made.bitbake, "add", PATH)
    git(made.bitbake, "rebase", "--continue")
    done = rebase(made, made.bitbake, new)
    assert done.returncode == 0, done.stderr
    shown = [line.split()[2] for line in done.stdout.splitlines() if line[0].isdigit()]
    assert shown == ["=", "!", "=", "="] and "another line" in done.stdout
    assert pin(made)["commit"] == new
    git(made.bitbake, "checkout", "--quiet", "--detach", new)
    git(made.bitbake, "branch", "--quiet", "-D", "netqueue")
    assert run("apply", made.bitbake, project=made.project).returncode == 0


def test_check(made, upstream):
    new = upstream(new_line_at_the_top)
    before = files(made.project)
    done = rebase(made, made.bitbake, new, "--check")
    assert done.returncode == 0, done.stderr
    assert files(made.project) == before
    again = rebase(made, made.bitbake, new)
    assert again.stdout.startswith(done.stdout)
    assert pin(made)["commit"] == new


def test_another_base(made, exported):  # noqa: F811
    """Its own sections are written, and master stays."""
    master = files(made.project / "patches/master")
    change_line(exported, PATH, 20, "upstream")
    new = commit(exported, "upstream: change something")
    git(exported, "checkout", "--quiet", "--detach", "HEAD^")
    done = rebase(made, exported, new, "--base", "older")
    assert done.returncode == 0, done.stderr
    assert pin(made, base="older")["commit"] == new
    assert files(made.project / "patches/master") == master
    record = json.loads((made.project / "patches/older/bitbake/overrides.json").read_text())
    assert record["tree"] == git(exported, "rev-parse", "HEAD^{tree}").strip()


def test_message_that_export_refuses(made, upstream):
    """The pin stays with the patches."""
    new = upstream(new_line_at_the_top)
    assert rebase(made, made.bitbake, new, "--check").returncode == 0
    git(made.bitbake, "commit", "--quiet", "--amend", "--message", "no component")
    before = files(made.project)
    assert_refused(rebase(made, made.bitbake, new), "is not 'component: summary'")
    assert files(made.project) == before


def dirty(made, new):
    change_line(made.bitbake, PATH, 20, "mine")
    return made.bitbake, new, "has local changes"


def foreign_branch(made, new):
    git(made.bitbake, "branch", "netqueue")
    return made.bitbake, new, "the branch netqueue is not checked out, or not made by scripts/apply"


def series_on_another_commit(made, new):
    git(made.bitbake, "checkout", "--quiet", new)
    assert run("apply", made.bitbake, project=made.project).returncode == 0
    return made.bitbake, new, "the branch netqueue is not checked out, or not made by scripts/apply"


@pytest.mark.parametrize("spoil", [
    dirty, foreign_branch, series_on_another_commit,
    lambda made, new: (made.bitbake, "nothing", "does not have the commit nothing"),
    lambda made, new: (made.bitbake, "HEAD", "is not after"),
    lambda made, new: (made.poky, "HEAD", "does not have the commit"),
    lambda made, new: (made.project, "HEAD", "holds neither"),
    lambda made, new: (made.project / "nothing", "HEAD", "is not a git checkout"),
], ids=["dirty", "foreign branch", "elsewhere", "unknown", "same", "poky", "no tree", "no folder"])
def test_refusals(made, upstream, spoil):
    tree, new, why = spoil(made, upstream(new_line_at_the_top))
    before = files(made.project), state(made.bitbake)
    assert_refused(rebase(made, tree, new), why)
    assert (files(made.project), state(made.bitbake)) == before


def test_checkout_without_the_base(made, tmp_path):
    tree = tmp_path / "bitbake"
    shutil.copytree(made.bitbake, tree, ignore=shutil.ignore_patterns(".git"))
    git(tree, "init", "--quiet")
    commit(tree, "the base")
    with pytest.raises(GitError):
        git(tree, "cat-file", "-e", pin(made)["commit"])
    assert_refused(rebase(made, tree, "HEAD"), "does not have the commit " + pin(made)["commit"])
