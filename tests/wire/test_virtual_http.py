# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""HTTP servers that are slow, silent, overloaded or odd, byte for byte, in virtual time: what is lost, and how long it takes."""

import asyncio

import pytest

from bb.connections import ConnectError, ProtocolError, RefusedError, TimedOutError
from bb.connections.connection import MIN_RATE, RATE_SECONDS
from bb.connections.health import AWAY, UNREACHABLE, UNWILLING
from bb.connections.failures import ATTEMPTS
from bb.connections.connectionset import SLOW
from support.mirror import Simulation
from support.virtualserver import HTTPServer

URL = "https://mirror.example"


def body(target):
    """Each of another size"""
    return target.encode() * (1 + int(target.rpartition("/")[2]) % 50)


def answer(talk, request, *headers):
    """/absent/... is not there, all else is, with a body that belongs to its name, and an ETag"""
    if request.method == "OPTIONS":
        talk.answer(request, b"", "Allow: GET, HEAD", status=405)
    elif "/absent/" in request.target:
        talk.answer(request, b"no such file", *headers, status=404)
    else:
        talk.answer(request, body(request.target), 'ETag: "%s"' % request.target, *headers)


async def works(talk):
    while True:
        answer(talk, await talk.request())


def paths(number, first=0):
    return ["/x/%s" % i for i in range(first, first + number)]


def mixed(number):
    return ["/%s/%s" % ("x" if i % 2 else "absent", i) for i in range(number)]


@pytest.fixture
def simulate():
    """Called with what Simulation takes, but the script instead of a server: returns (server, simulation)"""
    made = []

    def make(script, limit=4, **options):
        server = HTTPServer(script, **options)
        made.append(Simulation(server, limit=limit))
        return server, made[-1]

    yield make
    for one in made:
        one.__exit__(None)


def ask(simulation, method, targets, settle=True):
    asked = simulation.ask(method, [URL + target for target in targets])
    if settle:
        simulation.settle()
    return asked


def target_of(one):
    return one.request.key[1][len(URL):]


def assert_right(asked):
    """Each has the answer to its own question, or the file that belongs to it."""
    for one in asked:
        target = target_of(one)
        response, error = one.wait()
        assert error is None, "%s: %r" % (target, error)
        assert response.status == (404 if "/absent/" in target else 200), target
        if response.status == 200:
            assert response.length == len(body(target)), target
            assert one.file is None or one.body() == body(target), target


def query_and_fetch(simulation, targets):
    """HEADs for all, then GETs for those that are there, as a build does. Returns the seconds that both took."""
    begun = simulation.loop.time()
    assert_right(ask(simulation, "HEAD", targets))
    between = simulation.loop.time()
    assert_right(ask(simulation, "GET", [target for target in targets if "/absent/" not in target]))
    return between - begun, simulation.loop.time() - between


def trouble(simulation):
    return [host.health.suspension_reason for host in simulation.pool.hosts.values() if host.health.suspension_reason]


def count(simulation, name):
    return sum(getattr(host.statistics, name) for host in simulation.pool.hosts.values())


def test_healthy_server(simulate):
    """The measure for the others"""
    server, simulation = simulate(works)
    seconds = query_and_fetch(simulation, mixed(400))
    assert max(seconds) < 1
    assert server.connections <= 4 and len(server.requests) == 400 + 200 + 1


# Slow, silent

@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_some_answers_are_slow(simulate, method):
    """Every 50th after 90 seconds, the second question at once: only those are waited for."""
    asked_before = set()

    async def script(talk):
        while True:
            request = await talk.request()
            if request.method == method and int(request.target.rpartition("/")[2]) % 50 == 7 and \
                    request.target not in asked_before:
                asked_before.add(request.target)
                await asyncio.sleep(90)
            answer(talk, request)
    server, simulation = simulate(script)
    seconds = sum(query_and_fetch(simulation, mixed(400)))
    assert seconds < 8 * SLOW
    assert trouble(simulation) == []


