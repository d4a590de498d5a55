# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""What the series costs a build that it has nothing to offer: `scripts/bench overhead`.

Real builds of the same recipes, in which

    no mirror       there is no SSTATE_MIRRORS, and everything is made
    all local       everything is in SSTATE_DIR; there is a mirror, but nothing is to be asked of it, which is checked

by stock bitbake, by patched bitbake and by patched bitbake with
BB_CONNECTION_CACHE = "0", which take turns. The first run of each is not
counted: recipes are parsed in it, and the server stays for the others. CPU
seconds are those of the server, the worker and all tasks; those of the user
interface are told apart.

A ratio to stock is the median of those of the turns. Its interval is that of the
sign test, so whether it is beyond 1 % is only said if that is so of all of it.
"""

import contextlib
import dataclasses
import shutil
import sys

from netqueue import Problem
from netqueue.bench.frame import cpuseconds
from netqueue.bench.frame.comparison import summarise, take_turns
from netqueue.bench.frame.mirrors import open_mirror
from netqueue.bench.frame.options import (add_json, add_number, add_repeat, add_threads, add_work, settings,
                                          write_json)
from netqueue.bench.frame.trees import add_trees, enter_venv, trees_of
from netqueue.bench.frame.workfolder import put_away, work_folder
from netqueue.lab.build import Build, BuildMirror
from netqueue.progress import Progress

STOCK, PATCHED, OFF = "stock", "patched", "switched off"
VARIANTS = (STOCK, PATCHED, OFF)
SWITCH = 'BB_CONNECTION_CACHE = "0"'
PARTS = ("no mirror", "all local")
MEASURES = (("seconds", "seconds"), ("cpu_seconds", "CPU seconds"), ("client_cpu_seconds", "CPU, interface"))
LIMIT = 0.01
SECONDS = 1800


def add_options(parser):
    add_number(parser, "--objects", 100, "recipes, each with one object")
    add_threads(parser)
    add_repeat(parser, 9, "turns; less than 6 cannot be sure to 95 %%")
    parser.add_argument("--part", choices=PARTS, action="append", metavar="P",
                        help='only this: "%s"; may be given more than once' % '" or "'.join(PARTS))
    add_trees(parser)
    add_json(parser)
    add_work(parser)


def run(options):
    trees = find_trees(options)
    enter_venv()
    with work_folder("overhead-", options.work) as work:
        rows = Bench(options, trees, work).measure()
    print(table(options, rows))
    write_json(options, {"options": settings(options), "parts": rows})
    return 0


def find_trees(options):
    """{variant: Tree}"""
    stock, patched = trees_of(options)
    if stock.is_checkout != patched.is_checkout:
        # The programs of a checkout alone cost more than what is looked for here
        raise Problem("%s and %s differ by more than the series: name a checkout of each by --stock and --patched" %
                      (stock.path, patched.path))
    return {STOCK: stock, PATCHED: patched, OFF: patched}


@dataclasses.dataclass
class Place:
    """Where a variant builds for a part. mirror: of frame/mirrors.py, or None."""
    part: str
    variant: str
    build: Build
    mirror: object = None


class Bench:
    """The measurements of a run. work: a folder that is removed afterwards."""

    def __init__(self, options, trees, work):
        self.options = options
        self.trees = trees
        self.work = work
        self.progress = Progress(sys.stderr)

    def measure(self):
        """{part: what summarise() returns}"""
        parts = [part for part in PARTS if part in (self.options.part or PARTS)]
        return {part: self.measure_part(part) for part in parts}

    def measure_part(self, part):
        with contextlib.ExitStack() as stack:
            mirror = None
            if part == "all local":
                mirror = stack.enter_context(open_mirror("http", self.fill(), self.work / "mirror-home", None, log=True))
            places = {variant: stack.enter_context(self.place(part, variant, mirror)) for variant in VARIANTS}
            runs = take_turns(VARIANTS, self.options.repeat, lambda variant: self.build(places[variant]),
                              progress=self.progress, title=part)
        return summarise(runs, STOCK)

    @contextlib.contextmanager
    def place(self, part, variant, mirror):
        folder = self.work / ("%s-%s" % (part, variant)).replace(" ", "-")
        build = Build(folder, self.trees[variant], objects=self.options.objects, threads=self.options.threads,
                      extra_conf=SWITCH if variant == OFF else "", mirror=mirror and BuildMirror(mirror.served.url),
                      environment=cpuseconds.RESIDENT)
        if mirror:
            shutil.copytree(self.work / "objects", build.sstate)
        with build:
            yield Place(part, variant, build, mirror)

    def fill(self):
        """Make all objects once. Returns the folder that has them."""
        self.progress.step("making %d objects" % self.options.objects)
        with Build(self.work / "fill", self.trees[STOCK], objects=self.options.objects, threads=self.options.threads) as build:
            build.make_objects(self.progress.follow)
            build.sstate.rename(self.work / "objects")
        self.progress.done()
        return self.work / "objects"

    def build(self, place):
        """Build everything. Returns figures."""
        build = place.build
        put_away(build.tmp, self.work)
        if place.mirror:
            place.mirror.served.reset()
        else:
            put_away(build.sstate, self.work)
        before, client = cpuseconds.of_build(build), cpuseconds.of_children()
        result = build.run(["demo-all"], timeout=SECONDS)
        client = cpuseconds.of_children() - client
        cpu = cpuseconds.of_rested_build(build)[0] - before
        self.check(place, result)
        return {"seconds": result.seconds, "cpu_seconds": cpu, "client_cpu_seconds": client}

    def check(self, place, result):
        where = "%s, %s: " % (place.part, place.variant)
        if result.returncode:
            raise Problem(where + "bitbake ended with %d" % result.returncode)
        restored = len(place.build.restored())
        if place.mirror:
            counters = place.mirror.served.counters()
            if counters.requests or counters.connections:
                raise Problem(where + "the mirror got %d requests over %d connections" %
                              (counters.requests, counters.connections))
            if restored != self.options.objects:
                raise Problem(where + "%d of %d objects were restored" % (restored, self.options.objects))
        elif restored or len(place.build.archives()) != self.options.objects:
            raise Problem(where + "%d of %d objects were made" % (len(place.build.archives()), self.options.objects))


# What the user sees

def verdict(low, high):
    """What the interval of a ratio to stock says of LIMIT"""
    if low > 1 + LIMIT:
        return "slower by more than 1 %"
    if high <= 1 + LIMIT:
        return "not slower by more than 1 %"
    return "1 % is not resolved"


def table(options, rows):
    lines = []
    for part, variants in rows.items():
        lines += ["", "%s: %d recipes, %d threads, %d turns" % (part, options.objects, options.threads, options.repeat),
                  "%-16s %-14s %9s %9s %9s   %s" % ("", "", "median", "minimum", "to stock", "interval")]
        for name, title in MEASURES:
            for variant, row in variants.items():
                ratio = row["ratios"][name]
                text = "%-16s %-14s %9.2f %9.2f %9.4f" % (title, variant, row[name], row[name + "_min"], ratio.median)
                if variant != STOCK:
                    text += "   %s: %s" % (ratio.interval_text(4), verdict(ratio.low, ratio.high))
                lines.append(text)
    return "\n".join(lines)
