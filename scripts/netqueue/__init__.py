# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""What the scripts and the tests of bitbake-netqueue share.

    series/     the patches: reading, applying and exporting them
    lab/        trees, build directories and mirrors on one machine
    demo/       scripts/demo
    bench/      scripts/bench, one module for each benchmark
    fuzz/       mutated input for the parsers of the shared connections

Beside them: command.py for the command lines, environment.py for what a fresh
machine lacks, progress.py. series and fuzz import none of the others, lab
only series, bench and demo only lab; tests/unit/test_imports.py checks that.
None of it becomes part of bitbake.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


class Problem(Exception):
    """Something the user can put right; its text is one line, shown without a traceback."""
