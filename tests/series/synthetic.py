# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""Small stand-ins for upstream's trees, with a series for them, and what a tree consists of.

The tests of apply and export use these: they look like the real trees to
checkout.find_parts(), and are made in some milliseconds.

    made = synthetic.make(tmp_path)     # made.bitbake, made.oecore, made.poky, made.project
    before = state(made.bitbake)
    assert run("apply", made.bitbake, project=made.project).returncode == 0
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from netqueue import ROOT
from netqueue.series.export import export_tree, write
from netqueue.series.git import git

VERSION = "2.19.0"
NAMES = "wrynose blacksail"
LINES = ["line %d" % number for number in range(1, 41)]


@dataclasses.dataclass
class Made:
    """Trees on their base, and the folder with the series that was exported for them."""
    bitbake: Path
    oecore: Path
    poky: Path
    project: Path


def put(folder, path, text, mode=0o644):
    full = Path(folder) / path
    full.parent.mkdir(parents=True, exist_ok=True)
    full.write_bytes(text if isinstance(text, bytes) else text.encode())
    full.chmod(mode)


def commit(repo, message):
    git(repo, "add", "--all", "--force")
    git(repo, "commit", "--quiet", "--message", message)
    return git(repo, "rev-parse", "HEAD").strip()


def bitbake_files(folder):
    put(folder, "lib/bb/__init__.py", '__version__ = "%s"\n' % VERSION)
    put(folder, "lib/bb/runqueue.py", "\n".join(LINES) + "\n")
    put(folder, "bin/bitbake", "#!/usr/bin/env python3\n", 0o755)
    put(folder, "doc/manual.rst", "the manual\n")


def oecore_files(folder):
    put(folder, "meta/conf/layer.conf", 'LAYERSERIES_CORENAMES = "%s"\n' % NAMES)
    put(folder, "meta/classes-global/sstate.bbclass", "\n".join(LINES) + "\n")


def new_repo(folder, *fillers):
    folder.mkdir(parents=True)
    git(folder, "init", "--quiet", "--initial-branch=master")
    for fill in fillers:
        fill(folder)
    commit(folder, "the base")
    return folder


def change_line(folder, path, number, text):
    full = folder / path
    lines = full.read_text().split("\n")
    lines[number - 1] = text
    full.write_text("\n".join(lines))


def bitbake_series(repo):
    """Four commits: a new file, edits of it and of others, a program, a file with carriage returns."""
    put(repo, "lib/bb/connections/pool.py", "POOL = 1\n")
    change_line(repo, "lib/bb/runqueue.py", 5, "line five")
    commit(repo, "connections: add a pool\n\nThe reason, with a \u00fcmlaut.\n")
    put(repo, "lib/bb/connections/pool.py", "POOL = 2\n")
    change_line(repo, "lib/bb/runqueue.py", 30, "line thirty")
    commit(repo, "runqueue: use the pool\n\nThe reason.\n\n  indented: as it is\n")
    put(repo, "doc/manual.rst", "the manual, longer\n")
    commit(repo, "doc: describe the pool\n\nThe reason.\n")
    put(repo, "bin/pool", "#!/bin/sh\n", 0o755)
    put(repo, "lib/bb/tests/answer.txt", b"HTTP/1.1 200 OK\r\n\r\nbody without newline")
    commit(repo, "bin/pool: add a program\n\nThe reason.\n")


def oecore_series(repo):
    change_line(repo, "meta/classes-global/sstate.bbclass", 8, "line eight")
    commit(repo, "sstate: ask in one batch\n\nThe reason.\n")


def make(folder):
    """All of it in folder; branches are `master`, the series is on none of them."""
    folder = Path(folder)
    made = Made(new_repo(folder / "bitbake", bitbake_files), new_repo(folder / "oecore", oecore_files),
                folder / "poky", folder / "project")
    made.poky.mkdir()
    git(made.poky, "init", "--quiet", "--initial-branch=master")
    bitbake_files(made.poky / "bitbake")
    oecore_files(made.poky)
    commit(made.poky, "the base")
    write_bases(made)
    for source, add in ((made.bitbake, bitbake_series), (made.oecore, oecore_series)):
        work = folder / "work"
        git(folder, "clone", "--quiet", str(source), str(work))
        add(work)
        write(export_tree(work, project=made.project), made.project)
        shutil.rmtree(work)
    return made


def write_bases(made):
    commits = [git(repo, "rev-parse", "HEAD").strip() for repo in (made.bitbake, made.oecore)]
    put(made.project, "patches/bases.json", json.dumps({"bases": {"master": {
        "bitbake": {"version": VERSION, "commit": commits[0]},
        "openembedded-core": {"series": NAMES.split(), "commit": commits[1]}}}}))


def run(script, *args, project, env=None):
    """Run scripts/<script> as a user does."""
    command = [sys.executable, str(ROOT / "scripts" / script), *map(str, args), "--project", str(project)]
    return subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True, env=env, timeout=120)


def files(folder, skip=()):
    """{path: (content or link, mode)} of all files and {path: None} of all folders below folder."""
    found = {}
    for top, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in skip]
        for name in folders + names:
            full = Path(top) / name
            path = full.relative_to(folder).as_posix()
            if full.is_symlink():
                found[path] = (os.readlink(full), "link")
            elif full.is_dir():
                found[path] = None
            else:
                found[path] = (full.read_bytes(), full.stat().st_mode)
    return found


def state(folder):
    """Everything about a checkout but git's logs, caches and loose objects."""
    folder = Path(folder)
    return {
        "files": files(folder, skip=(".git",)),
        "HEAD": (folder / ".git/HEAD").read_text(),
        "config": (folder / ".git/config").read_text(),
        "refs": git(folder, "for-each-ref"),
        "index": git(folder, "ls-files", "--stage", "-v"),
        "status": git(folder, "status", "--porcelain", "--ignored"),
        "busy": sorted(path.name for path in (folder / ".git").glob("rebase-*")),
    }
