# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""scripts/export on small trees: the same bytes again, and what it refuses."""

import pytest

from netqueue import Problem
from netqueue.series.export import check_message, export_series, slug
from netqueue.series.git import git
from netqueue.series.patches import change_files, load_series, parse_patch
from series.synthetic import bitbake_series, change_line, commit, files, put, run

FIRST = "patches/master/bitbake/0001-connections-add-a-pool.patch"


def export(made, *options):
    done = run("export", made.bitbake, *options, project=made.project)
    assert "Traceback" not in done.stderr
    return done


def assert_refused(done, why):
    assert done.returncode == 1, done.stdout
    assert done.stderr.startswith("export: ") and done.stderr.count("\n") == 1, done.stderr
    assert why in done.stderr


@pytest.fixture
def branch(made):
    """made, with the series as commits on the checkout's branch."""
    git(made.bitbake, "checkout", "--quiet", "-b", "work")
    bitbake_series(made.bitbake)
    return made


def test_export_again_is_the_same(branch):
    before = files(branch.project)
    for name in ("0001-connections-add-a-pool", "0004-bin-pool-add-a-program"):
        assert "patches/master/bitbake/%s.patch" % name in before
    assert export(branch, "--check").returncode == 0
    assert export(branch).returncode == 0
    assert files(branch.project) == before


def test_configuration_does_not_matter(branch, monkeypatch):
    for key, value in (("diff.noprefix", "true"), ("diff.algorithm", "patience"), ("diff.context", "1"),
                       ("core.abbrev", "8"), ("diff.renames", "copies"), ("diff.suppressBlankEmpty", "true"),
                       ("diff.indentHeuristic", "false"), ("log.date", "relative"), ("color.ui", "always")):
        git(branch.bitbake, "config", key, value)
    monkeypatch.setenv("GIT_DIFF_OPTS", "--unified=0")
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    done = export(branch, "--check")
    assert done.returncode == 0, done.stderr


def test_author_and_date_are_neutral(branch):
    git(branch.bitbake, "-c", "user.name=Else", "commit", "--quiet", "--amend", "--no-edit",
        "--author=Somebody <some@example.com>", "--date=2001-01-01T00:00:00")
    assert export(branch, "--check").returncode == 0


def test_overlay_is_what_the_series_adds(branch):
    overlay = files(branch.project / "bitbake-overlay")
    found = {path: entry for path, entry in overlay.items() if entry}
    assert set(found) == {"lib/bb/connections/pool.py", "lib/bb/tests/answer.txt", "bin/pool"}
    assert found["lib/bb/connections/pool.py"][0] == b"POOL = 2\n"
    assert found["lib/bb/tests/answer.txt"][0].endswith(b"\r\n\r\nbody without newline")
    assert found["bin/pool"][1] & 0o111 and not found["lib/bb/tests/answer.txt"][1] & 0o111


def test_stale_files_are_removed(branch):
    put(branch.project, "patches/master/bitbake/0009-gone.patch", "old")
    put(branch.project, "bitbake-overlay/lib/bb/gone.py", "old")
    assert_refused(export(branch, "--check"), "gone.py is not in the branch")
    assert export(branch).returncode == 0
    assert not [path for path in files(branch.project) if "gone" in path]


def edit(path, old, new):
    def change(made):
        full = made.project / path
        content = full.read_bytes()
        assert old in content
        full.write_bytes(content.replace(old, new, 1))
    return change


# Each a way in which committed patches go wrong unnoticed when nothing compares bytes.
MUTATIONS = {
    "hand-edit": edit(FIRST, b"+POOL = 1", b"+POOL = 3"),
    "message": edit(FIRST, b"The reason", b"A reason"),
    "offset": edit(FIRST, b"@@ -2,7 +2,7 @@", b"@@ -3,7 +3,7 @@"),
    "date": edit(FIRST, b"Date: Tue", b"Date: Wed"),
    "line end": edit("bitbake-overlay/lib/bb/tests/answer.txt", b"\r\n", b"\n"),
    "overlay": edit("bitbake-overlay/lib/bb/connections/pool.py", b"2", b"1"),
    "mode": lambda made: (made.project / "bitbake-overlay/bin/pool").chmod(0o644),
    "missing": lambda made: (made.project / FIRST).unlink(),
    "empty": lambda made: (made.project / FIRST).write_bytes(b""),
}


