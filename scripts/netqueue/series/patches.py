# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""The patches of the series: which there are, what each touches, and putting them on plain files.

checkout.py (for scripts/apply), export.py, trees.py and the tests call this.
Patches are applied by `git apply`, without fuzz, to a copy of the files that
they touch; only when all of them fit is the tree written to, and a failure
while writing puts the old files back. It does not look for git repositories:
that is checkout.py.

    patches = load_series("master", "bitbake", topics=parse_topics("1-3"))
    done = apply_to_plain_tree(Path("build/trees/patched"))
    print(len(done.applied), "applied,", len(done.not_applicable), "not applicable")
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import List

from netqueue import ROOT, Problem
from netqueue.series.git import GitError, git
from netqueue.series.overrides import MASTER, merge, read_record

PARTS = ("bitbake", "openembedded-core")

# The part of bitbake that the PyPI package holds, but for the data of a test which it leaves out.
PLAIN = "lib/bb/"
UNPACKAGED = "lib/bb/tests/runqueue-tests/"

_SECTION = re.compile(r"^diff --git ", re.MULTILINE)
_HEADER = re.compile(r"^diff --git a/(?P<path>.+) b/(?P=path)\n")


@dataclasses.dataclass
class AppliedSeries:
    """Names of the patches that were applied, and of those without a part for this tree."""
    applied: List[str] = dataclasses.field(default_factory=list)
    not_applicable: List[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Section:
    """What one patch does to one file."""
    path: str
    text: str

    @property
    def is_new(self):
        head = self.text.split("\n@@ ", 1)[0]
        return any(line.startswith("new file mode ") for line in head.split("\n"))


@dataclasses.dataclass
class Patch:
    """One file of patches/: `header` is the mail's head and message, sections the rest."""
    name: str
    header: str
    sections: List[Section]

    @property
    def text(self):
        return self.header + self.diff()

    @property
    def topic(self):
        """The folder that it is in, as 1-fixes; empty if it is in none"""
        return "/".join(self.name.split("/")[1:-1])

    def diff(self, prefix=""):
        """The diff of the files whose paths start with prefix; empty if there are none."""
        return "".join(section.text for section in self.sections if is_below(section.path, prefix))

    def paths(self, prefix=""):
        return [section.path for section in self.sections if is_below(section.path, prefix)]


def is_below(path, prefix):
    """Whether path starts with prefix; with PLAIN also whether the package has such files."""
    return path.startswith(prefix) and not (prefix == PLAIN and path.startswith(UNPACKAGED))


def parse_patch(name, text):
    """Split a patch, as export.py writes them, into its files. Raises Problem."""
    starts = [match.start() for match in _SECTION.finditer(text)]
    if not starts:
        raise Problem("%s: holds no diff" % name)
    sections = []
    for start, end in zip(starts, starts[1:] + [len(text)]):
        match = _HEADER.match(text[start:end])
        if not match:
            raise Problem("%s: a rename or an odd path: %s" % (name, text[start:end].split("\n", 1)[0]))
        path = match.group("path")
        if path.startswith("/") or ".." in path.split("/"):
            raise Problem("%s: a path outside of the tree: %s" % (name, path))
        sections.append(Section(path, text[start:end]))
    return Patch(name, text[:starts[0]], sections)


def load_bases(project=ROOT):
    """The contents of patches/bases.json: {name: {part: {...}}}. Raises Problem."""
    path = Path(project) / "patches" / "bases.json"
    try:
        bases = json.loads(path.read_text(encoding="utf-8"))["bases"]
        for base in bases.values():
            for part in PARTS:
                if not re.fullmatch("[0-9a-f]{40}", base[part]["commit"]):
                    raise Problem("%s: a commit is not 40 hexadecimal digits: %s" % (path, base[part]["commit"]))
        return bases
    except OSError as error:
        raise Problem("%s: %s" % (path, error.strerror)) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Problem("%s is not what it should be: %r" % (path, error)) from error


def load_base(base, project=ROOT):
    """What load_bases() has of one base. Raises Problem if there is none of that name."""
    bases = load_bases(project)
    if base not in bases:
        raise Problem("there is no base %s in patches/bases.json, only %s" % (base, ", ".join(bases)))
    return bases[base]


def parse_topics(text):
    """The numbers of topics in a text like 1-3 or 0,2-4. Raises Problem."""
    numbers = set()
    for part in text.split(","):
        match = re.fullmatch(r"([0-9])(?:-([0-9]))?", part.strip())
        if not match or int(match.group(2) or 9) < int(match.group(1)):
            raise Problem("topics are numbers like 2, 1-3 or 0,2-4, not %s" % text)
        numbers.update(range(int(match.group(1)), int(match.group(2) or match.group(1)) + 1))
    return numbers


def patch_files(base, part, project=ROOT, topics=None):
    """The files of one part of the series, in order, which is that of the topics; topics: only these numbers.

    Of another base than master, only those with sections of its own: load_series() has all.
    """
    top = Path(project) / "patches" / base / part
    found = sorted(top.rglob("*.patch"), key=lambda path: path.relative_to(top).parts)
    return [path for path in found if topics is None or topic_number(path.parent.name) in topics]


def topic_number(topic):
    """1 of 1-fixes; None for a folder that is no topic"""
    match = re.match(r"([0-9]+)-", topic)
    return int(match.group(1)) if match else None


def load_series(base=MASTER, part="bitbake", project=ROOT, topics=None):
    """The patches of one part of the series, in order; none if there is no such folder. Raises Problem."""
    if base == MASTER:
        return _load_patches(base, part, project, topics)
    folder = Path(project) / "patches" / base / part
    merged = merge(_load_patches(MASTER, part, project), _load_patches(base, part, project), read_record(folder), folder)
    return [patch for patch in merged if topics is None or topic_number(patch.topic) in topics]


def _load_patches(base, part, project, topics=None):
    patches = []
    top = Path(project) / "patches" / base
    for path in patch_files(base, part, project, topics):
        # newline="": a patch may hold carriage returns.
        with open(path, encoding="utf-8", errors="surrogateescape", newline="") as handle:
            patches.append(parse_patch(path.relative_to(top).as_posix(), handle.read()))
    return patches


def documented_variables(patches):
    """The variables that the patches add to bitbake's manual, in order."""
    return [name for patch in patches for section in patch.sections if section.path.startswith("doc/")
            for name in re.findall(r"^\+   :term:`(BB_\w+)`$", section.text, re.MULTILINE)]


def apply_to_plain_tree(tree, base=MASTER, upto=None, project=ROOT, topics=None):
    """Put bitbake's part of the series on TREE/lib/bb, the layout of the PyPI package.

    upto: only that many of the patches; topics: only these. Returns an AppliedSeries. Raises
    Problem, and leaves the tree as it was, when a patch does not fit.
    """
    done = AppliedSeries()
    patches = load_series(base, "bitbake", project, topics)[:upto]
    for patch in patches:
        (done.applied if patch.paths(PLAIN) else done.not_applicable).append(patch.name)
    change_files(tree, patches, prefix=PLAIN)
    return done


def change_files(tree, patches, prefix="", reverse=False, write=True):
    """Apply patches to the files of a folder, all or none; return a function that undoes it.

    write=False only tries. reverse takes the patches out again. Raises Problem.
    """
    tree = Path(tree)
    paths = sorted({path for patch in patches for path in patch.paths(prefix)})
    with tempfile.TemporaryDirectory(prefix="netqueue-") as scratch:
        scratch = Path(scratch)
        before = _read_files(tree, paths)
        _write_files(scratch, before)
        for patch in (reversed(patches) if reverse else patches):
            _apply_one(scratch, patch, prefix, reverse, tree)
        after = _read_files(scratch, paths)
    changed = {path: after[path] for path in paths if after[path] != before[path]}
    old = {path: before[path] for path in changed}
    if write:
        try:
            _write_files(tree, changed)
        except BaseException as error:
            with contextlib.suppress(OSError):
                _write_files(tree, old)
            if isinstance(error, OSError):
                raise Problem("%s cannot be written: %s" % (error.filename, error.strerror)) from error
            raise
    return lambda: _write_files(tree, old)


def count_fitting(tree, patches):
    """How many of the patches fit, each after those before it that do. Writes nothing. Raises Problem."""
    tree = Path(tree)
    fitting = 0
    with tempfile.TemporaryDirectory(prefix="netqueue-") as scratch:
        scratch = Path(scratch)
        _write_files(scratch, _read_files(tree, sorted({path for patch in patches for path in patch.paths()})))
        for patch in patches:
            with contextlib.suppress(Problem):
                _apply_one(scratch, patch, "", False, tree)
                fitting += 1
    return fitting


def section_result(section, entry):
    """What a section makes of entry, the (content, executable) of its file or None for none. Raises Problem."""
    with tempfile.TemporaryDirectory(prefix="netqueue-") as scratch:
        scratch = Path(scratch)
        _write_files(scratch, {section.path: entry})
        _apply_one(scratch, Patch(section.path, "", [section]), "", False, scratch)
        return _read_files(scratch, [section.path])[section.path]


def _apply_one(scratch, patch, prefix, reverse, tree):
    diff = patch.diff(prefix)
    if not diff:
        return
    args = ["apply", "--whitespace=nowarn"] + (["--reverse"] if reverse else []) + ["-"]
    try:
        # The ceiling: inside of a repository git apply would skip what is not below its top.
        git(scratch, *args, data=diff, ceiling=scratch.parent)
    except GitError as error:
        raise Problem("%s does not %s %s: %s" % (
            patch.name, "come out of" if reverse else "apply to", tree, explain(error.stderr))) from error


def explain(stderr):
    """Git's reason why a patch does not apply, in one line: "lib/bb/x.py at line 12"."""
    match = re.search(r"error: patch failed: (.+):(\d+)", stderr)
    if match:
        return "%s differs at line %s" % match.groups()
    match = re.search(r"error: ([^\n]+)", stderr)
    return match.group(1) if match else (stderr.strip().splitlines() or ["git gave no reason"])[-1]


def _read_files(folder, paths):
    """{path: (content, executable) or None when there is none}. Raises Problem."""
    files = {}
    for path in paths:
        full = folder / path
        if full.is_symlink() or full.is_dir():
            raise Problem("%s is not a plain file" % full)
        try:
            files[path] = (full.read_bytes(), bool(full.stat().st_mode & 0o100))
        except (FileNotFoundError, NotADirectoryError):
            files[path] = None
        except OSError as error:
            raise Problem("%s cannot be read: %s" % (full, error.strerror)) from error
    return files


def _write_files(folder, files):
    """Write what _read_files gave; removes files (and folders left empty) whose value is None."""
    for path, entry in files.items():
        full = folder / path
        if entry is None:
            remove_file(folder, path)
            continue
        content, executable = entry
        full.parent.mkdir(parents=True, exist_ok=True)
        # Not in place: the file may be a hard link that another tree shares.
        handle, temporary = tempfile.mkstemp(dir=str(full.parent), prefix=".netqueue-")
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(content)
            mode = full.stat().st_mode & 0o666 if full.exists() else 0o644
            os.chmod(temporary, mode | (mode >> 2 & 0o111 if executable else 0))
            os.replace(temporary, full)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise


def remove_file(folder, path):
    """Remove folder/path if it is there, and the folders that it leaves empty but for bytecode."""
    folder = Path(folder)
    with contextlib.suppress(FileNotFoundError):
        (folder / path).unlink()
    parent = (folder / path).parent
    while parent != folder and parent.is_dir():
        if any(child.name != "__pycache__" for child in parent.iterdir()):
            break
        shutil.rmtree(parent)
        parent = parent.parent
