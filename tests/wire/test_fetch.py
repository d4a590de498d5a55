# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""fetch2 over the shared connections, in a setscene task: what is on disk afterwards is what wget would leave."""

import errno
import hashlib
import os
import threading

import bb
import bb.fetch2
import bb.msg
import bb.utils
import pytest

from bb.connections.client import Client
from bb.fetch2 import shared
from support.build import Build
from wire import peers


@pytest.fixture
def mirror(peer):
    return peer(peers.serve({"/x": b"content" * 10000, "/empty": b"", "/x.siginfo": b"info"}))


def test_download(build, mirror):
    build.fetch(mirror.url())
    build.fetch(mirror.url("/x.siginfo"))
    assert build.read() == b"content" * 10000
    assert build.read("x.siginfo") == b"info"
    assert build.left() == ["x", "x.siginfo"]
    assert build.wget_calls() == []
    assert mirror.methods == ["GET", "GET"]
    assert mirror.connections == 1


def test_to_another_name(build, mirror):
    build.fetch(mirror.url("/x;downloadfilename=sub/y"))
    assert build.read("sub/y") == b"content" * 10000
    assert mirror.targets == ["/x"]


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077])
def test_file_is_like_wgets(build, mirror, umask, tmp_path, connections):
    stock = Build(tmp_path / "stock", connections.server.address)
    stock.use_real_wget()
    with bb.utils.umask(umask):
        build.fetch(mirror.url())
        stock.fetch(mirror.url())
    one, other = os.stat(build.downloads / "x"), os.stat(stock.downloads / "x")
    assert one.st_mode == other.st_mode
    assert one.st_mtime == other.st_mtime == 1594105627
    assert (one.st_uid, one.st_gid) == (other.st_uid, other.st_gid)
    assert build.read() == stock.read()
    assert sorted(os.listdir(build.downloads)) == sorted(os.listdir(stock.downloads))
    assert build.wget_calls() == []


def test_what_a_killed_wget_left_is_not_resumed(build, mirror):
    (build.downloads / "x.tmp").write_bytes(b"stale" * 100000)
    build.fetch(mirror.url())
    assert build.read() == b"content" * 10000
    assert build.left() == ["x"]
    assert "range" not in mirror.requests[0].headers


def test_what_a_killed_task_left_is_not_used(build, peer):
    def script(talk):
        for request in talk.requests():
            names.extend(build.left())
            talk.answer(request, b"content")
    names = []
    mirror = peer(script)
    build.fetch(mirror.url())
    assert len(names) == 1 and names[0] not in ("x", "x.tmp")
    # Longer than what comes, and not even writable
    (build.downloads / names[0]).write_bytes(b"stale" * 100000)
    (build.downloads / names[0]).chmod(0o400)
    for path in build.downloads.glob("x*"):
        if path.name != names[0]:
            path.unlink()
    build.fetch(mirror.url())
    assert build.read() == b"content"
    assert build.left() == ["x"]
    assert os.stat(build.downloads / "x").st_mode & 0o777 == 0o666 & ~os.umask(os.umask(0o022))
    assert build.wget_calls() == []


def test_longest_name(build, peer):
    """sstate names are cut to 254 characters with .siginfo"""
    name = "x" * 246
    mirror = peer(peers.serve({"/" + name: b"content"}))
    build.fetch(mirror.url("/" + name))
    assert build.read(name) == b"content"
    assert build.wget_calls() == []


@pytest.mark.parametrize("status", [404, 410])
def test_absent(build, peer, status):
    mirror = peer(peers.with_status(status))
    with pytest.raises(bb.fetch2.FetchError):
        build.fetch(mirror.url())
    assert build.wget_calls() == []
    assert build.left() == []
    assert mirror.methods == ["GET"]


def test_empty(build, mirror):
    with pytest.raises(bb.fetch2.FetchError):
        build.fetch(mirror.url("/empty"))
    assert build.left() == []
    assert build.wget_calls() == []


@pytest.mark.parametrize("digest, right", [("0" * 64, False), (hashlib.sha256(b"content" * 10000).hexdigest(), True)])
def test_checksum_of_what_has_the_mirror(build, mirror, tmp_path, connections, digest, right):
    """The fetcher verifies it after the download, as for any other mirror"""
    stock = Build(tmp_path / "stock", connections.server.address)
    stock.use_real_wget()
    for one in (build, stock):
        one.d.setVar("PREMIRRORS", "http://origin.invalid/.* %s" % mirror.url())
        one.d.setVar("BB_FETCH_PREMIRRORONLY", "1")
        fetcher = bb.fetch2.Fetch(["http://origin.invalid/x;sha256sum=" + digest], one.d, cache=False)
        if right:
            fetcher.download()
        else:
            with pytest.raises(bb.fetch2.BBFetchException):
                fetcher.download()
        assert (one.downloads / "x").exists() == right
    assert sorted(build.left()) == sorted(stock.left())
    assert build.wget_calls() == []


def test_checkstatus(build, mirror):
    assert build.exists(mirror.url())
    assert not build.exists(mirror.url("/missing"))
    assert mirror.methods == ["HEAD", "HEAD"]
    assert mirror.connections == 1


def test_presence_query_in_the_server(build, mirror):
    """It has the address only while it asks which objects exist, but not what tells a task"""
    build.d.delVar("BB_WORKERCONTEXT")
    build.d.delVar("BB_CURRENTTASK")
    for _ in range(20):
        assert build.exists(mirror.url())
        assert not build.exists(mirror.url("/missing"))
    assert mirror.connections == 1
    # What was there may be gone when the task fetches it; what was not is not asked for again
    assert mirror.targets == ["/x", "/missing"] + ["/x"] * 19


