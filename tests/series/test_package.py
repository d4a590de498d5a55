# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""The committed series on bitbake's package from PyPI: the round trip, and every patch on its own."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from netqueue import ROOT
from netqueue.lab.trees import LAUNCHERS
from netqueue.series.export import export_overlay, export_series
from netqueue.series.git import git
from netqueue.series.patches import PLAIN, apply_to_plain_tree, is_below, load_series, parse_patch
from series.synthetic import commit, files

PATCHES = load_series("master", "bitbake")
PLAIN_PATCHES = [patch for patch in PATCHES if patch.paths(PLAIN)]

# The package was made from files that differ a little from the pinned commit.
DIFFERENT = {PLAIN + path for path in ("data.py", "parse/ast.py", "tests/data.py", "tests/setup.py")}

needs_patches = pytest.mark.skipif(not PATCHES, reason="there are no patches for bitbake yet")


@pytest.fixture(scope="module")
def unpacked(wheel, tmp_path_factory):
    """The package's bb as TREE/lib/bb; copy it before changing it."""
    tree = tmp_path_factory.mktemp("package")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tree / "lib", [name for name in archive.namelist() if name.startswith("bb/")])
    return tree


@pytest.fixture
def tree(unpacked, tmp_path):
    return shutil.copytree(unpacked, tmp_path / "tree")


def changed_lines(section):
    """The lines that a patch takes out and puts in, whatever is around them."""
    body = section.text.split("\n@@ ", 1)[-1]
    # The first line is what follows @@
    return [line for line in body.split("\n")[1:] if line.startswith(("+", "-"))]


@needs_patches
def test_round_trip(tree):
    git(tree, "init", "--quiet")
    start = commit(tree, "the package")
    for patch in PLAIN_PATCHES:
        git(tree, "am", "--quiet", "--no-3way", "--keep-cr", "--no-scissors", data=patch.header + patch.diff(PLAIN))
    exported = export_series(tree, start)
    assert len(exported) == len(PLAIN_PATCHES)
    for patch, (name, content) in zip(PLAIN_PATCHES, exported.items()):
        # The numbers differ when a patch has no part in lib/bb.
        assert name[5:] == Path(patch.name).name[5:]
        again = parse_patch(name, content.decode("utf-8", "surrogateescape"))
        assert again.header == patch.header
        wanted = [section for section in patch.sections if is_below(section.path, PLAIN)]
        assert [section.path for section in again.sections] == [section.path for section in wanted]
        for one, two in zip(again.sections, wanted):
            if one.path in DIFFERENT:
                assert changed_lines(one) == changed_lines(two)
            else:
                assert one.text == two.text
    overlay = {path: (content, bool(mode & 0o100)) for path, (content, mode) in overlay_files().items()}
    assert export_overlay(tree, start) == overlay


def overlay_files():
    found = files(ROOT / "bitbake-overlay", skip=("__pycache__",))
    return {path: entry for path, entry in found.items() if entry and is_below(path, PLAIN)}


@needs_patches
def test_plain_tree(tree):
    done = apply_to_plain_tree(tree)
    assert done.applied == [patch.name for patch in PLAIN_PATCHES]
    assert len(done.applied) + len(done.not_applicable) == len(PATCHES)
    assert {"lib"} == {path.name for path in tree.iterdir()}


def module_name(path):
    return path[len("lib/"):-len(".py")].replace("/", ".")


def python(tree, home, *arguments):
    # The package has no hashserv and prserv, which bb imports.
    env = {"PATH": os.environ["PATH"], "HOME": str(home), "LC_ALL": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1",
           "PYTHONPATH": "%s:%s" % (tree / "lib", LAUNCHERS / "lib")}
    done = subprocess.run([sys.executable, *arguments], cwd=home, env=env, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-4000:]


def topic(patch):
    """Its number, None for no patch"""
    return patch and patch.name[8:].partition("-")[0]


@pytest.mark.skipif(not PLAIN_PATCHES, reason="there are no patches for bitbake yet")
@pytest.mark.parametrize("count", range(1, len(PLAIN_PATCHES) + 1),
                         ids=lambda count: topic(PLAIN_PATCHES[count - 1]) + "-" + Path(PLAIN_PATCHES[count - 1].name).name[:4])
def test_every_patch(tree, tmp_path, count):
    """
    After each patch all files that were touched compile, bitbake imports, and the tests that it adds or changes pass; after
    each topic all that were added by then.
    """
    applied = PATCHES[:PATCHES.index(PLAIN_PATCHES[count - 1]) + 1]
    apply_to_plain_tree(tree, upto=len(applied))
    paths = {path for patch in applied for path in patch.paths(PLAIN) if (tree / path).exists()}
    for path in sorted(paths):
        if path.endswith(".py"):
            compile((tree / path).read_bytes(), path, "exec")
    new = {section.path for patch in applied for section in patch.sections if section.is_new}
    modules = sorted(module_name(path) for path in paths & new
                     if path.endswith(".py") and not path.endswith("__init__.py"))
    tests = [module for module in modules if module.startswith("bb.tests.")]
    others = [module for module in modules if module not in tests]
    if topic(applied[-1]) == topic((PLAIN_PATCHES[count:] or [None])[0]):
        own = {module_name(path) for path in applied[-1].paths(PLAIN)}
        tests = [module for module in tests if module in own]
    upstream = ["bb", "bb.build", "bb.cache", "bb.cooker", "bb.fetch2", "bb.runqueue", "bb.server.process"]
    python(tree, tmp_path, "-W", "error::SyntaxWarning", "-c", "import " + ", ".join(upstream + others))
    if tests:
        python(tree, tmp_path, "-m", "unittest", *tests)
