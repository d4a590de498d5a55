# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""One run of bitbake: started, watched, ended, with nothing left behind.

Build of build.py uses it. What belongs to the build is found by its HOME, see
processes.py.

    running = build.start(["demo-all"])
    running.interrupt()                 # as Ctrl-C
    result = running.wait(60)
"""

import dataclasses
import re
import signal
import subprocess
import time
from pathlib import Path

from netqueue import Problem
from netqueue.lab.processes import POLL_SECONDS, processes_with_home, stop_processes

PROGRESS_SECONDS = 0.5
SERVER_EXIT_SECONDS = 30

_PRESENCE = re.compile(r"Presence query: (\d+) objects, ([\d.]+) s, ([\d.]+) s CPU")


class BuildTimeout(Problem):
    pass


@dataclasses.dataclass
class Presence:
    """All presence queries of a run together."""
    queries: int = 0
    objects: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0


@dataclasses.dataclass
class Result:
    returncode: int
    output: str
    seconds: float      # of the client, from its start to its end
    left: int = 0       # processes that had to be ended afterwards

    @property
    def presence(self):
        total = Presence()
        for count, seconds, cpu in _PRESENCE.findall(self.output):
            total.queries += 1
            total.objects += int(count)
            total.seconds += float(seconds)
            total.cpu_seconds += float(cpu)
        return total


class Running:
    def __init__(self, command, directory, environment, log, resident):
        self.home = environment["HOME"]
        self.log = Path(log)
        self.resident = resident
        self.started = time.monotonic()
        with open(log, "wb") as output:
            # A session of its own: a Ctrl-C at the caller's terminal is the caller's.
            self.process = subprocess.Popen(command, cwd=directory, env=environment, stdout=output,
                                            stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT,
                                            start_new_session=True, preexec_fn=_default_interrupt)

    def output(self):
        return self.log.read_text(errors="replace")

    def interrupt(self):
        """What Ctrl-C does to bitbake's user interface."""
        self.process.send_signal(signal.SIGINT)

    def wait(self, timeout, progress=None):
        """Wait for the end; without a resident server, also for the server's."""
        try:
            returncode, seconds = self._wait_for_client(timeout, progress)
        except BaseException:
            # A time-out, or the caller was interrupted: nothing may stay.
            self.kill()
            raise
        left = 0
        if not self.resident:
            deadline = time.monotonic() + SERVER_EXIT_SECONDS
            while processes_with_home(self.home) and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
            left = stop_processes(self.home)
        return Result(returncode, self.output(), seconds, left)

    def _wait_for_client(self, timeout, progress):
        deadline = self.started + timeout
        while True:
            left = deadline - time.monotonic()
            step = min(left, PROGRESS_SECONDS) if progress else left
            try:
                returncode = self.process.wait(max(step, 0.01))
                return returncode, time.monotonic() - self.started
            except subprocess.TimeoutExpired:
                if time.monotonic() >= deadline:
                    tail = " / ".join(self.output().strip().splitlines()[-3:])
                    raise BuildTimeout("bitbake did not end within %d s; last lines: %s"
                                       % (timeout, tail)) from None
            if progress:
                progress(self.output())

    def kill(self):
        stop_processes(self.home)
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def _default_interrupt():
    # Who runs in the background ignores Ctrl-C, and so would bitbake: a worker of pytest-xdist, for one.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
