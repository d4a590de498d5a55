# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""scripts/apply on small trees: what it makes, and that what it refuses stays as it was."""

import os
import shutil

import pytest

from netqueue import Problem
from netqueue.series import checkout
from netqueue.series.export import export_tree, first_difference
from netqueue.series.git import git
from netqueue.series.patches import change_files, load_series
from series.synthetic import change_line, commit, files, oecore_files, put, run, state


def apply(made, tree, *options, **kwargs):
    done = run("apply", tree, *options, project=made.project, **kwargs)
    assert "Traceback" not in done.stderr
    return done


def assert_refused(done, *words):
    """One line that names the thing, and exit code 1."""
    assert done.returncode == 1, done.stdout
    assert done.stderr.startswith("apply: ") and done.stderr.count("\n") == 1, done.stderr
    for word in words:
        assert str(word) in done.stderr
    assert done.stdout == ""


def assert_ok(done):
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_bitbake_checkout(made):
    assert_ok(apply(made, made.bitbake))
    assert git(made.bitbake, "log", "--format=%s", "master..netqueue").split("\n")[:-1] == [
        "bin/pool: add a program", "doc: describe the pool", "runqueue: use the pool", "connections: add a pool"]
    assert git(made.bitbake, "status", "--porcelain") == ""
    assert (made.bitbake / "bin/pool").stat().st_mode & 0o111
    assert b"\r\n" in (made.bitbake / "lib/bb/tests/answer.txt").read_bytes()
    assert first_difference(export_tree(made.bitbake, project=made.project), made.project) is None


def test_same_commits_everywhere(made, monkeypatch):
    """The ids depend on the base only: not on who, when, or the configuration."""
    other = made.bitbake.with_name("other")
    shutil.copytree(made.bitbake, other)
    git(other, "config", "user.name", "Somebody")
    git(other, "config", "am.threeWay", "true")
    git(other, "config", "diff.noprefix", "true")
    assert_ok(apply(made, made.bitbake))
    monkeypatch.setenv("GIT_COMMITTER_NAME", "Else")
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    assert_ok(apply(made, other))
    assert git(other, "rev-parse", "netqueue") == git(made.bitbake, "rev-parse", "netqueue")


def test_hooks_do_not_run(made):
    put(made.bitbake, ".git/hooks/pre-applypatch", "#!/bin/sh\nexit 1\n", 0o755)
    put(made.bitbake, ".git/hooks/post-checkout", "#!/bin/sh\nexit 1\n", 0o755)
    assert_ok(apply(made, made.bitbake))


@pytest.mark.parametrize("home", ["", None])
def test_without_home(made, home):
    env = {"PATH": os.environ["PATH"]}
    if home is not None:
        env["HOME"] = home
    assert_ok(apply(made, made.bitbake, env=env))


@pytest.mark.parametrize("tree", ["bitbake", "oecore", "poky"])
def test_reverse_restores(made, tree):
    tree = made.project.parent / tree
    before = state(tree)
    assert_ok(apply(made, tree))
    assert state(tree) != before
    cache = tree / "lib/bb/connections/__pycache__/pool.pyc"
    if tree == made.bitbake:
        put(tree, cache, b"bytecode")
    assert_ok(apply(made, tree, "--reverse"))
    assert state(tree) == before


def test_detached_head(made):
    git(made.bitbake, "checkout", "--quiet", "--detach")
    before = state(made.bitbake)
    assert_ok(apply(made, made.bitbake))
    assert_ok(apply(made, made.bitbake, "--reverse"))
    assert state(made.bitbake) == before


def test_poky(made):
    assert_ok(apply(made, made.poky))
    assert (made.poky / "bitbake/lib/bb/connections/pool.py").read_text() == "POOL = 2\n"
    assert "line eight" in (made.poky / "meta/classes-global/sstate.bbclass").read_text()
    assert git(made.poky, "rev-list", "--count", "master..netqueue").strip() == "5"
    assert_refused(apply(made, made.poky), made.poky, "already")


@pytest.mark.parametrize("folder", ["", "layers"])
def test_folder_with_poky(made, tmp_path, folder):
    """kas and others put it into their own."""
    (tmp_path / "work" / folder).mkdir(parents=True)
    shutil.move(str(made.poky), str(tmp_path / "work" / folder))
    assert_ok(apply(made, tmp_path / "work"))
    assert git(tmp_path / "work" / folder / "poky", "rev-list", "--count", "master..netqueue").strip() == "5"


