# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""What was to be fetched ahead and cannot be: the build ends as without, and nothing half is left."""

import os
import re
import signal
import subprocess
import threading

import pytest

from netqueue.sshd import Sshd
from system.conftest import FEW
from system.observe import (SECONDS, damaged, names, problems, restore, server_pid, summary, unfinished, wait_until)
from system.peer import CLOSE, HANDLED, is_archive, is_object, send_part
from system.test_prefetch import ALL, OFF
from system.test_processes import UNBUFFERED, interrupt, started

pytestmark = pytest.mark.system

# Of 1 MiB; demo-0003 is small
LARGE, SMALL = "demo-0007", "demo-0003"


def outcome(build, result):
    """What is compared: how it ended, what was said, what is there."""
    said = [re.sub(r"/\S*/|\b\d+(\.\d+)?\b", "_", line.replace(str(build.directory), ""))
            for line in problems(result.output)]
    return {"returncode": result.returncode, "said": sorted(said), "restored": build.restored(), "names": names(build.sstate)}


@pytest.fixture
def off_and_on(make_build, patched_tree):
    """
    Called with a function that returns a mirror, and what to do to a build before it runs: runs one without and
    one with prefetch. Returns their outcomes, and the second build, mirror and result.
    """
    def make(make_mirror, prepare=lambda build: None, extra_conf="", **options):
        outcomes = []
        for name, conf in (("off", OFF), ("on", "")):
            server = make_mirror()
            build = make_build(patched_tree, server, name, extra_conf=conf + "\n" + extra_conf, **options)
            prepare(build)
            result = restore(build)
            outcomes.append(outcome(build, result))
        return (*outcomes, build, server, result)
    return make


def lost(*recipes):
    return [name for name in ALL if name not in recipes]


# Mirrors

def gone(talk, request, body):
    talk.answer(request, b"gone", status=404)
    return HANDLED


