# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""The server's socket: greeting, who may connect, and peers that do not follow the protocol."""

import errno
import json
import os
import threading

import pytest

from bb.connections import protocol
from bb.connections.peers import MAX_OPEN
from bb.fetch2.shared import ADDRESS
from support.asking import wait_until
from support.children import descriptors, in_child, link
from support.task import Task
from wire import peers


@pytest.fixture
def task(connections):
    with Task(connections.server.address) as made:
        yield made


@pytest.fixture
def mirror(peer):
    return peer(peers.serve({"/x": b"content", "/empty": b""}))


@pytest.fixture
def file(tmp_path):
    with open(tmp_path / "file", "w+b") as f:
        yield f


def usable(connections, mirror):
    """Whether another task is served. What others have sent before, or that they have left, is known to the server then."""
    with Task(connections.server.address) as task:
        task.ask(1, "HEAD", mirror.url())
        return task.answer()["status"] == 200


def test_greeting(task):
    assert task.greeting == {"hello": protocol.VERSION, "schemes": ["http", "https", "s3", "sftp"]}


def test_address_is_published_during_a_build(start):
    connections = start()
    published = connections.cooker.extraconfigdata
    address = connections.server.address
    assert published == {ADDRESS: address}
    assert connections.d.getVar(ADDRESS) == address
    uid, _, name = address.partition(":")
    assert uid == str(os.getuid())
    assert len(name) >= len("bitbake-") + 32
    other = start()
    assert other.server.address != address
    connections.stop()
    assert published == {}
    assert connections.d.getVar(ADDRESS) is None
    with pytest.raises(ConnectionRefusedError):
        Task(address)


def test_switched_off(start):
    threads, links = threading.active_count(), sorted(descriptors())
    connections = start(BB_CONNECTION_CACHE="0")
    assert connections.cooker.extraconfigdata == {}
    assert connections.d.getVar(ADDRESS) is None
    assert connections.server is None
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
    with Task(connections.server.address) as one, Task(connections.server.address) as two:
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


@pytest.mark.parametrize("url", ["http://127.0.0.1/" + "\u00e9" * 20000, "http://" + "a" * 65000 + ".invalid/"],
                         ids=["path", "host"])
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


def test_more_files_than_the_server_may_hold(connections, peer, mirror, file):
    """select() in the bitbake server supports descriptors up to 1024; such a task fetches without the server"""
    hanging = peer(peers.hangs)
    tasks = []
    for number in range(MAX_OPEN):
        if number % (protocol.MAX_REQUESTS - 1) == 0:
            tasks.append(Task(connections.server.address))
        tasks[-1].ask(number, "GET", hanging.url(), file.fileno())
    for task in tasks:
        # It is answered when the others are known
        task.ask(-1, "HEAD", mirror.url())
        assert task.answer()["status"] == 200
    with Task(connections.server.address) as late:
        late.ask(1, "GET", mirror.url(), file.fileno())
        assert "too many files" in late.answer()["message"]
        late.ask(1, "HEAD", mirror.url("/missing"))
        assert late.answer()["status"] == 404
    for task in tasks:
        task.close()


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
        with Task(connections.server.address, greeted=False) as task:
            try:
                task.ask(1, "HEAD", mirror.url())
            except (BrokenPipeError, ConnectionResetError):
                pass
            return task.receive()
    assert in_child(other) is None
    assert mirror.connections == 0
    assert usable(connections, mirror)


def test_further_peers_wait(connections, mirror):
    tasks = [Task(connections.server.address) for _ in range(MAX_OPEN)]
    late = Task(connections.server.address, greeted=False)
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
    with Task(connections.server.address) as task:
        task.ask(1, "GET", stalling.url(), file.fileno())
        stalling.wait_for(lambda p: p.requests)
    assert usable(connections, mirror)
    left.set()
    # The rest of a body is not read: the connection is closed, and the request not retried
    stalling.wait_for(lambda p: p.open == 0)
    assert usable(connections, mirror)
    assert sum(host.statistics.retries for host in connections.server.pool.hosts.values()) == 0
    assert stalling.connections == 1


