# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""Long bodies, which go from the socket to the file inside the kernel where that is supported."""

import gc
import os
import resource
import signal
import threading

import pytest

from bb.connections import ProtocolError, splice
from bb.connections.failures import ATTEMPTS
from bb.connections.http import MIN_SPLICE
from support.asking import Asked, wait_until
from wire import peers

LONG = os.urandom(5 * 1024 * 1024 + 17)


@pytest.fixture
def spliced(monkeypatch):
    """The sizes of the parts that splice(2) has moved into a file"""
    if not hasattr(os, "splice"):
        pytest.skip("no os.splice before Python 3.10")
    moved = []
    original = os.splice

    def counted(src, dst, count, **kwargs):
        size = original(src, dst, count, **kwargs)
        if "offset_dst" in kwargs:
            moved.append(size)
        return size
    monkeypatch.setattr(os, "splice", counted)
    # What one test finds out must not be known to the next
    monkeypatch.setattr(splice, "is_supported", True)
    return moved


def head(size, *headers):
    return "\r\n".join(["HTTP/1.1 200 OK", "Content-Length: %d" % size, *headers, "", ""]).encode("ascii")


@pytest.mark.parametrize("size", [MIN_SPLICE - 1, MIN_SPLICE, 1024 * 1024, len(LONG)])
def test_whole_body(peer, asking, spliced, size):
    body = LONG[:size]
    there = peer(peers.serve({"/x": body}))
    one, = asking.ask("GET", [there.url()])
    response, error = one.wait()
    assert error is None and (response.status, response.length) == (200, len(body))
    assert one.body() == body
    assert one.request.received == len(body)
    if len(body) < MIN_SPLICE:
        assert spliced == []
    if len(body) == len(LONG):
        assert sum(spliced) > MIN_SPLICE


def test_many_on_the_same_connections(peer, asking, spliced):
    """Of different sizes, some short, and what follows a long one is the next answer."""
    files = {"/%s" % i: os.urandom(1 + i % 3 * 400000) for i in range(30)}
    there = peer(peers.serve(files))
    asked = asking.ask("GET", [there.url(path) for path in files])
    assert [one.status() for one in asked] == [200] * 30
    assert [one.body() for one in asked] == list(files.values())
    assert there.connections <= 4
    assert spliced


def test_pipelined(peer, make_asking, spliced):
    """The bytes behind a long body belong to the next answer."""
    files = {"/%s" % i: os.urandom(10000 + i if i % 5 else 1000000) for i in range(20)}
    there = peer(peers.serve(files))
    asking = make_asking(1)
    urls = [there.url(path) for path in files]
    assert [one.status() for one in asking.ask("HEAD", urls)] == [200] * 20
    asked = asking.ask("GET", urls)
    assert [one.status() for one in asked] == [200] * 20
    assert [one.body() for one in asked] == list(files.values())
    assert there.connections == 1
    assert spliced


def test_long_chunks(peer, asking, spliced):
    def script(talk):
        for request in talk.requests():
            talk.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            for i in range(0, len(LONG), 1000000):
                chunk = LONG[i:i + 1000000]
                talk.send(b"%x\r\n%s\r\n" % (len(chunk), chunk))
            talk.send(b"0\r\n\r\n")
    there = peer(script)
    asked = asking.one_by_one("GET", [there.url("/%s" % i) for i in range(3)])
    assert [one.status() for one in asked] == [200] * 3
    assert [one.body() == LONG for one in asked] == [True] * 3
    assert there.connections == 1
    assert spliced


def dies_at(size, reset=False):
    """The first time after so many bytes of the body"""
    def script(talk):
        request = talk.request()
        if request is None:
            return
        if talk.number > 1:
            talk.answer(request, LONG)
            talk.wait_closed()
            return
        talk.send(head(len(LONG)) + LONG[:size])
        wait_until(lambda: talk.peer.one.request.received == size, "it is in the file")
        if reset:
            talk.reset()
    return script


@pytest.mark.parametrize("reset", [False, True])
def test_dies_in_the_middle(peer, asking, spliced, reset):
    there = peer(dies_at(2000000, reset))
    one = there.one = Asked("GET", there.url())
    asking.submit(one)
    assert one.status() == 200
    assert one.body() == LONG, "other bytes"
    assert (there.connections, asking.count("retries")) == (2, 1)
    assert sum(spliced) > len(LONG)


def test_always_dies_in_the_middle(peer, asking, spliced):
    there = peer(peers.dies_in_body([(LONG, 1000000)] * ATTEMPTS))
    one, = asking.ask("GET", [there.url()])
    assert isinstance(one.error(), ProtocolError)
    assert there.connections == ATTEMPTS


