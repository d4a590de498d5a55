# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""A process that measures, with the bb of one tree: two trees cannot both be imported as bb.

It lives as long as the block, so that several can take turns; see comparison.py.

    with Process("netqueue.bench.processes.dispatch", arguments, "stock") as process:
        process.answer()            # it is ready
        process.ask(25)             # a turn
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading

from netqueue import ROOT, Problem

# After which a process is ended whatever it does
SECONDS = 1800


class Process:
    """A module of processes/ or fuzz/. Each line that it is sent it answers with a JSON line.

    arguments: a dictionary, its only argument as JSON. name: for messages. variables: for its environment.
    """

    def __init__(self, module, arguments, name, variables=None):
        self.name = name
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen([sys.executable, "-m", module, json.dumps(arguments)],
                                        cwd=ROOT / "scripts", env=dict(os.environ, **(variables or {})),
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True)
        self.timer = threading.Timer(SECONDS, self.process.kill)
        self.timer.start()

    def ask(self, what):
        with contextlib.suppress(BrokenPipeError):
            print(what, file=self.process.stdin, flush=True)
        return self.answer()

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.errors.seek(0)
            raise Problem("%s: %s" % (self.name, (self.errors.read().strip().splitlines() or ["it said nothing"])[-1]))
        return json.loads(line)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.timer.cancel()
        self.process.kill()
        with contextlib.suppress(BrokenPipeError):
            self.process.communicate()
        self.errors.close()
