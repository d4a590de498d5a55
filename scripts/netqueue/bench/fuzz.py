# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""Mutated input for the parsers of the shared connections: `scripts/bench fuzz`.

The parsers are those of HTTP answers (twice: "plain" is with long bodies, which
go by splice(2)), of SFTP packets, and of messages on the Unix socket;
fuzz/runner.py has the conversations, and what has to hold after each. The inputs
are shared out among the parsers, and the same seed gives the same inputs.
What does not hold is printed with the number of the input, and the exit code is 1:

    scripts/bench fuzz --inputs 1000000 --seed 7 --processes 2
    scripts/bench fuzz --seed 7 --parser sftp --first 123456 --inputs 1
"""

import concurrent.futures
import os
import sys
import time

from netqueue.bench.frame.options import add_json, add_number, add_only, settings, write_json
from netqueue.bench.frame.process import Process
from netqueue.bench.frame.trees import patched_tree
from netqueue.progress import Progress

PROCESS = "netqueue.fuzz.runner"
# Those of fuzz/runner.py
PARSERS = ("http", "plain", "sftp", "socket")
# Inputs of a process, which take some seconds
BLOCK = 10000
# Faults that are printed of each parser, and characters of each
SHOWN = 10
MOST_TEXT = 2000


def add_options(parser):
    add_number(parser, "--inputs", 100000, "inputs in all")
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="what they are made from (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="number of the first input (default: %(default)s)")
    add_only(parser, "--parser", PARSERS)
    add_number(parser, "--processes", 1, "how many run at the same time")
    add_json(parser)


def run(options):
    lib = patched_tree().path / "lib"
    parsers = options.parser or PARSERS
    report = {"options": settings(options), "parsers": {}}
    print("%-8s %10s %8s %9s" % ("", "inputs", "faults", "seconds"))
    with concurrent.futures.ThreadPoolExecutor(options.processes) as pool:
        for place, parser in enumerate(parsers):
            # What is left over is the first one's
            inputs = options.inputs // len(parsers) + (options.inputs % len(parsers) if not place else 0)
            report["parsers"][parser] = measure(pool, lib, parser, inputs, options)
            write_json(options, report)
    return 1 if any(result["faults"] for result in report["parsers"].values()) else 0


def measure(pool, lib, parser, inputs, options):
    progress = Progress(sys.stderr)
    progress.step("%s: %d inputs" % (parser, inputs))
    began = time.monotonic()
    end = options.first + inputs
    blocks = [{"parser": parser, "first": first, "inputs": min(BLOCK, end - first), "seed": options.seed}
              for first in range(options.first, end, BLOCK)]
    faults = sum(pool.map(lambda block: run_block(lib, block), blocks), [])
    result = {"inputs": inputs, "faults": faults, "seconds": time.monotonic() - began}
    progress.done()
    print("%-8s %10d %8d %9.1f" % (parser, inputs, len(faults), result["seconds"]), flush=True)
    for number, text in faults[:SHOWN]:
        print("%s, input %s: %s" % (parser, number, text[-MOST_TEXT:]))
    return result


def run_block(lib, block):
    path = os.pathsep.join([str(lib), os.environ.get("PYTHONPATH", "")])
    with Process(PROCESS, block, block["parser"], {"PYTHONPATH": path}) as process:
        return process.answer()
