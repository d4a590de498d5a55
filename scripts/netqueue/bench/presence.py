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
import dataclasses
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import urllib.parse
from pathlib import Path

from netqueue import ROOT, Problem, environment
from netqueue.bench.frame.workfolder import add_json, add_work, settings, work_folder, write_json
from netqueue.bench.processes import presence as query
from netqueue.lab.build import Build, BuildMirror
from netqueue.lab.certificates import make_certificates, trust
from netqueue.lab.delay import delayed
from netqueue.lab.mirror import serve
from netqueue.lab.trees import checkout, shared_tree
from netqueue.progress import Progress

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


def positive(text):
    if not (text.isdigit() and int(text) > 0):
        raise Problem("%s is not a number from 1" % text)
    return int(text)


def add_options(parser):
    parser.add_argument("--protocol", choices=PROTOCOLS, action="append", metavar="P",
                        help="http, https or sftp; may be given more than once (default: all of them)")
    parser.add_argument("--objects", type=positive, default=2000, metavar="N",
                        help="objects that patched bitbake asks for, on one connection four times as many "
                             "(default: %(default)s)")
    parser.add_argument("--stock-objects", type=positive, default=40, metavar="N",
                        help="objects that stock bitbake asks for, on one connection a quarter (default: %(default)s)")
    parser.add_argument("--many", type=positive, default=100000, metavar="N",
                        help="objects whose memory is measured, against a tenth of them (default: %(default)s)")
    parser.add_argument("--build-objects", type=positive, default=40, metavar="N",
                        help="objects of the real builds (default: %(default)s)")
    parser.add_argument("--connections", type=positive, default=4, metavar="N",
                        help="connections of patched and threads of stock bitbake (default: %(default)s)")
    parser.add_argument("--delay", type=positive, default=20, metavar="MS",
                        help="round trip time in milliseconds (default: %(default)s)")
    parser.add_argument("--repeat", type=positive, default=3, metavar="N",
                        help="queries of each kind; the median counts (default: %(default)s)")
    parser.add_argument("--part", choices=PARTS, action="append", metavar="P",
                        help="only this: %s; may be given more than once" % ", ".join(PARTS))
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


def enter_venv():
    """Start the command anew with what the demo's layer needs, if it is not there."""
    if not importlib.util.find_spec("zstandard"):
        python = str(environment.ensure_venv(ROOT / "build" / "venv"))
        sys.stdout.flush()
        os.execv(python, [python] + sys.argv)


def patched_tree():
    """NETQUEUE_PATCHED_LIB names the lib folder of another one, for development, as for the tests."""
    lib = os.environ.get("NETQUEUE_PATCHED_LIB")
    return checkout(Path(lib).parent) if lib else shared_tree(patched=True)


# Mirrors

@dataclasses.dataclass
class Mirror:
    """A mirror of mirror.py or sshd.py, and what differs between the two."""
    served: object
    variables: dict     # of the environment of who asks
    logs: str           # files with a line for each request

    def url_behind(self, port):
        """Its URL at another port of this machine."""
        parts = urllib.parse.urlsplit(self.served.url)
        return urllib.parse.urlunsplit(parts._replace(netloc="%s:%d" % (parts.hostname, port)))


class SSHMirror(Mirror):
    def url_behind(self, port):
        # ssh knows the key by the port
        hosts = self.served.work / "known_hosts"
        line = hosts.read_text().splitlines()[0]
        with open(hosts, "a") as output:
            output.write("[127.0.0.1]:%d %s\n" % (port, line.partition(" ")[2]))
        return super().url_behind(port)


@contextlib.contextmanager
def open_mirror(protocol, folder, home, certificates, log=False, keepalive=1000):
    """Serve folder; yields a Mirror. home is the HOME of who asks.

    log: whether requests are counted. keepalive: requests until a connection is ended, nginx's default.
    """
    home.mkdir(parents=True, exist_ok=True)
    if protocol == "sftp":
        from netqueue.lab import sshd
        with sshd.serve(folder, log=log) as served:
            path = "%s:%s" % (served.tools, os.environ.get("PATH", os.defpath))
            yield SSHMirror(served, {"HOME": str(home), "PATH": path}, "%s/sessions/*" % served.work)
        return
    with serve(folder, protocol, server="nginx", server_extra="log_not_found off;", certificates=certificates,
               keepalive_requests=keepalive) as served:
        variables = {"HOME": str(home)}
        if served.ca_file:
            variables.update(trust(served.ca_file, home))
        yield Mirror(served, variables, "%s/access.log" % served.work)


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
            row.update({name: statistics.median(run[name] for run in row["runs"]) for name in row["runs"][0]})
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
        """Run processes/presence.py once"""
        arguments = {"lib": str(self.trees[row["tree"]].path / "lib"), "patched": row["tree"] == "patched", "url": url,
                     "objects": row["objects"], "files": self.files, "connections": row["connections_allowed"],
                     "variables": mirror.variables}
        mirror.served.reset()
        try:
            done = subprocess.run([sys.executable, query.__file__, json.dumps(arguments)], stdin=subprocess.DEVNULL,
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=SECONDS,
                                  env=dict(os.environ, **mirror.variables))
        except subprocess.TimeoutExpired as error:
            raise Problem("%(protocol)s, %(part)s, %(tree)s: no end within " % row + "%d s" % SECONDS) from error
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["it said nothing"]
            raise Problem("%(protocol)s, %(part)s, %(tree)s: " % row + lines[-1])
        return dict(json.loads(done.stdout.splitlines()[-1]), connections=mirror.served.counters().connections)

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
        variables = dict(mirror.variables)
        if "PATH" in variables:
            variables["PATH"] = "%s:%s" % (mirror.served.tools, build.environment["PATH"])
        build.environment.update(variables)
        return build

    def fill(self):
        """Make the objects of the builds, and remove each second."""
        self.progress.step("filling a mirror with %d objects" % self.options.build_objects)
        with Build(self.work / "fill", self.trees["stock"], objects=self.options.build_objects, levels=1,
                   threads=BUILD_THREADS) as build:
            result = build.run(["demo-all"], timeout=SECONDS)
            archives = build.archives()
            if result.returncode or len(archives) != self.options.build_objects:
                raise Problem("the mirror could not be filled: bitbake ended with %d" % result.returncode)
            absent = archives[1::2]
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
    """Each second of the objects that processes/presence.py asks for."""
    for number in range(0, count, 2):
        path = folder / query.object_name(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * query.object_size(number))
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
