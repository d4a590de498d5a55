# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""SFTP by a ConnectionServer with another implementation of the server, asyncssh's, and the real ssh."""

import asyncio
import os
import shutil
import threading

import pytest

asyncssh = pytest.importorskip("asyncssh", reason="no asyncssh")

from bb.connections import Disconnected, ProtocolError
from netqueue.lab import sshd
from support.asking import SECONDS, wait_until

FILES = 100


def content(i):
    return b"sstate object %d\n" % i * (i * i % 1000)


class Files(asyncssh.SFTPServer):
    """The files of a folder. What is wrong with one is in its name."""

    def read(self, file_obj, offset, size):
        name = os.path.basename(file_obj.name)
        if name.endswith(b"-half"):
            # Short reads
            size = max(1, size // 2)
        if name.endswith(b"-end") and offset >= 50000:
            return b""
        if name.endswith(b"-full"):
            raise asyncssh.SFTPFailure("the disk")
        if name.endswith(b"-gone"):
            self.channel.get_connection().abort()
        return super().read(file_obj, offset, size)


class Server:
    """In a thread with a loop of its own. tools and url as those of sshd.serve()."""

    def __init__(self, folder, work):
        sshd.make_key(work / "host_key")
        sshd.make_key(work / "user_key")
        self.folder = folder
        self.work = work
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        assert self._ready.wait(SECONDS), "asyncssh does not start"
        key = " ".join((work / "host_key.pub").read_text().split()[:2])
        (work / "known_hosts").write_text("[127.0.0.1]:%d %s\n" % (self.port, key))
        self.tools = sshd.make_tools(work / "tools", work / "user_key", work / "known_hosts")
        self.url = "sftp://somebody@127.0.0.1:%d" % self.port

    def _run(self):
        self._loop.run_until_complete(self._serve())

    async def _serve(self):
        self._end = asyncio.Event()
        server = await asyncssh.listen(
            "127.0.0.1", 0, server_host_keys=[str(self.work / "host_key")],
            authorized_client_keys=str(self.work / "user_key.pub"), sftp_factory=self._session)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._end.wait()
        server.close()
        await server.wait_closed()

    def _session(self, channel):
        return Files(channel, chroot=os.fsencode(self.folder))

    def stop(self):
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(SECONDS)
        self._loop.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    if not shutil.which("ssh") or not shutil.which("ssh-keygen"):
        pytest.skip("no OpenSSH")
    folder = tmp_path_factory.mktemp("files")
    for i in range(FILES):
        for kind in ("", "-half"):
            (folder / ("%s%s" % (i, kind))).write_bytes(content(i))
    for kind in ("", "-half", "-end", "-full", "-gone"):
        (folder / ("big" + kind)).write_bytes(b"0123456789" * 300000)
    (folder / "directory").mkdir()
    made = Server(folder, tmp_path_factory.mktemp("asyncssh"))
    yield made
    made.stop()


@pytest.fixture
def ask(server, asking):
    """Called with a method and names asks for all at once"""
    environment = {"PATH": "%s:%s" % (server.tools, os.environ["PATH"])}
    return lambda method, names: asking.ask(method, ["%s/%s" % (server.url, name) for name in names], environment)


def test_head(ask):
    made = ask("HEAD", [str(i) for i in range(FILES)] + ["absent", "directory"])
    assert [one.status() for one in made] == [200] * FILES + [404, 404]
    assert [one.wait()[0].length for one in made[:FILES]] == [len(content(i)) for i in range(FILES)]


@pytest.mark.parametrize("kind", ["", "-half"])
def test_get(ask, kind):
    made = ask("GET", ["%s%s" % (i, kind) for i in range(FILES)] + ["big" + kind, "absent"])
    assert [one.status() for one in made] == [200] * (FILES + 1) + [404]
    assert [one.body() for one in made[:FILES]] == [content(i) for i in range(FILES)]
    assert made[FILES].body() == b"0123456789" * 300000


def test_faults_of_one_file(ask, asking):
    """The session is as good for others as it was"""
    assert ask("HEAD", ["0"])[0].status() == 200
    ends, full, big, small = ask("GET", ["big-end", "big-full", "big", "7"])
    assert isinstance(ends.error(), ProtocolError)
    assert full.status() == 500
    assert big.status() == small.status() == 200
    assert big.body() == b"0123456789" * 300000
    assert small.body() == content(7)
    assert asking.count("refusals") == 0


def test_session_that_ends(ask, asking):
    """In the middle of a file, again and again; others are not lost."""
    gone, good = ask("GET", ["big-gone", "7"])
    assert good.status() == 200
    assert good.body() == content(7)
    assert isinstance(gone.error(), Disconnected)
    assert 3 <= asking.count("connections") <= 6
