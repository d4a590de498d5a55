# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""The server's socket: what it says, whom it lets in, what it makes of peers that do not follow the protocol."""

import json
import os
import threading

import pytest

from bb.connections import protocol, server
from support.asking import wait_until
from support.children import descriptors, in_child
from support.task import Task
from wire import peers


@pytest.fixture
def task(connections):
    with Task(connections.address) as made:
        yield made


@pytest.fixture
def mirror(peer):
    return peer(peers.serve({"/x": b"content", "/empty": b""}))


@pytest.fixture
def file(tmp_path):
    with open(tmp_path / "file", "w+b") as f:
        yield f


def usable(connections, mirror):
    """Whether another task is served"""
    with Task(connections.address) as task:
        task.ask(1, "HEAD", mirror.url())
        return task.answer()["status"] == 200


def test_greeting(task):
    assert task.greeting == {"hello": protocol.VERSION, "schemes": ["http", "https", "sftp"]}


def test_address_is_told_and_taken_back(start):
    connections = start()
    told = connections.cooker.extraconfigdata
    assert told == {"BB_CONNECTION_CACHE_ADDRESS": connections.address}
    uid, _, name = connections.address.partition(":")
    assert uid == str(os.getuid())
    assert len(name) >= len("bitbake-") + 32
    other = start()
    assert other.address != connections.address
    connections.stop()
    assert told == {}
    with pytest.raises(ConnectionRefusedError):
        Task(connections.address)


def test_switched_off(start):
    threads, links = threading.active_count(), sorted(descriptors())
    connections = start(BB_CONNECTION_CACHE="0")
    assert connections.cooker.extraconfigdata == {}
    assert connections.pool is None
    assert threading.active_count() == threads
    assert sorted(descriptors()) == links
    connections.stop()


def test_head(task, mirror):
    task.ask(7, "HEAD", mirror.url())
    assert task.answer() == {"id": 7, "status": 200, "size": 7, "modified": 1594105627}
    task.ask(7, "HEAD", mirror.url("/missing"))
    assert task.answer() == {"id": 7, "status": 404}


def test_get(task, mirror, file):
    file.write(b"what was there before, and longer")
    file.flush()
    task.ask(1, "GET", mirror.url(), file.fileno())
    assert task.answer() == {"id": 1, "status": 200, "size": 7, "modified": 1594105627}
    file.seek(0)
    assert file.read() == b"content"


def test_many_at_once_over_one_connection_each(start, peer):
    connections = start(BB_CONNECTION_CACHE_MAX="2")
    mirror = peer(peers.keep_alive)
    with Task(connections.address) as one, Task(connections.address) as two:
        for i in range(16):
            for task in (one, two):
                task.ask(i, "HEAD", mirror.url("/%s" % i))
        for task in (one, two):
            assert sorted(task.answer()["id"] for _ in range(16)) == list(range(16))
    assert mirror.connections <= 2
    assert mirror.peak <= 2


def test_unknown_members_are_ignored(task, mirror):
    task.ask(1, "HEAD", mirror.url(), future=[1, {"a": None}], environment={"LD_PRELOAD": "x", "TERM": "y"})
    assert task.answer()["status"] == 200


@pytest.mark.parametrize("url", ["ftp://127.0.0.1/x", "file:///etc/passwd", "", "http://", "http://127.0.0.1/a b"])
def test_url_that_cannot_be_asked_for(task, mirror, url):
    """An error of the request only"""
    task.ask(1, "HEAD", url)
    answer = task.answer()
    assert (answer["id"], answer["error"]) == (1, "url")
    task.ask(2, "HEAD", mirror.url())
    assert task.answer()["status"] == 200


@pytest.mark.parametrize("url", ["http://127.0.0.1/" + "\u00e9" * 20000, "http://" + "a" * 65000 + ".invalid/"])
def test_error_that_would_be_longer_than_a_message(connections, task, mirror, url):
    task.send(json.dumps({"id": 1, "method": "HEAD", "url": url}, ensure_ascii=False).encode())
    answer = task.answer()
    assert answer is None or "error" in answer
    assert usable(connections, mirror)


def rejected(task):
    """The server says so, unless the rest of what it did not read makes the kernel reset; and closes."""
    answer = task.answer()
    if answer is not None:
        assert (answer["id"], answer["error"]) == (None, "protocol")
        answer = task.answer()
    return answer is None


