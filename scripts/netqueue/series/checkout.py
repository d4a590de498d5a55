# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""What scripts/apply does: find the trees below a folder and their base, put the series on, take it out.

A tree is recognised by its contents, never by its name, and its base by the version
in it: any commit will do on which all patches fit exactly. In a git checkout (a
poky tree is one checkout with both parts) the series becomes the branch
BRANCH, and the branch's configuration keeps where it came from and what was
made, so that taking it out can refuse anything else. A tree that git does
not track gets its files changed. Everything is checked before anything is
written; what fails later is undone, over all trees, in reverse order.

    targets = find_targets(Path("/src/poky"))
    change(targets, reverse=False, dry_run=True)     # raises Problem, or returns lines that tell
"""

import contextlib
import dataclasses
import os
import re
from pathlib import Path
from typing import Dict, List, Optional

from netqueue import ROOT, Problem
from netqueue.series.git import GitError, git, git_ok
from netqueue.series.patches import PARTS, Patch, change_files, count_fitting, explain, load_bases, load_series, remove_file

BRANCH = "netqueue"


class Misfit(Problem):
    """A tree of a release, or at a commit, that there are no patches for"""


_BUSY = {
    "rebase-apply": "a git am or rebase", "rebase-merge": "a rebase", "MERGE_HEAD": "a merge",
    "CHERRY_PICK_HEAD": "a cherry-pick", "REVERT_HEAD": "a revert", "BISECT_LOG": "a bisect",
}


@dataclasses.dataclass
class Part:
    """One of PARTS, in the folder `root`; below the top of its repository if it has a prefix."""
    name: str
    root: Path
    version: str
    repo: Optional[Path] = None
    prefix: str = ""
    patches: List[Patch] = dataclasses.field(default_factory=list)
    pin: str = ""


@dataclasses.dataclass
class Target:
    """What is changed as one: a git repository with its parts, or one part that git does not track."""
    root: Path
    repo: Optional[Path]
    parts: List[Part]
    base: str = ""

    @property
    def count(self):
        return sum(len(part.patches) for part in self.parts)


def find_targets(tree, project=ROOT, topics=None):
    """The targets below tree with their base and its patches; topics: only those of these numbers. Raises Problem."""
    tree = Path(tree)
    if not tree.is_dir():
        raise Problem("%s is not a folder" % tree)
    tree = tree.resolve()
    parts = find_parts(tree)
    base = find_base(parts, load_bases(project))
    targets: Dict[Path, Target] = {}
    for part in parts:
        part.pin = load_bases(project)[base][part.name]["commit"]
        part.patches = load_series(base, part.name, project, topics)
        part.repo = _repository(part)
        if part.repo:
            part.prefix = part.root.relative_to(part.repo).as_posix().strip(".")
        root = part.repo or part.root
        targets.setdefault(root, Target(root, part.repo, [], base)).parts.append(part)
    if not any(part.patches for part in parts):
        raise Problem("the series has no patches for %s of the base %s"
                      % (" and ".join(part.name for part in parts), base))
    return [target for target in targets.values() if target.count]


def find_parts(tree):
    """The bitbake and openembedded-core trees that are tree itself or folders in it, also in a poky there. Raises Problem.

    Also those in its folder layers/, which bitbake-setup makes: a link in there is to a checkout of the user.
    """
    folders = [tree] + sorted(path for path in tree.iterdir() if path.is_dir() and not path.is_symlink())
    if (tree / "layers").is_dir():
        folders += sorted(path.resolve() for path in (tree / "layers").iterdir() if path.is_dir())
    folders += [path / "bitbake" for path in folders[1:] if not (path / "bitbake").is_symlink()]
    folders = list(dict.fromkeys(folders))
    parts = []
    for name, version_of in zip(PARTS, (bitbake_version, oecore_version)):
        found = [Part(name, folder, version_of(folder)) for folder in folders if version_of(folder)]
        if found and found[0].root == tree:
            found = found[:1]
        if len(found) > 1:
            raise Problem("%s holds more than one %s tree (%s and %s): name one"
                          % (tree, name, found[0].root.name, found[1].root.name))
        parts += found
    if not parts:
        raise Problem("%s holds neither a bitbake nor an openembedded-core tree" % tree)
    return parts


def bitbake_version(folder):
    """The version of the bitbake tree in folder; None if it is none."""
    if not (folder / "lib" / "bb" / "runqueue.py").is_file():
        return None
    match = re.search(r'^__version__ = "([^"\n]+)"', _text(folder / "lib" / "bb" / "__init__.py"), re.MULTILINE)
    return match.group(1) if match else None


def oecore_version(folder):
    """The release names of the openembedded-core tree in folder; None if it is none."""
    match = re.search(r'^LAYERSERIES_CORENAMES\s*=\s*"([^"\n]+)"',
                      _text(folder / "meta" / "conf" / "layer.conf"), re.MULTILINE)
    return " ".join(match.group(1).split()) if match else None


def _text(path):
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def find_base(parts, bases):
    """The one base that all parts have. Raises Problem."""
    names = []
    for part in parts:
        matching = [name for name, base in bases.items()
                    if _release(part, _base_version(base, part.name)) == _release(part, part.version)]
        if not matching:
            top = os.path.commonpath([part.root for part in parts])
            raise Misfit("%s: this is %s; bases are %s" % (top, describe(parts), ", ".join(
                "%s (%s)" % (name, " or ".join(_base_version(base, part.name).split())) for name, base in bases.items())))
        names.append(matching[0])
    if len(set(names)) > 1:
        raise Problem("%s is of the base %s but %s of %s: they do not go together"
                      % (parts[0].root, names[0], parts[1].root, names[1]))
    return names[0]


def describe(parts):
    """What the trees are, in words: "poky walnascar with bitbake 2.12.1"."""
    versions = {part.name: part.version for part in parts}
    if any((part.root / "meta-poky").is_dir() for part in parts) and len(parts) == len(PARTS):
        return "poky %s with bitbake %s" % (versions["openembedded-core"], versions["bitbake"])
    return " and ".join("%s %s" % version for version in versions.items())


def _base_version(base, part):
    return base[part]["version"] if part == "bitbake" else " ".join(base[part]["series"])


def _release(part, version):
    """A branch of bitbake counts in the third number"""
    return version.split(".")[:2] if part.name == "bitbake" else version


def _repository(part):
    """The top of the repository that tracks this part, or None."""
    if not any((folder / ".git").exists() for folder in (part.root, *part.root.parents)):
        return None
    top = Path(git(part.root, "rev-parse", "--show-toplevel").rstrip("\n"))
    # A tarball that was unpacked in somebody's repository is not a part of it.
    tracked = "lib/bb/__init__.py" if part.name == "bitbake" else "meta/conf/layer.conf"
    return top if git_ok(part.root, "ls-files", "--error-unmatch", tracked) else None


def change(targets, reverse, dry_run):
    """Put the series on all targets or take it out; return one line for each. Raises Problem."""
    check, act = (check_reverse, _reverse) if reverse else (check_apply, _apply)
    lines = [check(target) for target in targets]
    if dry_run:
        return lines
    with contextlib.ExitStack() as undo:
        for target in targets:
            act(target, undo)
        undo.pop_all()
    return lines


def check_apply(target):
    """Say what applying would do. Raises Problem if it would not work; writes nothing."""
    if target.repo:
        check_state(target.repo)
        if git_ok(target.repo, "show-ref", "--verify", "--quiet", "refs/heads/" + BRANCH):
            if current_branch(target.repo) == BRANCH:
                raise Problem("%s has the series already (it is on the branch %s)" % (target.root, BRANCH))
            raise Problem("%s has a branch %s already: delete or rename it first" % (target.root, BRANCH))
    for part in target.parts:
        _check_new_files(part)
        _check_patches(part)
    where = "on a new branch %s" % BRANCH if target.repo else "on its files (git does not track them)"
    return "%s: %s, base %s, %s" % (target.root, _counts(target), target.base, where)


def _counts(target):
    return " and ".join("%d %s %s" % (len(part.patches), part.name, "patch" if len(part.patches) == 1 else "patches")
                        for part in target.parts)


def _check_new_files(part):
    new = [section.path for patch in part.patches for section in patch.sections if section.is_new]
    for path in new:
        full = part.root / path
        if not (full.exists() or full.is_symlink()):
            continue
        if part.repo and not git_ok(part.root, "ls-files", "--error-unmatch", path):
            raise Problem("%s: the untracked file %s would be overwritten" % (part.root, path))
        raise Problem("%s has the series already (there is %s)" % (part.root, path))


def _check_patches(part):
    try:
        change_files(part.root, part.patches, write=False)
    except Problem as error:
        if _fits(part, reverse=True):
            raise Problem("%s has the series already" % part.root) from None
        raise Misfit("%s%s" % (error, _distance(part))) from error


def nearest_base(tree, project=ROOT):
    """Of which base most patches fit the tree exactly, and how many: a text for users. Raises Problem."""
    parts = find_parts(Path(tree).resolve())
    found = []
    for base in load_bases(project):
        series = [load_series(base, part.name, project) for part in parts]
        counts = [count_fitting(part.root, patches) for part, patches in zip(parts, series)]
        found.append((sum(counts), base, " and ".join("%d of its %d %s patches" % (count, len(patches), part.name)
                                                      for count, patches, part in zip(counts, series, parts))))
    return "the nearest base is %s, of which %s fit exactly; git am -3 of the rest is not promised to work" % max(found)[1:]


def _distance(part):
    """What the checkout is, seen from the commit that the patches were made on; empty if it is that, or is unknown."""
    if not part.repo:
        return ""
    if part.prefix or not git_ok(part.repo, "cat-file", "-e", part.pin + "^{commit}"):
        date = git(part.repo, "log", "-1", "--format=%cs").strip()
        return " (this is %s of %s, the patches are made for %s)" % (part.version, date, part.pin[:12])
    apart = git(part.repo, "rev-list", "--left-right", "--count", part.pin + "...HEAD").split()
    where = ["%s %s %s" % (count, "commit" if count == "1" else "commits", what)
             for count, what in zip(apart, ("before", "after")) if count != "0"]
    return " (this is %s, %s %s)" % (part.version, " and ".join(where), part.pin[:12]) if where else ""


def _fits(part, reverse):
    try:
        change_files(part.root, part.patches, reverse=reverse, write=False)
    except Problem:
        return False
    return True


def _apply(target, undo):
    if not target.repo:
        undo.callback(change_files(target.root, target.parts[0].patches))
        return
    repo = target.repo
    start = git(repo, "rev-parse", "HEAD").strip()
    came_from = current_branch(repo) or start
    undo.callback(_go_back, repo, start, came_from)
    git(repo, "checkout", "--quiet", "-b", BRANCH)
    for part in target.parts:
        _git_am(repo, part)
    remember(repo, git(repo, "rev-parse", "HEAD").strip(), start, came_from)


def remember(repo, tip, start, came_from):
    """Note what the branch of the series is, for configured(): its last commit, its base, and where HEAD was before."""
    for key, value in (("tip", tip), ("start", start), ("from", came_from)):
        git(repo, "config", _key(key), value)


def _key(key):
    # git removes this section together with the branch.
    return "branch.%s.netqueue-%s" % (BRANCH, key)


def _git_am(repo, part):
    args = ["am", "--quiet", "--no-3way", "--keep-cr", "--no-scissors", "--no-message-id", "--no-gpg-sign",
            "--committer-date-is-author-date"]
    if part.prefix:
        args.append("--directory=" + part.prefix)
    for patch in part.patches:
        try:
            git(repo, *args, data=patch.text)
        except GitError as error:
            raise Problem("%s does not apply to %s: %s"
                          % (patch.name, part.root, explain(error.stderr))) from error


def _go_back(repo, start, came_from):
    """Undo _apply at whatever point it stopped. The tree was clean, so nothing of the user's is lost."""
    if current_branch(repo) != BRANCH and not git_ok(repo, "rev-parse", "--verify", "--quiet", "refs/heads/" + BRANCH):
        return
    git_ok(repo, "am", "--abort")
    git(repo, "reset", "--quiet", "--hard", start)
    _switch(repo, start, came_from)
    git_ok(repo, "branch", "--quiet", "-D", BRANCH)


