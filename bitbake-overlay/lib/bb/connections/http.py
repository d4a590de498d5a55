#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
An HTTP/1.1 connection, with or without TLS: HEAD, and GET into a descriptor.

Used by connectionset.py in the event loop's thread; host.py receives the answers
and decides on retries and the number of requests in flight. Follows RFC 9110 and
RFC 9112, including pipelining (9.3.2). Proxy and certificates are those of the
request's route, since the environment of a task differs from the server's.

    connection = await connect(loop, host, origin, route, timeout)
    connection.send(requests)       # host.answered() and host.ended() are called
"""

import asyncio
import re
import select
import ssl

import bb
import bb.utils
from bb.connections import splice
from bb.connections import (Cancelled, ConnectError, Disconnected, IdleClosed, InconsistentAnswer, ProtocolError,
                            RefusedError, Resubmit, StatusError)
from bb.connections.connection import Connection
from bb.connections.request import ABSENT, DEFAULT_PORTS, Response, redact, retry_after

# Parts of an answer. A header matches with the preceding line end, and with continuation lines (FOLDED) joined before. Some
# servers end lines with LF only (RFC 9112 2.2).
STATUS = re.compile(r"HTTP/1\.([01]) ([0-9]{3})(?![0-9])[^\r\n]*")
HEADER = re.compile(r"\r?\n([!-9;-~]+)[ \t]*:([^\r\n]*)")
FOLDED = re.compile(r"\r?\n[ \t]+")
LINE_END = re.compile(rb"\r?\n")
CHUNK_END = re.compile(rb"\r\n")
HEAD_END = re.compile(rb"\r?\n\r?\n")
# Content-Length, which may be repeated (RFC 9112 6.3)
LENGTH = re.compile(r"([0-9]{1,18})(?:,[ \t]*\1)*")
# The line before a chunk
CHUNK = re.compile(r"[ \t]*([0-9A-Fa-f]{1,16})[ \t]*(?:;.*)?")

# Statuses with which Location is followed
REDIRECTS = (301, 302, 303, 307, 308)
# Statuses of a server that refuses requests for now; other errors with Retry-After are refusals as well
REFUSED = (408, 418, 420, 429, 503)
# Redirects that are followed for each request: more are probably a loop
MAX_REDIRECTS = 10
# Bytes of a head, of a chunk's first line, of the trailers, and of a body that is not needed: reconnecting is cheaper beyond
MAX_OVERHEAD = 64 * 1024
# Interim answers (1xx) before the final one, so that a faulty server does not keep a connection busy for ever
MAX_INTERIM = 100
# Bytes of a body below which splice(2) costs more than it saves
MIN_SPLICE = 256 * 1024
# Seconds until the next address of a host is tried in parallel: the Connection Attempt Delay that RFC 8305 recommends
HAPPY_EYEBALLS = 0.25


async def connect(loop, owner, origin, route, timeout, connection=None):
    """Returns an open HTTPConnection, the given one or a new one. Raises ConnectError."""
    connection = connection or HTTPConnection(loop, owner, origin, route, timeout)
    host, port = route.proxy[:2] if route.proxy else (origin.host, origin.port)
    tls = {}
    if origin.scheme == "https":
        try:
            tls = {"ssl": bb.utils.tls_context(route.verify, route.cafile, route.capath),
                   "server_hostname": origin.host, "ssl_handshake_timeout": timeout}
        except OSError as e:
            raise ConnectError("certificates for %s: %s" % (origin.host, e), retryable=False) from e
    try:
        if tls and route.proxy:
            tunnel = await _tunnel(loop, origin, route)
            # start_tls() does not call connection_made()
            connection.connection_made(await loop.start_tls(tunnel, connection, tls.pop("ssl"), **tls))
        else:
            await loop.create_connection(lambda: connection, host, port, happy_eyeballs_delay=HAPPY_EYEBALLS, **tls)
    except ssl.SSLCertVerificationError as e:
        raise ConnectError("certificate of %s: %s" % (origin.host, e.verify_message), retryable=False) from e
    except (OSError, ValueError) as e:
        raise ConnectError("cannot connect to %s port %s: %s" % (host, port, str(e) or repr(e))) from e
    return connection

async def _tunnel(loop, origin, route):
    """Returns the transport of a connection through a proxy (RFC 9110 9.3.6)"""
    host, port, login = route.proxy
    reader = asyncio.StreamReader()
    transport, _ = await loop.create_connection(lambda: asyncio.StreamReaderProtocol(reader), host, port,
                                                happy_eyeballs_delay=HAPPY_EYEBALLS)
    try:
        name = _authority(origin, True)
        login = "Proxy-Authorization: %s\r\n" % login if login else ""
        transport.write(("CONNECT %s HTTP/1.1\r\nHost: %s\r\n%s\r\n" % (name, name, login)).encode("ascii"))
        answer = ""
        while "\r\n\r\n" not in answer and len(answer) < MAX_OVERHEAD:
            data = await reader.read(MAX_OVERHEAD)
            if not data:
                raise ConnectionError("closed by the proxy")
            answer += data.decode("iso-8859-1")
        match = STATUS.match(answer)
        status = match[2] if match else "an invalid answer"
        if status[0] != "2":
            raise ConnectError("proxy %s answered %s to CONNECT" % (host, status), status in ("502", "503", "504"))
        if not answer.endswith("\r\n\r\n"):
            # It could be mistaken for data from the origin
            raise ConnectError("proxy %s sent more than its answer to CONNECT" % host)
        return transport
    except BaseException:
        transport.abort()
        raise

def _authority(origin, always_port=False):
    host = "[%s]" % origin.host if ":" in origin.host else origin.host
    if always_port or origin.port != DEFAULT_PORTS[origin.scheme]:
        host += ":%s" % origin.port
    return host


class HTTPConnection(Connection):
    """version is the HTTP version of the last answer, (1, 1) or (1, 0), or None; authority the value of Host"""
    needs_trial = True

    def __init__(self, loop, owner, origin, route, timeout):
        super().__init__(loop, owner, origin, route, timeout)
        self.version = None
        # Whether several requests have been in flight together since the connection was last idle
        self._pipelined = False
        self._last = Response(None, {}, None)
        self._plain = origin.scheme == "http"
        host = self.authority = _authority(origin)
        self._prefix = self._headers = ""
        if self._plain and route.proxy:
            self._prefix = "http://" + host
            if route.proxy[2]:
                self._headers = "Proxy-Authorization: %s\r\n" % route.proxy[2]
        self._headers += "Host: %s\r\nUser-Agent: bitbake/%s\r\nAccept: */*\r\nAccept-Encoding: identity\r\n" % \
                         (host, bb.__version__)

    def send(self, requests):
        """Send requests. Does not block; closes the connection if it has received data while it was idle."""
        quiet = self.in_flight or not self._plain or self._is_quiet()
        self._pipelined = len(self.in_flight) + len(requests) > 1 or self._pipelined and bool(self.in_flight)
        super().send(requests)
        if quiet:
            self.transport.write("".join([self._head(request) for request in requests]).encode("ascii"))
        else:
            self.close(IdleClosed("%s: closed by the server, or an answer without a request" % self.origin.host))

    def _is_quiet(self):
        """Whether there is no data that would be mistaken for an answer. Not for TLS, where it may be a session ticket."""
        poll = select.poll()
        poll.register(self.transport.get_extra_info("socket").fileno(), select.POLLIN)
        return not poll.poll(0)

    def _head(self, request):
        head = "%s %s%s HTTP/1.1\r\n%s" % (request.method, self._prefix, request.target, self._headers)
        if request.method == "GET" and request.fd is None:
            head += "Range: bytes=0-0\r\n"
        if request.authorization:
            head += "Authorization: %s\r\n" % request.authorization
        return head + "\r\n"

    @staticmethod
    def classify(request, response):
        status, headers, _ = response
        if request.dropped_authorization and status in (401, 403):
            # The fetcher sends the credentials to the other host as well
            return None, StatusError("%s: status %s after a redirect to another host" % (redact(request.url), status), status)
        if status in REFUSED or status >= 400 and status not in ABSENT and "retry-after" in headers:
            return None, RefusedError("%s: status %s" % (redact(request.url), status), retry_after(headers))
        if status in REDIRECTS and headers.get("location"):
            try:
                if request.redirects >= MAX_REDIRECTS:
                    raise ValueError("more than %s redirects" % MAX_REDIRECTS)
                request.redirect(headers["location"])
            except ValueError as e:
                return None, StatusError("%s: %s" % (redact(request.url), e), status)
            return None, Resubmit()
        if request.method == "GET" and request.fd is None and status in (206, 416):
            # The answer to a request for the first byte: "bytes 0-0/SIZE", or "bytes */0" (RFC 9110 14.4)
            match = LENGTH.fullmatch(headers.get("content-range", "").rpartition("/")[2])
            size = int(match[1]) if match else None
            if status == 206 or size == 0:
                return Response(200, headers, size), None
        return response, None

    def parse(self):
        interim = 0
        while True:
            while self.start == self.end:
                yield
            if not self.in_flight:
                # RFC 9112 9.2. For example the 408 of a server that has waited for a first request.
                raise IdleClosed("%s: an answer without a request" % self.origin.host)
            response = self._parse_head((yield from self._read_until(HEAD_END, MAX_OVERHEAD)))
            if response.status < 200:
                interim += 1
                if interim > MAX_INTERIM:
                    raise ProtocolError("%s: more than %s interim answers" % (self.origin.host, MAX_INTERIM))
                continue
            interim = 0
            request, end_known = self.in_flight[0], True
            self._check(request, response)
            if request.method != "HEAD" and response.status not in (204, 304):
                self.in_answer = True
                response, end_known = yield from self._read_body(request, response)
                self.in_answer = False
                self._check(request, response)
            if end_known and self.start != self.end and self.served and len(self.in_flight) == 1:
                # This answer may be stray data that followed the one before (RFC 9112 6.3): discard it
                self.has_stray_data = True
                raise Disconnected("%s: unexpected data after an answer" % self.origin.host)
            self.in_flight.popleft()
            self._last = response
            self.answer(request, response)
            # Whether the connection persists (RFC 9112 9.3)
            tokens = response.headers.get("connection", "").lower()
            self.close_announced = "close" in tokens
            if self.close_announced or not end_known or self.version == (1, 0) and "keep-alive" not in tokens:
                return

    def _read_until(self, end, limit):
        """Consume and return the text before end, a regular expression that has to match within about limit bytes"""
        while True:
            match = end.search(self.data, self.start, min(self.start + limit + 4, self.end))
            if match:
                text = str(self.view[self.start:match.start()], "iso-8859-1")
                self.start = match.end()
                return text
            if self.end - self.start >= limit + 4:
                raise ProtocolError("%s: a line or a head is longer than %s bytes" % (self.origin.host, limit))
            yield

    def _parse_head(self, head):
        """Returns a Response. Repeated headers are joined to a list (RFC 9110 5.3)."""
        if "\n " in head or "\n\t" in head:
            head = FOLDED.sub(" ", head)
        match = STATUS.match(head)
        fields = HEADER.findall(head)
        if not match or len(fields) != head.count("\n") or head.count("\r") != head.count("\r\n"):
            raise ProtocolError("%s: invalid HTTP/1 answer %r" % (self.origin.host, head[:80]))
        self.version = (1, int(match[1]))
        headers = {}
        for name, value in fields:
            name, value = name.lower(), value.strip()
            headers[name] = "%s, %s" % (headers[name], value) if name in headers else value
        length = headers.get("content-length")
        if length is not None:
            number = LENGTH.fullmatch(length)
            if not number:
                # For example different lengths, which indicate an attack or a fault (RFC 9112 6.3)
                raise ProtocolError("%s: invalid Content-Length %r" % (self.origin.host, length[:80]))
            length = int(number[1])
        return Response(int(match[2]), headers, length)

    def _check(self, request, response):
        """
        Raise InconsistentAnswer if the answer may belong to another request: several were in flight, and it contradicts the
        HEAD of this file, or, without a HEAD, looks like another file in flight or like the previous answer, which may
        have been repeated.
        """
        if not self._pipelined:
            return
        if response.status == 400:
            # The server may have misread where the request begins
            raise InconsistentAnswer("%s: status 400" % redact(request.url))
        if request.fd is None:
            return
        found = response.length, response.validators
        if response.status != 200:
            odd = request.size is not None and response.status in ABSENT
        elif request.size is None:
            odd = any((other.size, other.validators) == found for other in self.in_flight) or \
                (self._last.length, self._last.validators) == found
        else:
            odd = response.length not in (None, request.size) or response.validators != request.validators
        if odd:
            raise InconsistentAnswer("%s: the answer (status %s, %s bytes) may belong to another request" %
                                     (redact(request.url), response.status, response.length))

    def _read_body(self, request, response):
        """Returns the Response with the length of the body, and whether its end is known, so that another answer can follow"""
        status, headers, length = response
        wanted = status == 200 and request.fd is not None
        if wanted:
            request.begin_body()
        coding = headers.get("transfer-encoding", "identity").lower()
        if coding != "identity":
            if coding != "chunked":
                raise ProtocolError("%s: unsupported Transfer-Encoding %r" % (redact(request.url), coding[:80]))
            size = yield from self._read_chunks(request, wanted)
            # If there is a Content-Length as well, the next answer cannot be trusted (RFC 9112 6.3)
            return Response(status, headers, size), length is None
        if length is None and wanted:
            # The body ends with the connection, so it is unknown whether it is complete
            raise StatusError("%s: the server does not announce the size of the file" % redact(request.url), status)
        if length is None or not wanted and length > MAX_OVERHEAD:
            return Response(status, headers, None), False
        yield from self._read_bytes(request, length, wanted)
        return response, True

    def _read_chunks(self, request, wanted):
        """RFC 9112 7.1. Returns the size of the body."""
        total = 0
        while True:
            line = yield from self._read_until(LINE_END, MAX_OVERHEAD)
            match = CHUNK.fullmatch(line)
            if not match:
                raise ProtocolError("%s: invalid chunk size %r" % (redact(request.url), line[:80]))
            size = int(match[1], 16)
            if not size:
                left = MAX_OVERHEAD
                while line:
                    line = yield from self._read_until(LINE_END, left)
                    left = max(0, left - len(line) - 2)
                return total
            total += size
            if not wanted and total > MAX_OVERHEAD:
                raise ProtocolError("%s: the body that is not needed is too long" % redact(request.url))
            yield from self._read_bytes(request, size, wanted)
            # Not LF alone: that may be the second byte behind a chunk which is too long
            if (yield from self._read_until(CHUNK_END, 0)):
                raise ProtocolError("%s: a chunk is longer than its size" % redact(request.url))

    def _read_bytes(self, request, size, wanted):
        """Write size bytes into the file, or discard them if they are not wanted"""
        while True:
            n = min(size, self.end - self.start)
            if wanted:
                request.write(self.view[self.start:self.start + n])
            self.start += n
            size -= n
            if not size:
                return
            if request.cancelled:
                raise Cancelled()
            if wanted and size >= MIN_SPLICE and splice.is_supported and self._plain:
                break
            yield
        with splice.Splice(self.loop, self.transport, request.fd, request.received, size, self.updated) as moving:
            while moving.left:
                yield
                self.arrived += moving.offset - request.received
                request.received = moving.offset
                if moving.error:
                    raise moving.error
                if request.cancelled:
                    raise Cancelled()