@pytest.mark.parametrize("data", [
    b"x" * (protocol.MAX_MESSAGE + 1), b"{", b"\xff", b"[]", b"null", b"1", b"{}",
    b'{"id": null, "method": "HEAD", "url": "http://127.0.0.1/"}',
    b'{"id": "1", "method": "HEAD", "url": "http://127.0.0.1/"}',
    b'{"id": 1.5, "method": "HEAD", "url": "http://127.0.0.1/"}',
    b'{"id": 1, "method": "PUT", "url": "http://127.0.0.1/"}',
    b'{"id": 1, "method": ["HEAD"], "url": "http://127.0.0.1/"}',
    b'{"id": 1, "method": "HEAD"}',
    b'{"id": 1, "method": "HEAD", "url": ["http://127.0.0.1/"]}',
    b'{"id": 1, "method": "HEAD", "url": "http://127.0.0.1/", "environment": ["http_proxy"]}',
    b'{"id": 1, "method": "HEAD", "url": "http://127.0.0.1/", "environment": {"http_proxy": 1}}',
    b'{"id": 1, "method": "HEAD", "url": "http://127.0.0.1/", "verify": 0}',
    b'{"id": 1, "method": "HEAD", "url": "http://127.0.0.1/", "authorization": 1}',
    b'{"id": 1, "method": "HEAD", "url": "http://127.0.0.1/", "authorization": "a\\r\\nX: y"}',
    b'{"id": 1, "method": "GET", "url": "http://127.0.0.1/"}',
])
def test_what_is_not_the_protocol(connections, task, mirror, data):
    task.send(data)
    assert rejected(task)
    assert mirror.connections == 0
    assert usable(connections, mirror)


def test_id_in_use(connections, task, peer, mirror):
    hanging = peer(peers.hangs)
    task.ask(1, "HEAD", hanging.url())
    task.ask(1, "HEAD", mirror.url())
    assert rejected(task)
    assert mirror.requests == []
    assert usable(connections, mirror)


def test_more_requests_than_allowed(connections, task, peer, mirror):
    hanging = peer(peers.hangs)
    for i in range(protocol.MAX_REQUESTS + 1):
        task.ask(i, "HEAD", hanging.url())
    assert rejected(task)
    assert usable(connections, mirror)


def test_more_files_than_the_server_may_hold(connections, task, peer, mirror, file, monkeypatch):
    """select() in the bitbake server ends at 1024; such a task fetches without"""
    monkeypatch.setattr(server, "MAX_DESCRIPTORS", 2)
    hanging = peer(peers.hangs)
    for i in range(3):
        task.ask(i, "GET", hanging.url(), file.fileno())
    answer = task.answer()
    assert answer["id"] == 2 and "error" in answer
    assert usable(connections, mirror)


def test_head_with_a_file(connections, task, mirror, file):
    task.ask(1, "HEAD", mirror.url(), file.fileno())
    assert rejected(task)
    assert usable(connections, mirror)


def test_two_files(connections, task, mirror, file):
    task.ask(1, "GET", mirror.url(), file.fileno(), file.fileno())
    assert rejected(task)
    assert mirror.requests == []


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "socket"])
def test_what_is_no_regular_file(connections, task, mirror, tmp_path, kind):
    read_end, write_end = os.pipe()
    fd = {"pipe": lambda: os.dup(write_end), "folder": lambda: os.open(tmp_path, os.O_RDONLY),
          "device": lambda: os.open("/dev/null", os.O_RDWR), "socket": lambda: os.dup(task.sock.fileno())}[kind]()
    task.ask(1, "GET", mirror.url(), fd)
    assert rejected(task)
    for one in (fd, read_end, write_end):
        os.close(one)
    assert mirror.requests == []


def test_file_that_is_open_for_reading_only(connections, task, mirror, file):
    with open(file.name, "rb") as f:
        task.ask(1, "GET", mirror.url(), f.fileno())
    assert task.answer()["error"] == "destination"
    assert usable(connections, mirror)


def test_another_user_is_not_let_in(connections, mirror):
    if os.getuid():
        pytest.skip("only root can become another user")

    def other():
        os.setgid(65534)
        os.setuid(65534)
        with Task(connections.address, greeted=False) as task:
            try:
                task.ask(1, "HEAD", mirror.url())
            except (BrokenPipeError, ConnectionResetError):
                pass
            return task.receive()
    assert in_child(other) is None
    assert mirror.connections == 0
    assert usable(connections, mirror)


