# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""The server's socket in the life of a bitbake server: end of a build, forks, tasks without a network."""

import os
import threading

import bb
import bb.connections
import bb.utils
import pytest

from bb.connections import protocol, server
from support.asking import Asked, wait_until
from support.children import descriptors, in_child, link
from support.task import Task
from wire import peers


@pytest.fixture
def file(tmp_path):
    with open(tmp_path / "file", "w+b") as f:
        yield f


def ask_in_process(connections, url, method="HEAD"):
    asked = Asked(method, url)
    connections.pool.submit(asked.request)
    return asked


def test_stop_answers_who_waits(start, peer, file):
    mirror = peer(peers.hangs)
    connections = start()
    with Task(connections.address) as idle, Task(connections.address) as waiting:
        for i in range(6):
            waiting.ask(i, "GET" if i == 0 else "HEAD", mirror.url("/%s" % i), *([file.fileno()] if i == 0 else []))
        mirror.wait_for(lambda p: len(p.requests) == 4)
        connections.stop()
        answers = {}
        while True:
            answer = waiting.answer()
            if answer is None:
                break
            answers[answer["id"]] = answer["error"]
        assert answers == {i: "cancelled" for i in range(6)}
        assert idle.receive() is None
    mirror.wait_for(lambda p: p.open == 0)
    connections.stop()


def test_nothing_is_left_of_a_build(start, peer, file):
    mirror = peer(peers.keep_alive)
    links, threads = sorted(descriptors()), threading.active_count()
    connections = start()
    with Task(connections.address) as task:
        task.ask(1, "GET", mirror.url(), file.fileno())
        assert task.answer()["status"] == 200
        mirror_side = mirror.open
        assert mirror_side == 1
        connections.stop()
    mirror.wait_for(lambda p: p.open == 0)
    wait_until(lambda: threading.active_count() <= threads + len(mirror._threads), "threads have ended")
    # Those of the peer's own accepted connection are closed by its thread
    wait_until(lambda: sorted(descriptors()) == links, "descriptors are closed")
    assert bb.connections.current() is None


def test_report(start, peer, file, caplog):
    caplog.set_level("INFO", logger="BitBake")
    mirror = peer(peers.serve({"/x": b"content"}))
    connections = start()
    for _ in range(2):
        with Task(connections.address) as task:
            task.ask(1, "HEAD", mirror.url("/none"))
            assert task.answer()["status"] == 404
            task.ask(2, "GET", mirror.url(), file.fileno())
            assert task.answer()["status"] == 200
    connections.stop()
    connections.stop()
    lines = [r.getMessage() for r in caplog.records if "Sstate network" in r.getMessage()]
    assert len(lines) == 1
    assert lines[0].startswith("Sstate network: 2 objects, 0.0 MiB in ")
    assert lines[0].endswith(" s, 3 requests over 1 connections (0 retries, 0 refusals)")


def test_trouble_is_told_once_a_host(start, caplog):
    caplog.set_level("INFO", logger="BitBake")
    connections = start()
    for _ in range(5):
        assert ask_in_process(connections, "http://no-such-host.invalid/x?token=secret").error()
    connections.stop()
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(warnings) == 1
    assert "no-such-host.invalid" in warnings[0]
    assert "secret" not in warnings[0]


def test_stop_of_a_server_that_ends(start, peer):
    connections = start()
    asked = ask_in_process(connections, peer(peers.hangs).url())
    assert bb.connections.current() is connections.memory
    server.stop()
    assert asked.error().kind == "cancelled"
    assert bb.connections.current() is None
    server.stop()


def test_build_after_build(start, peer):
    """A memory resident server"""
    mirror = peer(peers.keep_alive)
    for build in range(3):
        connections = start()
        with Task(connections.address) as task:
            task.ask(1, "HEAD", mirror.url())
            assert task.answer()["status"] == 200
        connections.stop()
        assert mirror.connections == build + 1


def sockets_of(connections):
    """Links of all that a child must not have"""
    shared = [connections._listener, connections._wakeup, connections._waker]
    shared += connections.pool.connections() + list(connections._peers)
    return {link(one.fileno()) for one in shared}


