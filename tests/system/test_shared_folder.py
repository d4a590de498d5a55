# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""Two users of a group whose builds restore into one SSTATE_DIR at the same time."""

import collections
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from netqueue.lab.build import Build
from system.conftest import MANY
from system.observe import SECONDS, damaged, problems, unfinished
from system.peer import is_archive

pytestmark = pytest.mark.system

# Numbers that nobody has
USERS = (41601, 41602)
GROUP = 41600
TARGETS = ["--setscene-only", "demo-all"]


def command_of(user):
    """The words that run a program as user. Skips the test if that is not possible here."""
    if os.geteuid() != 0:
        pytest.skip("only root can start builds of two users")
    words = ["setpriv", "--reuid=%d" % user, "--regid=%d" % GROUP, "--clear-groups"]
    umask = ["sh", "-c", 'umask 002; exec "$@"', "sh"]
    # The interpreter may be where only root can read
    for more in ([], ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]):
        command = words + more + umask
        try:
            done = subprocess.run([*command, sys.executable, "-c", "import zstandard"], stdin=subprocess.DEVNULL,
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        except OSError as error:
            pytest.skip(str(error))
        if done.returncode == 0:
            return command
    pytest.skip("another user cannot run Python: %s" % (done.stdout.strip().splitlines() or ["no message"])[-1])


class Together:
    """A fault: archives are sent once both builds have asked whether there are any."""

    def __init__(self):
        self._asked = collections.Counter()
        self._both = threading.Event()

    def __call__(self, talk, request, body):
        if request.method == "HEAD":
            self._asked[request.target] += 1
            if self._asked[request.target] == len(USERS):
                self._both.set()
        elif is_archive(request):
            self._both.wait(SECONDS)


@pytest.fixture
def common():
    """A folder that others may enter, and in it one of the group"""
    folder = Path(tempfile.mkdtemp(prefix="netqueue-shared-"))
    folder.chmod(0o755)
    (folder / "sstate").mkdir()
    os.chown(folder / "sstate", 0, GROUP)
    (folder / "sstate").chmod(0o2775)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("prefetch", [64, 0])
def test_two_users(prefetch, common, faulty_mirror, mirror_files, patched_tree):
    server = faulty_mirror(Together())
    shared = common / "sstate"
    builds = []
    for user in USERS:
        build = Build(common / str(user), patched_tree, objects=MANY, mirror=server, threads=4,
                      extra_conf='SSTATE_DIR = "%s"\nBB_SETSCENE_PREFETCH = "%d"' % (shared, prefetch))
        build.prefix = command_of(user)
        for path in [build.directory, *build.directory.rglob("*")]:
            os.chown(path, user, GROUP)
        builds.append(build)
    running = [build.start(TARGETS) for build in builds]
    try:
        results = [one.wait(SECONDS) for one in running]
    finally:
        for one in running:
            one.kill()
    for build, result in zip(builds, results):
        assert (result.returncode, result.left, problems(result.output)) == (0, 0, [])
        assert len(build.restored()) == MANY
    assert damaged(shared, mirror_files) == []
    assert unfinished(shared) == []
    assert len(list(shared.glob("??/??/sstate:*.tar.zst"))) == MANY
    for path in shared.rglob("*"):
        status = path.stat()
        wanted = 0o2070 if path.is_dir() else 0o060
        assert (status.st_gid, status.st_mode & wanted) == (GROUP, wanted), path.name
        assert status.st_uid in USERS
