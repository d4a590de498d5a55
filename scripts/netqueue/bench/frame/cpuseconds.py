# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""CPU seconds, user and system, of builds and of servers, as the kernel counts them for each process.

The benchmarks call this. What a process has waited for is counted with it, so
one number of a bitbake server, or of a sshd, has all that it has started and
that has ended since. The kernel's unit is 10 ms. Linux only.
"""

import os
import resource
import time
from pathlib import Path

from netqueue import Problem
from netqueue.lab.processes import all_pids, parent, stat_fields

# The environment of a build whose server stays for a while after it, for its CPU seconds to be read
RESIDENT = {"BB_SERVER_TIMEOUT": "600"}
# Until a server has come to rest after a build
REST_SECONDS = 30
LOOK_SECONDS = 0.2


def of_build(build):
    """Of the build's processes and of all that they have waited for: the server and, after a build, its worker and tasks"""
    return sum(sum(_times(pid)) for pid in build.processes())


def of_rested_build(build):
    """(the same, what the server alone has of it), once it has done all that it does after a build: only it is left,
    and does nothing. Needs a server that is RESIDENT. Blocks for a moment, for at most REST_SECONDS."""
    deadline = time.monotonic() + REST_SECONDS
    last = None
    while time.monotonic() < deadline:
        processes = build.processes()
        times = _times(processes[0]) if len(processes) == 1 else None
        if times and times == last:
            return sum(times), times[0]
        last = times
        time.sleep(LOOK_SECONDS)    # nothing else tells
    raise Problem("%s: after a build there are %d processes, and no rest" % (build.directory.name, len(build.processes())))


def of_children():
    """Of the caller's children that have been waited for"""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def of_server(pid):
    """Of a process, its descendants, and all that these have waited for"""
    parents = {}
    for one in all_pids():
        parents.setdefault(parent(one), []).append(one)
    total, todo = 0, [pid]
    while todo:
        one = todo.pop()
        total += sum(_times(one))
        todo += parents.get(one, ())
    return total


def of_machine():
    """Of everything on this machine since it was started, as far as it is known here"""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    # user, nice, system, idle, iowait, irq, softirq
    return sum(int(fields[place]) for place in (0, 1, 2, 5, 6)) / os.sysconf("SC_CLK_TCK")


def _times(pid):
    """(of its own, of what it has waited for). Nothing if it has ended: its parent has it then."""
    fields = stat_fields(pid)
    if not fields:
        return 0, 0
    user, system, waited_user, waited_system = (int(field) / os.sysconf("SC_CLK_TCK") for field in fields[11:15])
    return user + system, waited_user + waited_system
