# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""What benchmarks whose variants take turns have in common: their processes, and what the ratios say.

bb cannot be imported twice, so each variant is a process, which lives as long
as the measurement: a machine that becomes slower does so for all. The ratio
to count is then that of one turn, and the median of these.

    with Process("netqueue.bench.processes.dispatch", arguments, "stock") as process:
        process.answer()            # it is ready
        process.ask(25)             # a turn
    median, low, high, sure = ratio(stock, patched)
"""

import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading

from netqueue import ROOT, Problem

SECONDS = 1800
LEVEL = 0.95


class Process:
    """A module with a JSON argument. Each line that it is sent it answers with a JSON line.

    name: for messages. variables: for its environment.
    """

    def __init__(self, module, arguments, name, variables=None):
        self.name = name
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen([sys.executable, "-m", module, json.dumps(arguments)],
                                        cwd=ROOT / "scripts", env=dict(os.environ, **(variables or {})),
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True)
        # Whatever it does, it ends
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


def rotated(variants, turn):
    """variants in the order of that turn: each is as often the first, the second ... and as often before as behind another"""
    count = len(variants)
    first = turn % count
    order = variants[first:] + variants[:first]
    return order[::-1] if turn // count % 2 else order


def ratio(values, others):
    """Of the ratios value / other of each turn the median, and its interval(). Four numbers."""
    ratios = [value / other for value, other in zip(values, others)]
    return (statistics.median(ratios),) + interval(ratios)


def interval(values):
    """(low, high, sure): where the median is of what values are a sample of, with a probability of at least sure.

    That of the sign test, which supposes nothing of how they are distributed: the narrowest pair of
    values, equally far from both ends, which is sure to LEVEL. With less than six the outermost ones are less sure.
    """
    values = sorted(values)
    count = len(values)
    best = None
    outside = 0.0
    for place in range((count + 1) // 2):
        # Not so if at most place of them are on one side
        outside += 2 * math.comb(count, place) / 2 ** count
        if best is None or 1 - outside >= LEVEL:
            best = values[place], values[-1 - place], max(0.0, 1 - outside)
    return best
