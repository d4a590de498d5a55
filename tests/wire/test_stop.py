# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""Pool.stop() in every state a connection can be in: quick, complete, and each request ended once."""

import socket
import threading

import pytest

from bb.connections.http import HTTPConnection
from bb.connections.pool import Pool
from support.asking import Asked, ask_all, wait_until
from wire import peers

# Longer than a test may take, so that only an abort can end what waits
TIMEOUT = 60


@pytest.fixture
def stopped():
    """Called with a pool stops it, and checks that it is over."""
    before = threading.enumerate()

    def check(pool, asked):
        assert pool.stop(timeout=5), "a thread is left"
        assert [len(one.calls) for one in asked] == [1] * len(asked)
        assert not [t for t in threading.enumerate() if t.name.startswith("connection to") and t not in before]
        assert pool.connections() == []
    return check


def cancelled(asked):
    return [one.error().kind for one in asked] == ["cancelled"] * len(asked)


def test_never_used(stopped):
    stopped(Pool(4), [])


def test_idle(peer, stopped):
    there = peer(peers.keep_alive)
    pool = Pool(4, timeout=TIMEOUT)
    asked = ask_all(pool, "HEAD", [there.url()] * 20)
    assert [a.status() for a in asked] == [200] * 20
    stopped(pool, asked)
    there.wait_for(lambda p: p.open == 0)


def test_no_answer_yet(peer, stopped):
    there = peer(peers.hangs)
    pool = Pool(4, timeout=TIMEOUT)
    asked = ask_all(pool, "GET", [there.url()] * 20)
    there.wait_for(lambda p: len(p.requests) == 4)
    stopped(pool, asked)
    assert cancelled(asked)


@pytest.mark.parametrize("secure", [False, True])
def test_in_the_body(peer, stopped, tls, trusting, secure):
    def script(talk):
        talk.request()
        talk.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nhalf")
        talk.wait_closed()
    there = peer(script, tls=tls if secure else None)
    pool = Pool(2, timeout=TIMEOUT)
    asked = ask_all(pool, "GET", [there.url()] * 5, environment=trusting)
    wait_until(lambda: [a.request.received for a in asked].count(4) == 2, "two are in the body")
    stopped(pool, asked)
    assert cancelled(asked)
    assert len(there.requests) == 2


def test_in_the_handshake(peer, stopped):
    there = peer(lambda talk: talk.wait_closed())
    pool = Pool(4, timeout=TIMEOUT)
    asked = ask_all(pool, "HEAD", [there.url().replace("http:", "https:")] * 20)
    # The first bytes of all four handshakes
    there.wait_for(lambda p: p.received.count(b"\x16\x03\x01") == 4)
    stopped(pool, asked)
    assert cancelled(asked)


@pytest.fixture
def full():
    """The address of a listener whose backlog is full: to connect lasts for ever"""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        fillers = []
        for _ in range(8):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
            fillers.append(filler)
        with socket.socket() as sock:
            sock.settimeout(0.3)
            try:
                sock.connect(listener.getsockname())
                pytest.skip("this kernel accepts more than its backlog")
            except socket.timeout:
                pass
        yield "http://127.0.0.1:%s/x" % listener.getsockname()[1]
        for filler in fillers:
            filler.close()


def test_connecting(full, stopped):
    pool = Pool(2, timeout=TIMEOUT)
    asked = ask_all(pool, "HEAD", [full] * 5)
    wait_until(lambda: [c.fileno() >= 0 for c in pool.connections()] == [True, True], "two are connecting")
    stopped(pool, asked)
    assert cancelled(asked)


@pytest.mark.parametrize("secure", [False, True])
def test_about_to_connect(full, peer, stopped, secure):
    """stop() comes when the connection is known but has no socket yet."""
    url = full
    if secure:
        url = peer(lambda talk: talk.wait_closed()).url().replace("http:", "https:")
    reached, stopping = threading.Event(), threading.Event()

    class Late(HTTPConnection):
        def connect(self):
            reached.set()
            assert stopping.wait(10)
            super().connect()

        def abort(self):
            super().abort()
            stopping.set()

    pool = Pool(1, timeout=TIMEOUT, classes={"http": Late, "https": Late})
    asked = ask_all(pool, "HEAD", [url])
    assert reached.wait(10)
    stopped(pool, asked)


def test_paused(peer, stopped):
    there = peer(peers.with_status(503, "Retry-After: 60"))
    pool = Pool(4, timeout=TIMEOUT)
    asked = ask_all(pool, "HEAD", [there.url()] * 20)
    wait_until(lambda: pool.statistics.refusals >= 1 and len(pool.connections()) <= 2, "the pause")
    stopped(pool, asked)
    assert cancelled(asked)
    assert len(there.requests) <= 4


def test_left_alone(quick, stopped):
    with socket.create_server(("127.0.0.1", 0)) as sock:
        url = "http://127.0.0.1:%s/" % sock.getsockname()[1]
    pool = Pool(4, timeout=TIMEOUT)
    asked = ask_all(pool, "HEAD", [url] * 5)
    for one in asked:
        assert one.error().kind in ("connect", "cancelled")
    stopped(pool, asked)


def test_while_others_submit(peer, stopped):
    there = peer(peers.keep_alive)
    pool = Pool(4, timeout=TIMEOUT)
    asked = []
    first = threading.Event()

    def submit():
        for _ in range(300):
            one = Asked("HEAD", there.url())
            asked.append(one)
            pool.submit(one.request)
            first.set()
    thread = threading.Thread(target=submit)
    thread.start()
    assert first.wait(10)
    assert pool.stop(timeout=5)
    thread.join(10)
    for one in asked:
        one.wait()
    stopped(pool, asked)


def test_twice(peer, stopped):
    there = peer(peers.hangs)
    pool = Pool(1, timeout=TIMEOUT)
    asked = ask_all(pool, "HEAD", [there.url()])
    there.wait_for(lambda p: p.requests)
    stopped(pool, asked)
    stopped(pool, asked)
