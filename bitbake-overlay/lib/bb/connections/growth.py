#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
Whether further connections to a host increase the rate.

Used by host.py. A server that needs its time for each answer, or limits each
connection, answers more requests over more connections; one that is limited by
the network or its processor does not. So the number is doubled while many
requests wait and each connection is slow, and reduced again if the rate does
not rise.

    growth = Growth(4, 16)
    limit = growth.look(now, size, depth, arrived, answers, waiting)
"""

# Seconds over which the rate is measured: at least, and at most if there are fewer answers than ENOUGH on each connection
WINDOW, LONGEST_WINDOW, ENOUGH = 1, 4, 2
# Seconds until a further attempt after one that did not pay, doubled each time
HOLD = 8
# Seconds that the requests which wait would take, from which on it is tried
LONG = 2
# A connection with more answers, or bytes, a second is not slow
FAST_ANSWERS = 100
FAST_BYTES = 8 * 1024 * 1024
# Part of the growth in connections that the rate has to grow by
GAIN = 0.5


class Growth:
    """usual is the number of connections to begin with, most the largest"""

    def __init__(self, usual, most):
        self.limit = self._usual = usual
        self._most = most
        # Time, bytes and answers when the window began; rate and number before that was doubled, None if it was not
        self._since = None
        self._rate = self._before = None
        self._depth = 0
        self._hold, self._not_before = HOLD, 0

    def look(self, now, size, depth, arrived, answers, waiting):
        """
        Returns how many connections there may be. size is how many there are, all of which are busy with up to depth
        requests; arrived and answers are bytes and answers so far, waiting is the number of requests that are queued.
        """
        if self._since is None or size < self.limit or depth != self._depth:
            # What is to be measured is not in place yet
            self._since, self._depth = (now, arrived, answers), depth
        seconds = now - self._since[0]
        if seconds < WINDOW or seconds < LONGEST_WINDOW and answers - self._since[2] < ENOUGH * size:
            return self.limit
        rate, answer_rate = (arrived - self._since[1]) / seconds, (answers - self._since[2]) / seconds
        self._since = now, arrived, answers
        if self._rate is not None:
            self._judge(now, rate)
        elif self.limit < self._most and now >= self._not_before and waiting > LONG * answer_rate and \
                answer_rate < FAST_ANSWERS * size and rate < FAST_BYTES * size:
            self._rate, self._before = rate, self.limit
            self.limit = min(2 * self.limit, self._most)
        return self.limit

    def _judge(self, now, rate):
        if rate < self._rate * (1 + GAIN * (self.limit / self._before - 1)):
            self.limit = self._before
            self._not_before = now + self._hold
            self._hold *= 2
        self._rate = None

    def pause(self):
        """Too few requests wait to measure a rate"""
        if self._rate is not None:
            self.limit = self._before
        self._since = self._rate = None

    def end(self, limit=None):
        """
        The host has refused something: it is not asked over more connections than usual any more; nor over more than limit,
        but at least half as many as usual, if that is how many it serves at a time
        """
        self._usual = min(self._usual, max(limit or self._usual, self._usual // 2))
        self.limit = self._most = self._usual
        self._rate = None
