# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""What the bitbake server fetches ahead of the setscene tasks: which objects, in which order, and how it ends.

Over the network it cannot be seen who fetches: so tasks write down whether their object was there when
they were started. test_prefetch_faults.py has the mirrors that fail, test_prefetch_disks.py the disks.
"""

import collections
import re
import shutil
import threading
import urllib.parse

import pytest

from system.conftest import FEW, MANY, OFF
from system.observe import (SECOND, SECONDS, add_class, asked, damaged, names, problems, restore, snapshot, summary,
                            unfinished, wait_until)
from system.peer import is_archive, is_object
from system.test_presence import PROTOCOLS, recipe
from system.test_processes import UNBUFFERED, started

pytestmark = pytest.mark.system

ALL = ["demo-%04d" % number for number in range(1, FEW + 1)]

# Each setscene task tells whether its object is there before it has done anything
TELL = """
do_populate_setscene[prefuncs] += "tell_local"
python tell_local() {
    there = os.path.exists(d.expand("${SSTATE_DIR}/") + sstate_name(d))
    name = "%s-%s" % (d.getVar("BB_CURRENT_MC") or "default", d.getVar("PN"))
    with open(d.expand("${TOPDIR}/there-") + name, "w") as f:
        f.write("there" if there else "not there")
}
"""


@pytest.fixture
def telling(make_build):
    """Called as make_build"""
    def make(*args, extra_conf="", **options):
        build = make_build(*args, extra_conf=extra_conf + '\nINHERIT += "tell"', **options)
        add_class(build, "tell", TELL)
        return build
    return make


def copy_objects(mirror_files, build, recipes):
    """Into SSTATE_DIR, as if they had been restored before"""
    for path in mirror_files.glob("??/??/sstate:*"):
        if recipe(path.name) in recipes:
            copy = build.sstate / path.relative_to(mirror_files)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, copy)


def started_with(build, multiconfig="default"):
    """{recipe: whether its object was there when its setscene task was started}"""
    prefix = "there-%s-" % multiconfig
    return {path.name[len(prefix):]: path.read_text() == "there" for path in build.directory.glob(prefix + "*")}


def gets(server):
    """Recipes whose archive was fetched, in the order in which the server was asked"""
    return [recipe(name) for method, name in asked(server) if method == "GET" and name.endswith(".tar.zst")]


def counted(server):
    """{(method, whether of a .siginfo): {name: how often}}"""
    found = collections.defaultdict(collections.Counter)
    for method, name in asked(server):
        found[method, name.endswith(".siginfo")][name] += 1
    return found


# By whom

@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_no_task_fetches(protocol, any_mirror, mirror_files, telling, patched_tree):
    """One HEAD and one GET for an object, one GET for its .siginfo. The test of pipelining asks one again."""
    server = any_mirror(protocol)
    build = telling(patched_tree, server, objects=MANY, levels=4, threads=8)
    result = restore(build)
    assert (result.returncode, problems(result.output)) == (0, [])
    assert len(build.restored()) == MANY
    assert started_with(build) == dict.fromkeys(build.sizes, True)
    assert damaged(build.sstate, mirror_files) == [] and unfinished(build.sstate) == []
    requests = counted(server)
    assert {key: len(value) for key, value in requests.items()} == {
        ("HEAD", False): MANY, ("GET", False): MANY, ("GET", True): MANY}
    again = {key: [count for count in value.values() if count > 1] for key, value in requests.items()}
    assert again.pop(("HEAD", False)) in ([], [2] if protocol != "sftp" else [])
    assert again == {("GET", False): [], ("GET", True): []}
    told = summary(result.output)
    assert (told.objects, told.requests) == (MANY, len(asked(server)))
    assert (told.retries, told.refusals) == (0, 0)
    assert 1 <= server.counters().connections <= 4


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_off(protocol, any_mirror, mirror_files, telling, patched_tree):
    """Each task asks for its .siginfo, and fetches both."""
    server = any_mirror(protocol)
    build = telling(patched_tree, server, extra_conf=OFF)
    result = restore(build)
    assert (result.returncode, problems(result.output)) == (0, [])
    assert len(build.restored()) == FEW and damaged(build.sstate, mirror_files) == []
    assert started_with(build) == dict.fromkeys(build.sizes, False)
    requests = counted(server)
    assert {key: len(value) for key, value in requests.items()} == {
        ("HEAD", False): FEW, ("HEAD", True): FEW, ("GET", False): FEW, ("GET", True): FEW}
    assert server.counters().connections <= 4


@pytest.mark.parametrize("protocol, umask", [("http", "002"), ("https", "027"), ("sftp", "002"), ("sftp", "027")])
def test_files_as_stock(protocol, umask, any_mirror, make_build, stock_tree, patched_tree):
    """The same names, contents and modes, and over http(s) times. Stock's query makes the folders otherwise."""
    server = any_mirror(protocol)
    files, modes = {}, {}
    for tree in (stock_tree, patched_tree):
        build = make_build(tree, server, extra_conf='OE_SHARED_UMASK = "%s"' % umask)
        result = restore(build)
        assert (result.returncode, problems(result.output)) == (0, [])
        entries = snapshot(build.sstate)
        files[tree.name] = {name: (entry.mode, entry.digest, protocol != "sftp" and entry.mtime_ns)
                            for name, entry in entries.items() if entry.digest}
        modes[tree.name] = {entry.mode & 0o7777 for entry in entries.values() if not entry.digest}
    assert files["patched"] == files["stock"] and len(files["stock"]) == 2 * FEW
    assert modes["patched"] == {0o777 & ~int(umask, 8)}


