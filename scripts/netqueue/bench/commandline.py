# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""The benchmarks of scripts/bench: their arguments, and that of the dispatch.

throughput.py, connectioncount.py, presence.py, build.py, install.py,
overhead.py, faults.py, fuzz.py and kills.py have the other
benchmarks. Of the dispatch (processes/dispatch.py) each variant is a process with the lib
folder of one tree (frame/comparison.py); they take turns of a few tasks each.
"""

import contextlib

from netqueue import Problem
from netqueue.bench import build as buildbench
from netqueue.bench import connectioncount as lanesbench
from netqueue.bench import faults as faultsbench
from netqueue.bench import fuzz as fuzzbench
from netqueue.bench import install as installbench
from netqueue.bench import kills as killbench
from netqueue.bench import overhead as overheadbench
from netqueue.bench import presence as presencebench
from netqueue.bench import throughput as pacebench
from netqueue.bench.frame.comparison import Process, ratio
from netqueue.bench.frame.workfolder import add_json, write_json
from netqueue.bench.presence import positive
from netqueue.command import Parser
from netqueue.lab.trees import checkout, shared_tree

PROCESS = "netqueue.bench.processes.dispatch"
# The measurements that have a module of their own
OTHERS = [("pace", pacebench, "tasks and transfers a second, of each alone and beside the other"),
          ("lanes", lanesbench, "over how many connections a mirror is asked"),
          ("presence", presencebench, "what it costs to ask which objects a mirror has"),
          ("build", buildbench, "how long it takes to restore all objects of a build"),
          ("install", installbench, "what it costs to install objects that are all local"),
          ("overhead", overheadbench, "what a build costs that the series has nothing to gain for"),
          ("faults", faultsbench, "what is restored from mirrors in a bad mood"),
          ("fuzz", fuzzbench, "mutated input for the parsers of the shared connections"),
          ("kills", killbench, "what is left of builds that are killed while they restore")]
# Name, whether of the patched tree, BB_NUMBER_NETWORK_THREADS
VARIANTS = [("stock", False, ""), ("patched, limit unset", True, ""), ("patched, limit 4", True, "4")]


def main(arguments):
    parser = Parser("bench", "Stock bitbake beside patched bitbake in one run.")
    measures = parser.add_subparsers(dest="measure", required=True, metavar="measure", parser_class=_subparser)
    dispatch = measures.add_parser("dispatch", help="CPU seconds in which the runqueue starts tasks",
                                   description="CPU seconds in which the runqueue starts tasks.")
    add_options(dispatch)
    dispatch.set_defaults(run=run_dispatch)
    for name, module, text in OTHERS:
        measure = measures.add_parser(name, help=text, description=module.__doc__)
        module.add_options(measure)
        measure.set_defaults(run=module.run)
    options = parser.parse_args(arguments)
    return options.run(options)


def _subparser(prog, description, **options):
    return Parser(prog.rpartition("/")[2], description, **options)


def add_options(parser):
    parser.add_argument("--tasks", type=positive, default=20000, metavar="N",
                        help="tasks that can all be started at the beginning (default: %(default)s)")
    parser.add_argument("--starts", type=positive, default=500, metavar="N",
                        help="how many of them are started by each variant (default: %(default)s)")
    parser.add_argument("--setscene", action="store_true", help="setscene tasks instead of normal ones")
    parser.add_argument("--share", type=float, default=0.5, metavar="X",
                        help="share of the tasks that need the network, 0 to 1 (default: %(default)s)")
    parser.add_argument("--threads", type=positive, default=8, metavar="N",
                        help="BB_NUMBER_THREADS (default: %(default)s)")
    parser.add_argument("--turn", type=positive, default=25, metavar="N",
                        help="how many a variant starts in its turn (default: %(default)s)")
    parser.add_argument("--stock", metavar="TREE", help="a checkout to use as stock bitbake")
    parser.add_argument("--patched", metavar="TREE", help="a checkout to use as patched bitbake")
    add_json(parser)


def run_dispatch(options):
    if not 0 <= options.share <= 1 or options.starts > options.tasks:
        raise Problem("--share is from 0 to 1, and --starts not more than --tasks")
    trees = {False: checkout(options.stock) if options.stock else shared_tree(patched=False),
             True: checkout(options.patched) if options.patched else shared_tree(patched=True)}
    turns = max(1, options.starts // options.turn)
    runs = {name: [] for name, _, _ in VARIANTS}
    with contextlib.ExitStack() as stack:
        processes = {name: stack.enter_context(dispatcher(trees[patched], limit, options)) for name, patched, limit in VARIANTS}
        for process in processes.values():
            process.answer()
        for _ in range(turns):
            for name, process in processes.items():
                runs[name].append(process.ask(options.turn))
    report = {"tasks": options.tasks, "starts": turns * options.turn, "setscene": options.setscene,
              "share": options.share, "threads": options.threads, "variants": {}}
    stock = [run["seconds"] for run in runs["stock"]]
    for name, results in runs.items():
        seconds = [run["seconds"] for run in results]
        median = ratio(seconds, stock)[0]
        report["variants"][name] = {
            "seconds": seconds, "ratio": sum(seconds) / sum(stock), "median_ratio": median,
            "calls": sum(run["calls"] for run in results), "peak": results[-1]["peak"]}
        print("%-22s %8.3f s  %6.3f of stock, median of %d turns %.3f, at most %d network tasks at a time"
              % (name, sum(seconds), sum(seconds) / sum(stock), turns, median, results[-1]["peak"]),
              flush=True)
    write_json(options, report)
    return 0


def dispatcher(tree, limit, options):
    """A process of processes/dispatch.py"""
    return Process(PROCESS, {"lib": str(tree.path / "lib"), "limit": limit, "tasks": options.tasks,
                              "setscene": options.setscene, "share": options.share, "threads": options.threads}, tree.path)
