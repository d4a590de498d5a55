#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
Limit the requests per second to a host: a token bucket whose rate is learned
from refusals.

Part of health.py; no input or output. There is no limit before the first
refusal. Each refusal lowers the rate, at most to half; answers raise it again,
so that the server's limit is tested from time to time, and a single accidental
refusal has no lasting effect.

    limit = RateLimit()
    limit.refused(sent, now, start=True)
    number = limit.allowance(now)       # requests that may be sent now
    limit.sent(number, now)
    limit.next_at()
"""

import statistics

# Requests per second after the first refusal; halving it a few times reaches common limits
INITIAL_RATE = 64
# Part of the rate that is kept by a refusal if the host has answered all other requests sent at that rate
KEPT_SHARE = 0.8
# Factor by which each answer raises the rate: a tenth in 10 answers, so that a limit refuses about one request in 25
GROWTH = 1.01
# Answers without a refusal after which each answer raises it by one more GROWTH; more than occur between refusals by a limit
STABLE_AFTER = 30
# The lowest rate in requests per second: what is refused even then does not depend on the rate
LOWEST_RATE = 0.75
# Number of refusals until the rate is near the server's limit
SEARCH_REFUSALS = 8
# Number of refusals after those, by which it is judged whether refusals depend on the rate
JUDGED_REFUSALS = 6
# Mean number of answers between them below which they do not: a limit refuses after a growth by a quarter, 22 answers
MIN_MEAN_GAP = 20
# Seconds whose requests may be sent together, since timers are not more precise
BURST_SECONDS = 0.01
# Requests per second above which the limit is removed: more than any server's limit
UNLIMITED = 10000


class RateLimit:
    """
    rate            requests per second, or None if there is no limit
    is_ineffective  refusals have turned out not to depend on the rate, so none is set
    """

    def __init__(self):
        self.rate = None
        self.is_ineffective = False
        # The rates before and after the last refusal
        self._before = self._lowered = 0
        # Number of answers before each refusal
        self._gaps = []
        # Number of answers since the last refusal, and its time
        self._answers = self._since = 0
        # Number of tokens in the bucket at the time _at
        self._tokens = self._at = 0

    def refused(self, sent, now, start=False):
        """
        Lower the rate: a request that was sent at the time sent was refused. start: introduce a limit if there is none.
        Returns whether the rate is lower than before.
        """
        if self.is_ineffective:
            return False
        if self.rate is None and start:
            self.rate = self._lowered = INITIAL_RATE
        elif self.rate is not None and sent >= self._since and self._answers:
            answered = self._answers / max(now - self._since, 1e-3)
            self._before = self.rate
            # At least half: a server that counts per second refuses late, when the rate has exceeded the limit by far
            self.rate = self._lowered = max(self._lowered / 2, min(self.rate * KEPT_SHARE, answered), LOWEST_RATE)
            self._gaps.append(self._answers)
            gaps = self._gaps[SEARCH_REFUSALS:]
            if len(gaps) >= JUDGED_REFUSALS and statistics.mean(gaps) < MIN_MEAN_GAP:
                self.is_ineffective, self.rate = True, None
                return False
        else:
            return False
        self._answers = self._tokens = 0
        self._since = self._at = now
        return True

    def reinstate(self):
        """Let refusals set a rate again"""
        if self.is_ineffective:
            self.is_ineffective = False
            self._gaps.clear()

    def lowered_since(self, sent):
        return sent < self._since

    def restore(self):
        """Undo the last refusal, which was due to its file, if other requests have been answered since"""
        if self.rate is not None and self._answers:
            self.rate = max(self.rate, self._before)

    def answered(self, count):
        self._answers += count
        if self.rate is not None:
            self.rate *= GROWTH ** (count * (1 + self._answers // STABLE_AFTER))
            if self.rate > UNLIMITED:
                self.rate = None

    def _fill(self, now):
        self._tokens = min(self._tokens + (now - self._at) * self.rate, max(1, self.rate * BURST_SECONDS))
        self._at = now

    def allowance(self, now):
        """Number of requests that may be sent now, or None without a limit"""
        if self.rate is None:
            return None
        self._fill(now)
        # Timers may expire early by a rounding error
        return int(self._tokens + 1e-6)

    def sent(self, count, now):
        if self.rate is not None:
            self._fill(now)
            self._tokens -= count

    def next_at(self):
        """Time at which a request may be sent, after allowance() was 0"""
        return self._at + (1 - self._tokens) / self.rate