def test_threads_have_connections_of_their_own(build, peer):
    """As in a query without batches, which asks from several threads"""
    def script(talk):
        for request in talk.requests():
            # Only if the others are asked at the same time
            together.wait()
            talk.answer(request)
    together = threading.Barrier(4, timeout=15)
    mirror = peer(script)
    found = []
    threads = [threading.Thread(target=lambda i=i: found.append(build.exists(mirror.url("/%s" % i)))) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(15)
    assert found == [True] * 4


def test_login_from_the_url(build, mirror):
    assert build.exists(mirror.url(credentials="user:sec%40ret@"))
    build.fetch(mirror.url(credentials="user:sec%40ret@"))
    first, second = [request.headers["authorization"] for request in mirror.requests]
    assert first == second
    assert first.startswith("Basic ")


def test_login_from_netrc(build, mirror, tmp_path):
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login user password secret\n")
    assert build.exists(mirror.url())
    build.fetch(mirror.url())
    assert [r.headers["authorization"] for r in mirror.requests] == ["Basic dXNlcjpzZWNyZXQ="] * 2


def test_netrc_of_another_host_or_broken(build, mirror, tmp_path):
    for text in ("machine other.example login user password secret\n", "machine\nnonsense {\n"):
        (tmp_path / ".netrc").write_text(text)
        os.utime(tmp_path / ".netrc", ns=(1, hash(text) % 10**15))
        assert build.exists(mirror.url())
    assert b"uthorization" not in mirror.received


def test_credentials_are_in_no_message(build, mirror, peer, caplog, tmp_path, monkeypatch):
    caplog.set_level(1, logger="BitBake")
    monkeypatch.setattr(bb.msg, "loggerDefaultLogLevel", 1)
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login user password secret\n")
    broken = peer(peers.raw(b"nonsense\r\n\r\n"))
    for there, path in ((mirror, "/x"), (mirror, "/missing"), (broken, "/y")):
        for function in (build.fetch, build.exists):
            try:
                function(there.url(path, credentials="user:secret@"))
            except bb.fetch2.BBFetchException:
                pass
    # What fetch2 says itself is as it always was
    messages = [r.getMessage() for r in caplog.records]
    ours = [m for m in messages if "shared connections" in m or "No such file on the server" in m]
    assert len(ours) >= 3
    assert not [m for m in ours if "secret" in m]


def test_no_network(build, mirror):
    build.d.setVar("BB_NO_NETWORK", "1")
    with pytest.raises(bb.fetch2.NetworkAccess):
        build.fetch(mirror.url())
    assert mirror.connections == 0
    assert build.left() == []


def test_allowed_networks(build, mirror):
    build.d.setVar("BB_ALLOWED_NETWORKS", "*.example")
    with pytest.raises(bb.fetch2.FetchError):
        build.fetch(mirror.url())
    assert mirror.connections == 0
    build.d.setVar("BB_ALLOWED_NETWORKS", "127.0.0.1")
    build.fetch(mirror.url())
    assert build.left() == ["x"]


def stock_build(build, mirror):
    """Nothing went over the shared connections"""
    build.fetch(mirror.url())
    return len(build.wget_calls()) == 1 and build.read() == b"from wget" and mirror.connections == 0


@pytest.mark.parametrize("name, value", [
    ("BB_CONNECTION_CACHE", "0"), ("BB_CURRENTTASK", "fetch"), ("BB_CURRENTTASK", None),
    ("BB_CONNECTION_CACHE_ADDRESS", None),
])
def test_stock_without(build, mirror, name, value):
    if value is None:
        build.d.delVar(name)
    else:
        build.d.setVar(name, value)
    assert stock_build(build, mirror)


def test_stock_with_a_command_of_the_users(build, mirror):
    build.d.setVar("FETCHCMD_wget", "wget --of-the-user")
    assert stock_build(build, mirror)
    assert "--of-the-user" in build.wget_calls()[0]


def test_disk_full(build, mirror, monkeypatch):
    """The file cannot be made: as stock, which will say it better"""
    real = os.open

    def full(path, *args, **kwargs):
        if str(path).startswith(str(build.downloads / "x")) and not str(path).endswith(".lock"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, *args, **kwargs)
    monkeypatch.setattr(shared.os, "open", full)
    assert stock_build(build, mirror)


def test_tasks_share_four_connections(build, peer, connections):
    """Twelve tasks' clients at once, each with its archive and .siginfo"""
    names = ["%s%s" % (i, suffix) for i in range(12) for suffix in ("", ".siginfo")]
    mirror = peer(peers.serve({"/" + name: name.encode() * 1000 for name in names}))
    outcomes = []

    def task(i):
        own = Client(connections.server.address)
        for suffix in ("", ".siginfo"):
            path = build.downloads / ("%s%s" % (i, suffix))
            with open(path, "w+b") as f:
                answer = own.ask({"method": "GET", "url": mirror.url("/" + path.name)}, f.fileno())
                outcomes.append((answer.status, answer.size == len(path.name) * 1000))
        own.close()
    threads = [threading.Thread(target=task, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(15)
    assert outcomes == [(200, True)] * 24
    assert sorted(mirror.targets) == sorted("/" + name for name in names)
    assert mirror.connections <= 4
    for name in names:
        assert build.read(name) == name.encode() * 1000
