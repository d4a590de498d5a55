# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""How long it takes to restore all objects of a build: `scripts/bench build`.

Each cell is a mirror on loopback behind delay.py. Its name tells the protocol,
the round trip time, whether the bandwidth has a cap, and whether all objects
are small:

    http-20ms  https-20ms  sftp-20ms  http-0ms  http-20ms-cap  sftp-20ms-small

are the default; any other of that form, and with s3, can be had by --cell. In each the same
objects are restored, from the same server, in turns by

    stock                   stock bitbake
    without prefetch        patched bitbake with BB_SETSCENE_PREFETCH = "0"
    patched                 patched bitbake
    TOOL, then stock        a script that downloads the same files, then stock bitbake with all of them local

and beside these the parts of the last one alone: the download by each tool
(curl; sftp and, if it is installed, lftp; aws), and the build with everything local,
for both trees. Recipes are parsed before. The median counts.

The mirror and the proxy run on the processors that the build runs on, which a
mirror elsewhere would not, and they have nothing to do where all is local. So
the CPU seconds of each are told as well: of the build (or the download) with
all of its processes, what bitbake's server alone has of them, of the mirror
and of the proxy. "machine" is what these CPU seconds would take if all
processors were busy with nothing else: below it no build can be. "others" are
CPU seconds of whatever else ran meanwhile: with many, do not trust the rest.
"""

import contextlib
import dataclasses
import os
import re
import shutil
import sys
import time
from pathlib import Path

from netqueue import Problem
from netqueue.bench.frame import cpuseconds
from netqueue.bench.frame.comparison import medians
from netqueue.bench.frame.downloads import listing, tools
from netqueue.bench.frame.mirrors import open_mirror
from netqueue.bench.frame.options import (add_json, add_number, add_repeat, add_threads, add_work, settings,
                                          write_json)
from netqueue.bench.frame.picture import draw
from netqueue.bench.frame.trees import enter_venv, patched_tree
from netqueue.bench.frame.workfolder import put_away, work_folder
from netqueue.lab import s3server, sshd
from netqueue.lab.build import Build, BuildMirror
from netqueue.lab.certificates import make_certificates
from netqueue.lab.delay import delayed
from netqueue.lab.oecore import BASE as MASTER
from netqueue.lab.oecore import OEBuild, TargetBuild, clones, sources_of_environment
from netqueue.lab.trees import shared_tree
from netqueue.progress import Progress

DEFAULT = ("http-20ms", "https-20ms", "sftp-20ms", "http-0ms", "http-20ms-cap", "sftp-20ms-small")
MATRIX = tuple("%s-%dms%s%s" % (protocol, delay, cap, small) for protocol in ("http", "https", "sftp", "s3")
               for delay in (0, 20) for cap in ("", "-cap") for small in ("", "-small"))
SECONDS = 3600
PARSES = 5
MIB = 1024 * 1024
STOCK, OFF, PATCHED = "stock", "without prefetch", "patched"
LOCAL = {STOCK: "all local, stock", PATCHED: "all local, patched"}
PREFETCH_OFF = 'BB_SETSCENE_PREFETCH = "0"'


@dataclasses.dataclass
class Cell:
    name: str
    protocol: str
    delay: int          # milliseconds
    rate: float         # MiB a second, or None
    small: bool
    objects: int

    @property
    def once(self):
        """Whether what takes many minutes is run once"""
        return self.small


def add_options(parser):
    parser.add_argument("--cell", action="append", metavar="NAME", help="only this; may be given more than once")
    parser.add_argument("--matrix", action="store_true", help="all %d cells: %s" % (len(MATRIX), "protocol, 0 and 20 ms, "
                        "with and without a cap, objects of mixed size and small ones"))
    add_number(parser, "--objects", 300, "objects of a cell, of mixed size")
    add_number(parser, "--small-objects", 2000, "objects of a cell with small ones, where stock runs once")
    add_number(parser, "--rate", 8, "the cap, in MiB a second", metavar="MIB")
    add_threads(parser)
    add_repeat(parser, 3, "runs of each, but one of sftp(1), which takes minutes; the median counts")
    parser.add_argument("--real-classes", action="store_true", help="builds with openembedded-core's classes, on clones of "
                        "the checkouts that BITBAKEDIR and OECOREDIR name")
    parser.add_argument("--base", default=MASTER, metavar="NAME", help="with --real-classes: of this base (default: %(default)s)")
    parser.add_argument("--target", metavar="NAME", help="with --real-classes: restores all that this target of "
                        "openembedded-core needs, from made-up objects")
    add_json(parser)
    add_work(parser)
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw stock beside patched into FILE")


def run(options):
    if options.target and not options.real_classes:
        raise Problem("--target is for --real-classes")
    if options.base != MASTER and not options.real_classes:
        raise Problem("--base is for --real-classes")
    cells = [parse(name, options) for name in (MATRIX if options.matrix else options.cell or DEFAULT)]
    if options.target:
        cells = [cell for cell in cells if not cell.small]
        if not cells:
            raise Problem("--target: its objects are not small ones")
    with_s3 = any(cell.protocol == "s3" for cell in cells)
    enter_venv(with_s3)
    if with_s3 and s3server.missing():
        raise Problem("s3: %s is not installed" % s3server.missing())
    done, problems = [], []
    with work_folder("build-", options.work) as work:
        bench = Bench(options, work)
        for cell in cells:
            try:
                done.append(bench.measure(cell))
                print(table(options, done[-1]), flush=True)
            except Problem as problem:
                # What was measured before took minutes
                problems.append("%s: %s" % (cell.name, problem))
    write_json(options, report(options, done))
    if options.svg and done:
        options.svg.write_text(draw(done, (STOCK, PATCHED)))
    if problems:
        raise Problem("; ".join(problems))
    return 0


def parse(name, options):
    match = re.fullmatch(r"(https?|sftp|s3)-(\d{1,4})ms(-cap)?(-small)?", name)
    if not match:
        raise Problem("%s is not the name of a cell, such as %s" % (name, DEFAULT[-2]))
    protocol, delay, cap, small = match.groups()
    if protocol == "sftp" and sshd.missing():
        raise Problem("%s: %s is not installed" % (name, sshd.missing()))
    return Cell(name, protocol, int(delay), options.rate if cap else None, bool(small),
                options.small_objects if small else options.objects)


def report(options, done):
    machine = {"cpus": os.cpu_count(), "kernel": os.uname().release, "machine": os.uname().machine,
               "python": sys.version.split()[0]}
    return {"options": settings(options), "machine": machine, "cells": done}


class Bench:
    """The measurements of a run. work: a folder that is removed afterwards."""

    def __init__(self, options, work):
        self.options = options
        self.work = work
        if options.real_classes:
            sources = sources_of_environment()
            self.trees = {name: clones(work / ("tree-" + name), sources, name == PATCHED, options.base)
                          for name in (STOCK, PATCHED)}
        else:
            self.trees = {STOCK: shared_tree(patched=False), PATCHED: patched_tree()}
        self.progress = Progress(sys.stderr)
        self.certificates = make_certificates(work / "tls")
        self.filled = {}

    def measure(self, cell):
        """The row of a cell: what it is, and {variant: figures}."""
        files = self.fill(cell)
        if self.options.target:
            cell = dataclasses.replace(cell, objects=len(listing(files)) // 2)
        size = sum(path.stat().st_size for path in files.rglob("sstate:*"))
        row = {"cell": cell.name, "objects": cell.objects, "mib": round(size / MIB, 1), "variants": {}}
        runs, link = {}, None
        with contextlib.ExitStack() as stack:
            mirror = stack.enter_context(open_mirror(cell.protocol, files, self.work / "home" / cell.protocol,
                                                     self.certificates, log=True))
            url = mirror.served.url
            if cell.delay or cell.rate:
                rate = cell.rate * MIB if cell.rate else None
                link = stack.enter_context(delayed(mirror.served.port, cell.delay / 1000, rate))
                url = mirror.url_behind(link.port)
            place = Place(cell, mirror, link, url, files, self.work / cell.name)
            row["software"] = mirror.served.software
            for turn in range(self.options.repeat):
                for variant, figures in self.turn(place, turn):
                    runs.setdefault(variant, []).append(figures)
        put_away(place.folder, self.work)
        for variant, results in runs.items():
            figures = {name: round(median, 2) for name, median in medians(results).items()}
            row["variants"][variant] = dict(figures, runs=results)
        return row

    def turn(self, place, turn):
        """Yield (variant, figures) of one run of each."""
        patient = turn == 0 or not place.cell.once
        if patient:
            yield STOCK, self.build(place, STOCK, STOCK)
        yield OFF, self.build(place, OFF, PATCHED, PREFETCH_OFF)
        yield PATCHED, self.build(place, PATCHED, PATCHED)
        for tool, download in tools(place.cell.protocol):
            # That takes minutes
            if tool != "sftp" or turn == 0:
                yield from self.script(place, tool, download)
        for tree, variant in LOCAL.items():
            yield variant, self.build(place, tree, tree, local=place.files)

    def script(self, place, tool, download):
        """A download, then stock with what it gave"""
        folder = place.folder / "downloaded"
        self.progress.step("%s: the download by %s" % (place.cell.name, tool))
        count, started = Count(place), time.monotonic()
        download(place, folder)
        seconds = time.monotonic() - started
        count.stop()
        self.progress.done()
        if listing(folder) != listing(place.files):
            raise Problem("%s has not downloaded everything" % tool)
        figures = count.figures(seconds, lost=0)
        yield tool, figures
        then = self.build(place, STOCK, STOCK, local=folder)
        yield "%s, then stock" % tool, {name: figures[name] + then[name] for name in figures}
        put_away(folder, self.work)

    def build(self, place, name, tree, conf="", local=None):
        """Restore everything. local: a folder with what SSTATE_DIR has before. Returns figures."""
        cell = place.cell
        build = place.builds.get(name)
        self.progress.step("%s: %s%s" % (cell.name, name, ", everything local" if local else ""))
        if build is None:
            build = place.builds[name] = self.make_build(place, name, tree, conf)
            self.parse(build)
        for folder in (build.tmp, build.sstate):
            put_away(folder, self.work)
        if local:
            shutil.copytree(local, build.sstate)
        with build:
            count = Count(place)
            result = build.run(["--setscene-only", build.target], timeout=SECONDS, progress=self.progress.follow)
            count.stop()
            cpu, server = cpuseconds.of_rested_build(build)
        self.progress.done()
        lost = cell.objects - len(build.restored())
        if tree == PATCHED and (result.returncode or lost):
            raise Problem("%s: bitbake ended with %d, %d objects were lost" % (name, result.returncode, lost))
        return count.figures(result.seconds, lost, cpu, server)

    def parse(self, build):
        """Until nothing is left to be parsed: with openembedded-core's classes the second run does so again."""
        for _ in range(PARSES):
            with build:
                result = build.run(["--parse-only"], timeout=SECONDS, progress=self.progress.follow)
            if result.returncode:
                raise Problem("bitbake --parse-only ended with %d" % result.returncode)
            if "\nParsing of " not in result.output:
                return
        raise Problem("recipes are parsed in each run")

    def make_build(self, place, name, tree, conf):
        build = self.new_build(place.folder / name.replace(" ", "-"), tree, place.cell, self.options.threads, conf,
                               BuildMirror(place.url))
        place.mirror.equip(build)
        build.environment["HOME"] = str(build.home)
        wgetrc = self.work / "home" / place.cell.protocol / ".wgetrc"
        if wgetrc.exists():
            shutil.copy(wgetrc, build.home)
        return build

    def fill(self, cell):
        """Make every object once. Returns the folder that a mirror serves."""
        key = "%d-%s" % (cell.objects, "small" if cell.small else "mixed")
        if key not in self.filled:
            self.progress.step("filling a mirror with %s" % (self.options.target or "%d objects" % cell.objects))
            with self.new_build(self.work / ("fill-" + key), STOCK, cell, os.cpu_count() or 2) as build:
                build.make_objects(self.progress.follow)
                for path in build.sstate.rglob("*.siginfo"):
                    # Of a task that has no object: nobody fetches it
                    if not path.with_suffix("").exists():
                        path.unlink()
                self.filled[key] = self.work / key
                build.sstate.rename(self.filled[key])
            self.progress.done()
        return self.filled[key]

    def new_build(self, folder, tree, cell, threads, conf="", mirror=None):
        tree = self.trees[tree]
        options = {"threads": threads, "extra_conf": conf, "mirror": mirror, "environment": cpuseconds.RESIDENT}
        if self.options.target:
            return TargetBuild(folder, tree, self.options.target, **options)
        build = (OEBuild if tree.oecore else Build)(folder, tree, objects=cell.objects, **options)
        if cell.small:
            build.sizes = {name: 1024 + 7 * number % 4096 for number, name in enumerate(build.sizes)}
            build.write()
        return build


