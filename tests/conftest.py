# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""Fixtures for all tests: checkouts of upstream that the user names, and a home of our own.

The checkouts are read, never written to: a test clones what it needs. A
variable that is unset skips the test and says so; one that is set but
wrong is an error.
"""

import os
from pathlib import Path

import pytest

from netqueue import ROOT
from netqueue.series.checkout import bitbake_version, oecore_version


def pytest_addoption(parser):
    parser.addoption("--base", metavar="NAME", help="tests/system with the bitbake of this base of patches/bases.json, from "
                     "the checkout that BITBAKEDIR names (default: the package of master)")


def pytest_collection_modifyitems(items):
    """So that no long test is left when the other workers have nothing more to do"""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


def checkout_from(variable, is_there, what):
    value = os.environ.get(variable)
    if not value:
        pytest.skip("%s is not set: needs %s" % (variable, what))
    path = Path(value).expanduser().absolute()
    if not is_there(path):
        raise pytest.UsageError("%s=%s is not %s" % (variable, value, what))
    return path


@pytest.fixture(scope="session")
def bitbake_checkout():
    """A git checkout of bitbake that has the pinned commit. Never write to it."""
    return checkout_from("BITBAKEDIR", lambda path: bitbake_version(path) and (path / ".git").exists(),
                         "a git checkout of bitbake")


@pytest.fixture(scope="session")
def oecore_checkout():
    """A git checkout of openembedded-core that has the pinned commit. Never write to it."""
    return checkout_from("OECOREDIR", lambda path: oecore_version(path) and (path / ".git").exists(),
                         "a git checkout of openembedded-core")


@pytest.fixture(scope="session")
def poky_checkout():
    """A git checkout of poky. Never write to it."""
    return checkout_from("POKYDIR", lambda path: bitbake_version(path / "bitbake") and oecore_version(path)
                         and (path / ".git").exists(), "a git checkout of poky")


@pytest.fixture(scope="session")
def wheel():
    """bitbake's package of the base master, downloaded once for all workers and runs."""
    from netqueue.lab.trees import download, pinned_package
    return download(pinned_package("master"), ROOT / "build" / "cache")
