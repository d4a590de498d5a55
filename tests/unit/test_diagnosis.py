# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""Answers about a file, or about the host: 403, and errors of the server. With pretended connections in virtual time."""

import random

import pytest

from bb.connections import ConnectError, RefusedError
from bb.connections.health import AWAY, PAUSE, SUSPENSION, UNWILLING
from bb.connections.failures import REFUSED_ATTEMPTS
from bb.connections.request import Response
from support.asking import Asked
from support.mirror import Mirror, Simulation

URL = "http://mirror.example/"

FORBIDDEN = Response(403, {}, 0)
MISSING = Response(404, {}, 0)
ERROR = Response(500, {}, 0)


@pytest.fixture(params=["one at a time", "many"])
def mirror(request):
    """Answers one request at a time on each connection, or passes the trial of pipelining"""
    mirror = Mirror()
    mirror.answer = found
    if request.param == "one at a time":
        mirror.kind.version = (1, 0)
    return mirror


def found(request):
    """Each file is another one"""
    return Response(200, {"etag": request.url}, 100)


@pytest.fixture
def simulation(mirror):
    with Simulation(mirror) as made:
        yield made


def there(number, first=0):
    return [URL + "there/%s" % i for i in range(first, first + number)]


def absent(number, first=0):
    return [URL + "absent/%s" % i for i in range(first, first + number)]


def mixed(number):
    """Of each three one is there"""
    return [(there if i % 3 == 0 else absent)(1, i)[0] for i in range(number)]


def by_name(request, otherwise):
    return found(request) if "/there/" in request.url else otherwise


def expected(urls, otherwise):
    return [200 if "/there/" in url else otherwise for url in urls]


def trouble(simulation):
    return [host.health.suspension_reason for host in simulation.pool.hosts.values() if host.health.suspension_reason]


def times_asked(mirror, urls):
    """How often each was asked for, sorted"""
    return sorted(mirror.urls.count(url) for url in urls)


# A mirror that says 403 for what does not exist

@pytest.mark.parametrize("urls", [there(1) + absent(3000), mixed(3000), absent(1500) + there(1) + absent(1500, 1500)],
                         ids=["one is there", "mixed", "one in the middle is there"])
def test_403_for_absent_files(mirror, simulation, urls):
    """Thousands of them are not asked twice, and do not slow anything down."""
    mirror.answer = lambda request: by_name(request, FORBIDDEN)
    assert simulation.statuses("HEAD", urls) == expected(urls, 403)
    # Some as GET, too, until it is known that this does not help; two further requests for each run of answers
    assert len(mirror.urls) < 1.4 * len(urls)
    if mirror.kind.version == (1, 1):
        assert len(mirror.urls) < 1.1 * len(urls)
    assert trouble(simulation) == []
    assert simulation.loop.time() < len(urls) * mirror.latency / 2
    host, = simulation.pool.hosts.values()
    assert host.statistics.refusals == 0 and host.health.rate_limit.rate is None


def test_403_for_all_files(mirror, simulation):
    """None is there: nothing tells more, and nothing is asked twice but as GET at first."""
    mirror.answer = lambda request: FORBIDDEN
    assert simulation.statuses("HEAD", absent(3000)) == [403] * 3000
    assert len(mirror.urls) < 3100
    assert simulation.loop.time() < 3000 * mirror.latency


def test_403_for_head_only(mirror, simulation):
    """A GET of the first byte tells how it is."""
    mirror.answer = lambda request: FORBIDDEN if request.method == "HEAD" else by_name(request, MISSING)
    urls = mixed(300)
    assert simulation.statuses("HEAD", urls) == expected(urls, 404)
    assert trouble(simulation) == []


def test_403_for_absent_files_one_after_the_other(mirror, simulation):
    """As tasks ask."""
    mirror.answer = lambda request: by_name(request, FORBIDDEN)
    assert simulation.statuses("HEAD", there(1)) == [200]
    for url in absent(50):
        assert simulation.statuses("HEAD", [url]) == [403]
    # The sample and a probe each; before the first verdicts another probe
    assert len(mirror.urls) <= 1 + 3 * 50 + 6
    assert simulation.loop.time() < 4 * 50 * mirror.latency + 3 * PAUSE


def test_403_for_absent_files_and_404_for_others(mirror, simulation):
    mirror.answer = lambda request: by_name(request, MISSING if request.url.endswith("0") else FORBIDDEN)
    urls = mixed(600)
    statuses = simulation.statuses("HEAD", urls)
    assert statuses == [200 if "/there/" in url else 404 if url.endswith("0") else 403 for url in urls]


# Bans

class Ban:
    """refused to everybody for so many seconds who asks more than limit times in a second"""

    def __init__(self, seconds, limit=50):
        self.seconds = seconds
        self.limit = limit
        self.until = 0
        self.bans = 0
        self._asked = []

    def takes(self, now):
        if now < self.until:
            return False
        self._asked = [time for time in self._asked if time > now - 1] + [now]
        if len(self._asked) > self.limit:
            self.until = now + self.seconds
            self.bans += 1
            return False
        return True