@dataclasses.dataclass
class Place:
    """A cell that is being measured. builds: {name: Build}."""
    cell: Cell
    mirror: object      # of frame/mirrors.py
    link: object        # of lab/delay.py, or None
    url: str            # of the link
    files: Path         # what the mirror serves
    folder: Path
    builds: dict = dataclasses.field(default_factory=dict)


class Count:
    """What happens from now on, until stop(), of a run at place."""

    def __init__(self, place):
        self.place = place
        place.mirror.served.reset()
        self.serving = self.serving_seconds()
        self.machine, self.client = cpuseconds.of_machine(), cpuseconds.of_children()

    def serving_seconds(self):
        """CPU seconds of the mirror and of the proxy, since they were started"""
        link = self.place.link
        served = self.place.mirror.served
        processes = [served.process] + ([served.rclone.process] if isinstance(served, s3server.S3Mirror) else [])
        return (sum(cpuseconds.of_server(process.pid) for process in processes),
                cpuseconds.of_server(link.pid) if link else 0)

    def stop(self):
        self.machine, self.client = cpuseconds.of_machine() - self.machine, cpuseconds.of_children() - self.client

    def figures(self, seconds, lost, cpu=0, server=0):
        """cpu: of a build, the CPU seconds beside those of its user interface; server: what its server alone has of them."""
        served = self.place.mirror.served
        mirror, proxy = (now - then for now, then in zip(self.serving_seconds(), self.serving))
        counters = served.counters()
        run = {"connections": counters.logins if isinstance(served, sshd.Sshd) else counters.connections,
               "requests": counters.requests, "mirror_cpu_seconds": mirror, "proxy_cpu_seconds": proxy,
               "seconds": seconds, "lost": lost, "cpu_seconds": cpu + self.client, "server_cpu_seconds": server}
        # The server does a little more after that time, which is its own
        return dict(run, others_cpu_seconds=max(0, self.machine - own(run)))


