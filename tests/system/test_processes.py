# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""Ctrl-C, a memory-resident server, and tasks without a network: who runs and who is connected."""

import shutil
import threading

import pytest

from system.conftest import FEW, OFF
from system.observe import (SECONDS, add_class, connections_to, damaged, problems, restore, server_log, server_pid,
                            shared_sockets, summary, thread_count, wait_until)
from system.peer import is_archive

pytestmark = pytest.mark.system


class Held:
    """A fault: archives are sent after release() only."""

    def __init__(self, method="GET"):
        self.method = method
        self.waiting = []
        self._released = threading.Event()

    def __call__(self, talk, request, body):
        if request.method == self.method and is_archive(request):
            self.waiting.append(request.target)
            self._released.wait(60)

    def release(self):
        self._released.set()


@pytest.fixture
def held(faulty_mirror):
    made = []

    def make(method="GET"):
        made.append(Held(method))
        return made[-1], faulty_mirror(made[-1])

    yield make
    for one in made:
        one.release()


# The server writes its log at once, not when it ends
UNBUFFERED = {"PYTHONUNBUFFERED": "1", "BB_ENV_PASSTHROUGH_ADDITIONS": "PYTHONUNBUFFERED"}


def started(build):
    return build.start(["--setscene-only", "demo-all"])


def interrupt(running, build, command):
    """Ctrl-C, until the server knows of it"""
    running.interrupt()
    wait_until(lambda: "'%s'" % command in server_log(build), "the server was told %s" % command)


def test_interrupted_once(held, mirror_files, make_build, patched_tree):
    """What tasks are fetching is fetched to its end, and nothing else: test_prefetch_faults.py has what is fetched ahead."""
    hold, server = held()
    build = make_build(patched_tree, server, threads=2, environment=UNBUFFERED, extra_conf=OFF)
    running = started(build)
    try:
        wait_until(lambda: len(hold.waiting) == 2, "two tasks wait for their object")
        interrupt(running, build, "stateShutdown")
        hold.release()
        result = running.wait(SECONDS)
    finally:
        running.kill()
    assert result.returncode != 0 and result.left == 0
    assert len(build.restored()) == 2 and len(hold.waiting) == 2
    assert damaged(build.sstate, mirror_files) == []


def interrupted_twice(hold, build, number, what):
    """Nothing is waited for: the mirror does not answer before the build has ended."""
    running = started(build)
    try:
        wait_until(lambda: len(hold.waiting) >= number, what)
        interrupt(running, build, "stateShutdown")
        interrupt(running, build, "stateForceShutdown")
        result = running.wait(SECONDS)
        assert not hold._released.is_set()
    finally:
        running.kill()
    assert result.returncode != 0 and result.left == 0
    assert build.restored() == []


def test_interrupted_twice(held, mirror_files, make_build, patched_tree):
    """Tasks that are fetching are killed: test_prefetch_faults.py has what is fetched ahead."""
    hold, server = held()
    build = make_build(patched_tree, server, threads=2, environment=UNBUFFERED, extra_conf=OFF)
    interrupted_twice(hold, build, 2, "two tasks wait for their object")
    assert len(hold.waiting) == 2
    assert damaged(build.sstate, mirror_files) == []


def test_interrupted_query(held, make_build, patched_tree):
    """Twice, as one Ctrl-C lets the query end, in stock too. It may start a task yet, and kills it."""
    hold, server = held("HEAD")
    build = make_build(patched_tree, server, threads=2, environment=UNBUFFERED)
    interrupted_twice(hold, build, 1, "the query waits")


def test_resident_server(mirror, make_build, stock_tree, patched_tree):
    """Between two builds it has the threads and sockets of a stock one; the second build works."""
    server = mirror()
    threads = {}
    for tree in (stock_tree, patched_tree):
        build = make_build(tree, server, environment={"BB_SERVER_TIMEOUT": "60"})
        pids = []
        for _ in range(2):
            server.reset()
            shutil.rmtree(build.sstate, ignore_errors=True)
            shutil.rmtree(build.tmp / "default", ignore_errors=True)
            result = build.run(["--setscene-only", "demo-all"], SECONDS)
            assert result.returncode == 0 and problems(result.output) == []
            assert len(build.restored()) == FEW
            pids.append(server_pid(build))
            if tree is patched_tree:
                assert server.counters().connections == summary(result.output).connections <= 4
                threads["patched"] = wait_until(lambda: thread_count(pids[-1]) <= threads["stock"]
                                                and thread_count(pids[-1]), "no more threads than stock has")
                assert connections_to(server.port, pids[-1]) == 0
                assert shared_sockets(pids[-1]) == []
            else:
                threads["stock"] = thread_count(pids[-1])
        assert pids[0] == pids[1]
        build.run(["--kill-server"], SECONDS)
    assert threads["patched"] == threads["stock"]


def test_running_server(held, make_build, patched_tree):
    """During a build there are threads and sockets: what the test above finds none of."""
    hold, server = held()
    build = make_build(patched_tree, server, threads=2, environment=UNBUFFERED)
    running = started(build)
    try:
        wait_until(lambda: hold.waiting, "an object is being fetched")
        pid = server_pid(build)
        assert 1 <= connections_to(server.peer.port, pid) <= 4
        # The one that listens: no task has anything to fetch
        assert len(shared_sockets(pid)) == 1
        hold.release()
        assert running.wait(SECONDS).returncode == 0
    finally:
        running.kill()


# Takes the network from one recipe's setscene task, which tries the server's socket
NO_NETWORK = """
do_populate_setscene[network] = "${@'0' if d.getVar('PN') == 'demo-0003' else '1'}"
do_populate_setscene[prefuncs] += "try_socket"
python try_socket() {
    import errno, socket
    address = d.getVar("BB_CONNECTION_CACHE_ADDRESS")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
            error = client.connect_ex("\\0" + address.partition(":")[2])
        with open(d.expand("${TOPDIR}/socket-${PN}"), "w") as f:
            f.write(errno.errorcode.get(error, "connected"))
}
"""


def test_task_without_network(mirror, make_build, stock_tree, patched_tree):
    """
    The kernel refuses it; the object that it would fetch is lost as with stock, the others are restored. What is fetched
    ahead needs no network of the task.
    """
    server = mirror()
    seen = {}
    for tree in (stock_tree, patched_tree):
        build = make_build(tree, server, extra_conf=OFF + '\nINHERIT += "no_network"')
        add_class(build, "no_network", NO_NETWORK)
        result = restore(build)
        seen[tree.name] = result.returncode, build.restored()
    if len(seen["stock"][1]) == FEW:
        pytest.skip("bitbake cannot take the network from a task on this machine")
    assert seen["patched"] == seen["stock"]
    assert len(seen["patched"][1]) == FEW - 1
    assert (build.directory / "socket-demo-0003").read_text() == "ECONNREFUSED"
    assert (build.directory / "socket-demo-0004").read_text() == "connected"
