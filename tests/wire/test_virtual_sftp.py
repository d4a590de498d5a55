# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""SFTP servers that are odd, byte for byte, in virtual time: what is lost, how long it takes, and how many logins."""

import asyncio

import pytest

from bb.connections import ConnectError, RefusedError
from bb.connections.health import AWAY, UNREACHABLE_SSH, UNWILLING
from support.mirror import Simulation
from support.virtualserver import SFTPServer

URL = "sftp://mirror.example"
FILES = {"/%s" % i: b"%d " % i * (i * 37 % 1000) for i in range(100)}


class Odd(SFTPServer):
    def __init__(self, files=FILES, login=0.4):
        super().__init__(dict(files), login=login)


@pytest.fixture
def simulate():
    made = []

    def make(server, **options):
        made.append(Simulation(server, sftp=server, **options))
        return made[-1]

    yield make
    for one in made:
        one.__exit__(None)


def ask(simulation, method, paths):
    asked = simulation.ask(method, [URL + path for path in paths])
    simulation.settle()
    return asked


def assert_right(asked, files=FILES):
    for one in asked:
        path = one.request.url[len(URL):]
        response, error = one.wait()
        assert error is None, "%s: %r" % (path, error)
        assert response.status == (200 if path in files else 404), path
        if path in files:
            assert response.length == len(files[path])
            assert one.file is None or one.body() == files[path]


def query_and_fetch(simulation, paths=tuple(FILES), files=FILES):
    assert_right(ask(simulation, "HEAD", paths), files)
    assert_right(ask(simulation, "GET", [path for path in paths if path in files]), files)


def trouble(simulation):
    return [host.health.suspension_reason for host in simulation.pool.hosts.values() if host.health.suspension_reason]


def test_healthy_server(simulate):
    """The measure for the others"""
    server = Odd()
    simulation = simulate(server)
    query_and_fetch(simulation, [*FILES, "/absent/1", "/absent/2"])
    assert simulation.loop.time() < 2 and server.connections <= 4


@pytest.mark.parametrize("code", [4, 8, 99])
def test_another_status_for_what_is_absent(simulate, code):
    """30 of 200 are there. The others are absent then, after one more question."""
    class Server(Odd):
        def stat(self, path):
            return super().stat(path) if path in self.files else self.status(code)

        def may_open(self, path, files):
            return None if path in self.files else self.status(code)
    server = Server()
    simulation = simulate(server)
    there = list(FILES)[:30]
    paths = there + ["/absent/%s" % i for i in range(170)]
    paths.sort(key=lambda path: path[-1])
    asked = ask(simulation, "HEAD", paths)
    assert [one.status() for one in asked] == [200 if path in there else 500 for path in paths]
    assert_right(ask(simulation, "GET", there))
    assert ask(simulation, "GET", ["/absent/1"])[0].status() == 500
    assert server.connections <= 4
    assert len(server.statted) < 2.2 * 200
    assert simulation.loop.time() < 5
    assert trouble(simulation) == []


def test_many_absent_files_are_fetched(simulate):
    """Each FAILURE of an OPEN might be a limit of open files; a STAT shows that it is not."""
    class Server(Odd):
        def stat(self, path):
            return super().stat(path) if path in self.files else self.status(self.FAILURE)

        def may_open(self, path, files):
            return None if path in self.files else self.status(self.FAILURE)
    server = Server()
    simulation = simulate(server)
    there = list(FILES)[:64]
    absent = ["/absent/%s" % i for i in range(64)]
    asked = ask(simulation, "GET", [path for pair in zip(there, absent) for path in pair])
    assert_right(asked[::2])
    assert {one.status() for one in asked[1::2]} == {500}
    assert len(server.opened) < 64 + 3 * 64


