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

# Bytes of the receive buffer, and what is free in it at least when data is read
BUFFER = 512 * 1024
MIN_READ = 128 * 1024


class Connection(asyncio.BufferedProtocol):
    """
    timeout is how many seconds without any data end the connection while
    requests are in flight, idle how many seconds it may be unused.

    origin, route   which host, and how it is reached
    in_flight       requests that are not answered yet, in the order of sending
    served          number of answers so far
    announced       the server has announced that it closes the connection
    retiring        the owner sends no further requests on it
    """
    # Open connections to a host one after the other only; try whether requests can be pipelined
    serial = False
    tried = False

    def __init__(self, loop, owner, origin, route, timeout):
        self.loop = loop
        self.owner = owner
        self.origin = origin
        self.route = route
        self.timeout = timeout
        self.idle = timeout
        self.in_flight = collections.deque()
        self.served = 0
        self.announced = self.retiring = False
        self.transport = None
        self.is_open = False
        # What has been received and not been used yet is between start and end
        self.data = bytearray(BUFFER)
        self.view = memoryview(self.data)
        self.start = self.end = 0
        self._answers = []
        self._heard = 0
        self._timer = None
        self._parser = self.parse()

    # Of asyncio

    def connection_made(self, transport):
        self.transport = transport
        self.is_open = True
        self._heard = self.loop.time()
        next(self._parser)
        self._watch()

    def get_buffer(self, sizehint):
        if self.start == self.end:
            self.start = self.end = 0
        elif BUFFER - self.end < MIN_READ:
            size = self.end - self.start
            self.data[:size] = self.data[self.start:self.end]
            self.start, self.end = 0, size
        return self.view[self.end:]

    def buffer_updated(self, nbytes):
        self.end += nbytes
        self.updated()

    def updated(self):
        """Data has arrived"""
        if self.is_open:
            self._heard = self.loop.time()
            self._resume(lambda: next(self._parser))

    def eof_received(self):
        self.connection_lost(None)

    def connection_lost(self, exc):
        if self.is_open:
            self._resume(lambda: self._parser.throw(self.error_of_end(exc)))

    # For the owner

    def set_timeout(self, seconds):
        """Allow so many seconds without data while requests are in flight"""
        self.timeout = seconds
        self._watch()

    def set_idle(self, seconds):
        """No request is in flight: close the connection if that stays so for so many seconds"""
        self.idle = seconds
        self._heard = self.loop.time()
        self._watch()

    def send(self, requests):
        """Send requests, which are in flight then"""
        was_idle = not self.in_flight
        self.in_flight.extend(requests)
        if was_idle:
            self._heard = self.loop.time()
            self._watch()

    def close(self, error=None):
        """End the connection. owner.ended() is called, unless it was before."""
        if self.is_open:
            self.is_open = False
            self._timer.cancel()
            self._parser.close()
            self.transport.abort()
            self.owner.ended(self, error)

    # For subclasses

    @staticmethod
    def judge(request, response):
        """Returns (response, None), or (None, error) with the error or the change of request that response means"""
        return response, None

    def parse(self):
        """Generator that uses what is between start and end. Returns when the server ends the connection in an orderly way."""
        raise NotImplementedError

    def answer(self, request, response, error=None):
        """request is answered, and not in flight any more"""
        self.served += 1
        self._answers.append((request, response, error))

    def in_answer(self):
        """Whether a part of an answer has been received"""
        return self.start != self.end

    def error_of_end(self, exc):
        reason = "%s: %s" % (self.origin.host, exc or "closed by the server")
        return ProtocolError(reason + " in the middle of an answer") if self.in_answer() else Disconnected(reason)

    def _resume(self, parse):
        error = None
        try:
            parse()
            ended = False
        except StopIteration:
            ended = True
        except ConnectionCacheError as e:
            ended, error = True, e
        except Exception as e:
            ended, error = True, ProtocolError("%s: %r" % (self.origin.host, e))
        answers, self._answers = self._answers, []
        if ended:
            # Before its answers are passed on: nothing may be sent on it any more
            self.is_open = False
            self._timer.cancel()
            self.transport.abort()
        if answers:
            self.owner.answered(self, answers)
        if ended:
            self.owner.ended(self, error)

    def _watch(self):
        """Set the timer anew, or act if the time is over"""
        if self._timer:
            self._timer.cancel()
        if not self.is_open:
            return
        due = self._heard + (self.timeout if self.in_flight else self.idle)
        if due > self.loop.time():
            self._timer = self.loop.call_at(due, self._watch)
        elif self.in_flight:
            self.close(TimedOutError("%s: no data for %s seconds" % (self.origin.host, self.timeout)))
        else:
            self.close()
