# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""The server's socket in the life of a bitbake server: end of a build, forks, tasks without a network."""

import os
import subprocess
import sys
import threading

import bb.utils
import pytest

from bb.connections import Cancelled, ConnectionCacheError, protocol, server
from support.asking import Asked, wait_until
from support.children import descriptors, in_child, link
from support.task import Task
from wire import peers


@pytest.fixture
def file(tmp_path):
    with open(tmp_path / "file", "w+b") as f:
        yield f


def ask_in_process(connections, url, method="HEAD"):
    """Submitted by the runqueue's thread, which is this one"""
    asked = Asked(method, url)
    connections.server.submit([asked.request], asked.answer, True)
    return asked


def deliver(connections, asked):
    while not asked.answered:
        connections.server.deliver(15)
    return asked


def test_stop_answers_what_waits(start, peer, file):
    mirror = peer(peers.hangs)
    connections = start()
    with Task(connections.server.address) as idle, Task(connections.server.address) as waiting:
        for i in range(6):
            waiting.ask(i, "GET" if i == 0 else "HEAD", mirror.url("/%s" % i), *([file.fileno()] if i == 0 else []))
        mirror.wait_for(lambda p: len(p.requests) == 4)
        connections.stop()
        answers = {}
        while True:
            answer = waiting.answer()
            if answer is None:
                break
            answers[answer["id"]] = answer["error"]
        assert answers == {i: "cancelled" for i in range(6)}
        assert idle.receive() is None
    mirror.wait_for(lambda p: p.open == 0)
    connections.stop()


def test_nothing_is_left_of_a_build(start, peer, file):
    mirror = peer(peers.keep_alive)
    links, threads = set(descriptors()), threading.active_count()
    connections = start()
    with Task(connections.server.address) as task:
        task.ask(1, "GET", mirror.url(), file.fileno())
        assert task.answer()["status"] == 200
        assert mirror.open == 1
        connections.stop()
    mirror.wait_for(lambda p: p.open == 0)
    wait_until(lambda: threading.active_count() <= threads + len(mirror._threads), "threads have ended")
    # Those of the peer's own accepted connection are closed by its thread
    wait_until(lambda: set(descriptors()) <= links, "descriptors are closed")


def test_report(start, peer, file, caplog):
    caplog.set_level("INFO", logger="BitBake")
    mirror = peer(peers.serve({"/x": b"content"}))
    connections = start()
    for _ in range(2):
        with Task(connections.server.address) as task:
            task.ask(1, "HEAD", mirror.url("/none"))
            assert task.answer()["status"] == 404
            task.ask(2, "GET", mirror.url(), file.fileno())
            assert task.answer()["status"] == 200
    connections.stop()
    connections.stop()
    lines = [r.getMessage() for r in caplog.records if "Sstate network" in r.getMessage()]
    assert len(lines) == 1
    assert lines[0].startswith("Sstate network: 2 objects, 0.0 MiB in ")
    assert lines[0].endswith(" s, 3 requests over 1 connection (0 retries, 0 refusals)")


def test_trouble_is_reported_once_a_host(start, caplog, tmp_path):
    """For a route that is of no use, such as an ssh that cannot be started"""
    caplog.set_level("INFO", logger="BitBake")
    ssh = tmp_path / "ssh"
    ssh.write_text("#!/nonexistent\n")
    ssh.chmod(0o755)
    connections = start()
    for number in range(5):
        with Task(connections.server.address) as task:
            task.ask(1, "HEAD", "sftp://user:secret@mirror.invalid/x%s" % number, environment={"PATH": str(tmp_path)})
            assert task.answer()["error"] == "connect"
    connections.stop()
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(warnings) == 1
    assert "mirror.invalid" in warnings[0]
    assert "secret" not in warnings[0]


def test_trouble_that_was_reported_before(start, caplog, tmp_path):
    caplog.set_level("INFO", logger="BitBake")
    ssh = tmp_path / "ssh"
    ssh.write_text("#!/nonexistent\n")
    ssh.chmod(0o755)
    connections = start()
    with Task(connections.server.address) as task:
        task.ask(1, "HEAD", "sftp://mirror.invalid/x", environment={"PATH": str(tmp_path)})
        assert task.answer()["error"] == "connect"
    connections.reported.add("mirror.invalid")
    connections.stop()
    assert not [r for r in caplog.records if r.levelname == "WARNING"]


