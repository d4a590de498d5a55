# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""Processes as /proc shows them: those of a build, and their end.

Called by bitbakerun.py, build.py, sshd.py, the benchmarks and the tests.
bitbake's server leaves its client's session and its workers and tasks have
sessions of their own; what they all keep is the HOME of their build, which no
other process has. That is how they are found, and they are ended by their ids.
Linux only.

    stop_processes(build.home)
"""

import contextlib
import os
import signal
import time
from pathlib import Path

POLL_SECONDS = 0.05
# Until what was asked to end gets SIGKILL
TERM_SECONDS = 5


def processes_with_home(home):
    """Ids of the processes that were started with this HOME, zombies left out."""
    wanted = b"HOME=" + os.fsencode(str(home))
    found = []
    for pid in all_pids():
        with contextlib.suppress(OSError), open("/proc/%d/environ" % pid, "rb") as environment:
            # A zombie's is empty, another user's cannot be read.
            if wanted in environment.read().split(b"\0"):
                found.append(pid)
    return found


def stop_processes(home):
    """SIGTERM to what is there, and after TERM_SECONDS SIGKILL. Returns how many there were."""
    pids = processes_with_home(home)
    _signal(pids, signal.SIGTERM)
    deadline = time.monotonic() + TERM_SECONDS
    left = processes_with_home(home)
    while left and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
        left = processes_with_home(home)
    deadline = time.monotonic() + TERM_SECONDS
    while left and time.monotonic() < deadline:
        _signal(left, signal.SIGKILL)
        time.sleep(POLL_SECONDS)
        left = processes_with_home(home)
    return len(pids)


def _signal(pids, number):
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def all_pids():
    """The ids of all processes"""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def stat_fields(pid):
    """Those of proc(5) from the third on, which is the state. None if the process has ended."""
    try:
        # pid (name, which may have anything in it) state ppid
        return Path("/proc/%d/stat" % pid).read_text().rpartition(")")[2].split()
    except OSError:
        return None


def parent(pid):
    """The process that has started it, None if it has ended"""
    fields = stat_fields(pid)
    return int(fields[1]) if fields else None


def children(pid):
    """The processes whose parent it is"""
    return [other for other in all_pids() if parent(other) == pid]


def command_line(pid):
    """With blanks between the words, empty if it has ended"""
    try:
        return Path("/proc/%d/cmdline" % pid).read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""