# What the user sees

def goal(variants):
    """(the name of the longer one of the best download and the installation, its seconds): the floor of a build"""
    alone = [name for name in variants if name in ("curl", "sftp", "lftp", "aws")]
    best = min(alone, key=lambda name: variants[name]["seconds"])
    longer = max((best, LOCAL[PATCHED]), key=lambda name: variants[name]["seconds"])
    return longer, variants[longer]["seconds"]


def own(figures):
    """The CPU seconds of all that belongs to a variant"""
    return sum(figures[name] for name in ("cpu_seconds", "mirror_cpu_seconds", "proxy_cpu_seconds"))


def machine(figures):
    """Seconds that these take on all processors"""
    return own(figures) / os.cpu_count()


def table(options, row):
    variants = row["variants"]
    patched = variants[PATCHED]["seconds"]
    lines = ["", "%s: %d objects, %.1f MiB with their .siginfo, from %s; %d threads, median of %d" %
             (row["cell"], row["objects"], row["mib"], row["software"], options.threads, options.repeat),
             "%-22s %9s %12s %9s %6s %16s %9s %9s %9s %9s %9s %9s" %
             ("", "seconds", "connections", "requests", "lost", "patched / this", "CPU s", "(server)", "mirror", "proxy",
              "machine", "others")]
    for name, figures in variants.items():
        lines.append("%-22s %9.2f %12d %9d %6d %16.2f %9.2f %9.2f %9.2f %9.2f %9.2f %9.2f" %
                     (name, figures["seconds"], figures["connections"], figures["requests"], figures["lost"],
                      patched / figures["seconds"], figures["cpu_seconds"], figures["server_cpu_seconds"],
                      figures["mirror_cpu_seconds"], figures["proxy_cpu_seconds"], machine(figures),
                      figures["others_cpu_seconds"]))
    longer, seconds = goal(variants)
    lines.append("patched / max(best download, all local) = %.2f (%s)" % (patched / seconds, longer))
    busy, local = machine(variants[PATCHED]), variants[LOCAL[PATCHED]]["seconds"]
    lines.append("patched / max(its CPU seconds on all %d processors, all local) = %.2f (%s)" %
                 (os.cpu_count(), patched / max(busy, local), "machine" if busy > local else LOCAL[PATCHED]))
    return "\n".join(lines)
