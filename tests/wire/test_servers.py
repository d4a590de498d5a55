# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""The pool before servers that close, refuse, die and come back: connections, requests, bytes."""

import socket
import threading
import time

import pytest

from bb.connections import ConnectError, ProtocolError, StatusError
from bb.connections import host as host_module
from bb.connections.host import ATTEMPTS
from bb.connections.pool import Pool
from support.asking import Asked, ask_all, wait_until
from wire import peers


def one_by_one(pool, peer, number, method="GET"):
    """Each request is answered before the next, over at most one connection at a time."""
    asked = []
    for i in range(number):
        asked += ask_all(pool, method, [peer.url("/%s" % i)])
        asked[-1].wait()
    return asked


def test_one_connection_for_all(peer, pool):
    there = peer(peers.keep_alive)
    asked = one_by_one(pool, there, 100)
    assert [a.body() for a in asked] == [b"/%d" % i for i in range(100)]
    assert there.connections == 1
    assert there.targets == ["/%s" % i for i in range(100)]


def test_requests_are_sent_one_at_a_time(peer, pool):
    """Depth 1: nothing is sent while an answer is due."""
    def script(talk):
        for request in talk.requests():
            early.append(talk._buffer)
            talk.answer(request)
    early = []
    pool.limit = 1
    there = peer(script)
    assert [a.status() for a in ask_all(pool, "HEAD", [there.url()] * 50)] == [200] * 50
    assert early == [b""] * 50


@pytest.mark.parametrize("limit", [1, 4])
def test_limit(peer, quick, limit):
    """200 requests at once: as many connections as are allowed, no more, and all of them are used."""
    met = threading.Barrier(limit)

    def script(talk):
        for i, request in enumerate(talk.requests()):
            if i == 0:
                met.wait(10)
            talk.answer(request, request.target.encode())
    there = peer(script)
    pool = Pool(limit, timeout=10)
    asked = ask_all(pool, "GET", [there.url("/%s" % i) for i in range(200)])
    assert [a.body() for a in asked if a.status()] == [b"/%d" % i for i in range(200)]
    assert there.connections == there.peak == limit
    assert sorted(there.targets) == sorted("/%s" % i for i in range(200))
    assert pool.statistics.connections == limit
    assert (pool.statistics.files, pool.statistics.bytes) == (200, sum(len("/%s" % i) for i in range(200)))
    assert pool.stop()


@pytest.mark.parametrize("announced", [True, False])
def test_closes_after_every_third_answer(peer, pool, announced):
    there = peer(peers.closes_after(3, announced))
    asked = one_by_one(pool, there, 12)
    assert [a.body() for a in asked] == [b"/%d" % i for i in range(12)]
    assert there.connections == 4
    assert there.targets == ["/%s" % i for i in range(12)]
    assert pool.statistics.retries == 0


@pytest.mark.parametrize("announced", [True, False])
def test_closes_after_answers_under_load(peer, pool, announced):
    there = peer(peers.closes_after(5, announced))
    asked = ask_all(pool, "GET", [there.url("/%s" % i) for i in range(100)])
    assert [a.body() for a in asked if a.status()] == [b"/%d" % i for i in range(100)]
    assert 20 <= there.connections <= 24
    assert sorted(there.targets) == sorted("/%s" % i for i in range(100))


def test_closes_the_idle_connection(peer, pool):
    there = peer(peers.closes_idle)
    there.close_idle = threading.Event()
    first = one_by_one(pool, there, 1)[0]
    assert first.status() == 200
    there.close_idle.set()
    there.wait_for(lambda p: p.open == 0)
    second = one_by_one(pool, there, 1)[0]
    assert second.body() == b"/0"
    assert there.connections == 2
    assert pool.statistics.retries == 0


def test_http_1_0(peer, pool):
    def script(talk):
        for request in talk.requests():
            talk.answer(request, b"old", version="HTTP/1.0")
            return
    there = peer(script)
    assert [a.body() for a in one_by_one(pool, there, 3)] == [b"old"] * 3
    assert there.connections == 3


