# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""When a host may be asked, over how many connections and how deep: events in, decisions out. Times are just numbers."""

import pytest

from bb.connections import ConnectError, RefusedError, TimedOutError
from bb.connections.health import (AWAY, MAX_PAUSE, MAX_SUSPENSION, PAUSE, RISE_AFTER, SUSPENSION, UNREACHABLE,
                                   UNREACHABLE_SSH, UNWILLING, Health)

HOST = "mirror.example"
ROUTE = "a route"
OTHER = "another route"

BUSY = RefusedError("busy")
NOBODY = ConnectError("nobody there")
SILENT = TimedOutError("silence")
UNTRUSTED = ConnectError("certificate", retryable=False)


@pytest.fixture
def health():
    return Health(HOST, 4)


def fail(health, error, times, now=0.0):
    """Fail so many attempts in a row, each of which begins when it may, and fails at once. Returns what the last one did."""
    for _ in range(times):
        now = max(now, health.paused_until)
        outcome = health.failed(error, now, now)
    return outcome


def fail_for_good(health, error, now=0.0):
    """Fail until the host is suspended. Returns (error for all, when that was)."""
    for _ in range(1000):
        now = max(now, health.paused_until)
        outcome = health.failed(error, now, now)
        if outcome:
            return outcome, now
    raise AssertionError("it is never suspended")


def test_new_host(health):
    assert (health.limit, health.paused_until, health.suspension_reason) == (4, 0, None)
    assert health.is_healthy(ROUTE)
    assert health.suspended(ROUTE, 0) is None
    assert health.rate_limit.rate is None


@pytest.mark.parametrize("error", [BUSY, NOBODY, SILENT])
def test_pauses_double(health, error):
    health.answered(1, 0)
    now = 100.0
    for doubled in range(8):
        assert health.failed(error, now, now) is None
        pause = health.paused_until - now
        longest = min(PAUSE * 2 ** doubled, MAX_PAUSE)
        assert longest / 2 <= pause <= longest
        now = health.paused_until


def test_pauses_differ():
    """So that the builds of one office do not return together."""
    pauses = set()
    for _ in range(20):
        health = Health(HOST, 4)
        health.failed(BUSY, 0, 0)
        pauses.add(health.paused_until)
    assert len(pauses) > 1


@pytest.mark.parametrize("asked, least, most", [(7, 7, 7), (0, PAUSE / 2, PAUSE), (None, PAUSE / 2, PAUSE),
                                                (UNWILLING, UNWILLING, UNWILLING)])
def test_retry_after(health, asked, least, most):
    assert health.failed(RefusedError("busy", asked), 0, 0) is None
    assert least <= health.paused_until <= most
    assert health.retry_after == (asked or None)
    health.answered(1, 20)
    assert health.retry_after is None


@pytest.mark.parametrize("answers, asked, seconds", [
    (0, UNWILLING + 1, SUSPENSION), (0, 100, 100), (0, 86400, MAX_SUSPENSION), (5, AWAY + 1, AWAY + 1),
])
def test_retry_after_beyond_all_patience(health, answers, asked, seconds):
    """The host is suspended at once, as it wants."""
    health.answered(answers, 0)
    error = health.failed(RefusedError("busy", asked), 10, 10)
    assert "suspended for %d seconds" % seconds in str(error)
    assert health.paused_until == 10 + seconds


def test_a_short_pause_does_not_end_a_longer_one(health):
    health.failed(RefusedError("busy", 10), 0, 0)
    health.failed(RefusedError("busy", 1), 0, 1)
    assert health.paused_until == 10


def test_half_of_the_connections_after_refusals(health):
    """Other failures say nothing about their number."""
    found = []
    for now in range(4):
        health.failed(BUSY, now, now)
        found.append(health.limit)
    assert found == [2, 1, 1, 1]
    for error in (NOBODY, SILENT):
        health = Health(HOST, 4)
        fail(health, error, 3)
        assert (health.limit, health.rate_limit.rate) == (4, None)


def test_what_was_under_way_is_part_of_the_same_failure(health):
    """Sixty requests in flight that are refused together count once."""
    for _ in range(60):
        assert health.failed(BUSY, 0, 5) is None
    assert health.limit == 2
    assert health.paused_until <= 5 + PAUSE


def test_limit_rises_with_answers(health):
    """Each failure later than the first in a row does not double the answers that are needed; the first did."""
    fail(health, BUSY, 3)
    needed = 2 * RISE_AFTER
    found = []
    for i in range(5):
        health.answered(needed - 1, i)
        before = health.limit
        health.answered(1, i)
        found.append((before, health.limit))
    assert found == [(1, 2), (2, 3), (3, 4), (4, 4), (4, 4)]
    assert (health.answers, health.answered_at) == (5 * needed, 4)


def test_refused_again_and_again(health):
    """Each time twice as many answers are needed until the limit is tested again."""
    for needed in (2 * RISE_AFTER, 4 * RISE_AFTER, 8 * RISE_AFTER):
        fail(health, BUSY, 1, now=1000 * needed)
        before = health.limit
        health.answered(needed - 1, 0)
        assert health.limit == before
        health.answered(1, 0)
        assert health.limit == before + 1


