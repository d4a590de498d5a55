# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""The folder that a benchmark works in.

    with work_folder("build-", options.work) as work:
        ...
        put_away(build.tmp, work)

Nothing is removed between two runs, but put away. For each new file ext4 passes
by the inodes that were deleted in the last minutes, one after the other: up to
a fifth of the CPU seconds of a build which comes after that
(recently_deleted() in Linux, fs/ext4/ialloc.c). That is so where ext4 has no
journal, and then what the tasks of a build remove remains in the way: --work
can name a folder on a file system as builds usually have.
"""

import contextlib
import os
import shutil
import tempfile
from pathlib import Path


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
