# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""What scripts/format-patch does: write all patches of a base into folders, one for each git repository.

patches/<base>/ has of a base other than master only what differs there. The
folders need nothing else: `git am FOLDER/bitbake/*.patch` takes them, and so
do quilt and kas, for which each has a list of its patches, the file `series`.
kas.yml is for kas alone: a project puts it behind its own file.

    for line in write_folders("scarthgap", Path("/src/patches"), poky=True): print(line)
"""

import re
from pathlib import Path

from netqueue import ROOT, Problem
from netqueue.series.git import git, git_ok
from netqueue.series.patches import PARTS, load_base, load_series

# What kas and quilt look for
LIST = "series"
# The repository without a url is the one that the project's own file is in, where kas looks for the patches.
KAS = "kas.yml"
KAS_HEADER = """\
# The patches of bitbake-netqueue, base %s. If your project names the repositories differently, do it here, too.
header:
  version: 8
repos:
  netqueue-patches:
    layers: {}
"""
KAS_REPOSITORY = """\
  %s:
    patches:
      netqueue:
        repo: netqueue-patches
        path: %s
"""
# Of the names: what the patches have in the folders of patches/
_NUMBER = re.compile(r"^[0-9]{4}-")


def write_folders(base, folder, topics=None, poky=False, project=ROOT):
    """Write the patches of base, and return a line for each folder. Raises Problem.

    topics: only those of these numbers. poky: all for one repository, which has bitbake in a folder.
    """
    pins = load_base(base, project)
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise Problem("%s is there already and not empty" % folder)
    found = {part: load_series(base, part, project, topics) for part in PARTS}
    commits = {part: pins[part]["commit"][:12] for part in PARTS}
    if poky:
        texts = {".": [(patch.name, text_below(patch, "bitbake/" if part == "bitbake" else ""))
                       for part in PARTS for patch in found[part]]}
        made_for = {".": "poky with bitbake %s and openembedded-core %s" % tuple(commits.values())}
    else:
        texts = {part: [(patch.name, patch.text) for patch in found[part]] for part in PARTS if found[part]}
        made_for = {part: "%s %s" % (part, commits[part]) for part in texts}
    if not any(texts.values()):
        raise Problem("no patch of the base %s is in these topics" % base)
    lines = [_write(folder / name, patches, made_for[name]) for name, patches in texts.items()]
    (folder / KAS).write_text(KAS_HEADER % base + "".join(
        KAS_REPOSITORY % ("poky" if poky else name, (_below_top(folder) / name).as_posix()) for name in texts))
    return lines


def _below_top(folder):
    """The path of folder in its git repository; that in the folder which holds it if there is none."""
    folder = folder.resolve()
    if not git_ok(folder, "rev-parse", "--show-toplevel"):
        return Path(folder.name)
    return folder.relative_to(git(folder, "rev-parse", "--show-toplevel").rstrip("\n"))


def text_below(patch, prefix):
    """The text of a patch, with the paths of its files below prefix."""
    return patch.header + "".join(_moved(section, prefix) for section in patch.sections)


def _moved(section, prefix):
    # The file's name stands before the first hunk only
    mark = re.search(r"^(?:@@ |GIT binary patch)", section.text, re.MULTILINE)
    end = mark.start() if mark else len(section.text)
    path, head = section.path, section.text[:end]
    for name in ("diff --git a/%s b/%s\n", "--- a/%s", "+++ b/%s"):
        here, there = (name.replace("%s", text) for text in (path, prefix + path))
        head = head.replace(here, there)
    return head + section.text[end:]


def _write(folder, patches, made_for):
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for number, (name, text) in enumerate(patches, 1):
        # Topics count their patches from 1 each; git am takes them by name
        names.append("%04d-%s" % (number, _NUMBER.sub("", name.rpartition("/")[2])))
        (folder / names[-1]).write_bytes(text.encode("utf-8", "surrogateescape"))
    (folder / LIST).write_text("".join(name + "\n" for name in names))
    return "%s: %d %s for %s" % (folder, len(names), "patch" if len(names) == 1 else "patches", made_for)
