# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""Forked children, and descriptors of processes.

    assert in_child(lambda: os.getuid()) == 0
"""

import os
import pickle
import select
import signal
import traceback

# Only bounds a test that fails
SECONDS = 20


def in_child(function):
    """What function returns in a forked child. A child that fails or takes too long fails the test."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(reader)
            try:
                outcome = (True, function())
            except BaseException:
                outcome = (False, traceback.format_exc())
            with os.fdopen(writer, "wb") as f:
                pickle.dump(outcome, f)
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as f:
        poll = select.poll()
        poll.register(f, select.POLLIN)
        ready = poll.poll(SECONDS * 1000)
        if not ready:
            os.kill(child, signal.SIGKILL)
        data = f.read()
    os.waitpid(child, 0)
    assert ready, "the child took too long"
    good, value = pickle.loads(data)
    assert good, value
    return value


def descriptors():
    """What the descriptors of this process are: "socket:[inode]", "pipe:[inode]", or a path."""
    links = []
    for name in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink("/proc/self/fd/" + name))
        except FileNotFoundError:
            # Of listdir itself
            pass
    return links


def link(fd):
    return os.readlink("/proc/self/fd/%s" % fd)