@pytest.mark.parametrize("refused", [FORBIDDEN, Response(429, {}, 0), Response(503, {}, 0)], ids=["403", "429", "503"])
@pytest.mark.parametrize("otherwise", [MISSING, FORBIDDEN], ids=["404", "403"])
def test_ban_for_ten_seconds(mirror, simulation, refused, otherwise):
    """Of a mirror that says 404, or 403, for what does not exist."""
    ban = Ban(10)
    mirror.answer = lambda request: by_name(request, otherwise) if ban.takes(simulation.loop.time()) else refused
    assert simulation.statuses("HEAD", there(3)) == [200] * 3
    urls = mixed(200)
    statuses = simulation.statuses("HEAD", urls)
    assert statuses == expected(urls, otherwise.status)
    assert ban.bans >= 1
    assert trouble(simulation) == []


def test_ban_and_files(mirror, simulation):
    """They are known to be there: 403 is a refusal without further questions."""
    ban = Ban(10)
    mirror.answer = found
    assert simulation.statuses("HEAD", there(150)) == [200] * 150
    mirror.answer = lambda request: found(request) if ban.takes(simulation.loop.time()) else FORBIDDEN
    asked = simulation.ask("GET", there(150))
    simulation.settle()
    assert [one.status() for one in asked] == [200] * 150
    assert ban.bans >= 1
    assert trouble(simulation) == []


def test_ban_for_good(mirror, simulation):
    """The host is suspended, which is reported; what is not answered is not said to be absent."""
    mirror.answer = found
    assert simulation.statuses("HEAD", there(10)) == [200] * 10
    mirror.answer = lambda request: FORBIDDEN
    outcomes = simulation.statuses("HEAD", there(300, 100))
    assert all(isinstance(error, RefusedError) and "status 403" in str(error) for error in outcomes)
    assert simulation.loop.time() < AWAY + 5
    assert len(trouble(simulation)) == 1
    # A probe every SUSPENSION seconds
    begun = len(mirror.urls)
    simulation.advance(SUSPENSION)
    mirror.answer = found
    assert simulation.statuses("HEAD", there(10, 1000)) == [200] * 10
    assert len(mirror.urls) <= begun + 20


@pytest.mark.parametrize("refused", [
    FORBIDDEN, Response(403, {"retry-after": "1"}, 0), Response(418, {}, 0), Response(420, {}, 0), Response(429, {}, 0),
    Response(418, {"retry-after": "1"}, 0), Response(500, {"retry-after": "1"}, 0),
], ids=lambda response: "%s %s" % (response.status, response.headers.get("retry-after", "")))
def test_token_bucket(mirror, simulation, refused):
    """20 requests a second; what is more is refused."""
    last = [-1.0]

    def takes():
        now = simulation.loop.time()
        if now < last[0] + 0.05:
            return False
        last[0] = now
        return True
    mirror.answer = lambda request: by_name(request, MISSING) if takes() else refused
    urls = mixed(200)
    assert simulation.statuses("HEAD", there(1, 1000)) == [200]
    assert simulation.statuses("HEAD", urls) == expected(urls, 404)
    assert simulation.loop.time() < 200 / 20 / 0.6 + 5
    assert trouble(simulation) == []


# Errors of the server

@pytest.mark.parametrize("status", [500, 502, 504, 507, 520])
def test_error_for_absent_files(mirror, simulation, status):
    """Each is asked once more, and that is its answer."""
    mirror.answer = lambda request: by_name(request, Response(status, {}, 0))
    urls = mixed(300)
    assert simulation.statuses("HEAD", urls) == expected(urls, status)
    asked = times_asked(mirror, [url for url in urls if "/absent/" in url])
    # Those that are asked more often were used to find out
    assert asked[0] == 2 and asked.count(2) > 100
    assert len(mirror.urls) < 800
    assert trouble(simulation) == []
    assert simulation.loop.time() < 5


@pytest.mark.parametrize("seed", range(3))
def test_errors_that_pass(mirror, simulation, seed):
    """One request in ten, at random: what is asked once more is answered nearly always."""
    rng = random.Random(seed)
    mirror.answer = lambda request: ERROR if rng.random() < 0.1 else by_name(request, MISSING)
    urls = mixed(1000)
    statuses = simulation.statuses("HEAD", urls)
    assert {(found, wanted) for found, wanted in zip(statuses, expected(urls, 404)) if found != 500} == {(200, 200), (404, 404)}
    assert statuses.count(500) < 25
    assert trouble(simulation) == []


