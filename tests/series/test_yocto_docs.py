# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""The patches for the Yocto Project's manuals: they are in order, and name each variable that the series documents."""

import re

from netqueue import ROOT
from netqueue.series.export import check_message, slug
from netqueue.series.patches import documented_variables, load_series, parse_patch

FILES = sorted((ROOT / "patches" / "yocto-docs").glob("*.patch"))
PATCHES = [parse_patch(path.name, path.read_text()) for path in FILES]


def added(path):
    """The lines that are added to files whose path ends so"""
    return "".join(line[1:] for patch in PATCHES for section in patch.sections if section.path.endswith(path)
                   for line in section.text.splitlines(True) if line.startswith("+") and not line.startswith("+++"))


def test_names_and_messages():
    assert FILES
    for number, (path, patch) in enumerate(zip(FILES, PATCHES), 1):
        subject, body = re.search(r"^Subject: \[PATCH\] (.*)\n(.*?)^---$", patch.header, re.MULTILINE | re.DOTALL).groups()
        check_message(subject + "\n" + body, path.name)
        assert path.name == "%04d-%s.patch" % (number, slug(subject))
        assert all(section.path.startswith("documentation/") for section in patch.sections)


def test_each_variable_is_in_the_glossary():
    glossary = re.findall(r"^   :term:`(BB_\w+)`\n      See :term:`bitbake:(BB_\w+)` in the BitBake manual.\n$",
                          added("variables.rst"), re.MULTILINE)
    assert sorted(name for name, _ in glossary) == sorted(documented_variables(load_series()))
    assert all(name == other for name, other in glossary)


def test_no_other_variable_is_named():
    known = set(documented_variables(load_series())) | {"BB_NUMBER_THREADS"}
    for path in (".rst", "release-notes-6.1.rst"):
        assert set(re.findall(r":term:`(?:bitbake:)?(BB_\w+)`", added(path))) <= known
