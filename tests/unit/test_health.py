# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""When a host may be asked, over how many connections and how deep: events in, decisions out. Times are just numbers."""

import pytest

from bb.connections import ConnectError, RefusedError, TimedOutError
from bb.connections.health import (MAX_DEPTH, MAX_FAILURES, MAX_PAUSE, MAX_REFUSALS, PATIENCE, PAUSE, RISE_AFTER, SUSPENSION,
                                   Health)

HOST = "mirror.example"
ROUTE = "a route"
OTHER = "another route"

BUSY = RefusedError("busy")
NOBODY = ConnectError("nobody there")
SILENT = TimedOutError("silence")
UNTRUSTED = ConnectError("certificate", retryable=False)


@pytest.fixture
def health():
    return Health(4, 8)


def fail(health, error, times, now=0.0, every=PATIENCE):
    """Fail so many attempts, each of which begins every so many seconds and fails at once. Returns what the last one did."""
    for i in range(times):
        outcome = health.failed(HOST, error, now + i * every, now + i * every)
    return outcome


def test_new_host(health):
    assert (health.limit, health.depth, health.paused_until, health.trouble) == (4, 8, 0, None)
    assert health.is_healthy(ROUTE)
    assert health.suspended(ROUTE, 0) is None


@pytest.mark.parametrize("error", [BUSY, NOBODY, SILENT])
def test_pauses_double(health, error):
    now = 100.0
    for doubled in range(MAX_FAILURES - 1):
        assert health.failed(HOST, error, now, now) is None
        pause = health.paused_until - now
        assert PAUSE * 2 ** doubled / 2 <= pause <= PAUSE * 2 ** doubled
        now = health.paused_until


def test_pauses_differ():
    """So that the builds of one office do not return together."""
    pauses = set()
    for _ in range(20):
        health = Health(4, 8)
        health.failed(HOST, BUSY, 0, 0)
        pauses.add(health.paused_until)
    assert len(pauses) > 1


@pytest.mark.parametrize("asked, least, most", [(7, 7, 7), (0, PAUSE / 2, PAUSE), (None, PAUSE / 2, PAUSE),
                                                (86400, MAX_PAUSE, MAX_PAUSE)])
def test_retry_after(health, asked, least, most):
    assert health.failed(HOST, RefusedError("busy", asked), 0, 0) is None
    assert least <= health.paused_until <= most


def test_a_short_pause_does_not_end_a_longer_one(health):
    health.failed(HOST, RefusedError("busy", 50), 0, 0)
    health.failed(HOST, RefusedError("busy", 1), 0, 1)
    assert health.paused_until == 50


@pytest.mark.parametrize("error", [BUSY, NOBODY, SILENT])
def test_half_of_the_connections_and_of_the_depth(health, error):
    found = []
    for now in range(4):
        health.failed(HOST, error, now, now)
        found.append((health.limit, health.depth))
    assert found == [(2, 4), (1, 2), (1, 1), (1, 1)]


def test_what_was_under_way_is_part_of_the_same_failure(health):
    """Sixty requests in flight that are refused together count once."""
    for _ in range(60):
        assert health.failed(HOST, NOBODY, 0, 5) is None
    assert (health.limit, health.depth) == (2, 4)
    assert health.paused_until <= 5 + PAUSE
    assert not health.is_new(4.9)
    assert health.is_new(5)


def test_both_rise_again_with_answers(health):
    fail(health, BUSY, 3)
    found = []
    for _ in range(5):
        health.answered(RISE_AFTER - 1)
        before = health.limit, health.depth
        health.answered(1)
        found.append((before, (health.limit, health.depth)))
    assert found == [((1, 1), (2, 2)), ((2, 2), (3, 4)), ((3, 4), (4, 8)), ((4, 8), (4, 16)), ((4, 16), (4, 32))]
    assert health.answers == 5 * RISE_AFTER


def test_depth_has_a_limit(health):
    for _ in range(20):
        health.answered(RISE_AFTER)
    assert (health.limit, health.depth) == (4, MAX_DEPTH)


def test_answers_end_a_row_of_failures(health):
    fail(health, NOBODY, MAX_FAILURES - 1)
    assert not health.is_healthy(ROUTE)
    health.answered(1)
    assert health.is_healthy(ROUTE)
    assert fail(health, NOBODY, MAX_FAILURES - 1, now=1000) is None


@pytest.mark.parametrize("error, most", [(BUSY, MAX_REFUSALS), (NOBODY, MAX_FAILURES), (SILENT, MAX_FAILURES)])
def test_suspension(health, error, most):
    assert fail(health, error, most - 1) is None
    assert health.trouble is None
    now = most * PATIENCE
    suspended = health.failed(HOST, error, now, now)
    assert str(suspended) == "%s is suspended for %s seconds: %s" % (HOST, SUSPENSION, error)
    assert isinstance(suspended, RefusedError if error is BUSY else ConnectError)
    assert error is BUSY or not suspended.retryable
    assert health.paused_until == now + SUSPENSION
    assert health.limit == 1
    assert health.trouble == str(error)
    # For all routes
    for route in (ROUTE, OTHER):
        assert health.suspended(route, now + SUSPENSION - 0.1) is suspended
        assert health.suspended(route, now + SUSPENSION) is None


def test_host_that_is_restarted_is_not_suspended(health):
    """However often it fails within PATIENCE seconds."""
    for i in range(3 * MAX_REFUSALS):
        now = i * PATIENCE / (3 * MAX_REFUSALS)
        assert health.failed(HOST, NOBODY, now, now) is None
    assert health.failed(HOST, NOBODY, PATIENCE, PATIENCE)


def test_one_long_failure_is_not_many(health):
    """A time-out takes longer than PATIENCE, but may be that of one file."""
    assert health.failed(HOST, SILENT, 0, 100) is None
    assert health.failed(HOST, SILENT, 100, 200) is None


def test_failed_probe_suspends_again_at_once(health):
    fail(health, NOBODY, MAX_FAILURES)
    now = health.paused_until
    assert health.failed(HOST, NOBODY, now, now)
    assert health.paused_until == now + SUSPENSION


def test_successful_probe_ends_the_suspension(health):
    fail(health, NOBODY, MAX_FAILURES)
    now = health.paused_until
    health.answered(1)
    assert health.is_healthy(ROUTE)
    assert health.limit == 1, "one connection to begin with"
    assert health.failed(HOST, NOBODY, now, now) is None
    assert health.trouble == "nobody there", "it is reported at the end of the build even so"


def test_route_that_cannot_be_used(health):
    error = health.route_failed(HOST, ROUTE, UNTRUSTED, 5)
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
    assert health.trouble == "certificate"


def test_at_limit(health):
    """A proxy, or an sshd, allows only so many connections: answers do not raise the limit above that."""
    health.at_limit(2)
    assert health.limit == 2
    for _ in range(10):
        health.answered(RISE_AFTER)
    assert health.limit == 2
    health.at_limit(0)
    assert health.limit == 1
