#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
Decide how many and which requests may be in flight on a connection together.

Used by host.py and connectionset.py; no input or output. HTTP/1.1 requires
servers to support pipelining (RFC 9112 9.3.2), but some servers, and devices in
front of them, mix up answers or close the connection. So it is tried out first,
with requests that are due anyway and, among them, a probe whose answer can be
distinguished from theirs: the HEAD of a file that is known to exist, or else an
OPTIONS. The number of requests in flight is increased step by step, each time on
one connection first, since some servers drop what exceeds their buffer. Pipelining
is disabled for a server that fails the trial, repeatedly breaks connections with
several requests in flight, or sends answers that contradict earlier ones about the
same file.

    pipelining = Pipelining(needs_trial=True)
    trial = pipelining.trial(connection, answer, queue)     # send trial.sent
    number = pipelining.room(connection)
    pipelining.answered(connection, number, latency, waiting)
    pipelining.ended(connection, error)
    Load(connection.in_flight, needs_trial=True).admits(request, has_spare)
"""

import itertools

from bb.connections import Disconnected
from bb.connections.request import ABSENT, FORBIDDEN, NO_VALIDATORS, Request

# Initial number of requests in flight on a connection if pipelining needs a trial: few are lost if it fails
DEPTH = 8
# The largest number: enough for 3000 requests per second at 20 ms per round trip
MAX_DEPTH = 64
# Requests that a trial needs besides the probe, which has neighbours on both sides then
MIN_REQUESTS = 3
# Statuses by which a server refuses or fails for now, so that the trial has no result
DECLINED = (408, 418, 420, 429, 500, 502, 503, 504)
# Number of consecutive broken connections after which pipelining is disabled: a single one may be an accident
STRIKES = 2
# Answers on a connection after which its break does not count together with those before
PROVEN_AFTER = 100
# Number of trials without a result after which no further one is made
INCONCLUSIVE = 8
# Bytes of bodies in flight on a connection with more than one, so that a lost connection costs little
MAX_BODIES = 1024 * 1024
# Bytes of bodies in flight behind which a HEAD may be sent even if another connection has none: they arrive soon
SMALL_BODIES = 64 * 1024
# Answers after which a closed connection indicates a fixed number of requests per connection; fewer may be an accident
KEEPALIVE_FROM = 10


class Pipelining:
    """
    works   whether several requests may be in flight on a connection to the host, or None before the trial
    depth   how many
    """

    def __init__(self, needs_trial):
        self.works = None if needs_trial else True
        self.depth = DEPTH if needs_trial else MAX_DEPTH
        # The connection on which twice as many are tried, its number of answers before, and how often that has failed
        self._deeper, self._served_before, self._deeper_failed = None, None, 0
        # Shortest time in seconds for an answer without a body
        self._shortest = float("inf")
        self._needs_trial = needs_trial
        self._strikes = self._inconclusive = 0
        # Whether the next connection begins with a single request, since one broke with several in flight
        self._start_single = False
        # Number of answers after which the server closes a connection
        self._answers_until_close = None
        # Number of answers on the connection that broke last: the next one begins with as many requests
        self._last_served = None

    def room(self, connection):
        """Number of further requests for connection"""
        in_flight = len(connection.in_flight)
        if not self.works or self._start_single and not connection.served:
            return 1 - in_flight
        room = self.depth - in_flight
        if connection is self._deeper:
            # None until all are answered: if some have been dropped, further answers would be taken for theirs
            room = 0 if in_flight else min(2 * self.depth, MAX_DEPTH)
        if self._last_served is not None:
            room = min(room, max(self._last_served, connection.served) - in_flight)
        if self._answers_until_close is not None and connection.served < self._answers_until_close:
            # The server will close the connection after these
            room = min(room, self._answers_until_close - connection.served - in_flight)
        return room

    def answered(self, connection, number, latency, waiting):
        """
        number answers have arrived on connection at once, the last one latency seconds after its request (None for a
        body); waiting requests remain for it. If that is about one round trip, more requests in flight increase the
        throughput; if each answer takes time, only further connections (growth.py) do.
        """
        if latency is not None:
            self._shortest = min(self._shortest, latency)
        if connection.served == number:
            # The first answers on the connection
            self._start_single = False
        if connection is self._deeper and not connection.in_flight:
            if self._served_before is not None:
                sent = connection.served - self._served_before
                # The requests, such as those for large bodies, may not permit more
                self._deeper_failed += sent <= self.depth
                self.depth = max(self.depth, min(sent, MAX_DEPTH))
                self._deeper = None
            self._served_before = connection.served
        at_once = number > self.depth // 2 or latency is not None and latency < 2 * self._shortest
        if self._may_deepen() and at_once and connection.is_open and waiting >= 2 * self.depth:
            self._deeper, self._served_before = connection, None if connection.in_flight else connection.served

    def _may_deepen(self):
        return self.works and not self._deeper and self.depth < MAX_DEPTH and self._deeper_failed < STRIKES

    def ended(self, connection, error):
        """connection has ended. error is None for an orderly end."""
        if connection is self._deeper:
            self._deeper = None
            self._deeper_failed += error is not None and len(connection.in_flight) > 0

    def closed(self, connection):
        """connection has ended in an orderly way"""
        if connection.close_announced and connection.served >= KEEPALIVE_FROM:
            self._answers_until_close = connection.served

    def broken(self, connection):
        """connection broke with several requests in flight, or an answer on it contradicted an earlier one"""
        self._start_single = True
        self._last_served = max(1, connection.served)
        self._strikes = 1 if connection.served >= PROVEN_AFTER else self._strikes + 1
        if self._needs_trial and self._strikes >= STRIKES:
            self.works = False

    def disable(self):
        self.works = False

    def revoke_strike(self):
        self._strikes = max(0, self._strikes - 1)

    def trial(self, connection, answer, queue):
        """
        Returns a Trial with requests taken from queue, or None if none is needed or possible now. answer, (request,
        response, error), is the last one on connection, which is idle.
        """
        known, response, error = answer
        if self.works is not None or error or known.method != "HEAD" or known.origin != connection.origin:
            return None
        if connection.version < (1, 1) or connection.route.proxy and connection.origin.scheme != "https":
            # The trial would be one of the proxy, many of which do not support pipelining
            self.works = False
            return None
        if response.status != 200 and response.status not in ABSENT:
            return None
        requests = list(itertools.takewhile(lambda request: request.method == "HEAD" and not request.exclusive,
                                            itertools.islice(queue, self.depth)))
        if len(requests) < MIN_REQUESTS:
            return None
        for _ in requests:
            queue.pop()
        return Trial(connection, known, response, requests, response.status == 200 and self._inconclusive % 2 == 0)

    def finish(self, outcome):
        self._strikes += outcome == "broke"
        self._inconclusive += outcome is None
        if outcome == "works":
            self.works = True
        elif outcome == "fails" or self._strikes >= STRIKES or self._inconclusive >= INCONCLUSIVE:
            self.works = False


class Load:
    """
    The requests in flight on a connection, which restrict what may be sent behind them. needs_trial: answers are
    matched to requests by their order only.
    """

    def __init__(self, requests, needs_trial):
        self._needs_trial = needs_trial
        self._number = self._bodies = 0
        self._exclusive = False
        # Request.identity of the GETs, None for those of unknown size
        self._files = set()
        # Whether a file has no validators, so that its answer may look like that of a file of unknown size
        self._mistakable = False
        for request in requests:
            self.add(request)

    def add(self, request):
        self._number += 1
        if request.exclusive:
            self._exclusive = True
        if request.fd is not None:
            self._bodies += request.body_size()
            self._files.add(request.identity)
            self._mistakable = self._mistakable or request.validators == NO_VALIDATORS

    def admits(self, request, spare):
        """
        Whether request may be sent behind these. spare() returns whether another connection has no bodies in flight, or
        None if there is no other connection.
        """
        if request.exclusive or self._exclusive:
            return not self._number
        if request.fd is None:
            return self._bodies <= SMALL_BODIES or not spare()
        size = request.body_size()
        if size > SMALL_BODIES and not request.first and spare() is False:
            # The last connection without bodies is reserved for requests that somebody waits for
            return False
        if self._number and self._bodies + size > MAX_BODIES:
            return False
        # If the answers for two files look alike, nothing shows that they are mixed up
        if not self._needs_trial:
            return True
        if request.identity is None and self._mistakable or request.validators == NO_VALIDATORS and None in self._files:
            return False
        return request.identity not in self._files


class Trial:
    """
    A trial of pipelining on connection: sent is requests with a probe among them. known is a request that has been
    answered with response; head: the probe is the same HEAD again.
    """

    def __init__(self, connection, known, response, requests, head):
        self.connection = connection
        self.requests = requests
        self._response = response
        self._head = head
        self._probe = Request("HEAD" if head else "OPTIONS", known.url, known.environment, known.verify, known.authorization)
        self.sent = requests[:1] + [self._probe] + requests[1:]
        self._answers = []

    def add(self, answers):
        """Add answers; returns whether these were the last ones"""
        self._answers += answers
        return len(self._answers) == len(self.sent)

    def evaluate(self):
        """
        Returns "works", "fails" or None (no result), once all are answered, and the answers to requests, or none if they
        may be mixed up.
        """
        found = [response for _, response, _ in self._answers]
        if found[1].status == FORBIDDEN or any(response.status in DECLINED for response in found):
            return None, []
        if self._head:
            if not same_file(found[1], self._response):
                return "fails", []
            works = not same_file(found[0], self._response) and not same_file(found[2], self._response)
        else:
            # nginx answers 405, Apache 200 with the allowed methods
            works = [response.status in (204, 405, 501) or response.headers.get("allow") is not None for response in found]
            works = works[1] and works.count(True) == 1
        if not works and not all(same_file(response, found[0]) for response in found):
            # The probe cannot be distinguished from its neighbours, and others may be mixed up
            return None, []
        return "works" if works else None, [answer for answer in self._answers if answer[0] is not self._probe]

    def ended(self, error):
        """Returns the outcome if the connection ended before all were answered. error is None for an orderly end."""
        if error is None:
            return None
        # Without any answer, the server may have closed it before the trial
        return "broke" if isinstance(error, Disconnected) and not self._answers else "fails"


def same_file(one, other):
    """Whether two answers to HEAD may concern the same file"""
    return (one.status, one.length, one.headers.get("etag")) == (other.status, other.length, other.headers.get("etag"))