def test_stop_of_all_servers(start, peer):
    """As the end of the bitbake server does, whatever has become of the runqueue"""
    one, other = start(), start()
    asked = ask_in_process(one, peer(peers.hangs).url())
    server.stop_all()
    assert not one.server.is_running and not other.server.is_running
    one.server.deliver()
    assert isinstance(asked.error(), Cancelled)
    server.stop_all()
    # What is submitted later fails instead of waiting
    late = ask_in_process(one, "http://127.0.0.1:1/x")
    one.server.deliver()
    assert isinstance(late.error(), Cancelled)


def test_fault_of_ours(connections, monkeypatch):
    """What is submitted, also later, is answered with an error, and tasks hear that the server is gone"""
    monkeypatch.setattr(connections.server.pool, "submit", lambda requests: 1 / 0)
    with Task(connections.server.address) as task:
        for _ in range(2):
            asked = deliver(connections, ask_in_process(connections, "http://127.0.0.1:1/x"))
            assert type(asked.error()) is ConnectionCacheError and "ZeroDivisionError" in str(asked.error())
            assert not connections.server.is_running
        assert task.receive() is None


def test_main_thread_that_dies(tmp_path):
    """The process ends with it, although a thread is left. That is noticed when it is time to send progress."""
    script = """
from bb.connections.client import Client
from bb.connections.server import ConnectionServer
server = ConnectionServer()
server.start()
try:
    # Once the thread serves others
    Client(server.address).ask({"method": "HEAD", "url": "ftp://x/"})
finally:
    raise SystemExit(7)
"""
    lib = os.path.dirname(os.path.dirname(os.path.dirname(server.__file__)))
    done = subprocess.run([sys.executable, "-c", script], env=dict(os.environ, PYTHONPATH=lib), timeout=60)
    assert done.returncode == 7


def test_build_after_build(start, peer):
    """A memory resident server"""
    mirror = peer(peers.keep_alive)
    for build in range(3):
        connections = start()
        with Task(connections.server.address) as task:
            task.ask(1, "HEAD", mirror.url())
            assert task.answer()["status"] == 200
        connections.stop()
        assert mirror.connections == build + 1


def shared(before):
    """What this process has more than before: the server's, and ends of sockets that belong to the test"""
    return set(descriptors()) - set(before)


def test_forked_child_has_nothing_of_it(start, peer, file):
    """Neither the sockets nor the files, whatever is going on"""
    def long_body(talk):
        talk.request()
        # Long enough to be moved inside the kernel
        talk.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
        talk.send(b"x" * 300000)
        go_on.wait(10)
        talk.send(b"x" * 700000)
        talk.wait_closed()
    go_on = threading.Event()
    mirror, hanging, slow = peer(peers.keep_alive), peer(peers.hangs), peer(long_body)
    before = set(descriptors()) - {file.name}
    connections = start()
    assert deliver(connections, ask_in_process(connections, mirror.url())).status() == 200
    with Task(connections.server.address) as task:
        name = file.name
        task.ask(1, "GET", hanging.url(), file.fileno())
        hanging.wait_for(lambda p: p.requests)
        task.ask(2, "GET", slow.url(), file.fileno())
        wait_until(lambda: os.stat(name).st_size >= 300000, "the body arrives")
        file.close()
        # All that belongs to the test itself: its end of the socket, and those of the mirrors
        own = {link(task.sock.fileno())} | {link(talk.sock.fileno()) for p in (mirror, hanging, slow) for talk in p._talks}
        theirs = shared(before) - own
        # Listener, task, loop and its wake-up pair, pipe, three mirrors, file, and what moves the body
        assert name in theirs and len(theirs) >= 11
        left = in_child(lambda: theirs & set(descriptors()))
        assert left == set()

        # All goes on in the parent
        go_on.set()
        answer = task.answer()
        assert (answer["id"], answer["size"]) == (2, 1000000)
        task.ask(3, "HEAD", mirror.url("/other"))
        assert task.answer()["status"] == 200
        assert mirror.connections == 1


