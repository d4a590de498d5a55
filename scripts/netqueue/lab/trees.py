# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""Bitbake trees that can build: from the PyPI package, stock or patched, or a checkout.

The demo and the system tests call this. The package bitbake-setup holds
upstream's bb, but no programs, hashserv or prserv; those come from launchers/.
The pin (version and hash) is in patches/bases.json. A tree is made beside
its place and renamed, under a lock, so that parallel test workers share one;
its stamp is a digest of all it was made from, so it is reused, never stale.

    tree = shared_tree(patched=True)
    tree.bitbake            # the program to run, with tree.path_entries in PATH
    checkout("/src/bitbake")    # a Tree for a real checkout, used as it is
"""

import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import List, Optional

from netqueue import ROOT, Problem
from netqueue.environment import last_line, unreachable_registry
from netqueue.series import git, overrides, patches

BASES = ROOT / "patches" / "bases.json"
LAUNCHERS = Path(__file__).resolve().parent / "launchers"
STAMP = ".netqueue-tree.json"
DOWNLOAD_SECONDS = 600


@dataclasses.dataclass
class Tree:
    """oecore: the openembedded-core that belongs to a checkout, for oecore.py"""
    path: Path
    oecore: Optional[Path] = None
    name: str = ""
    is_checkout: bool = False
    applied: List[str] = dataclasses.field(default_factory=list)
    not_applicable: List[str] = dataclasses.field(default_factory=list)

    @property
    def bitbake(self):
        return self.path / "bin" / "bitbake"

    @property
    def path_entries(self):
        """Folders that PATH needs for this tree, first to last."""
        entries = [str(self.path / "bin")]
        if not shutil.which("zstd"):
            entries.append(str(LAUNCHERS / "tools"))
        return entries


def checkout(path):
    """A Tree for a checkout of bitbake. Raises Problem when it is none."""
    path = Path(path).resolve()
    for needed in ("bin/bitbake", "bin/bitbake-worker", "lib/bb/runqueue.py"):
        if not (path / needed).is_file():
            raise Problem("%s is no checkout of bitbake: it has no %s" % (path, needed))
    return Tree(path, name=path.name, is_checkout=True)


def pinned_package(base="master"):
    """{"name", "version", "sha256"} of the package that a base is taken from."""
    try:
        return json.loads(BASES.read_text())["bases"][base]["bitbake"]["pypi"]
    except (OSError, ValueError, KeyError) as error:
        raise Problem("%s names no package for the base %s (%r)" % (BASES, base, error)) from error


def make_tree(dest, patched, cache, base="master", topics=None):
    """Return a Tree at dest, made anew only when anything it is made from has changed; topics: of the series only these.

    Blocks for the download (first time) and while another process makes the
    same tree. Raises Problem when the package cannot be had or a patch
    does not apply.
    """
    dest, cache = Path(dest).absolute(), Path(cache).absolute()
    package = pinned_package(base)
    digest = _digest(package, patched, base, topics)
    dest.parent.mkdir(parents=True, exist_ok=True)
    with open(str(dest) + ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = _read_stamp(dest, digest)
        if made is None:
            wheel = download(package, cache)
            made = _build(dest, wheel, patched, base, digest, topics)
    return Tree(dest, name="patched" if patched else "stock", applied=made["applied"],
                not_applicable=made["not_applicable"])


def shared_tree(patched, base="master"):
    """The tree in build/trees that the demo and the tests share. As make_tree()."""
    return make_tree(ROOT / "build" / "trees" / ("patched" if patched else "stock"), patched,
                     ROOT / "build" / "cache", base)


def download(package, cache):
    """The path of the package's wheel in the cache folder, checked against its hash."""
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / "download.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        wheel = _cached_wheel(package, cache)
        if wheel is None:
            _pip_download(package, cache)
            wheel = _cached_wheel(package, cache)
        if wheel is None:
            raise Problem("%(name)s %(version)s: the downloaded file has not the hash %(sha256)s" % package)
        return wheel


def _cached_wheel(package, cache):
    for wheel in cache.glob("%s-%s-*.whl" % (package["name"].replace("-", "_"), package["version"])):
        if hashlib.sha256(wheel.read_bytes()).hexdigest() == package["sha256"]:
            return wheel
        # Half of a download, or another version of the pin.
        wheel.unlink()
    return None


def _pip_download(package, cache):
    requirement = cache / "requirement.txt"
    requirement.write_text("%(name)s==%(version)s --hash=sha256:%(sha256)s\n" % package)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
               "--require-hashes", "--no-deps", "--only-binary=:all:", "--dest", str(cache),
               "--requirement", str(requirement)]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True, timeout=DOWNLOAD_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise Problem("%(name)s %(version)s: the download took too long" % package) from error
    if done.returncode:
        raise Problem(unreachable_registry([done.stdout]) or "%s %s could not be downloaded: %s"
                      % (package["name"], package["version"], last_line([done.stdout])))


def _build(dest, wheel, patched, base, digest, topics):
    work = dest.with_name("%s.new-%d" % (dest.name, os.getpid()))
    shutil.rmtree(work, ignore_errors=True)
    try:
        _unpack(wheel, work / "lib")
        shutil.copytree(LAUNCHERS / "bin", work / "bin", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(LAUNCHERS / "lib", work / "lib", dirs_exist_ok=True,
                        ignore=shutil.ignore_patterns("__pycache__"))
        made = {"digest": digest, "applied": [], "not_applicable": []}
        if patched and any((ROOT / "patches" / base).rglob("*.patch")):
            done = patches.apply_to_plain_tree(work, base, topics=topics)
            made["applied"] = list(done.applied)
            made["not_applicable"] = list(done.not_applicable)
        _write_shell_table(work)
        (work / STAMP).write_text(json.dumps(made, indent=1) + "\n")
        shutil.rmtree(dest, ignore_errors=True)
        work.rename(dest)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return made


def _unpack(wheel, lib):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(lib, [name for name in archive.namelist() if name.startswith("bb/")])
    if not (lib / "bb" / "runqueue.py").is_file():
        raise Problem("%s holds no bb package" % wheel.name)


def _write_shell_table(tree):
    """Whoever imports bb.codeparser first writes the table of its shell parser: not while others read the tree."""
    done = subprocess.run([sys.executable, "-c", "import bb.codeparser"], cwd=tree / "lib", stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60,
                          env={**os.environ, "PYTHONPATH": str(tree / "lib"), "PYTHONDONTWRITEBYTECODE": "1"})
    if done.returncode:
        raise Problem("bb.codeparser cannot be imported: %s" % last_line([done.stdout]))


def _read_stamp(dest, digest):
    try:
        made = json.loads((dest / STAMP).read_text())
    except (OSError, ValueError):
        return None
    return made if made.get("digest") == digest else None


def _digest(package, patched, base, topics):
    """Of everything a tree is made from: the pin, the launchers, this module, the series."""
    digest = hashlib.sha256(json.dumps([package, patched, sorted(topics or ())], sort_keys=True).encode())
    files = [Path(__file__)] + _files(LAUNCHERS)
    if patched:
        files += _files(ROOT / "patches" / base) + [BASES]
        files += [Path(module.__file__) for module in (patches, overrides, git)]
    for path in files:
        if path.is_file():
            content = path.read_bytes()
            digest.update(b"%s %d\n" % (os.fsencode(str(path.relative_to(ROOT))), len(content)))
            digest.update(content)
    return digest.hexdigest()


def _files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
