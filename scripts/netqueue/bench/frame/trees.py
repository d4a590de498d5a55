# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""The trees that a benchmark compares, and the Python that runs their builds.

    add_trees(parser)
    ...
    stock, patched = trees_of(options)
"""

import importlib.util
import os
import sys
from pathlib import Path

from netqueue import ROOT, environment
from netqueue.lab.trees import checkout, shared_tree


def add_trees(parser):
    parser.add_argument("--stock", metavar="TREE", help="a checkout to use as stock bitbake")
    parser.add_argument("--patched", metavar="TREE", help="a checkout to use as patched bitbake")


def trees_of(options):
    """The stock and the patched Tree: those that the user names, else the shared ones."""
    return (checkout(options.stock) if options.stock else shared_tree(patched=False),
            checkout(options.patched) if options.patched else patched_tree())


def patched_tree():
    """NETQUEUE_PATCHED_LIB names the lib folder of another one, for development, as for the tests."""
    lib = os.environ.get("NETQUEUE_PATCHED_LIB")
    return checkout(Path(lib).parent) if lib else shared_tree(patched=True)


def enter_venv(s3=False):
    """Start the command anew with what the demo's layer, and an S3 mirror, needs, if it is not there."""
    if s3:
        environment.ensure_venv(ROOT / "build" / "venv")
        environment.install_optional(ROOT / "build" / "venv", environment.S3_REQUIREMENTS)
    if not importlib.util.find_spec("zstandard"):
        python = str(environment.ensure_venv(ROOT / "build" / "venv"))
        sys.stdout.flush()
        os.execv(python, [python] + sys.argv)