def test_further_peers_wait(start, mirror):
    connections = start(BB_NUMBER_THREADS="2")
    tasks = [Task(connections.address) for _ in range(18)]
    late = Task(connections.address, greeted=False)
    late.ask(1, "HEAD", mirror.url())
    # All that the server could have done about it is done when it answers another
    tasks[0].ask(1, "HEAD", mirror.url())
    assert tasks[0].answer()["status"] == 200
    late.sock.setblocking(False)
    with pytest.raises(BlockingIOError):
        late.receive()
    late.sock.settimeout(15)
    tasks[0].close()
    assert late.receive()["hello"] == protocol.VERSION
    assert late.answer()["status"] == 200
    for task in tasks + [late]:
        task.close()


def test_leaving_cancels(connections, peer, mirror, file):
    def script(talk):
        talk.request()
        talk.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nhalf")
        assert left.wait(10)
        talk.send(b"more")
        talk.wait_closed()
    left = threading.Event()
    stalling = peer(script)
    with Task(connections.address) as task:
        task.ask(1, "GET", stalling.url(), file.fileno())
        stalling.wait_for(lambda p: p.requests)
    wait_until(lambda: not connections._peers, "the server knows")
    left.set()
    # The half of a body is not read on: the connection is closed, and not tried again
    stalling.wait_for(lambda p: p.open == 0)
    assert connections.pool.statistics.retries == 0
    assert stalling.connections == 1
    assert usable(connections, mirror)


def test_progress(start, peer, file, monkeypatch):
    monkeypatch.setattr(protocol, "PROGRESS_SECONDS", 0.02)

    def script(talk):
        talk.request()
        talk.send(b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nhalf")
        assert go_on.wait(10)
        talk.send(b"full")
        talk.wait_closed()
    go_on = threading.Event()
    mirror = peer(script)
    with Task(start().address) as task:
        task.ask(5, "GET", mirror.url(), file.fileno())
        message = task.receive()
        while message != {"id": 5, "progress": 4}:
            assert message == {"id": 5, "progress": 0}
            message = task.receive()
        go_on.set()
        assert task.answer()["size"] == 8


def test_peer_that_leaves_while_its_answer_comes(connections, peer, mirror):
    """Both are found by one look at the descriptors, and the answer is passed on first."""
    blocked, go_on, answer = threading.Event(), threading.Event(), threading.Event()
    request = connections._request

    def gate(peer, message, fd):
        if message.get("gate"):
            blocked.set()
            assert go_on.wait(10)
        else:
            request(peer, message, fd)
    connections._request = gate

    def script(talk):
        for asked in talk.requests():
            assert answer.wait(10)
            talk.answer(asked)
    slow = peer(script)
    with Task(connections.address) as holding, Task(connections.address) as leaving:
        leaving.ask(1, "HEAD", slow.url())
        slow.wait_for(lambda p: p.requests)
        holding.send(b'{"gate": true}')
        assert blocked.wait(10)
        answer.set()
        wait_until(lambda: connections._answers, "the pool has answered")
        leaving.close()
        go_on.set()
        wait_until(lambda: len(connections._peers) == 1, "the server knows that it left")
        assert usable(connections, mirror)


def test_no_descriptor_is_left(start, peer, mirror, file):
    connections = start(BB_CONNECTION_CACHE_MAX="1")
    assert usable(connections, mirror)
    wait_until(lambda: not connections._peers, "the server knows")
    hanging = peer(peers.dies_in_body([(b"x" * 100, 50)] * 1000))
    before = descriptors()
    for i in range(15):
        with Task(connections.address) as task:
            task.ask(1, "GET", mirror.url(), file.fileno())
            assert task.answer()["status"] == 200
            task.ask(1, "GET", mirror.url("/missing"), file.fileno())
            assert task.answer()["status"] == 404
            task.ask(1, "GET", "ftp://127.0.0.1/", file.fileno())
            assert task.answer()["error"] == "url"
            task.ask(1, "GET", hanging.url(), file.fileno())
            assert task.answer()["error"] == "protocol"
            task.ask(1, "GET", mirror.url(), file.fileno())
            bad = [(b"{", [file.fileno()]), (b"[]", [file.fileno()]), (b'{"id": 1}', [file.fileno()] * 2),
                   (b"x" * 70000, [file.fileno()]), (b'{"id": 1, "method": "HEAD", "url": ""}', [file.fileno()])]
            task.send(bad[i % 5][0], *bad[i % 5][1])
            while task.receive() is not None:
                pass
    wait_until(lambda: not connections._peers, "the server knows")
    wait_until(lambda: descriptors().count(file.name) == 1, "only the test has the file open")
    wait_until(lambda: len(descriptors()) <= len(before), "no descriptor is left")
