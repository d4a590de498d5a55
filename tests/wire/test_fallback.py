# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""Whatever fails of the shared connections, a task fetches as it always did: nothing half on disk, one warning."""

import os
import signal
import socket
import threading
import types
from unittest import mock

import bb
import bb.connections
import bb.data
import bb.fetch2
import pytest

from bb.connections import client, protocol, server
from support.asking import wait_until
from wire import peers


@pytest.fixture
def mirror(peer):
    return peer(peers.serve({"/x": b"content", "/y": b"content"}))


@pytest.fixture
def warnings(caplog):
    caplog.set_level(1, logger="BitBake")
    return lambda: [r.getMessage() for r in caplog.records
                    if r.levelno >= 29 and "shared connections" in r.getMessage()]


def fetched_by_wget(build, name="x"):
    """wget was started for name with nothing of it in the folder, and what it wrote is what there is"""
    return build.read(name) == b"from wget" and not [n for n in build.wget_saw() if n.startswith(name)]


@pytest.mark.parametrize("script", [
    peers.dies_in_body([(b"x" * 100000, 50000)] * 10),
    peers.raw(b"HTTP/1.1 200 OK\r\n\r\nno length"),
    peers.raw(b"nonsense\r\n\r\n"),
    peers.raw(b""),
    peers.with_status(403), peers.with_status(405), peers.with_status(500), peers.with_status(503),
    peers.with_status(206), peers.with_status(302, "Location: ftp://127.0.0.1/x"),
])
def test_mirror_with_trouble(build, peer, script, warnings):
    mirror = peer(script)
    build.fetch(mirror.url())
    assert mirror.connections > 0
    assert len(build.wget_calls()) == 1
    assert fetched_by_wget(build)
    assert build.left() == ["x"]
    assert warnings() == [], "the server's part has not failed"


