# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""A base other than master on small trees: what is kept of it, what it is put together to, and when that is stale."""

import json

import pytest

from netqueue.series.git import git
from netqueue.series.overrides import RECORD, digest, key
from netqueue.series.patches import load_series, parse_patch
from series.synthetic import bitbake_files, bitbake_series, change_line, commit, files, new_repo, put, run

FOLDER = "patches/older/bitbake"
OWN = FOLDER + "/0001-connections-add-a-pool.patch"
PATH = "lib/bb/runqueue.py"


def older_files(folder):
    """One line beside a change of the series is another, all are further down, and there is no manual."""
    bitbake_files(folder)
    put(folder, "lib/bb/__init__.py", '__version__ = "2.18.0"\n')
    change_line(folder, PATH, 4, "another line")
    put(folder, PATH, "first\n" * 3 + (folder / PATH).read_text())
    (folder / "doc/manual.rst").unlink()


def older_series(repo):
    put(repo, "lib/bb/connections/pool.py", "POOL = 1\n")
    change_line(repo, PATH, 8, "line five")
    commit(repo, "connections: add a pool\n\nThe reason, with a \u00fcmlaut.\n")
    put(repo, "lib/bb/connections/pool.py", "POOL = 2\n")
    change_line(repo, PATH, 33, "line thirty")
    commit(repo, "runqueue: use the pool\n\nThe reason.\n\n  indented: as it is\n")
    put(repo, "bin/pool", "#!/bin/sh\n", 0o755)
    put(repo, "lib/bb/tests/answer.txt", b"HTTP/1.1 200 OK\r\n\r\nbody without newline")
    commit(repo, "bin/pool: add a program\n\nThe reason.\n")


@pytest.fixture
def older(made):
    """made, and a checkout of the base older with the series on the branch work, which is not exported yet."""
    repo = new_repo(made.project.parent / "older", older_files)
    bases = json.loads((made.project / "patches/bases.json").read_text())
    bases["bases"]["older"] = {
        "bitbake": {"version": "2.18.0", "commit": git(repo, "rev-parse", "HEAD").strip()},
        "openembedded-core": {"series": ["older"], "commit": "0" * 40}}
    put(made.project, "patches/bases.json", json.dumps(bases))
    git(repo, "checkout", "--quiet", "-b", "work")
    older_series(repo)
    return repo


@pytest.fixture
def exported(made, older):
    """The checkout, exported and back on its base."""
    done = run("export", older, project=made.project)
    assert done.returncode == 0, done.stderr
    git(older, "branch", "--quiet", "--move", "work", "wanted")
    git(older, "checkout", "--quiet", "master")
    return older


def assert_refused(done, *words):
    assert done.returncode == 1, done.stdout
    assert done.stderr.count("\n") == 1, done.stderr
    for word in words:
        assert word in done.stderr


def test_only_what_differs_is_kept(made, exported):
    assert sorted(path for path, entry in files(made.project / FOLDER).items() if entry) == [
        "0001-connections-add-a-pool.patch", RECORD]
    own = parse_patch("own", (made.project / OWN).read_text())
    master = {key(patch.name): patch for patch in load_series("master", "bitbake", made.project)}
    assert own.header == master[key(OWN)].header
    assert [section.path for section in own.sections] == [PATH]
    record = json.loads((made.project / FOLDER / RECORD).read_text())
    of_master = {section.path: digest(section) for patch in master.values() for section in patch.sections}
    first = {section.path: digest(section) for section in master[key(OWN)].sections}
    assert record == {"tree": git(exported, "rev-parse", "wanted^{tree}").strip(),
                      "own": {key(OWN): {PATH: first[PATH]}},
                      "dropped": {"doc-describe-the-pool.patch": {"doc/manual.rst": of_master["doc/manual.rst"]}}}


def test_round_trip(made, exported):
    done = run("apply", exported, project=made.project)
    assert done.returncode == 0, done.stderr
    assert "3 bitbake patches, base older" in done.stdout
    assert git(exported, "rev-parse", "HEAD^{tree}") == git(exported, "rev-parse", "wanted^{tree}")
    for tree in (exported, made.bitbake):
        if tree == made.bitbake:
            bitbake_series(tree)
        done = run("export", tree, "--check", project=made.project)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path, line", [("lib/bb/__init__.py", '__version__ = "2.18.4"'), (PATH, "other")])
