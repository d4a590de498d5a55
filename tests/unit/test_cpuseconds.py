# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""The CPU seconds of processes, of which some have ended."""

import subprocess
import sys

from netqueue.bench.frame import cpuseconds

LEAST = 0.1
WORK = "import time\nwhile time.process_time() < %s: pass\n" % (2 * LEAST)
PARENT = "import subprocess, sys\nsubprocess.run([sys.executable, '-c', %r])\nprint(flush=True)\ninput()\n" % WORK


def test_what_has_ended_counts():
    everything, before = cpuseconds.of_machine(), cpuseconds.of_children()
    with subprocess.Popen([sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        # The child of the child, which that has waited for
        assert cpuseconds.of_server(process.pid) >= LEAST
        assert cpuseconds.of_children() - before < LEAST
        process.communicate(b"\n")
    assert cpuseconds.of_children() - before >= LEAST
    assert cpuseconds.of_machine() - everything >= LEAST


def test_a_running_child_counts():
    parent = "import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', %r])\nsys.stdin.read()\n" % (
        WORK + "print(flush=True)\nimport sys\nsys.stdin.read()\n")
    with subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        assert cpuseconds.of_server(process.pid) >= LEAST
        process.communicate()


def test_nobody():
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    assert cpuseconds.of_server(process.pid) == 0
