# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""How answers are framed: what is accepted as an answer, and what must not be."""

import threading

import pytest

from bb.connections import ProtocolError, StatusError
from bb.connections.failures import ATTEMPTS
from bb.connections.http import MAX_OVERHEAD
from support.asking import Asked
from wire import peers
from wire.peers import raw

OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.fixture
def one_by_one(asking):
    """Called with a peer returns the Asked objects of requests for /0, /1... one after the other"""
    def ask(peer, method="GET", number=1):
        return asking.one_by_one(method, [peer.url("/%s" % i) for i in range(number)])
    return ask


def then_right(*answers):
    """Sends answers on the first connection, each for a request, then closes; works on the next ones."""
    def script(talk):
        if talk.number > 1:
            peers.keep_alive(talk)
        else:
            raw(*answers)(talk)
    return script


@pytest.mark.parametrize("answer, body", [
    (OK + b"Content-Length: 4\r\n\r\nbody", b"body"),
    (OK + b"content-length:4\r\n\r\nbody", b"body"),
    (OK + b"Content-Length: \t 4 \t\r\n\r\nbody", b"body"),
    (OK + b"Content-Length: 4\r\nContent-Length: 4\r\n\r\nbody", b"body"),
    (OK + b"Content-Length: 4, 4\r\n\r\nbody", b"body"),
    (OK + b"Content-Length: 004\r\n\r\nbody", b"body"),
    (OK + b"X: \xe9\r\nContent-Length: 4\r\n\r\nbody", b"body"),
    (OK + b"Content-Length: 0\r\n\r\n", b""),
    (b"HTTP/1.1 200\r\nContent-Length: 4\r\n\r\nbody", b"body"),
    (b"HTTP/1.1 200 \xc3\xa9t\xc3\xa9\r\nContent-Length: 4\r\n\r\nbody", b"body"),
    (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + OK
     + b"Content-Length: 4\r\n\r\nbody", b"body"),
    (CHUNKED + b"4\r\nbody\r\n0\r\n\r\n", b"body"),
    (OK + b"Transfer-Encoding: Chunked\r\n\r\n2;a=b\r\nbo\r\n02 ; c\r\ndy\r\n000\r\nX-Trailer: y\r\nZ: y\r\n\r\n", b"body"),
    (CHUNKED + b"0A\r\n0123456789\r\na\r\n0123456789\r\n0\r\n\r\n", b"0123456789" * 2),
    (CHUNKED + b"0\r\n\r\n", b""),
    # What urllib accepts, too
    (b"HTTP/1.1 200 OK\nContent-Length: 4\n\nbody", b"body"),
    (b"HTTP/1.1 200 OK\nX: y\r\nContent-Length: 4\n\r\nbody", b"body"),
    (OK + b"X: y\r\nContent-Length: 4\r\n\nbody", b"body"),
    (OK + b"Content-Length : 4\r\n\r\nbody", b"body"),
    (OK + b"X: y\r\n folded: 1\r\n\tContent-Length: 5\r\nContent-Length: 4\r\n\r\nbody", b"body"),
    (OK + b" folded: 1\r\nContent-Length: 4\r\n\r\nbody", b"body"),
    (OK + b"Content-Length:\r\n 4\r\n\r\nbody", b"body"),
    (OK + b"Transfer-Encoding: identity\r\nContent-Length: 4\r\n\r\nbody", b"body"),
    (b"HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n4\nbody\r\n0\nX-Trailer: y\n\n", b"body"),
])
def test_good_answer(peer, one_by_one, answer, body):
    """And the connection is used for the next one."""
    there = peer(raw(answer, answer))
    for asked in one_by_one(there, number=2):
        response, error = asked.wait()
        assert error is None
        assert (response.status, response.length) == (200, len(body))
        assert asked.body() == body
    assert there.connections == 1


def test_answer_in_single_bytes(peer, one_by_one):
    def script(talk):
        for _ in talk.requests():
            for byte in CHUNKED + b"3;x\r\nabc\r\n1\r\nd\r\n0\r\nT: t\r\n\r\n":
                talk.send(bytes([byte]))
    assert [(one.status(), one.body()) for one in one_by_one(peer(script), number=3)] == [(200, b"abcd")] * 3


def test_long_bodies_in_a_row(peer, one_by_one):
    bodies = [bytes([i]) * (200000 + i) for i in range(5)]

    def script(talk):
        for body in bodies:
            talk.answer(talk.request(), body)
        talk.wait_closed()
    assert [one.body() for one in one_by_one(peer(script), number=5) if one.status() == 200] == bodies


