# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""How answers are framed: what a connection takes for an answer, and what it must not."""

import threading

import pytest

from bb.connections import Cancelled, Disconnected, ProtocolError, StatusError, TimedOutError, http
from bb.connections.http import HTTPConnection
from support.asking import Asked, exchange_one
from wire import peers
from wire.peers import raw


def exchange(peer, method="GET", timeout=10, requests=1):
    """Ask peer over one connection; returns the Asked objects, the last with .response or .raised."""
    made = []
    connection = HTTPConnection(Asked("HEAD", peer.url()).request.origin, Asked("HEAD", peer.url()).request.route, timeout)
    connection.connect()
    try:
        for i in range(requests):
            asked = Asked(method, peer.url("/%s" % i))
            asked.raised = None
            made.append(asked)
            try:
                asked.response = exchange_one(connection, asked.request)
            except Exception as e:
                asked.raised = e
                break
            asked.reusable = connection.reusable
            if not connection.reusable:
                break
    finally:
        connection.close()
    return made


def one(peer, method="GET", **kwargs):
    return exchange(peer, method, **kwargs)[0]


OK = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize("answer, body", [
    (OK + b"Content-Length: 4\r\n\r\nbody", b"body"),
    (OK + b"content-length:4\r\n\r\nbody", b"body"),
    (OK + b"Content-Length: 4\r\nContent-Length: 4\r\n\r\nbody", b"body"),
    (OK + b"Content-Length: 0\r\n\r\n", b""),
    (b"HTTP/1.1 200\r\nContent-Length: 4\r\n\r\nbody", b"body"),
    (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + OK + b"Content-Length: 4\r\n\r\nbody", b"body"),
    (OK + b"Transfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n", b"body"),
    (OK + b"Transfer-Encoding: Chunked\r\n\r\n2;a=b\r\nbo\r\n02 ; c\r\ndy\r\n000\r\nX-Trailer: y\r\nZ: y\r\n\r\n", b"body"),
    (OK + b"Transfer-Encoding: chunked\r\n\r\n0A\r\n0123456789\r\na\r\n0123456789\r\n0\r\n\r\n", b"0123456789" * 2),
    (OK + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", b""),
])
def test_good_answer(peer, answer, body):
    asked = one(peer(raw(answer)))
    assert asked.raised is None
    assert (asked.response.status, asked.response.length) == (200, len(body))
    assert asked.body() == body
    assert asked.reusable


def test_answer_in_single_bytes(peer):
    def script(talk):
        talk.request()
        for byte in OK + b"Transfer-Encoding: chunked\r\n\r\n3;x\r\nabc\r\n1\r\nd\r\n0\r\nT: t\r\n\r\n":
            talk.send(bytes([byte]))
    assert one(peer(script)).body() == b"abcd"


def test_long_bodies_in_a_row(peer):
    bodies = [bytes([i]) * (300000 + i) for i in range(5)]

    def script(talk):
        for body in bodies:
            talk.answer(talk.request(), body)
    asked = exchange(peer(script), requests=5)
    assert [a.body() for a in asked] == bodies


def test_long_chunked_body(peer):
    body = bytes(range(256)) * 4000

    def script(talk):
        talk.request()
        talk.send(OK + b"Transfer-Encoding: chunked\r\n\r\n")
        for i in range(0, len(body), 9999):
            chunk = body[i:i + 9999]
            talk.send(b"%x\r\n%s\r\n" % (len(chunk), chunk))
        talk.send(b"0\r\n\r\n")
    asked = one(peer(script))
    assert asked.body() == body
    assert asked.response.length == len(body)


@pytest.mark.parametrize("answer", [
    OK + b"Content-Length: 5\r\n\r\nbody",
    OK + b"Content-Length: 1000000\r\n\r\n" + b"x" * 300000,
    OK + b"Content-Length: 4\r\nContent-Length: 5\r\n\r\nbody!",
    OK + b"Content-Length: 4, 5\r\n\r\nbody!",
    OK + b"Content-Length: -4\r\n\r\nbody",
    OK + b"Content-Length: +4\r\n\r\nbody",
    OK + b"Content-Length: 0x4\r\n\r\nbody",
    OK + b"Content-Length: \r\n\r\nbody",
    OK + b"Content-Length: four\r\n\r\nbody",
    OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n",
    OK + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n",
    OK + b"Transfer-Encoding: chunked\r\n\r\n4\r\nbody",
    OK + b"Transfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n",
    OK + b"Transfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n",
    OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nbody\r\n0\r\n\r\n",
    OK + b"Transfer-Encoding: chunked\r\n\r\n3\r\nbody\r\n0\r\n\r\n",
    OK + b"Transfer-Encoding: chunked\r\n\r\n-4\r\nbody\r\n0\r\n\r\n",
    OK + b"Transfer-Encoding: chunked\r\n\r\n0x4\r\nbody\r\n0\r\n\r\n",
    OK + b"Transfer-Encoding: chunked\r\n\r\n1_0\r\nbody\r\n0\r\n\r\n",
    OK + b"Transfer-Encoding: chunked\r\n\r\n\r\nbody\r\n0\r\n\r\n",
    OK + b"Transfer-Encoding: chunked\r\n\r\nz\r\nbody\r\n0\r\n\r\n",
    OK + b"Transfer-Encoding: chunked\r\n\r\n" + b"4" * 5000,
    OK + b"X: " + b"y" * http.MAX_HEAD + b"\r\nContent-Length: 4\r\n\r\nbody",
    OK + b"Content-Length: 4\r\nX",
    OK + b"no header\r\nContent-Length: 4\r\n\r\nbody",
    OK + b"Content-Length : 4\r\n\r\nbody",
    OK + b"X: y\r\n folded: 1\r\nContent-Length: 4\r\n\r\nbody",
    b"HTTP/2 200 OK\r\nContent-Length: 4\r\n\r\nbody",
    b"HTTP/1.1 20 OK\r\nContent-Length: 4\r\n\r\nbody",
    b"HTTP/1.1 OK\r\nContent-Length: 4\r\n\r\nbody",
    b"SSH-2.0-OpenSSH_9.8\r\n\r\n",
    b"\r\n\r\n",
    b"\x16\x03\x01\x00\x02\x02\x28\r\n\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\n",
    b"",
])
def test_broken_answer(peer, answer):
    asked = one(peer(raw(answer)))
    assert isinstance(asked.raised, ProtocolError), asked.raised or asked.response
    assert asked.raised.retryable
    assert "\n" not in str(asked.raised)


def test_closed_without_an_answer_is_told_apart(peer):
    assert isinstance(one(peer(raw(b""))).raised, Disconnected)
    assert not isinstance(one(peer(raw(b"H"))).raised, Disconnected)


def test_transfer_encoding_wins_over_a_length_and_ends_the_connection(peer):
    """RFC 9112 6.3: such a message may be an attempt to smuggle, so nothing behind it can be trusted."""
    asked = one(peer(raw(OK + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n")))
    assert asked.raised or (asked.body() == b"body" and not asked.reusable)


@pytest.mark.parametrize("behind", [b"garbage", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nwrong"])
def test_what_follows_an_answer_is_not_taken_for_the_next(peer, behind):
    """RFC 9112 9.2: no outstanding request, no answer; the bytes come with the first answer or later."""
    def script(talk):
        request = talk.request()
        talk.send(OK + b"Content-Length: 4\r\n\r\nbody" + behind)
        if talk.request():
            talk.answer(request, b"right")
    asked = exchange(peer(script), requests=2)
    assert asked[0].body() == b"body"
    for later in asked[1:]:
        assert isinstance(later.raised, ProtocolError), later.body()


def test_answer_that_nobody_asked_for_is_not_the_next(peer):
    """As servers send 408 on an idle connection before they close it."""
    answered, sent = threading.Event(), threading.Event()

    def script(talk):
        talk.answer(talk.request(), b"body")
        assert answered.wait(10)
        talk.send(b"HTTP/1.1 404 Wrong\r\nContent-Length: 0\r\n\r\n")
        sent.set()
        talk.wait_closed()
    there = peer(script)
    connection = HTTPConnection(Asked("HEAD", there.url()).request.origin, Asked("HEAD", there.url()).request.route)
    connection.connect()
    assert exchange_one(connection, Asked("GET", there.url()).request).status == 200
    answered.set()
    assert sent.wait(10)
    with pytest.raises(ProtocolError):
        exchange_one(connection, Asked("HEAD", there.url("/2")).request)
    connection.close()


def test_answer_before_any_request_is_not_the_first(peer):
    """As servers send 408 to who has connected and asks nothing."""
    sent = threading.Event()

    def script(talk):
        talk.send(b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        sent.set()
        talk.wait_closed()
    there = peer(script)
    asked = Asked("HEAD", there.url())
    connection = HTTPConnection(asked.request.origin, asked.request.route)
    connection.connect()
    assert sent.wait(10)
    with pytest.raises(ProtocolError):
        exchange_one(connection, asked.request)
    connection.close()


def test_no_length_at_all(peer):
    asked = one(peer(raw(OK + b"\r\nbody")))
    assert isinstance(asked.raised, StatusError)
    assert one(peer(raw(OK + b"\r\n")), "HEAD").response.length is None


@pytest.mark.parametrize("answer, length", [
    (OK + b"Content-Length: 1000000\r\n\r\n", 1000000),
    (OK + b"Transfer-Encoding: chunked\r\n\r\n", None),
    (b"HTTP/1.1 204 No Content\r\n\r\n", None),
    (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 7\r\n\r\n", 7),
])
def test_head_has_no_body(peer, answer, length):
    asked = exchange(peer(raw(answer, answer)), "HEAD", requests=2)
    assert [a.response.length for a in asked] == [length, length]


@pytest.mark.parametrize("status", [404, 410, 403, 405, 500])
def test_body_of_an_error_is_not_in_the_file(peer, status):
    there = peer(peers.with_status(status))
    asked = exchange(there, requests=3)
    assert [(a.response.status, a.body()) for a in asked] == [(status, b"")] * 3
    assert there.connections == 1


def test_long_error_page_is_not_read(peer):
    def script(talk):
        talk.send(b"HTTP/1.1 404 No\r\nContent-Length: 1000000000\r\n\r\n" * bool(talk.request()))
        talk.wait_closed()
    asked = one(peer(script))
    assert asked.response.status == 404
    assert not asked.reusable


@pytest.mark.parametrize("answer, reusable", [
    (OK + b"Connection: close\r\nContent-Length: 0\r\n\r\n", False),
    (OK + b"Connection: Foo, CLOSE\r\nContent-Length: 0\r\n\r\n", False),
    (OK + b"Connection: foo\r\nContent-Length: 0\r\n\r\n", True),
    (b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n", False),
    (b"HTTP/1.0 200 OK\r\nConnection: Keep-Alive\r\nContent-Length: 0\r\n\r\n", True),
])
def test_whether_the_connection_can_be_used_again(peer, answer, reusable):
    assert one(peer(raw(answer))).reusable is reusable


@pytest.mark.parametrize("before", [b"", b"HTTP/1.1 200 OK\r\nContent-", OK + b"Content-Length: 9\r\n\r\nbody"])
def test_silence(peer, before):
    def script(talk):
        talk.request()
        talk.send(before)
        talk.wait_closed()
    asked = one(peer(script), timeout=0.1)
    assert isinstance(asked.raised, TimedOutError)


def test_abort_ends_an_exchange(peer):
    there = peer(peers.hangs)
    connection = HTTPConnection(Asked("HEAD", there.url()).request.origin, Asked("HEAD", there.url()).request.route)
    connection.connect()
    threading.Thread(target=lambda: (there.wait_for(lambda p: p.requests), connection.abort())).start()
    with pytest.raises(ProtocolError):
        exchange_one(connection, Asked("HEAD", there.url()).request)
    connection.close()


def test_cancelled_in_the_body(peer):
    def script(talk):
        talk.request()
        talk.send(OK + b"Content-Length: 1000\r\n\r\n")
        asked.request.cancelled = True
        talk.send(b"x" * 10)
        talk.wait_closed()
    there = peer(script)
    asked = Asked("GET", there.url())
    connection = HTTPConnection(asked.request.origin, asked.request.route)
    connection.connect()
    with pytest.raises(Cancelled):
        exchange_one(connection, asked.request)
    connection.close()


def test_what_is_sent(peer):
    there = peer(peers.keep_alive)
    connection = HTTPConnection(Asked("HEAD", there.url()).request.origin, Asked("HEAD", there.url()).request.route)
    connection.connect()
    exchange_one(connection, Asked("HEAD", there.url("/a%3Ab?c=d"), authorization="Basic eA==").request)
    connection.close()
    request = there.requests[0]
    assert (request.method, request.target) == ("HEAD", "/a%3Ab?c=d")
    assert request.headers["host"] == "127.0.0.1:%s" % there.port
    assert request.headers["authorization"] == "Basic eA=="
    assert request.headers["accept-encoding"] == "identity"
    assert request.headers["user-agent"].startswith("bitbake/")
    assert "connection" not in request.headers
