# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""Build directories that restore sstate objects, and bitbake runs in them.

The demo and the system tests call this. A Build is a folder of its own: a
layer with the classes of metadata/ and recipes demo-0001.bb, demo-0002.bb ...,
the configuration, HOME, TMPDIR and SSTATE_DIR. demo-all depends on all
recipes. Hashes do not depend on the folder or on the tree, so one build
can fill the mirror for all others. bitbakerun.py runs bitbake in it.

No openembedded-core is involved.

    with Build(folder, tree, objects=100, mirror=mirror, threads=8) as build:
        result = build.run(["--setscene-only", "demo-all"], timeout=600)
        print(result.returncode, result.presence.seconds, len(build.restored()))
"""

import dataclasses
import os
import shutil
import sys
from pathlib import Path
from typing import Optional

from netqueue import Problem
from netqueue.lab import objects as demo_objects
from netqueue.lab.bitbakerun import Running
from netqueue.lab.certificates import trust
from netqueue.lab.processes import processes_with_home, stop_processes

METADATA = Path(__file__).resolve().parent / "metadata"
HEADER = "# Copyright BitBake Contributors\n# SPDX-License-Identifier: GPL-2.0-only\n\n"
LEVELS = 4


@dataclasses.dataclass
class BuildMirror:
    """What a Build has to know of a mirror that is none of mirror.py or sshd.py."""
    url: str
    ca_file: None = None
    tools: Optional[Path] = None    # a folder that PATH needs to ask it
    home_files: dict = dataclasses.field(default_factory=dict)      # {path below HOME: text} that its programs need


class Build:
    """A build directory for a Tree of trees.py.

    directory      made anew if it is missing, otherwise rewritten (TMPDIR and SSTATE_DIR stay)
    objects        how many recipes demo-NNNN there are; each has one sstate object
    mirror         a mirror of mirror.py, sshd.py or s3server.py, a BuildMirror, or None
    threads        BB_NUMBER_THREADS
    extra_conf     lines for local.conf, which may override everything
    multiconfigs   {name: lines for conf/multiconfig/name.conf}
    recipes        {"name.bb": text}: more recipes, or others in place of demo-NNNN.bb
    environment    variables for bitbake, beside PATH, HOME and what the mirror is known by
    levels         the longest chain of dependencies: a build restores in so many waves
    python         the interpreter that runs bitbake

    target         what restores all of them
    prefix         the words of a program that runs bitbake with less than the caller may, such as prlimit
    """

    target = "demo-all"

    def __init__(self, directory, tree, objects=3, mirror=None, threads=4, extra_conf="",
                 multiconfigs=None, recipes=None, environment=None, levels=LEVELS, python=sys.executable):
        self.directory = Path(directory).resolve()
        self.tree = tree
        self.mirror = mirror
        self.sizes = {"demo-%04d" % number: demo_objects.object_size(number)
                      for number in range(1, objects + 1)}
        self.levels = levels
        self.threads = threads
        self.python = str(python)
        self.extra_conf = extra_conf
        self.multiconfigs = multiconfigs or {}
        self.recipes = recipes or {}
        self.home = self.directory / "home"
        self.sstate = self.directory / "sstate"
        self.tmp = self.directory / "tmp"
        self.layer = self.directory / "layer"
        self.runs = 0
        self.prefix = []
        self.write()
        self.environment = self._environment(environment or {})

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.stop()

    # Files

    def write(self):
        """Write the layer and the configuration, as the attributes say."""
        shutil.rmtree(self.layer, ignore_errors=True)
        shutil.copytree(METADATA, self.layer, ignore=shutil.ignore_patterns("__pycache__"))
        for folder in (self.layer / "lib", self.layer / "recipes", self.home,
                       self.directory / "conf" / "multiconfig"):
            folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(demo_objects.__file__, self.layer / "lib" / "netqueue_objects.py")
        for name, text in {**self._recipe_texts(), **self.recipes}.items():
            (self.layer / "recipes" / name).write_text(text)
        self._write_conf(self.layer)
        for name, text in self.multiconfigs.items():
            (self.directory / "conf" / "multiconfig" / (name + ".conf")).write_text(HEADER + text)

    def _write_conf(self, *layers):
        conf = self.directory / "conf"
        (conf / "bblayers.conf").write_text(
            HEADER + 'BBPATH = "${TOPDIR}"\nBBFILES = ""\nBBLAYERS = "%s"\n' % " ".join(map(str, layers)))
        (conf / "local.conf").write_text(self._local_conf() + self.extra_conf + "\n")

    def _local_conf(self):
        lines = ['BB_NUMBER_THREADS = "%s"' % self.threads]
        if self.mirror is not None:
            lines.append('SSTATE_MIRRORS = "file://.* %s/PATH;downloadfilename=PATH"' % self.mirror.url)
        if self.multiconfigs:
            lines.append('BBMULTICONFIG = "%s"' % " ".join(self.multiconfigs))
        return HEADER + "\n".join(lines) + "\n"

    def _recipe_texts(self):
        names = list(self.sizes)
        texts = {}
        for place, name in enumerate(names):
            texts[name + ".bb"] = (HEADER + 'DEPENDS = "%s"\nDEMO_SIZE = "%d"\n'
                                   % (" ".join(self._dependencies(place, names)), self.sizes[name]))
        texts["demo-all.bb"] = (HEADER + 'DEPENDS = "%s"\n' % " ".join(names)
                                + "deltask populate\ndeltask populate_setscene\n")
        return texts

    def _dependencies(self, place, names):
        """Up to two recipes of the level below."""
        width = max(1, -(-len(names) // self.levels))
        below = [place - width, place - width + 1 - (place + 1) % width]
        return sorted({names[other] for other in below if 0 <= other < place - place % width})

    def _environment(self, more):
        path = self.tree.path_entries + [str(Path(self.python).parent), os.environ.get("PATH", os.defpath)]
        # The ssh and the sftp that know the mirror's key, the aws that counts; tasks and the presence query find them by PATH
        if getattr(self.mirror, "tools", None):
            path.insert(0, str(self.mirror.tools))
        environment = {"PATH": ":".join(path), "HOME": str(self.home), "LC_ALL": "en_US.UTF-8",
                       "TERM": "dumb", "BB_SERVER_TIMEOUT": "0"}
        if self.mirror is not None and self.mirror.ca_file:
            environment.update(trust(self.mirror.ca_file, self.home))
        for name, text in getattr(self.mirror, "home_files", {}).items():
            (self.home / name).parent.mkdir(parents=True, exist_ok=True)
            (self.home / name).write_text(text)
        environment.update(more)
        return environment

    # Runs

    def start(self, arguments):
        """Start bitbake; returns a Running at once."""
        self.runs += 1
        log = self.directory / ("console-%d.log" % self.runs)
        command = [*self.prefix, self.python, str(self.tree.bitbake)] + [str(word) for word in arguments]
        resident = self.environment["BB_SERVER_TIMEOUT"] != "0"
        return Running(command, self.directory, self.environment, log, resident)

    def run(self, arguments, timeout=600, progress=None):
        """Run bitbake to its end. Raises BuildTimeout after so many seconds, with nothing left running.

        progress, if given, is called with the console output so far, twice a second.
        """
        return self.start(arguments).wait(timeout, progress)

    def make_objects(self, progress=None, timeout=3600):
        """Make all objects, in SSTATE_DIR. Raises Problem."""
        result = self.run([self.target], timeout=timeout, progress=progress)
        if result.returncode or len(self.archives()) != len(self.sizes):
            raise Problem("the objects could not be made: bitbake ended with %d" % result.returncode)

    def stop(self):
        """End everything of this build that still runs: a resident server, above all."""
        stop_processes(self.home)

    def processes(self):
        """The ids of the build's processes."""
        return processes_with_home(self.home)

    def clean(self):
        """Remove TMPDIR and SSTATE_DIR: the next run starts with nothing."""
        for folder in (self.tmp, self.sstate, self.directory / "cache"):
            shutil.rmtree(folder, ignore_errors=True)

    # Results

    def restored(self, multiconfig="default"):
        """Names of the recipes whose object was restored, checked byte for byte."""
        names = []
        for name, size in self.sizes.items():
            content = self.tmp / multiconfig / "restored" / name / "content"
            if content.is_file() and content.read_bytes() == demo_objects.object_content(name, size):
                names.append(name)
        return names

    def archives(self):
        """Paths of the archives in SSTATE_DIR."""
        return sorted(self.sstate.glob("??/??/sstate:*.tar.zst"))
