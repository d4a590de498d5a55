#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
Back-off and breaker of a host: when it may be used, and over how many
connections. Used by host.py and failures.py, which report events with the
loop's time; no input or output.

    health = Health("mirror.example", most=4)
    health.failed(error, sent, now)     # refused, silent, not connected
    health.answered(12, now)
    health.paused_until, health.suspended(route, now), health.limit

Each failure pauses the host, longer with each consecutive one; refusals also
reduce the connections and the rate, which rise again with its answers. A host
that continues to fail for longer than the constants below is suspended (the
breaker opens): its requests fail, until after some time the next one serves as
a probe. If retrying is pointless, as with an untrusted certificate, the
requests of that route are suspended at once.
"""

import random

from bb.connections import ConnectError, RefusedError
from bb.connections.ratelimit import RateLimit

# Seconds of the first pause after a failure, doubled by each consecutive one: enough for a short overload
PAUSE = 0.5
# Seconds of the longest pause, unless Retry-After requests more; bounds the delay after the host has recovered
MAX_PAUSE = 5
# Seconds of failures until a host is suspended that refuses connections or whose name is unknown: unlikely to change soon
UNREACHABLE = 3
# The same in seconds over ssh: restarts of an sshd are common, and sftp retries for longer, too
UNREACHABLE_SSH = 20
# The same in seconds for a host that is silent or refuses with a status: it exists, and may be overloaded
UNWILLING = 15
# The same in seconds for a host that has answered in this build: it may be restarting, which takes up to a minute
AWAY = 65
# Seconds for which a host or a route is suspended: one probe after that costs little
SUSPENSION = 30
# The longest suspension in seconds if Retry-After requests more; a longer one would outlast most builds
MAX_SUSPENSION = 600
# Answers after which one more connection is permitted; doubled by each refusal, so that the limit is tested less often
RISE_AFTER = 32
# The largest number of answers that this grows to, so that all connections can be regained within a build
LATEST_RISE = 512


class Health:
    """
    most is the largest number of connections, login whether they require a
    login.

    answers             number of answers, without refusals, so far
    answered_at         time of the last answer
    paused_until        time before which nothing may be sent
    retry_after         seconds for which the host asks to wait, if it is paused because of that, or None
    limit               number of connections that are permitted now
    rate_limit          a RateLimit
    suspension_reason   text of the last error that suspended the host, or a route to it, in this build, or None
    """

    def __init__(self, host, most, login=False):
        self.answers = 0
        self.answered_at = self.paused_until = 0
        self.retry_after = None
        self.limit = self.most = most
        self.rate_limit = RateLimit()
        self.suspension_reason = None
        self._host = host
        self._login = login
        self._rise_after = self._rising = RISE_AFTER
        # Number of consecutive failures, and the times of the first and the last of them
        self._failures = 0
        self._failing_since = self._failed_at = 0
        # {route, or None for the host: (end of the suspension, error for its requests)}, kept until the next success
        self._suspended = {}

    def is_healthy(self, route):
        """Whether neither the host nor the route has failed since it last succeeded"""
        return not self._failures and route not in self._suspended

    def suspended(self, route, now):
        """Returns the error for requests of route if it or the host is suspended, or None"""
        for key in (None, route):
            until, error = self._suspended.get(key, (0, None))
            if now < until:
                return error
        return None

    def answered(self, count, now):
        """The host has sent count answers that are not refusals"""
        self._failures = 0
        self.retry_after = None
        self._suspended.pop(None, None)
        self.answers += count
        self.answered_at = now
        self.rate_limit.answered(count)
        self._rising -= count
        if self._rising <= 0:
            self._rising = self._rise_after
            self.limit = min(self.limit + 1, self.most)

    def connected(self, route):
        self._suspended.pop(route, None)

    def failed(self, error, started, now):
        """
        Record a failure of the host (RefusedError, TimedOutError or ConnectError) in an attempt that began at the time
        started. Returns the error for all its requests if that suspends it, or None.
        """
        was_limited = self.rate_limit.rate is not None
        if not self._failures:
            self._failing_since = started
        # Requests that were in flight at the last failure are part of the same failure
        if started >= self._failed_at:
            self._failed_at = now
            self._failures += 1
            if isinstance(error, RefusedError):
                self.lower_limit(self.limit // 2, again=self._failures > 1)
                self.rate_limit.refused(started, now, start=True)
        wanted = getattr(error, "retry_after", None) or 0
        end = self._failing_since + self._patience(error)
        if now >= end or now + wanted > end:
            self.limit = 1
            return self.suspend(None, error, now, max(SUSPENSION, min(wanted, MAX_SUSPENSION)))
        if was_limited and isinstance(error, RefusedError) and self._failures == 1 and not wanted:
            # Lowering the rate suffices
            return None
        pause = min(PAUSE * 2 ** min(self._failures - 1, 10), MAX_PAUSE) * random.uniform(0.5, 1)
        # The last attempt is made at the end
        self.pause(min(now + max(pause, wanted), end))
        self.retry_after = wanted or self.retry_after
        return None

    def set_most(self, most):
        """Set the largest number of connections; a larger one than before applies at once"""
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
        """Suspend route, or the host if it is None. Returns the error for its requests."""
        self.suspension_reason = str(error)
        text = "%s is suspended for %d seconds: %s" % (self._host, seconds, error)
        error = RefusedError(text) if isinstance(error, RefusedError) else ConnectError(text, retryable=False)
        self._suspended[route] = now + seconds, error
        if route is None:
            self.pause(now + seconds)
        return error

    def lower_limit(self, connections, again=False):
        """Reduce the limit of connections until it rises with answers. again: it has not risen since the last call."""
        self.limit = max(1, connections)
        if not again:
            self._rise_after = min(2 * self._rise_after, LATEST_RISE)
        self._rising = self._rise_after
