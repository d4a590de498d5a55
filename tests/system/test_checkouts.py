# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""On checkouts of upstream: bitbake's own tests, and a build with openembedded-core's real classes.

The user's checkouts are cloned at the pinned commit and not written to. These
take minutes.
"""

import os
import re
import subprocess
import sys

import pytest

from netqueue import ROOT, environment
from netqueue.layer import HEADER
from netqueue.running import Running, stop_processes
from netqueue.series import load_bases, patch_files
from netqueue.trees import checkout
from series.synthetic import run
from series.test_checkouts import clone
from system.observe import damaged, problems, snapshot, summary

pytestmark = [pytest.mark.system, pytest.mark.checkout, pytest.mark.timeout(1500)]

PINS = load_bases()["master"]
SELFTESTS = ["bb.tests.runqueue", "bb.tests.fetch"]
SELFTEST_SECONDS = 1200
BUILD_SECONDS = 600
RECIPES = 30
# What is fetched ahead of its task takes no slot
LIMITED = 'BB_NUMBER_NETWORK_THREADS = "2"\nBB_SETSCENE_PREFETCH = "0"\n'
# Some tests commit without saying who they are, and one forgets that BB_SKIP_NETTESTS is set
GITCONFIG = """
[user]
name = test
email = test@example.com
[protocol]
allow = never
[protocol "file"]
allow = always
"""


@pytest.fixture(scope="module", autouse=True)
def needs_locale():
    """Unlike the launchers of the tree from the package, upstream's programs do not run without it"""
    if not environment.has_locale():
        pytest.skip("the locale %s is missing" % environment.LOCALE)


def cloned(folder, part, source, patched):
    tree = clone(source, folder / ("%s-%s" % (part, "patched" if patched else "stock")), part)
    if patched and patch_files("master", part):
        done = run("apply", tree, project=ROOT)
        assert done.returncode == 0, done.stderr
    return tree


@pytest.fixture(scope="module")
def bitbakes(bitbake_checkout, tmp_path_factory):
    """{"stock": path, "patched": path}"""
    folder = tmp_path_factory.mktemp("bitbakes")
    return {name: cloned(folder, "bitbake", bitbake_checkout, name == "patched") for name in ("stock", "patched")}


@pytest.fixture(scope="module")
def oecores(oecore_checkout, tmp_path_factory):
    folder = tmp_path_factory.mktemp("oecores")
    return {name: cloned(folder, "openembedded-core", oecore_checkout, name == "patched")
            for name in ("stock", "patched")}


def search_path(tree):
    return ":".join([str(tree / "bin"), os.path.dirname(sys.executable), os.environ["PATH"]])


# bitbake's own tests

def test_selftests(bitbakes, tmp_path):
    """Each test has the same outcome on both trees, and those that the series brings pass."""
    own = sorted("bb.tests." + path.stem for path in (bitbakes["patched"] / "lib" / "bb" / "tests").glob("*.py")
                 if not (bitbakes["stock"] / "lib" / "bb" / "tests" / path.name).exists())
    running = {name: selftest(tree, tmp_path / name, SELFTESTS + (own if name == "patched" else []))
               for name, tree in bitbakes.items()}
    try:
        outcomes = {name: ended(process, tmp_path / name) for name, process in running.items()}
    finally:
        for name in bitbakes:
            stop_processes(tmp_path / name / "home")
    for module in SELFTESTS:
        assert [test for test, outcome in outcomes["stock"].items() if module in test and outcome == "ok"]
    new = {test: outcome for test, outcome in outcomes["patched"].items() if test not in outcomes["stock"]}
    assert not own or new
    assert set(new.values()) <= {"ok"}
    assert {test: outcomes["patched"].get(test) for test in outcomes["stock"]} == outcomes["stock"]


def selftest(tree, folder, modules):
    folder.mkdir()
    (folder / "home").mkdir()
    (folder / "tmp").mkdir()
    environment = {"PATH": search_path(tree), "HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp"),
                   "LC_ALL": "en_US.UTF-8", "BB_SKIP_NETTESTS": "yes", "PYTHONDONTWRITEBYTECODE": "1"}
    (folder / "home" / ".gitconfig").write_text(GITCONFIG)
    with open(folder / "output", "wb") as output:
        return subprocess.Popen([sys.executable, str(tree / "bin" / "bitbake-selftest"), "-v", *modules],
                                cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=output,
                                stderr=subprocess.STDOUT, start_new_session=True)


def ended(process, folder):
    """{test: outcome}, as unittest -v tells"""
    process.wait(SELFTEST_SECONDS)
    text = (folder / "output").read_text(errors="replace")
    # The first line of a test's description may stand before the dots
    outcomes = dict(re.findall(r"^(test\w+ \([\w.]+\))(?:\n.*)? \.\.\. (ok|FAIL|ERROR|skipped|expected failure)",
                               text, re.MULTILINE))
    ran = re.search(r"^Ran (\d+) tests", text, re.MULTILINE)
    assert ran and len(outcomes) == int(ran.group(1)), text[-5000:]
    return outcomes


# A build with openembedded-core's classes