def _switch(repo, start, came_from):
    if came_from != start and git_ok(repo, "show-ref", "--verify", "--quiet", "refs/heads/" + came_from):
        git(repo, "checkout", "--quiet", came_from)
    else:
        git(repo, "checkout", "--quiet", "--detach", start)


def check_reverse(target):
    """Say what taking the series out would do. Raises Problem if it is not as _apply made it."""
    if not target.repo:
        for part in target.parts:
            _check_patches_out(part)
        return "%s: %s taken out of its files" % (target.root, _counts(target))
    repo = target.repo
    if current_branch(repo) != BRANCH:
        raise Problem("%s is not on the branch %s: the series is not applied" % (repo, BRANCH))
    tip, start, came_from = (configured(repo, key) for key in ("tip", "start", "from"))
    if not (tip and start and came_from):
        raise Problem("%s: the branch %s was not made by scripts/apply" % (repo, BRANCH))
    head = git(repo, "rev-parse", "HEAD").strip()
    if head != tip:
        extra = git(repo, "rev-list", "--count", "%s..%s" % (tip, head)).strip()
        if extra != "0" and git_ok(repo, "merge-base", "--is-ancestor", tip, head):
            raise Problem("%s: the branch %s has commits of yours on top (%s): it is left as it is"
                          % (repo, BRANCH, extra))
        raise Problem("%s: the branch %s is no longer what scripts/apply made: it is left as it is" % (repo, BRANCH))
    check_state(repo)
    back = came_from if came_from != start else "the commit " + start[:12]
    # There may be some topics only
    count = git(repo, "rev-list", "--count", "%s..%s" % (start, head)).strip()
    return "%s: %s patches taken out, back on %s" % (repo, count, back)


