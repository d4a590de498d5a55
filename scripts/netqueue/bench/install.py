# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""What it costs to install objects that are all local, with openembedded-core's classes: `scripts/bench install`.

In turns by stock bitbake and by patched bitbake, on clones of the checkouts
that BITBAKEDIR and OECOREDIR name:

    install     every object is in SSTATE_DIR, and there is no mirror; TMPDIR is empty
    parse       all recipes are parsed, with no cache
    rebuild     one recipe is compiled again, and everything else is there

The latter two are what must not become slower. The first run of each is not
counted: recipes are parsed in it. Each run has a server of its own, and its CPU
seconds are those of the server, the worker and all tasks.

A ratio is the median of those of the turns. Its interval is that of the sign
test.
"""

import functools
import os
import shutil
import sys
from pathlib import Path

from netqueue import Problem
from netqueue.bench.frame import cpuseconds
from netqueue.bench.frame.comparison import summarise, take_turns
from netqueue.bench.frame.options import (add_json, add_number, add_only, add_repeat, add_threads, add_work,
                                          settings, write_json)
from netqueue.bench.frame.workfolder import put_away, work_folder
from netqueue.lab.oecore import OEBuild, clones, sources_of_environment
from netqueue.lab.trees import checkout
from netqueue.progress import Progress

STOCK, PATCHED = "stock", "patched"
VARIANTS = (STOCK, PATCHED)
PARTS = ("install", "parse", "rebuild")
MEASURES = (("seconds", "seconds"), ("cpu_seconds", "CPU seconds"))
# Ratios to stock that were agreed on
GOALS = {"install": {"seconds": 0.65, "cpu_seconds": 0.60}, "parse": {"seconds": 1.01, "cpu_seconds": 1.01},
         "rebuild": {"seconds": 1.01, "cpu_seconds": 1.01}}
SECONDS = 3600


def add_options(parser):
    add_number(parser, "--objects", 300, "recipes, each with one object")
    add_threads(parser)
    add_repeat(parser, 5, "turns; less than 6 cannot be sure to 95 %%")
    add_only(parser, "--part", PARTS)
    parser.add_argument("--patched", metavar="TREE", help="a checkout to use as patched bitbake")
    parser.add_argument("--patched-oecore", metavar="TREE", help="a checkout to use as patched openembedded-core")
    add_json(parser)
    add_work(parser)


def run(options):
    sources = sources_of_environment()
    with work_folder("install-", options.work) as work:
        rows = Bench(options, find_trees(options, sources, work), work).measure()
    print(table(options, rows))
    write_json(options, {"options": settings(options), "cpus": os.cpu_count(), "parts": rows})
    return 0


def find_trees(options, sources, work):
    """{variant: Tree}"""
    trees = {STOCK: clones(work / "tree-stock", sources, patched=False)}
    # Another bitbake brings no patches for openembedded-core
    trees[PATCHED] = clones(work / "tree-patched", sources, patched=not options.patched)
    oecore = trees[PATCHED].oecore
    if options.patched:
        trees[PATCHED] = checkout(options.patched)
    if options.patched_oecore:
        oecore = checkout_of_oecore(options.patched_oecore)
    trees[PATCHED].oecore = oecore
    return trees


def checkout_of_oecore(path):
    path = Path(path).resolve()
    if not (path / "meta" / "conf" / "layer.conf").is_file():
        raise Problem("%s is no checkout of openembedded-core" % path)
    return path


class Bench:
    """The measurements of a run. work: a folder that is removed afterwards."""

    def __init__(self, options, trees, work):
        self.options = options
        self.trees = trees
        self.work = work
        self.progress = Progress(sys.stderr)

    def measure(self):
        """{part: what summarise() returns}"""
        self.fill()
        rows = {}
        builds = {variant: self.new_build(variant) for variant in VARIANTS}
        for part in self.options.part or PARTS:
            runs = take_turns(VARIANTS, self.options.repeat, functools.partial(self.build, part, builds),
                              progress=self.progress, title=part)
            rows[part] = summarise(runs, STOCK)
        return rows

    def fill(self):
        """Make all objects once, in self.work / "objects"."""
        self.progress.step("making %d objects" % self.options.objects)
        with OEBuild(self.work / "fill", self.trees[STOCK], objects=self.options.objects, threads=os.cpu_count() or 2) as build:
            build.make_objects(self.progress.follow)
            build.sstate.rename(self.work / "objects")
        self.progress.done()

    def new_build(self, variant):
        build = OEBuild(self.work / variant, self.trees[variant], objects=self.options.objects, threads=self.options.threads,
                        environment=cpuseconds.RESIDENT)
        shutil.copytree(self.work / "objects", build.sstate)
        return build

    def build(self, part, builds, variant):
        """One run of a part. Returns figures."""
        build = builds[variant]
        if part == "install":
            put_away(build.tmp, self.work)
            arguments = ["--setscene-only", build.target]
        elif part == "parse":
            put_away(build.directory / "cache", self.work)
            arguments = ["--parse-only"]
        else:
            arguments = ["-C", "compile", next(iter(build.sizes))]
        # A server that stays has open files in TMPDIR
        with build:
            result = build.run(arguments, timeout=SECONDS)
            cpu = cpuseconds.of_rested_build(build)[0]
        where = "%s, %s: " % (part, variant)
        if result.returncode:
            raise Problem(where + "bitbake ended with %d" % result.returncode)
        if part == "install" and len(build.restored()) != self.options.objects:
            raise Problem(where + "%d of %d objects were restored" % (len(build.restored()), self.options.objects))
        return {"seconds": result.seconds, "cpu_seconds": cpu}


# What the user sees

def table(options, rows):
    lines = ["%d objects, %d threads, %d processors, %d turns" % (options.objects, options.threads, os.cpu_count(),
                                                                options.repeat),
             "%-10s %-14s %10s %10s %10s %10s %10s   %s" % ("", "", STOCK, PATCHED, "ratio", "goal", "ms/object", "interval")]
    for part, variants in rows.items():
        for name, title in MEASURES:
            stock, patched = (variants[variant][name] for variant in VARIANTS)
            ratio = variants[PATCHED]["ratios"][name]
            each = "%10.1f" % (1000 * patched / options.objects) if part == "install" else "%10s" % ""
            lines.append("%-10s %-14s %10.2f %10.2f %10.3f %10.2f %s   %s" %
                         (part, title, stock, patched, ratio.median, GOALS[part][name], each, ratio.interval_text(3)))
    return "\n".join(lines)
