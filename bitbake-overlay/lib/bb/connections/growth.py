#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
Determine how many connections to a host increase the throughput.

Used by host.py, with the event loop's time; no input or output. A server that
takes time for each answer, or limits the rate of each connection, answers more
requests over more connections; one that is limited by its network or processor
does not. So the number is doubled while many requests are queued and each
connection is slow, and reduced again if the throughput does not rise. health.py
lowers it further after refusals.

    growth = Growth(usual=4, most=16)
    limit = growth.update(now, size, depth, arrived, answers, waiting)
"""

# Seconds over which the throughput is measured: many round trips
WINDOW = 1
# Answers per connection without which the measurement is extended, as it would be too inaccurate
MIN_ANSWERS = 2
# Seconds after which a measurement ends even without them
LONGEST_WINDOW = 4
# Seconds until the next attempt after one without success, doubled each time, since attempts cost connections
RETRY_DELAY = 8
# Seconds that the queued requests have to take at the current rate, so that an attempt can be measured and pays
MIN_BACKLOG = 2
# Answers per second and connection from which on it is not slow: the server is not what limits it
FAST_ANSWERS = 100
# Bytes per second and connection from which on it is not slow: about the bandwidth of common links
FAST_BYTES = 8 * 1024 * 1024
# The throughput has to grow by this part of the growth in connections: less is noise, or not worth the connections
MIN_GAIN = 0.5


class Growth:
    """usual is the initial number of connections, most the largest"""

    def __init__(self, usual, most):
        self.limit = self._usual = usual
        self._most = most
        # Time, bytes and answers at the beginning of the measurement
        self._since = None
        # Throughput and limit before the limit was doubled, or None while no attempt is made
        self._rate = self._before = None
        self._depth = 0
        self._hold, self._not_before = RETRY_DELAY, 0

    def update(self, now, size, depth, arrived, answers, waiting):
        """
        Returns how many connections are permitted. size is how many exist, with up to depth requests in flight on each;
        arrived and answers are the number of bytes and answers so far, waiting is the number of queued requests.
        """
        if self._since is None or size < self.limit or depth != self._depth:
            # Restart the measurement: its conditions have changed
            self._since, self._depth = (now, arrived, answers), depth
        seconds = now - self._since[0]
        if seconds < WINDOW or seconds < LONGEST_WINDOW and answers - self._since[2] < MIN_ANSWERS * size:
            return self.limit
        rate, answer_rate = (arrived - self._since[1]) / seconds, (answers - self._since[2]) / seconds
        self._since = now, arrived, answers
        if self._rate is not None:
            self._evaluate(now, rate)
        elif self.limit < self._most and now >= self._not_before and waiting > MIN_BACKLOG * answer_rate and \
                answer_rate < FAST_ANSWERS * size and rate < FAST_BYTES * size:
            self._rate, self._before = rate, self.limit
            self.limit = min(2 * self.limit, self._most)
        return self.limit

    def _evaluate(self, now, rate):
        if rate < self._rate * (1 + MIN_GAIN * (self.limit / self._before - 1)):
            self.limit = self._before
            self._not_before = now + self._hold
            self._hold *= 2
        self._rate = None

    def pause(self):
        """Stop measuring: the connections are not busy"""
        if self._rate is not None:
            self.limit = self._before
        self._since = self._rate = None

    def restrict(self, limit=None):
        """
        Never again exceed the usual number of connections, after a refusal. If the server seems to serve no more than
        limit connections at a time, lower the usual number to that, in each call by half at most.
        """
        self._usual = min(self._usual, max(limit or self._usual, self._usual // 2))
        self.limit = self._most = self._usual
        self._rate = None
