#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
One SFTP session over ssh: HEAD, which is STAT, and GET into a file descriptor.

Used by host.py, whose threads own one connection each: only that thread uses
it, except for abort() which may come from any. Retries and the choice of the
connection are the pool's, the program ssh is ssh.py's.

Follows SFTP version 3 (draft-ietf-secsh-filexfer-02) and limits@openssh.com
(OpenSSH's PROTOCOL file). Requests are pipelined across files, and their answers
may come in any order. A GET is OPEN, then FSTAT and the first READ together,
further READs as long as the file is, and a CLOSE whose answer nobody waits for.

    connection = SFTPConnection(request.origin, request.route, timeout=100)
    connection.connect()
    connection.send(requests)
    while connection.in_flight:
        for request, response, error in connection.receive():    # blocks
            ...
    connection.close()
"""

import collections
import os
import stat
import struct
import time

from bb.connections import (Cancelled, ConnectionCacheError, DestinationError, Disconnected, ProtocolError,
                            StatusError, TimedOutError)
from bb.connections.request import Response, discard, redact
from bb.connections.ssh import SSH, printable

VERSION = 3
# Types of packets
FXP_INIT, FXP_VERSION, FXP_OPEN, FXP_CLOSE, FXP_READ, FXP_FSTAT, FXP_STAT = 1, 2, 3, 4, 5, 8, 17
FXP_STATUS, FXP_HANDLE, FXP_DATA, FXP_ATTRS, FXP_EXTENDED, FXP_EXTENDED_REPLY = 101, 102, 103, 105, 200, 201
# Status codes
FX_EOF, FX_NO_SUCH_FILE, FX_PERMISSION_DENIED = 1, 2, 3
# Flags of ATTRS
ATTR_SIZE, ATTR_UIDGID, ATTR_PERMISSIONS = 1, 2, 4

ANSWER = struct.Struct(">IBI")
REQUEST = struct.Struct(">IBII")
UINT32 = struct.Struct(">I")
RANGE = struct.Struct(">QI")
LIMITS = struct.Struct(">QQQQ")
# Flags of OPEN, and no attributes
READ_ONLY = struct.pack(">II", 1, 0)

# Bytes: the longest packet (OpenSSH has 256 KiB) and handle that are accepted
MAX_PACKET = 256 * 1024 + 1024
MAX_HANDLE = 256
BUFFER = 1024 * 1024
# Bytes of a READ that every server allows, of one at most, and of all that are not answered
READ = 32 * 1024
MAX_READ = 255 * 1024
WINDOW = 2 * 1024 * 1024
# Files of a server that does not say how many it opens
HANDLES = 100


class Transfer:
    """
    A GET under way. request is None once it is answered: what still comes is
    dropped. size is what FSTAT has said, asked how far READs were sent for.
    """
    __slots__ = ("request", "handle", "size", "asked", "segments", "queued", "failure")

    def __init__(self, request):
        self.request = request
        self.handle = None
        self.size = None
        self.asked = 0
        # Begin and end of what has arrived behind a gap
        self.segments = {}
        # Among those which want a READ
        self.queued = False
        # (response, error) that a READ has led to
        self.failure = None


class SFTPConnection:
    """
    timeout is how many seconds nothing may be heard, and how long connect() may take.

    in_flight   the requests that are not answered yet, in the order of sending
    reusable    whether further requests may be sent
    served      how many were answered
    error       what has ended the session behind the answers that receive() has returned, or None

    What is wrong with one file is the error of its request only. After an
    exception the connection cannot be used further.
    """
    # The pool makes one connection to a host after the other, since sshd drops logins if there
    # are many at a time. Pipelining needs no trial: an answer says to which request it is.
    serial = True
    trial = False

    def __init__(self, origin, route, timeout=100):
        self.origin = origin
        self.route = route
        self.timeout = timeout
        self.reusable = False
        self.in_flight = {}
        self.served = 0
        self.ended = False
        self._ssh = SSH(origin, dict(route.environment), "sftp", timeout)
        # What has been received and not yet been used is between start and end
        self._data = bytearray(BUFFER)
        self._view = memoryview(self._data)
        self._start = self._end = 0
        self._id = 0
        # What to call with an answer, by its id
        self._pending = {}
        self._answers = []
        self.error = None
        self._handles = 0
        self._max_handles = HANDLES
        self._read_size = READ
        # Until when it has to be told what the limits are, before which no file is opened; None once it was
        self._limits_due = None
        # Bytes that READs have asked for
        self._outstanding = 0
        # Transfers that wait for a handle, and those which want a READ
        self._unopened = collections.deque()
        self._ready = collections.deque()

    # Connecting and closing

    def connect(self):
        """
        Blocks until the session is up, at most timeout seconds. Raises
        ConnectError, RefusedError or Cancelled; close() is called all the same.
        """
        try:
            self._ssh.start()
            self._greet(time.monotonic() + self.timeout)
        except Disconnected as e:
            raise self._ssh.reason() from e
        except TimedOutError as e:
            raise self._ssh.connect_error("not done within %s seconds" % self.timeout, True) from e
        except ProtocolError as e:
            raise self._ssh.connect_error(e, False) from e
        self._ssh.established = self.reusable = True

    def _greet(self, deadline):
        self._ssh.output += ANSWER.pack(5, FXP_INIT, VERSION)
        while self._end < UINT32.size:
            self._fill(deadline)
        stop = UINT32.size + UINT32.unpack_from(self._data)[0]
        if not ANSWER.size <= stop <= MAX_PACKET:
            raise ProtocolError("instead of SFTP it sends '%s', as if ~/.bashrc or the like there prints something "
                                "where nobody logs in" % printable(self._data[:self._end]))
        while self._end < stop:
            self._fill(deadline)
        _, kind, version = ANSWER.unpack_from(self._data)
        if kind != FXP_VERSION or version < VERSION:
            raise ProtocolError("it does not speak SFTP version %s" % VERSION)
        # Name and data of each extension
        strings = []
        pos = ANSWER.size
        while pos < stop:
            begin = pos + UINT32.size
            pos = begin + self._number(pos, stop)
            strings.append(bytes(self._data[begin:pos]))
        if pos != stop:
            raise ProtocolError("a packet is too short")
        self._start = stop
        if b"limits@openssh.com" in strings[::2]:
            # Who waits for a STAT need not wait for that
            self._limits_due = deadline
            self._ask(FXP_EXTENDED, b"limits@openssh.com", b"", self._limits)
            self._ssh.flush()

    def _limits(self, kind, pos, stop):
        """OpenSSH's PROTOCOL, 4.8. 0 is no limit, or an unknown one."""
        self._limits_due = None
        if kind == FXP_EXTENDED_REPLY and stop - pos >= LIMITS.size:
            _, read, _, handles = LIMITS.unpack_from(self._data, pos)
            self._read_size = min(max(read, READ), MAX_READ)
            self._max_handles = handles or HANDLES

    def abort(self):
        """Make whatever blocks on the connection fail soon. May be called from any thread."""
        self._ssh.abort()

    def close(self):
        """Blocks until ssh has ended, for some seconds at most. In a forked child it only closes descriptors."""
        self.reusable = False
        self._ssh.close()

    def fileno(self):
        """The descriptor, -1 without one"""
        return self._ssh.fileno()

    # Packets

    def _fill(self, deadline):
        """Read once. Blocks."""
        if self._start == self._end:
            self._start = self._end = 0
        elif len(self._data) - self._start < UINT32.size + MAX_PACKET:
            size = self._end - self._start
            self._data[:size] = self._data[self._start:self._end]
            self._start, self._end = 0, size
        try:
            self._end += self._ssh.receive_into(self._view[self._end:], deadline)
        except Disconnected as e:
            if self._start != self._end and self.reusable:
                raise ProtocolError("in the middle of a packet, %s" % e) from e
            raise

    def _ask(self, kind, subject, tail, *pending):
        """Queue a packet. pending[0] is called with type, begin and end of the answer, and with the rest of pending."""
        self._id = ident = self._id + 1 & 0xffffffff
        self._pending[ident] = pending
        size = len(subject)
        self._ssh.output += REQUEST.pack(9 + size + len(tail), kind, ident, size) + subject + tail

    def _exchange(self, deadline):
        """Read once, work off all packets that are there, and send what follows from them"""
        self._fill(deadline)
        while self._end - self._start >= ANSWER.size:
            length, kind, ident = ANSWER.unpack_from(self._data, self._start)
            begin, stop = self._start + ANSWER.size, self._start + UINT32.size + length
            if stop > self._end or length < 5:
                break
            self._start = stop
            pending = self._pending.pop(ident, None)
            if pending is None:
                raise ProtocolError("%s: an answer to nothing, id %s" % (self.origin.host, ident))
            pending[0](kind, begin, stop, *pending[1:])
        if self._end - self._start >= UINT32.size:
            length, = UINT32.unpack_from(self._data, self._start)
            if not 5 <= length <= MAX_PACKET:
                raise ProtocolError("%s: a packet of %s bytes" % (self.origin.host, length))
        self._proceed()
        self._ssh.flush()

    def _number(self, pos, stop):
        if stop - pos < UINT32.size:
            raise ProtocolError("%s: a packet is too short" % self.origin.host)
        return UINT32.unpack_from(self._data, pos)[0]

    def _string(self, pos, stop):
        """Where the string that is the rest of a packet begins"""
        if self._number(pos, stop) != stop - pos - UINT32.size:
            raise ProtocolError("%s: a string is not as long as its packet" % self.origin.host)
        return pos + UINT32.size

    def _unexpected(self, kind):
        return ProtocolError("%s: a packet of type %s is no answer to what was asked" % (self.origin.host, kind))

    # Requests and their answers

    def send(self, requests):
        """Start requests. Does not block: what cannot be written at once is written by receive()."""
        for request in requests:
            self.in_flight[request] = None
            if request.method == "GET":
                request.received = 0
                self._unopened.append(Transfer(request))
            else:
                self._ask(FXP_STAT, path(request), b"", self._stated, request)
        self._proceed()
        self._ssh.flush()

    def receive(self):
        """
        Blocks until something is answered. Returns a list of (request,
        Response, None) and (request, None, error), empty if nothing is in
        flight. Raises ProtocolError, Disconnected, TimedOutError or Cancelled
        when the session has ended; in_flight has what will not be answered.
        """
        if self.error:
            raise self.error
        try:
            while self.in_flight and not self._answers:
                deadline = time.monotonic() + self.timeout
                self._exchange(min(deadline, self._limits_due or deadline))
        except Exception as e:
            self.reusable = False
            if not isinstance(e, ConnectionCacheError):
                e = ProtocolError("%s: %r" % (self.origin.host, e))
            if not self._answers:
                raise e
            self.error = e
        answers, self._answers = self._answers, []
        return answers

    def _finish(self, request, response, error):
        if request.cancelled:
            response, error = None, Cancelled("nobody waits for it")
        del self.in_flight[request]
        self.served += 1
        self._answers.append((request, response, error))

    def _stated(self, kind, pos, stop, request):
        self._finish(request, *self._outcome(kind, pos, stop, request))

    def _outcome(self, kind, pos, stop, request):
        """What the answer to STAT or FSTAT, or a status, means for request: (response, error)"""
        if kind == FXP_STATUS:
            return self._status_outcome(pos, stop, request)
        if kind != FXP_ATTRS:
            raise self._unexpected(kind)
        flags = self._number(pos, stop)
        pos += 4
        size = None
        if flags & ATTR_SIZE:
            size = self._number(pos, stop) << 32 | self._number(pos + 4, stop)
            pos += 8
        if flags & ATTR_PERMISSIONS:
            if flags & ATTR_UIDGID:
                pos += 8
            if not stat.S_ISREG(self._number(pos, stop)):
                return Response(404, {}, None), None
        if size is None:
            return None, StatusError("%s: the server does not say how long the file is" % redact(request.url), 200)
        return Response(200, {}, size), None

    def _status_outcome(self, pos, stop, request):
        code = self._number(pos, stop)
        if code == FX_NO_SUCH_FILE:
            return Response(404, {}, None), None
        if code == FX_PERMISSION_DENIED:
            return Response(403, {}, None), None
        text = ""
        if stop - pos > 8:
            begin = pos + 8
            text = printable(self._data[begin:min(begin + self._number(pos + 4, stop), stop)])
        return None, StatusError("%s: SFTP status %s %s" % (redact(request.url), code, text), code)

    # GET

    def _proceed(self):
        """Send the OPENs and READs that there is room for, one READ for each file in its turn"""
        while self._unopened and self._handles < self._max_handles and self._limits_due is None:
            transfer = self._unopened.popleft()
            self._handles += 1
            self._ask(FXP_OPEN, path(transfer.request), READ_ONLY, self._opened, transfer)
        while self._ready:
            transfer = self._ready[0]
            size = self._next_read(transfer)
            if size and self._outstanding and self._outstanding + size > WINDOW:
                break
            self._ready.popleft()
            transfer.queued = False
            if size:
                self._read(transfer, transfer.asked, size)
                transfer.asked += size
            if transfer.size is not None:
                self._advance(transfer)

    def _next_read(self, transfer):
        """How many bytes to ask for, 0 for none"""
        if transfer.request is None:
            return 0
        if transfer.size is None:
            # One READ before FSTAT is answered. The size that a query has found is a good guess.
            return min(transfer.request.size or READ, self._read_size)
        return max(0, min(transfer.size - transfer.asked, self._read_size))

    def _read(self, transfer, offset, size):
        self._outstanding += size
        self._ask(FXP_READ, transfer.handle, RANGE.pack(offset, size), self._received, transfer, offset, size)

    def _want_read(self, transfer):
        transfer.queued = True
        self._ready.append(transfer)

    def _opened(self, kind, pos, stop, transfer):
        request = transfer.request
        if kind == FXP_STATUS:
            self._handles -= 1
            self._finish(request, *self._status_outcome(pos, stop, request))
            return
        if kind != FXP_HANDLE:
            raise self._unexpected(kind)
        begin = self._string(pos, stop)
        if stop - begin > MAX_HANDLE:
            raise ProtocolError("%s: a handle of %s bytes" % (self.origin.host, stop - begin))
        transfer.handle = bytes(self._data[begin:stop])
        if request.cancelled:
            self._end_transfer(transfer, None, None)
            return
        try:
            discard(request.fd)
        except OSError as e:
            self._end_transfer(transfer, None, unwritable(e))
            return
        self._ask(FXP_FSTAT, transfer.handle, b"", self._sized, transfer)
        if request.size != 0:
            self._want_read(transfer)

    def _sized(self, kind, pos, stop, transfer):
        if transfer.request is None:
            return
        response, error = self._outcome(kind, pos, stop, transfer.request)
        if error or response.status != 200:
            self._end_transfer(transfer, response, error)
            return
        transfer.size = response.length
        self._advance(transfer)

    def _received(self, kind, pos, stop, transfer, offset, size):
        """The answer to the READ of size bytes at offset"""
        self._outstanding -= size
        if transfer.request is None:
            return
        got = 0
        if kind == FXP_DATA:
            begin = self._string(pos, stop)
            got = stop - begin
            if not 0 < got <= size:
                raise ProtocolError("%s: %s bytes in answer to a READ of %s" % (self.origin.host, got, size))
            if not self._store(transfer, begin, stop, offset):
                return
        elif kind != FXP_STATUS:
            raise self._unexpected(kind)
        elif self._number(pos, stop) != FX_EOF:
            transfer.failure = self._status_outcome(pos, stop, transfer.request)
        if transfer.size is None:
            # It was the first
            transfer.asked = got
            return
        missing = min(size, transfer.size - offset) - got
        if missing > 0 and got:
            self._read(transfer, offset + got, missing)
        elif missing > 0 and not transfer.failure:
            transfer.failure = None, ProtocolError("%s: ended at %s of %s bytes" %
                                                   (redact(transfer.request.url), offset, transfer.size))
        self._advance(transfer)

    def _store(self, transfer, begin, stop, offset):
        """Write what is between begin and stop in the buffer. Returns False if that was the end of transfer."""
        request = transfer.request
        end = offset + stop - begin
        try:
            while begin < stop:
                begin += os.pwrite(request.fd, self._view[begin:stop], end - (stop - begin))
        except OSError as e:
            self._end_transfer(transfer, None, unwritable(e))
            return False
        if offset != request.received:
            transfer.segments[offset] = end
            return True
        while end in transfer.segments:
            end = transfer.segments.pop(end)
        request.received = end
        return True

    def _advance(self, transfer):
        """Decide what is to be done next, FSTAT having been answered"""
        request = transfer.request
        if request is None:
            return
        if transfer.failure or request.cancelled:
            self._end_transfer(transfer, *(transfer.failure or (None, None)))
        elif request.received > transfer.size:
            self._end_transfer(transfer, None, ProtocolError("%s: grows while it is read" % redact(request.url)))
        elif request.received == transfer.size:
            self._end_transfer(transfer, Response(200, {}, transfer.size), None)
        elif transfer.asked < transfer.size and not transfer.queued:
            self._want_read(transfer)

    def _end_transfer(self, transfer, response, error):
        """Answer it. Nothing is written from now on: its descriptor may be closed, or be another file's."""
        request, transfer.request = transfer.request, None
        self._finish(request, response, error)
        self._ask(FXP_CLOSE, transfer.handle, b"", self._handle_closed)

    def _handle_closed(self, kind, pos, stop):
        if kind != FXP_STATUS:
            raise self._unexpected(kind)
        self._handles -= 1


def path(request):
    return request.target.encode("utf-8", "surrogateescape")

def unwritable(error):
    return DestinationError("cannot write the file: %s" % error.strerror)