def test_answers_that_are_always_slow(simulate):
    """3 files of 200 take 40 seconds each time. The others do not wait for them."""
    slow = paths(200)[30::60]

    async def script(talk):
        while True:
            request = await talk.request()
            if request.target in slow:
                await asyncio.sleep(40)
            answer(talk, request)
    server, simulation = simulate(script)
    asked = ask(simulation, "HEAD", paths(200), settle=False)
    simulation.advance(3 * SLOW)
    assert sum(one.answered for one in asked) == 200 - len(slow)
    simulation.settle()
    assert_right(asked)
    assert simulation.loop.time() < 40 + 40 + 4 * SLOW
    assert trouble(simulation) == []


def test_request_that_is_never_answered(simulate):
    """It is given up after the time-out, others do not notice."""
    async def script(talk):
        while True:
            request = await talk.request()
            if request.target == "/x/77":
                await talk.forever()
            answer(talk, request)
    server, simulation = simulate(script)
    asked = ask(simulation, "HEAD", paths(200), settle=False)
    simulation.advance(3 * SLOW)
    assert sum(one.answered for one in asked) == 199
    simulation.settle()
    lost, = [one for one in asked if one.wait()[1]]
    assert target_of(lost) == "/x/77" and isinstance(lost.error(), TimedOutError)
    assert simulation.loop.time() < 3 * 100
    assert trouble(simulation) == []


def test_fewer_workers_than_connections(simulate):
    """Two processes serve a connection each until that is closed; others are accepted, and wait."""
    async def script(talk):
        async with working:
            await works(talk)
    server, simulation = simulate(script)
    working = asyncio.Semaphore(2)
    seconds = query_and_fetch(simulation, mixed(400))
    # Some are tried in vain, for UNSERVED seconds each
    assert sum(seconds) < 12
    assert trouble(simulation) == []


def test_connections_that_die_silently(simulate):
    """A NAT or a balancer has forgotten all that were idle for ten seconds."""
    async def script(talk):
        while True:
            try:
                request = await asyncio.wait_for(talk.request(), 10)
            except asyncio.TimeoutError:
                await talk.forever()
            answer(talk, request)
    server, simulation = simulate(script)
    assert_right(ask(simulation, "HEAD", mixed(100)))
    simulation.advance(12)
    begun = simulation.loop.time()
    assert_right(ask(simulation, "GET", paths(100)))
    assert simulation.loop.time() - begun < SLOW + 2
    assert trouble(simulation) == []


def test_connections_that_die_silently_under_load(simulate):
    """All of them at the same moment: what is in flight is sent over new ones."""
    async def script(talk):
        while True:
            request = await talk.request()
            await asyncio.sleep(0.01)
            if simulation.loop.time() > 1 and talk.number <= 4:
                await talk.forever()
            answer(talk, request)
    server, simulation = simulate(script)
    query, fetch = query_and_fetch(simulation, mixed(1000))
    assert query + fetch < 1000 * 1.5 * 0.01 + 3 * SLOW
    assert trouble(simulation) == []


@pytest.mark.parametrize("part, seconds", [(b"x", 1), (b"x" * 50, 2), (b"x", 60)])
def test_body_that_trickles(simulate, part, seconds):
    """It is given up by its rate, and fails in the end; others are served meanwhile."""
    async def script(talk):
        while True:
            request = await talk.request()
            if request.method == "GET" and request.target == "/x/3":
                talk.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
                while not talk.closed:
                    talk.send(part)
                    await asyncio.sleep(seconds)
            answer(talk, request)
    server, simulation = simulate(script)
    assert_right(ask(simulation, "HEAD", paths(20)))
    asked = ask(simulation, "GET", paths(20), settle=False)
    simulation.advance(5)
    assert sum(one.answered for one in asked) == 19
    simulation.settle()
    lost = asked.pop(3)
    assert_right(asked)
    assert isinstance(lost.error(), TimedOutError)
    assert simulation.loop.time() < ATTEMPTS * 100 + 30
    begun = simulation.loop.time()
    again, = ask(simulation, "GET", ["/x/3"])
    assert again.status() == 404 and simulation.loop.time() - begun < 1, "its task does not wait for it once more"


