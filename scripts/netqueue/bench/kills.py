# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""Builds that are killed while they restore: `scripts/bench kills`.

In each round patched bitbake restores objects from a mirror on loopback, over
http and sftp in turns, and is hit at a moment that the seed gives:

    SIGKILL, SIGTERM    for its server, its worker or its user interface
    Ctrl-C              for the user interface, once and twice

After that the same is restored without being hit. There must not be

    orphans     processes of the build, ssh among them, 30 s after the first has ended
    damaged     objects or .siginfo files in SSTATE_DIR with other bytes than the mirror's
    incomplete  a second build that does not end with 0, or does not restore all objects
    left over   files in SSTATE_DIR after it that belong to none of the objects

What there is all the same is listed, and the exit code is 1. The user interface is
no orphan: it takes a minute to notice that its server was killed, as with stock.
"""

import collections
import contextlib
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time

from netqueue import Problem
from netqueue.bench.frame.mirrors import open_mirror
from netqueue.bench.frame.options import add_json, add_number, add_threads, add_work, settings, write_json
from netqueue.bench.frame.trees import enter_venv, patched_tree
from netqueue.bench.frame.workfolder import work_folder
from netqueue.lab.bitbakerun import BuildTimeout
from netqueue.lab.build import Build, BuildMirror
from netqueue.lab.delay import delayed
from netqueue.lab.oecore import OEBuild, clones, sources_of_environment
from netqueue.lab.processes import POLL_SECONDS, all_pids, command_line, parent
from netqueue.progress import Progress

WAYS = ("SIGKILL", "SIGTERM", "Ctrl-C", "Ctrl-C twice")
PROTOCOLS = ("http", "sftp")
PROGRAMS = {"server": "bitbake-server", "worker": "bitbake-worker"}
RESTORE = ["--setscene-only", "demo-all"]
# Round trip in seconds, and bytes a second: a build fetches for some seconds
DELAY, RATE = 0.02, 4 << 20
# Seconds for a build that is not hit, or has been asked to end, and after which a process is an orphan
SECONDS, ORPHAN_SECONDS = 120, 30
# Seconds between two Ctrl-C at most
AGAIN = 2
FINDINGS = ("orphans", "damaged", "incomplete", "left over")


def add_options(parser):
    add_number(parser, "--rounds", 16, "builds to be hit")
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="what moments come from (default: %(default)s)")
    parser.add_argument("--protocol", choices=PROTOCOLS, action="append", metavar="P",
                        help="only this: %s" % " or ".join(PROTOCOLS))
    parser.add_argument("--way", choices=WAYS, action="append", metavar="W", help="only this: %s" % ", ".join(WAYS))
    parser.add_argument("--prefetch", type=int, default=64, metavar="N",
                        help="BB_SETSCENE_PREFETCH; with 0 all files are fetched by tasks (default: %(default)s)")
    add_number(parser, "--objects", 60, "objects of a build")
    parser.add_argument("--base", metavar="NAME", help="builds with openembedded-core's classes, of this base of "
                        "patches/bases.json, from clones of the checkouts that BITBAKEDIR and OECOREDIR name")
    add_threads(parser)
    add_json(parser)
    add_work(parser)


def run(options):
    enter_venv()
    rounds, ways = [], options.way or WAYS
    with work_folder("kills-", options.work) as work, contextlib.ExitStack() as stack:
        if options.base:
            tree = clones(work / "tree", sources_of_environment(), patched=True, base=options.base)
        else:
            tree = patched_tree()
        files = fill(work / "fill", tree, options)
        ranges = [Range(stack, protocol, tree, files, work, options) for protocol in options.protocol or PROTOCOLS]
        for number in range(options.rounds):
            way = ways[number // len(ranges) % len(ways)]
            one = ranges[number % len(ranges)].round(number, way, random.Random("%d %d" % (options.seed, number)))
            rounds.append(one)
            print("%4d  %-5s %-13s %-7s at %5.2f s: %s" % (number, one["protocol"], way, one["target"], one["moment"],
                                                          told(one) or "ended after %.1f s" % one["seconds"]), flush=True)
            write_json(options, {"options": settings(options), "rounds": rounds})
    print(table(rounds))
    return 1 if any(told(one) for one in rounds) else 0


def new_build(folder, tree, options, **others):
    return (OEBuild if tree.oecore else Build)(folder, tree, objects=options.objects, threads=options.threads, **others)


def fill(folder, tree, options):
    """A folder with all objects, made by a build"""
    with new_build(folder, tree, options) as build:
        build.make_objects()
        return build.sstate


class Range:
    """A mirror of one protocol, and the build that restores from it. usual: seconds that it takes if nothing happens."""

    def __init__(self, stack, protocol, tree, files, work, options):
        self.protocol = protocol
        self.files = files
        self.expected = {path.relative_to(files) for path in finals(files)}
        mirror = stack.enter_context(open_mirror(protocol, files, work / "home" / protocol, None))
        link = stack.enter_context(delayed(mirror.served.port, DELAY, RATE))
        self.tools = getattr(mirror.served, "tools", None)
        served = BuildMirror(mirror.url_behind(link.port), tools=self.tools)
        self.build = stack.enter_context(new_build(work / protocol, tree, options, mirror=served,
                                                   extra_conf='BB_SETSCENE_PREFETCH = "%d"' % options.prefetch))
        progress = Progress(sys.stderr)
        progress.step("%s, not hit" % protocol)
        # The first one parses
        self.usual = [self.restore_all() for _ in range(2)][-1]
        progress.done()

    def restore_all(self):
        self.empty()
        result = self.build.run(RESTORE, SECONDS)
        problems = self.incomplete(result)
        if problems:
            raise Problem("%s: a build that is not hit: %s" % (self.protocol, problems))
        return result.seconds

    def empty(self):
        for folder in (self.build.tmp, self.build.sstate):
            shutil.rmtree(folder, ignore_errors=True)

    def round(self, number, way, rng):
        """What happened: a dictionary with the FINDINGS, each a list"""
        self.empty()
        moment = rng.uniform(0.2, self.usual)
        running = self.build.start(RESTORE)
        try:
            wait_for(running, moment)
            target = self.hit(running, way, rng)
            began = time.monotonic()
            if target == "ui" and way.startswith("Ctrl-C"):
                wait_for(running, SECONDS)
            orphans = self.orphans(running)
            seconds = time.monotonic() - began
        finally:
            running.kill()
        found = {"number": number, "protocol": self.protocol, "way": way, "target": target, "moment": moment,
                 "seconds": seconds, "orphans": orphans, "damaged": self.damaged(), "incomplete": [], "left over": []}
        try:
            found["incomplete"] = self.incomplete(self.build.run(RESTORE, SECONDS))
        except BuildTimeout as timeout:
            found["incomplete"] = [str(timeout)]
        found["damaged"] += self.damaged()
        found["left over"] = sorted({str(path.relative_to(self.build.sstate)) for path in self.build.sstate.rglob("*")
                                     if path.is_file() and path.relative_to(self.build.sstate) not in self.expected
                                     and not path.name.endswith((".lock", ".done"))})
        return found

    def hit(self, running, way, rng):
        """Returns what was hit"""
        if way.startswith("Ctrl-C"):
            running.interrupt()
            if way.endswith("twice"):
                wait_for(running, rng.uniform(0, AGAIN))
                running.interrupt()
            return "ui"
        number = signal.SIGKILL if way == "SIGKILL" else signal.SIGTERM
        # The next one if it is not there
        for target in rng.choice((("server", "ui"), ("worker", "server", "ui"), ("ui",))):
            pids = [running.process.pid] if target == "ui" else self.first_of(PROGRAMS[target])
            if pids:
                break
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        return target

    def first_of(self, program):
        """The process of that program, without those that it has forked"""
        pids = [pid for pid in self.build.processes() if program in command_line(pid)]
        return [pid for pid in pids if parent(pid) not in pids]

    def orphans(self, running):
        """Commands of the processes that are left after ORPHAN_SECONDS"""
        deadline = time.monotonic() + ORPHAN_SECONDS
        while True:
            pids = set(self.build.processes()) | set(self.ssh_processes())
            left = [command_line(pid)[-200:] for pid in pids - {running.process.pid}]
            if not any(left) or time.monotonic() > deadline:
                return [line for line in left if line]
            wait_for(running, POLL_SECONDS) if running.process.poll() is None else time.sleep(POLL_SECONDS)

    def ssh_processes(self):
        """Those to the mirror, whatever their environment"""
        return [pid for pid in all_pids() if str(self.tools) in command_line(pid)] if self.tools else []

    def damaged(self):
        return [path.name for path in finals(self.build.sstate)
                if path.read_bytes() != (self.files / path.relative_to(self.build.sstate)).read_bytes()]

    def incomplete(self, result):
        found = [] if result.returncode == 0 else ["exit code %d" % result.returncode]
        lost = len(self.build.sizes) - len(self.build.restored())
        found += ["%d objects are not restored" % lost] if lost else []
        return found + (["%d processes are left" % result.left] if result.left else [])


def finals(folder):
    """Paths of objects and .siginfo files"""
    return [path for path in folder.rglob("sstate:*") if path.name.endswith((".tar.zst", ".siginfo"))]


def wait_for(running, seconds):
    """Until the user interface ends, for so many seconds at most"""
    with contextlib.suppress(subprocess.TimeoutExpired):
        running.process.wait(seconds)


def told(one):
    return "; ".join("%s: %s" % (name, ", ".join(one[name])) for name in FINDINGS if one[name])


def table(rounds):
    lines = ["", "%-14s %-8s %7s" % ("", "", "rounds") + "".join("%11s" % name for name in FINDINGS)
             + "%9s %9s" % ("median s", "longest s")]
    groups = collections.defaultdict(list)
    for one in rounds:
        groups[one["way"], one["target"]].append(one)
    for (way, target), group in sorted(groups.items()):
        seconds = [one["seconds"] for one in group]
        lines.append("%-14s %-8s %7d" % (way, target, len(group))
                     + "".join("%11d" % sum(bool(one[name]) for one in group) for name in FINDINGS)
                     + "%9.1f %9.1f" % (statistics.median(seconds), max(seconds)))
    return "\n".join(lines)