@pytest.mark.parametrize("mutate", MUTATIONS.values(), ids=MUTATIONS)
def test_check_finds(branch, mutate):
    mutate(branch)
    before = files(branch.project)
    assert_refused(export(branch, "--check"), "not what is committed: ")
    assert files(branch.project) == before
    assert export(branch).returncode == 0
    assert export(branch, "--check").returncode == 0


def test_check_names_the_line(branch):
    MUTATIONS["hand-edit"](branch)
    assert_refused(export(branch, "--check"), "'+POOL = 3', the branch gives '+POOL = 1'")


def add_commit(message):
    def add(made):
        put(made.bitbake, "lib/bb/more.py", "")
        commit(made.bitbake, message)
    return add


def add_merge(made):
    git(made.bitbake, "checkout", "--quiet", "-b", "side", "HEAD~1")
    add_commit("more: of it\n\nThe reason.\n")(made)
    git(made.bitbake, "checkout", "--quiet", "work")
    git(made.bitbake, "merge", "--quiet", "--no-edit", "side")


def add_link(made):
    (made.bitbake / "lib/bb/link.py").symlink_to("runqueue.py")
    commit(made.bitbake, "bb: add a link\n\nThe reason.\n")


REFUSALS = [
    (add_commit("fixup! runqueue: use the pool\n\nx\n"), "is a fixup"),
    (add_commit("squash! runqueue: use the pool\n\nx\n"), "is a fixup"),
    (add_commit("no component\n\nThe reason.\n"), "is not 'component: summary'"),
    (add_commit("bb: %s\n\nThe reason.\n" % ("x" * 87)), "91 characters"),
    (add_commit("bb: no reason"), "the reason for the change"),
    (add_commit("bb: tag\n\nThe reason.\n\nSigned-off-by: A <a@example.com>\n"), "tags are added by"),
    (add_commit("bb: diff\n\ndiff --git a/x b/x\n"), "in another way"),
    (add_commit("bb: header\n\nFrom: A <a@example.com>\n\nThe reason.\n"), "in another way"),
    (add_commit("bb: rule\n\nThe reason.\n---\nMore.\n"), "in another way"),
    (lambda made: git(made.bitbake, "commit", "--quiet", "--allow-empty", "-m", "bb: nothing\n\nx"), "changes nothing"),
    (add_merge, "has merge commits"),
    (add_link, "neither a file nor a program"),
    (lambda made: change_line(made.bitbake, "lib/bb/runqueue.py", 9, "mine"), "has local changes"),
    (lambda made: git(made.bitbake, "checkout", "--quiet", "master"), "has no commits after its base"),
    (lambda made: git(made.bitbake, "checkout", "--quiet", "--orphan", "new") or commit(made.bitbake, "bb: x\n\ny"),
     "is not on top of its base"),
    (lambda made: put(made.bitbake, "lib/bb/__init__.py", '__version__ = "1.0"\n') or commit(made.bitbake, "x: y\n\nz"),
     "this is bitbake 1.0"),
]


@pytest.mark.parametrize("spoil, why", REFUSALS, ids=[why for _, why in REFUSALS])
def test_refusals(branch, spoil, why):
    spoil(branch)
    before = files(branch.project)
    assert_refused(export(branch), why)
    assert files(branch.project) == before


def test_unknown_base(branch):
    assert_refused(export(branch, "--base", "scarthgap"), "there is no base scarthgap in patches/bases.json")


def test_poky_is_not_exported(made):
    done = run("export", made.poky, project=made.project)
    assert_refused(done, "is not a git checkout of its own")


@pytest.mark.parametrize("tag", ["Signed-off-by: A <a@b>", "Reviewed-By: A <a@b>", "Cc: a@b", "Fixes: 123",
                                 "Upstream-Status: Pending", "Co-authored-by: A <a@b>"])
def test_tags(tag):
    with pytest.raises(Problem, match="tags are added"):
        check_message("bb: x\n\nThe reason.\n\n%s\n" % tag, "here")


def test_prose_is_no_tag():
    check_message("bb: x\n\nNote: this is no tag, and neither is\nhttp://example.com or standby: x.\n", "here")