def test_permission_denied_for_what_is_absent(simulate):
    class Server(Odd):
        def stat(self, path):
            return super().stat(path) if path in self.files else self.status(self.DENIED)
    server = Server()
    simulation = simulate(server)
    paths = list(FILES)[:30] + ["/absent/%s" % i for i in range(170)]
    assert [one.status() for one in ask(simulation, "HEAD", paths)] == [200] * 30 + [403] * 170
    assert len(server.statted) < 220 and server.connections <= 4
    assert trouble(simulation) == []


@pytest.mark.parametrize("limit", [1, 2, 10])
@pytest.mark.parametrize("queried", [True, False])
def test_limit_of_open_files(simulate, limit, queried):
    """That is not announced: it is learned, nothing is lost, and no session ends."""
    class Server(Odd):
        def may_open(self, path, files):
            return super().may_open(path, files) or (self.status(self.FAILURE) if len(files) >= limit else None)
    server = Server()
    simulation = simulate(server)
    if queried:
        assert_right(ask(simulation, "HEAD", FILES))
    assert_right(ask(simulation, "GET", FILES))
    assert server.connections <= 4
    assert len(server.opened) < 2 * len(FILES) + 4 * 100
    assert simulation.loop.time() < 20
    assert trouble(simulation) == []


@pytest.mark.parametrize("code", [4, 8])
def test_fstat_fails(simulate, code):
    """The size is that of STAT."""
    class Server(Odd):
        def fstat(self, path):
            return self.status(code)
    server = Server()
    simulation = simulate(server)
    query_and_fetch(simulation)
    assert server.connections <= 4
    assert trouble(simulation) == []


def test_attributes_without_a_size(simulate):
    """They are of no use to us: the fetcher may do better."""
    class Server(Odd):
        def stat(self, path):
            return bytes([self.ATTRS]), b"\0\0\0\0"
    simulation = simulate(Server())
    assert {one.error().kind for one in ask(simulation, "HEAD", FILES)} == {"status"}
    assert simulation.loop.time() < 2


