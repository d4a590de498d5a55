# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""What the scripts and the tests of bitbake-netqueue share.

trees.py makes runnable bitbake trees, layer.py build directories for them,
mirror.py serves sstate objects and counts, environment.py gets what a fresh
machine lacks, series.py knows the patches. None of it becomes part of bitbake.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


class Problem(Exception):
    """Something the user can put right; its text is one line, shown without a traceback."""
