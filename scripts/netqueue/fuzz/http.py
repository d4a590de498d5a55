# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""Mutated answers for an HTTPConnection, of `scripts/bench fuzz`. runner.py calls this. plainhttp.py has HTTP without TLS."""

from bb.connections.http import HTTPConnection
from bb.connections.request import Request
from netqueue.fuzz.conversation import MOST, Conversation, Transport, watched
from netqueue.fuzz.mutation import mutate


class HTTP(Conversation):
    """The answers are made together with the requests"""
    kind = watched(HTTPConnection)
    asks_for_first_byte = True
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
