# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""The pool and its hosts: queues, limits, retries, pauses and suspension, with pretended connections in virtual time."""

import pytest

from bb.connections import (Cancelled, ConnectError, DestinationError, Disconnected, IdleClosed, ProtocolError, RefusedError,
                            StatusError, TimedOutError)
from bb.connections.health import AWAY, PAUSE, RISE_AFTER, SUSPENSION, UNREACHABLE, UNREACHABLE_SSH, UNWILLING
from bb.connections.failures import ATTEMPTS, REFUSED_ATTEMPTS
from bb.connections.connectionset import IDLE, SLOW, UNUSED
from bb.connections.http import MAX_REDIRECTS
from bb.connections.request import Response
from bb.connections.pool import MAX_ALL, MAX_CONNECTIONS
from support.asking import Asked
from support.mirror import FOUND, NEVER, REFUSED, Mirror, Simulation

URL = "http://mirror.example/x"
PROXY = {"http_proxy": "http://proxy.example"}


def urls(number, first=0):
    return [URL + str(i) for i in range(first, first + number)]


@pytest.fixture
def simulate():
    """Called with what Simulation takes returns one, which is checked at the end."""
    made = []

    def make(*args, **kwargs):
        made.append(Simulation(*args, **kwargs))
        return made[-1]

    yield make
    for one in made:
        one.__exit__(None)


@pytest.fixture
def mirror():
    """Answers one request at a time on each connection: it fails the trial of pipelining"""
    mirror = Mirror()
    mirror.kind.version = (1, 0)
    return mirror


@pytest.fixture
def deep():
    """Answers many at a time, without a trial"""
    return Mirror(needs_trial=False)


@pytest.fixture
def sessions():
    """Connections that need a login, as those over ssh"""
    mirror = Mirror(serial=True, needs_trial=False)
    mirror.login, mirror.latency = 0.4, 0.02
    return mirror


def in_turn(*answers):
    """answers one after another, the last for ever"""
    rest = list(answers)
    return lambda request: rest.pop(0) if len(rest) > 1 else rest[0]


def refuse(error):
    def connecting(route):
        raise error
    return connecting


# Queues and connections

def test_one_connection_serves_one_after_another(simulate, mirror):
    simulation = simulate(mirror)
    for url in urls(20):
        assert simulation.statuses("HEAD", [url]) == [200]
    assert (mirror.made, mirror.urls) == (1, urls(20))
    counters = simulation.counters(URL)
    assert (counters.requests, counters.connections, counters.retries, counters.refusals) == (20, 1, 0, 0)


def test_what_an_answer_leads_to_needs_no_further_connection(simulate, mirror):
    """A task asks for the next file at once."""
    simulation = simulate(mirror)
    asked = [Asked("HEAD", url) for url in urls(10)]

    def chain(number):
        def done(*answer):
            asked[number].answer(*answer)
            if number + 1 < len(asked):
                simulation.submit(asked[number + 1])
        return done
    for number, one in enumerate(asked):
        one.request.done = chain(number)
    simulation.submit(asked[0])
    simulation.until(lambda: all(one.answered for one in asked), "all are answered")
    assert mirror.made == 1


@pytest.mark.parametrize("kind", ["one at a time", "many"])
def test_order_of_submission_is_kept(simulate, mirror, deep, kind):
    there = mirror if kind == "one at a time" else deep
    simulation = simulate(there, limit=1)
    assert simulation.statuses("HEAD", urls(300)) == [200] * 300
    assert there.urls == urls(300)
    assert there.sends == ([1] * 300 if there is mirror else there.sends)
    assert max(there.sends) <= 64


def test_first_are_sent_before_all_others(simulate, mirror):
    simulation = simulate(mirror, limit=1)
    simulation.ask("HEAD", urls(10))
    urgent = [Asked("HEAD", url) for url in urls(3, 100)]
    for one in urgent:
        one.request.first = True
    simulation.submit(*urgent)
    simulation.settle()
    assert mirror.urls == urls(3, 100) + urls(10)


def test_hurry(simulate, mirror):
    """What is queued already, and becomes urgent; what is in flight stays where it is."""
    simulation = simulate(mirror, limit=1)
    asked = simulation.ask("HEAD", urls(10))
    simulation.until(lambda: mirror.urls, "the first is sent")
    simulation.pool.prioritise([asked[0].request, asked[7].request, asked[5].request])
    simulation.settle()
    assert mirror.urls == [URL + str(i) for i in (0, 7, 5, 1, 2, 3, 4, 6, 8, 9)]


@pytest.mark.parametrize("limit", [1, 4])
def test_all_connections_and_never_more(simulate, mirror, limit):
    simulation = simulate(mirror, limit=limit)
    assert simulation.statuses("HEAD", urls(200)) == [200] * 200
    assert mirror.peak == mirror.made == limit
    assert sorted(mirror.urls) == sorted(urls(200))
    # In parallel
    assert simulation.loop.time() < 200 / limit * mirror.latency * 1.5


