# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""The demo: what scripts/demo does, from the arguments to the exit code.

It runs twice: first by the user's Python, to make build/venv, then by that.
It fills a mirror by building once, then restores the same objects with the
stock and with the patched tree, each from nothing, and compares. Numbers
are the server's counters, bitbake's own lines and the files restored.

Exit codes: 0, 1 when the patched tree lost an object or failed, 2 when the
demo cannot run here or was called wrongly.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
from pathlib import Path

from netqueue import ROOT, Problem, environment
from netqueue.demo.table import table
from netqueue.lab import s3server, sshd
from netqueue.lab.build import Build
from netqueue.lab.certificates import make_certificates
from netqueue.lab.mirror import serve
from netqueue.lab.trees import shared_tree
from netqueue.progress import Progress

BUILD = ROOT / "build"
VENV = BUILD / "venv"
PROTOCOLS = ("http", "https", "sftp", "s3")
TARGET = "demo-all"
MAX_OBJECTS = 5000
MAX_THREADS = 256
LOOPBACK_SECONDS = 5
TRUSTME = "trustme==1.2.1"


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise Problem(message)


def parse(arguments):
    parser = _Parser(prog="scripts/demo", description="Restore sstate objects from a mirror on loopback "
                     "with stock and with patched bitbake, and compare.", allow_abbrev=False)
    parser.add_argument("--objects", type=_number("objects", MAX_OBJECTS), default=100, metavar="N",
                        help="how many sstate objects (default: %(default)s)")
    parser.add_argument("--protocol", choices=PROTOCOLS + ("all",), default="http",
                        help="how the mirror is served (default: %(default)s)")
    parser.add_argument("--threads", type=_number("threads", MAX_THREADS), default=8, metavar="T",
                        help="BB_NUMBER_THREADS (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers to FILE, too")
    parser.add_argument("--keep", action="store_true", help="keep the build directories")
    options = parser.parse_args(arguments)
    if options.json and (options.json.is_dir() or not os.access(options.json.absolute().parent, os.W_OK)):
        raise Problem("argument --json: %s cannot be written" % options.json)
    return options


def _number(name, largest):
    def convert(text):
        if text.isdecimal() and 1 <= int(text) <= largest:
            return int(text)
        raise argparse.ArgumentTypeError("%r is no number from 1 to %d" % (text, largest))
    return convert


