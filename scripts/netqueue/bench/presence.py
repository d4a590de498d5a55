# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""What it costs to ask which objects a mirror has: `scripts/bench presence`.

Half of the objects exist. For each protocol, stock beside patched unless
said otherwise:

    direct      real servers without a delay
    delayed     the same behind delay.py
    single      behind delay.py on one connection, which the server never ends: how near to depth / round trip
    many        patched only, and one protocol: time and memory for many objects against a tenth of them
    build       a real build of which half has to be made: what is asked for in vain after the query

The first four are processes of their own (processes/presence.py), which take turns; the
median counts. Stock gets fewer objects, since it takes long; what is
compared is per object. Stock bitbake cannot ask a sftp mirror at all.
"""

import contextlib
import sys
import tempfile

from netqueue import Problem
from netqueue.bench.frame.comparison import medians
from netqueue.bench.frame.mirrors import open_mirror
from netqueue.bench.frame.options import (add_json, add_number, add_only, add_repeat, add_work, settings,
                                          write_json)
from netqueue.bench.frame.process import Process
from netqueue.bench.frame.trees import enter_venv, patched_tree
from netqueue.bench.frame.workfolder import work_folder
from netqueue.bench.processes.presence import object_name, object_size
from netqueue.lab.build import Build, BuildMirror
from netqueue.lab.certificates import make_certificates
from netqueue.lab.delay import delayed
from netqueue.lab.trees import shared_tree
from netqueue.progress import Progress

PROCESS = "netqueue.bench.processes.presence"
# Requests in flight on a connection at most
DEPTH = 64
SECONDS = 900
PROTOCOLS = ("http", "https", "sftp")
TREES = ("stock", "patched")
PARTS = ("direct", "delayed", "single", "many", "build")
BUILD_THREADS = 4
NEVER = 10 ** 9

# Inherited by the real builds: keeps what the mirror has logged until the end of the first query.
MARK = """
BB_HASHCHECK_FUNCTION = "bench_checkhashes"

def bench_checkhashes(sq_data, d, **kwargs):
    import glob, time
    found = sstate_checkhashes(sq_data, d, **kwargs)
    copy = d.getVar("BENCH_COPY")
    if not os.path.exists(copy):
        # The servers write their log behind the answer
        time.sleep(0.3)
        with open(copy, "wb") as output:
            for path in glob.glob(d.getVar("BENCH_LOGS")):
                with open(path, "rb") as log:
                    output.write(log.read())
    return found
