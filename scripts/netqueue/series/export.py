# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""What scripts/export does: write patches/ and bitbake-overlay/ from the commits of a branch.

Of a base other than master, only what differs from master is written: see overrides.py.

The same commits give the same bytes on any machine: author, date and
configuration are fixed, file names and counts of the whole series stay out
of the patches, and the diff has full blob names and no rename detection.
Every patch is read back by git before it is written, so that what is in
patches/ is what `git am` will make of it. The format is git-format-patch's.

    files = export_series(Path("/src/bitbake"), "c251833d2...")   # {"0001-x.patch": b"...", ...}
    overlay = export_overlay(Path("/src/bitbake"), "c251833d2...")
"""

import os
import re
import tempfile
from pathlib import Path

from netqueue import ROOT, Problem
from netqueue.series.checkout import check_clean, find_base, find_parts
from netqueue.series.git import EMAIL, NAME, GitError, git, git_bytes, git_ok
from netqueue.series.overrides import MASTER, RECORD, Record, digest, in_order, key, read_record, stale
from netqueue.series.patches import (PARTS, Patch, load_base, load_bases, load_series, parse_patch, patch_files,
                                     remove_file, section_result, topic_number)

# Of every patch: an edit must not change the head of the others, nor a re-export that of any.
DATE = "Tue, 1 Sep 2026 00:00:00 +0000"

OVERLAY = "bitbake-overlay"
# The cover letter of a topic, which is no commit
COVER = "cover.md"
SUBJECT_LIMIT = 90

_DIFF = ("-p", "--full-index", "--binary", "--no-renames", "--no-ext-diff", "--no-textconv", "--no-color",
         "--diff-algorithm=histogram", "--src-prefix=a/", "--dst-prefix=b/")
_SUBJECT = re.compile(r"[\w./,+{}*-]+(?: ?[\w./,+{}*-]+)*: \S")
_TAG = re.compile(r"(?:[a-z]+(?:-[a-z]+)*-by|cc|fixes|link|closes|change-id|upstream-status|message-id|ai-generated)"
                  r": \S", re.IGNORECASE)


def export_tree(tree, base=None, project=ROOT):
    """{path below the project: (content, executable)} for all parts in tree. Raises Problem.

    base: its name, found by the versions in the tree when not given.
    """
    tree = Path(tree)
    if not tree.is_dir():
        raise Problem("%s is not a folder" % tree)
    if base is not None:
        load_base(base, project)
    parts = find_parts(tree.resolve())
    base = base or find_base(parts, load_bases(project))
    files = {}
    for part in parts:
        _check_checkout(part.root)
        start = load_base(base, project)[part.name]["commit"]
        folder = "patches/%s/%s" % (base, part.name)
        topics = _topics(patch_files(MASTER, part.name, project))
        patches = export_series(part.root, start, topics)
        if not patches and (base != MASTER or any((Path(project) / folder).rglob("*.patch"))):
            raise Problem("%s has no commits after its base %s: is the branch checked out?" % (part.root, start[:12]))
        if base != MASTER:
            patches = export_overrides(part.root, start, patches, load_series(MASTER, part.name, project))
        files[folder] = {name: (content, False) for name, content in patches.items()}
        if part.name == "bitbake":
            files[OVERLAY] = export_overlay(part.root, start)
    if base != MASTER and OVERLAY in files:
        difference = first_difference({OVERLAY: files.pop(OVERLAY)}, project)
        if difference:
            raise Problem("new files are the same on all bases, but " + difference)
    return files


def _check_checkout(root):
    if not (root / ".git").exists():
        raise Problem("%s is not a git checkout of its own" % root)
    check_clean(root)


def _topics(paths):
    """{subject in the name of the file: topic} of patches that were exported before"""
    return {key(path.name): "" if topic_number(path.parent.name) is None else path.parent.name for path in paths}


def export_series(repo, start, topics=None):
    """{path: content} of the commits start..HEAD. Raises Problem.

    A commit goes into the topic that a patch of the same subject is in according to topics, else into that of the
    commit before it.
    """
    if not git_ok(repo, "cat-file", "-e", start + "^{commit}"):
        raise Problem("%s does not have its base, the commit %s" % (repo, start))
    if not git_ok(repo, "merge-base", "--is-ancestor", start, "HEAD"):
        raise Problem("%s: HEAD is not on top of its base, the commit %s" % (repo, start))
    if git(repo, "rev-list", "--merges", start + "..HEAD").strip():
        raise Problem("%s has merge commits after its base: rebase it" % repo)
    files = {}
    topic, number = min((topics or {"": ""}).values()), 0
    for commit in git(repo, "rev-list", "--reverse", start + "..HEAD").split():
        message = git(repo, "log", "-1", "--format=%B", commit).rstrip("\n") + "\n"
        check_message(message, "%s: commit %s" % (repo, commit[:12]))
        name = slug(message) + ".patch"
        before, topic = topic, (topics or {}).get(name, topic)
        if topic < before:
            raise Problem("%s: commit %s is of the topic %s, but comes after those of %s" % (repo, commit[:12], topic, before))
        number = number + 1 if topic == before else 1
        files["%s%04d-%s" % (topic and topic + "/", number, name)] = _patch(repo, commit, message)
    return files


def export_overrides(repo, start, patches, master):
    """{path: content} of what a base has of its own: patches, which export_series() gave, as compared with master's.

    Of a section that makes the same of the file as master's does, nothing is kept. Raises Problem.
    """
    files, record = {}, Record(git(repo, "rev-parse", "HEAD^{tree}").strip())
    commits = dict(zip(patches, git(repo, "rev-list", "--reverse", start + "..HEAD").split()))
    branch = {key(name): name for name in patches}
    order = [key(patch.name) for patch in master if key(patch.name) in branch]
    if order != list(branch):
        wrong = next(name for name, wanted in zip(branch, order + [""]) if name != wanted)
        raise Problem("%s: master has no patch %s, or in another order" % (repo, wrong))
    for patch in master:
        name = key(patch.name)
        ours, commit = Patch(patch.name, patch.header, []), ""
        if name in branch:
            commit = commits[branch[name]]
            ours = parse_patch(patch.name, patches[branch[name]].decode("utf-8", "surrogateescape"))
            if ours.header != patch.header:
                raise Problem("%s: commit %s has another message than in master: %s" % (repo, commit[:12], name))
        own = _own_sections(repo, commit, ours, patch, record)
        if own:
            text = patch.header + "".join(section.text for section in in_order(own))
            files[patch.name.partition("/")[2]] = text.encode("utf-8", "surrogateescape")
    files[RECORD] = record.text().encode()
    return files


def _own_sections(repo, commit, ours, master, record):
    """{path: section} of what commit does and master's patch would not; notes them and the dropped ones in record."""
    name, own = key(master.name), {}
    here, there = ({section.path: section for section in patch.sections} for patch in (ours, master))
    for path in sorted({*here, *there}):
        if path not in here:
            record.dropped.setdefault(name, {})[path] = digest(there[path])
        elif path not in there or not _same(repo, commit, there[path]):
            own[path] = here[path]
            record.own.setdefault(name, {})[path] = digest(there.get(path))
    return own


