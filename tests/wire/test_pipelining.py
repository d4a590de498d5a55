# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""Many requests in flight on a connection: what is sent when, and servers that cannot deal with it."""

import socket
import threading
import time

import pytest

from bb.connections import host as host_module, pipelining, pool as pool_module
from bb.connections.pool import Pool
from support.asking import Asked

DEPTH = 16
STATUSES = {"found": 200, "missing": 404}


@pytest.fixture
def make_pool(quick):
    """Called with a limit returns a Pool of depth DEPTH."""
    pools = []

    def make(limit=1, depth=DEPTH, timeout=10):
        pools.append(Pool(limit, depth, timeout=timeout))
        return pools[-1]
    yield make
    for pool in pools:
        assert pool.stop()


def ask_all(pool, method, urls, **members):
    """As asking.ask_all(), but all are queued before the first is sent: what goes with what is certain"""
    asked = [Asked(method, url, **members) for url in urls]
    pool.submit(*[one.request for one in asked])
    return asked


def paths(number):
    return ["/%s/%s" % ("missing" if i % 3 == 2 else "found", i) for i in range(number)]


def answer(talk, request, *headers, **kwargs):
    """By the path: 404, or a body of as many bytes as its last part says"""
    kind, size = request.target.split("/")[1:]
    talk.answer(request, b"x" * int(size), *headers, status=STATUSES[kind], **kwargs)


def works(talk):
    for request in talk.requests():
        answer(talk, request)


def linger(talk):
    """Close as nginx does: what is still arriving must not make the system throw away what was sent"""
    talk.sock.shutdown(socket.SHUT_WR)
    talk.wait_closed()


def right(asked):
    """Whether each has the answer to what it asked"""
    for one in asked:
        kind, size = one.request.target.split("/")[1:]
        response, error = one.wait()
        if error or (response.status, response.length) != (STATUSES[kind], int(size)):
            return False
    return True


def test_in_flight(peer, make_pool):
    """First one alone, then the test, then DEPTH at a time and never more"""
    flying = []
    gate = threading.Event()

    def script(talk):
        first = talk.request()
        answer(talk, first)
        for request in talk.requests():
            if len(talk.peer.requests) == 6:
                # What follows the test has to arrive as a whole while nothing is answered
                talk.peer.wait_for(lambda p: talk._buffer.count(b"\r\n\r\n") == DEPTH - 1 or more(talk))
                gate.set()
            flying.append(1 + talk._buffer.count(b"\r\n\r\n"))
            answer(talk, request)

    def more(talk):
        data = talk.sock.recv(65536)
        talk._buffer += data
        return talk._buffer.count(b"\r\n\r\n") == DEPTH - 1

    there = peer(script)
    asked = ask_all(make_pool(), "HEAD", [there.url(path) for path in paths(100)])
    assert right(asked)
    assert gate.is_set()
    assert max(flying) == DEPTH
    assert there.connections == 1
    assert there.targets[0] == "/found/0"
    # The test asks for the first again between the next ones
    assert there.targets[1:5] == ["/found/1", "/found/0", "/missing/2", "/found/3"]
    assert there.targets[5:] == paths(100)[4:]


def test_depth_1_is_not_pipelined(peer, make_pool):
    early = []

    def script(talk):
        for request in talk.requests():
            early.append(talk._buffer)
            answer(talk, request)
    there = peer(script)
    assert right(ask_all(make_pool(depth=1), "HEAD", [there.url(path) for path in paths(50)]))
    assert early == [b""] * 50
    assert there.targets == paths(50)


def test_all_connections_have_their_share(peer, make_pool):
    there = peer(works)
    pool = make_pool(limit=4)
    assert right(ask_all(pool, "HEAD", [there.url(path) for path in paths(1000)]))
    assert there.peak <= 4
    assert pool.statistics.requests == len(there.requests) == 1001


@pytest.mark.parametrize("announced", [True, False])
def test_closes_in_the_middle(peer, make_pool, announced):
    """After 20 answers each time. Only what was not answered is sent again, on a new connection not at once in a pipeline."""
    first = {}

    def script(talk):
        for n, request in enumerate(talk.requests(), 1):
            if n == 1:
                first[talk.number] = talk._buffer
            answered.append(request.target)
            answer(talk, request, *["Connection: close"] * (announced and n == 20))
            if n == 20:
                linger(talk)
                return
    answered = []
    there = peer(script)
    pool = make_pool()
    asked = ask_all(pool, "HEAD", [there.url(path) for path in paths(100)])
    assert right(asked)
    assert sorted(answered) == sorted(paths(100) + ["/found/0"])
    if not announced:
        # RFC 9112 9.3.2
        assert set(first.values()) == {b""}
    assert pool.statistics.refusals == 0