def test_bitbake_inside_poky(made):
    assert_ok(apply(made, made.poky / "bitbake"))
    assert git(made.poky, "rev-list", "--count", "master..netqueue").strip() == "4"


def test_folder_with_both(made, tmp_path):
    both = tmp_path / "both"
    both.mkdir()
    shutil.move(str(made.bitbake), str(both / "one"))
    shutil.move(str(made.oecore), str(both / "two"))
    before = state(both / "one"), state(both / "two")
    done = apply(made, both)
    assert_ok(done)
    assert done.stdout.count("\n") == 2
    for tree in ("one", "two"):
        assert checkout.current_branch(both / tree) == "netqueue"
    assert_ok(apply(made, both, "--reverse"))
    assert (state(both / "one"), state(both / "two")) == before


def test_bitbake_cloned_into_oecore(made):
    shutil.move(str(made.bitbake), str(made.oecore / "bitbake"))
    assert_ok(apply(made, made.oecore))
    assert checkout.current_branch(made.oecore / "bitbake") == checkout.current_branch(made.oecore) == "netqueue"


@pytest.fixture
def setup_folder(made, tmp_path):
    """As bitbake-setup makes it, with the links that it adds, and one repository without a part of the series"""
    layers = tmp_path / "setup/layers"
    for folder in ("meta-yocto", "openembedded-core/scripts"):
        (layers / folder).mkdir(parents=True)
    (tmp_path / "setup/build/conf").mkdir(parents=True)
    shutil.move(str(made.bitbake), str(layers / "bitbake"))
    shutil.copytree(made.oecore, layers / "openembedded-core", dirs_exist_ok=True)
    put(layers, "openembedded-core/scripts/oe-setup-build", "", 0o755)
    for link, target in (("setup-build", "openembedded-core/scripts/oe-setup-build"),
                         ("oe-scripts", "openembedded-core/scripts"), ("oe-init-build-env-dir", "openembedded-core")):
        (layers / link).symlink_to(target)
    return tmp_path / "setup"


def test_folder_of_bitbake_setup(made, setup_folder):
    before = files(setup_folder, skip=(".git",))
    done = apply(made, setup_folder)
    assert_ok(done)
    assert done.stdout.count("\n") == 2
    for name in ("bitbake", "openembedded-core"):
        assert checkout.current_branch(setup_folder / "layers" / name) == "netqueue"
    assert_ok(apply(made, setup_folder, "--reverse"))
    assert files(setup_folder, skip=(".git",)) == before
    assert_ok(apply(made, setup_folder / "layers"))


def test_folder_of_bitbake_setup_with_a_checkout_of_the_user(made, setup_folder):
    """bitbake-setup init -L bitbake /src/mine makes a link of it."""
    mine = setup_folder.with_name("mine")
    (setup_folder / "layers/bitbake").rename(mine)
    (setup_folder / "layers/bitbake").symlink_to(mine)
    done = apply(made, setup_folder)
    assert_ok(done)
    assert done.stdout.startswith("%s: 4 bitbake patches" % mine)
    assert checkout.current_branch(mine) == checkout.current_branch(setup_folder / "layers/openembedded-core") == "netqueue"


def test_both_or_none(made, tmp_path):
    """The second tree is dirty: the first must not be touched either."""
    shutil.move(str(made.bitbake), str(tmp_path / "both" / "one"))
    shutil.move(str(made.oecore), str(tmp_path / "both" / "two"))
    change_line(tmp_path / "both/two", "meta/classes-global/sstate.bbclass", 30, "mine")
    before = files(tmp_path / "both")
    assert_refused(apply(made, tmp_path / "both"), "two has local changes", "sstate.bbclass")
    assert files(tmp_path / "both") == before