def _same(repo, commit, section):
    """Whether a section makes of the file before the commit what the commit made of it."""
    before, after = (_entry(repo, at, section.path) for at in (commit + "^", commit))
    try:
        return section_result(section, before) == after
    except Problem:
        return False


def _entry(repo, commit, path):
    listed = git(repo, "ls-tree", commit, "--", path).split()
    return (git_bytes(repo, "cat-file", "blob", listed[2]), listed[0] == "100755") if listed else None


def stale_overrides(project=ROOT):
    """A line for each section of another base that was made from one that master no longer has."""
    lines = []
    for part in PARTS:
        master = load_series(MASTER, part, project)
        for base in load_bases(project):
            if base != MASTER:
                where = "patches/%s/%s" % (base, part)
                lines += stale(master, read_record(Path(project) / where), where)
    return lines


def check_message(message, where):
    """Raises Problem unless the message is as CONTRIBUTING.md says."""
    lines = message.rstrip("\n").split("\n")
    subject = lines[0]
    if re.match(r"(?:fixup|squash|amend)! ", subject):
        raise Problem("%s is a fixup: git rebase --autosquash first (%s)" % (where, subject))
    if len(subject) > SUBJECT_LIMIT:
        raise Problem("%s: its subject has %d characters, at most %d are allowed (%s)"
                      % (where, len(subject), SUBJECT_LIMIT, subject))
    if not _SUBJECT.match(subject):
        raise Problem("%s: its subject is not 'component: summary' (%s)" % (where, subject))
    if len(lines) < 3 or lines[1]:
        raise Problem("%s: after the subject come an empty line and the reason for the change (%s)" % (where, subject))
    for line in lines[1:]:
        if _TAG.match(line):
            raise Problem("%s: tags are added by the person who submits, not here (%s)" % (where, line))


def slug(message):
    """The subject as a part of a file name, as git-format-patch does it."""
    text = re.sub(r"[^A-Za-z0-9._]+", "-", message.split("\n", 1)[0])
    return re.sub(r"\.\.+", ".", text)[:52].strip("-.")


