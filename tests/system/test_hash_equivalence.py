# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""Builds with a hash equivalence server whose hashes change while objects are fetched ahead, beside stock's.

TOP depends on FIRST and OTHER, SLOW on FIRST, and TOP's setscene task comes after SLOW's. If one of the lower ones is changed
without a change of what it makes, it has no object, nor has what depends on it, so it is built. Then it reports to the
server, gets its former hash, and so do the others, whose objects are found and fetched while the build runs.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import threading
import urllib.parse

import pytest

from netqueue import environment
from netqueue.lab.build import Build
from netqueue.lab.oecore import clones
from netqueue.lab.objects import object_size
from system.observe import SECONDS, add_class, damaged, names, outcome, snapshot, unfinished, wait_until
from system.peer import CLOSE, FaultyMirror, send_part
from system.test_prefetch import TELL, started_with
from system.test_processes import UNBUFFERED

pytestmark = [pytest.mark.system, pytest.mark.checkout]

VARIANTS = ("stock", "patched")
FIRST, OTHER, TOP, SLOW = ("demo-%04d" % number for number in range(1, 5))

# A task waits as long as there is a file closed-RECIPE. EQUIVALENCE_UPLOAD names a folder into which FIRST's object is
# moved, as by who builds for a mirror.
EQUIVALENCE = """
EQUIVALENCE_REPORT ?= "1"
EQUIVALENCE_UPLOAD ?= ""
do_populate[prefuncs] += "wait_until_open report_equivalence"
do_populate[postfuncs] += "upload_object"
do_populate_setscene[prefuncs] += "wait_until_open"

python wait_until_open() {
    import time
    for _ in range(1200):
        if not os.path.exists(d.expand("${TOPDIR}/closed-${PN}")):
            return
        time.sleep(0.05)
    bb.fatal("not opened")
}

def sstate_output_hash(path, sigfile, task, d):
    import hashlib
    return hashlib.sha256(d.getVar("PN").encode()).hexdigest()

python report_equivalence() {
    if d.getVar("EQUIVALENCE_REPORT") == "1":
        bb.parse.siggen.report_unihash(d.getVar("WORKDIR"), "populate", d)
}

python upload_object() {
    name, folder = sstate_name(d), d.getVar("EQUIVALENCE_UPLOAD")
    if folder and d.getVar("PN") == "demo-0001":
        bb.utils.mkdirhier(os.path.dirname(os.path.join(folder, name)))
        for one in (name + ".siginfo", name):
            bb.utils.movefile(os.path.join(d.getVar("SSTATE_DIR"), one), os.path.join(folder, one))
}
"""

CONF = """
INHERIT += "equivalence tell"
BB_HASHSERVE = "%s"
BB_SIGNATURE_HANDLER = "TestEquivHash"
BB_BASEHASH_IGNORE_VARS:append = " EQUIVALENCE_REPORT EQUIVALENCE_UPLOAD"
"""


def recipes(*changed):
    """The recipes, of which some are changed, so that they have another task hash and make the same"""
    texts = {name: 'DEMO_SIZE = "%d"\n' % object_size(number) for number, name in enumerate((FIRST, OTHER, TOP, SLOW), 1)}
    texts[TOP] += 'DEPENDS = "%s %s"\ndo_populate_setscene[depends] = "%s:do_populate_setscene"\n' % (FIRST, OTHER, SLOW)
    texts[SLOW] += 'DEPENDS = "%s"\n' % FIRST
    for name in changed:
        texts[name] += 'CHANGE = "1"\ndo_populate[vardeps] += "CHANGE"\n'
    return {name + ".bb": text for name, text in texts.items()}


def equivalence_build(folder, tree, address, mirror=None, changed=(), extra_conf="", **options):
    build = Build(folder, tree, objects=4, mirror=mirror, recipes=recipes(*changed),
                  extra_conf=CONF % address + extra_conf, environment=UNBUFFERED, **options)
    add_class(build, "equivalence", EQUIVALENCE)
    add_class(build, "tell", TELL)
    return build