def test_silence_in_the_middle(peer, make_asking, spliced):
    def script(talk):
        request = talk.request()
        if talk.number > 1:
            talk.answer(request, LONG)
            return
        talk.send(head(len(LONG)) + LONG[:1000000])
        talk.wait_closed()
    there = peer(script)
    one, = make_asking(timeout=0.3).ask("GET", [there.url()])
    assert one.status() == 200
    assert one.body() == LONG, "other bytes"
    assert there.connections == 2


def stops_at(size):
    def script(talk):
        for request in talk.requests():
            if request.target == "/long":
                talk.send(head(len(LONG)) + LONG[:size])
                wait_until(lambda: talk.peer.one.request.received == size, "it is in the file")
                talk.peer.reached.set()
                talk.peer.go_on.wait(10)
                talk.send(b"x")
                talk.wait_closed()
                return
            talk.answer(request, b"short")
    return script


@pytest.fixture
def in_the_middle(peer, make_asking, spliced):
    """(peer, Asking, Asked) when 2 of 5 MB have arrived"""
    there = peer(stops_at(2000000))
    there.reached, there.go_on = threading.Event(), threading.Event()
    asking = make_asking(timeout=60)
    one = there.one = Asked("GET", there.url("/long"))
    asking.submit(one)
    assert there.reached.wait(10)
    yield there, asking, one
    there.go_on.set()


def test_cancelled_in_the_middle(in_the_middle):
    there, asking, one = in_the_middle
    one.request.cancelled = True
    there.go_on.set()
    assert one.error().kind == "cancelled"
    assert asking.ask("GET", [there.url()])[0].status() == 200
    there.wait_for(lambda p: p.open == 1, "the connection with half a body is closed")


def test_stopped_in_the_middle(in_the_middle, spliced):
    there, asking, one = in_the_middle
    assert spliced
    assert asking.stop()
    assert one.error().kind == "cancelled"
    there.go_on.set()
    there.wait_for(lambda p: p.open == 0, "it is closed")


def test_no_descriptor_is_left(peer, make_asking, spliced):
    """Of the pipes, also where the body was not complete"""
    there = peer(peers.dies_in_body([(LONG, 1000000)] * 2 + [(LONG, len(LONG))]))
    # Those of earlier tests do not end meanwhile
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    asking = make_asking()
    one, = asking.ask("GET", [there.url()])
    assert one.status() == 200
    assert len(spliced) >= 3
    assert asking.stop()
    one.file.close()
    wait_until(lambda: len(os.listdir("/proc/self/fd")) == before, "all is closed")


def test_file_that_is_open_for_appending(peer, asking, spliced, tmp_path):
    """splice(2) does not support that: it is written in the usual way instead."""
    there = peer(peers.serve({"/x": LONG}))
    for number in range(2):
        one = Asked("GET", there.url())
        path = tmp_path / str(number)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            one.request.fd = fd
            asking.submit(one)
            assert one.status() == 200
        finally:
            os.close(fd)
        assert path.read_bytes() == LONG
    assert spliced == []
    assert asking.count("retries") <= 1, "it is known from then on"


def test_python_without_splice(peer, asking, monkeypatch):
    monkeypatch.setattr(splice, "is_supported", False)
    monkeypatch.delattr(os, "splice", raising=False)
    there = peer(peers.serve({"/x": LONG}))
    one, = asking.ask("GET", [there.url()])
    assert one.status() == 200
    assert one.body() == LONG, "other bytes"


def test_file_that_cannot_be_written(peer, asking, spliced, tmp_path):
    there = peer(peers.serve({"/x": LONG, "/y": b"y"}))
    assert asking.error_of_read_only_file(there.url(), tmp_path).kind == "destination"
    assert asking.ask("GET", [there.url("/y")])[0].status() == 200
    assert asking.count("retries") == 0


def test_disk_that_becomes_full(peer, asking, spliced, tmp_path):
    """As far as the limit of a file's size goes, which is the same to a writer"""
    there = peer(peers.serve({"/x": LONG, "/y": b"y"}))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    one = Asked("GET", there.url())
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000000, limits[1]))
        asking.submit(one)
        assert one.error().kind == "destination"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert spliced
    assert asking.ask("GET", [there.url("/y")])[0].status() == 200
    assert asking.count("retries") == 0


def test_https_is_not_spliced(peer, asking, spliced, tls, trusting):
    there = peer(peers.serve({"/x": LONG}), tls=tls)
    one, = asking.ask("GET", [there.url()], trusting)
    assert one.status() == 200
    assert one.body() == LONG, "other bytes"
    assert spliced == []
