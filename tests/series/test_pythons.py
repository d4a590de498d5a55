# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""The tests that the series brings, and those of this project's that start no build, with other versions of Python."""

import ast
import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from netqueue import ROOT, environment
from netqueue.lab.trees import make_tree

VERSIONS = ["3.%d" % minor for minor in range(9, 15)]
# What users of releases run
PYTHON_3_8 = ("apply", "format-patch")
# The tests that the series adds
MODULES = sorted(path.stem for path in (ROOT / "bitbake-overlay" / "lib" / "bb" / "tests").glob("*.py"))
# The oldest that bitbake runs with, and one whose asyncio, ssl and fork() differ from that
WHOLE_TESTS = ["3.9", "3.13"]
# Fewer than tests/unit and tests/wire have: a run of these has found them
SOME = 500
OTHER_PROGRAMS = ("test_real_servers.py", "test_mirror_page.py")
REQUIREMENTS = [environment.REQUIREMENTS, ROOT / "tests" / "requirements.txt"]
MAKE_VENV = """
import sys
sys.path.insert(0, sys.argv[1])
from netqueue import environment
print(environment.ensure_venv(sys.argv[2], sys.argv[3:], say=lambda line: None))
"""
SECONDS = 1200


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


def other_interpreter(version):
    if version == "%d.%d" % sys.version_info[:2]:
        pytest.skip("the other tests run with this one")
    python = interpreter(version)
    if python is None:
        pytest.skip("Python %s is not installed, or not complete" % version)
    return python


def run(command, folder, **variables):
    env = {"PATH": os.environ["PATH"], "HOME": str(folder), "LC_ALL": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1", **variables}
    done = subprocess.run(list(map(str, command)), cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def tree():
    return make_tree(ROOT / "build" / "trees" / "patched", True, ROOT / "build" / "cache")


def venv_of(version, tmp_path):
    """The path of a venv's Python. Several workers ask for the same one."""
    python = other_interpreter(version)
    place = ROOT / "build" / ("venv-" + version)
    place.parent.mkdir(exist_ok=True)
    with open(str(place) + ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return run([python, "-c", MAKE_VENV, ROOT / "scripts", place, *REQUIREMENTS], tmp_path).strip()


@pytest.mark.long
@pytest.mark.timeout(SECONDS)
@pytest.mark.parametrize("folder", ["unit", "wire"])
@pytest.mark.parametrize("version", WHOLE_TESTS)
def test_other_python_whole(version, folder, tree, tmp_path):
    """The tests of tests/unit and tests/wire, except those whose subject is other programs"""
    output = run([venv_of(version, tmp_path), "-m", "pytest", "-q", "-p", "no:xdist", "--rootdir", ROOT,
                  "--basetemp", tmp_path / "base", "-o", "cache_dir=%s" % (tmp_path / "cache"),
                  *("--ignore=%s" % (ROOT / "tests" / "wire" / name) for name in OTHER_PROGRAMS), ROOT / "tests" / folder], tmp_path)
    assert int(output.rpartition("\n")[0].rpartition("\n")[2].partition(" ")[0]) > SOME, output[-300:]


@pytest.mark.parametrize("version", VERSIONS)
def test_other_python(version, tree, tmp_path):
    run([other_interpreter(version), "-W", "error::SyntaxWarning", "-m", "unittest", *("bb.tests." + name for name in MODULES)],
        tmp_path, PYTHONPATH=str(tree.path / "lib"))
