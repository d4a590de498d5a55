# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""The rate of requests: learned from a server that takes only so many a second, as nginx with limit_req."""

import pytest

from bb.connections.ratelimit import INITIAL_RATE, KEPT_SHARE, UNLIMITED, RateLimit
from bb.connections.request import Response
from support.mirror import FOUND, Mirror, Simulation

URL = "http://mirror.example/x"


class Bucket:
    """
    What limit_req of nginx does (without delay): excess grows by one with each request that is taken, leaks at rate a
    second, and is never more than burst.
    """

    def __init__(self, rate, burst=0):
        self.rate = rate
        self.burst = burst
        self.taken = []
        self.refused = []
        self._excess = 0
        self._last = None

    def takes(self, now):
        if self._last is not None:
            excess = max(self._excess - (now - self._last) * self.rate + 1, 0)
            if excess > self.burst:
                self.refused.append(now)
                return False
            self._excess = excess
        self._last = now
        self.taken.append(now)
        return True

    def refused_part(self, since):
        """The part of the requests after that time that was refused"""
        refused, taken = ([time for time in times if time >= since] for times in (self.refused, self.taken))
        return len(refused) / max(1, len(refused) + len(taken))




# Events in, decisions out

def test_no_limit_before_the_first_refusal():
    limit = RateLimit()
    limit.sent(1000, 0)
    limit.answered(1000)
    assert (limit.rate, limit.allowance(1)) == (None, None)


def test_refusal_that_may_be_of_one_request_only():
    limit = RateLimit()
    limit.refused(0, 1)
    assert limit.rate is None
    limit.refused(1, 2, start=True)
    assert limit.rate == INITIAL_RATE


def test_what_is_left_of_the_rate():
    """What the host has answered, but not less than half of what there was after the last refusal"""
    most = int(0.7 * INITIAL_RATE)
    for answers, rate in ((INITIAL_RATE, KEPT_SHARE * INITIAL_RATE), (most, most), (3, INITIAL_RATE / 2)):
        limit = RateLimit()
        limit.refused(0, 0, start=True)
        limit.answered(answers)
        before = limit.rate
        limit.refused(0.5, 1)
        assert limit.rate == pytest.approx(max(INITIAL_RATE / 2, min(before * KEPT_SHARE, answers)))


def test_what_was_under_way_is_part_of_the_same_refusal():
    limit = RateLimit()
    limit.refused(0, 1, start=True)
    limit.answered(40)
    limit.refused(0.9, 1.1)
    limit.refused(0.9, 1.1)
    assert limit.rate > INITIAL_RATE


def test_nothing_answered_since():
    """It is paused then, see health.py."""
    limit = RateLimit()
    limit.refused(0, 1, start=True)
    for now in range(2, 10):
        limit.refused(now, now)
    assert limit.rate == INITIAL_RATE


def test_limit_is_forgotten_with_answers():
    limit = RateLimit()
    limit.refused(0, 0, start=True)
    for _ in range(2000):
        limit.answered(1)
    assert limit.rate is None and limit.allowance(0) is None
    assert INITIAL_RATE * 1.01 ** 2000 > UNLIMITED


def test_allowance():
    limit = RateLimit()
    limit.refused(0, 0, start=True)
    assert limit.allowance(0) == 0
    assert limit.next_at() == pytest.approx(1 / INITIAL_RATE)
    assert limit.allowance(limit.next_at()) == 1
    # What was not used is not kept
    assert limit.allowance(1000) == 1
    limit.sent(1, 1000)
    assert limit.allowance(1000) == 0


def test_requests_of_a_second():
    limit = RateLimit()
    limit.refused(0, 0, start=True)
    now, sent = 0.0, 0
    while now < 1:
        number = limit.allowance(now)
        if number:
            limit.sent(number, now)
            sent += number
        now = max(now + 0.001, limit.next_at()) if not limit.allowance(now) else now
    assert INITIAL_RATE - 2 <= sent <= INITIAL_RATE + 1


# Through a host

@pytest.fixture(params=["one at a time", "many"])
def mirror(request):
    """Answers one request at a time on each connection, or many. A pretended one tells files apart by nothing else."""
    mirror = Mirror(needs_trial=request.param == "one at a time")
    mirror.kind.version = (1, 0)
    return mirror


def limited(mirror, bucket, simulation, refused=Response(503, {}, 0)):
    mirror.answer = lambda request: FOUND if bucket.takes(simulation().loop.time()) else refused


@pytest.mark.parametrize("refused", [Response(503, {}, 0), Response(429, {}, 0)], ids=["503", "429"])
@pytest.mark.parametrize("burst", [0, 20])
@pytest.mark.parametrize("rate", [10, 20, 100])
def test_limit_of_a_server(mirror, rate, burst, refused):
    """
    Requests for half a minute: nothing is lost, at least 60 % of the rate is used, and after the first second fewer than
    one request in ten is refused.
    """
    bucket = Bucket(rate, burst)
    with Simulation(mirror) as simulation:
        limited(mirror, bucket, lambda: simulation, refused)
        number = 30 * rate
        assert simulation.statuses("HEAD", [URL + str(i) for i in range(number)]) == [200] * number
        assert simulation.loop.time() < number / rate / 0.6
        assert bucket.refused_part(1) < 0.1
        host, = simulation.pool.hosts.values()
        assert host.health.suspension_reason is None


@pytest.mark.parametrize("rate", [10, 20, 100])
def test_limit_of_a_server_and_few_requests(mirror, rate):
    """As many as a small build has: bounded by the first pause, and by learning the rate"""
    bucket = Bucket(rate)
    with Simulation(mirror) as simulation:
        limited(mirror, bucket, lambda: simulation)
        assert simulation.statuses("HEAD", [URL + str(i) for i in range(40)]) == [200] * 40
        assert simulation.loop.time() < 40 / rate / 0.6 + 2


def test_limit_that_is_lifted(mirror):
    """It is found out by and by, without another refusal."""
    bucket = Bucket(20)
    with Simulation(mirror) as simulation:
        limited(mirror, bucket, lambda: simulation)
        assert simulation.statuses("HEAD", [URL + str(i) for i in range(200)]) == [200] * 200
        begun, mirror.answer = simulation.loop.time(), lambda request: FOUND
        assert simulation.statuses("HEAD", [URL + str(i) for i in range(1000, 3000)]) == [200] * 2000
        # Half of it at the pace that is raised, the rest without any
        assert simulation.loop.time() - begun < 30


def test_limit_that_gets_lower(mirror):
    bucket = Bucket(100)
    with Simulation(mirror) as simulation:
        limited(mirror, bucket, lambda: simulation)
        assert simulation.statuses("HEAD", [URL + str(i) for i in range(1000)]) == [200] * 1000
        bucket.rate, begun = 10, simulation.loop.time()
        assert simulation.statuses("HEAD", [URL + str(i) for i in range(1000, 1300)]) == [200] * 300
        assert simulation.loop.time() - begun < 300 / 10 / 0.6 + 2
        assert bucket.refused_part(begun + 3) < 0.1
