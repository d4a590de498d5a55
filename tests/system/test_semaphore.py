# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""BB_NUMBER_NETWORK_THREADS in real builds: who holds the network, counted by what the tasks write down.

The recipes sem-N have do_fetch with [network], do_work without, and do_populate with [network] and a
setscene variant. Each appends a line when it starts and when it ends, in one write. A task that a line
of the file held names (recipe:task) stays until the gate is opened.
"""

import os
import signal

import pytest

from system.observe import SECONDS, add_class, problems, server_log, server_pid, wait_until

pytestmark = pytest.mark.system

RECIPES = 4
# With a server that writes its log at once, and stays
RESIDENT = {"BB_SERVER_TIMEOUT": "60", "PYTHONUNBUFFERED": "1", "BB_ENV_PASSTHROUGH_ADDITIONS": "PYTHONUNBUFFERED"}
NETWORK = ("fetch", "populate_setscene")

SEMAPHORE = """
deltask fetch
addtask fetch
addtask work after do_fetch
addtask populate after do_work
addtask build after do_populate
do_fetch[network] = "1"
do_populate[network] = "1"
do_populate_setscene[network] = "1"
SEMAPHORE_SETSCENE ?= ""
SEMAPHORE_LOCAL ?= ""
SEMAPHORE_FAIL ?= ""
BB_HASHCHECK_FUNCTION = "semaphore_checkhashes"

def semaphore_checkhashes(sq_data, d, presence=None, **kwargs):
    def named(variable):
        return set(tid for tid in sq_data["hash"]
                   if bb.runqueue.fn_from_tid(tid).split("/")[-1].split(".")[0] in d.getVar(variable).split())
    if presence is not None:
        presence.local(named("SEMAPHORE_LOCAL"))
    return named("SEMAPHORE_SETSCENE")

