# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""ConnectionServer.stop() in every state a connection can be in: complete, and each request is answered once."""

import socket
import threading

import pytest

from support.asking import Asked, wait_until
from wire import peers

# Longer than a test may take, so that only stop() can end what waits
TIMEOUT = 60


def urls(peer, number):
    return [peer.url("/%s" % i) for i in range(number)]


@pytest.fixture
def stopped():
    """Called with an Asking stops it, and checks that it is over."""
    before = threading.enumerate()

    def check(asking, asked):
        assert asking.stop(), "a thread is left"
        assert [len(one.calls) for one in asked] == [1] * len(asked)
        assert not [thread for thread in threading.enumerate()
                    if thread.name.startswith("connection server") and thread not in before]
    return check


def cancelled(asked):
    return [one.error().kind for one in asked] == ["cancelled"] * len(asked)


def test_never_used(make_asking, stopped):
    stopped(make_asking(), [])


def test_idle(peer, make_asking, stopped):
    there = peer(peers.keep_alive)
    asking = make_asking(timeout=TIMEOUT)
    asked = asking.ask("HEAD", urls(there, 20))
    assert [one.status() for one in asked] == [200] * 20
    stopped(asking, asked)
    there.wait_for(lambda p: p.open == 0)


def test_no_answer_yet(peer, make_asking, stopped):
    there = peer(peers.hangs)
    asking = make_asking(timeout=TIMEOUT)
    asked = asking.ask("GET", urls(there, 20))
    there.wait_for(lambda p: len(p.requests) == 4)
    stopped(asking, asked)
    assert cancelled(asked)
    there.wait_for(lambda p: p.open == 0)


@pytest.mark.parametrize("secure", [False, True])
def test_in_the_body(peer, make_asking, stopped, tls, trusting, secure):
    def script(talk):
        talk.request()
        talk.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nhalf")
        talk.wait_closed()
    there = peer(script, tls=tls if secure else None)
    asking = make_asking(2, timeout=TIMEOUT)
    asked = asking.ask("GET", urls(there, 5), trusting)
    wait_until(lambda: [one.request.received for one in asked].count(4) == 2, "two are in the body")
    stopped(asking, asked)
    assert cancelled(asked)
    assert len(there.requests) == 2


@pytest.mark.parametrize("received", [3, 12])
def test_many_in_flight(peer, make_asking, stopped, received):
    """During and after the trial of pipelining"""
    def script(talk):
        for request in talk.requests():
            if len(talk.peer.requests) > received:
                talk.wait_closed()
                return
            talk.answer(request, b"x" * len(request.target))
    there = peer(script)
    asking = make_asking(1, timeout=TIMEOUT)
    asked = asking.ask("HEAD", [there.url("/" + "x" * i) for i in range(60)])
    there.wait_for(lambda p: len(p.requests) > received)
    stopped(asking, asked)
    outcomes = [error.kind if error else response.status for response, error in (one.calls[0] for one in asked)]
    assert set(outcomes) == {200, "cancelled"}
    assert outcomes.count("cancelled") >= 60 - received


def test_in_the_handshake(peer, make_asking, stopped):
    there = peer(lambda talk: talk.wait_closed())
    asking = make_asking(timeout=TIMEOUT)
    asked = asking.ask("HEAD", [url.replace("http:", "https:") for url in urls(there, 20)])
    # The first bytes of all four handshakes
    there.wait_for(lambda p: p.received.count(b"\x16\x03\x01") == 4)
    stopped(asking, asked)
    assert cancelled(asked)
    there.wait_for(lambda p: p.open == 0)


def test_waiting_for_a_proxy(peer, make_asking, stopped):
    proxy = peer(peers.hangs)
    asking = make_asking(timeout=TIMEOUT)
    asked = asking.ask("HEAD", ["https://mirror.example/%s" % i for i in range(5)], {"https_proxy": proxy.url("")})
    proxy.wait_for(lambda p: len(p.requests) == 4)
    stopped(asking, asked)
    assert cancelled(asked)
    proxy.wait_for(lambda p: p.open == 0)


@pytest.fixture
def full():
    """The URL of a listener whose backlog is full: to connect lasts for ever"""
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


def connecting(url):
    """How many sockets of this system are connecting to the port of url"""
    port = ":%04X" % int(url.rpartition(":")[2].partition("/")[0])
    with open("/proc/net/tcp") as f:
        states = [line.split()[2:4] for line in f.readlines()[1:]]
    return [remote.endswith(port) and state == "02" for remote, state in states].count(True)


def test_connecting(full, make_asking, stopped):
    before = connecting(full)
    asking = make_asking(2, timeout=TIMEOUT)
    asked = asking.ask("GET", [full] * 5)
    wait_until(lambda: connecting(full) == before + 2, "two are connecting")
    stopped(asking, asked)
    assert cancelled(asked)
    assert connecting(full) == before


def test_looking_up_a_name(make_asking, stopped, monkeypatch):
    """The system's resolver cannot be interrupted: it is not waited for."""
    begun, answer = threading.Event(), threading.Event()

    def getaddrinfo(*args):
        begun.set()
        answer.wait(30)
        return []
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    asking = make_asking(timeout=TIMEOUT)
    asked = asking.ask("HEAD", ["http://mirror.example/x"])
    assert begun.wait(10)
    stopped(asking, asked)
    assert cancelled(asked)
    assert not answer.is_set()
    answer.set()


def test_paused(peer, make_asking, stopped):
    there = peer(peers.with_status(503, "Retry-After: 10"))
    asking = make_asking(timeout=TIMEOUT)
    asked = asking.ask("HEAD", urls(there, 20))
    wait_until(lambda: asking.count("refusals") >= 2, "the pause")
    stopped(asking, asked)
    assert cancelled(asked)
    assert len(there.requests) <= 8


def test_while_others_submit(peer, make_asking, stopped):
    there = peer(peers.keep_alive)
    asking = make_asking(timeout=TIMEOUT)
    asked = []
    first = threading.Event()

    def submit():
        for i in range(300):
            one = Asked("HEAD", there.url("/%s" % i))
            asked.append(one)
            asking.submit(one)
            first.set()
    thread = threading.Thread(target=submit)
    thread.start()
    assert first.wait(10)
    assert asking.stop()
    thread.join(10)
    asking.server.deliver()
    stopped(asking, asked)
    for response, error in (one.wait() for one in asked):
        assert response or error.kind == "cancelled"


def test_twice(peer, make_asking, stopped):
    there = peer(peers.hangs)
    asking = make_asking(1, timeout=TIMEOUT)
    asked = asking.ask("HEAD", [there.url()])
    there.wait_for(lambda p: p.requests)
    stopped(asking, asked)
    assert asking.server.stop()
    asking.server.deliver()
    stopped(asking, asked)


def test_submitted_afterwards(peer, make_asking):
    there = peer(peers.keep_alive)
    asking = make_asking()
    assert asking.stop()
    assert not asking.server.is_running
    late = Asked("GET", there.url())
    asking.submit(late)
    asking.server.deliver()
    assert late.answered and late.error().kind == "cancelled"
    assert there.connections == 0