def half(talk, request, body):
    send_part(talk, body, len(body) // 2)
    return CLOSE


def busy(talk, request, body):
    talk.answer(request, b"busy", status=503)
    return HANDLED


def broken(talk, request, body):
    talk.answer(request, b"broken", status=500)
    return HANDLED


@pytest.mark.parametrize("fault", [gone, half, busy, broken], ids=["404", "half of it", "503", "500"])
def test_archive_that_was_there(fault, faulty_mirror, mirror_files, off_and_on):
    """HEAD says 200, GET never gives it."""
    def of_one(talk, request, body):
        if request.method == "GET" and is_object(request, LARGE):
            return fault(talk, request, body)

    off, on, build, server, _ = off_and_on(lambda: faulty_mirror(of_one))
    if fault is gone:
        # The task is not told any more that it is there, so that is no error
        assert (off["returncode"], on["returncode"]) == (1, 0)
        assert any(line.startswith("ERROR") for line in off["said"])
        assert not any(line.startswith("ERROR") for line in on["said"])
        # An answer that is not what the query was told is asked for again if it came out of a pipeline
        assert len(server.asked("GET", LARGE)) <= 2
        assert on["names"] == off["names"]
    else:
        assert on == off
    assert on["restored"] == off["restored"] == lost(LARGE)
    assert damaged(build.sstate, mirror_files) == []
    assert [name for name in unfinished(build.sstate) if not name.endswith(".tmp")] == []


@pytest.mark.parametrize("status", [404, 503])
def test_siginfo_that_cannot_be_had(status, faulty_mirror, mirror_files, off_and_on):
    """The object is restored without."""
    def of_one(talk, request, body):
        if request.target.endswith(".siginfo") and "demo-0003" in request.target:
            talk.answer(request, b"", status=status)
            return HANDLED

    off, on, build, server, _ = off_and_on(lambda: faulty_mirror(of_one))
    assert on["restored"] == ALL
    assert on == off
    assert damaged(build.sstate, mirror_files) == [] and unfinished(build.sstate) == []


def test_broken_once(faulty_mirror, mirror_files, make_build, patched_tree):
    """It is asked for again, and nobody would say that there was a fault."""
    def of_one(talk, request, body):
        if request.method == "GET" and is_object(request, LARGE) and len(server.asked("GET", LARGE)) == 1:
            return half(talk, request, body)

    server = faulty_mirror(of_one)
    build = make_build(patched_tree, server)
    result = restore(build)
    assert (result.returncode, problems(result.output)) == (0, [])
    assert build.restored() == ALL and damaged(build.sstate, mirror_files) == []
    assert len(server.asked("GET", LARGE)) == 2 and summary(result.output).retries == 1


# Disks

def folder_of(mirror_files, wanted):
    """The first of the two folders that a recipe's object is in"""
    path, = (path for path in mirror_files.glob("??/??/sstate:%s:*.tar.zst" % wanted)
             if ":r0:" in path.name)
    return path.relative_to(mirror_files).parts[0]


@pytest.mark.parametrize("protocol", ["http", "sftp"])
def test_folder_that_is_a_file(protocol, any_mirror, mirror_files, off_and_on):
    """One object cannot be put anywhere."""
    name = folder_of(mirror_files, SMALL)

    def prepare(build):
        build.sstate.mkdir(parents=True)
        (build.sstate / name).write_text("in the way")

    off, on, build, _, _ = off_and_on(lambda: any_mirror(protocol), prepare)
    assert on == off
    assert on["restored"] == lost(SMALL)
    assert damaged(build.sstate, mirror_files) == [] and unfinished(build.sstate) == [name]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes where nobody may")
def test_read_only_sstate_dir(any_mirror, off_and_on):
    def prepare(build):
        build.sstate.mkdir(parents=True)
        build.sstate.chmod(0o555)

    off, on, build, _, _ = off_and_on(lambda: any_mirror("http"), prepare)
    build.sstate.chmod(0o755)
    assert on == off
    assert on["restored"] == on["names"] == []


@pytest.fixture
def small_disk():
    """Called with a build and KiB: makes SSTATE_DIR a disk of that size."""
    mounted = []

    def mount(build, size):
        build.sstate.mkdir(parents=True)
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=%dk,mode=755" % size, "tmpfs", str(build.sstate)],
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            pytest.skip("a small disk cannot be mounted: %s" % done.stdout.strip())
        mounted.append(build.sstate)

    if os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    yield mount
    for path in mounted:
        subprocess.run(["umount", str(path)], stdin=subprocess.DEVNULL, check=True)


def test_full_disk(any_mirror, mirror_files, off_and_on, small_disk):
    """
    There is room for all but the large one. Who comes after it is lost in any case: its task has wget try, and what
    that leaves fills the disk. So it is not the same objects that are restored.
    """
    off, on, build, _, result = off_and_on(
        lambda: any_mirror("http"), lambda build: small_disk(build, 512), threads=1,
        extra_conf='BB_CONNECTION_CACHE_MAX = "1"\nBB_CONNECTION_CACHE_DEPTH = "1"')
    assert LARGE not in on["restored"]
    assert on["returncode"] == off["returncode"] and result.left == 0
    assert damaged(build.sstate, mirror_files) == []
    assert [name for name in unfinished(build.sstate) if not name.endswith(".tmp")] == []


# The end

class HeldHalf:
    """A fault: of each archive half is sent, and the rest after release() only."""

    def __init__(self):
        self.waiting = []
        self.released = threading.Event()

    def __call__(self, talk, request, body):
        if request.method != "GET" or not is_archive(request) or self.released.is_set():
            return None
        send_part(talk, body, len(body) // 2)
        self.waiting.append(request.target)
        self.released.wait(60)
        talk.send(body[len(body) // 2:])
        return HANDLED


@pytest.fixture
def held_half(faulty_mirror):
    hold = HeldHalf()
    yield hold, faulty_mirror(hold)
    hold.released.set()


def half_files(build):
    """Names in SSTATE_DIR of what is being fetched and has something in"""
    return [name for name in names(build.sstate) if name.endswith(".new") and (build.sstate / name).stat().st_size]


def in_the_middle(build, hold):
    """Start bitbake, and wait until there is half of an object."""
    running = started(build)
    try:
        wait_until(lambda: hold.waiting and half_files(build), "half of an object is there", SECONDS)
    except BaseException:
        running.kill()
        raise
    return running


@pytest.mark.parametrize("times", [1, 2])
def test_interrupted(times, held_half, make_build, patched_tree):
    """What was under way for tasks that were not started is given up: the mirror is not waited for."""
    hold, server = held_half
    build = make_build(patched_tree, server, threads=2, environment=UNBUFFERED)
    running = in_the_middle(build, hold)
    try:
        for command in ("stateShutdown", "stateForceShutdown")[:times]:
            interrupt(running, build, command)
        result = running.wait(SECONDS)
    finally:
        running.kill()
    assert not hold.released.is_set()
    assert result.returncode != 0 and result.left == 0
    assert build.restored() == [] and names(build.sstate) == []


def test_interrupted_over_sftp(any_mirror, make_build, mirror_files, tmp_path, patched_tree):
    """No ssh is left, and nothing half, wherever it was."""
    server = any_mirror("sftp")
    build = make_build(patched_tree, server, threads=1, environment=UNBUFFERED)
    running = started(build)
    try:
        wait_until(build.restored, "one is restored", SECONDS)
        # It may have ended by itself
        running.interrupt()
        result = running.wait(SECONDS)
    finally:
        running.kill()
    assert isinstance(server, Sshd) and result.left == 0
    assert unfinished(build.sstate) == [] and damaged(build.sstate, mirror_files) == []


def test_killed_server(held_half, mirror_files, make_build, patched_tree):
    """What it leaves half is not taken for an object by the next build."""
    hold, server = held_half
    build = make_build(patched_tree, server, threads=2, environment=UNBUFFERED)
    running = in_the_middle(build, hold)
    try:
        os.kill(server_pid(build), signal.SIGKILL)
        wait_until(lambda: not os.path.exists("/proc/%d" % server_pid(build)), "the server is gone")
    finally:
        running.kill()
    left = unfinished(build.sstate)
    assert half_files(build) != [] and build.archives() == []
    hold.released.set()
    result = restore(build)
    assert (result.returncode, problems(result.output)) == (0, [])
    assert build.restored() == ALL
    assert damaged(build.sstate, mirror_files) == []
    # Nobody takes them up, and nobody may remove what could be another build's
    assert set(unfinished(build.sstate)) <= set(left) and all(name.endswith(".new") for name in left)
    assert len([name for name in names(build.sstate) if name not in left]) == 2 * FEW
