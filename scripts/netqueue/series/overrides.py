# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""What a base other than master has of its own: the sections of master's patches that do not fit there.

patches/<base>/<part>/ holds patches of master's names and messages with only
those sections, and overrides.json, which a Record is made from:

    {"tree": "the git tree that the series makes of the pinned commit",
     "own": {"runqueue-Use-it.patch": {"lib/bb/runqueue.py": "digest of master's section, null if it has none"}},
     "dropped": {"wget-Do-less.patch": {"lib/bb/fetch2/wget.py": "digest of master's section"}}}

A patch is known by its file's name without the number, so that one more patch
in master changes nothing here. patches.load_series() calls merge(); export.py
makes records and asks which are stale. Sections are as in patches.py.
"""

import dataclasses
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Dict, Optional

from netqueue import Problem

MASTER = "master"
RECORD = "overrides.json"


@dataclasses.dataclass
class Record:
    """The content of an overrides.json; own and dropped: {key(patch): {path: digest}}"""
    tree: str = ""
    own: Dict[str, Dict[str, Optional[str]]] = dataclasses.field(default_factory=dict)
    dropped: Dict[str, Dict[str, Optional[str]]] = dataclasses.field(default_factory=dict)

    def text(self):
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True) + "\n"


def read_record(folder):
    """The Record in the folder patches/<base>/<part>; an empty one if it has none. Raises Problem."""
    path = Path(folder) / RECORD
    try:
        record = Record(**json.loads(path.read_text(encoding="utf-8")))
        for paths in [*record.own.values(), *record.dropped.values()]:
            paths.items()
        return record
    except FileNotFoundError:
        return Record()
    except OSError as error:
        raise Problem("%s: %s" % (path, error.strerror)) from error
    except (ValueError, TypeError, AttributeError) as error:
        raise Problem("%s is not what it should be: %r" % (path, error)) from error


def key(name):
    """What tells a patch from the others of its part: its file's name without the number."""
    return name.rpartition("/")[2][5:]


def digest(section):
    """Of what a section changes, wherever in the file that is. None for no section."""
    if section is None:
        return None
    text = re.sub(r"^index .*\n", "", section.text, count=1, flags=re.MULTILINE)
    text = re.sub(r"^@@ -[0-9,]+ \+[0-9,]+ @@.*$", "@@", text, flags=re.MULTILINE)
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def in_order(sections):
    """A patch's sections as git orders them."""
    return [sections[path] for path in sorted(sections, key=os.fsencode)]


def merge(master, own, record, where):
    """Master's patches with a base's own sections for theirs, and without what it drops. Raises Problem."""
    added = {key(patch.name): patch.sections for patch in own}
    if {name: {section.path for section in sections} for name, sections in added.items()} != {
            name: set(paths) for name, paths in record.own.items()}:
        raise Problem("%s does not list the sections that the patches beside it have" % (Path(where) / RECORD))
    unknown = sorted({*record.own, *record.dropped} - {key(patch.name) for patch in master})
    if unknown:
        raise Problem("%s: master has no patch %s" % (Path(where) / RECORD, unknown[0]))
    merged = []
    for patch in master:
        name = key(patch.name)
        sections = {section.path: section for section in patch.sections if section.path not in record.dropped.get(name, ())}
        sections.update({section.path: section for section in added.get(name, ())})
        if sections:
            merged.append(dataclasses.replace(patch, sections=in_order(sections)))
    return merged


def stale(master, record, where):
    """A line for each override whose section in master is no longer the one that it was made from."""
    now = {key(patch.name): {section.path: section for section in patch.sections} for patch in master}
    for overrides in (record.own, record.dropped):
        for name, paths in sorted(overrides.items()):
            for path, old in sorted(paths.items()):
                if name not in now:
                    yield "%s: %s: master has no such patch" % (where, name)
                elif digest(now[name].get(path)) != old:
                    yield "%s: %s: %s has changed in master since its override was made" % (where, name, path)