def semaphore_span(d):
    import time
    top = d.getVar("TOPDIR")
    task = d.expand("${PN}:${BB_CURRENTTASK}")

    def tell(what):
        fd = os.open(top + "/spans", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.write(fd, ("%s %s %s %s\\n" % (what, d.getVar("BB_CURRENT_MC") or "-", task, os.getpid())).encode())
        os.close(fd)

    tell("start")
    try:
        with open(top + "/held") as f:
            held = task in f.read().split()
        while held and not os.path.exists(top + "/gate"):
            time.sleep(0.02)
        time.sleep(0.1)
    finally:
        tell("end")
    if task in d.getVar("SEMAPHORE_FAIL").split():
        raise bb.BBHandledException()

python do_fetch() {
    semaphore_span(d)
}
python do_work() {
    semaphore_span(d)
}
python do_populate() {
    semaphore_span(d)
}
python do_populate_setscene() {
    semaphore_span(d)
}
"""

# Called with -S to end pseudo's server, too
FAKEROOT = """#!/bin/sh
[ "$1" = -S ] || exec "$@"
"""

# Returns any task, as schedulers did before there were slots
SCHEDULER = """
import bb.runqueue

class Careless(bb.runqueue.RunQueueSchedulerSpeed):
    name = "careless"

    def next_buildable_task(self):
        self.buildable.difference_update(self.rq.runq_running)
        for tid in sorted(self.buildable & (self.rq.tasks_covered | self.rq.tasks_notcovered)):
            if tid not in self.rq.holdoff_tasks:
                return tid
        return None
"""


class Semaphore:
    """A build of the recipes sem-1 ... and what its tasks wrote down"""

    def __init__(self, build):
        self.build = build
        self.gate = build.directory / "gate"
        self.spans = build.directory / "spans"
        self.hold()

    def hold(self, *tasks):
        (self.build.directory / "held").write_text("\n".join(tasks))

    def open(self):
        self.gate.touch()

    def lines(self):
        return [line.split() for line in self.spans.read_text().splitlines()] if self.spans.exists() else []

    def started(self, task=""):
        """recipe:task of all that have started, but for multiconfigs"""
        return [line[2] for line in self.lines() if line[0] == "start" and line[2].endswith(task)]

    def ended(self, task=""):
        return [line[2] for line in self.lines() if line[0] == "end" and line[2].endswith(task)]

    def peak(self, tasknames=NETWORK):
        running = peak = 0
        for what, _, task, _ in self.lines():
            if task.split(":")[1] in tasknames:
                running += 1 if what == "start" else -1
                peak = max(peak, running)
        return peak

    def pid(self, task):
        """Of the process of a task"""
        return next(int(line[3]) for line in self.lines() if line[2] == task)

    def again(self):
        """Forget what was built"""
        for path in (self.gate, self.spans):
            path.unlink(missing_ok=True)
        self.build.clean()


@pytest.fixture
def semaphore(make_build, patched_tree):
    """Called with lines for local.conf and what Build takes, returns a Semaphore. Four threads."""
    def make(conf="", recipe="", **options):
        texts = {"sem-%d.bb" % n: "inherit semaphore\n" + recipe for n in range(1, RECIPES + 1)}
        build = make_build(patched_tree, None, objects=0, threads=4, recipes=texts,
                           extra_conf=conf + '\nBB_HASHCHECK_FUNCTION = "semaphore_checkhashes"\nINHERIT += "semaphore-check"',
                           **options)
        add_class(build, "semaphore", SEMAPHORE)
        # The function is called with the configuration, which recipes' classes are no part of
        add_class(build, "semaphore-check", SEMAPHORE[SEMAPHORE.index("SEMAPHORE_SETSCENE"):SEMAPHORE.index("def semaphore_span")])
        return Semaphore(build)
    return make


def names(*numbers):
    return " ".join("sem-%d" % n for n in numbers)


def limit(number, *more):
    return "\n".join(('BB_NUMBER_NETWORK_THREADS = "%s"' % number,) + more)


TARGETS = ["sem-%d" % n for n in range(1, RECIPES + 1)]
SETSCENE = 'SEMAPHORE_SETSCENE = "%s"' % names(1, 2)


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("multiconfig", [False, True])
def test_limit(semaphore, slots, multiconfig):
    """Setscene tasks of two recipes and do_fetch of the others share the slots; a second multiconfig does too."""
    options = {"multiconfigs": {"second": 'PR = "r1"\n'}} if multiconfig else {}
    semaphore = semaphore(limit(slots, SETSCENE), **options)
    targets = TARGETS + ["mc:second:" + name for name in TARGETS if multiconfig]
    result = semaphore.build.run(targets, SECONDS)
    assert (result.returncode, result.left, problems(result.output)) == (0, 0, [])
    assert len(semaphore.ended("populate_setscene")) == 2 * (1 + multiconfig)
    assert len(semaphore.ended("fetch")) == 2 * (1 + multiconfig)
    assert semaphore.peak() == slots
    assert result.output.count("NOTE: Network tasks: peak of %d (limit %d)" % (slots, slots)) == 1


def test_unset_is_no_limit(semaphore):
    """All threads, and not a word of it"""
    semaphore = semaphore(SETSCENE)
    result = semaphore.build.run(TARGETS, SECONDS)
    assert (result.returncode, result.left, problems(result.output)) == (0, 0, [])
    assert semaphore.peak() > 2
    assert "etwork tasks" not in result.output


@pytest.mark.parametrize("value", ["0", "-2", "many"])
def test_invalid(semaphore, value):
    semaphore = semaphore(limit(value))
    result = semaphore.build.run(TARGETS, SECONDS)
    assert result.returncode == 1 and result.left == 0
    errors = problems(result.output)
    assert len(errors) == 1 and 'Invalid value "%s" for BB_NUMBER_NETWORK_THREADS, must be ' % value in errors[0]
    assert semaphore.lines() == []


def test_hides_nothing(semaphore):
    """While one task holds the only slot: what needs none is done, and local objects are restored."""
    semaphore = semaphore(limit(1, SETSCENE, 'SEMAPHORE_LOCAL = "%s"' % names(1, 2)))
    build = semaphore.build
    assert build.run(["sem-3", "-c", "fetch"], SECONDS).returncode == 0
    semaphore.hold("sem-4:fetch")
    running = build.start(TARGETS)
    try:
        wait_until(lambda: {"sem-1:populate_setscene", "sem-2:populate_setscene", "sem-3:populate"}
                   <= set(semaphore.ended()), "what needs no slot is done")
        assert "sem-4:fetch" not in semaphore.ended()
        semaphore.open()
        result = running.wait(SECONDS)
    finally:
        running.kill()
    assert (result.returncode, problems(result.output)) == (0, [])


def test_scheduler_of_the_user(semaphore):
    semaphore = semaphore(limit(1, 'BB_SCHEDULERS = "netqueue_careless.Careless"', 'BB_SCHEDULER = "careless"'))
    (semaphore.build.layer / "lib" / "netqueue_careless.py").write_text(SCHEDULER)
    result = semaphore.build.run(TARGETS, SECONDS)
    assert (result.returncode, result.left, problems(result.output)) == (0, 0, [])
    assert len(semaphore.ended("fetch")) == RECIPES and semaphore.peak() == 1


def test_failures_with_continue(semaphore):
    """Each that fails gives back the only slot: the others are run, and nothing waits for ever."""
    semaphore = semaphore(limit(1, SETSCENE, 'SEMAPHORE_FAIL = "sem-1:populate_setscene sem-3:fetch"'))
    result = semaphore.build.run(["--continue"] + TARGETS, SECONDS)
    assert result.returncode == 1 and result.left == 0
    assert {"sem-1:populate", "sem-2:populate_setscene", "sem-4:populate"} <= set(semaphore.ended())
    assert semaphore.peak() == 1


def test_killed_task(semaphore):
    semaphore = semaphore(limit(1))
    semaphore.hold(*["%s:fetch" % name for name in TARGETS])
    running = semaphore.build.start(["--continue"] + TARGETS)
    try:
        first = wait_until(lambda: semaphore.started("fetch"), "a task holds the slot")[0]
        os.kill(semaphore.pid(first), signal.SIGTERM)
        wait_until(lambda: len(semaphore.started("fetch")) == 2, "another one has got the slot")
        semaphore.open()
        result = running.wait(SECONDS)
    finally:
        running.kill()
    assert result.returncode == 1 and result.left == 0
    assert len(semaphore.ended(":populate")) == RECIPES - 1


def test_fakeroot(semaphore):
    semaphore = semaphore(limit(1, 'FAKEROOTCMD = "${TOPDIR}/fakeroot"'), recipe='do_fetch[fakeroot] = "1"\n')
    program = semaphore.build.directory / "fakeroot"
    program.write_text(FAKEROOT)
    program.chmod(0o755)
    result = semaphore.build.run(TARGETS, SECONDS)
    assert (result.returncode, result.left, problems(result.output)) == (0, 0, [])
    assert len(semaphore.ended("fetch")) == RECIPES and semaphore.peak() == 1


def test_dry_run(semaphore):
    semaphore = semaphore(limit(1, SETSCENE))
    result = semaphore.build.run(["-n"] + TARGETS, SECONDS)
    assert (result.returncode, result.left, problems(result.output)) == (0, 0, [])
    assert semaphore.lines() == []


def interrupt(running, build, command):
    running.interrupt()
    wait_until(lambda: "'%s'" % command in server_log(build), "the server was told %s" % command)


def kill_workers(build):
    for pid in build.processes():
        with open("/proc/%d/cmdline" % pid, "rb") as f:
            words = f.read().split(b"\0")
        with open("/proc/%d/stat" % pid) as f:
            parent = int(f.read().rpartition(")")[2].split()[1])
        if any(word.endswith(b"bitbake-worker") for word in words) and parent == server_pid(build):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("how", ["Ctrl-C", "Ctrl-C twice", "worker"])
def test_next_build_has_all_slots(semaphore, how):
    """A build ends while two tasks hold the network; the same server's next one may run two again."""
    semaphore = semaphore(limit(2), environment=RESIDENT)
    build = semaphore.build
    semaphore.hold(*["%s:fetch" % name for name in TARGETS])
    running = build.start(TARGETS)
    try:
        wait_until(lambda: len(semaphore.started("fetch")) == 2, "two tasks hold the network")
        pid = server_pid(build)
        if how == "worker":
            kill_workers(build)
        else:
            interrupt(running, build, "stateShutdown")
            if how == "Ctrl-C twice":
                interrupt(running, build, "stateForceShutdown")
        if how != "Ctrl-C twice":
            semaphore.open()
        result = running.wait(SECONDS)
        assert result.returncode != 0
        assert len(semaphore.started("fetch")) == 2
        semaphore.open()
        wait_until(lambda: not any(str(pid) != line[3] and os.path.exists("/proc/" + line[3])
                                   for line in semaphore.lines()), "no task of it is left")
        semaphore.again()
        semaphore.hold()
        result = build.run(TARGETS, SECONDS)
        # The second Ctrl-C also ends the server, in stock too
        assert (server_pid(build) == pid) == (how != "Ctrl-C twice")
        assert (result.returncode, problems(result.output)) == (0, [])
        assert len(semaphore.ended("fetch")) == RECIPES and semaphore.peak() == 2
    finally:
        running.kill()