@contextlib.contextmanager
def hash_server(tree, folder):
    """A bitbake-hashserv with its database in folder. Yields its address, of a socket that a task without network reaches."""
    folder.mkdir(exist_ok=True)
    address = "unix://%s/socket" % folder
    with open(folder / "log", "w") as log:
        process = subprocess.Popen([sys.executable, str(tree.path / "bin" / "bitbake-hashserv"), "--bind", address,
                                    "--database", str(folder / "hashserv.db"), "--log", "DEBUG"],
                                   stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        wait_until(lambda: process.poll() is not None or "Listening on " in (folder / "log").read_text(),
                   "the hash equivalence server listens")
        assert process.poll() is None, (folder / "log").read_text()
        yield address
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def trees(bitbake_checkout, tmp_path_factory):
    """{"stock": Tree, "patched": Tree}"""
    if not environment.has_locale():
        pytest.skip("the locale %s is missing" % environment.LOCALE)
    folder = tmp_path_factory.mktemp("bitbakes")
    return {name: clones(folder / name, {"bitbake": bitbake_checkout}, name == "patched") for name in VARIANTS}


@pytest.fixture(scope="module")
def filled(trees, tmp_path_factory):
    """
    A folder with the database of a hash server and sstate/: what has been built, and TOP as if OTHER, once it is changed,
    made something else.
    """
    folder = tmp_path_factory.mktemp("filled")
    with hash_server(trees["stock"], folder / "database") as address:
        for changed, conf in (((), ""), ((OTHER,), 'EQUIVALENCE_REPORT = "0"\n')):
            with equivalence_build(folder / "build", trees["stock"], address, changed=changed, extra_conf=conf) as build:
                shutil.rmtree(build.tmp, ignore_errors=True)
                result = build.run(["demo-all"], SECONDS)
                assert result.returncode == 0, result.output
                if not changed:
                    former = set(build.archives())
                    assert len(former) == 4
    for path in set(build.archives()) - former:
        if ":%s:" % OTHER in path.name:
            path.unlink()
    build.sstate.rename(folder / "sstate")
    assert len(list((folder / "sstate").glob("??/??/sstate:%s:*.tar.zst" % TOP))) == 2
    return folder


def variants(filled):
    """The names of TOP's objects: with all hashes as they were, and with OTHER's changed"""
    def created(path):
        return path.stat().st_mtime_ns
    paths = sorted((filled / "sstate").glob("??/??/sstate:%s:*.tar.zst" % TOP), key=created)
    return [str(path.relative_to(filled / "sstate")) for path in paths]


@pytest.fixture
def both(trees, filled, tmp_path):
    """
    Called with a fault, what is changed, and what to do while bitbake runs, runs a stock and a patched build. Returns
    {name: (what is compared, build, mirror)}. Each has a copy of the database and of the mirror's folder, without what
    absent names.
    """
    def make(changed, fault=lambda *_: None, meanwhile=lambda build, server, name: None, absent=(), closed=(),
             targets=("demo-all",), extra_conf="", **options):
        done = {}
        for name in VARIANTS:
            files, database = tmp_path / (name + "-mirror"), tmp_path / (name + "-database")
            shutil.copytree(filled / "sstate", files, copy_function=os.link,
                            ignore=shutil.ignore_patterns(*("sstate:%s:*" % one for one in absent)))
            shutil.copytree(filled / "database", database)
            with hash_server(trees[name], database) as address, FaultyMirror(files, fault, pipelined=False) as server, \
                    equivalence_build(tmp_path / name, trees[name], address, server, changed,
                                      extra_conf=extra_conf % {"mirror": files} if extra_conf else "", **options) as build:
                for one in closed:
                    (build.directory / ("closed-" + one)).touch()
                running = build.start(["-D", *targets])
                try:
                    meanwhile(build, server, name)
                    result = running.wait(SECONDS)
                finally:
                    running.kill()
                assert result.left == 0
                seen = outcome(build, result)
                seen["second"] = build.restored("second")
                seen["archives"] = {path: entry.digest for path, entry in snapshot(build.sstate).items()
                                    if path.endswith(".tar.zst")}
                done[name] = seen, build, server
        return done
    return make


def damaged_of(recipes, build, filled):
    """As damaged(). What was built has a .siginfo of its own."""
    assert all(any(path.rpartition("/")[2].split(":")[1] == name for path in names(build.sstate)) for name in recipes)
    return [name for name in names(build.sstate) if name.rpartition("/")[2].split(":")[1] in recipes
            and (build.sstate / name).read_bytes() != (filled / "sstate" / name).read_bytes()]


def open_gate(build, recipe):
    (build.directory / ("closed-" + recipe)).unlink()


def test_migration(both, filled):
    """FIRST is built, and then the former objects are found, and fetched ahead as those of the beginning are."""
    done = both([FIRST])
    (stock, _, _), (patched, build, server) = (done[name] for name in VARIANTS)
    assert patched == stock
    assert (patched["returncode"], patched["said"], patched["restored"]) == (0, [], [OTHER, TOP, SLOW])
    assert variants(filled)[0] in patched["archives"]
    assert damaged_of([OTHER, TOP, SLOW], build, filled) == [] and unfinished(build.sstate) == []
    assert started_with(build) == dict.fromkeys([OTHER, TOP, SLOW], True)
    assert [len(server.asked("GET", name)) for name in (OTHER, TOP, SLOW)] == [1] * 3


class HalfOf:
    """A fault: of the archive with a name half is sent, and no more"""

    def __init__(self, name):
        self.name = name
        self.waiting = threading.Event()

    def __call__(self, talk, request, body):
        if request.method == "GET" and asks_for(request, self.name):
            send_part(talk, body, len(body) // 2)
            self.waiting.set()
            talk.wait_closed()
            return CLOSE


def asks_for(request, name):
    return urllib.parse.unquote(request.target).lstrip("/") == name


def asked(server, method, name):
    return [request for request in server.requests if request.method == method and asks_for(request, name)]


@pytest.mark.parametrize("whole", [False, True], ids=["half", "whole"])
def test_rehash_while_fetched(whole, both, filled):
    """
    FIRST is built, TOP's object for OTHER's changed hash is found and fetched ahead. When half or all of it has come OTHER is
    built, too, so it is another object that TOP's task installs. Until then the task waits for SLOW's.
    """
    former, meantime = variants(filled)
    half = HalfOf(None if whole else meantime)

    def meanwhile(build, server, name):
        # Stock's task fetches, and it is not started yet
        come = (build.sstate / meantime).exists if whole else half.waiting.is_set
        wait_until(come if name == "patched" else lambda: asked(server, "HEAD", meantime), "TOP's object is found", SECONDS)
        open_gate(build, OTHER)
        wait_until(lambda: asked(server, "HEAD", former), "the mirror is asked for %s" % former, SECONDS)
        open_gate(build, SLOW)

    done = both([FIRST, OTHER], half, meanwhile, closed=[OTHER, SLOW])
    (stock, _, _), (patched, build, server) = (done[name] for name in VARIANTS)
    assert (patched["archives"].pop(meantime, None) is not None) == whole
    patched["names"] = [name for name in patched["names"] if not name.startswith(meantime)]
    assert patched == stock
    assert (patched["returncode"], patched["said"], patched["restored"]) == (0, [], [TOP, SLOW])
    assert former in patched["archives"]
    assert damaged_of([TOP, SLOW], build, filled) == [] and unfinished(build.sstate) == []
    assert started_with(build) == dict.fromkeys([TOP, SLOW], True)
    assert len(asked(server, "GET", former)) == 1


@pytest.mark.parametrize("upload", [False, True], ids=["local", "mirror"])
def test_deferred(upload, both):
    """
    FIRST's object was nowhere when the build began. It is built for one multiconfig, and the task of the other one, which has
    waited for that, installs it: from here, or from the mirror that has been given it.
    """
    done = both([], absent=[FIRST], targets=["demo-all", "mc:second:demo-all"], multiconfigs={"second": ""},
                extra_conf='EQUIVALENCE_UPLOAD = "%(mirror)s"\n' if upload else "")
    (stock, _, _), (patched, build, server) = (done[name] for name in VARIANTS)
    assert patched == stock
    assert (patched["returncode"], patched["said"]) == (0, [])
    assert patched["restored"] == [OTHER, TOP, SLOW] and patched["second"] == [FIRST, OTHER, TOP, SLOW]
    assert started_with(build, "second") == dict.fromkeys(patched["second"], True)
    assert [len(server.asked("GET", name)) for name in (FIRST, OTHER, TOP, SLOW)] == [upload, 1, 1, 1]
