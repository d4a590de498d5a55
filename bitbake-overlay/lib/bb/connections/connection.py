#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
What a connection has whatever protocol it speaks: a receive buffer, the
requests in flight, and a timer for silence.

Base class of http.HTTPConnection and sftp.SFTPConnection. A subclass has a
generator parse(), which is resumed whenever data has arrived, calls answer()
for each request that is answered, and yields when it needs more data. All
answers of one read are then passed to the owner (host.py) in one call:

    owner.answered(connection, [(request, response, error), ...])
    owner.ended(connection, error)      # exactly once; error is None for an orderly end

After ended() in_flight has the requests that will not be answered. Everything
runs in the thread of the event loop, and nothing blocks.
"""

import asyncio
import collections

from bb.connections import ConnectionCacheError, Disconnected, ProtocolError, TimedOutError

# Bytes a second that have to arrive while an answer does, and seconds over which that is measured
MIN_RATE = 1000
RATE_SECONDS = 30
# Bytes of the receive buffer: twice the longest part of an answer that has to be in it as a whole, an SFTP packet
BUFFER = 512 * 1024


class Connection(asyncio.BufferedProtocol):
    """
    timeout is how many seconds without any data end the connection in the middle
    of an answer, and before one unless set_timeout() says something else.

    origin, route   which host, and how it is reached
    in_flight       requests that are not answered yet, in the order of sending
    served          number of answers so far
    announced       the server has announced that it closes the connection
    untidy          something has arrived that belongs to no answer, and might be mistaken for one
    retiring        the owner sends no further requests on it
    """
    # Open connections to a host one after the other only; try whether requests can be pipelined
    serial = tried = False

    def __init__(self, loop, owner, origin, route, timeout):
        self.loop = loop
        self.owner = owner
        self.origin = origin
        self.route = route
        self.timeout = self.idle = self._longest = timeout
        self.in_flight = collections.deque()
        self.served = 0
        self.announced = self.untidy = self.retiring = self.is_open = False
        self.transport = None
        # What has been received and not been used yet is between start and end
        self.data = bytearray(BUFFER)
        self.view = memoryview(self.data)
        self.start = self.end = 0
        # Whether parse() has used the beginning of an answer
        self.in_answer = False
        self._answers = []
        self._heard = self._timer = None
        # Bytes so far; the same when the rate was last measured, with served and the time
        self.arrived = 0
        self._measured = 0, 0, 0
        self._parser = self.parse()

    def connection_made(self, transport):
        self.transport = transport
        self.is_open = True
        next(self._parser)
        self._watch()

    def get_buffer(self, sizehint):
        # The part of an answer that is left goes to the front
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
        """Allow so many seconds without data, from now on, until an answer begins"""
        self.timeout = seconds
        self._watch()

    def set_idle(self, seconds):
        """No request is in flight: close the connection if that stays so for so many seconds"""
        self.idle = seconds
        self._watch()

    def send(self, requests):
        """Send requests, which are in flight then"""
        was_idle = not self.in_flight
        self.in_flight.extend(requests)
        if was_idle:
            self._watch()

    def close(self, error=None):
        """End the connection. owner.ended() is called, unless it was before."""
        if self.is_open:
            self._end()
            self.owner.ended(self, error)

    @staticmethod
    def judge(request, response):
        """Returns (response, None), or (None, error) with the error or the change of request that response means"""
        return response, None

    def parse(self):
        """Generator that uses what is between start and end. Returns when the server has announced the connection's end."""
        raise NotImplementedError

    def answer(self, request, response, error=None):
        """request is answered, and not in flight any more"""
        self.served += 1
        self._answers.append((request, response, error))

    def updated(self):
        """Data has arrived"""
        if self.is_open:
            self._heard = self.loop.time()
            self._resume(next, self._parser)

    def _resume(self, step, argument):
        """Resume parse(), and pass on what that has led to"""
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
        answers, self._answers = self._answers, []
        if ended:
            # Before its answers are passed on: nothing may be sent on it any more
            self._end()
        if answers:
            self.owner.answered(self, answers)
        if ended:
            self.owner.ended(self, error)

    def _end(self):
        self.is_open = False
        self._timer.cancel()
        self._parser.close()
        self.transport.abort()

    def _watch(self):
        """Measure the silence from now on"""
        self._heard = self.loop.time()
        self._measured = self.arrived, self.served, self._heard
        if self._timer:
            self._timer.cancel()
        if self.is_open:
            self._expect_data()

    def _expect_data(self):
        now = self.loop.time()
        longest = self._longest if self.in_answer else self.timeout
        due = self._heard + (longest if self.in_flight else self.idle)
        if due > now and self._is_fast(now):
            # Moved on here instead of at each read, of which there are many
            self._timer = self.loop.call_at(min(due, now + RATE_SECONDS), self._expect_data)
        elif not self.in_flight:
            self.close()
        elif due > now:
            self.close(TimedOutError("%s: less than %s bytes a second" % (self.origin.host, MIN_RATE)))
        else:
            self.close(TimedOutError("%s: no data for %s seconds" % (self.origin.host, longest)))

    def _is_fast(self, now):
        """Whether enough of an answer that has begun is arriving"""
        arrived, served, since = self._measured
        if now - since < RATE_SECONDS and served == self.served:
            return True
        self._measured = self.arrived, self.served, now
        return served != self.served or not self.in_flight or not 0 < self.arrived - arrived < MIN_RATE * (now - since)