def test_slug():
    assert slug("fetch2/wget: don't ask twice\n\nbody") == "fetch2-wget-don-t-ask-twice"
    assert len(slug("a" * 90)) == 52


def test_patch_by_patch(made, tmp_path):
    """What the test of every single patch builds on."""
    patches = load_series("master", "bitbake", made.project)
    change_files(made.bitbake, patches[:1])
    assert (made.bitbake / "lib/bb/connections/pool.py").read_text() == "POOL = 1\n"
    undo = change_files(made.bitbake, patches[1:])
    assert (made.bitbake / "lib/bb/connections/pool.py").read_text() == "POOL = 2\n"
    undo()
    assert (made.bitbake / "lib/bb/connections/pool.py").read_text() == "POOL = 1\n"
    with pytest.raises(Problem, match="0001-connections-add-a-pool.patch does not apply"):
        change_files(made.bitbake, patches)


@pytest.mark.parametrize("path", ["../x", "/x", "lib/../../x"])
def test_paths_stay_inside(path):
    text = "diff --git a/%s b/%s\nnew file mode 100644\n--- /dev/null\n+++ b/%s\n@@ -0,0 +1 @@\n+x\n" % (path, path, path)
    with pytest.raises(Problem, match="outside of the tree"):
        parse_patch("x.patch", text)


def test_series_names_follow_order(branch):
    start = git(branch.bitbake, "rev-parse", "master").strip()
    assert [name[:4] for name in export_series(branch.bitbake, start)] == ["0001", "0002", "0003", "0004"]


@pytest.fixture
def topics(branch):
    """branch, with the first two patches in one topic and the others in another one that has a cover letter."""
    folder = branch.project / "patches/master/bitbake"
    for topic, paths in (("1-pool", sorted(folder.glob("*.patch"))[:2]), ("2-rest", sorted(folder.glob("*.patch"))[2:])):
        (folder / topic).mkdir()
        for number, path in enumerate(paths, 1):
            path.rename(folder / topic / ("%04d%s" % (number, path.name[4:])))
    put(branch.project, "patches/master/bitbake/2-rest/cover.md", "# The rest\n")
    return branch


def patch_paths(made):
    folder = made.project / "patches/master/bitbake"
    return [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*.*"))]


def test_topics_stay(topics):
    before = patch_paths(topics)
    assert before == ["1-pool/0001-connections-add-a-pool.patch", "1-pool/0002-runqueue-use-the-pool.patch",
                      "2-rest/0001-doc-describe-the-pool.patch", "2-rest/0002-bin-pool-add-a-program.patch", "2-rest/cover.md"]
    assert export(topics, "--check").returncode == 0
    assert export(topics).returncode == 0
    assert patch_paths(topics) == before


def test_new_patch_is_of_the_topic_before_it(topics):
    put(topics.bitbake, "doc/new.rst", "new\n")
    commit(topics.bitbake, "doc: add a page\n\nThe reason.\n")
    assert export(topics).returncode == 0
    assert "2-rest/0003-doc-add-a-page.patch" in patch_paths(topics)


def test_topics_out_of_order(topics):
    folder = topics.project / "patches/master/bitbake"
    (folder / "2-rest/0001-doc-describe-the-pool.patch").rename(folder / "1-pool/0003-doc-describe-the-pool.patch")
    (folder / "1-pool/0002-runqueue-use-the-pool.patch").rename(folder / "2-rest/0003-runqueue-use-the-pool.patch")
    assert_refused(export(topics), "is of the topic 1-pool, but comes after those of 2-rest")


def test_apply_some_topics(topics):
    git(topics.bitbake, "checkout", "--quiet", "master")
    done = run("apply", topics.bitbake, "--topics", "1", project=topics.project)
    assert done.returncode == 0, done.stderr
    assert "2 bitbake patches" in done.stdout and done.stdout.splitlines()[-1] == "variables: none"
    assert git(topics.bitbake, "log", "--format=%s", "master..").splitlines() == ["runqueue: use the pool", "connections: add a pool"]


@pytest.mark.parametrize("text", ["", "x", "3-1", "1-", "1,,2"])
def test_topics_that_are_none(topics, text):
    done = run("apply", topics.bitbake, "--topics", text, project=topics.project)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("apply: topics are numbers like ") and done.stderr.count("\n") == 1