def _check_patches_out(part):
    try:
        change_files(part.root, part.patches, reverse=True, write=False)
    except Problem:
        if _fits(part, reverse=False):
            raise Problem("%s does not have the series" % part.root) from None
        raise


def _reverse(target, undo):
    if not target.repo:
        undo.callback(change_files(target.root, target.parts[0].patches, reverse=True))
        return
    repo = target.repo
    tip, start, came_from = (configured(repo, key) for key in ("tip", "start", "from"))
    undo.callback(_restore_branch, repo, tip, start, came_from)
    _switch(repo, start, came_from)
    git(repo, "branch", "--quiet", "-D", BRANCH)
    for part in target.parts:
        for patch in part.patches:
            for section in patch.sections:
                # Bytecode of modules that are gone; git leaves it, and the folder with it.
                folder = (part.root / section.path).parent
                if section.is_new and folder.is_dir() and not (part.root / section.path).exists():
                    remove_file(part.root, section.path)


def _restore_branch(repo, tip, start, came_from):
    git(repo, "checkout", "--quiet", "-B", BRANCH, tip)
    remember(repo, tip, start, came_from)


def configured(repo, key):
    """What remember() has noted; empty if nothing"""
    with contextlib.suppress(GitError):
        return git(repo, "config", "--get", _key(key)).strip()
    return ""


def current_branch(repo):
    """The name of the branch that is checked out; empty when HEAD is detached."""
    with contextlib.suppress(GitError):
        return git(repo, "symbolic-ref", "--quiet", "--short", "HEAD").strip()
    return ""


def check_state(repo):
    """Raises Problem unless the checkout has a commit, no local changes and nothing half done."""
    if not git_ok(repo, "rev-parse", "--verify", "--quiet", "HEAD^{commit}"):
        raise Problem("%s has no commit" % repo)
    git_dir = repo / git(repo, "rev-parse", "--git-dir").rstrip("\n")
    for name, what in _BUSY.items():
        if (git_dir / name).exists():
            raise Problem("%s: %s is in progress: finish or abort it first" % (repo, what))
    if (git_dir / "index.lock").exists():
        raise Problem("%s: another git command is running (there is index.lock)" % repo)
    check_clean(repo)


def check_clean(repo):
    """Raises Problem if a file that git tracks has been changed."""
    changed = git(repo, "status", "--porcelain", "-z", "--untracked-files=no", "--ignore-submodules=none").split("\0")
    if changed[0]:
        raise Problem("%s has local changes (%s): commit or stash them first" % (repo, changed[0][3:]))
