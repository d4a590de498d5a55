#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
One HTTP/1.1 connection, TLS or not: HEAD, and GET into a file descriptor.

Used by host.py, whose threads own one connection each: only that thread uses
it, except for abort() which may come from any. Redirects, retries and the
choice of the connection are the pool's. Nothing of the process is changed or
read: proxy and certificates come with the request, since the environment of a
task is not the server's.

Follows RFC 9110 and RFC 9112, with pipelining (9.3.2): how many requests are
under way is up to the caller.

    connection = HTTPConnection(request.origin, request.route, timeout=100)
    connection.connect()
    connection.send(requests)
    while connection.in_flight and connection.reusable:
        for request, response, error in connection.receive():    # blocks
            ...
    connection.close()
"""

import collections
import functools
import os
import re
import socket
import ssl
import threading
import time

import bb
import bb.utils
from bb.connections import (Cancelled, ConnectError, ConnectionCacheError, DestinationError, Disconnected, ProtocolError, StatusError,
                            TimedOutError)
from bb.connections.request import DEFAULT_PORTS, MAX_DIGITS, Response, discard, redact

# An answer's head and what is read of a body that nobody wants before the
# connection is given up instead, in bytes
MAX_HEAD = 64 * 1024
MAX_DISCARD = 64 * 1024
MAX_TRAILERS = 100
# To guess whether an answer has arrived: what is said of its length counts when it is read
_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*([0-9]{1,18})[ \t]*\r\n", re.IGNORECASE)
# Connections start together: one makes the context, for 20 to 50 ms, the others wait for it instead of making their own
_contexts = threading.Lock()


class IdleClosed(Disconnected):
    """Closed while nothing was under way, which a server may do at any time (RFC 9112 9.5)"""

class Disagreement(ProtocolError):
    """Not what the server had said of the file before, which may be an answer to another request"""


class HTTPConnection:
    """
    timeout is how many seconds nothing may be heard, as wget is given 100.

    in_flight   the requests that are not answered yet, in the order of sending
    reusable    whether further requests may be sent. If not, those in flight will not be answered.
    served      how many were answered
    version     of HTTP, (1, 1) or (1, 0), as the last answer said
    ended       the server has said that it ends the connection
    error       what has ended the connection behind the answers that receive() has returned, or None

    After any exception the connection cannot be used further.
    """
    # Whether the pool may connect to a host once at a time only, and whether to try pipelining before using it
    serial = False
    trial = True

    def __init__(self, origin, route, timeout=100):
        self.origin = origin
        self.route = route
        self.timeout = timeout
        self.reusable = False
        self.in_flight = collections.deque()
        self.served = 0
        self.version = None
        self.ended = False
        self.error = None
        self._sock = None
        self._aborted = False
        # What has been received and not yet been used is between start and end
        self._data = bytearray(256 * 1024)
        self._buffer = memoryview(self._data)
        self._start = self._end = 0
        # More than one request is in flight, or was since there was none
        self._pipelined = False

    # Connecting and closing

    def connect(self):
        """
        Blocks until connected, through the proxy and with TLS if need be. That
        is at most a timeout for each of these, and as long as the look-up of
        the name takes, which cannot be ended. Raises ConnectError or Cancelled.
        """
        host, port = self.route.proxy[:2] if self.route.proxy else (self.origin.host, self.origin.port)
        try:
            self._connect(host, port)
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self.origin.scheme == "https":
                if self.route.proxy:
                    self._tunnel()
                context = self._context()
                # The handshake in a step of its own, for abort() to find the socket
                self._own(context.wrap_socket(self._sock, server_hostname=self.origin.host,
                                              do_handshake_on_connect=False))
                self._sock.do_handshake()
        except ssl.SSLCertVerificationError as e:
            raise ConnectError("certificate of %s: %s" % (self.origin.host, e.verify_message), retryable=False) from e
        except (OSError, ValueError, ProtocolError) as e:
            if self._aborted:
                raise Cancelled("aborted") from e
            raise ConnectError("cannot connect to %s port %s: %s" % (host, port, e)) from e
        if self._aborted:
            raise Cancelled("aborted")
        self.reusable = True

    def _context(self):
        try:
            with _contexts:
                return bb.utils.tls_context(self.route.verify, self.route.cafile, self.route.capath)
        except OSError as e:
            raise ConnectError("certificates for %s: %s" % (self.origin.host, e), retryable=False) from e

    def _connect(self, host, port):
        deadline = time.monotonic() + self.timeout
        error = None
        for family, kind, proto, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            self._own(socket.socket(family, kind, proto))
            try:
                self._sock.settimeout(max(deadline - time.monotonic(), 0.1))
                self._sock.connect(address)
                self._sock.settimeout(self.timeout)
                return
            except OSError as e:
                error = e
                self._sock.close()
        raise error or OSError("no address")

    def _own(self, sock):
        """From now on abort() ends what blocks on sock"""
        self._sock = sock
        if self._aborted:
            raise OSError("aborted")

    def _tunnel(self):
        authority = self._authority()
        head = "CONNECT %s HTTP/1.1\r\nHost: %s\r\n" % (authority, authority)
        if self.route.proxy[2]:
            head += "Proxy-Authorization: %s\r\n" % self.route.proxy[2]
        self._send(head + "\r\n")
        status, _ = self._read_head()
        if status // 100 != 2:
            raise ConnectError("proxy %s answered %s to CONNECT" % (self.route.proxy[0], status),
                               retryable=status in (502, 503, 504))
        if self._start != self._end:
            # Not from the origin: it would pass for its first answer
            raise ConnectError("proxy %s sent more than its answer to CONNECT" % self.route.proxy[0])

    def _authority(self, always_port=True):
        host = "[%s]" % self.origin.host if ":" in self.origin.host else self.origin.host
        if always_port or self.origin.port != DEFAULT_PORTS[self.origin.scheme]:
            host += ":%s" % self.origin.port
        return host

    def abort(self):
        """Make whatever blocks on the connection fail soon. May be called from any thread."""
        self._aborted = True
        sock = self._sock
        if sock is not None:
            try:
                # Of the plain socket: SSLSocket.shutdown() would drop its TLS state under the reader
                socket.socket.shutdown(sock, socket.SHUT_RDWR)
            except OSError:
                pass

    def close(self):
        self.reusable = False
        if self._sock is not None:
            self._sock.close()

    def fileno(self):
        """The descriptor, -1 without one"""
        return self._sock.fileno() if self._sock is not None else -1

    # Requests and their answers

    def send(self, requests):
        """Send requests. Blocks while the system's buffers are full; that the server reads on is assumed."""
        alone = not self.in_flight
        self.in_flight.extend(requests)
        self._pipelined = len(self.in_flight) > 1 or self._pipelined and not alone
        if alone:
            self._check_quiet()
        try:
            self._send("".join([self._head(request) for request in requests]))
        except socket.timeout as e:
            raise TimedOutError("%s: takes no request for %s seconds" % (self.origin.host, self.timeout)) from e

    def set_timeout(self, timeout):
        self.timeout = timeout
        self._sock.settimeout(timeout)

    def receive(self):
        """
        Read the answer to the first in flight, the body of a 200 into its fd,
        and those which have arrived with it. Blocks. Returns a list of
        (request, Response, None).
        """
        answers = []
        while self.in_flight and self.reusable and (not answers or self._arrived(self.in_flight[0])):
            try:
                response = self._read_answer(self.in_flight[0])
            except Exception as e:
                self.reusable = False
                if not isinstance(e, ConnectionCacheError):
                    e = ProtocolError("%s: %r" % (self.origin.host, e))
                if not answers:
                    raise e
                self.error = e
                break
            answers.append((self.in_flight.popleft(), response, None))
            self.served += 1
        return answers

    def _arrived(self, request):
        """Whether the whole answer to request seems to be there"""
        # Of TLS each read gives one record, which is one answer mostly
        return self._buffered(request) or isinstance(self._sock, ssl.SSLSocket) and self._read_on() and self._buffered(request)

    def _read_on(self):
        """Read all that is there, without waiting. Returns False if there is nothing, or no room."""
        if self._start == self._end:
            self._start = self._end = 0
        end = self._end
        self._sock.settimeout(0)
        try:
            while self._end < len(self._buffer) and self._fill():
                pass
        except OSError:
            # No more yet; if it is an error, the next one that reads has it too
            pass
        finally:
            self._sock.settimeout(self.timeout)
        return self._end > end

    def _buffered(self, request):
        pos = self._data.find(b"\r\n\r\n", self._start, self._end)
        if pos < 0 or request.method == "HEAD":
            return pos >= 0
        length = _LENGTH.search(self._data, self._start, pos + 2)
        return length is not None and self._end - pos - 4 >= int(length.group(1))

    def _read_answer(self, request):
        request.received = 0
        try:
            status, headers = self._read_head()
            response = self._read_body(request, status, headers)
        except socket.timeout as e:
            raise TimedOutError("%s: nothing heard for %s seconds" % (redact(request.url), self.timeout)) from e
        except OSError as e:
            raise ProtocolError("%s: %s" % (redact(request.url), e)) from e
        self._check_size(request, response.status, response.length)
        self.reusable = response.length is not None or request.method == "HEAD"
        if "connection" in headers or self.version < (1, 1):
            tokens = [t.strip().lower() for t in headers.get("connection", "").split(",")]
            self.ended = "close" in tokens
            if self.ended or self.version < (1, 1) and "keep-alive" not in tokens:
                self.reusable = False
        # What comes behind may be part of this answer, or an attempt to pass for the next (RFC 9112 6.3)
        if "transfer-encoding" in headers and "content-length" in headers:
            self.reusable = False
        if len(self.in_flight) == 1 and self._start != self._end:
            self.reusable = False
        return response

    def _check_size(self, request, status, length):
        """
        A GET that disagrees with the HEAD before: if nothing else was under way it is the file that has
        changed, else the answers may be mixed up.
        """
        if self._pipelined and request.fd is not None and request.size is not None:
            if status in (404, 410) or status == 200 and length is not None and length != request.size:
                raise Disagreement("%s: status %s and %s bytes, before it was %s bytes" %
                                   (redact(request.url), status, length, request.size))

    def _check_quiet(self):
        """
        What a server says unasked is no answer to what is asked next (RFC 9112 9.2), as the 408 of one that
        has waited for a first request.
        """
        self._sock.settimeout(0)
        try:
            self._fill()
        except (BlockingIOError, ssl.SSLWantReadError):
            return
        except OSError as e:
            raise IdleClosed("%s: %s" % (self.origin.host, e)) from e
        finally:
            self._sock.settimeout(self.timeout)
        raise IdleClosed("%s: closed, or sent what was not asked for" % self.origin.host)

    def _head(self, request):
        target = request.target
        lines = ["Host: " + self._authority(always_port=False),
                 "User-Agent: bitbake/" + bb.__version__,
                 "Accept: */*", "Accept-Encoding: identity"]
        if request.method == "GET" and request.fd is None:
            lines.append("Range: bytes=0-0")
        if request.authorization:
            lines.append("Authorization: " + request.authorization)
        if self.route.proxy and self.origin.scheme == "http":
            target = "http://%s%s" % (self._authority(always_port=False), target)
            if self.route.proxy[2]:
                lines.append("Proxy-Authorization: " + self.route.proxy[2])
        return "%s %s HTTP/1.1\r\n%s\r\n\r\n" % (request.method, target, "\r\n".join(lines))

    def _send(self, text):
        try:
            self._sock.sendall(text.encode("ascii"))
        except socket.timeout:
            raise
        except OSError:
            # The server has closed, but its last answers may be there: who reads behind them learns of it
            pass

    def _fill(self):
        """Read once. Returns False at the end of the stream."""
        if self._start == self._end:
            self._start = self._end = 0
        elif self._end == len(self._buffer):
            size = self._end - self._start
            self._buffer[:size] = bytes(self._buffer[self._start:self._end])
            self._start, self._end = 0, size
        n = self._sock.recv_into(self._buffer[self._end:])
        self._end += n
        return n > 0

    def _read_line_block(self, end, limit):
        """Read up to and with the bytes end, at most limit. Returns them without end."""
        seen = self._start
        while True:
            pos = self._data.find(end, seen, self._end)
            if 0 <= pos <= self._start + limit:
                data = bytes(self._buffer[self._start:pos])
                self._start = pos + len(end)
                return data
            size = self._end - self._start
            if pos >= 0 or size >= limit:
                raise ProtocolError("%s: answer's head is longer than %s bytes" % (self.origin.host, limit))
            try:
                more = self._fill()
            except socket.timeout:
                raise
            except OSError as e:
                if size:
                    raise
                raise Disconnected("%s: %s" % (self.origin.host, e)) from e
            if not more:
                if size:
                    raise ProtocolError("%s: closed in the middle of an answer's head" % self.origin.host)
                raise Disconnected("%s: closed without an answer" % self.origin.host)
            # It may be that only its last byte was missing. _fill() may have moved what is there.
            seen = max(self._start, self._start + size - len(end) + 1)

    def _read_head(self):
        """Returns status, and headers with names in lower case. Sets version. Skips 1xx."""
        while True:
            head = self._read_line_block(b"\r\n\r\n", MAX_HEAD).decode("iso-8859-1").split("\r\n")
            version, _, rest = head[0].partition(" ")
            status = rest[:3]
            if version not in ("HTTP/1.1", "HTTP/1.0") or not (status.isascii() and status.isdigit() and len(status) == 3):
                raise ProtocolError("%s: not a HTTP/1 answer: %r" % (self.origin.host, head[0][:80]))
            headers = {}
            for line in head[1:]:
                name, colon, value = line.partition(":")
                if not colon or not name or name != name.strip():
                    raise ProtocolError("%s: not a header: %r" % (self.origin.host, line[:80]))
                name, value = name.lower(), value.strip()
                if name in headers:
                    # RFC 9112 6.3: the same length twice is one, two lengths are an attack or a fault
                    value = value if name == "content-length" and headers[name] == value else headers[name] + ", " + value
                headers[name] = value
            if status[0] != "1":
                self.version = (1, int(version[-1]))
                return int(status), headers

    def _read_body(self, request, status, headers):
        length = headers.get("content-length")
        if length is not None:
            if not (length.isascii() and length.isdigit() and len(length) <= MAX_DIGITS):
                raise ProtocolError("%s: Content-Length is %r" % (redact(request.url), length[:80]))
            length = int(length)
        if request.method == "HEAD" or status in (204, 304):
            return Response(status, headers, length)

        wanted = status == 200 and request.fd is not None
        if wanted:
            if length is not None:
                self._check_size(request, status, length)
            self._write(discard, request.fd)
        sink = functools.partial(self._sink, request) if wanted else None
        coding = headers.get("transfer-encoding")
        if coding is not None:
            if coding.lower() != "chunked":
                raise ProtocolError("%s: Transfer-Encoding is %r" % (redact(request.url), coding[:80]))
            return Response(status, headers, self._read_chunks(request, sink))
        if length is None:
            # Ends with the connection: nothing tells a complete file from half of one
            if wanted:
                raise StatusError("%s: the server does not say how long the file is" % redact(request.url), status)
            return Response(status, headers, None)
        if not wanted and length > MAX_DISCARD:
            return Response(status, headers, None)
        self._read_bytes(request, length, sink)
        return Response(status, headers, length)

    def _read_bytes(self, request, size, sink):
        while size:
            if self._start == self._end and not self._fill():
                raise ProtocolError("%s: closed %s bytes before the end" % (redact(request.url), size))
            if request.cancelled or self._aborted:
                raise Cancelled("nobody waits for it")
            n = min(size, self._end - self._start)
            if sink:
                sink(self._buffer[self._start:self._start + n])
            self._start += n
            size -= n

    def _read_chunks(self, request, sink):
        """RFC 9112 7.1. Returns the length of the body."""
        total = 0
        while True:
            line = self._read_line_block(b"\r\n", 4096).partition(b";")[0].strip()
            try:
                if line.strip(b"0123456789abcdefABCDEF"):
                    raise ValueError
                size = int(line, 16)
            except ValueError:
                raise ProtocolError("%s: not a chunk size: %r" % (redact(request.url), line[:80])) from None
            if size == 0:
                # Trailers, up to an empty line
                for _ in range(MAX_TRAILERS):
                    if not self._read_line_block(b"\r\n", MAX_HEAD):
                        return total
                raise ProtocolError("%s: more than %s trailers" % (redact(request.url), MAX_TRAILERS))
            total += size
            if sink is None and total > MAX_DISCARD:
                raise ProtocolError("%s: a long body that nobody wants" % redact(request.url))
            self._read_bytes(request, size, sink)
            if self._read_line_block(b"\r\n", 2 + 1):
                raise ProtocolError("%s: chunk without an end" % redact(request.url))

    @staticmethod
    def _sink(request, data):
        while data:
            n = HTTPConnection._write(os.pwrite, request.fd, data, request.received)
            request.received += n
            data = data[n:]

    @staticmethod
    def _write(call, *args):
        try:
            return call(*args)
        except OSError as e:
            raise DestinationError("cannot write the file: %s" % e.strerror) from e