def test_child_of_a_forked_child_keeps_its_files(start):
    """Numbers that were closed in the child are those of other files by then"""
    start()

    def fork_again():
        files = [open(os.devnull) for _ in range(50)]
        child = os.fork()
        if not child:
            try:
                for file in files:
                    os.fstat(file.fileno())
                os._exit(0)
            except OSError:
                os._exit(1)
        return os.waitpid(child, 0)[1]
    assert in_child(fork_again) == 0


def test_forked_child_has_no_file_of_a_peer_that_left(start, peer, file):
    hanging = peer(peers.hangs)
    connections = start()
    with Task(connections.server.address) as task:
        task.ask(1, "GET", hanging.url(), file.fileno())
        hanging.wait_for(lambda p: p.requests)
    file.close()
    with Task(connections.server.address):
        # The server knows that the other has left
        pass
    assert file.name in descriptors()
    assert file.name not in in_child(descriptors)


def test_fork_while_a_file_is_closed(start, peer, file, monkeypatch):
    """Between close() and the bookkeeping: the number may be that of another file by then, which the child keeps."""
    connections = start()
    name = file.name
    close = os.close
    seen = []

    def close_and_fork(fd):
        ours = threading.current_thread().name == "connection server" and link(fd) == name
        close(fd)
        if ours:
            monkeypatch.setattr(os, "close", close)
            # It gets the lowest number
            with open(os.devnull) as other:
                seen.append((other.fileno(), fd, in_child(lambda: (link(other.fileno()), connections.server.address))))
    monkeypatch.setattr(os, "close", close_and_fork)
    with Task(connections.server.address) as task:
        task.ask(1, "GET", peer(peers.keep_alive).url(), file.fileno())
        assert task.answer()["status"] == 200
    (number, closed, (found, _)), = seen
    assert number == closed
    assert found == os.devnull


def test_program_that_is_started_inherits_nothing(start, peer, file):
    """Even one for which the descriptors are not closed."""
    before = descriptors()
    connections = start()
    hanging = peer(peers.hangs)
    with Task(connections.server.address) as task:
        task.ask(1, "GET", hanging.url(), file.fileno())
        hanging.wait_for(lambda p: p.requests)
        inherited = subprocess.run([sys.executable, "-c", "import os; print(os.listdir('/proc/self/fd'))"], close_fds=False,
                                   stdout=subprocess.PIPE, check=True, timeout=60, text=True).stdout
        assert len(eval(inherited)) <= 4
        # The sockets are those of the test, too
        assert len(shared(before)) > 8


def test_task_without_network_is_refused_by_the_kernel(start):
    connections = start()

    def cut_off():
        before = os.readlink("/proc/self/ns/net")
        try:
            bb.utils.disable_network(os.getuid(), os.getgid())
        except OSError as e:
            return str(e)
        if os.readlink("/proc/self/ns/net") == before:
            return "no network namespaces here"
        try:
            Task(connections.server.address)
        except ConnectionRefusedError:
            return None
        return "connected"
    outcome = in_child(cut_off)
    if outcome and outcome != "connected":
        pytest.skip(outcome)
    assert outcome is None
    with Task(connections.server.address) as task:
        assert task.greeting["hello"] == protocol.VERSION


def test_task_in_a_forked_child(start, peer, file):
    """As bitbake-worker forks them: several at once, over the same few connections."""
    mirror = peer(peers.serve({"/x": b"content" * 10000}))
    connections = start()

    def fetch():
        with Task(connections.server.address) as task:
            with open(file.name + str(os.getpid()), "w+b") as f:
                task.ask(1, "GET", mirror.url(), f.fileno())
                size = task.answer()["size"]
                f.seek(0)
                return size, f.read() == b"content" * 10000
    outcomes = []
    threads = [threading.Thread(target=lambda: outcomes.append(in_child(fetch))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert outcomes == [(70000, True)] * 8
    assert mirror.connections <= 4