def test_another_sstate_dir(any_mirror, mirror_files, telling, patched_tree):
    """A multiconfig with a SSTATE_DIR of its own: the tasks of that one fetch, as stock's do."""
    second = {"second": SECOND["second"] + 'SSTATE_DIR = "${TOPDIR}/sstate-second"\n'}
    server = any_mirror("http")
    build = telling(patched_tree, server, multiconfigs=second)
    result = restore(build, "demo-all", "mc:second:demo-all")
    assert (result.returncode, problems(result.output)) == (0, [])
    assert build.restored() == build.restored("second") == ALL
    assert started_with(build) == dict.fromkeys(ALL, True)
    assert started_with(build, "second") == dict.fromkeys(ALL, False)
    for folder in (build.sstate, build.directory / "sstate-second"):
        assert len(names(folder)) == 2 * FEW
        assert damaged(folder, mirror_files) == [] and unfinished(folder) == []
    assert sorted(gets(server)) == sorted(2 * ALL)


def test_recipe_with_settings_of_its_own(any_mirror, mirror_files, telling, patched_tree):
    """They are not looked at, as the query of stock does not: the object comes from where the configuration says"""
    server, another = any_mirror("http"), any_mirror("http")
    build = telling(patched_tree, server)
    with open(build.layer / "recipes" / "demo-0004.bb", "a") as file:
        file.write('SSTATE_MIRRORS = "file://.* %s/PATH;downloadfilename=PATH"\n' % another.url)
    result = restore(build)
    assert (result.returncode, problems(result.output)) == (0, [])
    assert build.restored() == ALL and gets(another) == []
    assert damaged(build.sstate, mirror_files) == []


# Which, and when

def dependents(build):
    """{recipe: those which depend on it}"""
    found = {name: set() for name in build.sizes}
    for name in build.sizes:
        text = (build.layer / "recipes" / (name + ".bb")).read_text()
        for other in re.search('^DEPENDS = "(.*)"', text, re.MULTILINE).group(1).split():
            found[other].add(name)
    return found


class Counting:
    """
    A fault: writes down how many objects had been asked for, beyond those which were installed, with each
    of them. On one connection: so none is asked for before the one that was counted.
    """
    def __init__(self):
        self.build = None
        self.order = []
        self.ahead = []

    def __call__(self, talk, request, body):
        if request.method == "GET" and is_archive(request):
            self.order.append(re.search(r"demo-\d{4}", request.target).group())
            installed = len(list(self.build.tmp.glob("default/restored/*/content")))
            self.ahead.append(len(self.order) - installed)


@pytest.mark.parametrize("window, threads", [(1, 1), (1, 3), (2, 3), (8, 3)])
def test_order_and_window(window, threads, faulty_mirror, telling, patched_tree):
    """
    An object comes when all that depend on it have come: that is how setscene tasks become startable. Beyond
    those which are being installed (one for each thread), no more than the window, and one for each thread that
    could install it at once.
    """
    counting = Counting()
    build = counting.build = telling(
        patched_tree, faulty_mirror(counting), objects=MANY, levels=4, threads=threads,
        extra_conf='BB_SETSCENE_PREFETCH = "%d"\nBB_CONNECTION_CACHE_MAX = "1"' % window)
    result = restore(build)
    assert (result.returncode, problems(result.output)) == (0, [])
    assert len(build.restored()) == MANY
    assert started_with(build) == dict.fromkeys(build.sizes, True)
    assert sorted(counting.order) == sorted(build.sizes)
    place = {name: number for number, name in enumerate(counting.order)}
    wrong = {name: others for name, others in dependents(build).items()
             if any(place[other] > place[name] for other in others)}
    assert wrong == {}
    assert max(counting.ahead) <= window + threads + threads


