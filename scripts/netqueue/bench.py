# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""The benchmarks of scripts/bench: their arguments, and that of the dispatch.

pacebench.py, presencebench.py, buildbench.py and overheadbench.py have the
other benchmarks. Of the dispatch (dispatch.py) each variant is a process with
the lib folder of one tree (turns.py); they take turns of a few tasks each.
"""

import contextlib
import json
import statistics
from pathlib import Path

from netqueue import Problem, buildbench, overheadbench, pacebench, presencebench
from netqueue.command import Parser
from netqueue.presencebench import positive
from netqueue.trees import checkout, shared_tree
from netqueue.turns import Process

DISPATCH = Path(__file__).with_name("dispatch.py")
# Name, whether of the patched tree, BB_NUMBER_NETWORK_THREADS
VARIANTS = [("stock", False, ""), ("patched, limit unset", True, ""), ("patched, limit 4", True, "4")]


def main(arguments):
    parser = Parser("bench", "Stock bitbake beside patched bitbake in one run.")
    measures = parser.add_subparsers(dest="measure", required=True, metavar="measure", parser_class=_subparser)
    dispatch = measures.add_parser("dispatch", help="CPU seconds in which the runqueue starts tasks",
                                   description="CPU seconds in which the runqueue starts tasks.")
    add_options(dispatch)
    dispatch.set_defaults(run=run_dispatch)
    pace = measures.add_parser("pace", help="tasks and transfers a second, of each alone and beside the other",
                               description=pacebench.__doc__)
    pacebench.add_options(pace)
    pace.set_defaults(run=pacebench.run)
    presence = measures.add_parser("presence", help="what it costs to ask which objects a mirror has",
                                   description=presencebench.__doc__)
    presencebench.add_options(presence)
    presence.set_defaults(run=presencebench.run)
    build = measures.add_parser("build", help="how long it takes to restore all objects of a build",
                                description=buildbench.__doc__)
    buildbench.add_options(build)
    build.set_defaults(run=buildbench.run)
    overhead = measures.add_parser("overhead", help="what a build costs that the series has nothing to gain for",
                                   description=overheadbench.__doc__)
    overheadbench.add_options(overhead)
    overhead.set_defaults(run=overheadbench.run)
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
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers to FILE, too")


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
        ratios = [one / other for one, other in zip(seconds, stock)]
        report["variants"][name] = {
            "seconds": seconds, "ratio": sum(seconds) / sum(stock), "median_ratio": statistics.median(ratios),
            "calls": sum(run["calls"] for run in results), "peak": results[-1]["peak"]}
        print("%-22s %8.3f s  %6.3f of stock, median of %d turns %.3f, at most %d network tasks at a time"
              % (name, sum(seconds), sum(seconds) / sum(stock), turns, statistics.median(ratios), results[-1]["peak"]),
              flush=True)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def dispatcher(tree, limit, options):
    """A process of dispatch.py"""
    return Process(DISPATCH, {"lib": str(tree.path / "lib"), "limit": limit, "tasks": options.tasks,
                              "setscene": options.setscene, "share": options.share, "threads": options.threads}, tree.path)
