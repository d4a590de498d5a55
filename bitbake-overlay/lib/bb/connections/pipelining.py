#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
Whether requests to a host can be pipelined (RFC 9112 9.3.2), and how many.

HTTP/1.1 demands it of each server, but some, and what stands before them, mix
answers up or end the connection. So a host is tested first with requests that
are to be made anyway: some at once, and between them one whose answer must not
look like theirs: for a file that is known to exist it is the same HEAD again,
else an OPTIONS. It is given up for a host that fails, that breaks connections
again and again while requests are under way, or whose answer does not fit what
the host has said of the file before.

host.py owns one object for each host and guards it by its condition, except
for test(), which blocks.
"""

from bb.connections import ConnectionCacheError, Disconnected, ProtocolError, TimedOutError
from bb.connections.http import Disagreement
from bb.connections.request import ABSENT, Request

# What a host is tested with: how many requests, and how many seconds it has for them
TEST_REQUESTS = 3
TEST_SECONDS = 10
# How often connections may break before each has answered ENOUGH
STRIKES = 2
ENOUGH = 100
# After so many tests that have shown nothing no more are made
INCONCLUSIVE = 8
# A connection that the server ends after fewer answers is no example for the others
KEEPALIVE_FROM = 10


class Pipelining:
    """tested is whether it has to be tested before it is used; without, each connection takes all it is given"""

    def __init__(self, tested):
        # None if not known yet
        self._works = None if tested else True
        self._tested = tested
        self._testing = False
        self._strikes = 0
        self._inconclusive = 0
        # A connection has broken with more than one request in flight: the next must not begin with more than one
        self._careful = False
        # After how many answers the server ends a connection
        self._keepalive = None

    def connecting(self, connection):
        connection.careful, self._careful = self._careful, False

    def room(self, connection, depth):
        """How many more requests may be sent on connection now, if depth may be in flight"""
        flying = len(connection.in_flight)
        if not self._works or connection.careful and not connection.served:
            return 1 - flying
        room = depth - flying
        if self._keepalive is not None and connection.served < self._keepalive:
            # What comes behind the last answer would be asked in vain
            room = min(room, self._keepalive - connection.served - flying)
        return room

    def closed(self, connection):
        """The server has ended connection in an orderly way"""
        if connection.ended and connection.served >= KEEPALIVE_FROM:
            self._keepalive = connection.served

    def broken(self, served, error):
        """A connection broke with more than one request in flight, after it had answered served"""
        self._careful = True
        self._strikes = 1 if served >= ENOUGH else self._strikes + 1
        if self._tested and (self._strikes >= STRIKES or isinstance(error, Disagreement)):
            self._works = False

    # The test

    @property
    def untested(self):
        return self._works is None and not self._testing

    def begin(self, connection, known, response, queue):
        """
        Whether the caller has to test now: response is an answer to known, on connection, that is of
        use for it, and the first of queue are what can be asked.
        """
        if not self.untested or known.method != "HEAD" or known.redirects or connection.in_flight:
            return False
        if connection.version < (1, 1) or connection.route.proxy and connection.origin.scheme == "http":
            # A proxy of that kind answers itself, and many cannot do it
            self._works = False
            return False
        if response.status != 200 and response.status not in ABSENT or len(queue) < TEST_REQUESTS:
            return False
        self._testing = all(queue[n].method == "HEAD" and queue[n].route == connection.route and not queue[n].cancelled
                            for n in range(TEST_REQUESTS))
        return self._testing

    def end(self, outcome):
        """Take the outcome of test()"""
        self._testing = False
        self._strikes += outcome == "broke"
        self._inconclusive += outcome is None
        if outcome == "works":
            self._works = True
        elif outcome == "fails" or self._strikes >= STRIKES or self._inconclusive >= INCONCLUSIVE:
            self._works = False

    @staticmethod
    def test(connection, known, response, requests):
        """
        Ask requests at once, and another one between them. Blocks, at most a few times TEST_SECONDS. Returns
        "works", "fails", "broke" if the connection has ended without an answer, or None if nothing is known
        now; and the answers to requests, none if they are of no use.
        """
        method = "HEAD" if response.status == 200 else "OPTIONS"
        other = Request(method, known.url, known.environment, known.verify, known.authorization)
        answers = []
        timeout = connection.timeout
        connection.set_timeout(min(TEST_SECONDS, timeout))
        try:
            connection.send(requests[:1] + [other] + requests[1:])
            while connection.in_flight and connection.reusable:
                answers += connection.receive()
            if connection.error:
                raise connection.error
            connection.set_timeout(timeout)
        except (ProtocolError, TimedOutError) as e:
            # Without any answer it may have been closed before
            return ("broke" if isinstance(e, Disconnected) and not answers else "fails"), []
        except (ConnectionCacheError, OSError):
            return None, []
        if connection.in_flight:
            # The server has ended the connection, for a reason of its own
            return None, []
        found = [answer for _, answer, _ in answers]
        if any(answer.status in (429, 503) for answer in found):
            return None, []
        if method == "HEAD":
            if not same_file(found[1], response):
                return "fails", []
            works = not same_file(found[0], response) and not same_file(found[2], response)
        else:
            # nginx says 405, Apache 200 and what is allowed
            works = [answer.status in (204, 405, 501) or "allow" in answer.headers for answer in found] == [False, True, False, False]
        if not works and not all(same_file(answer, found[0]) for answer in found):
            # What cannot be told from others may be in the wrong place, and the rest too
            return None, []
        return "works" if works else None, [answer for answer in answers if answer[0] is not other]


def same_file(one, other):
    """Whether two answers to HEAD may be of the same file"""
    return (one.status, one.length, one.headers.get("etag")) == (other.status, other.length, other.headers.get("etag"))
