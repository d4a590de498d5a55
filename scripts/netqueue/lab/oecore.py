# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""Builds with the classes of openembedded-core.

OEBuild is one of recipes that need no compiler, no source and no other recipe.
TargetBuild is one of openembedded-core's own recipes: their objects are made up,
since it is only about restoring them.

`scripts/bench build --real-classes` and the tests of checkouts call this. The
user's checkouts are cloned at the pinned commit and not written to.

    trees = {"stock": clones(folder, sources_of_environment(), patched=False), ...}
    with OEBuild(folder, trees["stock"], objects=30) as build:      # otherwise as Build of build.py
        build.run(["demo-all"])
"""

import os
import re
import subprocess
import tempfile
from pathlib import Path

from netqueue import Problem
from netqueue.lab import objects
from netqueue.lab.build import HEADER, Build, BuildMirror
from netqueue.lab.trees import checkout as bitbake_tree
from netqueue.series import checkout
from netqueue.series.git import git, git_ok
from netqueue.series.patches import load_base, load_series

BASE = "master"
VARIABLES = {"bitbake": "BITBAKEDIR", "openembedded-core": "OECOREDIR"}
MACHINE = "qemux86-64"
SECONDS = 3600

CLASS = """
# A recipe with one sstate object
LICENSE = "MIT"
SUMMARY = "${PN}"
INHIBIT_DEFAULT_DEPS = "1"
PATCHDEPENDENCY = ""
inherit deploy nopackages
do_populate_lic[noexec] = "1"
do_compile() {
    head -c ${DEMO_SIZE} /dev/urandom > ${B}/blob
}
do_deploy() {
    install -m 0644 ${B}/blob ${DEPLOYDIR}/${PN}.blob
}
addtask deploy after do_compile
deltask do_populate_sysroot
deltask do_recipe_qa
deltask do_deploy_source_date_epoch
python () {
    for task in d.getVar("__BBTASKS", False) or []:
        d.setVarFlag(task, "depends", "")
        d.delVarFlag(task, "fakeroot")
}
"""

ALL = """
LICENSE = "MIT"
INHIBIT_DEFAULT_DEPS = "1"
inherit nopackages
deltask do_populate_sysroot
deltask do_install
deltask do_patch
deltask do_unpack
deltask do_populate_lic
deltask do_recipe_qa
deltask do_deploy_source_date_epoch
do_build[depends] = "%s"
"""

CONF = """
MACHINE = "%s"
DISTRO = "nodistro"
INHERIT:remove = "sanity uninative create-spdx"
PACKAGE_CLASSES = "package_ipk"
BB_HASHSERVE = ""
BB_SIGNATURE_HANDLER = "OEBasicHash"
CONNECTIVITY_CHECK_URIS = ""
WARN_QA:remove = "license-format"
TMPDIR:forcevariable = "${TOPDIR}/tmp"
CACHE = "${TOPDIR}/cache"
SSTATE_DIR = "${TOPDIR}/sstate"
DL_DIR = "${TOPDIR}/downloads"
"""

# What the object of a task has: the folders that the class installs from. The first of populate_sysroot is that of
# native and cross recipes.
FOLDERS = {"populate_sysroot": ("recipe-sysroot-native", "sysroot-destdir"), "populate_lic": ("license-destdir",),
           "package": ("package", "packages-split", "pkgdata"), "packagedata": ("pkgdata-pdata-input",),
           "package_write_ipk": ("deploy-ipks",), "deploy_source_date_epoch": ("source-date-epoch",),
           "stash_locale": ("stashed-locale",), "deploy": ("deploy-%s",)}
SIGINFO_SIZE = 8192
# RFC 8878, 3.1.2: zstd accepts what follows
SKIPPABLE_FRAME = b"\x50\x2a\x4d\x18"
# What its file name says after the hash
OBJECT = re.compile(r".*/sstate:([^:]+):.*:[0-9a-f]{64}_(\w+)\.tar\.zst")

# Without any recipe of openembedded-core
OWN_CONF = """
BBMASK = "%s/recipes-"
PATCHDEPENDENCY = ""
ASSUME_PROVIDED += "virtual/fakeroot-native quilt-native pseudo-native patch-replacement-native"
"""

LAYER = """
BBPATH .= ":${LAYERDIR}"
BBFILES += "${LAYERDIR}/recipes/*.bb"
BBFILE_COLLECTIONS += "demo"
BBFILE_PATTERN_demo = "^${LAYERDIR}/"
LAYERSERIES_COMPAT_demo = "%s"
"""


class MissingPrograms(Problem):
    """openembedded-core needs programs that this machine does not have"""


def sources_of_environment():
    """{part: the checkout that its variable names}. Raises Problem if one is missing."""
    sources = {}
    for part, variable in VARIABLES.items():
        if not os.environ.get(variable):
            raise Problem("%s is not set: it names a git checkout of %s" % (variable, part))
        sources[part] = Path(os.environ[variable]).resolve()
    return sources


def clone(source, target, part, base=BASE):
    """A clone of a checkout at the base's pinned commit, which borrows its objects. Raises Problem."""
    pin = load_base(base)[part]["commit"]
    if not git_ok(source, "cat-file", "-e", pin + "^{commit}"):
        raise Problem("%s is no git checkout of %s that has the commit %s" % (source, part, pin))
    git(target.parent, "clone", "--quiet", "--shared", "--no-checkout", str(source), str(target))
    git(target, "checkout", "--quiet", "-b", "base", pin)
    return target