@pytest.mark.parametrize("fault", ["short reads", "one byte at a time"])
def test_short_reads(simulate, fault):
    class Server(Odd):
        def read(self, path, offset, size):
            return super().read(path, offset, max(1, size // 3) if fault == "short reads" else min(size, 1))
    files = {"/%s" % i: b"%d " % i * 50 for i in range(10)}
    simulation = simulate(Server(files))
    query_and_fetch(simulation, list(files), files)


def test_object_that_grows_while_it_is_fetched(simulate):
    """It is not taken at its first size: the end has to be where it was."""
    class Server(Odd):
        def read(self, path, offset, size):
            answer = super().read(path, offset, size)
            if path == "/grows" and len(self.files[path]) < 500000:
                self.files[path] += b"more" * 20000
            return answer
    server = Server({"/grows": b"x" * 100000, "/1": b"one"})
    simulation = simulate(server)
    assert [one.status() for one in ask(simulation, "HEAD", ["/grows", "/1"])] == [200] * 2
    one, other = ask(simulation, "GET", ["/grows", "/1"])
    assert other.status() == 200 and other.body() == b"one"
    response, error = one.wait()
    assert error or one.body() == server.files["/grows"]


def test_object_that_is_shorter_than_announced(simulate):
    class Server(Odd):
        def fstat(self, path):
            return self.attributes(len(self.files[path]) + (1000 if path == "/7" else 0))
    server = Server()
    simulation = simulate(server)
    asked = ask(simulation, "GET", FILES)
    short, = [one for one in asked if one.request.url.endswith("/7")]
    assert short.error().kind == "protocol"
    assert_right([one for one in asked if one is not short])
    assert trouble(simulation) == []


class Ends(Odd):
    """The session ends whenever /7 is read"""

    async def _serve(self, talk):
        self.talks = getattr(self, "talks", []) + [talk]
        await super()._serve(talk)

    def read(self, path, offset, size):
        if path == "/7":
            for talk in self.talks:
                if not talk.closed:
                    talk.reset()
            return None
        return super().read(path, offset, size)


def test_file_that_ends_the_session(simulate):
    """It is lost, and none of the others."""
    server = Ends()
    simulation = simulate(server, limit=1)
    assert_right(ask(simulation, "HEAD", FILES))
    asked = ask(simulation, "GET", FILES)
    lost, = [one for one in asked if one.request.url.endswith("/7")]
    assert lost.wait()[1] is not None
    assert_right([one for one in asked if one is not lost])
    assert server.connections < 15
    assert simulation.loop.time() < 3 * UNWILLING
    assert trouble(simulation) == []


@pytest.mark.parametrize("seconds, error", [(15, ConnectError("Connection refused")), (15, RefusedError("MaxStartups")),
                                            (50, ConnectError("Connection refused"))])
def test_away_in_the_middle(simulate, seconds, error):
    """Sessions end, and logins fail for a while: nothing is lost."""
    def away():
        return 1 < simulation.loop.time() < 1 + seconds

    class Server(Odd):
        async def _serve(self, talk):
            serving = asyncio.ensure_future(super()._serve(talk))
            try:
                await asyncio.wait([serving], timeout=max(0, 1 - simulation.loop.time()) if simulation.loop.time() < 1 else None)
                talk.reset()
                await talk.forever()
            finally:
                serving.cancel()
    files = {"/%s" % i: b"%d " % i * 60000 for i in range(100)}
    server = Server(files)
    server.latency = 0.2
    server.connecting = lambda server: away() and raises(error)
    simulation = simulate(server)
    query_and_fetch(simulation, list(files), files)
    assert 1 + seconds < simulation.loop.time() < 1 + seconds + 30
    assert trouble(simulation) == []


def raises(error):
    raise error


def test_away_when_the_query_begins(simulate):
    """sshd's port is closed for 15 seconds: nothing is lost."""
    server = Odd()
    server.connecting = lambda server: simulation.loop.time() < 15 and raises(ConnectError("Connection refused"))
    simulation = simulate(server)
    query_and_fetch(simulation)
    assert simulation.loop.time() < UNREACHABLE_SSH + 3


@pytest.mark.parametrize("error, bound", [(ConnectError("Connection refused"), UNREACHABLE_SSH), (RefusedError("busy"), UNWILLING)])
def test_never_there(simulate, error, bound):
    server = Odd()
    server.connecting = lambda server: raises(error)
    simulation = simulate(server)
    for one in ask(simulation, "HEAD", FILES):
        assert "suspended" in str(one.error())
    assert simulation.loop.time() < bound + 2
    assert len(trouble(simulation)) == 1


def test_session_that_is_silent(simulate):
    class Server(Odd):
        def stat(self, path):
            return None
    server = Server()
    simulation = simulate(server)
    for one in ask(simulation, "HEAD", FILES):
        assert "suspended" in str(one.error())
    assert simulation.loop.time() < UNWILLING + 3


def test_login_that_is_silent(simulate):
    server = Odd(login=10000)
    simulation = simulate(server)
    for one in ask(simulation, "HEAD", FILES):
        assert isinstance(one.error(), ConnectError)
    assert simulation.loop.time() < 2 * UNWILLING + 2


def test_fetches_that_hang_do_not_hold_up_questions(simulate):
    """READs of one file are never answered."""
    class Server(Odd):
        def read(self, path, offset, size):
            return None if path == "/7" else super().read(path, offset, size)
    server = Server()
    simulation = simulate(server)
    assert_right(ask(simulation, "HEAD", FILES))
    asked = simulation.ask("GET", [URL + path for path in FILES])
    simulation.advance(5)
    assert sum(one.answered for one in asked) == len(FILES) - 1
    simulation.settle()
    lost, = [one for one in asked if one.wait()[1]]
    assert lost.request.url.endswith("/7")
    assert simulation.loop.time() < AWAY + 300
