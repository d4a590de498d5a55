# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""Mutated packets for an SFTPConnection, of `scripts/bench fuzz`. runner.py calls this."""

import struct

from bb.connections.request import Request
from bb.connections.sftp import WINDOW, SFTPConnection
from netqueue.fuzz.conversation import MOST, Conversation, Transport, watched
from netqueue.fuzz.fault import must
from netqueue.fuzz.mutation import mutate


class SSH:
    def __init__(self):
        self.ended = False

    def end(self):
        self.ended = True


class SFTP(Conversation):
    """A server that answers what it is asked for; packets of it are changed"""
    kind = watched(SFTPConnection)
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