def clones(folder, sources, patched, base=BASE, topics=None):
    """A Tree with clones of sources below folder, at the pins of base, and the series (or these topics) on them if patched."""
    folder.mkdir()
    paths = {part: clone(source, folder / part, part, base) for part, source in sources.items()}
    for part, path in paths.items():
        if patched and load_series(base, part):
            checkout.change(checkout.find_targets(path, topics=topics), reverse=False, dry_run=False)
    tree = bitbake_tree(paths["bitbake"])
    tree.oecore = paths.get("openembedded-core")
    return tree


class OEBuild(Build):
    """As Build, of trees that clones() has returned."""
    # Whether there are only our own recipes
    own = True

    def write(self):
        for name, text in {"conf/layer.conf": LAYER % checkout.oecore_version(self.tree.oecore),
                           "classes/demo.bbclass": CLASS}.items():
            self._write(self.layer / name, text)
        for name, text in self._recipe_texts().items():
            self._write(self.layer / "recipes" / name, text)
        for folder in (self.home, self.directory / "conf"):
            folder.mkdir(exist_ok=True)
        self._write_conf(self.tree.oecore / "meta", self.layer)

    def _local_conf(self):
        return super()._local_conf() + CONF % MACHINE + (OWN_CONF % (self.tree.oecore / "meta") if self.own else "")

    @staticmethod
    def _write(path, text):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(HEADER + text)

    def _recipe_texts(self):
        texts = {name + ".bb": 'DEMO_SIZE = "%d"\ninherit demo\n' % size for name, size in self.sizes.items()}
        texts["demo-all.bb"] = ALL % " ".join(name + ":do_deploy" for name in self.sizes)
        return texts

    def run(self, arguments, timeout=600, progress=None):
        """As Build.run(). Raises MissingPrograms, too."""
        result = super().run(arguments, timeout, progress)
        missing = re.search(r"specified by HOSTTOOLS\) appear to be unavailable.*\n(.*)", result.output)
        if missing:
            raise MissingPrograms("openembedded-core needs programs that are missing: %s" % missing.group(1).strip())
        return result

    def restored(self, multiconfig="default"):
        """Names of the recipes whose object was restored and has its length."""
        deployed = self.tmp / "deploy" / "images" / MACHINE
        return [name for name, size in self.sizes.items()
                if (deployed / (name + ".blob")).is_file() and (deployed / (name + ".blob")).stat().st_size == size]


class TargetBuild(OEBuild):
    """As OEBuild, of a target of openembedded-core with all of its recipes."""
    own = False

    def __init__(self, directory, tree, target, **options):
        self.target = target
        super().__init__(directory, tree, objects=0, **options)

    def make_objects(self, progress=None, timeout=SECONDS):
        """Make up the objects that the target needs, in SSTATE_DIR. Raises Problem if they cannot be restored."""
        arguments = ["--setscene-only", self.target]
        result = self.run(["-DD", *arguments], timeout=timeout, progress=progress)
        if result.returncode:
            raise Problem("bitbake %s ended with %d" % (self.target, result.returncode))
        made = self.directory / "made-up"
        names = sorted(set(re.findall(r"didn't find file %s/(\S+)" % re.escape(str(self.sstate)), result.output)))
        for number, name in enumerate(names):
            make_up(made / name, objects.object_size(number))
        # Not all of them are installed: those that are leave a link
        self.mirror = BuildMirror("file://%s" % made)
        self.write()
        result = self.run(arguments, timeout=timeout, progress=progress)
        for path in self.sstate.rglob("sstate:*"):
            path.resolve().rename(path)
        restored, archives = len(self.restored()), len(self.archives())
        if result.returncode or not archives or archives != restored:
            raise Problem("made-up objects of %s could not be restored: bitbake ended with %d, and restored %d of %d" %
                          (self.target, result.returncode, restored, archives))

    def restored(self, multiconfig="default"):
        """The names of the manifests of what was restored."""
        return sorted(path.name for path in (self.tmp / "sstate-control").glob("manifest-*"))

    def archives(self):
        """As Build.archives(). Native ones are in a folder of their own."""
        return sorted(self.sstate.rglob("sstate:*.tar.zst"))


def make_up(path, size):
    """An object with folders that have a file of so many bytes each, and its siginfo. Raises Problem."""
    match = OBJECT.fullmatch(str(path))
    if not match:
        raise Problem("%s is not the name of an object" % path.name)
    recipe, task = match.groups()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as content:
        for folder in FOLDERS.get(task, ()):
            file = Path(content, folder % recipe if "%" in folder else folder, "usr/share/made-up", "%s.%s" % (recipe, task))
            file.parent.mkdir(parents=True)
            file.write_bytes(objects.object_content(recipe + task, size))
        subprocess.run(["tar", "--zstd", "-cf", str(path), "-C", content, "."], check=True)
    siginfo = SKIPPABLE_FRAME + SIGINFO_SIZE.to_bytes(4, "little") + objects.object_content(recipe + task, SIGINFO_SIZE)
    Path("%s.siginfo" % path).write_bytes(siginfo)
