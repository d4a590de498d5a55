# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""The files of the benchmarks: the folder that each works in, and the JSON file that --json names.

    add_json(parser)
    add_work(parser)
    ...
    with work_folder("build-", options.work) as work:
        ...
    write_json(options, {"options": settings(options), "cells": cells})

Nothing is removed between two runs, but put away. For each new file ext4 passes
by the inodes that were deleted in the last minutes, one after the other: up to
a fifth of the CPU seconds of a build which comes after that
(recently_deleted() in Linux, fs/ext4/ialloc.c). That is so where ext4 has no
journal, and then what the tasks of a build remove remains in the way: --work
can name a folder on a file system as builds usually have.
"""

import contextlib
import json
import os
import shutil
import tempfile
from pathlib import Path

from netqueue import ROOT

# Of the options those which say nothing of what was measured
NO_SETTINGS = ("json", "svg", "work", "measure", "run")


def add_json(parser):
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers to FILE, too")


def add_work(parser):
    parser.add_argument("--work", type=Path, default=ROOT / "build", metavar="FOLDER",
                        help="where to make the folder that it works in (default: build)")


@contextlib.contextmanager
def work_folder(prefix, folder):
    """A new folder below folder, which is removed afterwards."""
    folder.mkdir(exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.resolve()))
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def put_away(folder, work):
    """Move folder, if it exists, to where it is removed with the folder work, and in nobody's way until then."""
    if folder.exists():
        old = work / "old"
        old.mkdir(exist_ok=True)
        folder.rename(old / str(len(os.listdir(old))))


def settings(options):
    """The options of a measurement, for its report."""
    return {name: value for name, value in vars(options).items() if name not in NO_SETTINGS}


def write_json(options, content):
    """Write content if a file was asked for."""
    if options.json:
        options.json.write_text(json.dumps(content, indent=1) + "\n")
