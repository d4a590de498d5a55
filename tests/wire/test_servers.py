# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""Servers that close, refuse, die and come back: connections accepted, requests received, bytes in the file.

What takes many pauses, or the suspension of a host, is in unit/test_host.py.
"""

import socket
import threading
import time

import pytest

from bb.connections import ConnectError, ProtocolError, StatusError
from bb.connections.health import PAUSE
from bb.connections.failures import ATTEMPTS
from support.asking import Asked, wait_until
from wire import peers


def urls(peer, number):
    return [peer.url("/%s" % i) for i in range(number)]


def bodies(number):
    """Of peers.keep_alive"""
    return [b"/%d" % i for i in range(number)]


def test_one_connection_for_all(peer, asking):
    there = peer(peers.keep_alive)
    asked = asking.one_by_one("GET", urls(there, 100))
    assert [one.body() for one in asked] == bodies(100)
    assert there.connections == 1
    assert there.targets == ["/%s" % i for i in range(100)]


def test_downloads_are_sent_one_at_a_time(peer, make_asking):
    """Nothing is sent while an answer is due, unless it is known that the server supports that."""
    def script(talk):
        for request in talk.requests():
            early.append(talk._buffer)
            talk.answer(request)
    early = []
    asking = make_asking(1)
    assert [one.status() for one in asking.ask("GET", urls(peer(script), 50))] == [200] * 50
    assert early == [b""] * 50


@pytest.mark.parametrize("limit", [1, 4])
def test_limit(peer, make_asking, limit):
    """200 requests at once: as many connections as are allowed, no more, and all of them are used."""
    met = threading.Barrier(limit)

    def script(talk):
        for i, request in enumerate(talk.requests()):
            if i == 0:
                met.wait(10)
            talk.answer(request, request.target.encode())
    there = peer(script)
    asking = make_asking(limit)
    asked = asking.ask("GET", urls(there, 200))
    assert [one.body() for one in asked if one.status()] == bodies(200)
    assert there.connections == there.peak == limit
    assert sorted(there.targets) == sorted("/%s" % i for i in range(200))
    assert asking.count("connections") == limit
    assert (asking.count("files"), asking.count("bytes")) == (200, sum(map(len, bodies(200))))


@pytest.mark.parametrize("announced", [True, False])
def test_closes_after_every_third_answer(peer, asking, announced):
    there = peer(peers.closes_after(3, announced))
    asked = asking.one_by_one("GET", urls(there, 12))
    assert [one.body() for one in asked] == bodies(12)
    assert there.connections == 4
    assert there.targets == ["/%s" % i for i in range(12)]
    assert asking.count("retries") == 0


@pytest.mark.parametrize("announced", [True, False])
def test_closes_after_answers_under_load(peer, asking, announced):
    there = peer(peers.closes_after(5, announced))
    asked = asking.ask("GET", urls(there, 100))
    assert [one.body() for one in asked if one.status()] == bodies(100)
    assert 20 <= there.connections <= 24
    assert sorted(there.targets) == sorted("/%s" % i for i in range(100))
    assert asking.count("refusals") == 0


def test_closes_the_idle_connection(peer, asking):
    there = peer(peers.closes_idle)
    there.close_idle = threading.Event()
    assert asking.one_by_one("GET", [there.url("/0")])[0].status() == 200
    there.close_idle.set()
    there.wait_for(lambda p: p.open == 0)
    assert asking.one_by_one("GET", [there.url("/1")])[0].body() == b"/1"
    assert there.connections == 2
    assert asking.count("retries") == 0


def test_http_1_0(peer, asking):
    def script(talk):
        for request in talk.requests():
            talk.answer(request, b"old", version="HTTP/1.0")
            return
    there = peer(script)
    assert [one.body() for one in asking.one_by_one("GET", urls(there, 3))] == [b"old"] * 3
    assert there.connections == 3


def test_http_1_0_with_keep_alive(peer, asking):
    def script(talk):
        for request in talk.requests():
            talk.answer(request, b"old", "Connection: keep-alive", version="HTTP/1.0")
    there = peer(script)
    assert [one.body() for one in asking.one_by_one("GET", urls(there, 3))] == [b"old"] * 3
    assert there.connections == 1


@pytest.mark.parametrize("whole", [b"w" * 100000, b"short"])
def test_dies_in_the_body_then_serves_the_whole(peer, asking, whole):
    """Also if the second is shorter than what came of the first."""
    there = peer(peers.dies_in_body([(b"x" * 200000, 90000), (b"y" * 200000, 3), (whole, len(whole))]))
    one, = asking.ask("GET", [there.url()])
    assert one.status() == 200
    assert one.body() == whole
    assert there.connections == 3
    assert asking.count("retries") == 2


def test_always_dies_in_the_body(peer, asking):
    there = peer(peers.dies_in_body([(b"x" * 1000, 999)] * 10))
    one, = asking.ask("GET", [there.url()])
    assert isinstance(one.error(), ProtocolError)
    assert there.connections == ATTEMPTS


def test_reset_in_the_body(peer, asking):
    def script(talk):
        request = talk.request()
        if talk.number > 1:
            talk.answer(request, b"whole")
            return
        talk.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nhalf")
        talk.reset()
    one, = asking.ask("GET", [peer(script).url()])
    assert one.status() == 200
    assert one.body() == b"whole"


@pytest.mark.parametrize("extra", [b"garbage", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nwrong"])
def test_longer_than_announced(peer, asking, extra):
    """What is too much must not become the next answer, whatever it looks like."""
    def script(talk):
        for request in talk.requests():
            body = request.target.encode()
            talk.answer(request, body + extra, length=len(body))
    asked = asking.one_by_one("GET", urls(peer(script), 3))
    assert [one.body() for one in asked if one.status()] == bodies(3)
    assert asking.count("retries") == 0


def test_no_length_is_not_retried(peer, asking):
    there = peer(peers.raw(b"HTTP/1.1 200 OK\r\n\r\nhalf or whole?"))
    one, = asking.ask("GET", [there.url()])
    assert isinstance(one.error(), StatusError)
    assert there.connections == 1


def test_silence(peer, make_asking):
    """It is asked again on another connection, after a pause."""
    def script(talk):
        (peers.hangs if talk.number == 1 else peers.keep_alive)(talk)
    there = peer(script)
    one, = make_asking(1, timeout=0.05).ask("HEAD", [there.url()])
    assert one.status() == 200
    assert there.targets == ["/x"] * 2
    there.wait_for(lambda p: p.open == 1, "the silent connection is closed")


@pytest.mark.parametrize("status", [404, 410, 403, 405, 500])
def test_status_is_an_answer(peer, asking, status):
    """Also if it might be about the host: another file, which was there, is asked for again, and is still there."""
    there = peer(peers.only_known(status))
    assert asking.one_by_one("HEAD", [there.url("/known")])[0].status() == 200
    assert [one.status() for one in asking.one_by_one("GET", urls(there, 5))] == [status] * 5
    assert there.connections == 1
    # Once more, in the case of an error of the server
    asked = [request for request in there.requests if request.method == "GET" and "range" not in request.headers]
    assert len(asked) == (10 if status == 500 else 5)


def test_server_that_serves_one_connection_only(peer, asking):
    """It answers 503 on the others: the number of connections falls, and all is answered."""
    there = peer(peers.refuses_second)
    # Without pipelining, so that there is work for more than one
    asked = asking.ask("GET", urls(there, 60))
    assert [one.body() for one in asked if one.status() == 200] == bodies(60)
    assert asking.count("refusals") >= 1
    assert asking.troubles() == []


def test_server_that_resets_further_connections(peer, asking):
    """The same limit expressed in another way, by load balancers and sshd."""
    def script(talk):
        if talk.peer.open > 1:
            talk.reset()
            return
        peers.keep_alive(talk)
    there = peer(script)
    asked = asking.ask("GET", urls(there, 60))
    assert [one.body() for one in asked if one.status() == 200] == bodies(60)
    assert asking.troubles() == []


@pytest.mark.parametrize("status, wait", [(408, None), (429, "1"), (503, "date")])
def test_refused(peer, make_asking, status, wait):
    """Two in a row: nothing is sent to the host before the time that it has asked for."""
    times = []

    def script(talk):
        for request in talk.requests():
            times.append(time.time())
            if len(times) > 2:
                talk.answer(request)
                continue
            date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(int(times[0]) + 3))
            headers = ["Retry-After: " + (date if wait == "date" else wait)] if wait else []
            talk.answer(request, b"", *headers, status=status)
    there = peer(script)
    asking = make_asking(1)
    asked = asking.ask("HEAD", urls(there, 5))
    assert [one.status() for one in asked] == [200] * 5
    assert times[2] >= {None: times[1] + PAUSE / 2 - 0.05, "1": times[1] + 0.95, "date": int(times[0]) + 2.95}[wait]
    assert (asking.count("refusals"), asking.count("retries")) == (2, 2)


def test_refused_port_then_the_server_is_back(asking):
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    one, = asking.ask("GET", ["http://127.0.0.1:%s/x" % port])
    wait_until(lambda: any(host.health.paused_until for host in asking.server.pool.hosts.values()), "it is tried again")
    with socket.create_server(("127.0.0.1", port)) as listener:
        listener.settimeout(10)
        sock, _ = listener.accept()
        with sock:
            sock.settimeout(10)
            assert sock.recv(65536).startswith(b"GET /x ")
            sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nback")
            assert one.status() == 200
            assert one.body() == b"back"
    assert asking.count("requests") == 1


def test_ipv6(peer, asking):
    try:
        there = peer(peers.keep_alive, host="::1")
    except OSError as e:
        pytest.skip("no IPv6 loopback: %s" % e)
    one, = asking.ask("GET", [there.url("/0")])
    assert one.status() == 200
    assert one.body() == b"/0"
    assert there.requests[0].headers["host"] == "[::1]:%s" % there.port


def test_name_that_cannot_be_looked_up(asking):
    """Too long for a label: no name server is asked."""
    one, = asking.ask("HEAD", ["http://%s.invalid/x" % ("x" * 64)])
    assert isinstance(one.error(), ConnectError)


def test_file_that_cannot_be_written(peer, asking, tmp_path):
    there = peer(peers.keep_alive)
    assert asking.error_of_read_only_file(there.url(), tmp_path).kind == "destination"
    assert asking.one_by_one("GET", [there.url()])[0].status() == 200


def test_cancelled_while_it_waits_its_turn(peer, make_asking):
    gate = threading.Event()

    def script(talk):
        for request in talk.requests():
            gate.wait(10)
            talk.answer(request)
    there = peer(script)
    first, second, third = make_asking(1).ask("GET", urls(there, 3))
    there.wait_for(lambda p: p.requests)
    second.request.cancelled = True
    gate.set()
    assert first.status() == third.status() == 200
    assert second.error().kind == "cancelled"
    assert there.targets == ["/0", "/2"]


def test_cancelled_in_the_body(peer, asking):
    """Others go on, and the connection with half a body is closed."""
    def script(talk):
        for request in talk.requests():
            if request.target == "/long":
                talk.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\nx")
                long.request.cancelled = True
                talk.send(b"x" * 100)
                talk.wait_closed()
                return
            talk.answer(request, b"short")
    there = peer(script)
    long = Asked("GET", there.url("/long"))
    asking.submit(long)
    assert long.error().kind == "cancelled"
    assert asking.count("retries") == 0
    one, = asking.ask("GET", [there.url()])
    assert one.status() == 200
    assert one.body() == b"short"
    there.wait_for(lambda p: p.open == 1, "the connection with half a body is closed")
    assert there.connections == 2
