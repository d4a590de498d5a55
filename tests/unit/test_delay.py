# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""The proxy that adds a round trip time, before servers that a test plays itself."""

import contextlib
import hashlib
import os
import random
import socket
import threading
import time

import pytest

from netqueue.lab.delay import WINDOW, delayed
from support.asking import wait_until

SECONDS = 15    # only bounds a test that fails
TRIP = 0.02


class Server:
    """Plays one function for each connection, in a thread."""

    def __init__(self, play):
        self.play = play
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port = self.listener.getsockname()[1]
        self.threads = [threading.Thread(target=self.accept)]
        self.threads[0].start()

    def accept(self):
        while True:
            try:
                sock = self.listener.accept()[0]
            except OSError:
                return
            sock.settimeout(SECONDS)
            thread = threading.Thread(target=self.talk, args=(sock,))
            self.threads.append(thread)
            thread.start()

    def talk(self, sock):
        with sock, contextlib.suppress(ConnectionError):
            self.play(sock)

    def stop(self):
        self.listener.shutdown(socket.SHUT_RDWR)
        for thread in self.threads:
            thread.join(SECONDS)
        self.listener.close()


@pytest.fixture
def link():
    """Called with what a server plays and what delayed() takes, returns the proxy before it."""
    with contextlib.ExitStack() as stack:
        def make(play, seconds=TRIP, rate=None):
            server = Server(play)
            stack.callback(server.stop)
            return stack.enter_context(delayed(server.port, seconds, rate))
        yield make


def connect(link):
    return socket.create_connection(("127.0.0.1", link.port), SECONDS)


def echo(sock):
    while True:
        data = sock.recv(65536)
        if not data:
            return
        sock.sendall(data)


def read_all(sock):
    parts = []
    while True:
        data = sock.recv(1 << 20)
        if not data:
            return b"".join(parts)
        parts.append(data)


def read(sock, size):
    # MSG_WAITALL does not wait on a socket with a time-out
    data = b""
    while len(data) < size:
        more = sock.recv(size - len(data))
        if not more:
            break
        data += more
    return data


def test_round_trip(link):
    with connect(link(echo)) as sock:
        for number in range(5):
            started = time.monotonic()
            sock.sendall(b"%d" % number)
            assert read(sock, 1) == b"%d" % number
            assert time.monotonic() - started >= TRIP


def test_connecting_costs_a_round_trip(link):
    proxy = link(echo)
    started = time.monotonic()
    with connect(proxy) as sock:
        sock.sendall(b"x")
        assert read(sock, 1) == b"x"
    assert time.monotonic() - started >= 2 * TRIP


def test_server_that_speaks_first(link):
    proxy = link(lambda sock: sock.sendall(b"SSH-2.0-x\r\n"))
    started = time.monotonic()
    with connect(proxy) as sock:
        assert read_all(sock) == b"SSH-2.0-x\r\n"
    assert time.monotonic() - started >= TRIP


def test_pipeline(link):
    """What is sent without waiting for the answers comes back in order, after a round trip"""
    trip, count = 0.1, 100
    with connect(link(echo, trip)) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        started = time.monotonic()
        for number in range(count):
            sock.sendall(b"%02d" % number)
        answer = read(sock, 2 * count)
        seconds = time.monotonic() - started
    assert answer == b"".join(b"%02d" % number for number in range(count))
    assert trip <= seconds


def test_requests_arrive_before_the_first_answer(link):
    count = 50
    arrived = threading.Event()

    def play(sock):
        assert read(sock, count) == b"x" * count
        arrived.set()
        sock.sendall(b"y")

    with connect(link(play)) as sock:
        for _ in range(count):
            sock.sendall(b"x")
        assert read(sock, 1) == b"y" and arrived.is_set()


def test_bytes_and_order(link):
    data = random.Random(1).randbytes(3 * WINDOW + 12345)
    with connect(link(echo, 0.002)) as sock:
        def send():
            view, rand = memoryview(data), random.Random(2)
            while view:
                size = rand.choice((1, 100, 5000, 300000))
                sock.sendall(view[:size])
                view = view[size:]
            sock.shutdown(socket.SHUT_WR)
        writer = threading.Thread(target=send)
        writer.start()
        answer = read_all(sock)
        writer.join(SECONDS)
    assert hashlib.sha256(answer).digest() == hashlib.sha256(data).digest()


