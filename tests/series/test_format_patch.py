# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""scripts/format-patch: the folders that it writes of each base, and that git takes them.

Those of the bases are applied to clones of checkouts in test_checkouts.py.
"""

import os
import re
import subprocess

import pytest

from netqueue import ROOT
from netqueue.series.git import git
from netqueue.series.overrides import MASTER
from netqueue.series.patches import PARTS, load_bases, load_series, parse_patch
from series.synthetic import bitbake_files, commit, files, oecore_files, put, run
from series.test_bases import applied_to_nothing, only_new_files

EVERYTHING = {"POOL = 2": "lib/bb/connections/pool.py", "line eight": "meta/classes-global/sstate.bbclass"}


def format_patch(project, *arguments):
    done = run("format-patch", *arguments, project=project)
    assert "Traceback" not in done.stderr
    return done


def read_folder(folder):
    """The patches in it, in git am's order"""
    found = []
    for path in sorted(folder.glob("*.patch")):
        with open(path, encoding="utf-8", errors="surrogateescape", newline="") as handle:
            found.append(parse_patch(path.name, handle.read()))
    return found


def git_am(repo, folder, home):
    """As a user does, who has said only who he is"""
    env = {"PATH": os.environ["PATH"], "HOME": str(home), "GIT_COMMITTER_NAME": "A", "GIT_COMMITTER_EMAIL": "a@example.com"}
    done = subprocess.run(["git", "am", *map(str, sorted(folder.glob("*.patch")))], cwd=repo, env=env, text=True,
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("base", load_bases())
@pytest.mark.parametrize("options", [(), ("--poky",)], ids=["two", "poky"])
def test_bases(base, options, tmp_path):
    """Complete, in order, with the paths of the tree that they are for, and with the files of bitbake-overlay/"""
    done = format_patch(ROOT, base, tmp_path / "out", *options)
    assert done.returncode == 0, done.stderr
    written = {}
    for part, where, prefix in zip(PARTS, ("out", "out") if options else ["out/" + part for part in PARTS],
                                   ("bitbake/" if options else "", "")):
        patches = written.setdefault(where, read_folder(tmp_path / where))
        expected = load_series(base, part)
        mine = [patch for patch in patches if any(patch.header == one.header for one in expected)]
        assert [(patch.header, patch.paths()) for patch in mine] == [
            (patch.header, [prefix + path for path in patch.paths()]) for patch in expected]
        # git am takes them out of it
        assert not any("\r" in patch.text for patch in mine)
        if part == "bitbake":
            overlay = files(ROOT / "bitbake-overlay", skip=("__pycache__",))
            assert applied_to_nothing(only_new_files(mine)) == {
                prefix + path: (entry[0], bool(entry[1] & 0o100)) for path, entry in overlay.items() if entry}
    for where, patches in written.items():
        names = [patch.name for patch in patches]
        assert [name[:4] for name in names] == ["%04d" % number for number in range(1, len(names) + 1)]
        assert (tmp_path / where / "series").read_text().splitlines() == names
    assert sum(map(len, written.values())) == sum(len(load_series(base, part)) for part in PARTS)
    assert len(done.stdout.splitlines()) == len(written)


def without_carriage_returns(made):
    """git am takes them out of patches, and no patch of the real series has any"""
    path = next((made.project / "patches/master/bitbake").glob("*-bin-pool*"))
    path.write_bytes(path.read_bytes().replace(b"\r", b""))


def test_git_am(made, tmp_path):
    without_carriage_returns(made)
    assert format_patch(made.project, MASTER, tmp_path / "out").returncode == 0
    for part, repo in zip(PARTS, (made.bitbake, made.oecore)):
        git_am(repo, tmp_path / "out" / part, tmp_path)
        assert len(git(repo, "log", "--format=%s", "HEAD").splitlines()) == 1 + len(load_series(MASTER, part, made.project))
    for word, path in EVERYTHING.items():
        assert word in ((made.bitbake if path.startswith("lib") else made.oecore) / path).read_text()


def test_poky(made, tmp_path):
    without_carriage_returns(made)
    assert format_patch(made.project, MASTER, tmp_path / "out", "--poky").returncode == 0
    git_am(made.poky, tmp_path / "out", tmp_path)
    for word, path in EVERYTHING.items():
        assert word in (made.poky / ("bitbake/" if path.startswith("lib") else "") / path).read_text()


def test_list_for_kas(made, tmp_path):
    """Which goes through the list, and calls git apply"""
    assert format_patch(made.project, MASTER, tmp_path / "out", "--poky").returncode == 0
    for name in (tmp_path / "out/series").read_text().splitlines():
        git(made.poky, "apply", "--whitespace=nowarn", str(tmp_path / "out" / name))
        commit(made.poky, "kas")
    assert b"\r\n" in (made.poky / "bitbake/lib/bb/tests/answer.txt").read_bytes()
    assert (made.poky / "bitbake/bin/pool").stat().st_mode & 0o111


def test_only_the_file_names_are_changed(made, tmp_path):
    """Not what looks like them in a hunk; also of a new file without content, and a binary one"""
    work = tmp_path / "work"
    git(tmp_path, "clone", "--quiet", str(made.bitbake), str(work))
    put(work, "lib/b", "--- a/lib/b\n+++ b/lib/b\ndiff --git a/lib/b b/lib/b\n")
    put(work, "lib/b empty", "")
    put(work, "picture", b"\0\1\2")
    commit(work, "lib: add odd files\n\nThe reason.\n")
    assert run("export", work, project=made.project).returncode == 0
    assert format_patch(made.project, MASTER, tmp_path / "out", "--poky").returncode == 0
    git_am(made.poky, tmp_path / "out", tmp_path)
    assert git(made.poky, "rev-parse", "HEAD:bitbake") == git(work, "rev-parse", "HEAD^{tree}")


def test_topics(tmp_path):
    assert format_patch(ROOT, "scarthgap", tmp_path / "out", "--topics", "0,2").returncode == 0
    for part in PARTS:
        headers = [patch.header for patch in read_folder(tmp_path / "out" / part)]
        assert headers == [patch.header for patch in load_series("scarthgap", part, topics={0, 2})]
    assert format_patch(ROOT, "scarthgap", tmp_path / "one", "--topics", "5").returncode == 0
    assert {path.name for path in (tmp_path / "one").iterdir()} == {"bitbake", "kas.yml"}


@pytest.mark.parametrize("arguments, why", [
    (("other", "out"), "there is no base other in patches/bases.json, only master"), ((MASTER, "full"), "full is there already and not empty"),
    ((MASTER, "file"), "file is there already"), ((MASTER, "file/out"), "file"), ((MASTER, "out", "--topics", "x"), "topics are"),
    ((MASTER, "out", "--topics", "8"), "no patch of the base master is in these topics"), ((MASTER,), "FOLDER"),
])
def test_refusals(made, tmp_path, arguments, why):
    put(tmp_path, "full/mine", "")
    put(tmp_path, "file", "")
    before = files(tmp_path, skip=("made",))
    done = format_patch(made.project, arguments[0], *(tmp_path / name if number == 0 else name
                                                      for number, name in enumerate(arguments[1:])))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith("format-patch: ") and why in done.stderr
    assert files(tmp_path, skip=("made",)) == before


def test_empty_folder(tmp_path):
    assert format_patch(ROOT, MASTER, tmp_path).returncode == 0
    assert {path.name for path in tmp_path.iterdir()} == {*PARTS, "kas.yml"}


@pytest.mark.parametrize("below, options, expected", [
    ("", (), {"bitbake": "out/bitbake", "openembedded-core": "out/openembedded-core"}),
    ("layer/kas", ("--poky",), {"poky": "kas/out"})])
def test_kas_fragment(made, tmp_path, below, options, expected):
    """Its paths are those below the top of the repository that it is in. With kas itself: system/test_kas.py"""
    folder = tmp_path / below / "out"
    if below:
        folder.parent.mkdir(parents=True)
        git(tmp_path / "layer", "init", "--quiet")
    assert format_patch(made.project, "master", folder, *options).returncode == 0
    text = (folder / "kas.yml").read_text()
    named = re.findall(r"^  (\S+):\n    patches:\n      netqueue:\n        repo: netqueue-patches\n        path: (\S+)$",
                       text, re.MULTILINE)
    assert dict(named) == expected
    assert "base master" in text and "  netqueue-patches:\n    layers: {}\n" in text
