# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""What scripts/rebase does: move a base to a later commit of its branch.

The series is put onto the old commit, rebased onto the new one, and exported
with the new pin; the range-diff of the two is what there is to review. Git
stops at a conflict as it does in any rebase: when that is resolved, the same
call goes on. Nothing of the project is written before all is well.

    for line in move(Path("/src/bitbake"), "origin/master"): print(line)
"""

import json
import re
from pathlib import Path

from netqueue import ROOT, Problem
from netqueue.series import checkout, export
from netqueue.series.checkout import BRANCH, configured, current_branch
from netqueue.series.git import GitError, git, git_ok
from netqueue.series.overrides import MASTER
from netqueue.series.patches import load_base


def move(tree, commit, base=MASTER, project=ROOT, write=True):
    """Rebase the series in a checkout of one part onto commit; return the lines to print. Raises Problem.

    write=False leaves the project as it is. The branch of the series stays checked out.
    """
    pins = load_base(base, project)
    repo = Path(tree).resolve()
    name = _part(repo).name
    pin = pins[name]["commit"]
    new = _commit(repo, commit)
    if pin == new or not git_ok(repo, "merge-base", "--is-ancestor", _commit(repo, pin), new):
        raise Problem("%s: the commit %s is not after %s, which the base %s is at" % (repo, new[:12], pin[:12], base))
    checkout.check_state(repo)
    if not git_ok(repo, "show-ref", "--verify", "--quiet", "refs/heads/" + BRANCH):
        _put_on(repo, pin, project)
    start, tip = (configured(repo, key) for key in ("start", "tip"))
    if current_branch(repo) != BRANCH or start != pin or not tip:
        raise Problem("%s: the branch %s is not checked out, or not made by scripts/apply on %s" % (repo, BRANCH, pin[:12]))
    if not git_ok(repo, "merge-base", "--is-ancestor", new, "HEAD"):
        _rebase(repo, pin, new)
    lines = git(repo, "range-diff", "--no-color", "%s..%s" % (pin, tip), "%s..HEAD" % new).splitlines()
    if not write:
        return lines
    lines += _export(repo, base, name, pin, new, Path(project))
    checkout.remember(repo, git(repo, "rev-parse", "HEAD").strip(), new, new)
    return lines


def _part(repo):
    parts = [part for part in checkout.find_parts(repo) if part.root == repo] if repo.is_dir() else []
    if len(parts) != 1 or not (repo / ".git").exists():
        raise Problem("%s is not a git checkout of bitbake or of openembedded-core" % repo)
    return parts[0]


def _commit(repo, name):
    try:
        return git(repo, "rev-parse", "--verify", "--quiet", "--end-of-options", name + "^{commit}").strip()
    except GitError:
        raise Problem("%s does not have the commit %s" % (repo, name)) from None


def _put_on(repo, pin, project):
    came_from = current_branch(repo) or git(repo, "rev-parse", "HEAD").strip()
    git(repo, "checkout", "--quiet", "--detach", pin)
    try:
        checkout.change(checkout.find_targets(repo, project), reverse=False, dry_run=False)
    except Problem:
        git(repo, "checkout", "--quiet", came_from)
        raise


def _rebase(repo, pin, new):
    try:
        git(repo, "rebase", "--quiet", "--onto", new, pin, BRANCH)
    except GitError as error:
        conflicts = git(repo, "diff", "--name-only", "--diff-filter=U").split("\n")[:-1]
        if not conflicts:
            raise
        stopped = git(repo, "log", "-1", "--format=%s", "REBASE_HEAD").strip()
        raise Problem("%s: conflict in %s (%s): resolve it, git rebase --continue, and call this again"
                      % (repo, " and ".join(conflicts), stopped)) from error


def _export(repo, base, name, pin, new, project):
    path = project / "patches" / "bases.json"
    before = path.read_text(encoding="utf-8")
    path.write_text(_pinned(before, name, pin, new, _part(repo).version), encoding="utf-8")
    try:
        files = export.export_tree(repo, base, project)
    except BaseException:
        path.write_text(before, encoding="utf-8")
        raise
    export.write(files, project)
    part = load_base(base, project)[name]
    lines = ["stale: " + line for line in export.stale_overrides(project)]
    if part.get("pypi", {}).get("version", part.get("version")) != part.get("version"):
        lines.append("the package in patches/bases.json is still %(name)s %(version)s" % part["pypi"])
    return lines + ["%s: %s is at %s now; %s" % (base, name, new[:12], export.summary(files))]


def _pinned(text, name, pin, new, version):
    """The text of bases.json with another commit, and the version in it."""
    value = json.dumps(version.split() if name == "openembedded-core" else version)
    changed, count = re.subn(r'("(?:version|series)": )(?:"[^"]*"|\[[^]]*\])(,\s*"commit": ")%s"' % pin,
                             lambda match: match.group(1) + value + match.group(2) + new + '"', text)
    if count != 1:
        raise Problem("patches/bases.json: no version stands before the commit %s" % pin)
    return changed
