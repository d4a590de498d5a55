# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""What builds restore from mirrors with faults: `scripts/bench faults`.

Stock and patched bitbake go through the same situations with real builds, each
from nothing and with a mirror of its own. faultymirrors.py has the list; --list
prints it. Of each build:

    restored    objects that setscene tasks restored, compared byte for byte
    lost        those that the mirror gives, and were not restored
    wrong       objects with other bytes under a final name than those of the mirror, at any time
    conns       connections that the mirrors accepted
    seconds     of the whole build, which also makes what is not restored; one without an end is ended after 240
    exit        bitbake's exit code, or "none" if it did not end
    lines       WARNING and ERROR lines, and those NOTE lines that the series adds

At the end each situation is checked: patched bitbake restores at least what
stock restores, has no wrong bytes, ends with 0 if stock does, and takes no
longer than stock and the longest wait for a mirror. What does not hold is
listed, and the exit code is 1.
"""

import dataclasses
import re
import sys
import time
from pathlib import Path

from netqueue import Problem
from netqueue.bench.frame.options import add_json, add_threads, add_work, positive, settings, write_json
from netqueue.bench.frame.trees import enter_venv, patched_tree
from netqueue.bench.frame.workfolder import work_folder
from netqueue.lab.bitbakerun import BuildTimeout
from netqueue.lab.build import Build
from netqueue.lab.faultymirrors import MANY, SITUATIONS, Objects
from netqueue.lab.trees import shared_tree
from netqueue.progress import Progress

TREES = ("stock", "patched")
SECONDS = 240
# What patched bitbake may take longer than stock: health.AWAY, and the resolution of one measurement
BOUND = 66
EQUAL_SIZE = 4096
_SAID = re.compile(r"^(?:.*\.\.\.)?((?:WARNING:|ERROR:|FATAL:|Traceback).*)$", re.MULTILINE)
_NOTES = re.compile(r"^(?:.*\.\.\.)?(NOTE: (?:Sstate network|Sstate mirror|Network tasks).*)$", re.MULTILINE)
_CORRUPT = re.compile(r"Corrupt sstate object \S*/sstate:([^:]*):")


@dataclasses.dataclass
class Outcome:
    """lines is what the user reads"""
    restored: int
    lost: int
    wrong: int
    connections: int
    seconds: float
    exit: int           # None: it did not end
    lines: list
    faults: int         # how often the mirror did something wrong, None if that is not counted

    def cells(self):
        return [str(self.restored), str(self.lost), str(self.wrong), str(self.connections), "%.1f" % self.seconds,
                "none" if self.exit is None else str(self.exit), str(len(self.lines))]


COLUMNS = ("restored", "lost", "wrong", "conns", "seconds", "exit", "lines")


@dataclasses.dataclass
class Row:
    situation: object
    there: int
    outcomes: dict      # by name of the tree
    wanted: int


def add_options(parser):
    parser.add_argument("--situation", action="append", metavar="NAME", help="only this; may be given more than once")
    parser.add_argument("--list", action="store_true", help="print the situations and end")
    parser.add_argument("--objects", type=positive, default=40, metavar="N",
                        help="objects of a build (default: %(default)s, at least 20)")
    add_threads(parser)
    parser.add_argument("--markdown", action="store_true", help="print the table as README.md shows it")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep what bitbake printed in FOLDER")
    add_json(parser)
    add_work(parser)


def run(options):
    if options.list:
        for situation in SITUATIONS:
            print("%-12s %s" % (situation.name, situation.text))
        return 0
    selected = select(options.situation)
    if options.objects < 20:
        raise Problem("--objects: some situations need 20")
    enter_venv()
    started = time.monotonic()
    rows, left_out = [], []
    with work_folder("faults-", options.work) as work:
        bench = Bench(options, work)
        for situation in selected:
            try:
                rows.append(bench.measure(situation))
                # Complete up to here, however it ends
                write_json(options, report(options, rows, left_out))
            except Problem as problem:
                left_out.append("%s: %s" % (situation.name, problem))
    write_json(options, report(options, rows, left_out))
    print("\n".join(markdown(rows) if options.markdown else table(rows)))
    failures = [line for row in rows for line in check(row)]
    print("\n%d situations, %d objects, %.0f s" % (len(rows), options.objects, time.monotonic() - started))
    idle = ["%s: %s met no fault" % (row.situation.name, name) for row in rows for name in TREES
            if row.outcomes[name].faults == 0]
    for line in idle + ["left out: " + line for line in left_out] + ["FAILED: " + line for line in failures]:
        print(line)
    return 1 if failures else 0


def select(names):
    """The situations with these names, or all"""
    known = [situation.name for situation in SITUATIONS]
    for name in names or ():
        if name not in known:
            raise Problem("--situation %s: there is none, but %s" % (name, ", ".join(known)))
    return [situation for situation in SITUATIONS if not names or situation.name in names]


class Bench:
    """The builds of a run. work: a folder that is removed afterwards."""

    def __init__(self, options, work):
        self.options = options
        self.work = work
        self.progress = Progress(sys.stderr)
        self.trees = {"stock": shared_tree(patched=False), "patched": patched_tree()}
        # By whether there are many
        self._files = {}

    def measure(self, situation):
        """Both builds. Returns a Row; raises Problem if the mirror cannot be had."""
        files = self.files(situation.many)
        wanted = self.options.objects * (MANY if situation.many else 1)
        names = ["demo-%04d" % number for number in range(1, wanted + 1)]
        row = Row(situation, 0, {}, wanted)
        for name in TREES:
            folder = self.work / ("%s-%s" % (situation.name, name))
            with situation.open(Objects(files, names, self.work)) as mirror, \
                    self.make_build(folder, name, situation.many, mirror) as build:
                self.progress.step("%s, %s" % (situation.name, name))
                row.outcomes[name] = restore(build, mirror, files)
                row.there = mirror.there
                self.progress.done()
            if self.options.keep:
                self.options.keep.mkdir(parents=True, exist_ok=True)
                log = self.options.keep / ("%s-%s.log" % (situation.name, name))
                log.write_bytes((folder / "console-1.log").read_bytes())
        return row

    def make_build(self, folder, name, many, mirror=None):
        build = Build(folder, self.trees[name], objects=self.options.objects * (MANY if many else 1),
                      threads=self.options.threads, mirror=mirror and mirror.server,
                      extra_conf=mirror.conf() if mirror else "")
        if many:
            build.sizes = dict.fromkeys(build.sizes, EQUAL_SIZE)
            build.write()
        return build

    def files(self, many):
        """A folder with all objects, made by a build"""
        if many not in self._files:
            with self.make_build(self.work / ("fill-%d" % many), "stock", many) as build:
                self.progress.step("filling a mirror with %d objects" % len(build.sizes))
                build.make_objects()
                self._files[many] = build.sstate
            self.progress.done()
        return self._files[many]


def restore(build, mirror, files):
    """Build with the mirror; returns an Outcome"""
    running = build.start(["demo-all"])
    started = time.monotonic()
    try:
        result = running.wait(SECONDS, mirror.watch)
        code, seconds = result.returncode, result.seconds
    except BuildTimeout:
        # Its processes have been ended
        code, seconds = None, time.monotonic() - started
    output = running.output()
    restored = len(build.restored())
    return Outcome(restored, mirror.there - restored, len(wrong(build, files, output)), mirror.connections(), seconds,
                   code, _SAID.findall(output) + _NOTES.findall(output), mirror.faults())


def wrong(build, files, output):
    """Names of the recipes whose object or .siginfo had other bytes than the mirror's under its final name"""
    found = set(_CORRUPT.findall(output))
    for path in build.sstate.rglob("sstate:*"):
        recipe = path.name.split(":")[1]
        # What a build makes is the same but for the .siginfo, which tells its settings
        made = path.name.endswith(".siginfo") and list(build.tmp.glob("*/work/%s-*/temp/log.do_populate" % recipe))
        if path.name.endswith((".tar.zst", ".siginfo")) and not made:
            original = files / path.relative_to(build.sstate)
            if not original.is_file() or path.read_bytes() != original.read_bytes():
                found.add(recipe)
    return found