def test_no_more_connections_than_requests(simulate, deep):
    assert simulate(deep).statuses("HEAD", urls(2)) == [200] * 2
    assert deep.attempts <= 2


def test_limit_is_per_host_and_user(simulate, mirror):
    mirror.latency = 10
    simulation = simulate(mirror, limit=1)
    assert simulation.statuses("HEAD", ["http://a.example/", "http://b.example/", "http://user@a.example/"]) == [200] * 3
    assert mirror.peak == 3
    assert simulation.loop.time() < 20


def test_routes_share_the_limit(simulate, mirror):
    """Where all connections are by the other route, one gives its place."""
    simulation = simulate(mirror)
    environments = [{"http_proxy": "http://one.example"}, {"http_proxy": "http://two.example"}, {}]
    asked = [Asked("HEAD", url, environments[i % 3]) for i, url in enumerate(urls(200))]
    simulation.submit(*asked)
    simulation.settle()
    assert [one.status() for one in asked] == [200] * 200
    assert mirror.peak <= 4


def test_single_place_for_two_routes(simulate, mirror):
    simulation = simulate(mirror, limit=1)
    asked = [Asked("HEAD", url, PROXY if i % 2 else {}) for i, url in enumerate(urls(10))]
    simulation.submit(*asked)
    simulation.settle()
    assert [one.status() for one in asked] == [200] * 10
    assert mirror.peak == 1


def test_the_last_are_not_divided_again_and_again(simulate, deep):
    """Two connections get half of the queue each, and not halves of what is left each time."""
    simulation = simulate(deep, limit=2)
    simulation.ask("HEAD", urls(2, 1000))
    simulation.settle()
    assert deep.made == 2
    deep.sends.clear()
    assert simulation.statuses("HEAD", urls(40)) == [200] * 40
    assert deep.sends == [20, 20]


def test_depth_is_never_exceeded(simulate, deep):
    simulation = simulate(deep, limit=2)
    assert simulation.statuses("HEAD", urls(1000)) == [200] * 1000
    assert max(deep.sends) == 64


def test_who_logs_in_gets_no_share(simulate, sessions):
    """A login takes many round trips: what there is to do is done by then."""
    simulation = simulate(sessions)
    assert simulation.statuses("GET", [URL]) == [200]
    sessions.login = 1000
    assert simulation.statuses("GET", urls(16)) == [200] * 16
    assert simulation.loop.time() < 10
    assert sum(sessions.sends) == 17


def test_the_host_has_work_before_answers_are_passed_on(simulate, mirror):
    """Whoever gets an answer may take long."""
    simulation = simulate(mirror, limit=1)
    behind = []
    asked = [Asked("HEAD", url) for url in urls(4)]
    for number, one in enumerate(asked):
        one.request.done = lambda *answer, one=one: (behind.append(len(mirror.urls)), one.answer(*answer))
    simulation.submit(*asked)
    simulation.settle()
    assert behind == [1, 2, 3, 4] or behind == [2, 3, 4, 4]


# Retries

@pytest.mark.parametrize("error, times", [(ProtocolError("broken"), 2), (TimedOutError("silence"), 2), (RefusedError("busy"), 2),
                                          (Disconnected("closed"), 2)])
def test_retried(simulate, mirror, error, times):
    mirror.answer = in_turn(*[error] * times, FOUND)
    simulation = simulate(mirror)
    assert simulation.statuses("HEAD", [URL]) == [200]
    assert mirror.urls == [URL] * (times + 1)
    assert mirror.open <= 1
    counters = simulation.counters(URL)
    assert counters.retries == times
    assert counters.refusals == (2 if isinstance(error, (RefusedError, Disconnected)) else 0)


def test_retries_have_an_end(simulate, mirror):
    error = ProtocolError("broken")
    mirror.answer = in_turn(error)
    simulation = simulate(mirror)
    assert simulation.statuses("HEAD", [URL]) == [error]
    assert mirror.urls == [URL] * ATTEMPTS


def test_not_retried(simulate, mirror):
    mirror.answer = in_turn(StatusError("no length", 200))
    simulation = simulate(mirror)
    error, = simulation.statuses("HEAD", [URL])
    assert error.status == 200
    assert mirror.urls == [URL]


def test_silence(simulate, mirror):
    mirror.answer = lambda request: NEVER
    simulation = simulate(mirror)
    error, = simulation.statuses("HEAD", [URL])
    assert isinstance(error, ConnectError) and "no data for" in str(error)
    assert UNWILLING <= simulation.loop.time() < UNWILLING + SLOW


