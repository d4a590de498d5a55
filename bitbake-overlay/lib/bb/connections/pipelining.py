#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
Whether several requests may be in flight on a connection to an HTTP server.

HTTP/1.1 requires every server to support that (RFC 9112 9.3.2), but some, and
devices in front of them, mix up answers or close the connection. So it is
tried first, with requests that are due anyway and one probe among them whose
answer can be told from theirs: if a file is known to exist, the same HEAD
again, else, or if the files look alike, an OPTIONS. Pipelining ends for a server which fails the trial,
breaks connections repeatedly while several requests are in flight, or whose
answer contradicts an earlier one about the same file.

host.py has one Pipelining for each host, and one Trial at most at a time. No
input or output happens in here.
"""

from bb.connections import Disagreement, Disconnected
from bb.connections.request import ABSENT, Request

# Requests in flight during the trial at least, besides the probe, and seconds without data that end it
MIN_REQUESTS = 3
TRIAL_TIMEOUT = 10
# Connections that may break in a row before each has answered ENOUGH requests
STRIKES = 2
ENOUGH = 100
# Trials without a result
INCONCLUSIVE = 8
# A server that closes a connection after fewer answers is not expected to do so after as many again
KEEPALIVE_FROM = 10


class Pipelining:
    """tried is whether a trial is needed; without one it works"""

    def __init__(self, tried):
        # None: not known yet
        self._works = None if tried else True
        self._tried = tried
        self._trial = False
        self._strikes = 0
        self._inconclusive = 0
        # A connection has broken with several requests in flight: the next one has to begin with a single request
        self._careful = False
        # Answers after which the server closes a connection
        self._keepalive = None

    def room(self, connection, depth):
        """How many more requests may be sent on connection now, if depth may be in flight"""
        in_flight = len(connection.in_flight)
        if not self._works or self._careful and not connection.served:
            return 1 - in_flight
        self._careful = False
        room = depth - in_flight
        if self._keepalive is not None and connection.served < self._keepalive:
            # The server would not answer more
            room = min(room, self._keepalive - connection.served - in_flight)
        return room

    def closed(self, connection):
        """The server has announced the end of connection"""
        if connection.announced and connection.served >= KEEPALIVE_FROM:
            self._keepalive = connection.served

    def broken(self, connection, error):
        """The connection broke with more than one request in flight"""
        self._careful = True
        self._strikes = 1 if connection.served >= ENOUGH else self._strikes + 1
        if self._tried and (self._strikes >= STRIKES or isinstance(error, Disagreement)):
            self._works = False

    def trial(self, connection, answer, queue, depth):
        """
        Returns a Trial whose requests have been taken from queue, or None. answer, (request, response, error), is the
        last one on connection.
        """
        known, response, error = answer
        if self._works is not None or self._trial or error or known.method != "HEAD" or known.redirects or connection.in_flight:
            return None
        if connection.version < (1, 1) or connection.route.proxy and connection.origin.scheme == "http":
            # Such a proxy answers itself, and many do not support it
            self._works = False
            return None
        if response.status != 200 and response.status not in ABSENT:
            return None
        requests = queue.take(depth, lambda request: request.method == "HEAD" and not request.cancelled)
        if len(requests) < MIN_REQUESTS:
            for request in reversed(requests):
                queue.put_back(request)
            return None
        self._trial = True
        return Trial(known, response, requests, response.status == 200 and self._inconclusive % 2 == 0)

    def finish(self, outcome):
        """Take the outcome of the trial"""
        self._trial = False
        self._strikes += outcome == "broke"
        self._inconclusive += outcome is None
        if outcome == "works":
            self._works = True
        elif outcome == "fails" or self._strikes >= STRIKES or self._inconclusive >= INCONCLUSIVE:
            self._works = False


class Trial:
    """
    requests are due, and what is sent has a probe among them. known is a request that has been answered with response;
    head tells whether the probe is the same HEAD again.
    """

    def __init__(self, known, response, requests, head):
        self.requests = requests
        self._response = response
        self._head = head
        self._probe = Request("HEAD" if self._head else "OPTIONS", known.url, known.environment, known.verify, known.authorization)
        self.sent = requests[:1] + [self._probe] + requests[1:]
        self._answers = []

    def add(self, answers):
        """Some have been answered. Returns whether that was all."""
        self._answers += answers
        return len(self._answers) == len(self.sent)

    def judge(self):
        """
        All have been answered. Returns "works", "fails", or None if there is no result; and the answers to requests,
        empty if they may be mixed up.
        """
        found = [response for _, response, _ in self._answers]
        if any(response.status in (429, 503) for response in found):
            return None, []
        if self._head:
            if not same_file(found[1], self._response):
                return "fails", []
            works = not same_file(found[0], self._response) and not same_file(found[2], self._response)
        else:
            # nginx answers 405, Apache 200 and what is allowed
            works = [response.status in (204, 405, 501) or response.headers.get("allow") is not None for response in found]
            works = works[1] and works.count(True) == 1
        if not works and not all(same_file(response, found[0]) for response in found):
            # The probe cannot be told from its neighbours, and others may be in the wrong place
            return None, []
        return "works" if works else None, [answer for answer in self._answers if answer[0] is not self._probe]

    def ended(self, error):
        """The connection has ended before all were answered. Returns the outcome; error is None for an orderly end."""
        if error is None:
            return None
        # Without any answer it may have been closed before
        return "broke" if isinstance(error, Disconnected) and not self._answers else "fails"


def same_file(one, other):
    """Whether two answers to HEAD may be about the same file"""
    return (one.status, one.length, one.headers.get("etag")) == (other.status, other.length, other.headers.get("etag"))
