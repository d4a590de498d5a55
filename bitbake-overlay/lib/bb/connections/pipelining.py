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
again, else, or if the files look alike, an OPTIONS. Pipelining ends for a
server which fails the trial, or repeatedly breaks connections while several
requests are in flight, or gives answers which contradict earlier ones about the
same file.

host.py has one Pipelining for each host, and one Trial at most at a time. No
input or output happens in here.
"""

import itertools

from bb.connections import Disconnected
from bb.connections.request import ABSENT, FORBIDDEN, NO_VALIDATORS, Request

# Requests in flight during the trial at least, besides the probe
MIN_REQUESTS = 3
# Statuses by which a server declines to answer for now
DECLINED = (408, 418, 420, 429, 500, 502, 503, 504)
# Connections that may break in a row before each has answered ENOUGH requests
STRIKES = 2
ENOUGH = 100
# Trials without a result
INCONCLUSIVE = 8
# Bytes of bodies in flight on a connection, if there is more than one; and of those behind which nothing is sent that
# somebody waits for
MAX_BODIES = 1024 * 1024
SMALL_BODIES = 64 * 1024
# A server that closes a connection after fewer answers is not expected to do so after as many again
KEEPALIVE_FROM = 10


class Pipelining:
    """tried is whether a trial is needed; without one it works"""

    def __init__(self, tried):
        # None: not known yet
        self._works = None if tried else True
        self._tried = tried
        self._strikes = self._inconclusive = 0
        # A connection has broken with several requests in flight: the next one has to begin with a single request
        self._careful = False
        # Answers after which the server closes a connection; and those of a connection that broke, which is how many
        # requests the next one begins with
        self._keepalive = self._brought = None

    def room(self, connection, depth):
        """How many more requests may be sent on connection now, if depth may be in flight"""
        in_flight = len(connection.in_flight)
        if not self._works or self._careful and not connection.served:
            return 1 - in_flight
        self._careful = False
        room = depth - in_flight
        if self._brought is not None:
            room = min(room, max(self._brought, connection.served) - in_flight)
        if self._keepalive is not None and connection.served < self._keepalive:
            # The server would not answer more
            room = min(room, self._keepalive - connection.served - in_flight)
        return room

    def closed(self, connection):
        """The server has announced the end of connection"""
        if connection.announced and connection.served >= KEEPALIVE_FROM:
            self._keepalive = connection.served

    def broken(self, connection):
        """The connection broke with more than one request in flight, or an answer on it contradicted an earlier one"""
        self._careful = True
        self._brought = max(1, connection.served)
        self._strikes = 1 if connection.served >= ENOUGH else self._strikes + 1
        if self._tried and self._strikes >= STRIKES:
            self._works = False

    @property
    def works(self):
        return bool(self._works)

    def end(self):
        """The server sends what belongs to no answer, or has mixed up answers"""
        self._works = False

    def forgive(self):
        """What contradicted an earlier answer was right: the file has changed"""
        self._strikes = max(0, self._strikes - 1)

    def trial(self, connection, answer, queue, depth):
        """
        Returns a Trial whose requests have been taken from queue, or None. answer, (request, response, error), is the
        last one on connection, which is idle.
        """
        known, response, error = answer
        if self._works is not None or error or known.method != "HEAD" or known.origin != connection.origin:
            return None
        if connection.version < (1, 1) or connection.route.proxy and connection.origin.scheme == "http":
            # Such a proxy answers itself, and many do not support it
            self._works = False
            return None
        if response.status != 200 and response.status not in ABSENT:
            return None
        requests = list(itertools.takewhile(lambda request: request.method == "HEAD" and not request.alone, itertools.islice(queue, depth)))
        if len(requests) < MIN_REQUESTS:
            return None
        for _ in requests:
            queue.pop()
        return Trial(connection, known, response, requests, response.status == 200 and self._inconclusive % 2 == 0)

    def finish(self, outcome):
        """Take the outcome of the trial"""
        self._strikes += outcome == "broke"
        self._inconclusive += outcome is None
        if outcome == "works":
            self._works = True
        elif outcome == "fails" or self._strikes >= STRIKES or self._inconclusive >= INCONCLUSIVE:
            self._works = False


class Load:
    """
    What is in flight on a connection, and what may be sent behind it. tried is whether answers can only be told by
    their order.
    """

    def __init__(self, requests, tried):
        self._tried = tried
        self._number = self._bodies = 0
        self._alone = False
        # What the answers to GETs will look like, None if that is not known; and whether some may look like any other
        self._files = set()
        self._mistakable = False
        for request in requests:
            self.add(request)

    def add(self, request):
        self._number += 1
        if request.alone:
            self._alone = True
        if request.fd is not None:
            self._bodies += request.body_size()
            self._files.add(request.identity)
            self._mistakable = self._mistakable or request.validators == NO_VALIDATORS

    def admits(self, request, spare):
        """
        Whether request may be sent now. spare() tells whether another connection has no bodies in flight, None if there
        is no other connection.
        """
        if request.alone or self._alone:
            return not self._number
        if request.fd is None:
            return self._bodies <= SMALL_BODIES or not spare()
        size = request.body_size()
        if size > SMALL_BODIES and not request.first and spare() is False:
            # The last connection is for what somebody waits for
            return False
        if self._number and self._bodies + size > MAX_BODIES:
            return False
        # If the answers to two files that look alike, or may do so, were mixed up, nothing would tell
        if not self._tried:
            return True
        if request.identity is None and self._mistakable or request.validators == NO_VALIDATORS and None in self._files:
            return False
        return request.identity not in self._files


class Trial:
    """
    requests are due on connection, and what is sent has a probe among them. known is a request that has been answered
    with response; head tells whether the probe is the same HEAD again.
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
        """Some have been answered. Returns whether that was all."""
        self._answers += answers
        return len(self._answers) == len(self.sent)

    def judge(self):
        """
        All have been answered. Returns "works", "fails", or None if there is no result; and the answers to requests,
        empty if they may be mixed up.
        """
        found = [response for _, response, _ in self._answers]
        if found[1].status == FORBIDDEN or any(response.status in DECLINED for response in found):
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
