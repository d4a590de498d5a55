#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
When a host may be asked, over how many connections, and how many requests may
be in flight on each.

host.py reports events and acts on the decisions. There is no input or output,
and no clock, in here: events come with the time in seconds of any clock.

    health = Health(4, 8)
    health.failed(error, sent, now)     # refused, timed out, not connected
    health.answered(12)
    health.paused_until, health.suspended(now), health.limit, health.depth

A host that refuses (408, 429, 503, closed without an answer) is asked again
after a pause, over half the connections and with half the depth; both grow
again with its answers. A host that does nothing else, cannot be reached or is
silent is suspended for SUSPENSION seconds; the first request after that is a
probe. Where trying again would not help, as with a certificate that is not
trusted, this applies to the requests of the same route only.
"""

import random

from bb.connections import ConnectError, RefusedError

# Seconds: the first pause, and the longest, also if Retry-After asks for more
PAUSE = 0.5
MAX_PAUSE = 60
# Failures in a row that suspend a host, and refusals if it does refuse; but only after so many seconds of them, since
# a host may be restarting
MAX_FAILURES = 4
MAX_REFUSALS = 8
PATIENCE = 10
# Seconds for which a host or a route is suspended
SUSPENSION = 30
# A request that is refused twice, while so many others are answered in between, is refused for a reason of its own
LONE = 32
# Answers after which one more connection is allowed, and twice the depth
RISE_AFTER = 32
# Requests in flight on one connection at most
MAX_DEPTH = 64


class Statistics:
    """Counters of a host in a build"""

    def __init__(self):
        self.requests = self.connections = self.retries = self.refusals = self.files = self.bytes = 0


class Health:
    """
    most is the largest number of connections, depth the number of requests in
    flight on each to begin with.

    answers         how many answers the host has given so far
    paused_until    nothing may be sent before that time
    limit, depth    connections, and requests in flight on each, that are allowed now
    trouble         why the host, or a route to it, has been suspended in this build, or None
    """

    def __init__(self, most, depth):
        self.answers = 0
        self.paused_until = 0
        self.limit = self._most = most
        self.depth = depth
        self.trouble = None
        # Failures in a row, and the times of the first and the last of them
        self._failures = 0
        self._failing_since = self._failed_at = 0
        # The error for all requests while the host is suspended
        self._suspended = None
        # {route: (until when, error)}, until the route has been used successfully
        self._routes = {}

    def is_healthy(self, route):
        """Whether the last event by that route was an answer, or there was none"""
        return not self._failures and route not in self._routes

    def is_new(self, started):
        """Whether a failure of what began at started is not part of the last one"""
        return started >= self._failed_at

    def suspended(self, route, now):
        """The error for requests of route that are submitted now, or None"""
        if self._suspended and now < self.paused_until:
            return self._suspended
        until, error = self._routes.get(route, (0, None))
        return error if now < until else None

    def answered(self, count):
        """count answers that were no refusals"""
        self._failures = 0
        self._suspended = None
        before, self.answers = self.answers, self.answers + count
        if self.answers // RISE_AFTER > before // RISE_AFTER:
            self.limit = min(self.limit + 1, self._most)
            self.depth = min(self.depth * 2, MAX_DEPTH)

    def connected(self, route):
        self._routes.pop(route, None)

    def failed(self, host, error, started, now):
        """
        A request or an attempt to connect, begun at started, has failed with a RefusedError, TimedOutError or ConnectError.
        Returns the error for all requests if the host is suspended now, else None.
        """
        if not self._failures:
            self._failing_since = now
        # What was under way at the last failure is part of the same failure
        if self.is_new(started):
            self._failed_at = now
            self._failures += 1
            self.limit = max(1, self.limit // 2)
            self.depth = max(1, self.depth // 2)
        pause = min(PAUSE * 2 ** min(self._failures - 1, 10), MAX_PAUSE) * random.uniform(0.5, 1)
        most = MAX_FAILURES
        if isinstance(error, RefusedError):
            most = MAX_REFUSALS
            pause = max(pause, min(error.retry_after or 0, MAX_PAUSE))
        if self._failures >= most and now - self._failing_since >= PATIENCE:
            self.trouble = str(error)
            self._suspended = suspension(host, error)
            self.limit = 1
            pause = SUSPENSION
        self.paused_until = max(self.paused_until, now + pause)
        return self._suspended

    def is_lone(self, request):
        """request has been refused. Whether this says nothing about the host, as with a file that the server cannot read."""
        request.refusals += 1
        others = self.answers - request.answers
        lone = request.refusals > 1 and others >= LONE
        if others and not lone:
            # Keep retrying as long as the host answers others
            request.attempts = 0
        return lone

    def route_failed(self, host, route, error, now):
        """The host cannot be reached by route, and trying again would not help. Returns the error for requests of that route."""
        self.trouble = str(error)
        error = suspension(host, error)
        self._routes[route] = now + SUSPENSION, error
        return error

    def at_limit(self, connections):
        """One connection more than these was rejected for good, while they work"""
        self._most = max(1, connections)
        self.limit = min(self.limit, self._most)


def suspension(host, error):
    """The error for later requests to a host, or by a route, that is suspended because of error"""
    text = "%s is suspended for %s seconds: %s" % (host, SUSPENSION, error)
    return RefusedError(text) if isinstance(error, RefusedError) else ConnectError(text, retryable=False)