def test_learns_after_how_many_answers_a_server_closes(peer, make_pool):
    def script(talk):
        for n, request in enumerate(talk.requests(), 1):
            answer(talk, request, *["Connection: close"] * (n == 30))
            if n == 30:
                linger(talk)
                return
    there = peer(script)
    pool = make_pool()
    assert right(ask_all(pool, "HEAD", [there.url(path) for path in paths(300)]))
    # In vain are at most those which were behind the last answer of the first connection
    assert 301 <= pool.statistics.requests <= 301 + DEPTH
    assert there.connections == 11


def swaps(talk):
    """Answers two requests in the wrong order if both are there"""
    for request in talk.requests():
        if b"\r\n\r\n" in talk._buffer:
            other = talk.request()
            answer(talk, other)
        answer(talk, request)

def only_the_first(talk):
    """Answers what comes alone; of several requests only the first, and forgets the others"""
    for request in talk.requests():
        talk._buffer = b""
        answer(talk, request)

def closes_if_pipelined(talk):
    """Answers the first of several requests, then closes"""
    for request in talk.requests():
        answer(talk, request)
        if talk._buffer:
            return

def resets_if_pipelined(talk):
    for request in talk.requests():
        if talk._buffer:
            talk.reset()
            return
        answer(talk, request)

