# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""One conversation after the other with a connection of the series, without a network. http.py and sftp.py call this.

A Conversation has a connection of its own for each input, and is its owner, as
host.py is. Its kinds make what the server sends.

    talk = SFTP()
    talk.run(random.Random(1))          # raises Fault
    talk.close()
"""

import os
import tempfile
import traceback

from bb.connections import ConnectionCacheError
from bb.connections.connection import BUFFER
from bb.connections.request import Request, last_modified
from netqueue.fuzz.eventloop import Loop
from netqueue.fuzz.fault import must
from netqueue.fuzz.mutation import pieces

# Requests of an input, and thereby files
MOST = 8
# Times that something arrives in an input
STEPS = 400


class Files:
    """Descriptors for bodies"""

    def __init__(self):
        self.fds = []

    def get(self, place):
        """That file, empty"""
        while place >= len(self.fds):
            file, name = tempfile.mkstemp()
            os.unlink(name)
            self.fds.append(file)
        os.ftruncate(self.fds[place], 0)
        return self.fds[place]

    def close(self):
        for fd in self.fds:
            os.close(fd)


class Transport:
    """takes what is written"""

    def __init__(self, take):
        self.write = take
        self.aborted = False

    def abort(self):
        self.aborted = True


def watched(kind):
    """That class of connections, which keeps what else than an error of bb.connections ends its parser"""
    class Watched(kind):
        fault = None

        def parse(self):
            try:
                yield from super().parse()
            except ConnectionCacheError:
                raise
            except Exception:
                self.fault = traceback.format_exc()
                raise
    return Watched


class Conversation:
    """
    One connection after the other, with the owner's part of it.

    loop, connection, requests      of the present input; requests are those that were sent
    answers                         {request: (response, error)}
    bodies                          {target: what the file holds}
    intact                          whether nothing is changed

    kind is the class of the connection, as watched() returns it; asks_for_first_byte whether a GET without a file is one
    that is only about the answer.
    """
    kind = None
    asks_for_first_byte = False

    def __init__(self):
        self.files = Files()

    def close(self):
        self.files.close()

    def run(self, rng):
        self.rng = rng
        self.loop = Loop()
        self.requests, self.answers, self.bodies = [], {}, {}
        self.ends = 0
        self.received = 0
        self.intact = not rng.randrange(10)
        self.begin()
        for step in range(STEPS):
            data = self.next()
            if data is None or not self.connection.is_open:
                break
            for piece in pieces(rng, data):
                if self.connection.is_open:
                    self.feed(piece)
            if not self.intact:
                self.disturb()
        if self.intact:
            must(self.connection.is_open and not self.connection.in_flight, "ended, or %d requests are not answered" %
                 len(self.connection.in_flight))
        self.finish()

    def feed(self, data):
        connection = self.connection
        while data and connection.is_open:
            buffer = connection.get_buffer(-1)
            must(0 < len(buffer) <= BUFFER, "a buffer of %d bytes" % len(buffer))
            size = min(len(data), len(buffer))
            buffer[:size] = data[:size]
            self.received += size
            connection.buffer_updated(size)
            data = data[size:]
            must(not connection.is_open or connection.start <= connection.end <= BUFFER,
                 "the buffer is used from %d to %d" % (connection.start, connection.end))
            must(connection.fault is None, connection.fault)

    def disturb(self):
        """Sometimes time passes, or a request is cancelled"""
        chance = self.rng.randrange(40)
        if chance == 0:
            self.loop.advance(self.rng.choice((1, 31, 1000)))
        elif chance == 1 and self.requests:
            self.rng.choice(self.requests).cancelled = True

    def finish(self):
        connection = self.connection
        end = self.rng.randrange(4)
        if end == 0:
            connection.eof_received()
        elif end == 1:
            connection.connection_lost(ConnectionResetError("reset"))
        elif end == 2:
            self.loop.advance(100000)
        connection.close()
        must(connection.fault is None, connection.fault)
        must(self.ends == 1 and not connection.is_open, "ended %d times" % self.ends)
        must(connection.transport.aborted, "the transport is open")
        must(not self.loop.timers, "a timer is left")
        left = list(connection.in_flight)
        must(len(left) + len(self.answers) == len(self.requests) and set(left) | set(self.answers) == set(self.requests),
             "%d requests, %d answers, %d left" % (len(self.requests), len(self.answers), len(left)))
        self.check_files()

    def check_files(self):
        for request in self.requests:
            if request.fd is None:
                continue
            size = os.fstat(request.fd).st_size
            must(request.received <= self.received, "%d bytes of a body, of %d" % (request.received, self.received))
            response, error = self.answers.get(request, (None, None))
            if response and response.status == 200:
                must(size == response.length == request.received,
                     "complete with %s bytes, announced %s, received %s" % (size, response.length, request.received))
                if self.intact:
                    must(os.pread(request.fd, size + 1, 0) == self.bodies[request.target], "wrong bytes")

    def make_requests(self, count):
        made = []
        for place in range(count):
            gets = self.rng.randrange(2)
            fd = self.files.get(len(self.requests) + place) if gets else None
            # A GET without a file asks for the first byte
            method = "GET" if gets or self.rng.randrange(8) == 0 and self.asks_for_first_byte else "HEAD"
            made.append(Request(method, self.url(len(self.requests) + place), {}, fd=fd, empty=bool(gets)))
        return made

    def send(self, requests):
        self.requests += requests
        for request in requests:
            request.sent = self.loop.time()
        self.connection.send(requests)

    # The owner's

    def answered(self, connection, answers):
        must(connection is self.connection and not self.ends, "answers behind the end")
        for request, response, error in answers:
            must(request in self.requests and request not in self.answers, "a second answer to %s" % request.url)
            must((response is None) != (error is None), "%s and %s" % (response, error))
            self.answers[request] = response, error
            if response:
                verdict = connection.classify(request, response)
                must((verdict[0] is None) != (verdict[1] is None), "%s and %s" % verdict)
                last_modified(response.headers)
                hash(response.validators)

    def ended(self, connection, error):
        must(error is None or isinstance(error, ConnectionCacheError), "ended by %r" % error)
        str(error)
        self.ends += 1