def test_other_commits_of_the_release(made, exported, path, line):
    change_line(exported, path, 1, line)
    commit(exported, "other")
    done = run("apply", exported, project=made.project)
    assert done.returncode == 0, done.stderr
    assert "base older" in done.stdout


def test_commit_that_does_not_fit(made, exported):
    pin = git(exported, "rev-parse", "HEAD").strip()
    change_line(exported, PATH, 33, "other")
    commit(exported, "other")
    before = files(exported)
    assert_refused(run("apply", exported, project=made.project), "0002-runqueue-use-the-pool.patch does not apply",
                   "%s differs at line" % PATH, "(this is 2.18.0, 1 commit after %s)" % pin[:12])
    assert files(exported) == before


def edit_master(made, path, old, new):
    """Amend the first commit of master's series, and export it."""
    git(made.bitbake, "checkout", "--quiet", "--detach")
    bitbake_series(made.bitbake)
    last = git(made.bitbake, "rev-list", "--reverse", "master..HEAD").split()
    git(made.bitbake, "reset", "--quiet", "--hard", last[0])
    full = made.bitbake / path
    full.write_text(full.read_text().replace(old, new))
    git(made.bitbake, "commit", "--quiet", "--all", "--amend", "--no-edit")
    for one in last[1:]:
        git(made.bitbake, "cherry-pick", "-X", "theirs", one)
    return run("export", made.bitbake, project=made.project)


def test_stale_override(made, exported):
    done = edit_master(made, PATH, "line five", "line 5, another way")
    assert done.returncode == 0, done.stderr
    line = "%s: %s: %s has changed in master since its override was made" % (FOLDER, key(OWN), PATH)
    assert done.stdout.splitlines()[0] == "stale: " + line
    assert_refused(run("export", made.bitbake, "--check", project=made.project), line)


def test_other_edits_reach_the_base(made, exported):
    done = edit_master(made, "lib/bb/connections/pool.py", "POOL = 1", "POOL = 1  # one")
    assert done.returncode == 0, done.stderr
    assert "stale" not in done.stdout
    assert run("export", made.bitbake, "--check", project=made.project).returncode == 0
    assert run("apply", exported, project=made.project).returncode == 0
    assert git(exported, "show", "HEAD~2:lib/bb/connections/pool.py") == "POOL = 1  # one\n"


def amend(message):
    return lambda repo: git(repo, "commit", "--quiet", "--amend", "--message", message)


def change_new_file(repo):
    put(repo, "bin/pool", "#!/bin/sh -e\n", 0o755)
    git(repo, "commit", "--quiet", "--all", "--amend", "--no-edit")


@pytest.mark.parametrize("spoil, why", [
    (amend("bin/pool: add another program\n\nThe reason.\n"), "master has no patch bin-pool-add-another-program.patch"),
    (amend("bin/pool: add a program\n\nAnother reason.\n"), "has another message than in master: bin-pool-add-a-program.patch"),
    (change_new_file, "new files are the same on all bases, but bitbake-overlay/bin/pool, line 1"),
    (lambda repo: git(repo, "checkout", "--quiet", "master"), "has no commits after its base"),
], ids=["name", "message", "new file", "no commits"])
def test_export_refusals(made, older, spoil, why):
    spoil(older)
    before = files(made.project)
    assert_refused(run("export", older, project=made.project), why)
    assert files(made.project) == before


@pytest.mark.parametrize("spoil, why", [
    (lambda text: "{", "overrides.json is not what it should be"),
    (lambda text: text.replace(PATH, "lib/bb/x.py"), "does not list the sections"),
    (lambda text: text.replace("doc-describe", "doc-explain"), "master has no patch doc-explain-the-pool.patch"),
], ids=["broken", "own", "unknown"])
def test_broken_records(made, exported, spoil, why):
    path = made.project / FOLDER / RECORD
    path.write_text(spoil(path.read_text()))
    assert_refused(run("apply", exported, project=made.project), why)
