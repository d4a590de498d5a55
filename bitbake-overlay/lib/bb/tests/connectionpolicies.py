#
# BitBake tests for the shared connections: when, how fast and over how many connections a host is queried
#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

import types
import unittest

from bb.connections import ConnectError, Disconnected, RefusedError, TimedOutError, health
from bb.connections.growth import Growth
from bb.connections.health import Health
from bb.connections.pipelining import PROVEN_AFTER, STRIKES, Load, Pipelining
from bb.connections.ratelimit import RateLimit


class HealthTest(unittest.TestCase):
    def setUp(self):
        self.health = Health("mirror.example", 4)

    def suspend(self, error, now=0):
        """Fail as soon as it may be tried again, until the host is suspended. Returns (error for all requests, time)."""
        while True:
            now = max(now, self.health.paused_until)
            suspended = self.health.failed(error, now, now)
            if suspended:
                return suspended, now

    def test_suspended_after_a_bounded_time(self):
        for error, seconds in ((ConnectError("no route"), health.UNREACHABLE), (RefusedError("503"), health.UNWILLING),
                               (TimedOutError("silent"), health.UNWILLING)):
            with self.subTest(error=error):
                self.setUp()
                suspended, end = self.suspend(error)
                self.assertEqual(end, seconds)
                self.assertIs(self.health.suspended("route", end), suspended)
                self.assertIsNone(self.health.suspended("route", end + health.SUSPENSION))

    def test_host_that_has_answered_may_be_restarting(self):
        self.health.answered(1, 0)
        self.assertEqual(self.suspend(ConnectError("no route"), 100)[1], 100 + health.AWAY)

    def test_pauses_double(self):
        self.health.answered(1, 0)
        now = 0
        for number in range(8):
            self.assertIsNone(self.health.failed(TimedOutError("silent"), now, now))
            longest = min(health.PAUSE * 2 ** number, health.MAX_PAUSE)
            self.assertTrue(longest / 2 <= self.health.paused_until - now <= longest)
            now = self.health.paused_until

    def test_retry_after(self):
        self.assertIsNone(self.health.failed(RefusedError("503", 7), 0, 0))
        self.assertEqual((self.health.paused_until, self.health.retry_after), (7, 7))
        self.health.answered(1, 7)
        self.assertIsNone(self.health.retry_after)
        # A longer one than the host is waited for suspends it at once
        self.assertIsInstance(self.health.failed(RefusedError("503", 600), 10, 10), RefusedError)
        self.assertIsNotNone(self.health.suspended(None, 609))

    def test_fewer_connections_after_a_refusal(self):
        self.health.failed(RefusedError("503"), 0, 0)
        self.assertEqual(self.health.limit, 2)
        for _ in range(4):
            self.health.answered(health.RISE_AFTER, 1)
        self.assertGreater(self.health.limit, 2)


class RateLimitTest(unittest.TestCase):
    """A server that permits a fixed number of requests per second"""

    def test_rate_is_learned(self):
        for permitted in (10, 20, 100):
            with self.subTest(permitted=permitted):
                limit, now, taken, refusals = RateLimit(), 0, 0, 0
                earliest = 0
                while now < 30:
                    number = limit.allowance(now)
                    for _ in range(4 if number is None else number):
                        limit.sent(1, now)
                        if now >= earliest:
                            earliest = now + 1 / permitted
                            taken += 1
                            limit.answered(1)
                        else:
                            refusals += now > 1
                            limit.refused(now, now + 0.001, start=True)
                    now += 0.002
                self.assertGreater(taken, 0.6 * 30 * permitted)
                self.assertLess(refusals, taken / 10)

    def test_limit_ends_with_answers(self):
        limit = RateLimit()
        limit.refused(0, 0, start=True)
        for _ in range(500):
            limit.answered(10)
        self.assertIsNone(limit.allowance(1))

    def test_refusals_that_do_not_depend_on_the_rate(self):
        limit = RateLimit()
        for number in range(100):
            limit.refused(number, number, start=True)
            limit.answered(3)
        self.assertTrue(limit.is_ineffective)
        self.assertIsNone(limit.rate)


