# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""What the runqueue and the transfers cost each other: `scripts/bench pace`.

The runqueue and the shared connections are threads of one process, the bitbake
server. In short turns are measured

    stock               tasks that stock bitbake starts a second
    dispatch            the same of patched bitbake, with nothing being fetched
    transfers           small objects fetched a second, with a runqueue that waits
    apart               both at the same time, but in two processes: what they cost each other by the machine alone
    both                both at the same time in one process

from a real server on loopback, with bitbake's own runqueue and tasks that do
nothing (pace.py). A runqueue without --tasks-per-second is never idle, which
no build's is; with it, how late a task is started tells what it is held up.

The server takes its part of the machine's cores, which "apart" has as well; and
the CPU seconds of the runqueue's thread are told. Medians of the turns count, and medians of the
ratios of each turn, with the interval of the sign test.
"""

import contextlib
import statistics
import sys
from pathlib import Path

from netqueue import Problem, pace
from netqueue.benchfiles import add_json, add_work, settings, work_folder, write_json
from netqueue.certificates import make_certificates
from netqueue.presencebench import PROTOCOLS, open_mirror, patched_tree, positive
from netqueue.query import object_name
from netqueue.report import Progress
from netqueue.trees import shared_tree
from netqueue.turns import Process, ratio, rotated

SCRIPT = Path(__file__).with_name("pace.py")
FILES = 500
MODES = ("stock", "dispatch", "transfers", "apart", "both")
# Title, what is compared: mode and measure, with which mode
RATIOS = (("tasks a second: dispatch / stock", "dispatch", "tasks_per_second", "stock"),
          ("tasks a second: both / dispatch", "both", "tasks_per_second", "dispatch"),
          ("tasks a second: both / apart", "both", "tasks_per_second", "apart"),
          ("CPU of the runqueue a task: both / dispatch", "both", "cpu_per_task", "dispatch"),
          ("objects a second: both / transfers", "both", "objects_per_second", "transfers"),
          ("objects a second: both / apart", "both", "objects_per_second", "apart"))


def add_options(parser):
    parser.add_argument("--protocol", choices=PROTOCOLS, default="http", metavar="P",
                        help="http, https or sftp (default: %(default)s)")
    parser.add_argument("--tasks-per-second", type=positive, metavar="N",
                        help="tasks that are to be started a second (default: as many as can be)")
    parser.add_argument("--tasks", type=positive, default=2000, metavar="N",
                        help="tasks that can all be started at the beginning of a turn (default: %(default)s)")
    parser.add_argument("--starts", type=positive, default=1000, metavar="N",
                        help="how many of them are started in a turn, unless there is a rate (default: %(default)s)")
    parser.add_argument("--setscene", action="store_true", help="setscene tasks instead of normal ones")
    parser.add_argument("--threads", type=positive, default=8, metavar="N",
                        help="BB_NUMBER_THREADS (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=0.7, metavar="S",
                        help="of a turn of transfers alone, and of all at a rate (default: %(default)s)")
    parser.add_argument("--turns", type=positive, default=12, metavar="N",
                        help="turns of each; one more before is not counted (default: %(default)s)")
    parser.add_argument("--connections", type=positive, default=4, metavar="N",
                        help="BB_CONNECTION_CACHE_MAX (default: %(default)s)")
    parser.add_argument("--depth", type=positive, default=64, metavar="N",
                        help="BB_CONNECTION_CACHE_DEPTH (default: %(default)s)")
    parser.add_argument("--under-way", type=positive, default=128, metavar="N",
                        help="objects that are asked for at a time; prefetch has 48 (default: %(default)s)")
    parser.add_argument("--size", type=positive, default=4096, metavar="N",
                        help="bytes of an object, beside its .siginfo (default: %(default)s)")
    add_json(parser)
    add_work(parser)


def run(options):
    if not 0.1 <= options.seconds <= 60:
        raise Problem("--seconds is from 0.1 to 60")
    starts = options.starts
    if options.tasks_per_second:
        starts = max(1, round(options.tasks_per_second * options.seconds))
    if starts > options.tasks:
        raise Problem("%d tasks are started in a turn, but --tasks is %d" % (starts, options.tasks))
    if options.under_way > 200:
        # Two files each, and servers have a limit of 1024 descriptors
        raise Problem("--under-way is at most 200")
    with work_folder("pace-", options.work) as work:
        runs = measure(options, starts, work)
    report = summarise(options, runs)
    print(table(options, report))
    write_json(options, report)
    return 0


def measure(options, starts, work):
    """{mode: [what pace.py says of each turn]}"""
    progress = Progress(sys.stderr)
    progress.step("%s, %d turns" % (options.protocol, options.turns))
    arguments = {"tasks": options.tasks, "starts": starts, "setscene": options.setscene, "threads": options.threads,
                 "rate": options.tasks_per_second, "seconds": options.seconds, "traffic": None}
    runs = {mode: [] for mode in MODES}
    with contextlib.ExitStack() as stack:
        certificates = make_certificates(work / "tls") if options.protocol == "https" else None
        mirror = stack.enter_context(open_mirror(options.protocol, make_files(work / "objects", options.size),
                                                 work / "home", certificates))
        folder = work / "fetched"
        folder.mkdir()
        traffic = {"url": mirror.served.url, "files": FILES, "size": options.size, "connections": options.connections,
                   "depth": options.depth, "slots": options.under_way, "folder": str(folder)}
        stock = dict(arguments, lib=str(shared_tree(patched=False).path / "lib"))
        patched = dict(arguments, lib=str(patched_tree().path / "lib"), traffic=traffic)
        ask = Asker(*[stack.enter_context(Process(SCRIPT, values, name, mirror.variables)) for name, values in
                      (("stock", stock), ("patched", patched), ("patched", patched))])
        for turn in range(-1, options.turns):
            for mode in rotated(MODES, turn):
                done = ask(mode)
                if turn >= 0:
                    runs[mode].append(rates(done))
    progress.done()
    return runs


class Asker:
    """Has a mode measured by the processes for it"""

    def __init__(self, stock, patched, other):
        self.stock, self.patched, self.other = stock, patched, other
        for process in (stock, patched, other):
            process.answer()

    def __call__(self, mode):
        if mode == "stock":
            return self.stock.ask("dispatch")
        if mode != "apart":
            return self.patched.ask(mode)
        self.other.ask("start")
        done = self.patched.ask("dispatch")
        fetched = self.other.ask("stop")
        # It takes a bit longer
        share = done["seconds"] / fetched["seconds"]
        return dict(done, objects=fetched["objects"] * share, other_cpu=fetched["other_cpu"] * share)


def make_files(folder, size):
    for number in range(FILES):
        path = folder / object_name(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pace.content(number, size))
        path.with_name(path.name + pace.SIGINFO).write_bytes(pace.content(number, pace.SIGINFO_SIZE))
    return folder


def rates(done):
    """What pace.py says of a turn, and what follows from it"""
    if done["tasks"] is not None:
        done.update(tasks_per_second=done["tasks"] / done["seconds"], wall_per_task=done["seconds"] / done["tasks"],
                    cpu_per_task=done["thread_cpu"] / done["tasks"])
    if done["objects"] is not None:
        done["objects_per_second"] = done["objects"] / done["seconds"]
    if done["objects"]:
        done["cpu_per_object"] = done["other_cpu"] / done["objects"]
    return done


def summarise(options, runs):
    report = {"options": settings(options), "modes": {}, "ratios": {}}
    for mode, results in runs.items():
        medians = {name: statistics.median(result[name] for result in results)
                   for name in results[0] if all(result.get(name) is not None for result in results)}
        report["modes"][mode] = dict(medians, runs=results)
    for title, mode, measure_name, other in RATIOS:
        pair = [[result.get(measure_name, 0) for result in runs[name]] for name in (mode, other)]
        if all(pair[1]):
            report["ratios"][title] = ratio(*pair)
    return report


def table(options, report):
    rate = "%d tasks a second" % options.tasks_per_second if options.tasks_per_second else "as many tasks as can be started"
    lines = ["", "%s, %d connections, depth %d, objects of %d bytes with a .siginfo of %d; %s; medians of %d turns" %
             (options.protocol, options.connections, options.depth, options.size, pace.SIGINFO_SIZE, rate, options.turns),
             "%-12s %10s %10s %10s %10s %10s %11s %11s" %
             ("", "tasks/s", "ms/task", "CPU ms", "late, ms", "95 %", "objects/s", "CPU ms/obj")]
    columns = (("tasks_per_second", 1, "%10.1f"), ("wall_per_task", 1000, "%10.3f"), ("cpu_per_task", 1000, "%10.3f"),
               ("late", 1000, "%10.3f"), ("late95", 1000, "%10.3f"), ("objects_per_second", 1, "%11.1f"),
               ("cpu_per_object", 1000, "%11.3f"))
    for mode in MODES:
        values = report["modes"][mode]
        lines.append("%-12s " % mode + " ".join(text % (values[name] * factor) if name in values else
                                                "%*s" % (int(text[1:3]), "-") for name, factor, text in columns))
    lines.append("")
    for title, (median, low, high, sure) in report["ratios"].items():
        lines.append("%-46s %6.3f   (%.3f to %.3f, sure to %.1f %%)" % (title, median, low, high, 100 * sure))
    return "\n".join(lines)
