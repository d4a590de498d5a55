# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""What was to be fetched ahead and cannot be: the build ends as without, and nothing half is left."""

import os
import re
import signal
import sys
import threading

import pytest

from netqueue.lab.sshd import SFTP_SERVERS
from system.conftest import FEW, OFF
from system.observe import (SECONDS, add_class, damaged, names, outcome, problems, restore, server_pid, summary,
                            unfinished, wait_until)
from system.peer import CLOSE, HANDLED, is_object, send_part
from system.test_prefetch import ALL
from system.test_processes import UNBUFFERED, interrupt, started

pytestmark = pytest.mark.system

# Of 1 MiB; demo-0003 is small
LARGE, SMALL = "demo-0007", "demo-0003"
# What is added to a name while the file is fetched: machine, process, a random number
TEMPORARY = re.compile(r"\.[0-9a-f]{8}-\d+-[0-9a-f]{8}\.new$")


def lost(*recipes):
    return [name for name in ALL if name not in recipes]


# Mirrors

def half(talk, request, body):
    send_part(talk, body, len(body) // 2)
    return CLOSE


def busy(talk, request, body):
    talk.answer(request, b"busy", "Retry-After: 60", status=503)
    return HANDLED


def broken(talk, request, body):
    talk.answer(request, b"broken", status=500)
    return HANDLED


def test_gone_after_the_query(faulty_mirror, mirror_files, make_build, off_and_on, stock_tree):
    """404 for archives whose HEAD was answered with 200: the real tasks run, as with stock, and there is no ERROR."""
    def of_two(talk, request, body):
        for name in (LARGE, SMALL):
            if is_object(request, name) and (request.method == "GET" or len(servers[-1].asked("HEAD", name)) > 1):
                talk.answer(request, b"gone", status=404)
                return HANDLED

    def mirror():
        # Without a trial of pipelining nothing is asked for twice by the query
        servers.append(faulty_mirror(of_two, pipelined=False))
        return servers[-1]

    servers = []
    off, on, build, server, _ = off_and_on(mirror)
    stock = make_build(stock_tree, mirror())
    assert on == off == outcome(stock, restore(stock, "-D", "demo-all"))
    assert (on["returncode"], on["restored"]) == (0, lost(LARGE, SMALL))
    assert not any(line.startswith("ERROR") for line in on["said"])
    assert len(server.asked("GET", LARGE)) <= 1
    assert damaged(build.sstate, mirror_files) == [] and unfinished(build.sstate) == []


@pytest.mark.parametrize("fault", [half, busy, broken], ids=["half of it", "503", "500"])
def test_archive_that_was_there(fault, faulty_mirror, mirror_files, off_and_on):
    """HEAD says 200, GET never gives it."""
    def of_one(talk, request, body):
        if request.method == "GET" and is_object(request, LARGE):
            return fault(talk, request, body)

    off, on, build, server, _ = off_and_on(lambda: faulty_mirror(of_one))
    assert on == off
    assert on["restored"] == lost(LARGE)
    assert damaged(build.sstate, mirror_files) == []
    assert [name for name in unfinished(build.sstate) if not name.endswith(".tmp")] == []


@pytest.mark.parametrize("status", [404, 500])
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


# The end

class HeldHalf:
    """A fault: of the archives of some recipes half is sent, and the rest after released is set only."""

    def __init__(self, recipes):
        self.recipes = recipes
        self.waiting = []
        self.released = threading.Event()

    def __call__(self, talk, request, body):
        if request.method != "GET" or self.released.is_set():
            return None
        if not any(is_object(request, name) for name in self.recipes):
            return None
        send_part(talk, body, len(body) // 2)
        self.waiting.append(request.target)
        self.released.wait(60)
        talk.send(body[len(body) // 2:])
        return HANDLED


@pytest.fixture
def held_half(faulty_mirror):
    """Called with recipes, returns a HeldHalf and a mirror that has it."""
    made = []

    def make(recipes=ALL, **options):
        made.append(HeldHalf(recipes))
        return made[-1], faulty_mirror(made[-1], **options)

    yield make
    for hold in made:
        hold.released.set()


def half_files(build):
    """Names in SSTATE_DIR of archives that are being fetched, and have something in"""
    return [name for name in names(build.sstate) if TEMPORARY.search(name)
            and TEMPORARY.sub("", name).endswith(".tar.zst") and (build.sstate / name).stat().st_size]


def in_the_middle(build, hold):
    """Start bitbake, and wait until there is half of an object."""
    running = started(build)
    try:
        wait_until(lambda: hold.waiting and half_files(build), "half of an object is there", SECONDS)
    except BaseException:
        running.kill()
        raise
    return running


# One task runs until the test lets it end
LASTING = """
do_populate_setscene[postfuncs] += "${@'last' if d.getVar('PN') == 'demo-0001' else ''}"
python last() {
    import time
    for _ in range(2400):
        if os.path.exists(d.expand("${TOPDIR}/end")):
            return
        time.sleep(0.05)
    bb.fatal("not told to end")
}
"""


@pytest.mark.parametrize("times", [1, 2])
def test_interrupted(times, held_half, mirror_files, make_build, patched_tree):
    """
    What is under way is given up at once, before the task that runs has ended: the mirror is not waited for. Nor is the task
    after the second Ctrl-C.
    """
    hold, server = held_half([LARGE], pipelined=False)
    build = make_build(patched_tree, server, threads=2, environment=UNBUFFERED, extra_conf='INHERIT += "lasting"')
    add_class(build, "lasting", LASTING)
    running = started(build)
    try:
        wait_until(lambda: build.restored() == lost(LARGE) and half_files(build), "half of the last one is there", SECONDS)
        interrupt(running, build, "stateShutdown")
        wait_until(lambda: not half_files(build), "what was under way is given up", SECONDS)
        if times == 2:
            interrupt(running, build, "stateForceShutdown")
        else:
            (build.directory / "end").touch()
        result = running.wait(SECONDS)
    finally:
        running.kill()
    assert not hold.released.is_set()
    assert result.returncode != 0 and result.left == 0
    assert build.restored() == lost(LARGE) and len(names(build.sstate)) == 2 * len(lost(LARGE))
    assert damaged(build.sstate, mirror_files) == [] and unfinished(build.sstate) == []


# Stands in for sftp-server: after so many bytes it sends nothing more, as over a line that has died
DEAD_LINE = """#!%s
import os, subprocess
output = subprocess.Popen(["%s"], stdout=subprocess.PIPE).stdout.fileno()
sent = 0
while True:
    data = os.read(output, 65536)
    if not data:
        break
    if sent < 300000:
        sent += os.write(1, data)
"""


def test_interrupted_over_sftp(any_mirror, make_build, mirror_files, tmp_path, patched_tree):
    """In the middle of the large one: no ssh is left, and nothing half."""
    script = tmp_path / "dead-line"
    script.write_text(DEAD_LINE % (sys.executable, next(path for path in SFTP_SERVERS if os.path.exists(path))))
    script.chmod(0o755)
    server = any_mirror("sftp", extra="ForceCommand %s" % script)
    build = make_build(patched_tree, server, environment=UNBUFFERED)
    running = started(build)
    try:
        wait_until(lambda: [name for name in half_files(build) if LARGE in name], "a part of the large one is there", SECONDS)
        interrupt(running, build, "stateShutdown")
        result = running.wait(SECONDS)
    finally:
        running.kill()
    assert result.returncode != 0 and result.left == 0
    assert LARGE not in build.restored()
    assert unfinished(build.sstate) == [] and damaged(build.sstate, mirror_files) == []


def fill_disk(build, running, hold, ahead):
    """
    Once all that the mirror does not hold is restored and half of the rest is there, the disk that is watched becomes
    full: /proc has no room. Then what is fetched ahead is given up, before a task that runs has ended; without
    prefetch tasks fetch, to their end. Returns the Result.
    """
    try:
        wait_until(lambda: build.restored() == lost(*hold.recipes) and len(hold.waiting) == len(hold.recipes)
                   and (not ahead or len(half_files(build)) == len(hold.recipes)), "half of the rest is there", SECONDS)
        (build.directory / "full").symlink_to("/proc")
        (build.directory / "full").replace(build.directory / "watched")
        wait_until(lambda: "disk space monitor action is" in running.output(), "the disk is full", SECONDS)
        if ahead:
            wait_until(lambda: not half_files(build), "what was under way is given up", SECONDS)
        else:
            hold.released.set()
        (build.directory / "end").touch()
        return running.wait(SECONDS)
    finally:
        running.kill()


@pytest.mark.parametrize("action", ["STOPTASKS", "HALT"])
def test_disk_monitor(action, held_half, mirror_files, make_build, stock_tree, patched_tree):
    """What is under way is given up, and what the user is told is what stock tells. With room again all is restored."""
    told = {}
    for name, tree, conf in (("stock", stock_tree, ""), ("off", patched_tree, OFF), ("on", patched_tree, "")):
        # More threads and connections than are held
        hold, server = held_half(ALL[4:], pipelined=False)
        build = make_build(tree, server, name, threads=6, environment=UNBUFFERED, extra_conf=conf + """
INHERIT += "lasting"
BB_DISKMON_DIRS = "%s,${TOPDIR}/watched,1K"
BB_CONNECTION_CACHE_MAX = "5"
""" % action)
        add_class(build, "lasting", LASTING)
        (build.directory / "watched").touch()
        result = fill_disk(build, started(build), hold, name == "on")
        # Of a disk without any room stock warns each second
        told[name] = (result.returncode, set(outcome(build, result)["said"]))
        assert result.left == 0
    assert told["on"] == told["off"] == told["stock"]
    assert 'the disk space monitor action is "%s"' % action in result.output
    assert build.restored() == ALL[:4] and not hold.released.is_set()
    assert len(names(build.sstate)) == 2 * 4 and unfinished(build.sstate) == []
    assert damaged(build.sstate, mirror_files) == []
    hold.released.set()
    (build.directory / "watched").unlink()
    (build.directory / "watched").touch()
    result = restore(build)
    assert (result.returncode, problems(result.output), build.restored()) == (0, [], ALL)
    assert len(names(build.sstate)) == 2 * FEW and unfinished(build.sstate) == []
    assert damaged(build.sstate, mirror_files) == []


def test_killed_server(held_half, mirror_files, make_build, patched_tree):
    """What it leaves half is not taken for an object by the next build, and removed."""
    hold, server = held_half()
    build = make_build(patched_tree, server, threads=2, environment=UNBUFFERED)
    running = in_the_middle(build, hold)
    try:
        os.kill(server_pid(build), signal.SIGKILL)
        wait_until(lambda: not os.path.exists("/proc/%d" % server_pid(build)), "the server is gone")
    finally:
        running.kill()
    left = unfinished(build.sstate)
    assert half_files(build) != [] and build.archives() == []
    assert all(TEMPORARY.search(name) for name in left)
    # Those of a server that runs, here the tests' own, and of another machine or container may be needed
    kept = [re.sub(r"-\d+-", "-%d-" % os.getpid(), left[0]), re.sub(r"\.[0-9a-f]{8}-", ".00000000-", left[0])]
    for name in kept:
        (build.sstate / name).touch()
    hold.released.set()
    result = restore(build)
    assert (result.returncode, problems(result.output)) == (0, [])
    assert build.restored() == ALL
    assert damaged(build.sstate, mirror_files) == []
    assert unfinished(build.sstate) == sorted(kept) and len(names(build.sstate)) == 2 * FEW + len(kept)


def test_put_there_meanwhile(held_half, mirror_files, make_build, patched_tree):
    """An object that somebody else has put there while it was fetched stays."""
    hold, server = held_half([LARGE])
    build = make_build(patched_tree, server, environment=UNBUFFERED)
    running = in_the_middle(build, hold)
    try:
        archive = build.sstate / TEMPORARY.sub("", half_files(build)[0])
        archive.write_bytes((mirror_files / archive.relative_to(build.sstate)).read_bytes())
        number = archive.stat().st_ino
        hold.released.set()
        result = running.wait(SECONDS)
    finally:
        running.kill()
    assert (result.returncode, result.left, problems(result.output)) == (0, 0, [])
    assert build.restored() == ALL and archive.stat().st_ino == number
    assert damaged(build.sstate, mirror_files) == [] and unfinished(build.sstate) == []
