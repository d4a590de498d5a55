# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""CPU seconds in which the runqueue starts tasks: `scripts/bench dispatch`.

Stock bitbake, patched bitbake, and patched bitbake with a limit of network
tasks take turns of a few tasks each. All tasks can be started at the beginning,
and none of them runs: what is measured is the choice of the next task.
"""

import contextlib

from netqueue import Problem
from netqueue.bench.frame.comparison import ratio, take_turns
from netqueue.bench.frame.options import add_json, add_number, add_threads, write_json
from netqueue.bench.frame.process import Process
from netqueue.bench.frame.trees import add_trees, trees_of

PROCESS = "netqueue.bench.processes.dispatch"
# Name, tree, BB_NUMBER_NETWORK_THREADS
VARIANTS = [("stock", "stock", ""), ("patched, limit unset", "patched", ""), ("patched, limit 4", "patched", "4")]


def add_options(parser):
    add_number(parser, "--tasks", 20000, "tasks that can all be started at the beginning")
    add_number(parser, "--starts", 500, "how many of them are started by each variant")
    parser.add_argument("--setscene", action="store_true", help="setscene tasks instead of normal ones")
    parser.add_argument("--share", type=float, default=0.5, metavar="X",
                        help="share of the tasks that need the network, 0 to 1 (default: %(default)s)")
    add_threads(parser)
    add_number(parser, "--turn", 25, "how many a variant starts in its turn")
    add_trees(parser)
    add_json(parser)


def run(options):
    if not 0 <= options.share <= 1 or options.starts > options.tasks:
        raise Problem("--share is from 0 to 1, and --starts not more than --tasks")
    trees = dict(zip(("stock", "patched"), trees_of(options)))
    turns = max(1, options.starts // options.turn)
    with contextlib.ExitStack() as stack:
        processes = {name: stack.enter_context(start(trees[tree], limit, options)) for name, tree, limit in VARIANTS}
        for process in processes.values():
            process.answer()
        runs = take_turns(list(processes), turns, lambda name: processes[name].ask(options.turn), warm_up=False)
    report = {"tasks": options.tasks, "starts": turns * options.turn, "setscene": options.setscene,
              "share": options.share, "threads": options.threads, "variants": {}}
    stock = [run["seconds"] for run in runs["stock"]]
    for name, results in runs.items():
        seconds = [run["seconds"] for run in results]
        median = ratio(seconds, stock).median
        report["variants"][name] = {
            "seconds": seconds, "ratio": sum(seconds) / sum(stock), "median_ratio": median,
            "calls": sum(run["calls"] for run in results), "peak": results[-1]["peak"]}
        print("%-22s %8.3f s  %6.3f of stock, median of %d turns %.3f, at most %d network tasks at a time"
              % (name, sum(seconds), sum(seconds) / sum(stock), turns, median, results[-1]["peak"]),
              flush=True)
    write_json(options, report)
    return 0


def start(tree, limit, options):
    """The Process of a variant"""
    arguments = {"lib": str(tree.path / "lib"), "limit": limit, "tasks": options.tasks, "setscene": options.setscene,
                 "share": options.share, "threads": options.threads}
    return Process(PROCESS, arguments, tree.path)
