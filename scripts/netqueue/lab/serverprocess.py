# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""What the servers have in common that run as a process: a free port, and their end with ours.

Called by nginx.py, sshd.py and the servers of the tests.

    for _ in range(PORT_ATTEMPTS):
        port = free_port()
        process = subprocess.Popen([...], preexec_fn=die_with_parent)
        if listens(process, port):
            ...
    end(process)
"""

import ctypes
import signal
import socket
import subprocess
import time

# Seconds until a server listens, and until it has ended
START_SECONDS = 10
STOP_SECONDS = 5
# A free port may be taken before the server listens on it
PORT_ATTEMPTS = 10
PR_SET_PDEATHSIG = 1

_libc = ctypes.CDLL(None)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def die_with_parent():
    """For preexec_fn: the process gets SIGTERM when the thread that started it ends."""
    # Only a plain kernel call between fork and exec: a caller may have threads.
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def accepts(port):
    """Whether a connection to port of this machine is accepted now"""
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def listens(process, port):
    """Wait until process accepts connections at port. False if it ends instead, or takes longer than START_SECONDS."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        if accepts(port):
            return True
        time.sleep(0.02)
    return False


def end(process):
    """Ask process to end, and see to it after STOP_SECONDS."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