def test_client_closes_its_half(link):
    with connect(link(lambda sock: sock.sendall(b"got %d" % len(read_all(sock))))) as sock:
        sock.sendall(b"x" * 100000)
        sock.shutdown(socket.SHUT_WR)
        assert read_all(sock) == b"got 100000"


def test_server_closes_its_half(link):
    received = []

    def play(sock):
        sock.sendall(b"bye")
        sock.shutdown(socket.SHUT_WR)
        received.append(read_all(sock))

    with connect(link(play)) as sock:
        assert read_all(sock) == b"bye"
        sock.sendall(b"still here")
    wait_until(lambda: received == [b"still here"], "the server has got what was sent after its end")


@contextlib.contextmanager
def hard_close(sock):
    yield
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    sock.close()


def test_server_resets(link):
    def play(sock):
        with hard_close(sock):
            read(sock, 1)

    with connect(link(play)) as sock:
        sock.sendall(b"x")
        with pytest.raises(ConnectionResetError):
            sock.recv(1)


def test_client_resets(link):
    outcome = []

    def play(sock):
        sock.sendall(b"x")
        try:
            outcome.append(sock.recv(1))
        except ConnectionResetError:
            outcome.append("reset")

    sock = connect(link(play))
    with hard_close(sock):
        assert read(sock, 1) == b"x"
    wait_until(lambda: outcome == ["reset"], "the server hears of the reset")


def test_nobody_listens():
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with delayed(port, TRIP) as proxy:
        with connect(proxy) as sock, pytest.raises(ConnectionResetError):
            sock.recv(1)
        assert proxy.connections == 1


def test_counts_connections(link):
    proxy = link(echo)
    assert proxy.connections == 0
    with contextlib.ExitStack() as stack:
        for number in range(1, 4):
            stack.enter_context(connect(proxy))
            assert proxy.connections == number
    with connect(proxy):
        pass
    proxy.stop()
    assert proxy.connections == 4


def test_many_connections(link):
    proxy = link(echo)
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(connect(proxy)) for _ in range(200)]
        for number, sock in enumerate(socks):
            sock.sendall(b"%03d" % number)
        assert [read(sock, 3) for sock in socks] == [b"%03d" % number for number in range(200)]
        assert proxy.connections == 200


def test_rate_is_shared(link):
    size, rate = 50000, 1000000

    def play(sock):
        read(sock, 1)
        sock.sendall(b"x" * size)

    proxy = link(play, rate=rate)
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(connect(proxy)) for _ in range(4)]
        started = time.monotonic()
        for sock in socks:
            sock.sendall(b"?")
        assert [len(read_all(sock)) for sock in socks] == [size] * 4
    assert time.monotonic() - started >= 4 * size / rate + TRIP


def test_rate_is_towards_the_client(link):
    received = []
    with connect(link(lambda sock: received.append(len(read_all(sock))), rate=1000)) as sock:
        sock.sendall(b"x" * 1000000)
        # At that rate it would take 1000 seconds
    wait_until(lambda: received == [1000000], "the server has got all")


def test_sender_is_held_back(link):
    read_now = threading.Event()
    received = []

    def play(sock):
        read_now.wait(SECONDS)
        received.append(len(read_all(sock)))

    with connect(link(play)) as sock:
        sent = 0
        sock.settimeout(0.5)
        with pytest.raises(socket.timeout):
            while sent < 64 * WINDOW:
                sent += sock.send(b"x" * 65536)
        read_now.set()
    wait_until(lambda: received == [sent], "the server has got all that could be sent")


def test_stop(link):
    before = len(os.listdir("/proc/self/fd"))
    proxy = link(echo)
    with connect(proxy) as sock:
        sock.sendall(b"x")
        assert read(sock, 1) == b"x"
        process = proxy._process
        proxy.stop()
        assert process.returncode == 0
        with contextlib.suppress(ConnectionResetError):
            assert sock.recv(1) == b""
    proxy.stop()
    with pytest.raises(ConnectionRefusedError):
        connect(proxy)
    # The listener of the test's own server is left, and what that has not closed yet
    wait_until(lambda: len(os.listdir("/proc/self/fd")) == before + 1, "all descriptors are closed")
