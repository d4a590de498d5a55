#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
When a host may be asked, over how many connections, and how many requests may
be in flight on each.

Used by host.py, which reports events and acts on the decisions. There is no
input or output, and no clock, in here: events come with the loop's time.

    health = Health("mirror.example", 4, 8)
    health.failed(error, sent, now)     # refused, silent, not connected
    health.answered(12, now)
    health.paused_until, health.suspended(route, now), health.limit, health.depth

A failure pauses the host, the longer the more there are in a row, and a host
that refuses is asked over fewer connections and at a lower rate; both rise
again with its answers. A host that goes on failing is suspended: all its
requests fail, and after some time the next one is a probe. How long it may fail
before depends on what it does, and whether it has answered anything in this
build. Where trying again would not help, as with a certificate that is not
trusted, only the requests of the same route are suspended, at once.
"""

import random

from bb.connections import ConnectError, RefusedError
from bb.connections.pace import Pace

# Seconds: the first pause, and the longest, unless the host asks for more by Retry-After
PAUSE = 0.5
MAX_PAUSE = 5
# Seconds of failures until a host is suspended: one that refuses connections or whose name is unknown, over ssh (an
# sshd that restarts is common, and sftp tries again and again, too); one that is silent, or refuses with a status; one
# that has answered before in this build, as it may be restarting, which takes up to a minute
UNREACHABLE = 3
UNREACHABLE_SSH = 20
UNWILLING = 15
AWAY = 65
# Seconds for which a host or a route is suspended, and the longest if it asks for more
SUSPENSION = 30
MAX_SUSPENSION = 600
# Answers after which one more connection is allowed; doubled by each refusal
RISE_AFTER = 32
LATEST_RISE = 512
# Requests in flight on one connection at most
MAX_DEPTH = 64


class Health:
    """
    most is the largest number of connections, depth the number of requests in
    flight on each to begin with, login whether each connection needs one.

    answers         how many answers the host has given so far
    answered_at     the time of the last
    paused_until    nothing may be sent before that time
    retry_after     seconds that the host asks to wait, if that is why it is paused, or None
    limit, depth    connections, and requests in flight on each, that are allowed now
    pace            a Pace
    trouble         why the host, or a route to it, has been suspended in this build, or None
    """

    def __init__(self, host, most, depth, login=False):
        self.answers = 0
        self.answered_at = self.paused_until = 0
        self.retry_after = None
        self.limit = self.most = most
        self.depth = depth
        self.pace = Pace()
        self.trouble = None
        self._host = host
        self._login = login
        self._rise_after = self._rising = RISE_AFTER
        # Failures in a row, and the times of the first and the last of them
        self._failures = 0
        self._failing_since = self._failed_at = 0
        # {route, or None for the host: (until when, error for all requests)}, until it has been used successfully
        self._suspended = {}

    def is_healthy(self, route):
        """Whether the last event by that route was an answer, or there was none"""
        return not self._failures and route not in self._suspended

    def is_new(self, started):
        """Whether a failure of what began at started is not part of the last one"""
        return started >= self._failed_at

    def suspended(self, route, now):
        """The error for requests of route that are submitted now, or None"""
        for key in (None, route):
            until, error = self._suspended.get(key, (0, None))
            if now < until:
                return error
        return None

    def answered(self, count, now):
        """count answers that were no refusals"""
        self._failures = 0
        self.retry_after = None
        self._suspended.pop(None, None)
        self.answers += count
        self.answered_at = now
        self.pace.answered(count)
        self._rising -= count
        if self._rising <= 0:
            self._rising = self._rise_after
            self.limit = min(self.limit + 1, self.most)

    def ran_dry(self):
        """
        All requests of a connection were answered before further ones were sent: there should be more of them. If each
        answer takes its time that does not happen, and depth would not help but only further connections.
        """
        self.depth = min(self.depth * 2, MAX_DEPTH)

    def connected(self, route):
        self._suspended.pop(route, None)

    def failed(self, error, started, now):
        """
        The host has failed by a RefusedError, TimedOutError or ConnectError of what began at started. Returns the error
        for all requests if it is suspended now, else None.
        """
        paced = self.pace.rate is not None
        if not self._failures:
            self._failing_since = started
        # What was under way at the last failure is part of the same failure
        if self.is_new(started):
            self._failed_at = now
            self._failures += 1
            if isinstance(error, RefusedError):
                self.at_limit(self.limit // 2, again=self._failures > 1)
                self.pace.refused(started, now, start=True)
        wanted = getattr(error, "retry_after", None) or 0
        end = self._failing_since + self._patience(error)
        if now >= end or now + wanted > end:
            self.limit = 1
            return self.suspend(None, error, now, max(SUSPENSION, min(wanted, MAX_SUSPENSION)))
        if paced and isinstance(error, RefusedError) and self._failures == 1 and not wanted:
            # The lower rate is enough
            return None
        pause = min(PAUSE * 2 ** min(self._failures - 1, 10), MAX_PAUSE) * random.uniform(0.5, 1)
        # The last attempt is at the end
        self.pause(min(now + max(pause, wanted), end))
        self.retry_after = wanted or self.retry_after
        return None

    def allow(self, most):
        """There may be so many connections"""
        if most > self.most:
            self.limit = most
        self.most = most
        self.limit = min(self.limit, most)

    def pause(self, until):
        self.paused_until = max(self.paused_until, until)

    def _patience(self, error):
        if self.answers:
            return AWAY
        if isinstance(error, ConnectError):
            return UNREACHABLE_SSH if self._login else UNREACHABLE
        return UNWILLING

    def suspend(self, route, error, now, seconds=SUSPENSION):
        """Suspend route, to which trying again would not help, or the host. Returns the error for its requests."""
        self.trouble = str(error)
        text = "%s is suspended for %d seconds: %s" % (self._host, seconds, error)
        error = RefusedError(text) if isinstance(error, RefusedError) else ConnectError(text, retryable=False)
        self._suspended[route] = now + seconds, error
        if route is None:
            self.pause(now + seconds)
        return error

    def at_limit(self, connections, again=False):
        """Limit the connections for now. again: the limit has not been raised since the last call"""
        self.limit = max(1, connections)
        if not again:
            self._rise_after = min(2 * self._rise_after, LATEST_RISE)
        self._rising = self._rise_after
