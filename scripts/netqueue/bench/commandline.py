# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""What scripts/bench does: from its arguments to the benchmark that they name.

Each benchmark is a module with add_options(parser) and run(options), which
returns the exit code. Its docstring is what --help tells.
"""

from netqueue.bench import (build, connectioncount, dispatch, faults, fuzz, install, kills, overhead, presence,
                            terminal, throughput)
from netqueue.command import Parser

BENCHMARKS = [("dispatch", dispatch, "CPU seconds in which the runqueue starts tasks"),
              ("pace", throughput, "tasks and transfers a second, of each alone and beside the other"),
              ("lanes", connectioncount, "over how many connections a mirror is asked"),
              ("presence", presence, "what it costs to ask which objects a mirror has"),
              ("build", build, "how long it takes to restore all objects of a build"),
              ("install", install, "what it costs to install objects that are all local"),
              ("overhead", overhead, "what a build costs that the series has nothing to gain for"),
              ("faults", faults, "what is restored from mirrors with faults"),
              ("terminal", terminal, "what a user sees of a build"),
              ("fuzz", fuzz, "mutated input for the parsers of the shared connections"),
              ("kills", kills, "what is left of builds that are killed while they restore")]


def main(arguments):
    parser = Parser("bench", "Stock bitbake beside patched bitbake in one run.")
    measures = parser.add_subparsers(dest="measure", required=True, metavar="measure", parser_class=_subparser)
    for name, module, text in BENCHMARKS:
        measure = measures.add_parser(name, help=text, description=module.__doc__)
        module.add_options(measure)
        measure.set_defaults(run=module.run)
    options = parser.parse_args(arguments)
    return options.run(options)


def _subparser(prog, description, **options):
    return Parser(prog.rpartition("/")[2], description, **options)