def test_late_failure_is_undone_in_all(made, tmp_path, monkeypatch):
    """git am fails in the second tree, after the check: it had been in the first already."""
    shutil.move(str(made.bitbake), str(tmp_path / "both" / "one"))
    shutil.move(str(made.oecore), str(tmp_path / "both" / "two"))
    change_line(tmp_path / "both/two", "meta/classes-global/sstate.bbclass", 8, "other")
    commit(tmp_path / "both/two", "other")
    before = state(tmp_path / "both/one"), state(tmp_path / "both/two")
    monkeypatch.setattr(checkout, "_check_patches", lambda part: None)
    with pytest.raises(Problem, match="0001-sstate-ask-in-one-batch.patch does not apply to .*two"):
        checkout.change(checkout.find_targets(tmp_path / "both", made.project), False, False)
    assert (state(tmp_path / "both/one"), state(tmp_path / "both/two")) == before


def test_check_writes_nothing(made):
    before = files(made.bitbake)
    done = apply(made, made.bitbake, "--check")
    assert_ok(done)
    assert "would be" in done.stdout and "4 bitbake patches" in done.stdout
    assert files(made.bitbake) == before


def make_dirty(made):
    change_line(made.bitbake, "lib/bb/runqueue.py", 20, "mine")
    return "has local changes (lib/bb/runqueue.py)"


def make_staged(made):
    put(made.bitbake, "lib/bb/mine.py", "")
    git(made.bitbake, "add", "lib/bb/mine.py")
    return "has local changes (lib/bb/mine.py)"


def make_untracked_in_the_way(made):
    put(made.bitbake, "lib/bb/connections/pool.py", "mine\n")
    return "the untracked file lib/bb/connections/pool.py would be overwritten"


def make_unknown_version(made):
    put(made.bitbake, "lib/bb/__init__.py", '__version__ = "2.4.0"\n')
    commit(made.bitbake, "other version")
    return "%s: this is bitbake 2.4.0; bases are master (2.19.0)" % made.bitbake


def make_conflict(made):
    change_line(made.bitbake, "lib/bb/runqueue.py", 30, "other")
    commit(made.bitbake, "other")
    return "0002-runqueue-use-the-pool.patch does not apply"


def make_branch(made):
    git(made.bitbake, "branch", "netqueue")
    return "has a branch netqueue already"


def make_merged(made):
    """Somebody applied the series by hand on another branch."""
    apply(made, made.bitbake)
    git(made.bitbake, "checkout", "--quiet", "master")
    git(made.bitbake, "merge", "--quiet", "netqueue")
    git(made.bitbake, "branch", "--quiet", "-D", "netqueue")
    return "has the series already"


def make_am_in_progress(made):
    (made.bitbake / ".git/rebase-apply").mkdir()
    return "a git am or rebase is in progress"


def make_merge_in_progress(made):
    put(made.bitbake, ".git/MERGE_HEAD", git(made.bitbake, "rev-parse", "HEAD"))
    return "a merge is in progress"


def make_locked(made):
    put(made.bitbake, ".git/index.lock", "")
    return "another git command is running"


def make_unborn(made):
    git(made.bitbake, "checkout", "--quiet", "--orphan", "empty")
    return "has no commit"


def make_broken_series(made):
    path = next((made.project / "patches/master/bitbake").glob("0002*"))
    path.write_text("no diff in here\n")
    return "0002-runqueue-use-the-pool.patch: holds no diff"


def make_broken_bases(made):
    put(made.project, "patches/bases.json", "{")
    return "bases.json is not what it should be"


REFUSALS = [make_dirty, make_staged, make_untracked_in_the_way, make_unknown_version, make_conflict, make_branch,
            make_merged, make_am_in_progress, make_merge_in_progress, make_locked, make_unborn, make_broken_series,
            make_broken_bases]


@pytest.mark.parametrize("options", [(), ("--check",)], ids=["apply", "check"])
@pytest.mark.parametrize("spoil", REFUSALS, ids=lambda spoil: spoil.__name__)
def test_refusals(made, spoil, options):
    why = spoil(made)
    before = files(made.bitbake)
    assert_refused(apply(made, made.bitbake, *options), why)
    assert files(made.bitbake) == before


def test_twice(made):
    assert_ok(apply(made, made.bitbake))
    before = files(made.bitbake)
    assert_refused(apply(made, made.bitbake), "has the series already (it is on the branch netqueue)")
    assert files(made.bitbake) == before


def test_twice_without_new_files(made):
    """openembedded-core's part adds no file that would tell."""
    assert_ok(apply(made, made.oecore))
    git(made.oecore, "checkout", "--quiet", "-b", "other")
    git(made.oecore, "branch", "--quiet", "-D", "netqueue")
    assert_refused(apply(made, made.oecore), "has the series already")


