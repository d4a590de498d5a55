# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""Whatever fails of the shared connections, a task fetches as without them: no half file on disk, one warning."""

import os
import signal
import socket
import threading
from unittest import mock

import bb
import bb.fetch2
import pytest

from bb.connections import protocol
from bb.connections.server import ConnectionServer
from bb.fetch2 import shared
from support.asking import wait_until
from wire import peers


@pytest.fixture
def mirror(peer):
    return peer(peers.serve({"/x": b"content", "/y": b"content"}))


@pytest.fixture
def warnings(caplog):
    """Different ones: what shows them shows each of these once"""
    caplog.set_level(1, logger="BitBake")
    return lambda: sorted({r.getMessage() for r in caplog.records
                           if r.levelno >= 29 and "shared connections" in r.getMessage()})


CANNOT_USE = "Cannot use the BitBake server's shared connections, fetching directly instead"


def fetched_by_wget(build, name="x"):
    """wget was started for name with nothing of it in the folder, and what it wrote is what there is"""
    return build.read(name) == b"from wget" and not [n for n in build.wget_saw() if n.startswith(name)]


@pytest.mark.parametrize("script", [
    peers.dies_in_body([(b"x" * 100000, 50000)] * 10),
    peers.raw(b"HTTP/1.1 200 OK\r\n\r\nno length"),
    peers.raw(b"nonsense\r\n\r\n"),
    peers.with_status(403), peers.with_status(405),
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


@pytest.mark.parametrize("script", [peers.with_status(503, "Retry-After: 3600"), peers.with_status(403, "Retry-After: 3600")])
def test_mirror_that_does_not_answer(build, peer, script, warnings, connections):
    """A connection of the task's own would not be served better: the object counts as absent."""
    mirror = peer(script)
    for name in ("x", "y"):
        with pytest.raises(bb.fetch2.FetchError):
            build.fetch(mirror.url("/" + name))
        assert not build.exists(mirror.url("/" + name))
    assert build.left() == [] and build.wget_calls() == []
    assert mirror.connections == 1
    assert warnings() == [], "the server's part has not failed"


def test_mirror_that_is_not_there(build, warnings):
    """That takes UNREACHABLE seconds once, and none for the others"""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        url = "http://127.0.0.1:%s/" % sock.getsockname()[1]
    for name in ("x", "y"):
        with pytest.raises(bb.fetch2.FetchError):
            build.fetch(url + name)
        assert not build.exists(url + name)
    assert build.left() == [] and build.wget_calls() == []
    assert warnings() == []


@pytest.mark.parametrize("status", [204, 206, 203])
def test_head_that_is_answered_by_another_status(build, peer, status):
    """The fetcher has the last word about it"""
    def script(talk):
        for request in talk.requests():
            talk.answer(request, b"content", status=status if request.method == "HEAD" else 200)
    mirror = peer(script)
    assert build.exists(mirror.url())
    build.fetch(mirror.url())
    assert build.read() == b"content"
    assert build.wget_calls() == []


def test_no_more_threads(start, monkeypatch, warnings):
    """The system may have none left"""
    before = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as context:
        context.setattr(threading.Thread, "start", mock.Mock(side_effect=RuntimeError("can't start new thread")))
        connections = start()
    assert connections.server is None
    assert connections.cooker.extraconfigdata == {} and connections.d.getVar(shared.ADDRESS) is None
    assert warnings() == ["Could not start shared connections, fetching directly instead: can't start new thread"]
    assert len(os.listdir("/proc/self/fd")) == before


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


def test_server_is_gone(build, mirror, connections, warnings):
    connections.stop()
    for name in ("x", "y"):
        build.fetch(mirror.url("/" + name))
        assert fetched_by_wget(build, name)
    assert len(build.wget_calls()) == 2
    assert warnings() == [CANNOT_USE]
    assert mirror.connections == 0


def test_server_hangs(build, mirror, warnings, monkeypatch):
    """One that does not even show progress is not used again"""
    monkeypatch.setattr(protocol, "SILENCE_SECONDS", 0.1)
    stranger = Stranger([[HELLO], []])
    build.d.setVar(shared.ADDRESS, stranger.address)
    for name in ("x", "y"):
        build.fetch(mirror.url("/" + name))
        assert fetched_by_wget(build, name)
    stranger.close()
    assert len(stranger.received) == 1
    assert len(build.wget_calls()) == 2
    assert build.left() == ["x", "y"]
    assert warnings() == [CANNOT_USE]


def test_progress_is_waited_for(build, mirror):
    stranger = Stranger([[HELLO], [b'{"id": 1, "progress": 0}', b'{"id": 1, "progress": 4}', b'{"id": 1, "status": 404}']])
    build.d.setVar(shared.ADDRESS, stranger.address)
    with pytest.raises(bb.fetch2.FetchError):
        build.fetch(mirror.url())
    assert build.wget_calls() == []
    # So that the client of this thread, which the stranger waits for, is replaced
    build.d.setVar(shared.ADDRESS, "0:nobody")
    build.fetch(mirror.url())
    stranger.close()
    assert len(stranger.received) == 1


def test_interrupted_while_it_waits(build, mirror, monkeypatch):
    """The build is about to end: the request is cancelled, and the mirror not asked in another way"""
    interrupted = threading.Event()
    interrupted.set()
    monkeypatch.setattr(bb.event, "_should_exit", interrupted)
    stranger = Stranger([[HELLO], [b'{"id": 1, "progress": 0}']])
    build.d.setVar(shared.ADDRESS, stranger.address)
    ud = bb.fetch2.Fetch([mirror.url()], build.d, cache=False).ud[mirror.url()]
    assert shared.checkstatus(ud, build.d) is False
    # It is closed
    stranger.close()
    assert mirror.connections == 0


def serve_in_child():
    """A server in a process of its own. Returns its id and address."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(reader)
            server = ConnectionServer()
            server.start()
            os.write(writer, server.address.encode())
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
    build.d.setVar(shared.ADDRESS, address)
    try:
        build.fetch(peer(script).url())
    finally:
        os.waitpid(child, 0)
    assert len(build.wget_calls()) == 1
    assert fetched_by_wget(build)
    assert build.left() == ["x"]
    assert warnings() == [CANNOT_USE]


def test_server_is_killed_while_a_task_waits(build, peer):
    mirror = peer(peers.hangs)
    child, address = serve_in_child()
    build.d.setVar(shared.ADDRESS, address)
    killer = threading.Thread(target=lambda: (mirror.wait_for(lambda p: p.requests), os.kill(child, signal.SIGKILL)))
    killer.start()
    ud = bb.fetch2.Fetch([mirror.url()], build.d, cache=False).ud[mirror.url()]
    ud.setup_localpath(build.d)
    assert shared.download(ud, build.d) is False
    killer.join(10)
    os.waitpid(child, 0)
    assert build.left() == []
    assert shared.checkstatus(ud, build.d) is None


class Stranger:
    """Something else at the address, for one task: sends each list of packets, and receives one after each list"""

    def __init__(self, script):
        self.name = "bitbake-test-%s-%s" % (os.getpid(), id(self))
        self.received = []
        self.abandoned = False
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
            for packets in script:
                for packet in packets:
                    sock.send(packet)
                try:
                    data = sock.recv(1 << 20)
                except socket.timeout:
                    self.abandoned = True
                    return
                if not data:
                    return
                self.received.append(data)

    def close(self):
        """Waits until the client has closed, or the script is at its end"""
        self._thread.join(15)
        assert not self._thread.is_alive() and not self.abandoned, "the client has not closed"
        self._listener.close()


HELLO = b'{"hello": 1}'


@pytest.mark.parametrize("script, requests", [
    ([[b'{"hello": 2}']] * 2, 0),
    ([[b'{"hello": "1"}']] * 2, 0),
    ([[b'{"schemes": []}']] * 2, 0),
    ([[b"SSH-2.0-x"]] * 2, 0),
    ([[b"[]"]] * 2, 0),
    ([], 0),
    ([[HELLO]], 1),
    ([[HELLO], [b"nonsense"]], 1),
    ([[HELLO], [b"{}"]], 1),
    ([[HELLO], [b'{"id": 99, "status": 200, "size": 0}']], 1),
    ([[HELLO], [b'{"id": 1}']], 1),
    ([[HELLO], [b'{"id": null, "error": "protocol", "message": "no"}']], 1),
    ([[HELLO], [b"x" * 70000]], 1),
])
def test_what_is_no_server_of_ours(build, mirror, warnings, script, requests):
    stranger = Stranger(script)
    build.d.setVar(shared.ADDRESS, stranger.address)
    build.fetch(mirror.url())
    stranger.close()
    assert len(stranger.received) == requests
    assert len(build.wget_calls()) == 1
    assert fetched_by_wget(build)
    assert build.left() == ["x"]
    assert warnings() == [CANNOT_USE]


@pytest.mark.parametrize("answer", [
    b'{"id": 1, "status": 200, "size": 7, "modified": null}',
    b'{"id": 1, "status": 200, "size": null}',
    b'{"id": 1, "status": 200}',
    b'{"id": 1, "error": "protocol", "message": "no"}', b'{"id": 1, "error": "status", "message": "no"}',
    b'{"id": 1, "error": "destination", "message": "no"}', b'{"id": 1, "error": "error", "message": "no"}',
    b'{"id": 1, "error": "of the future", "message": "no"}',
])
def test_answer_without_the_file(build, mirror, answer):
    """Whatever the server says, the bytes have to be there"""
    stranger = Stranger([[HELLO], [answer]])
    build.d.setVar(shared.ADDRESS, stranger.address)
    build.fetch(mirror.url())
    # So that the client of this thread, which the stranger waits for, is replaced
    build.d.setVar(shared.ADDRESS, "0:nobody")
    build.fetch(mirror.url("/y"))
    stranger.close()
    assert build.read() == b"from wget"
    assert build.left() == ["x", "y"]


@pytest.mark.parametrize("answer", [
    b'{"id": 1, "error": "connect", "message": "no"}', b'{"id": 1, "error": "refused", "message": "no"}',
    b'{"id": 1, "error": "timeout", "message": "no"}', b'{"id": 1, "status": 500}', b'{"id": 1, "status": 504}',
    b'{"id": 1, "status": 404}', b'{"id": 1, "status": 410}',
])
def test_answer_of_the_mirror_that_there_is_no_file(build, mirror, answer, warnings):
    """The task does not ask the mirror over a connection of its own"""
    stranger = Stranger([[HELLO], [answer]])
    build.d.setVar(shared.ADDRESS, stranger.address)
    with pytest.raises(bb.fetch2.FetchError):
        build.fetch(mirror.url())
    assert build.left() == [] and build.wget_calls() == []
    assert mirror.connections == 0
    assert warnings() == []
    # So that the client of this thread, which the stranger waits for, is replaced
    build.d.setVar(shared.ADDRESS, "0:nobody")
    build.fetch(mirror.url("/y"))
    stranger.close()


def test_page_instead_of_an_archive(build, peer):
    """A login page, with 200: nothing of it is stored, and wget would get the same"""
    mirror = peer(peers.serve({"/sstate-x.tar.zst": b"<html>Please log in"}))
    with pytest.raises(bb.fetch2.FetchError):
        build.fetch(mirror.url("/sstate-x.tar.zst"))
    assert build.left() == [] and build.wget_calls() == []


def test_page_instead_of_a_siginfo(build, peer, warnings):
    """As stock: the object is installed without it, and an error would fail the build"""
    mirror = peer(peers.serve({"/sstate-x.tar.zst.siginfo": b"<html>Please log in"}))
    build.fetch(mirror.url("/sstate-x.tar.zst.siginfo"))
    assert build.read("sstate-x.tar.zst.siginfo") == b"<html>Please log in"
    assert build.wget_calls() == [] and warnings() == []


@pytest.mark.parametrize("content", [b"\x28\xb5\x2f\xfdx", b"\x50\x2a\x4d\x18x", b"\x5f\x2a\x4d\x18x"])
def test_archive(build, peer, content):
    """The frames of zstd and of pzstd"""
    mirror = peer(peers.serve({"/sstate-x.tar.zst": content, "/x.tgz": b"anything"}))
    build.fetch(mirror.url("/sstate-x.tar.zst"))
    build.fetch(mirror.url("/x.tgz"))
    assert build.read("sstate-x.tar.zst") == content and build.read("x.tgz") == b"anything"
    assert build.wget_calls() == []


@pytest.mark.parametrize("address", ["", "nonsense", "0", ":", "12345678:bitbake-none"])
def test_address_that_is_none(build, mirror, address):
    build.d.setVar(shared.ADDRESS, address)
    build.fetch(mirror.url())
    assert fetched_by_wget(build)


def test_socket_of_another_user(build, mirror, connections, warnings):
    """Another user may take the name once the server has gone"""
    _, _, name = connections.server.address.partition(":")
    build.d.setVar(shared.ADDRESS, "%s:%s" % (os.geteuid() + 1, name))
    build.fetch(mirror.url())
    assert fetched_by_wget(build)
    assert mirror.connections == 0
    assert warnings() == [CANNOT_USE]


def test_url_that_is_too_long_for_a_message(build, mirror, warnings):
    build.fetch(mirror.url("/x?" + "y" * 70000 + ";downloadfilename=x"))
    assert fetched_by_wget(build)
    build.fetch(mirror.url("/y"))
    assert build.read("y") == b"content", "the connection is good for others"


def test_query_ends_with_the_build(build, peer, connections):
    """A query in the server does not wait for a mirror that hangs"""
    mirror = peer(peers.hangs)
    build.d.delVar("BB_WORKERCONTEXT")
    ud = bb.fetch2.Fetch([mirror.url()], build.d, cache=False).ud[mirror.url()]
    found = []
    query = threading.Thread(target=lambda: found.append(shared.checkstatus(ud, build.d)))
    query.start()
    mirror.wait_for(lambda p: p.requests)
    connections.stop()
    query.join(15)
    assert found == [None]
