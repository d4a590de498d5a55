# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""What is committed in patches/: the pins, the names, the messages, and the overlay beside it."""

import re
import tempfile
from pathlib import Path

import pytest

from netqueue import ROOT
from netqueue.series.export import COVER, DATE, check_message, slug, stale_overrides
from netqueue.series.git import EMAIL, NAME
from netqueue.series.overrides import MASTER, RECORD
from netqueue.series.patches import PARTS, Patch, change_files, load_bases, load_series, parse_patch, patch_files
from series.synthetic import files

BASES = load_bases()
FILES = [(base, part, path) for base in BASES for part in PARTS for path in patch_files(base, part)]
COVERS = [(base, part, path) for base in BASES for part in PARTS for path in (ROOT / "patches" / base / part).glob("*/" + COVER)]


def test_bases_are_pinned():
    assert "master" in BASES
    for name, base in BASES.items():
        assert re.fullmatch("[a-z0-9-]+", name)
        assert set(base) == set(PARTS)
        for part in PARTS:
            assert base[part]["repository"].startswith("https://git.openembedded.org/")
            assert re.fullmatch("[0-9a-f]{40}", base[part]["commit"])
        assert re.fullmatch(r"\d+\.\d+\.\d+", base["bitbake"]["version"])
        assert all(re.fullmatch("[a-z]+", word) for word in base["openembedded-core"]["series"])


def test_package_is_pinned():
    package = BASES["master"]["bitbake"]["pypi"]
    assert package["version"] == BASES["master"]["bitbake"]["version"]
    assert re.fullmatch("[0-9a-f]{64}", package["sha256"])


def test_nothing_else_is_in_patches():
    """But yocto-docs: see test_yocto_docs.py"""
    expected = {"bases.json"} | {"%s/%s/%s" % (base, part, RECORD) for base in BASES if base != MASTER for part in PARTS}
    expected |= {path.relative_to(ROOT / "patches").as_posix() for _, _, path in FILES + COVERS}
    assert {path for path, entry in files(ROOT / "patches", skip=("yocto-docs",)).items() if entry} == expected


def test_versions_tell_the_base():
    versions = [base["bitbake"]["version"] for base in BASES.values()]
    assert len(set(versions)) == len(versions)


def test_no_override_is_stale():
    assert stale_overrides() == []


@pytest.mark.parametrize("base, part", [(base, part) for base in BASES for part in PARTS])
def test_patches_have_the_names_and_heads_of_master(base, part):
    master = {patch.name: patch.header for patch in load_series(MASTER, part)}
    for path in patch_files(base, part):
        with open(path, encoding="utf-8", errors="surrogateescape", newline="") as handle:
            patch = parse_patch(path.name, handle.read())
        assert patch.header == master[path.relative_to(ROOT / "patches" / base).as_posix()]


@pytest.mark.parametrize("part", PARTS)
def test_numbers_are_contiguous(part):
    """In each topic"""
    for topic in {path.parent for path in patch_files(MASTER, part)}:
        numbers = sorted(int(path.name[:4]) for path in topic.glob("*.patch"))
        assert numbers == list(range(1, len(numbers) + 1))


def test_topics():
    """They are numbered from 0, and each has a cover letter without a gap that was left to be filled."""
    topics = sorted({path.parent.name for path in patch_files(MASTER, "bitbake")})
    assert [topic.partition("-")[0] for topic in topics] == [str(n) for n in range(len(topics))]
    assert {path.parent.name for path in patch_files(MASTER, "openembedded-core")} <= set(topics)
    for topic in topics:
        text = (ROOT / "patches" / MASTER / "bitbake" / topic / COVER).read_text()
        assert text.startswith("# ") and "@" not in text


@pytest.mark.parametrize("base, part, path", FILES, ids=[path.name for _, _, path in FILES])
def test_head_and_message(base, part, path):
    text = path.read_text(encoding="utf-8", errors="surrogateescape")
    head, body = text.split("\n\n", 1) if "\n\n" in text else (text, "")
    lines = head.split("\n")
    assert lines[0] == "From %s Mon Sep 17 00:00:00 2001" % ("0" * 40)
    assert lines[1] == "From: %s <%s>" % (NAME, EMAIL)
    assert lines[2] == "Date: " + DATE
    assert lines[3].startswith("Subject: [PATCH] ")
    subject = lines[3][len("Subject: [PATCH] "):]
    message = subject + "\n\n" + body.split("\n---\n\ndiff --git ", 1)[0] + "\n"
    check_message(message, path.name)
    assert path.name == "%s-%s.patch" % (path.name[:4], slug(message))


@pytest.mark.parametrize("base", BASES)
def test_overlay_is_what_the_patches_add(base):
    """Also what is outside of lib/bb, which the round trip on the package cannot see."""
    only_new = only_new_files(load_series(base, "bitbake"))
    overlay = {path: entry for path, entry in files(ROOT / "bitbake-overlay", skip=("__pycache__",)).items() if entry}
    assert applied_to_nothing(only_new) == {path: (content, bool(mode & 0o100))
                                            for path, (content, mode) in overlay.items()}


def only_new_files(patches):
    new = {section.path for patch in patches for section in patch.sections if section.is_new}
    return [Patch(patch.name, patch.header, [one for one in patch.sections if one.path in new]) for patch in patches]


def applied_to_nothing(patches):
    with tempfile.TemporaryDirectory() as folder:
        change_files(Path(folder), patches)
        return {path: (entry[0], bool(entry[1] & 0o100)) for path, entry in files(folder).items() if entry}
