# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""The tests that the series brings, with the other versions of Python that are installed here."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from netqueue import ROOT
from netqueue.lab.trees import make_tree

VERSIONS = ["3.%d" % minor for minor in range(9, 15)]
# What users of releases run
PYTHON_3_8 = ("apply", "format-patch")
# Of those that need neither bin/ nor hashserv
MODULES = ["connections", "datakeys", "fetchurls", "networkslots", "prefetch", "presence", "process", "sftpconnections", "siggentasks"]


def interpreter(version):
    """The path of a complete python3.N: beside the one that runs this, as pyenv and uv install them, or in PATH."""
    beside = Path(sys.base_prefix).parent.glob("*%s.*/bin/python%s" % (version, version))
    for path in [*map(str, beside), shutil.which("python" + version)]:
        if path and subprocess.run([path, "-c", "import ssl, sqlite3, zlib"], stderr=subprocess.DEVNULL).returncode == 0:
            return path
    return None


def test_python_3_8():
    """Which scarthgap allows. The tests of checkouts run the new files with it."""
    paths = [*(ROOT / "bitbake-overlay").rglob("*.py"), *(ROOT / "scripts/netqueue/series").glob("*.py"),
             *(ROOT / "scripts" / name for name in PYTHON_3_8)]
    for path in paths:
        ast.parse(path.read_text(encoding="utf-8"), str(path), feature_version=(3, 8))


def test_scripts_with_python_3_8(made, tmp_path):
    python = interpreter("3.8")
    if python is None:
        pytest.skip("Python 3.8 is not installed, or not complete")
    for arguments in (("apply", made.poky), ("apply", made.poky, "--reverse"), ("format-patch", "master", tmp_path / "out"),
                      ("apply", made.project)):
        command = [python, ROOT / "scripts" / arguments[0], *arguments[1:], "--project", made.project]
        done = subprocess.run(list(map(str, command)), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              text=True, timeout=120)
        assert (done.returncode, done.stderr.count("\n")) == ((1, 1) if made.project in arguments else (0, 0)), done.stderr


@pytest.mark.parametrize("version", VERSIONS)
def test_other_python(version, tmp_path):
    if version == "%d.%d" % sys.version_info[:2]:
        pytest.skip("the other tests run with this one")
    python = interpreter(version)
    if python is None:
        pytest.skip("Python %s is not installed, or not complete" % version)
    tree = make_tree(ROOT / "build" / "trees" / "patched", True, ROOT / "build" / "cache")
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "LC_ALL": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1",
           "PYTHONPATH": str(tree.path / "lib")}
    done = subprocess.run([python, "-W", "error::SyntaxWarning", "-m", "unittest", *("bb.tests." + name for name in MODULES)],
                          cwd=tmp_path, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-4000:]
