# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""How fast the shared connections are, and what they leave to others: `scripts/bench pace`.

The connections are a thread of the bitbake server, whose main thread is often
busy with the runqueue. Measured are, over nginx on loopback,

    head        HEADs of small files a second
    get         GETs of small files into descriptors
    large       GETs of large files
    compute     what a thread that only computes does in a second, with nothing else

and of the first two, marked with "busy", the same beside a thread that only
computes, with the share of its pace that this thread keeps. With --against the
connections of another tree take turns with those of the patched one: also of
the series up to November 2026, where each connection was a thread.

Medians of the turns count, and medians of the ratios of each turn, with the
interval of the sign test.
"""

import contextlib
import os
import sys
from pathlib import Path

from netqueue import Problem
from netqueue.bench.frame.comparison import medians, ratio, take_turns
from netqueue.bench.frame.options import add_json, add_number, add_only, add_work, settings, write_json
from netqueue.bench.frame.process import Process
from netqueue.bench.frame.trees import patched_tree
from netqueue.bench.frame.workfolder import work_folder
from netqueue.lab.certificates import make_certificates, trust
from netqueue.lab.mirror import serve
from netqueue.progress import Progress

PROCESS = "netqueue.bench.processes.throughput"
MODES = ("head", "get", "large", "compute busy", "head busy", "get busy")
MIB = 1024 * 1024


def add_options(parser):
    parser.add_argument("--protocol", choices=("http", "https"), default="http", metavar="P",
                        help="http or https (default: %(default)s)")
    parser.add_argument("--against", metavar="TREE", help="another bitbake tree with shared connections")
    add_only(parser, "--mode", MODES)
    add_number(parser, "--turns", 7, "turns of each; one more before is not counted")
    add_number(parser, "--connections", 4, "BB_CONNECTION_CACHE_MAX")
    add_number(parser, "--files", 4000, "small files")
    add_number(parser, "--size", 4096, "bytes of the smallest file, each other has one more")
    add_number(parser, "--large-files", 8, "large files")
    add_number(parser, "--large-size", 40, "MiB of a large file")
    add_json(parser)
    add_work(parser)


def run(options):
    libs = {"patched": patched_tree().path / "lib"}
    if options.against:
        libs["other"] = Path(options.against).absolute() / "lib"
        if not (libs["other"] / "bb" / "connections").is_dir():
            raise Problem("--against %s: no shared connections in there" % options.against)
    with work_folder("pace-", options.work) as work:
        runs = measure(options, libs, work)
    report = summarise(options, runs)
    print(table(options, report))
    write_json(options, report)
    return 0


def measure(options, libs, work):
    """{(mode, name of the tree): [what processes/throughput.py says of each turn]}"""
    modes = [mode for mode in MODES if mode in (options.mode or MODES)]
    # As in reality they differ: what looks alike is not in flight together on an HTTP connection
    sizes = {"small": [options.size + number for number in range(options.files)],
             "large": [options.large_size * MIB] * options.large_files}
    root = make_files(work / "files", sizes)
    folder = work / "fetched"
    folder.mkdir()
    progress = Progress(sys.stderr)
    runs = {}
    with contextlib.ExitStack() as stack:
        certificates = make_certificates(work / "tls") if options.protocol == "https" else None
        mirror = stack.enter_context(serve(root, options.protocol, server="nginx", certificates=certificates))
        variables = trust(mirror.ca_file, work) if mirror.ca_file else {}
        arguments = dict(sizes, url=mirror.url, connections=options.connections, folder=str(folder))
        processes = {name: stack.enter_context(Process(PROCESS, dict(arguments, lib=str(lib)), name, variables))
                     for name, lib in libs.items()}
        for process in processes.values():
            process.answer()
        for mode in modes:
            progress.step("%s, %s" % (options.protocol, mode))
            turns = take_turns(list(libs), options.turns, lambda name: processes[name].ask(mode))
            runs.update({(mode, name): results for name, results in turns.items()})
            progress.done()
    return runs


def make_files(folder, sizes):
    for kind, all_sizes in sizes.items():
        (folder / kind).mkdir(parents=True)
        for number, size in enumerate(all_sizes):
            (folder / kind / str(number)).write_bytes(os.urandom(size))
    return folder


def summarise(options, runs):
    report = {"options": settings(options), "modes": {}, "ratios": {}}
    for (mode, name), results in runs.items():
        values = medians(results)
        if mode != "compute busy" and mode.endswith("busy") and ("compute busy", name) in runs:
            alone = [result["steps_per_second"] for result in runs["compute busy", name]]
            values["pace_kept"] = ratio([result["steps_per_second"] for result in results], alone).median
        report["modes"]["%s, %s" % (mode, name)] = dict(values, runs=results)
        if name == "patched" and (mode, "other") in runs and mode != "compute busy":
            patched, other = ([result["per_second"] for result in runs[mode, one]] for one in ("patched", "other"))
            report["ratios"][mode] = ratio(patched, other)
    return report


def table(options, report):
    lines = ["", "%s, %d connections, %d files of %d bytes, %d of %d MiB; medians of %d turns" %
             (options.protocol, options.connections, options.files, options.size, options.large_files,
              options.large_size, options.turns),
             "%-24s %12s %14s %12s" % ("", "files/s", "CPU ms a file", "pace kept")]
    for title, values in report["modes"].items():
        if not title.startswith("compute"):
            kept = "%12.2f" % values["pace_kept"] if "pace_kept" in values else ""
            lines.append("%-24s %12.1f %14.4f %12s" % (title, values["per_second"], values["cpu_ms"], kept))
    for mode, one in report["ratios"].items():
        lines.append("%-24s %12.2f   (%s)" % (mode + ": patched / other", one.median, one.interval_text(2)))
    return "\n".join(lines)