@pytest.mark.parametrize("size", [9999, 64 * 1024, 255 * 1024])
def test_long_chunked_body(peer, one_by_one, size):
    body = bytes(range(256)) * 4000

    def script(talk):
        talk.request()
        talk.send(CHUNKED)
        for i in range(0, len(body), size):
            chunk = body[i:i + size]
            talk.send(b"%x\r\n%s\r\n" % (len(chunk), chunk))
        talk.send(b"0\r\n\r\n")
        talk.wait_closed()
    asked, = one_by_one(peer(script))
    assert asked.wait()[0].length == len(body)
    assert asked.body() == body


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
    OK + b"Content-Length: \xb2\r\n\r\nbody",
    OK + b"Content-Length: " + b"1" * 5000 + b"\r\n\r\nbody",
    OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n",
    OK + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n",
    CHUNKED + b"4\r\nbody",
    CHUNKED + b"4\r\nbody\r\n",
    CHUNKED + b"4\r\nbody\r\n0\r\n",
    CHUNKED + b"5\r\nbody\r\n0\r\n\r\n",
    CHUNKED + b"3\r\nbody\r\n0\r\n\r\n",
    CHUNKED + b"4\nbody\n0\n\n",
    CHUNKED + b"-4\r\nbody\r\n0\r\n\r\n",
    CHUNKED + b"0x4\r\nbody\r\n0\r\n\r\n",
    CHUNKED + b"1_0\r\nbody\r\n0\r\n\r\n",
    CHUNKED + b"\r\nbody\r\n0\r\n\r\n",
    CHUNKED + b"z\r\nbody\r\n0\r\n\r\n",
    CHUNKED + b"4" * 5000,
    CHUNKED + b"4;" + b"x" * (MAX_OVERHEAD + 4) + b"\r\nbody\r\n0\r\n\r\n",
    CHUNKED + b"0\r\n" + b"T: t\r\n" * (MAX_OVERHEAD // 6 + 4) + b"\r\n",
    OK + b"X: " + b"y" * MAX_OVERHEAD + b"\r\nContent-Length: 4\r\n\r\nbody",
    OK + b"X: " + b"y" * 2 * MAX_OVERHEAD,
    OK + b"Content-Length: 4\r\nX",
    OK + b"no header\r\nContent-Length: 4\r\n\r\nbody",
    OK + b"Transfer-Encoding: identity, chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n",
    OK + b"X: y\rContent-Length: 5\r\nContent-Length: 4\r\n\r\nbody",
    OK + b"X: y\nContent-Length: 5\r\nContent-Length: 4\r\n\r\nbody",
    OK + b": y\r\nContent-Length: 4\r\n\r\nbody",
    b"HTTP/2 200 OK\r\nContent-Length: 4\r\n\r\nbody",
    b"HTTP/1.2 200 OK\r\nContent-Length: 4\r\n\r\nbody",
    b"HTTP/1.1 20 OK\r\nContent-Length: 4\r\n\r\nbody",
    b"HTTP/1.1 2000 OK\r\nContent-Length: 4\r\n\r\nbody",
    b"HTTP/1.1 OK\r\nContent-Length: 4\r\n\r\nbody",
    b"HTTP/1.1  200 OK\r\nContent-Length: 4\r\n\r\nbody",
    b"SSH-2.0-OpenSSH_9.8\r\n\r\n",
    b"\r\n\r\n",
    b"\x16\x03\x01\x00\x02\x02\x28\r\n\r\n",
    b"H",
])
def test_broken_answer(peer, one_by_one, answer):
    there = peer(raw(answer))
    asked, = one_by_one(there)
    error = asked.error()
    assert isinstance(error, ProtocolError)
    assert "\n" not in str(error)
    # Without a pause, on a new connection each time
    assert there.connections == ATTEMPTS


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 100 Continue\r\n\r\n"])
def test_closed_without_an_answer_is_a_refusal(peer, asking, one_by_one, answer):
    """That is how servers behave whose limit of connections is reached."""
    there = peer(then_right(answer))
    assert one_by_one(there)[0].status() == 200
    assert there.connections == 2
    assert asking.count("refusals") == 1


def test_closed_in_an_answer_is_no_refusal(peer, asking, one_by_one):
    assert one_by_one(peer(then_right(b"H")))[0].status() == 200
    assert (asking.count("refusals"), asking.count("retries")) == (0, 1)