def test_poky_of_an_unknown_release(made):
    put(made.poky, "bitbake/lib/bb/__init__.py", '__version__ = "2.12.1"\n')
    put(made.poky, "meta/conf/layer.conf", 'LAYERSERIES_CORENAMES = "walnascar"\n')
    put(made.poky, "meta-poky/conf/layer.conf", "")
    commit(made.poky, "walnascar")
    before = files(made.poky)
    assert_refused(apply(made, made.poky),
                   "%s: this is poky walnascar with bitbake 2.12.1; bases are master (2.19.0)\n" % made.poky)
    assert files(made.poky) == before


def test_unknown_release_of_one(made):
    put(made.oecore, "meta/conf/layer.conf", 'LAYERSERIES_CORENAMES = "kirkstone"\n')
    commit(made.oecore, "kirkstone")
    before = files(made.oecore)
    assert_refused(apply(made, made.oecore), "this is openembedded-core kirkstone; bases are master (wrynose or blacksail)")
    shutil.rmtree(made.poky)
    assert_refused(apply(made, made.project.parent), "this is bitbake 2.19.0 and openembedded-core kirkstone; bases are")
    assert files(made.oecore) == before


def test_conflict_without_the_base(made):
    """In poky, or in a checkout that lacks it, the date has to do."""
    change_line(made.poky, "bitbake/lib/bb/runqueue.py", 30, "other")
    commit(made.poky, "other")
    date = git(made.poky, "log", "-1", "--format=%cs").strip()
    assert_refused(apply(made, made.poky), "0002-runqueue-use-the-pool.patch does not apply", "lib/bb/runqueue.py differs at line",
                   "(this is 2.19.0 of %s, the patches are made for %s)" % (date, git(made.bitbake, "rev-parse", "HEAD")[:12]))


def test_other_bases_do_not_mix(made):
    bases = checkout.load_bases(made.project)
    parts = checkout.find_parts(made.poky)
    bases["older"] = {"bitbake": dict(bases["master"]["bitbake"], version="2.8.1"),
                      "openembedded-core": bases["master"]["openembedded-core"]}
    parts[0].version = "2.8.1"
    bases["master"]["openembedded-core"] = dict(bases["master"]["openembedded-core"])
    with pytest.raises(Problem, match="do not go together"):
        checkout.find_base(parts, bases)


@pytest.mark.parametrize("spoil, why", [
    (lambda tree: (put(tree, "mine", ""), commit(tree, "mine")), "has commits of yours on top (1)"),
    (lambda tree: git(tree, "commit", "--quiet", "--amend", "--message", "x"), "no longer what scripts/apply made"),
    (lambda tree: change_line(tree, "lib/bb/runqueue.py", 20, "mine"), "has local changes"),
    (lambda tree: git(tree, "checkout", "--quiet", "master"), "is not on the branch netqueue"),
    (lambda tree: git(tree, "config", "--unset", "branch.netqueue.netqueue-tip"), "was not made by scripts/apply"),
], ids=["extra", "amended", "dirty", "elsewhere", "unmarked"])
def test_reverse_refusals(made, spoil, why):
    assert_ok(apply(made, made.bitbake))
    spoil(made.bitbake)
    before = files(made.bitbake)
    assert_refused(apply(made, made.bitbake, "--reverse"), why)
    assert files(made.bitbake) == before


def test_reverse_without_series(made):
    assert_refused(apply(made, made.bitbake, "--reverse"), "the series is not applied")


@pytest.fixture
def tarball(made, tmp_path):
    """The synthetic trees without git, in a repository that has nothing to do with them."""
    top = tmp_path / "tarball"
    top.mkdir()
    git(top, "init", "--quiet")
    put(top, "README", "")
    commit(top, "unrelated")
    shutil.copytree(made.poky, top / "poky", ignore=shutil.ignore_patterns(".git"))
    return top / "poky"