def test_connecting_takes_too_long(simulate, mirror):
    mirror.login = 1000
    simulation = simulate(mirror)
    error, = simulation.statuses("HEAD", [URL])
    assert isinstance(error, ConnectError)
    assert "no connection within %s seconds" % UNWILLING in str(error)
    assert simulation.loop.time() < UNWILLING + 1
    assert mirror.made == 0


@pytest.mark.parametrize("error", [Disconnected("closed"), IdleClosed("closed")])
def test_used_connection_that_the_server_closes_is_no_failure(simulate, mirror, error):
    mirror.answer = in_turn(FOUND, error, FOUND)
    simulation = simulate(mirror)
    assert simulation.statuses("HEAD", [URL + "1"]) == [200]
    assert simulation.statuses("HEAD", [URL + "2"]) == [200]
    assert mirror.made == 2
    counters = simulation.counters(URL)
    assert (counters.retries, counters.refusals) == (0, 0)


def test_error_of_one_request_says_nothing_about_the_host(simulate, mirror):
    """A full disk, for example"""
    mirror.answer = lambda request: (None, DestinationError("full"))
    simulation = simulate(mirror)
    for _ in range(20):
        assert [str(error) for error in simulation.statuses("GET", [URL])] == ["full"]
    assert mirror.made == 1
    assert simulation.pool.is_healthy(simulation.asked[0].request.origin, simulation.asked[0].request.route)


def test_redirects_have_an_end(simulate, mirror):
    mirror.answer = lambda request: Response(302, {"location": request.url + "x"}, 0)
    simulation = simulate(mirror)
    error, = simulation.statuses("HEAD", [URL])
    assert error.status == 302
    assert mirror.urls == [URL + "x" * i for i in range(MAX_REDIRECTS + 1)]


def test_redirect_to_another_host(simulate, mirror):
    mirror.answer = lambda request: FOUND if "other" in request.url else Response(302, {"location": "http://other.example/y"}, 0)
    simulation = simulate(mirror)
    assert simulation.statuses("HEAD", [URL, URL + "2"]) == [200] * 2
    assert sorted(mirror.urls) == sorted([URL, URL + "2"] + ["http://other.example/y"] * 2)


# Pauses and suspension

def test_pause_after_a_refusal(simulate, mirror):
    """Nothing is sent meanwhile, not even on other connections, or what is submitted then."""
    mirror.answer = in_turn(REFUSED, REFUSED, FOUND)
    simulation = simulate(mirror, limit=1)
    simulation.ask("HEAD", urls(10))
    simulation.until(lambda: len(mirror.urls) == 2, "the second is sent")
    simulation.advance(2 * mirror.latency)
    simulation.ask("HEAD", urls(10, 10))
    simulation.settle()
    times = [time for time, _ in mirror.log]
    # Two of them in a row are refused: one may have reasons of its own
    assert times[2] - times[1] >= PAUSE / 2
    assert max(later - earlier for earlier, later in zip(times[2:], times[3:])) < PAUSE / 2
    assert [mirror.urls.count(URL + str(i)) for i in range(20)] == [2, 2] + [1] * 18


@pytest.mark.parametrize("answers, asked, times", [([], 7, 2), ([FOUND], 50, 3)])
def test_retry_after(simulate, mirror, answers, asked, times):
    """Before a long one a probe is refused as well."""
    mirror.answer = in_turn(*answers, *[Response(503, {"retry-after": str(asked)}, 0)] * times, FOUND)
    simulation = simulate(mirror, limit=1)
    assert simulation.statuses("HEAD", urls(3)) == [200] * 3
    times = [time for time, _ in mirror.log]
    assert asked <= max(later - earlier for earlier, later in zip(times, times[1:])) < asked + 1


def test_retry_after_that_is_too_long(simulate, mirror):
    """The host is suspended at once, as it wants."""
    mirror.answer = lambda request: Response(503, {"retry-after": "100"}, 0)
    simulation = simulate(mirror)
    assert all("suspended for 100 seconds" in str(error) for error in simulation.statuses("HEAD", urls(20)))
    assert simulation.loop.time() < 1
    simulation.advance(99)
    assert "suspended" in str(simulation.statuses("HEAD", [URL])[0])
    mirror.answer = lambda request: FOUND
    simulation.advance(2)
    assert simulation.statuses("HEAD", [URL]) == [200]


def test_fewer_connections_after_refusals_and_more_again(simulate, mirror):
    mirror.answer = lambda request: REFUSED if mirror.open > 1 else FOUND
    simulation = simulate(mirror)
    assert simulation.statuses("HEAD", urls(20)) == [200] * 20
    assert mirror.peak == 4
    mirror.answer = lambda request: FOUND
    mirror.peak = mirror.open
    assert mirror.open == 1
    # A query is queued as a whole: further connections are opened without another submit()
    assert simulation.statuses("HEAD", urls(40 * RISE_AFTER, 100)) == [200] * 40 * RISE_AFTER
    assert mirror.peak == 4
    assert simulation.pool.hosts[simulation.asked[0].request.origin].health.suspension_reason is None