CLASS = """
# Recipes of some tasks with sstate, that need no compiler and no other recipe
LICENSE = "MIT"
SUMMARY = "${PN}"
INHIBIT_DEFAULT_DEPS = "1"
PATCHDEPENDENCY = ""
NQ_SIZE ?= "4096"
inherit deploy nopackages
do_populate_lic[noexec] = "1"
do_compile() {
    head -c ${NQ_SIZE} /dev/urandom > ${B}/blob
}
do_deploy() {
    install -m 0644 ${B}/blob ${DEPLOYDIR}/${PN}.blob
}
addtask deploy after do_compile
deltask do_populate_sysroot
python () {
    for task in bb.build.listtasks(d):
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
do_build[depends] = "%s"
"""

CONF = """
MACHINE = "qemux86-64"
DISTRO = "nodistro"
INHERIT:remove = "sanity uninative"
BB_NUMBER_THREADS = "8"
PACKAGE_CLASSES = "package_ipk"
BB_HASHSERVE = ""
BB_SIGNATURE_HANDLER = "OEBasicHash"
BBMASK = "%(oecore)s/meta/recipes-"
CONNECTIVITY_CHECK_URIS = ""
PATCHDEPENDENCY = ""
WARN_QA:remove = "license-format"
ASSUME_PROVIDED += "virtual/fakeroot-native quilt-native pseudo-native patch-replacement-native"
TMPDIR = "${TOPDIR}/tmp"
SSTATE_DIR = "${TOPDIR}/sstate"
DL_DIR = "${TOPDIR}/downloads"
SSTATE_MIRRORS = "%(mirrors)s"
"""


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(HEADER + text)


def write_layer(layer):
    names = ["nq-%04d" % number for number in range(RECIPES)]
    write(layer / "conf" / "layer.conf", """
BBPATH .= ":${LAYERDIR}"
BBFILES += "${LAYERDIR}/recipes/*.bb"
BBFILE_COLLECTIONS += "nq"
BBFILE_PATTERN_nq = "^${LAYERDIR}/"
LAYERSERIES_COMPAT_nq = "%s"
""" % " ".join(PINS["openembedded-core"]["series"]))
    write(layer / "classes" / "nq.bbclass", CLASS)
    for place, name in enumerate(names):
        size = 1 << 20 if place % 15 == 7 else 4096 + place
        write(layer / "recipes" / (name + ".bb"), 'NQ_SIZE = "%d"\ninherit nq\n' % size)
    write(layer / "recipes" / "nq-all.bb", ALL % " ".join(name + ":do_deploy" for name in names))


def bitbake(folder, tree, oecore, layer, mirror, *arguments, conf=""):
    """Run bitbake in folder, made for this"""
    mirrors = "file://.* %s/PATH;downloadfilename=PATH" % mirror.url if mirror else ""
    write(folder / "conf" / "local.conf", CONF % {"oecore": oecore, "mirrors": mirrors} + conf)
    write(folder / "conf" / "bblayers.conf",
          'BBPATH = "${TOPDIR}"\nBBFILES = ""\nBBLAYERS = "%s/meta %s"\n' % (oecore, layer))
    (folder / "home").mkdir(exist_ok=True)
    environment = {"PATH": search_path(tree), "HOME": str(folder / "home"), "LC_ALL": "en_US.UTF-8", "TERM": "dumb",
                   "BBPATH": str(folder), "BB_SERVER_TIMEOUT": "0"}
    command = [sys.executable, str(checkout(tree).bitbake), *arguments]
    result = Running(command, folder, environment, folder / "console.log", resident=False).wait(BUILD_SECONDS)
    missing = re.search(r"specified by HOSTTOOLS\) appear to be unavailable.*\n(.*)", result.output)
    if missing:
        pytest.skip("openembedded-core needs programs that are missing:%s" % missing.group(1))
    assert (result.returncode, result.left) == (0, 0), result.output
    return result


def test_real_classes(bitbakes, oecores, serve_nginx, tmp_path):
    layer = tmp_path / "meta-nq"
    write_layer(layer)
    bitbake(tmp_path / "fill", bitbakes["stock"], oecores["stock"], layer, None, "nq-all")
    files = tmp_path / "fill" / "sstate"
    server = serve_nginx(files)
    outputs, summaries, left, counters = {}, {}, {}, {}
    for name in ("stock", "patched", "limited"):
        server.reset()
        folder = tmp_path / name
        tree = "stock" if name == "stock" else "patched"
        result = bitbake(folder, bitbakes[tree], oecores[tree], layer, server, "--setscene-only", "nq-all",
                         conf=LIMITED if name == "limited" else "")
        outputs[name] = result.output
        counters[name] = server.counters()
        summaries[name] = re.findall(r"^(?:.*\.\.\.)?(Sstate summary: .*)$", result.output, re.MULTILINE)
        # The class touches what it unpacks. Stock's query makes folders, with another mode than its tasks.
        left[name] = {path: (entry.mode, entry.digest) for path, entry in snapshot(folder / "sstate").items()
                      if entry.digest}
    assert len(summaries["stock"]) == 1 and "Missed 0" in summaries["stock"][0]
    assert len(left["stock"]) > RECIPES
    assert counters["stock"].connections > 3 * RECIPES
    for name in ("patched", "limited"):
        assert summaries[name] == summaries["stock"]
        assert left[name] == left["stock"]
        assert damaged(tmp_path / name / "sstate", files) == []
        # They name the folder of the layer
        assert len(problems(outputs[name])) == len(problems(outputs["stock"]))
        assert summary(outputs[name]).connections == counters[name].connections <= 4
        assert summary(outputs[name]).requests == counters[name].requests
    assert "Network tasks" not in outputs["patched"]
    assert "NOTE: Network tasks: at most 2 of 2 at a time" in outputs["limited"]