def test_transfer_encoding_wins_over_a_length_and_ends_the_connection(peer, one_by_one):
    """RFC 9112 6.3: such a message may be an attempt to smuggle, so nothing behind it can be trusted."""
    smuggled = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nwrong"
    there = peer(then_right(OK + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n" + smuggled))
    assert [one.body() for one in one_by_one(there, number=2) if one.status() == 200] == [b"body", b"/1"]
    assert there.connections == 2


WRONG = OK + b"Content-Length: 5\r\n\r\nwrong"


@pytest.mark.parametrize("behind", [b"garbage", WRONG])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_what_comes_with_an_answer_is_not_the_next(peer, one_by_one, behind, method):
    """RFC 9112 9.2"""
    def script(talk):
        for request in talk.requests():
            body = request.target.encode() if method == "GET" else b""
            talk.send(OK + b"Content-Length: 2\r\n\r\n" + body + behind)
    there = peer(script)
    asked = one_by_one(there, method, number=5)
    assert [one.wait()[0].length for one in asked] == [2] * 5
    assert method == "HEAD" or [one.body() for one in asked] == [b"/%d" % i for i in range(5)]
    assert there.connections == 5


@pytest.mark.parametrize("late", [b"HTTP/1.1 404 Wrong\r\nContent-Length: 0\r\n\r\n",
                                  b"HTTP/1.1 408 Wrong\r\nContent-Length: 0\r\n\r\n", WRONG, b"garbage", b"\n"])
def test_answer_without_a_request_is_not_the_next(peer, asking, late):
    """As servers send 408 on an idle connection before they close it."""
    answered, sent = threading.Event(), threading.Event()

    def script(talk):
        if talk.number > 1:
            peers.keep_alive(talk)
            return
        talk.answer(talk.request(), b"body")
        assert answered.wait(10)
        talk.send(late)
        sent.set()
        talk.wait_closed()
    there = peer(script)
    assert asking.one_by_one("GET", [there.url("/0")])[0].status() == 200
    answered.set()
    assert sent.wait(10)
    assert asking.one_by_one("HEAD", [there.url("/1")])[0].status() == 200
    assert there.connections == 2
    assert (asking.count("refusals"), asking.count("retries")) == (0, 0)


def test_body_of_the_answer_to_head_behind_the_next_request(peer, asking, one_by_one):
    """A body that is sent by mistake and looks like an answer: what follows it tells that it is none."""
    def script(talk):
        for number, request in enumerate(talk.requests()):
            if number:
                talk.send(WRONG)
            talk.answer(request, request.target.encode())
    there = peer(script)
    assert [one.wait()[0].length for one in one_by_one(there, "HEAD", number=3)] == [2] * 3
    assert there.connections == 3
    assert (asking.count("refusals"), asking.count("retries")) == (0, 0)


def test_answer_before_any_request_is_not_the_first(peer, make_asking, tls, trusting):
    """As servers send 408 on a connection that is not used."""
    answered, go_on = threading.Event(), threading.Event()

    def script(talk):
        if talk.number == 2:
            # Not ready before all has been answered over the first connection
            assert answered.wait(10)
        talk.start_tls(tls)
        if talk.number == 2:
            talk.send(b"HTTP/1.1 404 Wrong\r\nContent-Length: 0\r\n\r\n")
            talk.wait_closed()
            return
        for request in talk.requests():
            if request.target == "/held":
                go_on.wait(10)
            talk.answer(request)
    there = peer(script)
    asking = make_asking(2)

    def ask(*targets):
        return asking.ask("GET", [there.url(target).replace("http:", "https:") for target in targets], trusting)
    assert [one.status() for one in ask("/0", "/1")] == [200] * 2
    there.wait_for(lambda p: p.connections == 2)
    answered.set()
    there.wait_for(lambda p: p.open == 1, "the second connection is closed")
    held, = ask("/held")
    there.wait_for(lambda p: p.targets[-1] == "/held")
    asked, = ask("/2")
    assert asked.status() == 200
    go_on.set()
    assert held.status() == 200
    assert there.connections == 3
    assert (asking.count("refusals"), asking.count("retries")) == (0, 0)


def test_no_length_at_all(peer, one_by_one):
    asked, = one_by_one(peer(raw(OK + b"\r\nbody")))
    assert isinstance(asked.error(), StatusError)
    asked, = one_by_one(peer(raw(OK + b"\r\n")), "HEAD")
    assert asked.wait()[0].length is None


@pytest.mark.parametrize("answer, status, length", [
    (OK + b"Content-Length: 1000000\r\n\r\n", 200, 1000000),
    (CHUNKED, 200, None),
    (b"HTTP/1.1 204 No Content\r\n\r\n", 204, None),
    (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 7\r\n\r\n", 304, 7),
])
def test_head_has_no_body(peer, one_by_one, answer, status, length):
    there = peer(raw(answer, answer))
    asked = one_by_one(there, "HEAD", number=2)
    assert [one.wait()[0][::2] for one in asked] == [(status, length)] * 2
    assert there.connections == 1


@pytest.mark.parametrize("status", [204, 304])
def test_statuses_without_a_body(peer, one_by_one, status):
    there = peer(raw(*[b"HTTP/1.1 %d X\r\nContent-Length: 7\r\n\r\n" % status] * 2))
    asked = one_by_one(there, number=2)
    assert [(one.status(), one.body()) for one in asked] == [(status, b"")] * 2
    assert there.connections == 1


@pytest.mark.parametrize("status", [404, 410, 403, 405, 500])
def test_body_of_an_error_is_not_in_the_file(peer, asking, one_by_one, status):
    there = peer(peers.only_known(status))
    assert asking.one_by_one("HEAD", [there.url("/known")])[0].status() == 200
    assert [(one.status(), one.body()) for one in one_by_one(there, number=3)] == [(status, b"")] * 3
    assert there.connections == 1


@pytest.mark.parametrize("answer", [b"HTTP/1.1 500 No\r\nContent-Length: 1000000000\r\n\r\n", b"HTTP/1.1 500 No\r\n\r\n"])
def test_long_error_page_is_not_read(peer, asking, one_by_one, answer):
    def script(talk):
        for request in talk.requests():
            if request.target == "/known":
                talk.answer(request)
            elif request.method == "HEAD":
                talk.answer(request, status=500)
            else:
                talk.send(answer)
                talk.wait_closed()
                return
    there = peer(script)
    assert asking.one_by_one("HEAD", [there.url("/known")])[0].status() == 200
    assert [one.status() for one in one_by_one(there, number=2)] == [500] * 2
    # Each was asked for twice, and was the sample as often
    assert there.methods.count("GET") == 8
    assert there.connections <= 9


def test_endless_error_page_in_chunks_is_not_read(peer, one_by_one):
    def script(talk):
        if talk.request():
            talk.send(b"HTTP/1.1 500 No\r\nTransfer-Encoding: chunked\r\n\r\n")
            while True:
                talk.send(b"1000\r\n" + b"x" * 4096 + b"\r\n")
    assert isinstance(one_by_one(peer(script))[0].error(), ProtocolError)


@pytest.mark.parametrize("answer, kept", [
    (OK + b"Connection: close\r\nContent-Length: 0\r\n\r\n", False),
    (OK + b"Connection: Foo, CLOSE\r\nContent-Length: 0\r\n\r\n", False),
    (OK + b"Connection: foo\r\nConnection: close\r\nContent-Length: 0\r\n\r\n", False),
    (OK + b"Connection: foo\r\nContent-Length: 0\r\n\r\n", True),
    (b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n", False),
    (b"HTTP/1.0 200 OK\r\nConnection: Keep-Alive\r\nContent-Length: 0\r\n\r\n", True),
])
def test_whether_the_connection_can_be_used_again(peer, one_by_one, answer, kept):
    def script(talk):
        for _ in talk.requests():
            talk.send(answer)
    there = peer(script)
    assert [one.status() for one in one_by_one(there, number=2)] == [200] * 2
    assert there.connections == (1 if kept else 2)


@pytest.mark.parametrize("before", [b"HTTP/1.1 200 OK\r\nContent-", OK + b"Content-Length: 9\r\n\r\nbody"])
def test_silence_in_an_answer(peer, make_asking, before):
    """It is asked for again, on another connection."""
    def script(talk):
        request = talk.request()
        if talk.number == 1:
            talk.send(before)
            talk.wait_closed()
        else:
            talk.answer(request, b"whole")
    there = peer(script)
    asked, = make_asking(timeout=0.1).ask("GET", [there.url()])
    assert asked.status() == 200
    assert asked.body() == b"whole"
    assert there.connections == 2


def test_cancelled_in_the_body(peer, asking):
    def script(talk):
        talk.request()
        talk.send(OK + b"Content-Length: 1000\r\n\r\n")
        asked.request.cancelled = True
        talk.send(b"x" * 10)
        talk.wait_closed()
    there = peer(script)
    asked = Asked("GET", there.url())
    asking.submit(asked)
    assert asked.error().kind == "cancelled"
    there.wait_for(lambda p: p.open == 0, "it is closed")
    assert there.connections == 1


def test_what_is_sent(peer, asking):
    there = peer(peers.keep_alive)
    asking.one_by_one("HEAD", [there.url("/a%3Ab?c=d")], authorization="Basic eA==")
    asking.one_by_one("GET", [there.url("/e")])
    request, plain = there.requests
    assert (request.method, request.target) == ("HEAD", "/a%3Ab?c=d")
    assert request.headers.pop("user-agent").startswith("bitbake/")
    assert request.headers == {"host": "127.0.0.1:%s" % there.port, "authorization": "Basic eA==", "accept": "*/*",
                               "accept-encoding": "identity"}
    assert (plain.method, plain.target) == ("GET", "/e")
    assert "authorization" not in plain.headers and "range" not in plain.headers