# As openembedded-core's packages need virtual/fakeroot-native, which else comes late
NEEDED, NEEDING = "demo-0014", ("demo-0045", "demo-0050")
STARTS = """
do_populate_setscene[depends] = "${@'%s:do_populate_setscene' if d.getVar('PN') in %s else ''}"
do_populate_setscene[prefuncs] += "tell_start"
python tell_start() {
    with open(d.expand("${TOPDIR}/starts"), "a") as f:
        f.write((d.getVar("BB_CURRENT_MC") or "default") + d.expand(" ${PN}:${PR}\\n"))
}
""" % (NEEDED, NEEDING)


class InStep:
    """
    A fault: a file is sent when the tasks of all objects that were sent before, with their .siginfo, have started. On one
    connection, so a task is late if it cannot be started before the next object has come.
    """
    def __init__(self):
        self.build = None
        self.asked = []
        self.sent = []
        self.late = []

    def starts(self):
        """[(multiconfig, object)]"""
        path = self.build.directory / "starts"
        return [tuple(line.split()) for line in path.read_text().splitlines()] if path.exists() else []

    def __call__(self, talk, request, body):
        if request.method != "GET":
            return
        words = urllib.parse.unquote(request.target).split(":")
        name = "%s:%s" % (words[1], words[4])
        if is_archive(request):
            self.asked.append(name)
        self._wait()
        if not is_archive(request):
            self.sent.append(name)

    def _wait(self):
        missing = set()

        def started():
            missing.clear()
            missing.update(set(self.sent) - {name for _, name in self.starts()})
            return not missing

        if not self.late:
            try:
                wait_until(started, "started", 10)
            except AssertionError:
                self.late = sorted(missing)


def test_order_is_that_of_the_tasks(faulty_mirror, make_build, patched_tree):
    """
    With hard dependencies, a multiconfig, and another one of the same hashes, whose tasks are deferred until the objects are
    here: each object comes when its task is the next one.
    """
    step = InStep()
    build = step.build = make_build(
        patched_tree, faulty_mirror(step), objects=MANY, levels=4, threads=1, multiconfigs={**SECOND, "twin": ""},
        extra_conf='BB_CONNECTION_CACHE_MAX = "1"\nINHERIT += "starts"')
    add_class(build, "starts", STARTS)
    tops, lowest = ["demo-0045", "demo-0048", "demo-0050"], ["demo-0003", "demo-0005"]
    result = build.run([*tops, *("mc:second:" + name for name in lowest), *("mc:twin:" + name for name in tops)], SECONDS)
    assert (result.returncode, result.left, problems(result.output)) == (0, 0, [])
    assert step.late == []
    assert all(step.asked.index(NEEDED + ":r0") < step.asked.index(name + ":r0") for name in NEEDING)
    assert step.sent == [name for multiconfig, name in step.starts() if multiconfig != "twin"]
    assert build.restored("second") == lowest
    assert set(tops) < set(build.restored()) and build.restored("twin") == build.restored()


class HeldOne:
    """A fault: the GET of one archive is answered after release() only."""

    def __init__(self, held):
        self.held = held
        self.asked = threading.Event()
        self.released = threading.Event()

    def __call__(self, talk, request, body):
        if request.method == "GET" and is_object(request, self.held):
            self.asked.set()
            self.released.wait(60)


def test_task_waits_for_its_object(faulty_mirror, telling, patched_tree):
    """It is not started; all others are, two threads or not. One request at a time, or some would be behind it."""
    hold = HeldOne("demo-0004")
    build = telling(patched_tree, faulty_mirror(hold, pipelined=False), threads=2, environment=UNBUFFERED)
    others = [name for name in ALL if name != hold.held]
    running = started(build)
    try:
        wait_until(lambda: build.restored() == others, "all others are restored", SECONDS)
        assert hold.asked.is_set()
        assert hold.held not in started_with(build)
        assert "%s.bb:do_populate_setscene" % hold.held not in running.output()
        hold.released.set()
        result = running.wait(SECONDS)
    finally:
        hold.released.set()
        running.kill()
    assert (result.returncode, result.left, problems(result.output)) == (0, 0, [])
    assert build.restored() == ALL
    assert started_with(build) == dict.fromkeys(ALL, True)


@pytest.mark.parametrize("arguments", [["--skip-setscene"], ["-n"], ["-n", "--setscene-only"], ["-S", "none"]],
                         ids=" ".join)
def test_nothing_is_fetched(arguments, any_mirror, make_build, patched_tree):
    server = any_mirror("http")
    build = make_build(patched_tree, server)
    result = build.run([*arguments, "demo-all"], SECONDS)
    assert (result.returncode, result.left, problems(result.output)) == (0, 0, [])
    assert gets(server) == [] and build.restored() == []
    assert summary(result.output) is None