def test_progress(connections, peer, file):
    """Takes as long as there is nothing to be sent"""
    def script(talk):
        talk.request()
        talk.send(b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nhalf")
        assert go_on.wait(15)
        talk.send(b"full")
        talk.wait_closed()
    go_on = threading.Event()
    mirror = peer(script)
    with Task(connections.server.address) as task:
        task.ask(5, "GET", mirror.url(), file.fileno())
        message = task.receive()
        while message != {"id": 5, "progress": 4}:
            assert message == {"id": 5, "progress": 0}
            message = task.receive()
        go_on.set()
        assert task.answer()["size"] == 8


def test_peer_that_does_not_read_its_answers(connections, mirror):
    """It is disconnected, but not before it could have a few answers for each request; others are served meanwhile"""
    with Task(connections.server.address) as task:
        task.ask(0, "HEAD", mirror.url("/missing"))
        assert task.answer()["status"] == 404
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            # Each is answered at once from now on
            for number in range(1, 100000):
                task.ask(number, "HEAD", mirror.url("/missing"))
        assert number > 5 * protocol.MAX_REQUESTS
        assert usable(connections, mirror)
        assert task.answer() in ({"id": 1, "status": 404}, None)


def test_answers_that_are_read_late(connections, mirror):
    with Task(connections.server.address) as task:
        for number in range(protocol.MAX_REQUESTS):
            task.ask(number, "HEAD", mirror.url("/missing"))
        assert usable(connections, mirror)
        assert sorted(task.answer()["id"] for _ in range(protocol.MAX_REQUESTS)) == list(range(protocol.MAX_REQUESTS))


@pytest.fixture
def closing(monkeypatch):
    """Called with a path and a function lets the server call that when it has closed a descriptor of the path"""
    close = os.close
    functions = {}

    def close_and_call(fd):
        path = link(fd)
        close(fd)
        if threading.current_thread() is not threading.main_thread():
            functions.get(path, lambda: None)()
    monkeypatch.setattr(os, "close", close_and_call)
    return functions.__setitem__


def test_error_of_close(connections, mirror, tmp_path, closing):
    """NFS reports a full disk there. It is an error of that request only."""
    def full():
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
    closing(str(tmp_path / "full"), full)
    with Task(connections.server.address) as one, Task(connections.server.address) as other, \
            open(tmp_path / "full", "w+b") as bad, open(tmp_path / "good", "w+b") as good:
        for number in range(4):
            one.ask(number, "GET", mirror.url(), (good if number % 2 else bad).fileno())
            other.ask(number, "GET", mirror.url(), good.fileno())
        answers = {}
        for _ in range(4):
            answer = one.answer()
            answers[answer["id"]] = answer.get("error") or answer["size"]
        assert answers == {0: "destination", 1: 7, 2: "destination", 3: 7}
        assert sorted(other.answer()["size"] for _ in range(4)) == [7] * 4
        # Also of a request that the server does not accept
        one.ask(5, "HEAD", mirror.url(), bad.fileno())
        assert rejected(one)
    assert usable(connections, mirror)


def test_peer_that_leaves_while_its_answer_arrives(connections, peer, mirror, tmp_path, closing):
    """Both are found by one select() of the event loop"""
    blocked, go_on, answer, answered = [threading.Event() for _ in range(4)]

    def block():
        blocked.set()
        assert go_on.wait(10)
    closing(str(tmp_path / "block"), block)

    def script(talk):
        for asked in talk.requests():
            assert answer.wait(10)
            talk.answer(asked)
            answered.set()
    slow = peer(script)
    with Task(connections.server.address) as blocking, Task(connections.server.address) as leaving, \
            open(tmp_path / "block", "w+b") as file:
        leaving.ask(1, "HEAD", slow.url())
        slow.wait_for(lambda p: p.requests)
        blocking.ask(1, "GET", mirror.url(), file.fileno())
        assert blocked.wait(10)
        answer.set()
        assert answered.wait(10)
        leaving.close()
        go_on.set()
        assert blocking.answer()["status"] == 200
        assert usable(connections, mirror)


def test_no_descriptor_is_left(start, peer, mirror, file):
    connections = start(BB_CONNECTION_CACHE_MAX="1")
    assert usable(connections, mirror)
    hanging = peer(peers.dies_in_body([(b"x" * 100, 50)] * 1000))
    with Task(connections.server.address):
        # What has left before is closed
        before = descriptors()
    for i in range(15):
        with Task(connections.server.address) as task:
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
    assert usable(connections, mirror)
    wait_until(lambda: descriptors().count(file.name) == 1, "only the test has the file open")
    wait_until(lambda: len(descriptors()) < len(before), "no descriptor is left")