def check(row):
    """What does not hold, a line for each"""
    stock, patched = (row.outcomes[name] for name in TREES)
    problems = []
    if patched.restored < stock.restored:
        problems.append("restored %d, stock %d" % (patched.restored, stock.restored))
    if patched.wrong:
        problems.append("wrong bytes in %d objects" % patched.wrong)
    if patched.exit != 0 and (stock.exit == 0 or patched.exit is None and stock.exit is not None):
        problems.append("exit code %s, stock %s" % (patched.cells()[5], stock.exit))
    if patched.seconds > stock.seconds + BOUND:
        problems.append("%.1f s, stock %.1f s" % (patched.seconds, stock.seconds))
    return ["%s: %s" % (row.situation.name, problem) for problem in problems]


# What the user sees

def table(rows):
    lines = ["%-12s %-8s %6s" % ("", "", "there") + "".join("%9s" % column for column in COLUMNS)]
    for row in rows:
        lines.append("%s: the mirror %s" % (row.situation.name, row.situation.text))
        for name in TREES:
            lines.append("%-12s %-8s %6d" % ("", name, row.there)
                         + "".join("%9s" % cell for cell in row.outcomes[name].cells()))
    return lines


def markdown(rows):
    """One line for each situation, stock / patched"""
    titles = ("The mirror …", "has", "restored", "wrong bytes", "connections", "seconds", "exit code", "messages")
    lines = ["| %s |" % " | ".join(titles), "|---" * len(titles) + "|"]
    for row in rows:
        stock, patched = (row.outcomes[name].cells() for name in TREES)
        pairs = ["%s / %s" % pair for place, pair in enumerate(zip(stock, patched)) if COLUMNS[place] != "lost"]
        lines.append("| %s | %d of %d | %s |" % (row.situation.text, row.there, row.wanted, " | ".join(pairs)))
    return lines


def report(options, rows, left_out):
    return {"options": dict(settings(options), keep=None), "left_out": left_out,
            "situations": [{"name": row.situation.name, "text": row.situation.text, "wanted": row.wanted,
                            "there": row.there, "failures": check(row),
                            **{name: dataclasses.asdict(outcome) for name, outcome in row.outcomes.items()}}
                           for row in rows]}