def test_suspension_fails_all_and_ends_with_a_probe(simulate, mirror):
    mirror.connecting = refuse(ConnectError("nobody there"))
    simulation = simulate(mirror)
    errors = simulation.statuses("HEAD", urls(30))
    assert all(isinstance(error, ConnectError) for error in errors)
    assert all("is suspended for %s seconds: nobody there" % SUSPENSION in str(error) for error in errors)
    assert not any(error.retryable for error in errors)
    assert UNREACHABLE <= simulation.loop.time() < UNREACHABLE + 1
    host, = simulation.pool.hosts.values()
    assert host.health.suspension_reason == "nobody there"

    attempts = mirror.attempts
    late, = simulation.ask("HEAD", [URL])
    assert late.answered and "suspended" in str(late.error()), "it fails at once"

    # After that time one probe, which fails, suspends it again
    simulation.advance(SUSPENSION)
    errors = simulation.statuses("HEAD", urls(10))
    assert ["suspended" in str(error) for error in errors] == [True] * 10
    assert mirror.attempts == attempts + 1

    mirror.connecting = lambda route: None
    simulation.advance(SUSPENSION)
    assert simulation.statuses("HEAD", urls(RISE_AFTER // 2)) == [200] * (RISE_AFTER // 2)
    assert mirror.peak == 1, "with one connection to begin with"


@pytest.mark.parametrize("kind, bound", [("mirror", UNREACHABLE), ("sessions", UNREACHABLE_SSH)])
def test_patience_with_a_host_that_is_not_there_yet(simulate, mirror, sessions, kind, bound):
    there = {"mirror": mirror, "sessions": sessions}[kind]

    def connecting(route):
        if simulation.loop.time() < bound - 1:
            raise ConnectError("nobody there")
    there.connecting = connecting
    simulation = simulate(there)
    assert simulation.statuses("HEAD", urls(30)) == [200] * 30
    assert simulation.pool.hosts[simulation.asked[0].request.origin].health.suspension_reason is None


@pytest.mark.parametrize("seconds", [5, 15, 25, 60])
@pytest.mark.parametrize("failure", [ConnectError("nobody there"), RefusedError("busy"), Disconnected("closed"), NEVER])
def test_patience_with_a_host_that_is_restarted(simulate, mirror, failure, seconds):
    """It has answered before, and is away for so many seconds: nothing is lost."""
    def away():
        return 1 < simulation.loop.time() < 1 + seconds

    def connecting(route):
        if away() and isinstance(failure, ConnectError):
            raise failure

    mirror.connecting = connecting
    mirror.latency = 0.1
    mirror.answer = lambda request: (Disconnected("gone") if isinstance(failure, ConnectError) else failure) if away() else FOUND
    simulation = simulate(mirror)
    assert simulation.statuses("HEAD", urls(200)) == [200] * 200
    assert simulation.loop.time() < 1 + seconds + 30
    assert simulation.pool.hosts[simulation.asked[0].request.origin].health.suspension_reason is None


def test_away_for_good(simulate, mirror):
    mirror.latency = 0.1
    mirror.answer = lambda request: FOUND if simulation.loop.time() < 1 else Disconnected("gone")
    mirror.connecting = lambda route: None if simulation.loop.time() < 1 else refuse(ConnectError("nobody there"))(route)
    simulation = simulate(mirror)
    outcomes = simulation.statuses("HEAD", urls(200))
    assert outcomes.count(200) > 10
    assert all("suspended" in str(error) for error in outcomes if error != 200)
    assert AWAY <= simulation.loop.time() < AWAY + 5


def test_silence_suspends_too(simulate, mirror):
    """A mirror that accepts and never answers would cost a time-out a request: hours for thousands."""
    mirror.answer = lambda request: NEVER
    simulation = simulate(mirror)
    for error in simulation.statuses("HEAD", urls(200)):
        assert isinstance(error, ConnectError)
    assert UNWILLING <= simulation.loop.time() < UNWILLING + SLOW


def test_refusals_suspend_too(simulate, mirror):
    mirror.answer = lambda request: REFUSED
    simulation = simulate(mirror)
    errors = simulation.statuses("HEAD", urls(200))
    assert all(isinstance(error, RefusedError) and "suspended" in str(error) for error in errors)
    assert len(mirror.urls) < 50
    assert UNWILLING <= simulation.loop.time() < UNWILLING + 1


# One request that is slow, or refused

def test_slow_answers_cost_only_themselves(simulate, deep):
    """Every 50th file is answered after 90 seconds."""
    deep.answer = lambda request: FOUND if int(request.url[len(URL):]) % 50 or request.url in slept else NEVER
    slept = set()
    simulation = simulate(deep)

    def wake(url):
        slept.add(url)
        for one in deep.connections:
            one.updated()
    asked = simulation.ask("HEAD", urls(200))
    for url in urls(200)[::50]:
        simulation.loop.call_later(90, wake, url)
    simulation.advance(30)
    assert [one.answered for one in asked] == [i % 50 != 0 for i in range(200)]
    simulation.settle()
    assert [one.status() for one in asked] == [200] * 200
    assert simulation.loop.time() < 100
    assert simulation.pool.hosts[asked[0].request.origin].health.suspension_reason is None


def test_connections_that_nobody_serves(simulate, mirror):
    """A server with two processes, each of which serves one connection until that is closed"""
    mirror.answer = lambda request: lambda connection: FOUND if connection in mirror.connections[:2] else NEVER
    mirror.latency = 0.1
    simulation = simulate(mirror)
    assert simulation.statuses("HEAD", urls(200)) == [200] * 200
    assert simulation.loop.time() < 20


def test_other_hosts_are_not_suspended(simulate, mirror):
    def connecting(route):
        if not route.verify:
            raise ConnectError("nobody there")
    mirror.connecting = connecting
    simulation = simulate(mirror)
    errors = simulation.statuses("HEAD", ["https://other.example/%s" % i for i in range(5)], verify=False)
    assert all(isinstance(error, ConnectError) for error in errors)
    assert simulation.statuses("HEAD", [URL]) == [200]


@pytest.mark.parametrize("headers", [{}, {"retry-after": "60"}])
def test_url_that_is_always_refused_does_not_hold_up_the_others(simulate, deep, headers):
    bad = urls(60)[::20]
    deep.answer = lambda request: Response(503, headers, 0) if request.url in bad else FOUND
    simulation = simulate(deep, limit=2)
    asked = simulation.ask("HEAD", urls(60))
    simulation.until(lambda: sum(one.answered for one in asked) == 57, "the others are answered")
    assert simulation.loop.time() < 1
    simulation.settle()
    assert [isinstance(one.error(), RefusedError) for one in asked if one.request.url in bad] == [True] * 3
    assert max(deep.urls.count(url) for url in bad) <= 2 * REFUSED_ATTEMPTS
    assert simulation.pool.hosts[asked[0].request.origin].health.suspension_reason is None
    assert simulation.loop.time() < 2 * UNWILLING


def test_refused_behind_a_long_body(simulate, deep):
    """Its connection waits for the body: another one takes it."""
    refused = in_turn(REFUSED, FOUND)
    arrived = []
    deep.answer = lambda request: refused(request) if request.url == URL + "refused" else FOUND if arrived else NEVER
    simulation = simulate(deep)
    first, body = simulation.ask("HEAD", [URL + "refused", URL + "long"])
    simulation.until(lambda: first.answered, "the refused one is answered")
    assert first.status() == 200
    assert not body.answered


# Routes that fail

def not_by_proxy(route):
    if route.proxy:
        raise ConnectError("not by proxy", retryable=False)


def test_certificate_that_is_not_trusted_is_not_tried_again(simulate, mirror):
    mirror.connecting = refuse(ConnectError("certificate", retryable=False))
    simulation = simulate(mirror, limit=1)
    errors = simulation.statuses("HEAD", urls(10))
    assert ["certificate" in str(error) for error in errors] == [True] * 10
    assert mirror.attempts == 1
    assert simulation.counters(URL).retries == 0


def test_other_routes_are_used_when_one_fails(simulate, mirror):
    """A recipe may have certificates of its own, which are wrong."""
    mirror.connecting = not_by_proxy
    simulation = simulate(mirror)
    pool = simulation.pool
    usual, = simulation.ask("HEAD", [URL])
    simulation.settle()
    for i in range(3):
        odd, = simulation.ask("HEAD", [URL + "odd"], PROXY)
        simulation.settle()
        assert "not by proxy" in str(odd.error())
        assert not pool.is_healthy(odd.request.origin, odd.request.route)
        assert pool.is_healthy(usual.request.origin, usual.request.route)
        assert simulation.statuses("HEAD", urls(20, 20 * i)) == [200] * 20
    assert mirror.peak <= 4


def test_only_the_requests_of_a_route_that_fails(simulate, mirror):
    mirror.connecting = not_by_proxy
    simulation = simulate(mirror, limit=1)
    asked = [Asked("HEAD", url, PROXY if i % 3 == 1 else {}) for i, url in enumerate(urls(30))]
    simulation.submit(*asked)
    simulation.settle()
    assert [i for i, one in enumerate(asked) if one.wait()[1]] == list(range(1, 30, 3))


def test_route_that_has_failed_is_tried_again(simulate, mirror):
    mirror.connecting = refuse(ConnectError("certificate", retryable=False))
    simulation = simulate(mirror)
    failed, = simulation.ask("HEAD", [URL])
    simulation.settle()
    assert failed.error()
    late, = simulation.ask("HEAD", [URL])
    assert late.answered, "it fails at once"
    simulation.advance(SUSPENSION)
    assert not simulation.pool.is_healthy(failed.request.origin, failed.request.route)
    mirror.connecting = lambda route: None
    assert simulation.statuses("HEAD", [URL]) == [200]
    assert simulation.pool.is_healthy(failed.request.origin, failed.request.route)


def test_one_connection_more_that_is_rejected_for_good(simulate, mirror):
    """A proxy, or an sshd, may allow only so many: those that work do, and nothing fails."""
    def connecting(route):
        if mirror.made == 2:
            raise ConnectError("no more", retryable=False)
    mirror.connecting = connecting
    simulation = simulate(mirror)
    assert simulation.statuses("HEAD", urls(200)) == [200] * 200
    assert mirror.peak == 2
    assert mirror.attempts <= 6, "it is not tried again and again"


def test_too_many_hosts(simulate, deep):
    """That is no trouble of the last one, whose files a query would treat as missing then."""
    simulation = simulate(deep, limit=1)
    hosts = ["http://host%s.example/" % i for i in range(200)]
    deep.latency = 1
    outcomes = simulation.statuses("HEAD", hosts)
    assert deep.peak == MAX_ALL
    assert outcomes.count(200) == MAX_ALL
    assert {error.kind for error in outcomes if error != 200} == {"connect"}
    assert [host.health.suspension_reason for host in simulation.pool.hosts.values()] == [None] * 200


def test_host_beside_a_busy_one(simulate, mirror):
    """All connections are those of another host: there is one more for this one, and nothing counts as missing."""
    simulation = simulate(mirror, limit=MAX_CONNECTIONS)
    outcomes = simulation.statuses("HEAD", ["http://busy.example/%s" % i for i in range(5 * MAX_CONNECTIONS)] + ["http://other.example/x"])
    assert mirror.peak == MAX_CONNECTIONS + 1
    assert outcomes == [200] * (5 * MAX_CONNECTIONS + 1)


def test_places_of_closed_connections_are_free_again(simulate, deep):
    simulation = simulate(deep, limit=1)
    assert simulation.statuses("HEAD", ["http://host%s.example/" % i for i in range(MAX_CONNECTIONS)]) == [200] * MAX_CONNECTIONS
    simulation.advance(IDLE + 1)
    assert deep.open == 0
    assert simulation.statuses("HEAD", ["http://other%s.example/" % i for i in range(MAX_CONNECTIONS)]) == [200] * MAX_CONNECTIONS


# Logins

def test_login_that_cannot_succeed_is_not_repeated(simulate, sessions):
    """sshd counts those"""
    sessions.connecting = refuse(ConnectError("permission denied", retryable=False))
    simulation = simulate(sessions)
    errors = simulation.statuses("GET", urls(20))
    assert ["permission denied" in str(error) for error in errors] == [True] * 20
    assert sessions.attempts == 1


def test_logins_one_after_the_other(simulate, sessions):
    inside = []

    class OneAtATime:
        def __call__(self, route):
            inside.append(sessions.made)
    sessions.connecting = OneAtATime()
    sessions.latency = 5
    simulation = simulate(sessions)
    asked = simulation.ask("GET", urls(100))
    for number in range(1, 5):
        simulation.until(lambda: sessions.made == number, "one more session")
        assert sessions.attempts <= number + 1
    simulation.settle()
    assert [one.status() for one in asked] == [200] * 100
    assert inside == [0, 1, 2, 3]


@pytest.mark.parametrize("number, latency, logins", [(100, 0.02, 1), (1200, 0.02, 1), (3000, 0.02, 2), (600, 0.5, 4)])
def test_logins_that_pay(simulate, sessions, number, latency, logins):
    """For so many questions, 64 of which are answered after so many seconds: a login of 0.4 s has to be done before."""
    sessions.latency = latency
    simulation = simulate(sessions)
    # As long as nothing is known it is estimated from the login
    assert simulation.statuses("HEAD", [URL + "first"]) == [200]
    assert simulation.statuses("HEAD", urls(number)) == [200] * number
    assert sessions.made == logins


def test_one_login_for_a_few_questions(simulate, sessions):
    sessions.login = 1
    simulation = simulate(sessions)
    assert simulation.statuses("HEAD", urls(200)) == [200] * 200
    assert sessions.attempts == 1


@pytest.mark.parametrize("method, logins", [("GET", 2), ("HEAD", 1)])
def test_login_while_the_session_is_busy_with_a_file(simulate, sessions, method, logins):
    """Of the file nothing is known: questions beyond what fits behind it do not wait for its end. Behind others they do."""
    sessions.answer = lambda request: NEVER
    simulation = simulate(sessions)
    simulation.ask(method, [URL + "large"])
    simulation.until(lambda: sessions.urls, "it is sent")
    simulation.ask("HEAD", urls(3))
    simulation.until(lambda: len(sessions.urls) == 4, "they are sent behind it")
    simulation.ask("HEAD", urls(100, 10))
    simulation.advance(10)
    assert sessions.made == logins


# Idle connections

@pytest.mark.parametrize("kind", ["plain", "sessions"])
def test_idle_connections_are_closed_and_opened_again(simulate, mirror, sessions, kind):
    there = mirror if kind == "plain" else sessions
    simulation = simulate(there)
    for made in (1, 2):
        assert simulation.statuses("HEAD", [URL + str(made)]) == [200]
        assert (there.made, there.open) == (made, 1)
        simulation.advance(IDLE - 1)
        assert there.open == 1
        simulation.advance(2)
        assert there.open == 0


def test_connection_that_was_never_used_is_closed_soon(simulate, mirror):
    """Servers have less patience with those."""
    simulation = simulate(mirror)
    simulation.ask("HEAD", [URL + "1"])
    simulation.until(lambda: mirror.urls, "the first is sent")
    mirror.login = 1
    simulation.ask("HEAD", [URL + "2"])
    simulation.settle()
    assert mirror.made == 1, "the first connection was ready before"
    simulation.until(lambda: mirror.made == 2, "there is another one")
    simulation.advance(UNUSED - 1)
    assert mirror.open == 2
    simulation.advance(2)
    assert mirror.open == 1


# Cancelled, stopped

def test_cancelled_request_is_not_sent(simulate, mirror):
    simulation = simulate(mirror, limit=1)
    first, second, third = simulation.ask("HEAD", urls(3))
    simulation.until(lambda: mirror.urls, "the first is sent")
    second.request.cancelled = True
    simulation.settle()
    assert first.status() == third.status() == 200
    assert isinstance(second.error(), Cancelled)
    assert mirror.urls == [URL + "0", URL + "2"]


def test_cancelled_request_is_not_retried(simulate, mirror):
    def answer(request):
        one.request.cancelled = True
        return ProtocolError("broken")
    mirror.answer = answer
    simulation = simulate(mirror)
    one, = simulation.ask("HEAD", [URL])
    simulation.settle()
    assert isinstance(one.error(), Cancelled)
    assert mirror.urls == [URL]


@pytest.mark.parametrize("state", ["queued", "connecting", "in flight", "paused", "trial"])
def test_stop_answers_each_once(simulate, mirror, state):
    if state == "connecting":
        mirror.login = 1000
    if state == "in flight":
        mirror.answer = lambda request: NEVER
    if state == "paused":
        mirror.answer = lambda request: REFUSED
    if state == "trial":
        mirror.kind.version = (1, 1)
        mirror.answer = lambda request: NEVER if request.url != URL + "0" else FOUND
    simulation = simulate(mirror, limit=2)
    asked = simulation.ask("HEAD", urls(20))
    if state != "queued":
        simulation.advance(0.1)
    answered = [one.answered for one in asked].count(True)
    simulation.pool.stop()
    assert [len(one.calls) for one in asked] == [1] * 20
    assert [isinstance(one.wait()[1], Cancelled) for one in asked].count(True) == 20 - answered
    assert answered == (1 if state == "trial" else 0)
    assert mirror.open == 0
    late, = simulation.ask("HEAD", [URL + "late"])
    assert late.answered and isinstance(late.error(), Cancelled)
    # What was being opened does not stay open
    simulation.advance(2000)
    assert mirror.open == 0


def test_stop_in_the_moment_of_connecting(simulate, mirror):
    """The connection is ready, but the host has not got it yet."""
    mirror.connecting = lambda route: simulation.loop.call_soon(simulation.pool.stop)
    simulation = simulate(mirror, limit=1)
    assert isinstance(simulation.statuses("HEAD", [URL])[0], Cancelled)
    simulation.advance(1)
    assert (mirror.made, mirror.open) == (1, 0)


# What has been answered is not asked again

def test_nothing_is_asked_twice(simulate, mirror):
    simulation = simulate(mirror)
    assert simulation.statuses("HEAD", [URL]) == [200]
    again, = simulation.ask("HEAD", [URL])
    assert again.answered and again.status() == 200
    assert mirror.urls == [URL]


@pytest.mark.parametrize("status", [404, 410, 401, 403, 405])
def test_missing_is_remembered(simulate, mirror, status):
    mirror.answer = lambda request: Response(status, {}, 0)
    simulation = simulate(mirror)
    assert simulation.statuses("HEAD", [URL]) == [status]
    asked = len(mirror.urls)
    assert simulation.statuses("HEAD", [URL]) == [404]
    assert simulation.statuses("GET", [URL]) == [404]
    assert len(mirror.urls) == asked


@pytest.mark.parametrize("status, found", [(404, True), (410, True), (401, False), (403, False)])
def test_missing_as_answer_to_get(simulate, mirror, status, found):
    """A GET that is not allowed says nothing about the HEAD."""
    mirror.answer = lambda request: Response(status, {}, 0)
    simulation = simulate(mirror)
    assert simulation.statuses("GET", [URL]) == [status]
    asked = len(mirror.urls)
    simulation.statuses("HEAD", [URL])
    assert (len(mirror.urls) == asked) is found


def test_errors_and_other_statuses_are_not_remembered(simulate, mirror):
    error = Response(500, {}, 0)
    # Of two attempts each: the answer, a probe in the first one, the sample, a probe
    mirror.answer = in_turn(FOUND, error, FOUND, error, FOUND, error, error, FOUND, StatusError("strange", 200), FOUND)
    simulation = simulate(mirror, limit=1)
    assert simulation.statuses("HEAD", [URL + "known"]) == [200]
    assert simulation.statuses("HEAD", [URL]) == [500]
    assert isinstance(simulation.statuses("HEAD", [URL])[0], StatusError)
    assert simulation.statuses("HEAD", [URL]) == [200]


def test_fresh_questions_are_asked_although_the_answer_is_known(simulate, mirror):
    """A task fetches the file right after: it may be gone since the query."""
    simulation = simulate(mirror)
    assert simulation.statuses("HEAD", [URL]) == [200]
    mirror.answer = lambda request: Response(404, {}, 0)
    fresh = Asked("HEAD", URL)
    fresh.request.fresh = True
    simulation.submit(fresh)
    simulation.settle()
    assert fresh.status() == 404
    assert simulation.statuses("HEAD", [URL]) == [404]
    assert len(mirror.urls) == 2


def test_authorization_and_route_are_told_apart(simulate, mirror):
    simulation = simulate(mirror)
    assert simulation.statuses("HEAD", [URL]) == [200]
    assert simulation.statuses("HEAD", [URL], authorization="Basic eA==") == [200]
    assert simulation.statuses("HEAD", [URL], PROXY) == [200]
    assert mirror.urls == [URL] * 3


def test_size_is_known_to_the_get(simulate, mirror):
    mirror.answer = lambda request: Response(200, {"etag": '"1"'}, 12345)
    simulation = simulate(mirror)
    (response, _), = simulation.answers("HEAD", [URL])
    one, = simulation.ask("GET", [URL])
    simulation.settle()
    assert (one.request.size, one.request.validators) == (12345, response.validators)
    assert (simulation.counters(URL).files, simulation.counters(URL).bytes) == (1, 12345)


def test_redirected_answer_is_remembered_for_what_was_asked(simulate, mirror):
    mirror.answer = lambda request: FOUND if "other" in request.url else Response(302, {"location": "http://other.example/"}, 0)
    simulation = simulate(mirror)
    assert simulation.statuses("HEAD", [URL]) == [200]
    assert simulation.statuses("HEAD", [URL]) == [200]
    assert mirror.urls == [URL, "http://other.example/"]


def test_found_is_asked_again_of_a_host_that_fails(simulate, mirror):
    """To answer that there is a file would be of no use if it cannot be fetched."""
    simulation = simulate(mirror)
    assert simulation.statuses("HEAD", [URL]) == [200]
    simulation.advance(IDLE + 1)
    mirror.connecting = refuse(ConnectError("nobody there"))
    assert isinstance(simulation.statuses("HEAD", [URL + "2"])[0], ConnectError)
    assert isinstance(simulation.statuses("HEAD", [URL])[0], ConnectError)


def test_busy_seconds(simulate, mirror):
    mirror.latency = 4
    simulation = simulate(mirror)
    for _ in range(2):
        simulation.statuses("GET", urls(4))
        simulation.advance(1000)
    assert 8 <= simulation.pool.busy_seconds() < 9


@pytest.mark.parametrize("first", [False, True])
def test_files_that_reset_the_connection(simulate, mirror, first):
    """Each costs itself a few attempts, whether somebody waits for it or not."""
    bad = urls(40)[::8]
    mirror.answer = lambda request: Disconnected("reset") if request.url in bad else FOUND
    simulation = simulate(mirror)
    asked = [Asked("HEAD", url) for url in urls(40)]
    for one in asked:
        one.request.first = first
    simulation.submit(*asked)
    simulation.settle()
    assert [one.request.url for one in asked if one.wait()[1]] == bad
    assert mirror.made < 100
    assert simulation.loop.time() < 2 * UNWILLING