def test_tarball(made, tarball):
    before = files(tarball)
    git_before = files(tarball.parent / ".git")
    assert_ok(apply(made, tarball))
    assert (tarball / "bitbake/lib/bb/connections/pool.py").read_text() == "POOL = 2\n"
    assert (tarball / "bitbake/bin/pool").stat().st_mode & 0o111
    assert_refused(apply(made, tarball), "has the series already")
    assert_ok(apply(made, tarball, "--reverse"))
    assert files(tarball) == before
    assert files(tarball.parent / ".git") == git_before
    assert_refused(apply(made, tarball, "--reverse"), "does not have the series")


def test_temporary_folder_in_a_repository(made, tarball):
    """There git apply would skip all files, and call that a success."""
    (tarball.parent / "tmp").mkdir()
    assert_ok(apply(made, tarball, env=dict(os.environ, TMPDIR=str(tarball.parent / "tmp"))))
    assert (tarball / "bitbake/lib/bb/connections/pool.py").read_text() == "POOL = 2\n"
    assert list((tarball.parent / "tmp").iterdir()) == []


def test_tarball_conflict(made, tarball):
    change_line(tarball, "meta/classes-global/sstate.bbclass", 8, "other")
    before = files(tarball)
    assert_refused(apply(made, tarball), "0001-sstate-ask-in-one-batch.patch does not apply", "sstate.bbclass")
    assert files(tarball) == before


def test_tarball_edited_after(made, tarball):
    assert_ok(apply(made, tarball))
    change_line(tarball, "bitbake/lib/bb/runqueue.py", 30, "mine")
    before = files(tarball)
    assert_refused(apply(made, tarball, "--reverse"), "0002-runqueue-use-the-pool.patch does not come out")
    assert files(tarball) == before


def test_failed_write_is_undone(made, tarball, monkeypatch):
    """The disk is full after some files have been written."""
    before = files(tarball)
    replace, written = os.replace, []

    def failing(source, target):
        if str(tarball) in str(target):
            written.append(target)
            if len(written) == 3:
                raise OSError(28, "No space left on device", str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(Problem, match="No space left"):
        change_files(tarball / "bitbake", load_series("master", "bitbake", made.project))
    assert len(written) > 3
    assert files(tarball) == before


def test_symbolic_link_is_refused(made, tarball):
    (tarball / "bitbake/doc/manual.rst").rename(tarball / "manual.rst")
    (tarball / "bitbake/doc/manual.rst").symlink_to("../../manual.rst")
    before = files(tarball)
    assert_refused(apply(made, tarball), "manual.rst is not a plain file")
    assert files(tarball) == before


def test_hard_links_are_not_written_through(made, tarball, tmp_path):
    os.link(tarball / "bitbake/lib/bb/runqueue.py", tmp_path / "link.py")
    before = (tmp_path / "link.py").read_bytes()
    assert_ok(apply(made, tarball))
    assert (tmp_path / "link.py").read_bytes() == before


@pytest.mark.parametrize("name, why", [
    ("nothing", "is not a folder"), ("empty", "holds neither"), ("project", "holds neither"),
])
def test_no_tree(made, name, why):
    (made.project.parent / "empty").mkdir()
    assert_refused(apply(made, made.project.parent / name), why)


def test_two_of_a_kind(made):
    shutil.copytree(made.bitbake, made.project.parent / "also")
    assert_refused(apply(made, made.project.parent), "holds more than one bitbake tree (also and bitbake)")


def test_wrong_arguments(made):
    assert_refused(apply(made, made.bitbake, "--bogus"), "--bogus")


def test_oecore_files_are_found_by_content(tmp_path):
    oecore_files(tmp_path / "any name")
    assert [part.name for part in checkout.find_parts(tmp_path)] == ["openembedded-core"]


@pytest.mark.parametrize("version, fits", [("2.12.0", 4), ("2.19.0", 3)])
def test_check_names_the_nearest_base(made, version, fits):
    """Of a release without patches, and of a commit on which one does not fit"""
    put(made.bitbake, "lib/bb/__init__.py", '__version__ = "%s"\n' % version)
    if fits < 4:
        change_line(made.bitbake, "lib/bb/runqueue.py", 30, "another line")
    commit(made.bitbake, "another state")
    before = state(made.bitbake)
    done = apply(made, made.bitbake, "--check")
    assert_refused(done, "the nearest base is master, of which %d of its 4 bitbake patches fit exactly" % fits, "git am -3")
    done = apply(made, made.bitbake)
    assert_refused(done)
    assert "git am" not in done.stderr
    assert state(made.bitbake) == before