def test_http_1_0_with_keep_alive(peer, pool):
    def script(talk):
        for request in talk.requests():
            talk.answer(request, b"old", "Connection: keep-alive", version="HTTP/1.0")
    there = peer(script)
    assert [a.body() for a in one_by_one(pool, there, 3)] == [b"old"] * 3
    assert there.connections == 1


@pytest.mark.parametrize("whole", [b"w" * 100000, b"short"])
def test_dies_in_the_body_then_serves_the_whole(peer, pool, whole):
    """Also if the second is shorter than what came of the first."""
    there = peer(peers.dies_in_body([(b"x" * 200000, 90000), (b"y" * 200000, 3), (whole, len(whole))]))
    asked = one_by_one(pool, there, 1)[0]
    assert asked.status() == 200
    assert asked.body() == whole
    assert there.connections == 3
    assert pool.statistics.retries == 2


def test_always_dies_in_the_body(peer, pool):
    there = peer(peers.dies_in_body([(b"x" * 1000, 999)] * 10))
    asked = one_by_one(pool, there, 1)[0]
    assert isinstance(asked.error(), ProtocolError)
    assert there.connections == ATTEMPTS


def test_reset_in_the_body(peer, pool):
    def script(talk):
        request = talk.request()
        if talk.number > 1:
            talk.answer(request, b"whole")
            return
        talk.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nhalf")
        talk.reset()
    assert one_by_one(pool, peer(script), 1)[0].body() == b"whole"


