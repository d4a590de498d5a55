# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""Refusals of some files, of some requests, and of all: what is lost, and for how long. With pretended connections in virtual time."""

import random

import pytest

from bb.connections import RefusedError
from bb.connections.failures import REFUSED_ATTEMPTS, UNRECOVERED_ATTEMPTS
from bb.connections.health import AWAY, UNWILLING
from bb.connections.request import Response
from support.mirror import Mirror, Simulation

URL = "http://mirror.example/%d"

MISSING = Response(404, {}, 0)


@pytest.fixture(params=["one at a time", "many"])
def mirror(request):
    """Answers one request at a time on each connection, or passes the trial of pipelining. Every third file exists."""
    mirror = Mirror()
    if request.param == "one at a time":
        mirror.kind.version = (1, 0)
    mirror.answer = right
    return mirror


@pytest.fixture
def simulation(mirror):
    with Simulation(mirror) as made:
        assert made.statuses("HEAD", [URL % 999999]) == [200]
        yield made


def number(url):
    return int(url.rpartition("/")[2])


def right(request):
    return Response(200, {"etag": request.url}, 100) if number(request.url) % 3 == 0 else MISSING


def statuses(simulation, count):
    """{number: status or error}"""
    return dict(enumerate(simulation.statuses("HEAD", [URL % one for one in range(count)])))


def expected(count):
    return {one: 404 if one % 3 else 200 for one in range(count)}


def refuse(status, headers=()):
    return Response(status, dict(headers), 0)


@pytest.mark.parametrize("headers", [{}, {"retry-after": "60"}], ids=["", "Retry-After"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_some_files_are_always_refused(mirror, simulation, share, headers):
    """They cost few requests each, and all together one bounded wait; the others are answered."""
    bad = set(random.Random(1).sample(range(400), int(400 * share)))
    mirror.answer = lambda request: refuse(503, headers) if number(request.url) in bad else right(request)
    found = statuses(simulation, 400)
    assert {one: status for one, status in found.items() if one not in bad} == \
        {one: status for one, status in expected(400).items() if one not in bad}
    assert all(isinstance(found[one], RefusedError) for one in bad)
    assert simulation.loop.time() < UNWILLING
    assert len(mirror.urls) < 400 + (UNRECOVERED_ATTEMPTS + 1) * len(bad) + 100
    assert [host.health.suspension_reason for host in simulation.pool.hosts.values()] == [None]


def test_files_whose_get_is_refused(mirror, simulation):
    """HEAD is answered, so the host is not at fault."""
    there = [URL % one for one in range(0, 400, 3)]
    assert set(simulation.statuses("HEAD", there)) == {200}
    mirror.answer = lambda request: refuse(503) if request.method == "GET" else right(request)
    begun = simulation.loop.time()
    assert all(isinstance(error, RefusedError) for error in simulation.statuses("GET", there))
    assert simulation.loop.time() - begun < UNWILLING
    assert simulation.statuses("HEAD", [URL % 600]) == [200]


@pytest.mark.parametrize("share, status, seconds", [(0.06, 503, 60), (0.33, 503, 120), (0.2, 500, 180), (0.06, 429, 60)])
@pytest.mark.parametrize("seed", range(3))
def test_requests_are_refused_at_random(mirror, simulation, share, status, seconds, seed):
    """Nearly nothing is lost, and it is found out that it does not depend on the number of requests a second."""
    rng = random.Random(seed)
    mirror.answer = lambda request: refuse(status) if rng.random() < share else right(request)
    found, wanted = statuses(simulation, 1500), expected(1500)
    assert sum(found[one] != wanted[one] for one in wanted) <= 15
    assert simulation.loop.time() < seconds
    assert len(mirror.urls) < 1500 * 2


@pytest.mark.parametrize("count", [7, 50, 400])
def test_every_second_request_is_refused(mirror, simulation, count):
    calls = iter(range(1000000))
    mirror.answer = lambda request: right(request) if next(calls) % 2 else refuse(503)
    assert statuses(simulation, count) == expected(count)
    assert simulation.loop.time() < 90
    assert len(mirror.urls) < 5 * count + 30


@pytest.mark.parametrize("status", [403, 429, 500, 503])
@pytest.mark.parametrize("rate, burst", [(1, 0), (10, 0), (20, 5), (100, 0)])
def test_limited_rate(mirror, simulation, status, rate, burst):
    """As nginx's limit_req without delay: nothing is lost, and most of what is allowed is used."""
    if rate == 1 and status in (403, 500):
        pytest.skip("a run of such answers takes too long to be told from files that have them")
    bucket = [0.0, 0.0]

    def answer(request):
        now = simulation.loop.time()
        excess = max(0, bucket[0] - (now - bucket[1]) * rate) + 1
        if excess > burst + 1:
            return refuse(status)
        bucket[:] = excess, now
        return right(request)
    mirror.answer = answer
    assert statuses(simulation, 400) == expected(400)
    assert simulation.loop.time() < 400 / rate / 0.6 + 6


@pytest.mark.parametrize("seconds", [5, 15, 40])
def test_away_after_some_files_were_refused(mirror, simulation, seconds):
    """That refusals were about files so far does not lose what a whole host refuses later."""
    bad = set(range(5, 3000, 20))
    away = [float("inf")]

    def answer(request):
        if 0 <= simulation.loop.time() - away[0] < seconds or number(request.url) in bad:
            return refuse(503)
        return right(request)
    mirror.answer = answer
    found = statuses(simulation, 200)
    away[0] = simulation.loop.time() + 0.05
    found.update(enumerate(simulation.statuses("HEAD", [URL % one for one in range(200, 3000)]), 200))
    wanted = expected(3000)
    assert [one for one in wanted if one not in bad and found[one] != wanted[one]] == []
    assert simulation.loop.time() < AWAY + 240


def test_all_attempts_are_bounded(mirror, simulation):
    """A file is refused that is answered whenever it is asked for as a sample: the number of attempts is the bound."""
    asked = []

    def answer(request):
        if number(request.url) == 3 and request.fd is not None:
            asked.append(simulation.loop.time())
            return refuse(503)
        return right(request)
    assert simulation.statuses("HEAD", [URL % 3]) == [200]
    mirror.answer = answer
    outcome, = simulation.statuses("GET", [URL % 3])
    assert isinstance(outcome, RefusedError)
    assert len(asked) <= REFUSED_ATTEMPTS
    assert simulation.loop.time() < 60