def test_body_that_is_slow_but_arrives(simulate):
    """A little faster than MIN_RATE: it takes minutes, and is complete."""
    size = 300 * MIN_RATE

    async def script(talk):
        while True:
            request = await talk.request()
            if request.method == "HEAD":
                talk.answer(request, b"x" * size)
                continue
            talk.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
            for _ in range(150):
                talk.send(b"x" * (size // 150))
                await asyncio.sleep(1.5)
    server, simulation = simulate(script)
    one, = ask(simulation, "GET", paths(1))
    assert one.status() == 200 and one.body() == b"x" * size
    assert simulation.loop.time() > 5 * RATE_SECONDS and server.connections == 1


# Refusing, resetting

def test_some_requests_reset_the_connection(simulate):
    """5 of 100, always: those are lost."""
    bad = set(paths(100)[10::20])

    async def script(talk):
        while True:
            request = await talk.request()
            if request.target in bad:
                talk.reset()
                await talk.forever()
            answer(talk, request)
    server, simulation = simulate(script)
    for method in ("HEAD", "GET"):
        asked = ask(simulation, method, paths(100))
        assert_right([one for one in asked if target_of(one) not in bad])
        assert all(isinstance(one.error(), (ProtocolError, RefusedError)) for one in asked if target_of(one) in bad)
        assert trouble(simulation) == []
    assert simulation.loop.time() < 60


@pytest.mark.parametrize("headers", [(), ("Retry-After: 60",)])
def test_some_requests_are_always_refused(simulate, headers):
    bad = set(paths(60)[5::20])

    async def script(talk):
        while True:
            request = await talk.request()
            if request.target in bad:
                talk.answer(request, b"", *headers, status=503)
            else:
                answer(talk, request)
    server, simulation = simulate(script)
    asked = ask(simulation, "HEAD", paths(60), settle=False)
    simulation.advance(2)
    assert sum(one.answered for one in asked) >= 57
    simulation.settle()
    assert_right([one for one in asked if target_of(one) not in bad])
    assert all(isinstance(one.error(), RefusedError) for one in asked if target_of(one) in bad)
    assert simulation.loop.time() < 2 * UNWILLING
    assert trouble(simulation) == []


@pytest.mark.parametrize("error, bound", [("closed", UNWILLING), ("refused", UNREACHABLE), ("silent", UNWILLING)])
def test_nothing_is_ever_answered(simulate, error, bound):
    async def script(talk):
        if error == "silent":
            await talk.forever()
    server, simulation = simulate(script)
    if error == "refused":
        def connecting(server):
            raise ConnectError("refused")
        server.connecting = connecting
    for one in ask(simulation, "HEAD", paths(300)):
        assert "suspended" in str(one.error())
    assert simulation.loop.time() < bound + SLOW
    assert len(trouble(simulation)) == 1


@pytest.mark.parametrize("seconds", [1, 20, 50])
def test_restart_in_the_middle(simulate, seconds):
    """Connections are reset, then refused for a while: nothing is lost."""
    def away():
        return 1 < simulation.loop.time() < 1 + seconds

    async def script(talk):
        while True:
            request = await talk.request()
            await asyncio.sleep(0.02)
            if away():
                talk.reset()
                await talk.forever()
            answer(talk, request)

    def connecting(server):
        if away():
            raise ConnectError("refused")
    server, simulation = simulate(script)
    server.connecting = connecting
    query_and_fetch(simulation, mixed(400))
    assert 1 + seconds < simulation.loop.time() < 1 + seconds + 30
    assert trouble(simulation) == []


def test_away_for_good(simulate):
    async def script(talk):
        while True:
            request = await talk.request()
            await asyncio.sleep(0.02)
            if simulation.loop.time() > 1:
                talk.reset()
                await talk.forever()
            answer(talk, request)

    def connecting(server):
        if simulation.loop.time() > 1:
            raise ConnectError("refused")
    server, simulation = simulate(script)
    server.connecting = connecting
    outcomes = [one.wait() for one in ask(simulation, "HEAD", mixed(400))]
    assert sum(response is not None for response, _ in outcomes) > 40
    assert simulation.loop.time() < 1 + AWAY + SLOW


@pytest.mark.parametrize("announced", [True, False])
@pytest.mark.parametrize("answers", [1, 3, 20])
def test_closes_after_some_answers(simulate, answers, announced):
    """From the first close on it is asked about as much as it will answer."""
    async def script(talk):
        for number in range(answers):
            request = await talk.request()
            answer(talk, request, *["Connection: close"] * (announced and number == answers - 1))
    server, simulation = simulate(script)
    query_and_fetch(simulation, mixed(200))
    assert len(server.requests) < 1.5 * 300
    assert trouble(simulation) == []
    assert simulation.loop.time() < 300 * 4 * server.latency


def test_closes_with_each_404(simulate):
    """As Python's own server"""
    async def script(talk):
        while True:
            request = await talk.request()
            if "/absent/" in request.target:
                answer(talk, request, "Connection: close")
                return
            answer(talk, request)
    server, simulation = simulate(script)
    query_and_fetch(simulation, mixed(400))
    # Few are sent in vain
    assert count(simulation, "requests") < 2 * 600
    assert simulation.loop.time() < 600 * 3 * server.latency
    assert trouble(simulation) == []


# Redirects

def test_all_is_redirected_to_another_host(simulate):
    """The other one is pipelined as usual."""
    async def script(talk):
        while True:
            request = await talk.request()
            depth[request.headers["host"]] = max(depth.get(request.headers["host"], 0), 1 + talk.behind)
            if request.headers["host"] == "mirror.example":
                talk.answer(request, b"", "Location: https://other.example" + request.target, status=302)
            else:
                answer(talk, request)
    depth = {}
    server, simulation = simulate(script)
    seconds = query_and_fetch(simulation, mixed(400))
    assert depth["other.example"] > 4
    assert sum(seconds) < 6
    assert trouble(simulation) == []


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("seconds", [0, 100])
def test_target_of_a_head_serves_the_get(simulate, signed, seconds):
    """If it is fresh, and not signed for HEAD only: otherwise the mirror is asked for the target of the GET."""
    async def script(talk):
        while True:
            request = await talk.request()
            path, _, method = request.target.partition("?")
            if request.headers["host"] == "mirror.example":
                target = "https://other.example%s?%s" % (request.target, request.method if signed else "")
                talk.answer(request, b"", "Location: " + target, status=302)
            elif method in ("", request.method):
                answer(talk, request._replace(target=path))
            else:
                talk.answer(request, b"signed for something else", status=403)
    server, simulation = simulate(script)
    assert_right(ask(simulation, "HEAD", paths(100)))
    simulation.advance(seconds)
    assert_right(ask(simulation, "GET", paths(100)))
    asked = [request for request in server.requests if request.headers["host"] == "mirror.example" and request.method == "GET"]
    refused = [request for request in server.requests if request.method == "GET" and request.target.endswith("?HEAD")]
    # With a probe of pipelining, perhaps
    assert len(asked) in ((100, 101) if signed or seconds else (0, 1))
    assert len(refused) <= (100 if signed and not seconds else 0)
    assert trouble(simulation) == []


def test_target_of_redirects_that_is_dead(simulate):
    """Every tenth file is on a host that is not there: the others are not held up."""
    async def script(talk):
        while True:
            request = await talk.request()
            if request.target.endswith("0"):
                talk.answer(request, b"", "Location: https://dead.example" + request.target, status=302)
            else:
                answer(talk, request)

    server, simulation = simulate(script)
    connect = server.connect

    async def refuses(loop, owner, origin, route, timeout):
        if origin.host == "dead.example":
            raise ConnectError("refused")
        return await connect(loop, owner, origin, route, timeout)
    simulation.pool._protocols["https"] = refuses, server.kind
    asked = ask(simulation, "HEAD", paths(200), settle=False)
    simulation.advance(2)
    assert sum(one.answered for one in asked) >= 180
    simulation.settle()
    assert_right([one for one in asked if not target_of(one).endswith("0")])
    assert simulation.loop.time() < UNREACHABLE + 2


# Odd answers

@pytest.mark.parametrize("late", [0, 0.2])
def test_404_with_a_body_that_looks_like_an_answer(simulate, late):
    """Also in answer to HEAD, where there is none: what it says is nobody's answer."""
    async def script(talk):
        while True:
            request = await talk.request()
            if "/absent/" in request.target:
                talk.send(b"HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n")
                await asyncio.sleep(late)
                talk.send(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nwrong")
            else:
                answer(talk, request)
    server, simulation = simulate(script)
    asked = ask(simulation, "HEAD", mixed(120))
    wrong = [target_of(one) for one in asked if one.wait()[0] and (one.wait()[0].status, one.wait()[0].length) !=
             ((404, 0) if "/absent/" in target_of(one) else (200, len(body(target_of(one)))))]
    assert wrong == []
    assert [(target_of(one), one.wait()[1]) for one in asked if not one.wait()[0]] == []
    assert_right(ask(simulation, "GET", [target for target in mixed(120) if "/x/" in target]))
    assert trouble(simulation) == []


@pytest.mark.parametrize("rest", ["answers 400", "answers nothing", "closes"])
@pytest.mark.parametrize("limit, number", [(1, 400), (2, 1000), (4, 400), (4, 3000)])
@pytest.mark.parametrize("at_once", [False, True])
def test_forgets_all_behind_the_first_four_kilobytes(simulate, at_once, limit, number, rest):
    """Of what it reads at once. Nothing is lost, also if its answers come all at once."""
    async def script(talk):
        if at_once:
            talk.hold_answers()
        while True:
            request = await talk.request()
            if talk.behind and len(talk._buffer) > 4096:
                kept = bytes(talk._buffer[:4096])
                whole = kept.rfind(b"\r\n\r\n") + 4
                talk.forget()
                talk._buffer += kept[:whole]
                cut = rest
            else:
                cut = None
            answer(talk, request)
            while cut and talk.behind:
                answer(talk, await talk.request())
            if cut == "answers 400":
                talk.send(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            if cut in ("answers 400", "closes"):
                return
    server, simulation = simulate(script, limit=limit)
    seconds = query_and_fetch(simulation, mixed(number))
    assert sum(seconds) < 4 * SLOW + 2 * number * server.latency
    assert trouble(simulation) == []


@pytest.mark.parametrize("fault", ["404", "other size", "other etag"])
def test_one_odd_answer_concerns_one_object(simulate, fault):
    """Gone, or replaced since the HEAD: the others are pipelined as before."""
    deepest = []

    async def script(talk):
        while True:
            request = await talk.request()
            if request.method == "GET":
                deepest.append(1 + talk.behind)
            if request.method == "GET" and request.target == "/x/20":
                if fault == "404":
                    talk.answer(request, b"gone", status=404)
                else:
                    text = b"changed" if fault == "other size" else body(request.target)
                    talk.answer(request, text, 'ETag: "another"')
            else:
                answer(talk, request)
    server, simulation = simulate(script, limit=1)
    assert_right(ask(simulation, "HEAD", paths(300)))
    asked = ask(simulation, "GET", paths(300))
    odd = asked.pop(20)
    assert_right(asked)
    assert odd.status() == (404 if fault == "404" else 200)
    if fault == "other size":
        assert odd.body() == b"changed"
    assert max(deepest[100:]) > 8
    assert server.connections <= 2


def test_all_objects_look_alike(simulate):
    """One size and no ETag: pipelining is found out about in another way, and their bodies are not in flight together."""
    mixed_up = []

    async def script(talk):
        while True:
            request = await talk.request()
            depth[request.method] = max(depth.get(request.method, 0), 1 + talk.behind)
            if request.method == "OPTIONS":
                talk.answer(request, b"", "Allow: GET, HEAD")
            else:
                if request.method == "GET":
                    mixed_up.append(talk.behind)
                talk.answer(request, b"%-20s" % request.target.encode())
    depth = {}
    server, simulation = simulate(script)
    asked = ask(simulation, "HEAD", paths(1000))
    assert [one.wait()[0].length for one in asked] == [20] * 1000
    assert depth["HEAD"] > 8 and simulation.loop.time() < 3
    asked = ask(simulation, "GET", paths(200))
    assert [one.body() for one in asked] == [b"%-20s" % path.encode() for path in paths(200)]
    assert max(mixed_up) == 0


def test_no_size_in_the_answer_to_head(simulate):
    """And no ETag: bodies are sent one by one, nothing is mixed up."""
    behind = []

    async def script(talk):
        while True:
            request = await talk.request()
            if request.method == "HEAD":
                talk.send(b"HTTP/1.1 200 OK\r\n\r\n")
            elif request.method == "OPTIONS":
                talk.answer(request, b"", "Allow: GET, HEAD")
            else:
                behind.append(talk.behind)
                talk.answer(request, body(request.target))
    server, simulation = simulate(script)
    asked = ask(simulation, "HEAD", paths(300))
    assert [one.status() for one in asked] == [200] * 300
    assert [one.wait()[0].length for one in asked] == [None] * 300
    assert_right(ask(simulation, "GET", paths(100)))
    assert max(behind) == 0


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
def test_lines_that_end_with_lf(simulate, line_end):
    async def script(talk):
        while True:
            request = await talk.request()
            text = body(request.target)
            head = line_end.join([b"HTTP/1.1 200 OK", b"ETag : \"" + request.target.encode() + b'"', b"X-Folded: a", b"  b",
                                  b"Transfer-Encoding: identity", b"Content-Length: %d" % len(text), b"", b""])
            talk.send(head if request.method == "HEAD" else head + text)
    server, simulation = simulate(script)
    query_and_fetch(simulation, paths(200))
    assert server.connections <= 4
    assert len(server.requests) < 2 * 200 + 5


def test_server_that_speaks_something_else(simulate):
    """All fail soon, with an error that leaves them to the fetcher."""
    async def script(talk):
        while True:
            await talk.request()
            talk.send(b"ICY 200 OK\r\n\r\n")
    server, simulation = simulate(script)
    for one in ask(simulation, "HEAD", paths(200)):
        assert isinstance(one.error(), ProtocolError) and one.error().kind == "protocol"
    assert server.connections < 20
    assert simulation.loop.time() < 2


def test_server_that_does_not_announce_sizes(simulate):
    """Each body ends with its connection: the first GET tells, the others fail at once and are left to the fetcher."""
    async def script(talk):
        request = await talk.request()
        talk.send(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + (body(request.target) if request.method == "GET" else b""))
    server, simulation = simulate(script)
    assert [one.status() for one in ask(simulation, "HEAD", paths(20))] == [200] * 20
    for one in ask(simulation, "GET", paths(20)):
        assert one.error().kind == "status"
    simulation.advance(1)
    asked = len(server.requests)
    assert ask(simulation, "GET", paths(1, 100))[0].error().kind == "status"
    assert len(server.requests) == asked
    assert [one.status() for one in ask(simulation, "HEAD", paths(3, 200))] == [200] * 3