def test_no_more_threads(start, monkeypatch, warnings):
    """The system may have none left"""
    before = sorted(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as context:
        context.setattr(threading.Thread, "start", mock.Mock(side_effect=RuntimeError("can't start new thread")))
        connections = start()
    assert (connections.pool, connections.address, bb.connections.current()) == (None, None, None)
    assert warnings() == ["Fetching without shared connections, their socket and thread cannot be made: can't start new thread"]
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_dies_once_in_the_body(build, peer):
    """That is tried again without wget; the second is shorter than the half of the first"""
    mirror = peer(peers.dies_in_body([(b"x" * 100000, 90000), (b"whole", 5)]))
    build.fetch(mirror.url())
    assert build.read() == b"whole"
    assert build.wget_calls() == []


def test_404_for_what_the_query_saw(build, peer):
    def script(talk):
        for request in talk.requests():
            talk.answer(request, b"here", status=200 if request.method == "HEAD" else 404)
    mirror = peer(script)
    assert build.exists(mirror.url())
    with pytest.raises(bb.fetch2.FetchError):
        build.fetch(mirror.url())
    assert build.left() == []
    assert build.wget_calls() == []


def test_checkstatus_of_a_mirror_with_trouble_is_asked_as_stock(build, peer):
    def script(talk):
        for request in talk.requests():
            # Python's own client says so
            ours = request.headers.get("accept-encoding") == "identity" and "connection" not in request.headers
            seen.append((request.method, ours))
            talk.answer(request, status=405 if request.method == "HEAD" else 200)
    seen = []
    assert build.exists(peer(script).url())
    assert seen[0] == ("HEAD", True)
    assert seen[-1][0] == "GET"


def test_server_is_gone(build, mirror, task_connections, warnings):
    task_connections.stop()
    for name in ("x", "y"):
        build.fetch(mirror.url("/" + name))
        assert fetched_by_wget(build, name)
    assert len(build.wget_calls()) == 2
    assert len(warnings()) == 1
    assert mirror.connections == 0


def test_server_hangs(build, mirror, task_connections, warnings, monkeypatch):
    monkeypatch.setattr(protocol, "SILENCE_SECONDS", 0.1)
    go_on = threading.Event()
    task_connections._submit = lambda request: go_on.wait(10)
    try:
        for name in ("x", "y"):
            build.fetch(mirror.url("/" + name))
            assert fetched_by_wget(build, name)
    finally:
        go_on.set()
    assert len(build.wget_calls()) == 2
    assert build.left() == ["x", "y"]
    assert len(warnings()) == 1


def test_slow_mirror_is_not_a_server_that_hangs(build, peer, monkeypatch, start):
    """Progress is heard, so the task goes on waiting"""
    monkeypatch.setattr(protocol, "PROGRESS_SECONDS", 0.02)
    monkeypatch.setattr(protocol, "SILENCE_SECONDS", 5)
    heard = threading.Event()
    receive = client.TaskClient._receive

    def counting(self):
        message = receive(self)
        if message.get("progress") == 4:
            heard.set()
        return message
    monkeypatch.setattr(client.TaskClient, "_receive", counting)

    def script(talk):
        talk.request()
        talk.send(b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nhalf")
        assert heard.wait(10)
        talk.send(b"full")
        talk.wait_closed()
    build.d.setVar(bb.connections.ADDRESS, start().address)
    monkeypatch.setattr(bb.connections, "_current", None)
    build.fetch(peer(script).url())
    assert build.read() == b"halffull"
    assert build.wget_calls() == []


def serve_in_child():
    """A server in a process of its own. Returns its id and address."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(reader)
            connections = server.Connections(types.SimpleNamespace(extraconfigdata={}), bb.data.init())
            connections.start()
            os.write(writer, connections.address.encode())
            os.close(writer)
            signal.pause()
        finally:
            os._exit(1)
    os.close(writer)
    with os.fdopen(reader, "rb") as f:
        return child, f.read().decode()


def test_server_is_killed_in_the_body(build, peer, warnings):
    def script(talk):
        talk.request()
        talk.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nhalf")
        wait_until(lambda: any(build.read(n) == b"half" for n in build.left()), "bytes")
        os.kill(child, signal.SIGKILL)
        talk.wait_closed()
    child, address = serve_in_child()
    build.d.setVar(bb.connections.ADDRESS, address)
    try:
        build.fetch(peer(script).url())
    finally:
        os.waitpid(child, 0)
    assert len(build.wget_calls()) == 1
    assert fetched_by_wget(build)
    assert build.left() == ["x"]
    assert len(warnings()) == 1


def test_server_is_killed_while_a_task_waits(build, peer):
    mirror = peer(peers.hangs)
    child, address = serve_in_child()
    build.d.setVar(bb.connections.ADDRESS, address)
    killer = threading.Thread(target=lambda: (mirror.wait_for(lambda p: p.requests), os.kill(child, signal.SIGKILL)))
    killer.start()
    ud = bb.fetch2.Fetch([mirror.url()], build.d, cache=False).ud[mirror.url()]
    assert client.download(ud, build.d, str(build.downloads / "x")) is None
    killer.join(10)
    os.waitpid(child, 0)
    assert build.left() == []
    assert client.checkstatus(ud, build.d) is None


class Stranger:
    """Something else at the address: a script for one task"""

    def __init__(self, script):
        self.name = "bitbake-test-%s-%s" % (os.getpid(), id(self))
        self.heard = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind("\0" + self.name)
        self._listener.listen()
        self._thread = threading.Thread(target=self._run, args=(script,), daemon=True)
        self._thread.start()

    @property
    def address(self):
        return "%s:%s" % (os.geteuid(), self.name)

    def _run(self, script):
        sock, _ = self._listener.accept()
        sock.settimeout(10)
        with sock:
            for answer in script:
                sock.send(answer)
                data = sock.recv(1 << 20)
                if not data:
                    return
                self.heard.append(data)

    def close(self):
        self._listener.close()
        self._thread.join(10)


HELLO = b'{"hello": 1}'


@pytest.mark.parametrize("script, requests", [
    ([b'{"hello": 2}'] * 2, 0),
    ([b'{"hello": "1"}'] * 2, 0),
    ([b'{"schemes": []}'] * 2, 0),
    ([b"SSH-2.0-x"] * 2, 0),
    ([b"[]"] * 2, 0),
    ([], 0),
    ([HELLO], 1),
    ([HELLO, b"nonsense"], 1),
    ([HELLO, b"{}"], 1),
    ([HELLO, b'{"id": 99, "status": 200, "size": 0}'], 1),
    ([HELLO, b'{"id": 1}'], 1),
    ([HELLO, b'{"id": null, "error": "protocol", "message": "no"}'], 1),
    ([HELLO, b"x" * 70000], 1),
])
def test_what_is_no_server_of_ours(build, mirror, warnings, script, requests):
    stranger = Stranger(script)
    build.d.setVar(bb.connections.ADDRESS, stranger.address)
    build.fetch(mirror.url())
    stranger.close()
    assert len(stranger.heard) == requests
    assert len(build.wget_calls()) == 1
    assert fetched_by_wget(build)
    assert build.left() == ["x"]
    assert len(warnings()) == 1


@pytest.mark.parametrize("answer", [
    b'{"id": 1, "status": 200, "size": 7, "modified": null}',
    b'{"id": 1, "status": 200, "size": null}',
    b'{"id": 1, "status": 200}',
    b'{"id": 1, "error": "connect", "message": "no"}',
])
def test_answer_without_the_file(build, mirror, answer):
    """Whatever the server says, the bytes have to be there"""
    stranger = Stranger([HELLO, answer])
    build.d.setVar(bb.connections.ADDRESS, stranger.address)
    build.fetch(mirror.url())
    client._client._sock.close()
    stranger.close()
    assert fetched_by_wget(build)
    assert build.left() == ["x"]


@pytest.mark.parametrize("address", ["", "nonsense", "0", ":", "12345678:bitbake-none"])
def test_address_that_is_none(build, mirror, address):
    build.d.setVar(bb.connections.ADDRESS, address)
    build.fetch(mirror.url())
    assert fetched_by_wget(build)


def test_socket_of_another_user(build, mirror, task_connections, warnings):
    """Who could take the name once the server is gone"""
    _, _, name = task_connections.address.partition(":")
    build.d.setVar(bb.connections.ADDRESS, "%s:%s" % (os.geteuid() + 1, name))
    build.fetch(mirror.url())
    assert fetched_by_wget(build)
    assert mirror.connections == 0
    assert len(warnings()) == 1


def test_url_that_is_too_long_for_a_message(build, mirror, warnings):
    build.fetch(mirror.url("/x?" + "y" * 70000 + ";downloadfilename=x"))
    assert fetched_by_wget(build)
    build.fetch(mirror.url("/y"))
    assert build.read("y") == b"content", "the connection is good for others"


def test_query_ends_with_the_build(build, peer, task_connections, monkeypatch):
    """The presence query in the server does not wait for a mirror that hangs when the pool is stopped"""
    mirror = peer(peers.hangs)
    monkeypatch.setattr(bb.connections, "_current", task_connections)
    build.d.delVar("BB_WORKERCONTEXT")
    ud = bb.fetch2.Fetch([mirror.url()], build.d, cache=False).ud[mirror.url()]
    found = []
    query = threading.Thread(target=lambda: found.append(client.checkstatus(ud, build.d)))
    query.start()
    mirror.wait_for(lambda p: p.requests)
    task_connections.stop()
    query.join(15)
    assert found == [None]
