# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""Mutated conversations for the three parsers of the shared connections: `scripts/bench fuzz`.

bench/fuzz.py starts this as a process with bb in its path; tests/unit/test_fuzz.py
calls run(). An input is made from the seed and its number, so that each can be
repeated alone. It is a valid conversation in which bytes are changed, cut, doubled or
moved, and which arrives in pieces; a tenth of the inputs is left as it is.

    http        answers, for an HTTPConnection with TLS, or rather without a socket
    plain       the same without TLS, with long bodies, over a socket
    sftp        packets of a server that answers what an SFTPConnection asks for
    socket      messages of a task, for the server's end of the Unix socket

After each input the following holds, or a Fault tells what does not: no
exception escapes, and none but the errors of bb.connections ends a parser; each
request is answered once, or is left when the connection ends, and that ends
once; a file that is reported as complete has its announced size, and the right
bytes if nothing was changed; buffers, files and descriptors stay within limits.

No network and no ssh.

    for fault in run("http", first=0, inputs=20000, seed=1): ...
"""

import json
import random
import resource
import sys
import time
import traceback

from netqueue.fuzz.fault import Fault, must
from netqueue.fuzz.http import HTTP
from netqueue.fuzz.plainhttp import Plain
from netqueue.fuzz.sftp import SFTP
from netqueue.fuzz.unixsocket import Socket

PARSERS = {"http": HTTP, "plain": Plain, "sftp": SFTP, "socket": Socket}
# Seconds for an input, and MiB by which the process may grow after the first of its inputs
LONGEST = 5
GROWTH = 64
WARM = 1000


def run(parser, first, inputs, seed):
    """Generator of the Faults of so many inputs from number first on"""
    talk = PARSERS[parser]()
    before = None
    for number in range(first, first + inputs):
        if number == first + WARM:
            before = memory()
        # As fast as it can be for a generator with a state of its own
        rng = random.Random(seed << 40 ^ number)
        began = time.monotonic()
        try:
            talk.run(rng)
            must(time.monotonic() - began < LONGEST, "took %.1f s" % (time.monotonic() - began))
        except Exception as e:
            fault = e if isinstance(e, Fault) else Fault(traceback.format_exc())
            fault.number = number
            yield fault
            # What is left of the input is not that of the next
            talk.close()
            talk = PARSERS[parser]()
    talk.close()
    if before and memory() - before > GROWTH:
        yield Fault("the process has grown by %d MiB" % (memory() - before))


def memory():
    """What the process has of the memory, in MiB"""
    with open("/proc/self/statm") as numbers:
        return int(numbers.read().split()[1]) * resource.getpagesize() >> 20


def main(parser, first, inputs, seed):
    """Write the faults of so many inputs, [[number, text], ...]"""
    print(json.dumps([[fault.number, str(fault)] for fault in run(parser, first, inputs, seed)]), flush=True)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
