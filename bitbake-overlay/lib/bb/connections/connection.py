#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
Base class of connections: receive buffer, requests in flight, time-outs.

Subclassed by http.HTTPConnection and sftp.SFTPConnection. A subclass implements
parse(), a generator that is resumed whenever data has arrived, calls answer()
for each answered request, and yields when it needs more data. All answers of
one read are then passed to the owner (host.py) in one call:

    owner.answered(connection, [(request, response, error), ...])
    owner.ended(connection, error)      # exactly once; error is None for an orderly end

After ended(), in_flight holds the requests that remain unanswered. Runs in the
event loop's thread and does not block. Does not retry requests.
"""

import asyncio
import collections
import sys

from bb.connections import ConnectionCacheError, Disconnected, ProtocolError, TimedOutError

# Bytes per second below which an answer that has begun times out; any usable link is faster
MIN_RATE = 1000
# Seconds over which that rate is measured, so that a short stall does not matter
RATE_SECONDS = 30
# Bytes of the receive buffer: twice the longest unit that has to fit into it, an SFTP packet
BUFFER = 512 * 1024
# Whether asyncio passes each TLS record on by itself, instead of all that a read has brought
SEPARATE_RECORDS = sys.version_info < (3, 11)


class Connection(asyncio.BufferedProtocol):
    """
    The connection times out after timeout seconds without data; set_timeout()
    changes that for the time before an answer begins.

    origin, route       the host, and how it is reached
    in_flight           requests without an answer, in the order of sending
    ordinal             counts the connections to the host from 1
    served              number of answers so far
    arrived             number of bytes received so far
    close_announced     the server has announced that it will close the connection
    has_stray_data      data has arrived that belongs to no answer, and could be mistaken for one
    retiring            the owner sends no further requests on it
    """
    # Whether connections to a host are opened only one at a time
    serial = False
    # Whether answers are matched by order only, so that pipelining has to be tried out first (pipelining.py)
    needs_trial = False

    def __init__(self, loop, owner, origin, route, timeout):
        self.loop = loop
        self.owner = owner
        self.origin = origin
        self.route = route
        self.timeout = self.idle = self._longest = timeout
        self.in_flight = collections.deque()
        self.ordinal = self.served = 0
        self.close_announced = self.has_stray_data = self.retiring = self.is_open = False
        self.transport = None
        # The data that parse() has not consumed yet is between start and end
        self.data = bytearray(BUFFER)
        self.view = memoryview(self.data)
        self.start = self.end = 0
        # Whether parse() has consumed the beginning of an answer
        self.in_answer = False
        self._answers = []
        # Whether report() will be called soon
        self.reporting = False
        self._last_data = self._timer = None
        self.arrived = 0
        # Values of arrived, served and the time when the rate was last measured
        self._measured = 0, 0, 0
        self._parser = self.parse()

    def connection_made(self, transport):
        self.transport = transport
        self.is_open = True
        next(self._parser)
        self._watch()

    def get_buffer(self, sizehint):
        # Move the unconsumed data to the front
        left = self.end - self.start
        self.data[:left] = self.data[self.start:self.end]
        self.start, self.end = 0, left
        return self.view[left:]

    def buffer_updated(self, nbytes):
        self.end += nbytes
        self.arrived += nbytes
        self.updated()

    def eof_received(self):
        self.connection_lost(None)

    def connection_lost(self, exc):
        if self.is_open:
            error = Disconnected("%s: %s" % (self.origin.host, exc or "closed by the server"))
            if self.in_answer or self.start != self.end:
                error = ProtocolError("%s in the middle of an answer" % error)
            self._resume(self._parser.throw, error)

    def set_timeout(self, seconds):
        """Restart the time-out, which is this many seconds until an answer begins"""
        self.timeout = seconds
        self._watch()

    def set_idle(self, seconds):
        """Close the connection if no request is sent on it for this many seconds"""
        self.idle = seconds
        self._watch()

    def send(self, requests):
        was_idle = not self.in_flight
        self.in_flight.extend(requests)
        if was_idle:
            self._watch()

    def close(self, error=None):
        """Close the connection and call owner.ended(), unless that has been done before"""
        if self.is_open:
            self._end()
            self.report()
            self.owner.ended(self, error)

    @staticmethod
    def classify(request, response):
        """Returns (response, None), or (None, error) if response means a failure or that the request was changed"""
        return response, None

    def parse(self):
        """Generator that consumes the data between start and end. Returns at an orderly end of the connection."""
        raise NotImplementedError

    def answer(self, request, response, error=None):
        """Record the answer to request, which the subclass has removed from in_flight"""
        self.served += 1
        self._answers.append((request, response, error))

    def updated(self):
        if self.is_open:
            self._last_data = self.loop.time()
            self._resume(next, self._parser)

    def _resume(self, step, argument):
        """Resume parse() and report its answers and its end to the owner"""
        ended, error = True, None
        try:
            step(argument)
            ended = False
        except StopIteration:
            pass
        except ConnectionCacheError as e:
            error = e
        except Exception as e:
            error = ProtocolError("%s: %r" % (self.origin.host, e))
        if ended:
            # Before the answers are reported, so that the owner sends nothing further on this connection
            self._end()
        if ended or not SEPARATE_RECORDS:
            self.report()
        elif self._answers and not self.reporting:
            self.reporting = True
            self.loop.call_soon(self.report)
        if ended:
            self.owner.ended(self, error)

    def report(self):
        """Pass the answers to the owner, if there are any"""
        self.reporting = False
        answers, self._answers = self._answers, []
        if answers:
            self.owner.answered(self, answers)

    def _end(self):
        self.is_open = False
        self._timer.cancel()
        self._parser.close()
        self.transport.abort()

    def _watch(self):
        self._last_data = self.loop.time()
        self._measured = self.arrived, self.served, self._last_data
        if self._timer:
            self._timer.cancel()
        if self.is_open:
            self._expect_data()

    def _expect_data(self):
        now = self.loop.time()
        longest = self._longest if self.in_answer else self.timeout
        due = self._last_data + (longest if self.in_flight else self.idle)
        if due > now and self._is_fast(now):
            # The timer is renewed here rather than at each read, which would cost more
            self._timer = self.loop.call_at(min(due, now + RATE_SECONDS), self._expect_data)
        elif not self.in_flight:
            self.close()
        elif due > now:
            self.close(TimedOutError("%s: less than %s bytes a second" % (self.origin.host, MIN_RATE)))
        else:
            self.close(TimedOutError("%s: no data for %s seconds" % (self.origin.host, longest)))

    def _is_fast(self, now):
        """Whether an answer that has begun arrives at MIN_RATE"""
        arrived, served, since = self._measured
        if now - since < RATE_SECONDS and served == self.served:
            return True
        self._measured = self.arrived, self.served, now
        return served != self.served or not self.in_flight or not 0 < self.arrived - arrived < MIN_RATE * (now - since)
