# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""Mutated answers and packets for HTTPConnection and SFTPConnection, of `scripts/bench fuzz`. runner.py calls this.
plainhttp.py has HTTP without TLS.

HTTP and SFTP hold one conversation after the other, each with a connection of
its own and without a network, and are its owner, as host.py is.

    talk = SFTP()
    talk.run(random.Random(1))          # raises Fault
    talk.close()
"""

import os
import struct
import tempfile
import traceback

from bb.connections import ConnectionCacheError
from bb.connections.connection import BUFFER
from bb.connections.http import HTTPConnection
from bb.connections.request import Request, last_modified
from bb.connections.sftp import WINDOW, SFTPConnection
from netqueue.fuzz.mutation import Loop, must, mutate, pieces

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


class SSH:
    def __init__(self):
        self.ended = False

    def end(self):
        self.ended = True


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
    """
    kind = None

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
            method = "GET" if gets or self.rng.randrange(8) == 0 and self.kind is WatchedHTTP else "HEAD"
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
                verdict = connection.judge(request, response)
                must((verdict[0] is None) != (verdict[1] is None), "%s and %s" % verdict)
                last_modified(response.headers)
                hash(response.validators)

    def ended(self, connection, error):
        must(error is None or isinstance(error, ConnectionCacheError), "ended by %r" % error)
        str(error)
        self.ends += 1


