# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""What a user sees of a build that restores objects: `scripts/bench terminal --svg FILE`.

A build with patched bitbake runs on a terminal. What that shows about half-way, with the line about
objects that are fetched ahead, and what it shows in the end are printed, and drawn into a picture. The
mirror sends at most 256 KiB a second over a connection, so that there is something to see.
"""

import codecs
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

from netqueue import Problem
from netqueue.bench.frame.options import add_number, add_threads, add_work
from netqueue.bench.frame.screen import Screen, draw
from netqueue.bench.frame.trees import enter_venv, patched_tree
from netqueue.bench.frame.workfolder import work_folder
from netqueue.lab.build import Build
from netqueue.lab.mirror import serve
from netqueue.progress import Progress

ROWS, COLUMNS = 40, 110
# Of the picture of the middle and of that of the end
SHOWN = 14
RATE = "limit_rate 256k;"
SECONDS = 300
FOOTER = re.compile(r"Fetching sstate: (\d+) of (\d+) objects")


def add_options(parser):
    add_number(parser, "--objects", 60, "sstate objects")
    add_threads(parser)
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw a picture into FILE")
    add_work(parser)


def run(options):
    enter_venv()
    progress = Progress(sys.stderr)
    with work_folder("terminal-", options.work) as work:
        progress.step("making %d objects" % options.objects)
        with Build(work / "fill", patched_tree(), objects=options.objects, threads=os.cpu_count() or 2) as build:
            build.make_objects(progress.follow)
            files = build.sstate
        progress.done()
        with serve(files, server="nginx", server_extra=RATE) as mirror, \
                Build(work / "build", patched_tree(), objects=options.objects, mirror=mirror, threads=options.threads) as build:
            middle, end = watch(build, [build.target])
    lines = ["$ bitbake " + build.target, *middle, "", "...", "", *end]
    print("\n".join(lines))
    if options.svg:
        options.svg.write_text(draw(lines, "A build that restores sstate objects"))
    return 0


def watch(build, arguments):
    """Run bitbake on a terminal. Returns the last lines of about half-way, and of the end. Raises Problem."""
    server, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    process = subprocess.Popen([sys.executable, str(build.tree.bitbake), *arguments], cwd=build.directory, stdin=terminal,
                               stdout=terminal, stderr=terminal, start_new_session=True,
                               env=dict(build.environment, TERM="xterm", LINES=str(ROWS), COLUMNS=str(COLUMNS)))
    os.close(terminal)
    screen, middle = Screen(), []
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    pending = ""
    deadline = time.monotonic() + SECONDS
    with os.fdopen(server, "rb", buffering=0) as output:
        while select.select([output], [], [], max(0, deadline - time.monotonic()))[0]:
            try:
                data = output.read(65536)
            except OSError:
                # So ends a terminal that nobody has open any more
                break
            # A control sequence may be cut
            text, escape, rest = (pending + decoder.decode(data)).rpartition("\x1b")
            whole = not escape or re.match(r"\[[0-9;?]*[A-Za-z]|[^\[]", rest)
            screen.feed(text + escape + rest if whole else text)
            pending = "" if whole else escape + rest
            footer = FOOTER.search("\n".join(screen.lines[-SHOWN:]))
            if footer and int(footer.group(1)) * 2 <= int(footer.group(2)):
                middle = [line.rstrip() for line in screen.lines[-SHOWN:]]
    if time.monotonic() > deadline:
        raise Problem("bitbake did not end within %d s" % SECONDS)
    if process.wait(SECONDS):
        raise Problem("bitbake ended with %d: %s" % (process.returncode, " / ".join(screen.lines[-3:])))
    if not middle:
        raise Problem("no line about objects that are fetched ahead was seen")
    return trimmed(middle), trimmed([line.rstrip() for line in screen.lines[-SHOWN:]])


def trimmed(lines):
    """Without empty lines at both ends"""
    return "\n".join(lines).strip("\n").split("\n")
