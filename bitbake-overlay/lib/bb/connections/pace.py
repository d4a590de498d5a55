#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
How many requests a second a host takes: a token bucket whose rate is learned
from refusals.

Used by health.py. There is no limit before the first refusal. Each refusal
lowers the rate, to half at most; answers raise it again, so that the limit of a
server is tested from time to time, and one refusal by mistake is forgotten
soon.

    pace = Pace()
    pace.refused(sent, now, start=True)
    number = pace.allowance(now)        # how many requests may be sent
    pace.sent(number, now)
    pace.next_at()
"""

import statistics

# Requests a second after the first refusal; halving it a few times reaches common limits
START = 64
# Part of the rate that is kept if the host has answered as many requests a second as it was sent
KEPT = 0.8
# Growth of the rate by each answer: a tenth by 10 answers, so that one request in about 25 is refused by a limit
GROWTH = 1.01
# Answers without a refusal after which the rate grows faster by GROWTH; more than there are between refusals near a limit
CALM = 30
# The lowest rate: what is refused even so is not refused because of it
SLOWEST = 0.75
# The search for the limit takes up to SEARCH refusals. Then the rate is near it, and has to grow by a quarter until the next one,
# which takes 22 answers. If between MANY more refusals there were fewer than FEW on average, they do not depend on the rate.
SEARCH, FEW, MANY = 8, 20, 6
# Seconds whose requests may be sent together: timers are not more precise
BURST = 0.01
# Requests a second above which there is no limit any more
UNLIMITED = 10000


class Pace:
    """rate is in requests a second, None without a limit; is_useless: refusals do not depend on it"""

    def __init__(self):
        self.rate = None
        self.is_useless = False
        # The rates before and after the last refusal
        self._before = self._lowered = 0
        # Answers before each refusal so far
        self._gaps = []
        # Answers since the last refusal, and its time
        self._answers = 0
        self._since = 0
        # Tokens in the bucket at that time
        self._tokens = self._at = 0

    def refused(self, sent, now, start=False):
        """
        A request, sent at the time sent, was refused. start: there is a limit from now on, if there was none. Returns whether
        the rate is lower than before.
        """
        if self.is_useless:
            return False
        if self.rate is None and start:
            self.rate = self._lowered = START
        elif self.rate is not None and sent >= self._since and self._answers:
            answered = self._answers / max(now - self._since, 1e-3)
            self._before = self.rate
            # Where a server counts by the second, the rate has grown beyond the limit before the second is over
            self.rate = self._lowered = max(self._lowered / 2, min(self.rate * KEPT, answered), SLOWEST)
            self._gaps.append(self._answers)
            if len(self._gaps) >= SEARCH + MANY and statistics.mean(self._gaps[SEARCH:]) < FEW:
                self.is_useless, self.rate = True, None
                return False
        else:
            return False
        self._answers = self._tokens = 0
        self._since = self._at = now
        return True

    def renew(self):
        """Use the rate again"""
        if self.is_useless:
            self.is_useless = False
            self._gaps.clear()

    def was_lowered_since(self, sent):
        return sent < self._since

    def forgive(self):
        """A request that had lowered the rate was refused again while others were answered: that was about its file"""
        if self.rate is not None and self._answers:
            self.rate = max(self.rate, self._before)

    def answered(self, count):
        self._answers += count
        if self.rate is not None:
            self.rate *= GROWTH ** (count * (1 + self._answers // CALM))
            if self.rate > UNLIMITED:
                self.rate = None

    def _fill(self, now):
        self._tokens = min(self._tokens + (now - self._at) * self.rate, max(1, self.rate * BURST))
        self._at = now

    def allowance(self, now):
        """How many requests may be sent now, or None without a limit"""
        if self.rate is None:
            return None
        self._fill(now)
        # A timer may be a rounding error early
        return int(self._tokens + 1e-6)

    def sent(self, count, now):
        if self.rate is not None:
            self._fill(now)
            self._tokens -= count

    def next_at(self):
        """When a request may be sent, after allowance() was 0"""
        return self._at + (1 - self._tokens) / self.rate