def test_forked_child_has_nothing_of_it(start, peer, file):
    mirror, hanging = peer(peers.keep_alive), peer(peers.hangs)
    connections = start()
    asked = ask_in_process(connections, mirror.url())
    assert asked.status() == 200
    with Task(connections.address) as task:
        name = file.name
        task.ask(1, "GET", hanging.url(), file.fileno())
        hanging.wait_for(lambda p: p.requests)
        file.close()
        shared = sockets_of(connections) | {name}
        assert len(shared) == 3 + 2 + 1 + 1
        assert shared <= set(descriptors())

        # Locks that are held at the fork stay held in the child, which must not need them
        with connections.pool._lock, connections.pool._hosts[asked.request.origin]._cond:
            current, links = in_child(lambda: (bb.connections.current(), descriptors()))
        assert current is None
        assert not shared & set(links)
        assert not [one for one in links if "eventpoll" in one]

        # All goes on in the parent
        assert shared <= set(descriptors())
        task.ask(2, "HEAD", mirror.url())
        assert task.answer()["status"] == 200


def test_forked_child_has_no_file_of_a_peer_that_left(start, peer, file):
    hanging = peer(peers.hangs)
    connections = start()
    with Task(connections.address) as task:
        task.ask(1, "GET", hanging.url(), file.fileno())
        hanging.wait_for(lambda p: p.requests)
    file.close()
    wait_until(lambda: not connections._peers, "the server knows")
    assert file.name in descriptors()
    assert file.name not in in_child(descriptors)


def test_fork_while_a_file_is_closed(start, peer, file):
    """Between close() and the bookkeeping; a number closed twice may be another's descriptor by then."""
    connections = start()
    seen = []
    close = connections._close

    def close_and_fork(fd):
        close(fd)
        if fd is not None:
            try:
                seen.append(in_child(lambda: (connections._listener.fileno(), connections._waker.fileno())))
            except Exception as e:
                seen.append(repr(e))
    connections._close = close_and_fork
    with Task(connections.address) as task:
        task.ask(1, "GET", peer(peers.keep_alive).url(), file.fileno())
        assert task.answer()["status"] == 200
    assert seen == [(-1, -1)]


def test_program_that_is_started_inherits_nothing(start, peer, file):
    """Even one for which the descriptors are not closed."""
    connections = start()
    hanging = peer(peers.hangs)
    with Task(connections.address) as task:
        task.ask(1, "GET", hanging.url(), file.fileno())
        hanging.wait_for(lambda p: p.requests)
        request = next(iter(connections._peers.values())).requests[1]
        assert not os.get_inheritable(request.fd)
        for one in [connections._listener, connections._wakeup, connections._waker] + list(connections._peers):
            assert not os.get_inheritable(one.fileno())


def test_task_without_network_is_refused_by_the_kernel(start):
    connections = start()

    def cut_off():
        before = os.readlink("/proc/self/ns/net")
        try:
            bb.utils.disable_network(os.getuid(), os.getgid())
        except OSError as e:
            return str(e)
        if os.readlink("/proc/self/ns/net") == before:
            return "no network namespaces here"
        try:
            Task(connections.address)
        except ConnectionRefusedError:
            return None
        return "connected"
    outcome = in_child(cut_off)
    if outcome and outcome != "connected":
        pytest.skip(outcome)
    assert outcome is None
    with Task(connections.address) as task:
        assert task.greeting["hello"] == protocol.VERSION


def test_task_in_a_forked_child(start, peer, file):
    """As bitbake-worker forks them: several at once, over the same few connections."""
    mirror = peer(peers.serve({"/x": b"content" * 10000}))
    connections = start()

    def fetch():
        with Task(connections.address) as task:
            with open(file.name + str(os.getpid()), "w+b") as f:
                task.ask(1, "GET", mirror.url(), f.fileno())
                size = task.answer()["size"]
                f.seek(0)
                return size, f.read() == b"content" * 10000
    outcomes = []
    threads = [threading.Thread(target=lambda: outcomes.append(in_child(fetch))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert outcomes == [(70000, True)] * 8
    assert mirror.connections <= 4
