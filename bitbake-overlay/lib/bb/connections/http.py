#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
One HTTP/1.1 connection, with or without TLS: HEAD, and GET into a descriptor.

Used by host.py, which takes care of redirects, retries and the number of
requests in flight. Follows RFC 9110 and RFC 9112, with pipelining (9.3.2).
Proxy and certificates come with the request, since the environment of a task
is not that of the server.

    connection = await connect(loop, host, origin, route, timeout)
    connection.send(requests)       # host.answered() and host.ended() are called
"""

import asyncio
import os
import re
import select
import ssl

import bb
import bb.utils
from bb.connections import splice
from bb.connections import (Cancelled, Changed, ConnectError, Disagreement, IdleClosed, ProtocolError, RefusedError,
                            StatusError)
from bb.connections.connection import Connection
from bb.connections.request import ABSENT, DEFAULT_PORTS, MAX_DIGITS, Response, redact, retry_after, unwritable

# The first line of an answer, and a header with the end of the line before it
STATUS = re.compile(r"HTTP/1\.([01]) ([0-9]{3})(?![0-9])[^\r\n]*")
HEADER = re.compile(r"\r\n([!-9;-~]+):([^\r\n]*)")

REDIRECTS = (301, 302, 303, 307, 308)
MAX_REDIRECTS = 10
# Statuses of a server that declines to serve now, and of one that may do so for HEAD only
REFUSED = (408, 429, 503)
HEAD_REFUSED = (403, 405)

# Bytes: the head of an answer; a body that is read although it is not wanted, so that the connection can be kept
MAX_HEAD = 64 * 1024
MAX_DISCARD = 64 * 1024
MAX_CHUNK_LINE = 4096
# Bytes of a body that are worth the preparation of splice(2)
MIN_SPLICE = 256 * 1024
MAX_TRAILERS = 100
# Seconds before the next address of a host is tried as well (RFC 8305 recommends 250 ms)
HAPPY_EYEBALLS = 0.25


async def connect(loop, owner, origin, route, timeout):
    """Returns an HTTPConnection. Raises ConnectError, also if the certificate is not trusted."""
    connection = HTTPConnection(loop, owner, origin, route, timeout)
    host, port = route.proxy[:2] if route.proxy else (origin.host, origin.port)
    secure = {}
    try:
        if origin.scheme == "https":
            secure = {"ssl": _context(origin, route), "server_hostname": origin.host, "ssl_handshake_timeout": timeout}
        if route.proxy and secure:
            tunnel = await _tunnel(loop, origin, route)
            context = secure.pop("ssl")
            # connection_made() is up to the caller of start_tls()
            connection.connection_made(await loop.start_tls(tunnel, connection, context, **secure))
        else:
            await loop.create_connection(lambda: connection, host, port, happy_eyeballs_delay=HAPPY_EYEBALLS, **secure)
    except ssl.SSLCertVerificationError as e:
        raise ConnectError("certificate of %s: %s" % (origin.host, e.verify_message), retryable=False) from e
    except (OSError, ValueError) as e:
        raise ConnectError("cannot connect to %s port %s: %s" % (host, port, str(e) or repr(e))) from e
    return connection

def _context(origin, route):
    try:
        return bb.utils.tls_context(route.verify, route.cafile, route.capath)
    except OSError as e:
        raise ConnectError("certificates for %s: %s" % (origin.host, e), retryable=False) from e

async def _tunnel(loop, origin, route):
    """Returns the transport of a connection through a proxy (RFC 9110 9.3.6)"""
    host, port, login = route.proxy
    transport, tunnel = await loop.create_connection(lambda: Tunnel(loop), host, port, happy_eyeballs_delay=HAPPY_EYEBALLS)
    try:
        name = authority(origin, True)
        head = "CONNECT %s HTTP/1.1\r\nHost: %s\r\n" % (name, name)
        if login:
            head += "Proxy-Authorization: %s\r\n" % login
        transport.write((head + "\r\n").encode("ascii"))
        answer, _, behind = (await tunnel.answer).partition(b"\r\n\r\n")
        status = answer.partition(b" ")[2][:3].decode("iso-8859-1")
        if not answer.startswith(b"HTTP/1.") or not status.isdigit() or status[0] != "2":
            raise ConnectError("proxy %s answered %s to CONNECT" % (host, ascii(status)), status in ("502", "503", "504"))
        if behind:
            # Not from the origin, but it would be used as its first answer
            raise ConnectError("proxy %s sent more than its answer to CONNECT" % host)
        return transport
    except BaseException:
        transport.abort()
        raise


class Tunnel(asyncio.Protocol):
    """Receives the answer of a proxy to CONNECT. answer is a future of what has been received up to its end."""

    def __init__(self, loop):
        self.answer = loop.create_future()
        self._data = b""

    def data_received(self, data):
        self._data += data
        if (b"\r\n\r\n" in self._data or len(self._data) > MAX_HEAD) and not self.answer.done():
            self.answer.set_result(self._data)

    def connection_lost(self, exc):
        if not self.answer.done():
            self.answer.set_exception(exc or ConnectionError("closed by the proxy"))


def authority(origin, always_port=False):
    host = "[%s]" % origin.host if ":" in origin.host else origin.host
    if always_port or origin.port != DEFAULT_PORTS[origin.scheme]:
        host += ":%s" % origin.port
    return host


class HTTPConnection(Connection):
    """version is that of HTTP, (1, 1) or (1, 0), as in the last answer"""
    tried = True

    def __init__(self, loop, owner, origin, route, timeout):
        super().__init__(loop, owner, origin, route, timeout)
        self.version = None
        # More than one request is in flight, or was since there was none
        self._pipelined = False
        self._in_body = False
        proxied = route.proxy and origin.scheme == "http"
        self._prefix = "http://" + authority(origin) if proxied else ""
        headers = ["Host: " + authority(origin), "User-Agent: bitbake/" + bb.__version__, "Accept: */*",
                   "Accept-Encoding: identity"]
        if proxied and route.proxy[2]:
            headers.append("Proxy-Authorization: " + route.proxy[2])
        self._headers = " HTTP/1.1\r\n%s\r\n" % "\r\n".join(headers)

    def send(self, requests):
        """Does not block. The requests are in flight then, unless the connection has ended."""
        quiet = bool(self.in_flight) or self._is_quiet()
        self._pipelined = len(self.in_flight) + len(requests) > 1 or self._pipelined and bool(self.in_flight)
        super().send(requests)
        if quiet:
            self.transport.write("".join([self._head(request) for request in requests]).encode("ascii"))
        else:
            self.close(IdleClosed("%s: closed, or sent an answer without a request" % self.origin.host))

    def _is_quiet(self):
        """Whether there is nothing to read that would be mistaken for an answer. With TLS it may be a session ticket."""
        if self._has_tls():
            return True
        poll = select.poll()
        poll.register(self.transport.get_extra_info("socket").fileno(), select.POLLIN)
        return not poll.poll(0)

    def _has_tls(self):
        return self.origin.scheme == "https"

    def _head(self, request):
        head = "%s %s%s%s" % (request.method, self._prefix, request.target, self._headers)
        if request.method == "GET" and request.fd is None:
            head += "Range: bytes=0-0\r\n"
        if request.authorization:
            head += "Authorization: %s\r\n" % request.authorization
        return head + "\r\n"

    @staticmethod
    def judge(request, response):
        status, location = response.status, response.headers.get("location")
        if status in REFUSED:
            return None, RefusedError("%s: status %s" % (redact(request.url), status), retry_after(response.headers))
        if status in REDIRECTS and location:
            try:
                if request.redirects >= MAX_REDIRECTS:
                    raise ValueError("more than %s redirects" % MAX_REDIRECTS)
                request.redirect(location)
            except ValueError as e:
                return None, StatusError("%s: %s" % (redact(request.url), e), status)
            return None, Changed()
        if request.method == "HEAD" and status in HEAD_REFUSED:
            # As in fetch2/wget.py
            request.method = "GET"
            return None, Changed()
        if request.method == "GET" and request.fd is None:
            return of_whole_file(response), None
        return response, None

    # Answers

    def in_answer(self):
        return super().in_answer() or self._in_body

    def error_of_end(self, exc):
        if not self.in_flight:
            return IdleClosed("%s: closed by the server" % self.origin.host)
        return super().error_of_end(exc)

    def parse(self):
        while True:
            head = yield from self._read_until(b"\r\n\r\n", MAX_HEAD)
            if not self.in_flight:
                # RFC 9112 9.2; such as the 408 of a server that has waited for a first request
                raise IdleClosed("%s: sent an answer without a request" % self.origin.host)
            request = self.in_flight[0]
            status, headers = self._parse_head(head)
            if status < 200:
                continue
            response = Response(status, headers, self._length(request, headers))
            self._check(request, response)
            keep = True
            if request.method != "HEAD" and status not in (204, 304):
                self._in_body = True
                response, keep = yield from self._read_body(request, response)
                self._in_body = False
            self.in_flight.popleft()
            self.answer(request, response)
            # What follows may be part of this answer, or be meant to be mistaken for the next (RFC 9112 6.3)
            if not keep or not self._is_kept(headers) or not self.in_flight and self.start != self.end:
                return

    def _is_kept(self, headers):
        """Whether the server keeps the connection open (RFC 9112 9.3)"""
        tokens = headers.get("connection", "").lower()
        self.announced = "close" in tokens
        return not self.announced and (self.version >= (1, 1) or "keep-alive" in tokens)

    def _read_until(self, end, limit):
        """Returns what is before the bytes end, and removes both"""
        size = 0
        while True:
            # Only its last byte may have been missing, and get_buffer() may have moved the data
            pos = self.data.find(end, self.start + max(0, size - len(end) + 1), self.end)
            size = self.end - self.start
            if pos > self.start + limit or pos < 0 and size > limit:
                raise ProtocolError("%s: more than %s bytes in the head of an answer" % (self.origin.host, limit))
            if pos >= 0:
                head = bytes(self.view[self.start:pos])
                self.start = pos + len(end)
                return head
            yield

    def _parse_head(self, head):
        """Returns status, and headers with lower case names. Several values are joined as in a list (RFC 9110 5.3)."""
        head = head.decode("iso-8859-1")
        match = STATUS.match(head)
        fields = HEADER.findall(head)
        if not match or not len(fields) == head.count("\n") == head.count("\r"):
            raise ProtocolError("%s: not an HTTP/1 answer: %r" % (self.origin.host, head[:80]))
        self.version = (1, int(match[1]))
        headers = {}
        for name, value in fields:
            name, value = name.lower(), value.strip()
            headers[name] = "%s, %s" % (headers[name], value) if name in headers else value
        return int(match[2]), headers

    @staticmethod
    def _length(request, headers):
        """Content-Length, or None"""
        value = headers.get("content-length")
        if value is None:
            return None
        # The same length twice is one, two lengths are an attack or a fault (RFC 9112 6.3)
        length, *others = set(value.split(", "))
        if others or not (length.isascii() and length.isdigit() and len(length) <= MAX_DIGITS):
            raise ProtocolError("%s: Content-Length is %r" % (redact(request.url), value[:80]))
        return int(length)

    def _read_body(self, request, response):
        """Returns the Response, and whether the end of the body is known"""
        status, headers, length = response
        wanted = status == 200 and request.fd is not None
        if wanted:
            request.begin_body()
        coding = headers.get("transfer-encoding")
        if coding is not None:
            if coding.lower() != "chunked":
                raise ProtocolError("%s: Transfer-Encoding is %r" % (redact(request.url), coding[:80]))
            response = Response(status, headers, (yield from self._read_chunks(request, wanted)))
            self._check(request, response)
            # With both headers the next answer cannot be trusted (RFC 9112 6.3)
            return response, length is None
        if length is None and wanted:
            # The body ends with the connection: complete or not, nobody can tell
            raise StatusError("%s: the server does not announce the size of the file" % redact(request.url), status)
        if length is None or not wanted and length > MAX_DISCARD:
            return Response(status, headers, None), False
        if wanted and length <= self.end - self.start:
            self._write(request, length)
        else:
            yield from self._read_bytes(request, length, wanted)
        return response, True

    def _check(self, request, response):
        """
        With several requests in flight, an answer that contradicts the HEAD may be the one to another request. So may
        one about a file without HEAD that looks like another file in flight.
        """
        if not self._pipelined or request.fd is None:
            return
        found = response.length, response.validators
        if request.size is None:
            odd = response.status == 200 and any((other.size, other.validators) == found for other in self.in_flight)
        elif response.status == 200:
            odd = response.length not in (None, request.size) or response.validators != request.validators
        else:
            odd = response.status in ABSENT
        if odd:
            raise Disagreement("%s: status %s and %s bytes, the answer to HEAD was %s bytes" %
                               (redact(request.url), response.status, response.length, request.size))

    def _read_bytes(self, request, size, wanted):
        while size:
            if self.start == self.end and wanted and size >= MIN_SPLICE and splice.is_supported and not self._has_tls():
                yield from self._splice(request, size)
                return
            while self.start == self.end:
                yield
            if request.cancelled:
                raise Cancelled("the answer is not needed any more")
            n = min(size, self.end - self.start)
            if wanted:
                self._write(request, n)
            else:
                self.start += n
            size -= n

    def _splice(self, request, size):
        with splice.Splice(self.loop, self.transport, request.fd, request.received, size, self.updated) as moving:
            while moving.left:
                yield
                request.received = moving.offset
                if request.cancelled:
                    raise Cancelled("the answer is not needed any more")
                if isinstance(moving.error, OSError):
                    raise ProtocolError("%s: %s" % (self.origin.host, moving.error)) from moving.error
                if moving.error:
                    raise moving.error

    def _read_chunks(self, request, wanted):
        """RFC 9112 7.1. Returns the size of the body."""
        total = 0
        while True:
            line = (yield from self._read_until(b"\r\n", MAX_CHUNK_LINE)).partition(b";")[0].strip()
            if not line or line.strip(b"0123456789abcdefABCDEF") or len(line) > MAX_DIGITS:
                raise ProtocolError("%s: not the size of a chunk: %r" % (redact(request.url), line[:80]))
            size = int(line, 16)
            if not size:
                # Trailers, up to an empty line
                for _ in range(MAX_TRAILERS):
                    if not (yield from self._read_until(b"\r\n", MAX_HEAD)):
                        return total
                raise ProtocolError("%s: more than %s trailers" % (redact(request.url), MAX_TRAILERS))
            total += size
            if not wanted and total > MAX_DISCARD:
                raise ProtocolError("%s: a long body that is not needed" % redact(request.url))
            yield from self._read_bytes(request, size, wanted)
            if (yield from self._read_until(b"\r\n", 2)):
                raise ProtocolError("%s: chunk is longer than its size" % redact(request.url))

    def _write(self, request, size):
        stop = self.start + size
        try:
            while self.start < stop:
                written = os.pwrite(request.fd, self.view[self.start:stop], request.received)
                request.received += written
                self.start += written
        except OSError as e:
            raise unwritable(e) from e


def of_whole_file(response):
    """The answer to a GET of the first byte, as if it were one to HEAD (RFC 9110 14.4)"""
    if response.status not in (206, 416):
        return response
    size = response.headers.get("content-range", "").rpartition("/")[2]
    size = int(size) if size.isascii() and size.isdigit() and len(size) <= MAX_DIGITS else None
    if response.status == 416 and size != 0:
        return response
    return Response(200, response.headers, size)
