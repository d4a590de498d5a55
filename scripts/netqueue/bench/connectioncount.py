# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""Over how many connections a mirror is asked, and what that is worth: `scripts/bench lanes`.

Each case is a mirror on loopback:

    healthy             nginx
    20 ms, 200 ms       the same, at a round trip of so much
    own 50 ms, 500 ms   a server that needs so long for each answer, on each connection one after the other
    limit_rate          nginx, with a limit of bytes a second for each connection (files of 256 KiB)

It is asked as a query does, or for limit_rate as tasks do, over four connections,
over four or more as the product decides, and over sixteen. Seconds, the largest
number of connections that there were, and the share of the seconds that four take.
"""

import contextlib
import sys

from netqueue.bench.frame.comparison import medians, take_turns
from netqueue.bench.frame.options import add_json, add_only, add_repeat, add_work, settings, write_json
from netqueue.bench.frame.process import Process
from netqueue.bench.frame.trees import patched_tree
from netqueue.bench.frame.workfolder import work_folder
from netqueue.lab.delay import delayed
from netqueue.lab.mirror import serve
from netqueue.progress import Progress

PROCESS = "netqueue.bench.processes.connectioncount"
SLOW_SERVER = "netqueue.bench.processes.slowserver"
# Name, round trip and the server's own time in seconds, bytes a second of a connection, files, bytes of a file
CASES = [("healthy", 0, 0, 0, 3000, 4096), ("20 ms", 0.02, 0, 0, 3000, 4096), ("200 ms", 0.2, 0, 0, 3000, 4096),
         ("own 50 ms", 0, 0.05, 0, 400, 4096), ("own 500 ms", 0, 0.5, 0, 200, 4096),
         ("limit_rate", 0, 0, 128 * 1024, 48, 256 * 1024)]
# Title: connections to begin with, and at most
VARIANTS = {"4": (4, 4), "4 and more": (4, 16), "16": (16, 16)}


def add_options(parser):
    add_only(parser, "--case", [case[0] for case in CASES])
    add_repeat(parser, 3, "runs of each variant; the median counts")
    add_json(parser)
    add_work(parser)


def run(options):
    lib = patched_tree().path / "lib"
    report = {"options": settings(options), "cases": {}}
    print("%-12s %-12s %9s %12s %6s" % ("", "connections", "seconds", "at most", "share"))
    with work_folder("lanes-", options.work) as work:
        for case in CASES:
            if not options.case or case[0] in options.case:
                report["cases"][case[0]] = measure(case, lib, work / case[0].replace(" ", "-"), options.repeat)
    write_json(options, report)
    return 0


def measure(case, lib, work, repeat):
    name, delay, own, rate, files, size = case
    (work / "files").mkdir(parents=True)
    for number in range(files):
        (work / "files" / str(number)).write_bytes(bytes(size - number % 1000))
    progress = Progress(sys.stderr)
    progress.step(name)
    with contextlib.ExitStack() as stack:
        if own:
            server = Process(SLOW_SERVER, {"folder": str(work / "files"), "seconds": own}, "server")
            port = stack.enter_context(server).answer()
        else:
            extra = "limit_rate %d;" % rate if rate else ""
            port = stack.enter_context(serve(work / "files", server="nginx", server_extra=extra)).port
        if delay:
            port = stack.enter_context(delayed(port, seconds=delay)).port

        def ask(title):
            connections, most = VARIANTS[title]
            arguments = {"lib": str(lib), "url": "http://127.0.0.1:%d" % port, "files": files, "connections": connections,
                         "most": most, "folder": str(work) if rate else None}
            with Process(PROCESS, arguments, title) as process:
                return process.answer()

        runs = take_turns(list(VARIANTS), repeat, ask, warm_up=False)
    progress.done()
    result = {}
    for title, results in runs.items():
        seconds = medians(results)["seconds"]
        result[title] = {"seconds": seconds, "connections": max(one["connections"] for one in results), "runs": results}
        print("%-12s %-12s %9.2f %12d %6.2f" % (name, title, seconds, result[title]["connections"],
                                                seconds / result["4"]["seconds"]), flush=True)
    return result
