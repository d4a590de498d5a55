# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""The arguments that benchmarks share, and the JSON file that one of them names.

    add_repeat(parser, 3, "runs of each; the median counts")
    add_json(parser)
    add_work(parser)
    ...
    write_json(options, {"options": settings(options), "cells": cells})
"""

import json
from pathlib import Path

from netqueue import ROOT, Problem

# Of the options those which say nothing of what was measured
NO_SETTINGS = ("json", "svg", "work", "measure", "run")


def positive(text):
    """For argparse: a number from 1"""
    if not (text.isdigit() and int(text) > 0):
        raise Problem("%s is not a number from 1" % text)
    return int(text)


def add_number(parser, name, default, text, metavar="N"):
    parser.add_argument(name, type=positive, default=default, metavar=metavar, help=text + " (default: %(default)s)")


def add_repeat(parser, default, text):
    add_number(parser, "--repeat", default, text)


def add_threads(parser):
    add_number(parser, "--threads", 8, "BB_NUMBER_THREADS")


def add_only(parser, name, choices):
    """An option that selects some of the choices. It is None if it is not given."""
    parser.add_argument(name, choices=choices, action="append", metavar=name.lstrip("-")[0].upper(),
                        help="only this: %s; may be given more than once" % ", ".join(choices))


def add_json(parser):
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers to FILE, too")


def add_work(parser):
    parser.add_argument("--work", type=Path, default=ROOT / "build", metavar="FOLDER",
                        help="where to make the folder that it works in (default: build)")


def settings(options):
    """The options of a measurement, for its report."""
    return {name: value for name, value in vars(options).items() if name not in NO_SETTINGS}


def write_json(options, content):
    """Write content if a file was asked for."""
    if options.json:
        options.json.write_text(json.dumps(content, indent=1) + "\n")