"""


def add_options(parser):
    parser.add_argument("--protocol", choices=PROTOCOLS, action="append", metavar="P",
                        help="http, https or sftp; may be given more than once (default: all of them)")
    add_number(parser, "--objects", 2000, "objects that patched bitbake asks for, on one connection four times as many")
    add_number(parser, "--stock-objects", 40, "objects that stock bitbake asks for, on one connection a quarter")
    add_number(parser, "--many", 100000, "objects whose memory is measured, against a tenth of them")
    add_number(parser, "--build-objects", 40, "objects of the real builds")
    add_number(parser, "--connections", 4, "connections of patched and threads of stock bitbake")
    add_number(parser, "--delay", 20, "round trip time in milliseconds", metavar="MS")
    add_repeat(parser, 3, "queries of each kind; the median counts")
    add_only(parser, "--part", PARTS)
    add_json(parser)
    add_work(parser)


def run(options):
    protocols = [name for name in PROTOCOLS if name in (options.protocol or PROTOCOLS)]
    parts = options.part or PARTS
    if "build" in parts:
        enter_venv()
    trees = {"stock": shared_tree(patched=False), "patched": patched_tree()}
    rows, builds, problems = [], [], []
    with work_folder("presence-", options.work) as work:
        bench = Bench(options, trees, work, Progress(sys.stderr))
        for protocol in protocols:
            # The memory is not the protocol's
            without = ("build",) if protocol == protocols[0] else ("build", "many")
            try:
                rows += bench.queries(protocol, [part for part in parts if part not in without])
                if "build" in parts:
                    builds += [bench.build(protocol, name) for name in TREES]
            except Problem as problem:
                # What was measured before took minutes
                problems.append(problem)
    print(table(options, rows, builds))
    write_json(options, {"options": settings(options), "queries": rows, "builds": builds})
    if problems:
        raise Problem("; ".join(map(str, problems)))
    return 0


class Bench:
    """The measurements of a run. work: a folder that is removed afterwards."""

    def __init__(self, options, trees, work, progress):
        self.options = options
        self.trees = trees
        self.work = work
        self.progress = progress
        self.files = max(options.objects, options.stock_objects)
        self.certificates = make_certificates(work / "tls")
        self.folder = None
        self.built = None
        self.absent = ()

    # Queries

    def queries(self, protocol, parts):
        """The rows of a protocol."""
        if not parts:
            return []
        if self.folder is None:
            self.folder = make_files(self.work / "objects", self.files)
        seconds = self.options.delay / 1000
        rows = [row for part in parts for row in self.rows_of(part, protocol)]
        with contextlib.ExitStack() as stack:
            def mirror(**options):
                served = stack.enter_context(open_mirror(protocol, self.folder, self.work / "home" / protocol,
                                                         self.certificates, **options))
                return served, stack.enter_context(delayed(served.served.port, seconds))

            usual, link = mirror()
            patient, patient_link = mirror(keepalive=NEVER)
            places = {"direct": (usual, usual.served.url), "many": (usual, usual.served.url),
                      "delayed": (usual, usual.url_behind(link.port)),
                      "single": (patient, patient.url_behind(patient_link.port))}
            for turn in range(self.options.repeat):
                for row in rows:
                    if turn == 0 or row["part"] != "many":
                        self.progress.step("%(protocol)s, %(part)s, %(tree)s, %(objects)d objects" % row)
                        row["runs"].append(self.ask(row, *places[row["part"]]))
                        self.progress.done()
        for row in rows:
            row.update(medians(row["runs"]))
            row["objects_per_second"] = row["objects"] / row["seconds"]
            if row["part"] == "single":
                row["share"] = row["objects_per_second"] * seconds / DEPTH
                # Of which the time to connect, and to log in, is no part
                row["pace"] = row["objects"] / (row["seconds"] - row["first_seconds"]) * seconds / DEPTH
        return rows

    def rows_of(self, part, protocol):
        options = self.options
        if part == "many":
            cells = [("patched", max(1, options.many // 10)), ("patched", options.many)]
        else:
            stock = options.stock_objects if part != "single" else max(1, options.stock_objects // 4)
            # The login counts less then: the pace is what is looked for
            patched = options.objects if part != "single" else 4 * options.objects
            cells = [("stock", min(options.objects, stock)), ("patched", patched)]
            if protocol == "sftp":
                del cells[0]
        connections = 1 if part == "single" else options.connections
        return [{"protocol": protocol, "part": part, "tree": tree, "objects": count, "connections_allowed": connections,
                 "runs": []} for tree, count in cells]

    def ask(self, row, mirror, url):
        """One query, by a process"""
        folder = tempfile.mkdtemp(prefix="query-", dir=self.work)
        arguments = {"lib": str(self.trees[row["tree"]].path / "lib"), "patched": row["tree"] == "patched", "url": url,
                     "objects": row["objects"], "files": self.files, "connections": row["connections_allowed"],
                     "variables": mirror.variables, "folder": folder}
        mirror.served.reset()
        with Process(PROCESS, arguments, "%(protocol)s, %(part)s, %(tree)s" % row, mirror.variables) as process:
            done = process.answer()
        return dict(done, connections=mirror.served.counters().connections)

    # Builds

    def build(self, protocol, name):
        """Build what the mirror has half of. Returns a row."""
        if self.built is None:
            self.fill()
        folder = self.work / ("build-%s-%s" % (name, protocol))
        with contextlib.ExitStack() as stack:
            mirror = stack.enter_context(open_mirror(protocol, self.built, folder / "home", self.certificates, log=True))
            build = stack.enter_context(self.make_build(folder, name, mirror))
            self.progress.step("%s, build, %s, %d objects" % (protocol, name, self.options.build_objects))
            result = build.run(["demo-all"], timeout=SECONDS)
            self.progress.done()
            before = self.count_absent([folder / "copy"])
            after = self.count_absent(mirror.served.work.glob(mirror.logs[len(str(mirror.served.work)) + 1:]))
        if result.returncode and protocol != "sftp":
            raise Problem("%s, build, %s: bitbake ended with %d" % (protocol, name, result.returncode))
        return {"protocol": protocol, "tree": name, "objects": self.options.build_objects, "absent": len(self.absent),
                "asked_by_query": before, "asked_after_query": after - before, "returncode": result.returncode,
                "presence_seconds": result.presence.seconds, "seconds": result.seconds}

    def make_build(self, folder, name, mirror):
        extra = ('INHERIT += "bench-mark"\nBENCH_LOGS = "%s"\nBENCH_COPY = "%s"\n'
                 'BB_HASHCONFIG_IGNORE_VARS:append = " BENCH_LOGS BENCH_COPY"' % (mirror.logs, folder / "copy"))
        build = Build(folder, self.trees[name], objects=self.options.build_objects, levels=1, threads=BUILD_THREADS,
                      mirror=BuildMirror(mirror.served.url), extra_conf=extra)
        (build.layer / "classes" / "bench-mark.bbclass").write_text(MARK)
        mirror.equip(build)
        return build

    def fill(self):
        """Make the objects of the builds, and remove each second."""
        self.progress.step("filling a mirror with %d objects" % self.options.build_objects)
        with Build(self.work / "fill", self.trees["stock"], objects=self.options.build_objects, levels=1,
                   threads=BUILD_THREADS) as build:
            build.make_objects()
            absent = build.archives()[1::2]
            # The recipe's name: it is the same with percent signs in the path, and unlike the hash no other's
            self.absent = [archive.name.split(":")[1].encode() for archive in absent]
            for archive in absent:
                archive.unlink()
                archive.with_name(archive.name + ".siginfo").unlink()
            self.built = self.work / "built"
            build.sstate.rename(self.built)
        self.progress.done()

    def count_absent(self, logs):
        """Lines about an object that is absent, its .siginfo included"""
        lines = [line for log in logs for line in log.read_bytes().splitlines()]
        return sum(any(recipe in line for recipe in self.absent) for line in lines)


def make_files(folder, count):
    """Each second of the objects that are asked for"""
    for number in range(0, count, 2):
        path = folder / object_name(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * object_size(number))
    return folder


# What the user sees

def table(options, rows, builds):
    lines = []
    titles = {"direct": "no delay", "delayed": "%d ms round trip" % options.delay,
              "single": "%d ms, one connection" % options.delay, "many": "no delay, many objects"}
    if rows:
        lines += ["Presence queries, half of the objects exist; medians of %d, of many objects one" % options.repeat,
                  "%-6s %-22s %-8s %8s %8s %10s %10s %10s %10s %6s" %
                  ("", "", "", "objects", "seconds", "ms/object", "CPU ms/obj", "(mapping)", "objects/s", "conns")]
    for row in rows:
        text = "%-6s %-22s %-8s %8d %8.2f %10.3f %10.3f %10.3f %10.1f %6d" % (
            row["protocol"], titles[row["part"]], row["tree"], row["objects"], row["seconds"],
            1000 / row["objects_per_second"], 1000 * row["cpu_seconds"] / row["objects"], row["mapping_ms"],
            row["objects_per_second"], row["connections"])
        if row["children_cpu_seconds"]:
            text += "  + %.3f CPU ms in ssh" % (1000 * row["children_cpu_seconds"] / row["objects"])
        if "share" in row and row["tree"] == "patched":
            text += "  %.2f of depth %d / round trip, %.2f from the first answer on" % (
                row["share"], DEPTH, row["pace"])
        if row["part"] == "many":
            text += "  memory +%.1f MiB, at most +%.1f" % (row["kept_kib"] / 1024, row["peak_kib"] / 1024)
        lines.append(text)
    if builds:
        lines += ["", "Builds of %d objects of which %d are absent: requests for absent ones" %
                  (builds[0]["objects"], builds[0]["absent"]),
                  "%-6s %-8s %12s %12s %14s %9s" % ("", "", "by the query", "after it", "query seconds", "exit code")]
    for row in builds:
        lines.append("%-6s %-8s %12d %12d %14.2f %9d" % (row["protocol"], row["tree"], row["asked_by_query"],
                                                         row["asked_after_query"], row["presence_seconds"],
                                                         row["returncode"]))
    return "\n".join(lines)