class GrowthTest(unittest.TestCase):
    def most(self, answers_per_second, waiting=10000):
        """Returns the largest and the last limit in a minute, if so many answers come over so many connections"""
        growth, answers, limits = Growth(4, 16), 0, [4]
        for now in range(60):
            answers += answers_per_second(limits[-1])
            limits.append(growth.update(now, limits[-1], 8, 1000 * answers, answers, waiting))
        return max(limits), limits[-1]

    def test_server_that_takes_time_for_each_answer(self):
        self.assertEqual(self.most(lambda size: 2 * size), (16, 16))

    def test_limit_of_all_connections_together(self):
        self.assertEqual(self.most(lambda size: 10), (8, 4))

    def test_fast_server(self):
        self.assertEqual(self.most(lambda size: 1000 * size), (4, 4))

    def test_few_requests(self):
        self.assertEqual(self.most(lambda size: 2 * size, waiting=8), (4, 4))

    def test_not_after_a_refusal(self):
        growth = Growth(4, 16)
        growth.restrict()
        self.assertEqual([growth.update(now, 4, 8, 0, 8 * now, 10000) for now in range(20)], [4] * 20)


class PipeliningTest(unittest.TestCase):
    def setUp(self):
        self.pipelining = Pipelining(needs_trial=True)

    def connection(self, served=0, in_flight=()):
        return types.SimpleNamespace(served=served, in_flight=in_flight, close_announced=True, is_open=True)

    def test_one_request_before_the_trial(self):
        self.assertEqual(self.pipelining.room(self.connection()), 1)
        self.pipelining.finish("works")
        self.assertEqual(self.pipelining.room(self.connection(in_flight=(1, 2))), 6)

    def test_more_requests_are_tried_on_one_connection(self):
        self.pipelining.finish("works")
        connection, other = self.connection(served=9), self.connection(served=9)
        self.pipelining.answered(connection, 8, None, 100)
        self.assertEqual((self.pipelining.room(connection), self.pipelining.room(other)), (16, 8))
        connection.in_flight, connection.served = (1,), 24
        self.assertEqual(self.pipelining.room(connection), 0)
        connection.in_flight, connection.served = (), 25
        self.pipelining.answered(connection, 1, None, 100)
        self.assertEqual(self.pipelining.room(other), 16)

    def test_more_requests_that_fail(self):
        self.pipelining.finish("works")
        for _ in range(STRIKES):
            connection = self.connection()
            self.pipelining.answered(connection, 8, None, 100)
            self.assertEqual(self.pipelining.room(connection), 16)
            connection.in_flight = (1, 2)
            self.pipelining.ended(connection, TimedOutError("silent"))
        connection.in_flight = ()
        self.pipelining.answered(connection, 8, None, 100)
        self.assertEqual(self.pipelining.room(connection), 8)

    def test_broken_connections(self):
        self.pipelining.finish("works")
        for _ in range(STRIKES):
            # Each of them has proved itself before
            self.pipelining.broken(self.connection(served=PROVEN_AFTER))
        self.assertTrue(self.pipelining.works)
        # The next one begins with one request
        self.assertEqual(self.pipelining.room(self.connection()), 1)
        self.pipelining.broken(self.connection(served=2))
        self.assertFalse(self.pipelining.works)

    def test_connection_after_a_broken_one(self):
        self.pipelining.finish("works")
        self.pipelining.broken(self.connection(served=20))
        # Other connections continue
        self.assertEqual(self.pipelining.room(self.connection(served=5)), 8)
        connection = self.connection()
        self.assertEqual(self.pipelining.room(connection), 1)
        connection.served = 1
        self.pipelining.answered(connection, 1, None, 0)
        self.assertEqual(self.pipelining.room(self.connection()), 8)

    def test_idle_connection_that_ends_is_no_failure(self):
        self.pipelining.finish("works")
        for _ in range(2 * STRIKES):
            connection = self.connection()
            self.pipelining.answered(connection, 8, None, 100)
            self.assertEqual(self.pipelining.room(connection), 16)
            self.pipelining.ended(connection, Disconnected("closed by the server"))

    def test_number_of_requests_per_connection(self):
        self.pipelining.finish("works")
        self.pipelining.closed(self.connection(served=100))
        self.assertEqual(self.pipelining.room(self.connection(served=98)), 2)

    def request(self, size=None, validators=None, fd=None, exclusive=False):
        identity = None if size is None else (size, validators)
        return types.SimpleNamespace(identity=identity, validators=validators, fd=fd, exclusive=exclusive, first=False,
                                     body_size=lambda: size or 0)

    def test_files_that_look_alike(self):
        file = self.request(5, 1, fd=3)
        for needs_trial in (True, False):
            load = Load([file], needs_trial)
            self.assertEqual(load.admits(self.request(5, 1, fd=4), lambda: True), not needs_trial)
            self.assertTrue(load.admits(self.request(5, 2, fd=4), lambda: True))
            self.assertFalse(load.admits(self.request(exclusive=True), lambda: True))
            self.assertTrue(Load([], needs_trial).admits(self.request(exclusive=True), lambda: True))