def main(arguments):
    # A polite kill shall clean up as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        options = parse(arguments)
        protocols = PROTOCOLS if options.protocol == "all" else (options.protocol,)
        if not _in_venv():
            _prepare(protocols)     # does not return
        runs, failed = run(options, _runnable(protocols))
        if options.json:
            options.json.write_text(json.dumps({"runs": runs}, indent=2) + "\n")
    except Problem as problem:
        print("demo: %s" % problem, file=sys.stderr)
        return 2
    except OSError as error:
        print("demo: %s: %s" % (error.filename or "system error", error.strerror or error), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("demo: interrupted", file=sys.stderr)
        return 130
    return 1 if failed else 0


def _in_venv():
    return Path(sys.prefix).resolve() == VENV.resolve()


def _prepare(protocols):
    """Get what is missing, then go on in the venv."""
    _check_loopback()
    if not environment.ensure_program("wget", "wget"):
        raise Problem("stock bitbake downloads with wget, which is not installed: install it")
    if any((ROOT / "patches").rglob("*.patch")) and not environment.ensure_program("git", "git"):
        raise Problem("the patches are applied with git, which is not installed: install it")
    python = environment.ensure_venv(VENV)
    environment.ensure_program("nginx", "nginx")
    if "sftp" in protocols:
        environment.ensure_program("sshd", "openssh-server")
        environment.ensure_program("ssh", "openssh-client")
    if "s3" in protocols:
        failure = environment.install_optional(VENV, environment.S3_REQUIREMENTS)
        if failure:
            print("s3: %s" % failure)
    if {"https", "s3"} & set(protocols) and not environment.ensure_program("openssl", "openssl"):
        environment.pip_install(python, [TRUSTME])
    sys.stdout.flush()
    os.execv(str(python), [str(python), str(ROOT / "scripts" / "demo")] + sys.argv[1:])


def _check_loopback():
    """A container may have no loopback interface, or no right to use one."""
    with socket.socket() as listener, socket.socket() as client:
        try:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            client.settimeout(LOOPBACK_SECONDS)
            client.connect(listener.getsockname())
        except OSError as error:
            raise Problem("a mirror cannot be run on 127.0.0.1: %s" % (error.strerror or error)) from error


def _runnable(protocols):
    """The protocols that a mirror can be had for. Of several, those which cannot are left out, and it is said."""
    runnable = list(protocols)
    for protocol, missing in (("sftp", sshd.missing), ("s3", s3server.missing)):
        lacking = missing() if protocol in protocols else None
        if lacking and len(protocols) == 1:
            raise Problem("%s: %s is not installed" % (protocol, lacking))
        if lacking:
            print("%s is left out: %s is not installed" % (protocol, lacking))
            runnable.remove(protocol)
    return runnable


def run(options, protocols):
    """All runs; prints the table. Returns the rows of the JSON file, and whether the patched tree failed."""
    progress = Progress()
    progress.step("Making a stock and a patched tree of bitbake from the package registry")
    trees = [shared_tree(patched) for patched in (False, True)]
    progress.done()
    _tell_series(trees[1])
    work = Path(tempfile.mkdtemp(prefix="demo-", dir=BUILD))
    rows, details = [], []
    try:
        mirror_files = fill(work, trees[0], options, progress)
        certificates = make_certificates(work / "tls") if {"https", "s3"} & set(protocols) else None
        for protocol in protocols:
            for tree in trees:
                row, detail = restore(work, tree, protocol, mirror_files, certificates, options, progress)
                rows.append(row)
                details.append(detail)
    finally:
        if options.keep:
            print("Kept: %s" % work)
        else:
            shutil.rmtree(work, ignore_errors=True)
    print()
    print(table(rows, details))
    for detail in details:
        if detail["problem"]:
            print(detail["problem"])
    print()
    print("The patched tree is %s: put %s/bin first in PATH to build with it; "
          "scripts/apply TREE patches a checkout." % (trees[1].path, trees[1].path))
    failed = any(row["lost"] or detail["problem"] for row, detail in zip(rows, details)
                 if row["tree"] == "patched")
    return rows, failed


def _tell_series(tree):
    if tree.applied:
        print("Patches applied: %d; for parts that the package does not have: %d"
              % (len(tree.applied), len(tree.not_applicable)))
    else:
        print("There are no patches: both trees are stock")


def fill(work, tree, options, progress):
    """Build every object once. Returns the folder that a mirror serves."""
    with Build(work / "mirror", tree, objects=options.objects, threads=os.cpu_count() or 2) as build:
        progress.step("Filling the mirror: %d objects" % options.objects)
        result = build.run([TARGET], timeout=120 + 3 * options.objects, progress=progress.follow)
        progress.done()
        if result.returncode or len(build.archives()) != options.objects:
            raise Problem("the mirror could not be filled: %s" % _first_error(result))
        files = work / "mirror-files"
        build.sstate.rename(files)
    return files


def _serve(files, protocol, certificates):
    if protocol == "s3":
        return s3server.serve(files, certificates)
    return sshd.serve(files) if protocol == "sftp" else serve(files, protocol, certificates=certificates)


def restore(work, tree, protocol, files, certificates, options, progress):
    """
    One run with nothing in TMPDIR and SSTATE_DIR. Returns its row and what only the table shows. Its files stay until
    all are done: to remove them would slow the next run down (see bench/frame/workfolder.py).
    """
    folder = work / ("%s-%s" % (tree.name, protocol))
    with contextlib.ExitStack() as stack:
        mirror = stack.enter_context(_serve(files, protocol, certificates))
        build = stack.enter_context(Build(folder, tree, objects=options.objects, mirror=mirror,
                                          threads=options.threads))
        progress.step("%s, %s from %s" % (tree.name, protocol, mirror.software))
        result = build.run(["--setscene-only", TARGET], timeout=120 + 10 * options.objects,
                           progress=progress.follow)
        progress.done()
        connections, requests = _counted(mirror)
        calls = len(mirror.aws_calls()) if protocol == "s3" else None
        restored = len(build.restored())
    row = {"tree": tree.name, "protocol": protocol, "objects": options.objects, "restored": restored,
           "lost": options.objects - restored, "connections": connections,
           "requests": requests, "presence_seconds": round(result.presence.seconds, 3),
           "seconds": round(result.seconds, 3)}
    detail = {"software": mirror.software, "presence_cpu_seconds": round(result.presence.cpu_seconds, 3),
              "aws": calls,
              # Stock bitbake takes each object to be on a sftp mirror
              "asked": protocol != "sftp" or tree.name == "patched", "problem": ""}
    if result.returncode:
        detail["problem"] = ("%s, %s: bitbake ended with %d: %s"
                             % (tree.name, protocol, result.returncode, _first_error(result)))
    return row, detail


def _counted(mirror):
    """Connections, over sftp the sessions that were logged in, and requests, None if the server does not log them."""
    counters = mirror.counters()
    if isinstance(mirror, sshd.Sshd):
        return counters.sessions, counters.requests if mirror.counts_requests else None
    return counters.connections, counters.requests


def _first_error(result):
    for line in result.output.splitlines():
        if line.startswith(("ERROR", "FATAL", "Traceback")):
            return line
    lines = result.output.strip().splitlines()
    return lines[-1] if lines else "no output"