def _patch(repo, commit, message):
    diff = git_bytes(repo, "diff-tree", "--no-commit-id", *_DIFF, commit)
    if not diff:
        raise Problem("%s: commit %s changes nothing" % (repo, commit[:12]))
    subject, body = message.split("\n", 1)
    head = ["From %s Mon Sep 17 00:00:00 2001" % ("0" * 40), "From: %s <%s>" % (NAME, EMAIL), "Date: " + DATE,
            "Subject: [PATCH] " + subject]
    if not message.isascii():
        head += ["MIME-Version: 1.0", "Content-Type: text/plain; charset=UTF-8", "Content-Transfer-Encoding: 8bit"]
    text = ("\n".join(head) + "\n" + body + "---\n\n").encode("utf-8", "surrogateescape") + diff
    _check_survives(text, message, diff, "%s: commit %s" % (repo, commit[:12]))
    return text


def _check_survives(text, message, diff, where):
    """A message can hold lines that git am takes for something else: read the patch as it will."""
    with tempfile.TemporaryDirectory(prefix="netqueue-") as folder:
        try:
            info = git(folder, "mailinfo", "--no-scissors", "message", "diff",
                       data=text.decode("utf-8", "surrogateescape"), ceiling=Path(folder).parent)
        except GitError as error:
            raise Problem("%s cannot be read back as a patch (%s)" % (where, error)) from error
        body = (Path(folder) / "message").read_bytes().decode("utf-8", "surrogateescape")
        read_diff = (Path(folder) / "diff").read_bytes()
    subject = re.search(r"^Subject: (.*)$", info, re.MULTILINE)
    read = (subject.group(1) if subject else "") + "\n\n" + body.strip("\n") + "\n"
    if read != message or read_diff[read_diff.find(b"diff --git "):] != diff:
        raise Problem("%s: git am would read its message in another way: look for lines like headers or a diff" % where)
    parse_patch(where, text.decode("utf-8", "surrogateescape"))


def export_overlay(repo, start):
    """{path: (content, executable)} of the files that the commits start..HEAD add. Raises Problem."""
    files = {}
    listing = git(repo, "diff-tree", "-r", "-z", "--no-renames", "--diff-filter=A", start, "HEAD").split("\0")
    for meta, path in zip(listing[::2], listing[1::2]):
        mode, blob = meta.split()[1], meta.split()[3]
        if mode not in ("100644", "100755"):
            raise Problem("%s: %s is neither a file nor a program" % (repo, path))
        files[path] = (git_bytes(repo, "cat-file", "blob", blob), mode == "100755")
    return files


def first_difference(files, project=ROOT):
    """A line that tells where the project differs from what export_tree gave; None if nowhere."""
    for folder, wanted in sorted(files.items()):
        there = _committed(Path(project) / folder)
        for path in sorted(set(wanted) | set(there)):
            full = "%s/%s" % (folder, path)
            if path not in there:
                return "%s is missing" % full
            if path not in wanted:
                return "%s is not in the branch" % full
            if wanted[path] == there[path]:
                continue
            if wanted[path][0] == there[path][0]:
                return "%s: should %sbe executable" % (full, "" if wanted[path][1] else "not ")
            return "%s, line %s" % (full, _line(there[path][0], wanted[path][0]))
    return None


def _line(there, wanted):
    old, new = (content.decode("utf-8", "replace").split("\n") for content in (there, wanted))
    count = min(len(old), len(new))
    number = next((n for n in range(count) if old[n] != new[n]), count)
    # "end" where one of the two has fewer lines.
    shown = [lines[number] if number < len(lines) else "(end)" for lines in (old, new)]
    return "%d: %r, the branch gives %r" % (number + 1, *shown)


def _committed(folder):
    """{path: (content, executable)} of the files in one exported folder, but for what is written by hand."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts and path.name != COVER:
            found[path.relative_to(folder).as_posix()] = (path.read_bytes(), os.access(path, os.X_OK))
    return found


def write(files, project=ROOT):
    """Make the exported folders hold exactly these files."""
    for folder, wanted in files.items():
        top = Path(project) / folder
        for path in _committed(top):
            remove_file(top, path)
        for path, (content, executable) in wanted.items():
            (top / path).parent.mkdir(parents=True, exist_ok=True)
            (top / path).write_bytes(content)
            (top / path).chmod(0o755 if executable else 0o644)


def summary(files):
    """One line that tells what was exported."""
    counts = ["%s: %d" % (folder, len(content)) for folder, content in files.items()]
    return ", ".join(counts) + (" files" if counts else "")