def test_what_is_local_is_not_fetched(any_mirror, mirror_files, telling, patched_tree):
    server = any_mirror("http")
    build = telling(patched_tree, server)
    local = ALL[::2]
    copy_objects(mirror_files, build, local)
    result = restore(build)
    assert (result.returncode, problems(result.output)) == (0, [])
    assert build.restored() == ALL and started_with(build) == dict.fromkeys(ALL, True)
    assert sorted(gets(server)) == ALL[1::2]


def test_what_was_restored_is_not_fetched(any_mirror, make_build, patched_tree):
    """Its stamp is current, though its object is not here any more"""
    server = any_mirror("http")
    build = make_build(patched_tree, server)
    assert restore(build).returncode == 0
    shutil.rmtree(build.sstate)
    server.reset()
    result = restore(build)
    assert (result.returncode, problems(result.output)) == (0, [])
    assert gets(server) == []


# As openembedded-core: what only other objects depend on is not needed
NOT_NEEDED = """
def setscene_depvalid(task, taskdependees, notneeded, d, log=None):
    return True
"""


def test_what_is_not_needed_is_not_fetched(any_mirror, telling, stock_tree, patched_tree):
    server = any_mirror("http")
    fetched = {}
    for tree in (stock_tree, patched_tree):
        server.reset()
        build = telling(tree, server, objects=MANY, levels=4, extra_conf='INHERIT += "notneeded"')
        add_class(build, "notneeded", NOT_NEEDED)
        result = restore(build, "demo-%04d" % MANY)
        assert (result.returncode, problems(result.output)) == (0, [])
        fetched[tree.name] = sorted(gets(server))
        assert fetched[tree.name] == build.restored()
    assert fetched["patched"] == fetched["stock"]
    assert started_with(build) == dict.fromkeys(fetched["stock"], True)


# What it is for, and what is told

# No task goes on before there are two
TOGETHER = """
do_populate_setscene[prefuncs] += "together"
python together() {
    import glob, time
    open(d.expand("${TOPDIR}/together-${PN}"), "w").close()
    for _ in range(1200):
        if len(glob.glob(d.expand("${TOPDIR}/together-*"))) > 1:
            return
        time.sleep(0.05)
    bb.fatal("alone")
}
"""


def test_no_network_slot(any_mirror, telling, patched_tree):
    """Whose object is there does not wait for a slot, of which there is one."""
    server = any_mirror("http")
    build = telling(patched_tree, server, threads=4,
                    extra_conf='BB_NUMBER_NETWORK_THREADS = "1"\nINHERIT += "together"')
    add_class(build, "together", TOGETHER)
    result = restore(build)
    assert (result.returncode, problems(result.output)) == (0, [])
    assert build.restored() == ALL and started_with(build) == dict.fromkeys(ALL, True)
    assert "Network tasks: peak of 0 (limit 1)" in result.output


PROGRESS = """
addhandler tell_progress
tell_progress[eventmask] = "bb.event.SstateFetchProgress bb.event.SstateNetworkSummary"
python tell_progress() {
    with open(d.expand("${TOPDIR}/events"), "a") as f:
        if isinstance(e, bb.event.SstateFetchProgress):
            f.write("%s %s %s %s\\n" % (e.objects, e.total, e.size, e.total_size))
        else:
            f.write("end %s\\n" % e.objects)
}
"""


def test_told(any_mirror, make_build, patched_tree):
    server = any_mirror("http")
    build = make_build(patched_tree, server, extra_conf='INHERIT += "progress"')
    add_class(build, "progress", PROGRESS)
    result = restore(build, "-DD", "demo-all")
    assert (result.returncode, problems(result.output)) == (0, [])
    assert len(re.findall("^NOTE: Sstate network: %d objects, " % FEW, result.output, re.MULTILINE)) == 1
    hosts = re.findall(r"Sstate network, (\S+): (.*)", result.output)
    assert [host for host, _ in hosts] == ["http://localhost"]
    assert hosts[0][1].startswith("%d files, " % (2 * FEW))
    for name in ALL:
        # Now: it could be started already
        assert re.search(r"Fetching (ahead|now) for \S*/%s.bb:do_populate" % name, result.output), name
        assert re.search(r"Fetched ahead for \S*/%s.bb:do_populate" % name, result.output), name
    events = (build.directory / "events").read_text().splitlines()
    assert events[-1] == "end %d" % FEW
    size = sum(path.stat().st_size for path in build.archives())
    # The last one is about the end
    assert events[-2].split() == [str(number) for number in (FEW, FEW, size, size)]
