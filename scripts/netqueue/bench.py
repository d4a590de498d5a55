# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""The benchmarks of scripts/bench: their arguments, and that of the dispatch.

Each measurement is a process of its own with the lib folder of one tree, since
bb cannot be imported twice. The variants take turns, so that a machine that
becomes slower does so for all. presencebench.py and buildbench.py have the
other benchmarks.

Of the dispatch (dispatch.py) the smallest time of each variant counts.
"""

import json
import subprocess
import sys
from pathlib import Path

from netqueue import Problem, buildbench, presencebench
from netqueue.command import Parser
from netqueue.presencebench import positive
from netqueue.trees import checkout, shared_tree

DISPATCH = Path(__file__).with_name("dispatch.py")
SECONDS = 1800
# Name, whether of the patched tree, BB_NUMBER_NETWORK_THREADS
VARIANTS = [("stock", False, ""), ("patched, limit unset", True, ""), ("patched, limit 4", True, "4")]


def main(arguments):
    parser = Parser("bench", "Stock bitbake beside patched bitbake in one run.")
    measures = parser.add_subparsers(dest="measure", required=True, metavar="measure", parser_class=_subparser)
    dispatch = measures.add_parser("dispatch", help="CPU seconds in which the runqueue starts tasks",
                                   description="CPU seconds in which the runqueue starts tasks.")
    add_options(dispatch)
    dispatch.set_defaults(run=run_dispatch)
    presence = measures.add_parser("presence", help="what it costs to ask which objects a mirror has",
                                   description=presencebench.__doc__)
    presencebench.add_options(presence)
    presence.set_defaults(run=presencebench.run)
    build = measures.add_parser("build", help="how long it takes to restore all objects of a build",
                                description=buildbench.__doc__)
    buildbench.add_options(build)
    build.set_defaults(run=buildbench.run)
    options = parser.parse_args(arguments)
    return options.run(options)


def _subparser(prog, description, **options):
    return Parser(prog.rpartition("/")[2], description, **options)


def add_options(parser):
    parser.add_argument("--tasks", type=positive, default=20000, metavar="N",
                        help="tasks that can all be started at the beginning (default: %(default)s)")
    parser.add_argument("--starts", type=positive, default=1000, metavar="N",
                        help="how many of them are started (default: %(default)s)")
    parser.add_argument("--setscene", action="store_true", help="setscene tasks instead of normal ones")
    parser.add_argument("--share", type=float, default=0.5, metavar="X",
                        help="share of the tasks that need the network, 0 to 1 (default: %(default)s)")
    parser.add_argument("--threads", type=positive, default=8, metavar="N",
                        help="BB_NUMBER_THREADS (default: %(default)s)")
    parser.add_argument("--repeat", type=positive, default=3, metavar="N",
                        help="runs of each variant (default: %(default)s)")
    parser.add_argument("--stock", metavar="TREE", help="a checkout to use as stock bitbake")
    parser.add_argument("--patched", metavar="TREE", help="a checkout to use as patched bitbake")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers to FILE, too")


def run_dispatch(options):
    if not 0 <= options.share <= 1 or options.starts > options.tasks:
        raise Problem("--share is from 0 to 1, and --starts not more than --tasks")
    trees = {False: checkout(options.stock) if options.stock else shared_tree(patched=False),
             True: checkout(options.patched) if options.patched else shared_tree(patched=True)}
    runs = {name: [] for name, _, _ in VARIANTS}
    for _ in range(options.repeat):
        for name, patched, limit in VARIANTS:
            runs[name].append(_dispatch_once(trees[patched], limit, options))
    base = min(run["seconds"] for run in runs["stock"])
    report = {"tasks": options.tasks, "starts": options.starts, "setscene": options.setscene, "share": options.share,
              "threads": options.threads, "variants": {}}
    for name, results in runs.items():
        seconds = min(run["seconds"] for run in results)
        report["variants"][name] = {
            "seconds": seconds, "all_seconds": [run["seconds"] for run in results],
            "ratio": round(seconds / base, 3), "calls": results[0]["calls"], "peak": results[0]["peak"]}
        print("%-22s %8.3f s  %6.3f of stock, at most %d network tasks at a time"
              % (name, seconds, seconds / base, results[0]["peak"]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def _dispatch_once(tree, limit, options):
    arguments = {"lib": str(tree.path / "lib"), "limit": limit, "tasks": options.tasks, "starts": options.starts,
                 "setscene": options.setscene, "share": options.share, "threads": options.threads}
    done = subprocess.run([sys.executable, str(DISPATCH), json.dumps(arguments)], stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=SECONDS)
    if done.returncode:
        raise Problem("%s: %s" % (tree.path, (done.stderr.strip().splitlines() or ["it said nothing"])[-1]))
    return json.loads(done.stdout.splitlines()[-1])