def garbage_if_pipelined(talk):
    for request in talk.requests():
        if talk._buffer:
            talk.send(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nbody of an answer to HEAD")
            return
        answer(talk, request)


@pytest.mark.parametrize("script", [swaps, only_the_first, closes_if_pipelined, resets_if_pipelined,
                                    garbage_if_pipelined])
def test_server_that_cannot(peer, make_pool, script, monkeypatch):
    """Is recognised by the test, without a wrong answer, and served one by one from then on"""
    monkeypatch.setattr(pipelining, "TEST_SECONDS", 0.3)
    there = peer(script)
    pool = make_pool()
    assert right(ask_all(pool, "HEAD", [there.url(path) for path in paths(60)]))
    assert there.connections <= 3
    # Those of the test
    assert len([path for path in set(there.targets) if there.targets.count(path) > 1]) <= 4
    assert pool.statistics.refusals == 0
    assert pool.troubles() == []


def test_http_1_0(peer, make_pool):
    def script(talk):
        for request in talk.requests():
            early.append(talk._buffer)
            answer(talk, request, "Connection: keep-alive", version="HTTP/1.0")
    early = []
    there = peer(script)
    assert right(ask_all(make_pool(), "HEAD", [there.url(path) for path in paths(30)]))
    assert early == [b""] * 30
    assert there.targets == paths(30)


def test_connection_close_each_time(peer, make_pool):
    def script(talk):
        request = talk.request()
        if request:
            answer(talk, request, "Connection: close")
            talk.wait_closed()
    there = peer(script)
    assert right(ask_all(make_pool(), "HEAD", [there.url(path) for path in paths(30)]))
    assert there.targets == paths(30)
    assert there.received.count(b"HEAD") == 30


def test_proxy_is_not_pipelined(peer, make_pool):
    def script(talk):
        for request in talk.requests():
            early.append(talk._buffer)
            talk.answer(request)
    early = []
    there = peer(script)
    environment = {"http_proxy": there.url("")}
    asked = ask_all(make_pool(), "HEAD", ["http://mirror.example" + path for path in paths(30)], environment=environment)
    assert [one.status() for one in asked] == [200] * 30
    assert early == [b""] * 30


def test_breaks_again_and_again_later(peer, make_pool):
    """Passes the test, but later connections die whenever two requests are in flight: one by one then"""
    def script(talk):
        for request in talk.requests():
            if talk._buffer and len(talk.peer.requests) > 10:
                talk.reset()
                return
            answer(talk, request)
    there = peer(script)
    pool = make_pool()
    assert right(ask_all(pool, "HEAD", [there.url(path) for path in paths(60)]))
    assert there.connections <= 2 + pipelining.STRIKES
    assert pool.statistics.refusals == 0


def bodies(pool, there, sizes):
    """GETs whose sizes are known, as after a query"""
    asked = [Asked("GET", there.url("/found/%s" % size), size=size) for size in sizes]
    pool.submit(*[one.request for one in asked])
    return asked


def begin(pool, there):
    """Let there pass the test"""
    assert right(ask_all(pool, "HEAD", [there.url(path) for path in paths(20)]))


def test_bodies_are_pipelined(peer, make_pool):
    there = peer(works)
    pool = make_pool()
    begin(pool, there)
    asked = bodies(pool, there, range(100))
    assert [one.body() for one in asked if one.status() == 200] == [b"x" * size for size in range(100)]
    assert there.connections == 1


def test_small_bodies_do_not_wait_behind_a_large_one(peer, make_pool, monkeypatch):
    """Nothing is sent behind a body of more bytes than MAX_BODIES"""
    monkeypatch.setattr(host_module, "MAX_BODIES", 1000)

    def script(talk):
        for request in talk.requests():
            if request.method == "GET" and request.target.endswith("/5000"):
                behind.append(talk._buffer)
            answer(talk, request)
    behind = []
    there = peer(script)
    pool = make_pool()
    begin(pool, there)
    asked = bodies(pool, there, [5000, 10, 5000, 20, 30])
    assert [len(one.body()) for one in asked if one.status() == 200] == [5000, 10, 5000, 20, 30]
    assert behind == [b""] * 2


@pytest.mark.parametrize("fault", ["size", "status"])
def test_answer_that_disagrees_with_the_query(peer, make_pool, fault):
    """While several are in flight it may be the answer to another one: it is asked for again, alone"""
    def script(talk):
        for request in talk.requests():
            if request.method == "GET":
                alone.append(talk._buffer == b"")
            if request.method == "GET" and talk._buffer and request.target == "/found/7":
                if fault == "size":
                    talk.answer(request, b"y" * 8)
                else:
                    talk.answer(request, status=404)
            else:
                answer(talk, request)
    alone = []
    there = peer(script)
    pool = make_pool()
    begin(pool, there)
    asked = bodies(pool, there, range(40))
    assert [one.body() for one in asked if one.status() == 200] == [b"x" * size for size in range(40)]
    assert there.connections == 2
    assert all(alone[-30:])


def test_object_that_has_changed(peer, make_pool):
    """Asked for alone, its new size is the truth"""
    def script(talk):
        for request in talk.requests():
            if request.method == "GET":
                talk.answer(request, b"new content")
            else:
                answer(talk, request)
    there = peer(script)
    pool = make_pool()
    begin(pool, there)
    one, = bodies(pool, there, [5])
    assert one.status() == 200
    assert one.body() == b"new content"


def test_refused_in_a_pipeline(peer, make_pool):
    """Each second is refused: asked again with less at a time until all are answered"""
    count = iter(range(10 ** 6))

    def script(talk):
        for request in talk.requests():
            if next(count) % 2:
                talk.answer(request, status=503)
            else:
                answer(talk, request)
    there = peer(script)
    pool = make_pool(limit=2)
    assert right(ask_all(pool, "HEAD", [there.url(path) for path in paths(60)]))
    assert pool.statistics.refusals > 0
    assert pool.troubles() == []


@pytest.mark.parametrize("status", [403, 405])
def test_head_is_refused(peer, make_pool, status):
    """Asked with GET, of one byte"""
    def script(talk):
        for request in talk.requests():
            kind, size = request.target.split("/")[1:]
            if request.method == "HEAD":
                talk.answer(request, status=status)
            elif kind == "missing":
                talk.answer(request, b"no", status=404)
            else:
                assert request.headers["range"] == "bytes=0-0"
                talk.answer(request, b"x", "Content-Range: bytes 0-0/%s" % size, status=206)
    there = peer(script)
    pool = make_pool()
    assert right_status(ask_all(pool, "HEAD", [there.url(path) for path in paths(30)]))
    assert there.connections == 1
    assert there.methods.count("GET") == 30


def right_status(asked):
    return [one.status() for one in asked] == [STATUSES[one.request.url.split("/")[3]] for one in asked] \
        and all(one.wait()[0].length == int(one.request.url.rpartition("/")[2])
                for one in asked if one.status() == 200)


def test_head_is_refused_and_the_range_ignored(peer, make_pool):
    """The whole file is no use: the connection is given up rather than read it"""
    def script(talk):
        for request in talk.requests():
            if request.method == "HEAD":
                talk.answer(request, status=405)
            else:
                talk.answer(request, b"x" * 10, length=10 ** 9)
                return
    there = peer(script)
    asked = ask_all(make_pool(), "HEAD", [there.url("/%s" % i) for i in range(5)])
    assert [one.status() for one in asked] == [200] * 5
    assert there.methods.count("GET") == 5


def test_size_that_is_no_size(peer, make_pool):
    """Python converts no more than 4300 digits"""
    def script(talk):
        for request in talk.requests():
            if request.method == "HEAD":
                talk.answer(request, status=405)
            else:
                talk.answer(request, b"x", "Content-Range: bytes 0-0/" + "1" * 5000, status=206)
    asked = ask_all(make_pool(), "HEAD", [peer(script).url()])
    assert asked[0].wait()[0][::2] == (200, None)


def test_idle_closes_are_no_strikes(peer, make_pool):
    """The server ends each connection that is idle; many requests at once find that out"""
    def script(talk):
        for n, request in enumerate(talk.requests(), 1):
            most.append(1 + talk._buffer.count(b"\r\n\r\n"))
            answer(talk, request)
            if n == 20:
                linger(talk)
                return
    most = []
    there = peer(script)
    pool = make_pool()
    begin(pool, there)
    # The 20 of begin() and one of the test: the first connection is at its end with those
    for i in range(4):
        most.clear()
        assert right(ask_all(pool, "HEAD", [there.url("/found/%s" % (100 * i + n)) for n in range(19)]))
        there.wait_for(lambda p: p.open <= 1)
    assert max(most) > 4


def test_refused_before_it_is_tested(peer, make_pool):
    """The pause is kept, and a refusal tells nothing of pipelining"""
    def script(talk):
        for n, request in enumerate(talk.requests()):
            seen.append((time.monotonic(), talk._buffer.count(b"\r\n\r\n")))
            if len(seen) == 1:
                talk.answer(request, b"", "Retry-After: 1", status=503)
            else:
                answer(talk, request)
    seen = []
    there = peer(script)
    assert right(ask_all(make_pool(), "HEAD", [there.url(path) for path in paths(60)]))
    assert seen[1][0] - seen[0][0] >= 0.95
    assert max(behind for _, behind in seen) > 4


def test_nothing_to_test_with(peer, make_pool):
    """Downloads alone are sent one by one"""
    behind = []

    def script(talk):
        for request in talk.requests():
            behind.append(talk._buffer)
            answer(talk, request)
    there = peer(script)
    pool = make_pool()
    head, = ask_all(pool, "HEAD", [there.url("/found/1")])
    assert head.status() == 200
    asked = bodies(pool, there, range(10))
    assert [len(one.body()) for one in asked if one.status() == 200] == list(range(10))
    assert behind == [b""] * 11


def backwards(talk):
    """Answers what is there in the reverse order"""
    for request in talk.requests():
        requests = [request]
        while b"\r\n\r\n" in talk._buffer:
            requests.append(talk.request())
        for one in reversed(requests):
            if one.method == "OPTIONS":
                talk.answer(one, b"", "Allow: GET, HEAD", status=405)
            else:
                answer(talk, one)


@pytest.mark.parametrize("first", ["missing", "found"])
def test_answers_that_look_the_same(peer, make_pool, first):
    """The test has to tell them apart: there are many alike before the first that is not"""
    there = peer(backwards)
    asked = ask_all(make_pool(), "HEAD", [there.url("/%s/0" % first)] * 12 + [there.url(path) for path in paths(60)])
    assert right(asked)


def test_all_are_missing(peer, make_pool):
    """Then it is tested with OPTIONS"""
    def script(talk):
        for request in talk.requests():
            most.append(1 + talk._buffer.count(b"\r\n\r\n"))
            if request.method == "OPTIONS":
                talk.answer(request, b"", "Allow: GET, HEAD", status=405)
            else:
                answer(talk, request)
    most = []
    there = peer(script)
    assert right(ask_all(make_pool(), "HEAD", [there.url("/missing/%s" % n) for n in range(60)]))
    assert max(most) > 4
    assert there.methods.count("OPTIONS") == 1


def test_too_many_hosts(peer, make_pool, monkeypatch):
    """That is no trouble of the last one, whose objects a query would take for missing then"""
    monkeypatch.setattr(pool_module, "MAX_CONNECTIONS", 2)
    pool = make_pool(limit=1)
    theirs = [peer(works) for _ in range(3)]
    assert all(right(ask_all(pool, "HEAD", [there.url("/found/%s" % n) for n in range(30)])) for there in theirs[:2])
    asked, = ask_all(pool, "HEAD", [theirs[2].url("/found/1")])
    assert asked.error().kind == "error" and pool.troubles() == []
    assert sum(there.connections for there in theirs) == 2


def test_stop_with_many_in_flight(peer, make_pool):
    def script(talk):
        for request in talk.requests():
            if len(talk.peer.requests) > 8:
                talk.wait_closed()
                return
            answer(talk, request)
    there = peer(script)
    pool = make_pool()
    asked = ask_all(pool, "HEAD", [there.url(path) for path in paths(60)])
    there.wait_for(lambda p: len(p.requests) > 8)
    assert pool.stop()
    assert {one.error().kind for one in asked if one.calls[0][1]} == {"cancelled"}
    assert [len(one.calls) for one in asked] == [1] * 60