class HTTP(Conversation):
    """The answers are made together with the requests"""
    # With TLS long bodies do not go by splice(2)
    host = "https://mirror.example"
    # Of the long bodies, and how many bodies there are for one of these
    longs, usual = (5000, 70000, 600000), 60

    def url(self, place):
        return "%s/%d" % (self.host, place)

    def begin(self):
        request = Request("HEAD", self.url(0), {})
        self.connection = self.kind(self.loop, self, request.origin, request.route, 100)
        self.connection.connection_made(self.transport())
        self.rounds = self.rng.choice((1, 1, 2, 3))

    def transport(self):
        return Transport(lambda data: None)

    def next(self):
        if not self.rounds or self.connection.in_flight and self.intact:
            return None
        self.rounds -= 1
        requests = self.make_requests(self.rng.randint(1, MOST // 3))
        answers = bytearray(b"".join(map(self.answer, requests)))
        self.send(requests)
        if not self.intact:
            for _ in range(self.rng.choice((0, 1, 1, 2, 5))):
                mutate(self.rng, answers)
        return bytes(answers)

    def answer(self, request):
        rng = self.rng
        end = b"\n" if rng.randrange(10) == 0 else b"\r\n"
        status = rng.choice((200, 200, 200, 200, 404, 302, 503, 206, 204, 304, 416))
        size = rng.choice((0, 1, 5, 100, 300))
        # A long body that is not needed ends the connection
        if status == 200 and request.fd is not None and not rng.randrange(self.usual):
            size = rng.choice(self.longs)
        body = (rng.randbytes(min(size, 997)) * (1 + size // 997))[:size]
        self.bodies[request.target] = body
        lines = [b"HTTP/1.1 %d Whatever" % status, b'ETag: "%d"' % rng.getrandbits(30),
                 b"Last-Modified: Tue, 07 Jul 2020 07:07:%02d GMT" % rng.randrange(60)]
        lines += rng.sample([b"Location: /x y", b"Location: %s/z" % self.host.encode(), b"Retry-After: 3", b"X: a" + end + b" folded",
                             b"Connection: keep-alive", b"Content-Range: bytes 0-0/%d" % size, b"Keep-Alive: timeout=5",
                             b"Retry-After: Tue, 07 Jul 2020 07:07:07 GMT"], rng.randrange(4))
        if request.method == "HEAD" or status in (204, 304):
            framed = b""
            if status not in (204, 304):
                lines.append(b"Content-Length: %d" % size)
        elif rng.randrange(3):
            lines.append((b"Content-Length: %d", b"Content-Length: %d, %d")[rng.randrange(8) == 0].replace(b"%d", b"%d" % size))
            framed = body
        else:
            lines.append(b"Transfer-Encoding: chunked")
            framed = self.chunks(body)
        head = end.join(lines) + end + end
        if rng.randrange(20) == 0:
            head = b"HTTP/1.1 100 Continue\r\n\r\n" + head
        return head + framed

    def chunks(self, body):
        parts = []
        while body:
            size = self.rng.randint(1, max(1, len(body)))
            parts.append(b"%x%s\r\n%s\r\n" % (size, self.rng.choice((b"", b"", b" ", b";a=b")), body[:size]))
            body = body[size:]
        return b"".join(parts) + b"0\r\n" + self.rng.choice((b"", b"", b"X: y\r\n")) + b"\r\n"


class SFTP(Conversation):
    """A server that answers what it is asked for; packets of it are changed"""
    INIT, VERSION, OPEN, CLOSE, READ, FSTAT, STAT, EXTENDED = 1, 2, 3, 4, 5, 8, 17, 200
    STATUS, HANDLE, DATA, ATTRS, EXTENDED_REPLY = 101, 102, 103, 105, 201

    def url(self, place):
        return "sftp://mirror.example/%d" % place

    def begin(self):
        self.ssh = SSH()
        request = Request("HEAD", self.url(0), {})
        self.connection = self.kind(self.loop, self, request.origin, request.route, 100, self.ssh)
        self.output = []
        self.asked = bytearray()
        self.open = {}
        # Bytes that READs have asked for
        self.wanted = 0
        self.rounds = self.rng.choice((1, 1, 2))
        self.harm = 0 if self.intact else self.rng.choice((2, 5, 20))
        self.connection.connection_made(Transport(self.take))

    def next(self):
        self.serve()
        if self.connection.greeted.done() and not self.connection.greeted.error and self.rounds \
                and not (self.output and self.rng.randrange(2)):
            self.rounds -= 1
            self.send(self.make_requests(self.rng.randint(1, MOST // 2)))
            self.serve()
        if not self.output:
            return None
        if self.rng.randrange(4) == 0:
            # SFTP allows any order
            self.rng.shuffle(self.output)
        packets = self.output[:self.rng.randint(1, len(self.output))]
        del self.output[:len(packets)]
        return b"".join(packets)

    def feed(self, data):
        super().feed(data)
        must(self.connection.reading <= WINDOW, "READs for %d bytes in flight" % self.connection.reading)

    def finish(self):
        super().finish()
        must(self.ssh.ended, "ssh has not ended")
        received = sum(request.received for request in self.requests)
        must(received <= self.wanted, "%d bytes of bodies, asked for %d" % (received, self.wanted))

    def take(self, data):
        # Served later: what fails here must not end the parser
        self.asked += data

    def serve(self):
        """Answer all that has been asked"""
        while self.asked:
            length, kind, ident = struct.unpack_from(">IBI", self.asked)
            rest = bytes(self.asked[9:4 + length])
            del self.asked[:4 + length]
            if kind == self.INIT:
                extensions = [b"", struct.pack(">I18sI1s", 18, b"limits@openssh.com", 1, b"1")][self.rng.randrange(2)]
                answer = self.VERSION, struct.pack(">I", 3), extensions
            else:
                answer = self.answer(kind, ident, rest)
            self.put(*answer)

    def answer(self, kind, ident, rest):
        size, = struct.unpack_from(">I", rest)
        subject, rest = rest[4:4 + size], rest[4 + size:]
        ident = struct.pack(">I", ident)
        if kind == self.EXTENDED:
            return self.EXTENDED_REPLY, ident, struct.pack(">QQQQ", 256 * 1024, 255 * 1024, 0, self.rng.choice((0, 1, 4)))
        if kind == self.STAT:
            return self.attributes(ident, subject)
        if kind == self.OPEN:
            if self.body(subject) is None or self.rng.randrange(20) == 0:
                return self.status(ident)
            handle = b"%d" % len(self.open)
            self.open[handle] = subject
            return self.HANDLE, ident, struct.pack(">I", len(handle)) + handle
        path = self.open.get(subject)
        if path is None:
            # The handle was changed
            return self.status(ident)
        if kind == self.FSTAT:
            return self.attributes(ident, path)
        if kind == self.READ:
            offset, size = struct.unpack(">QI", rest)
            self.wanted += size
            data = (self.body(path) or b"")[offset:offset + min(size, self.rng.choice((100, 1 << 20)))]
            return (self.DATA, ident, struct.pack(">I", len(data)) + data) if data else self.status(ident, 1)
        return self.status(ident, 0)

    def body(self, path):
        """What the file holds, None if there is none"""
        if path not in self.bodies:
            rng = self.rng
            size = rng.choice((0, 1, 100, 1000)) if rng.randrange(30) else rng.choice((40000, 300000))
            self.bodies[path] = None if rng.randrange(5) == 0 else bytes([rng.randrange(256)]) * size
        return self.bodies[path]

    def attributes(self, ident, path):
        body = self.body(path)
        if body is None:
            return self.status(ident)
        flags = 1 | 4 | self.rng.choice((0, 2, 8))
        owner = struct.pack(">II", 0, 0) if flags & 2 else b""
        return self.ATTRS, ident, struct.pack(">IQ", flags, len(body)) + owner + struct.pack(">I", 0o100644)

    def status(self, ident, code=None):
        code = self.rng.choice((2, 3, 4, 8)) if code is None else code
        return self.STATUS, ident, struct.pack(">II", code, 4) + b"text" + struct.pack(">I", 0)

    def put(self, kind, ident, rest):
        """Queue a packet, or what becomes of it"""
        rng = self.rng
        copies = 1
        packet = bytearray(struct.pack(">IB", 1 + len(ident) + len(rest), kind) + ident + rest)
        if self.harm and rng.randrange(self.harm) == 0:
            change = rng.randrange(9)
            if change == 0:
                packet[4] = rng.choice((1, 2, 101, 102, 103, 104, 105, 201, 255))
            elif change == 1:
                packet[5:9] = struct.pack(">I", rng.choice((0, 1, 2, 3, 1 << 31)))
            elif change == 2:
                packet[:4] = struct.pack(">I", max(0, len(packet) - 4 + rng.choice((-5, -4, -1, 1, 4, 1 << 18, 1 << 30))))
            elif change == 3 and len(packet) > 13:
                packet[9:13] = struct.pack(">I", rng.choice((0, 1, 3, 5, 0xffffffff, rng.getrandbits(10))))
            elif change == 4 and len(packet) > 17:
                # With the length that belongs to it
                del packet[rng.randrange(9, len(packet)):]
                packet[:4] = struct.pack(">I", len(packet) - 4)
            elif change == 5:
                copies = rng.choice((0, 2))
            elif change == 6 and len(packet) > 12:
                # The same, also that of a string
                more = rng.choice((1, 1, 100, 100, 40000, 600000))
                size, = struct.unpack_from(">I", packet, 9)
                packet[9:13] = struct.pack(">I", min(size + more, 0xffffffff))
                packet += bytes(more)
                packet[:4] = struct.pack(">I", len(packet) - 4)
            else:
                mutate(rng, packet)
                if change == 7 and len(packet) > 4:
                    packet[:4] = struct.pack(">I", len(packet) - 4)
        self.output += [bytes(packet)] * copies


WatchedHTTP, WatchedSFTP = watched(HTTPConnection), watched(SFTPConnection)
HTTP.kind, SFTP.kind = WatchedHTTP, WatchedSFTP