@pytest.mark.parametrize("extra", [b"garbage", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nwrong"])
def test_longer_than_announced(peer, pool, extra):
    """What is too much must not become the next answer, whatever it looks like."""
    def script(talk):
        for request in talk.requests():
            body = request.target.encode()
            talk.answer(request, body + extra, length=len(body))
    asked = one_by_one(pool, peer(script), 3)
    assert [a.body() for a in asked if a.status()] == [b"/0", b"/1", b"/2"]


def test_no_length_is_not_retried(peer, pool):
    there = peer(peers.raw(b"HTTP/1.1 200 OK\r\n\r\nhalf or whole?"))
    assert isinstance(one_by_one(pool, there, 1)[0].error(), StatusError)
    assert there.connections == 1


def test_silence(peer, quick):
    pool = Pool(1, timeout=0.05)
    there = peer(peers.hangs)
    asked = Asked("HEAD", there.url())
    pool.submit(asked.request)
    assert "nothing heard" in str(asked.error())
    assert len(asked.calls) == 1
    assert pool.stop()


@pytest.mark.parametrize("status", [404, 410, 403, 405, 500])
def test_status_is_an_answer(peer, pool, status):
    there = peer(peers.with_status(status))
    assert [a.status() for a in one_by_one(pool, there, 5)] == [status] * 5
    assert there.connections == 1
    assert len(there.requests) == 5


def test_server_that_serves_one_connection_only(peer, pool):
    """It says 503 to the others: the number of connections falls, and all is answered."""
    there = peer(peers.refuses_second)
    asked = ask_all(pool, "HEAD", [there.url("/%s" % i) for i in range(60)])
    assert [a.status() for a in asked] == [200] * 60
    assert pool.statistics.refusals >= 1
    assert pool._hosts[asked[0].request.origin]._limit < 4


def test_server_that_resets_further_connections(peer, pool):
    """The same limit said in another way, as load balancers and sshd say it."""
    def script(talk):
        if talk.peer.open > 1:
            talk.reset()
            return
        peers.keep_alive(talk)
    there = peer(script)
    asked = ask_all(pool, "HEAD", [there.url("/%s" % i) for i in range(60)])
    assert [a.status() for a in asked] == [200] * 60


@pytest.mark.parametrize("status", [408, 429, 503])
@pytest.mark.parametrize("as_date", [False, True])
def test_retry_after(peer, pool, status, as_date):
    """Nothing is asked of the host before the time it named."""
    times = []

    def script(talk):
        for request in talk.requests():
            times.append(time.time())
            if len(times) > 1:
                talk.answer(request)
                continue
            until = int(times[0]) + 2
            value = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(until)) if as_date else "1"
            talk.answer(request, b"", "Retry-After: " + value, status=status)
    there = peer(script)
    pool.limit = 1
    asked = ask_all(pool, "HEAD", [there.url()] * 5)
    assert [a.status() for a in asked] == [200] * 5
    assert times[1] >= (int(times[0]) + 2 if as_date else times[0] + 1) - 0.05
    assert pool.statistics.refusals == 1


def test_endless_retry_after_is_cut(peer, pool, monkeypatch):
    monkeypatch.setattr(host_module, "MAX_PAUSE", 0.05)
    there = peer(peers.with_status(503, "Retry-After: 86400"))
    assert one_by_one(pool, there, 1)[0].error().kind == "refused"
    assert len(there.requests) == ATTEMPTS


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


def test_refused_port_then_the_server_is_back(pool, monkeypatch):
    monkeypatch.setattr(host_module, "BREAKER_PAUSE", 60)
    port = free_port()
    url = "http://127.0.0.1:%s/x" % port
    errors = [a.error() for a in ask_all(pool, "HEAD", [url] * 20)]
    assert all(isinstance(e, ConnectError) and not e.retryable for e in errors)
    assert pool.troubles()[0][0] == "127.0.0.1"
    attempts = pool.statistics.requests
    late = ask_all(pool, "HEAD", [url] * 5)
    assert all(a.answered for a in late)
    assert pool.statistics.requests == attempts

    listener = socket.create_server(("127.0.0.1", port))
    try:
        pool._hosts[late[0].request.origin]._pause_until = 0
        probe, second = ask_all(pool, "GET", [url, url])
        sock, _ = listener.accept()
        sock.settimeout(10)
        for asked in (probe, second):
            assert sock.recv(65536).startswith(b"GET /x ")
            sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nback")
            assert asked.status() == 200
            assert asked.body() == b"back"
        sock.close()
    finally:
        listener.close()


def test_idle_connection_is_closed_and_another_opened(peer, pool, monkeypatch):
    monkeypatch.setattr(host_module, "IDLE", 0.02)
    there = peer(peers.keep_alive)
    for connections in (1, 2):
        assert one_by_one(pool, there, 1)[0].status() == 200
        assert there.connections == connections
        there.wait_for(lambda p: p.open == 0)


def test_ipv6(peer, pool):
    try:
        there = peer(peers.keep_alive, host="::1")
    except OSError as e:
        pytest.skip("no IPv6 loopback: %s" % e)
    assert one_by_one(pool, there, 1)[0].body() == b"/0"
    assert there.requests[0].headers["host"] == "[::1]:%s" % there.port


def test_name_that_does_not_exist(pool):
    asked = Asked("HEAD", "http://no-such-host.invalid/x")
    pool.submit(asked.request)
    assert isinstance(asked.error(), ConnectError)


def test_file_that_cannot_be_written(peer, pool, tmp_path):
    there = peer(peers.keep_alive)
    with open(tmp_path / "file", "wb") as f:
        pass
    asked = Asked("GET", there.url())
    with open(tmp_path / "file", "rb") as f:
        asked.request.fd = f.fileno()
        pool.submit(asked.request)
        assert asked.error().kind == "destination"
    assert one_by_one(pool, there, 1)[0].status() == 200


def test_cancelled_while_it_waits_its_turn(peer, pool):
    gate = threading.Event()

    def script(talk):
        for request in talk.requests():
            gate.wait(10)
            talk.answer(request)
    there = peer(script)
    pool.limit = 1
    first, second, third = ask_all(pool, "GET", [there.url("/%s" % i) for i in range(3)])
    second.request.cancelled = True
    gate.set()
    assert first.status() == third.status() == 200
    assert second.error().kind == "cancelled"
    assert there.targets == ["/0", "/2"]


def test_cancelled_in_the_body_leaves_the_pool_usable(peer, pool):
    def script(talk):
        for request in talk.requests():
            if request.target == "/long":
                talk.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\nx")
                long.request.cancelled = True
                talk.send(b"x" * 100)
                talk.wait_closed()
                return
            talk.answer(request, b"short")
    there = peer(script)
    long = Asked("GET", there.url("/long"))
    pool.submit(long.request)
    assert long.error().kind == "cancelled"
    assert pool.statistics.retries == 0
    assert one_by_one(pool, there, 1)[0].body() == b"short"
    wait_until(lambda: there.open == 1, "the connection with half a body is closed")
