# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""https: answers that come in one record each, several at once, and connections that start together."""

import threading

import pytest

import bb.utils
from bb.connections import ProtocolError
from bb.connections.http import HTTPConnection
from bb.connections.request import Request
from support.asking import ask_all
from wire import peers

SECONDS = 10


@pytest.fixture
def connect(trusting):
    """Called with a peer and paths returns a connection, and the requests for them which were sent on it."""
    made = []

    def make(there, paths, **kwargs):
        requests = [Request("HEAD", there.url(path), trusting, **kwargs) for path in paths]
        connection = HTTPConnection(requests[0].origin, requests[0].route, timeout=SECONDS)
        made.append(connection)
        connection.connect()
        connection.send(requests)
        return connection, requests

    yield make
    for connection in made:
        connection.close()


def head(number):
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % number


def answers_of(connection):
    answers = []
    while connection.in_flight and connection.reusable:
        answers += connection.receive()
    return [(request.target, response.length) for request, response, _ in answers]


def test_a_record_for_each_answer(peer, tls, connect):
    def script(talk):
        for _ in range(50):
            talk.request()
        for number in range(50):
            talk.send(head(number))
        talk.wait_closed()
    connection, _ = connect(peer(script, tls=tls), ["/%d" % number for number in range(50)])
    assert answers_of(connection) == [("/%d" % number, number) for number in range(50)]


def test_an_answer_in_many_records(peer, tls, connect):
    """What follows the first answer must be waited for, though some of it is there."""
    def script(talk):
        talk.request()
        talk.request()
        talk.send(head(0))
        for byte in head(1):
            talk.send(bytes([byte]))
        talk.wait_closed()
    connection, _ = connect(peer(script, tls=tls), ["/0", "/1"])
    assert answers_of(connection) == [("/0", 0), ("/1", 1)]


def test_more_records_than_the_buffer_holds(peer, tls, connect):
    """Nothing is lost, and nothing waits for the server while there is something to use."""
    padding = b"X-Padding: " + b"x" * 15000 + b"\r\n\r\n"

    def script(talk):
        for _ in range(60):
            talk.request()
        for number in range(60):
            talk.send(head(number)[:-2] + padding)
        talk.wait_closed()
    connection, _ = connect(peer(script, tls=tls), ["/%d" % number for number in range(60)])
    assert answers_of(connection) == [("/%d" % number, number) for number in range(60)]


def test_closed_without_close_notify_behind_answers(peer, tls, connect):
    """The answers before it count, and what has ended the connection is told after them."""
    def script(talk):
        for _ in range(3):
            talk.request()
        talk.send(head(0))
        talk.send(head(1))
    connection, requests = connect(peer(script, tls=tls), ["/0", "/1", "/2"])
    answers = []
    with pytest.raises(ProtocolError):
        while True:
            answers += connection.receive()
            if connection.error:
                raise connection.error
    assert [response.length for _, response, _ in answers] == [0, 1]
    assert list(connection.in_flight) == requests[2:]


def test_one_context_for_connections_that_start_together(peer, pool, tls, trusting, monkeypatch):
    """Making it takes tens of milliseconds."""
    bb.utils._tls_context.cache_clear()
    waiting = threading.Semaphore(0)
    inside = []
    tls_context = bb.utils.tls_context

    def counted(*args):
        inside.append(1)
        most.append(len(inside))
        waiting.acquire(timeout=0.1)
        try:
            return tls_context(*args)
        finally:
            inside.pop()

    most = []
    monkeypatch.setattr(bb.utils, "tls_context", counted)
    there = peer(peers.keep_alive, tls=tls)
    asked = ask_all(pool, "GET", [there.url("/%s" % i) for i in range(100)], environment=trusting)
    assert all(a.status() == 200 for a in asked)
    assert max(most) == 1
    assert bb.utils._tls_context.cache_info().misses == 1