@pytest.mark.parametrize("most, limit", [(8, 8), (4, 4), (2, 2)])
def test_number_of_connections_that_is_allowed(health, most, limit):
    health.set_most(most)
    assert (health.most, health.limit) == (most, limit)


def test_answers_end_a_row_of_failures(health):
    health.answered(1, 0)
    fail(health, NOBODY, 5)
    assert not health.is_healthy(ROUTE)
    now = health.paused_until
    health.answered(1, now)
    assert health.is_healthy(ROUTE)
    assert health.failed(NOBODY, now + AWAY, now + AWAY) is None
    assert health.paused_until - now - AWAY <= PAUSE, "the first pause again"


@pytest.mark.parametrize("error, answers, login, patience", [
    (BUSY, 0, False, UNWILLING), (SILENT, 0, False, UNWILLING), (NOBODY, 0, False, UNREACHABLE),
    (BUSY, 0, True, UNWILLING), (SILENT, 0, True, UNWILLING), (NOBODY, 0, True, UNREACHABLE_SSH),
    (BUSY, 1, False, AWAY), (SILENT, 1, False, AWAY), (NOBODY, 1, False, AWAY), (NOBODY, 1, True, AWAY),
])
def test_suspension(error, answers, login, patience):
    health = Health(HOST, 4, login)
    health.answered(answers, 50)
    assert health.suspension_reason is None
    suspended, now = fail_for_good(health, error, 100)
    # The last attempt is at the end
    assert now == 100 + patience
    assert str(suspended) == "%s is suspended for %s seconds: %s" % (HOST, SUSPENSION, error)
    assert isinstance(suspended, RefusedError if error is BUSY else ConnectError)
    assert error is BUSY or not suspended.retryable
    assert health.paused_until == now + SUSPENSION
    assert health.limit == 1
    assert health.suspension_reason == str(error)
    # For all routes
    for route in (ROUTE, OTHER):
        assert health.suspended(route, now + SUSPENSION - 0.1) is suspended
        assert health.suspended(route, now + SUSPENSION) is None
        assert not health.is_healthy(route)


def test_failure_that_lasts_long_itself(health):
    """What counts is since when it fails, not how often."""
    assert health.failed(SILENT, 0, UNWILLING - 1) is None
    assert health.failed(SILENT, UNWILLING - 1, UNWILLING)
    assert Health(HOST, 4).failed(SILENT, 0, UNWILLING)


def test_failed_probe_suspends_again_at_once(health):
    fail_for_good(health, NOBODY)
    now = health.paused_until
    assert health.failed(NOBODY, now, now)
    assert health.paused_until == now + SUSPENSION


def test_successful_probe_ends_the_suspension(health):
    fail_for_good(health, NOBODY)
    now = health.paused_until
    health.answered(1, now)
    assert health.is_healthy(ROUTE)
    assert health.limit == 1, "one connection to begin with"
    assert health.failed(NOBODY, now, now) is None
    assert health.suspension_reason == "nobody there", "it is reported at the end of the build even so"


def test_paced_host_is_not_paused_for_one_refusal(health):
    """The lower rate is enough, unless it asks for a pause, or goes on."""
    health.answered(50, 1)
    health.failed(BUSY, 1, 1)
    assert health.rate_limit.rate is not None
    health.answered(50, 2)
    now, rate = health.paused_until + 2, health.rate_limit.rate
    assert health.failed(BUSY, now, now) is None
    assert health.paused_until < now and health.rate_limit.rate < rate
    health.failed(BUSY, now, now)
    assert health.paused_until > now
    health.answered(50, now + 10)
    health.failed(RefusedError("busy", 5), now + 10, now + 10)
    assert health.paused_until == pytest.approx(now + 15)


def test_route_that_cannot_be_used(health):
    error = health.suspend(ROUTE, UNTRUSTED, 5)
    assert "certificate" in str(error) and not error.retryable
    assert health.suspended(ROUTE, 5 + SUSPENSION - 0.1) is error
    assert health.suspended(OTHER, 5) is None
    assert (health.is_healthy(ROUTE), health.is_healthy(OTHER)) == (False, True)
    assert (health.limit, health.paused_until) == (4, 0), "nothing changes for the others"
    # Afterwards it may be tried again, and is not healthy before it has been
    assert health.suspended(ROUTE, 5 + SUSPENSION) is None
    assert not health.is_healthy(ROUTE)
    health.connected(ROUTE)
    assert health.is_healthy(ROUTE)
    assert health.suspension_reason == "certificate"


def test_at_limit(health):
    """A proxy, or an sshd, allows only so many connections: that is tested again after many answers."""
    health.lower_limit(2)
    assert health.limit == 2
    health.answered(2 * RISE_AFTER - 1, 0)
    assert health.limit == 2
    health.answered(1, 0)
    assert health.limit == 3
    health.lower_limit(0)
    assert health.limit == 1