@pytest.mark.parametrize("seconds", [2, 10, 40])
@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_error_for_all_for_some_seconds(mirror, simulation, seconds, method):
    """A gateway whose server is restarted: nothing is lost."""
    mirror.answer = lambda request: found(request) if simulation.loop.time() < 1 or simulation.loop.time() > 1 + seconds else \
        Response(502, {}, 0)
    mirror.latency = 0.05
    assert simulation.statuses("HEAD", there(5)) == [200] * 5
    simulation.advance(1 - simulation.loop.time())
    asked = simulation.ask(method, there(200, 100))
    simulation.settle()
    assert [one.status() for one in asked] == [200] * 200
    assert simulation.loop.time() < 1 + seconds + 15
    assert trouble(simulation) == []


@pytest.mark.parametrize("answers, bound", [(0, UNWILLING), (5, AWAY)])
def test_error_for_all_for_ever(mirror, simulation, answers, bound):
    """The host is suspended, and that is reported."""
    mirror.answer = found
    assert simulation.statuses("HEAD", there(answers)) == [200] * answers
    mirror.answer = lambda request: Response(502, {}, 0)
    for one in simulation.answers("HEAD", there(300, 100)):
        assert isinstance(one[1], RefusedError) and "status 502" in str(one[1])
    assert simulation.loop.time() < bound + 5
    assert len(mirror.urls) < 500
    assert len(trouble(simulation)) == 1
    late, = simulation.ask("HEAD", [URL + "late"])
    assert late.answered and "suspended" in str(late.error())


def test_error_for_ever_of_a_host_that_has_answered_404_only(mirror, simulation):
    """That is no less known."""
    mirror.answer = lambda request: MISSING
    assert simulation.statuses("HEAD", absent(5)) == [404] * 5
    mirror.answer = lambda request: MISSING if request.url in absent(5) else ERROR
    assert simulation.statuses("HEAD", absent(20, 100)) == [500] * 20
    assert trouble(simulation) == []


# The answer to a GET is another than that to a HEAD

@pytest.mark.parametrize("answer, attempts", [(ERROR, 2), (FORBIDDEN, REFUSED_ATTEMPTS)])
@pytest.mark.parametrize("known", [True, False], ids=["after a query", "a siginfo"])
def test_file_that_exists_but_cannot_be_read(mirror, simulation, answer, attempts, known):
    """It costs some further questions, and nobody else anything."""
    mirror.answer = lambda request: answer if request.url in bad and request.method == "GET" else found(request)
    bad = there(3, 1000)
    assert simulation.statuses("HEAD", there(100) + (bad if known else [])) == [200] * (103 if known else 100)
    asked = simulation.ask("GET", bad + there(100))
    simulation.until(lambda: sum(one.answered for one in asked) >= 100, "the others are answered")
    simulation.settle()
    outcomes = [one.wait() for one in asked]
    assert [response.status for response, _ in outcomes[3:]] == [200] * 100
    for response, error in outcomes[:3]:
        assert isinstance(error, RefusedError) or response.status == answer.status
    gets = sum(host.statistics.requests for host in simulation.pool.hosts.values())
    assert gets < 203 + 3 * 4 * attempts + 30
    assert trouble(simulation) == []
    assert simulation.loop.time() < 3 * UNWILLING


# Whatever happens, each is answered

@pytest.mark.parametrize("status", [403, 500])
def test_stop_with_answers_in_doubt(mirror, simulation, status):
    mirror.answer = lambda request: by_name(request, Response(status, {}, 0))
    assert simulation.statuses("HEAD", there(1)) == [200]
    asked = simulation.ask("HEAD", absent(50))
    simulation.advance(2.5 * mirror.latency)
    simulation.pool.stop()
    assert [len(one.calls) for one in asked] == [1] * 50


@pytest.mark.parametrize("status", [403, 500])
def test_host_that_vanishes_while_answers_are_in_doubt(mirror, simulation, status):
    def connecting(route):
        if simulation.loop.time() > 1:
            raise ConnectError("nobody there")

    def answer(request):
        if simulation.loop.time() > 1:
            return ConnectError("gone")
        return by_name(request, Response(status, {}, 0))
    mirror.answer, mirror.connecting = answer, connecting
    mirror.latency = 0.3
    assert simulation.statuses("HEAD", there(1)) == [200]
    outcomes = simulation.answers("HEAD", absent(50))
    assert all(error or response.status == status for response, error in outcomes)
    assert simulation.loop.time() < AWAY + 10


def test_probes_are_not_remembered(mirror, simulation):
    """The file that is asked for to find out may be gone, and others have to hear so."""
    mirror.answer = lambda request: by_name(request, FORBIDDEN)
    assert simulation.statuses("HEAD", there(1) + absent(20)) == [200] + [403] * 20
    mirror.answer = lambda request: MISSING
    fresh = Asked("HEAD", there(1)[0])
    fresh.request.fresh = True
    simulation.submit(fresh)
    simulation.settle()
    assert fresh.status() == 404
