# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""Fixtures for the tests of the series: see synthetic.py."""

import shutil

import pytest

from series import synthetic


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    return synthetic.make(tmp_path_factory.mktemp("synthetic"))


@pytest.fixture
def made(made_once, tmp_path):
    """Fresh copies of the synthetic trees and their project; a test may change them."""
    top = made_once.project.parent
    shutil.copytree(top, tmp_path / "made", symlinks=True)
    return synthetic.Made(*(tmp_path / "made" / name for name in ("bitbake", "oecore", "poky", "project")))
