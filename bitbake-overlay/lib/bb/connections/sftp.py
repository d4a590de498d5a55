#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
One SFTP session over ssh: HEAD, which is STAT, and GET into a descriptor.

Used by host.py. Follows SFTP version 3 (draft-ietf-secsh-filexfer-02) and
limits@openssh.com (OpenSSH's PROTOCOL file). Requests are pipelined across
files, and answers may come in any order. A GET is OPEN, then FSTAT and the
first READ together, further READs up to the size of the file, and a CLOSE
whose answer nobody waits for.

    connection = await connect(loop, host, origin, route, timeout)
    connection.send(requests)       # host.answered() and host.ended() are called
"""

import collections
import stat
import struct

from bb.connections import Cancelled, DestinationError, Disconnected, ProtocolError, StatusError
from bb.connections.connection import Connection
from bb.connections.request import Response, redact
from bb.connections.ssh import SSH, printable
from bb.connections.transfer import Transfer

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
UINT64 = struct.Struct(">Q")
RANGE = struct.Struct(">QI")
LIMITS = struct.Struct(">QQQQ")
# Flags of OPEN, and no attributes
READ_ONLY = struct.pack(">II", 1, 0)

# Bytes: the longest packet (OpenSSH has 256 KiB) and handle that are accepted
MAX_PACKET = 256 * 1024 + 1024
MAX_HANDLE = 256
# Bytes of a READ: what every server allows, and the most; and of all READs in flight
READ = 32 * 1024
MAX_READ = 255 * 1024
WINDOW = 2 * 1024 * 1024
# Files that are open at the same time, if the server does not announce a limit
HANDLES = 100


async def connect(loop, owner, origin, route, timeout):
    """Returns an SFTPConnection. Raises ConnectError or RefusedError. If it is cancelled, ssh is ended."""
    connection = SFTPConnection(loop, owner, origin, route, timeout)
    sock = connection.ssh.start("sftp")
    try:
        await loop.create_connection(lambda: connection, sock=sock)
        await connection.greeted
        connection.ssh.established = True
        return connection
    except Disconnected as e:
        raise await connection.ssh.error() from e
    except ProtocolError as e:
        raise connection.ssh.connect_error(e, False) from e
    finally:
        if not connection.ssh.established:
            connection.close()
            connection.ssh.end()
            sock.close()


class SFTPConnection(Connection):
    """What is wrong with one file is the error of its request only"""
    # sshd refuses logins if there are many at the same time. An answer tells which request it is for.
    serial = True
    tried = False

    def __init__(self, loop, owner, origin, route, timeout):
        super().__init__(loop, owner, origin, route, timeout)
        self.ssh = SSH(loop, origin, dict(route.environment))
        # Done when the server has greeted
        self.greeted = loop.create_future()
        self._id = 0
        # {id of a packet: (function that takes type, begin and end of the answer, its further arguments)}
        self._pending = {}
        self._output = []
        self._handles = 0
        self._max_handles = HANDLES
        self._read_size = READ
        # No file is opened before the server has announced its limits
        self._limits_known = True
        # Bytes of the READs in flight
        self._outstanding = 0
        # Transfers that wait for a handle, and those that want to send a READ
        self._unopened = collections.deque()
        self._ready = collections.deque()

    def connection_made(self, transport):
        super().connection_made(transport)
        transport.write(ANSWER.pack(5, FXP_INIT, VERSION))

    def close(self, error=None):
        if self.is_open:
            super().close(error)
            self._ended(error)

    def _ended(self, error):
        if self.ssh.established:
            self.ssh.end()
        elif not self.greeted.done():
            self.greeted.set_exception(error or Disconnected("closed"))

    # Packets

    def parse(self):
        try:
            yield from self._greeting()
            while True:
                self._read_packets()
                self._proceed()
                yield
        except Exception as e:
            self._ended(e)
            raise

    def _greeting(self):
        while self.end < UINT32.size:
            yield
        stop = UINT32.size + UINT32.unpack_from(self.data)[0]
        if not ANSWER.size <= stop <= MAX_PACKET:
            raise ProtocolError("instead of SFTP the server sends '%s', as if ~/.bashrc or the like prints something "
                                "without a terminal" % printable(self.data[:self.end]))
        while self.end < stop:
            yield
        _, kind, version = ANSWER.unpack_from(self.data)
        if kind != FXP_VERSION or version < VERSION:
            raise ProtocolError("the server does not support SFTP version %s" % VERSION)
        # Name and data of each extension
        strings = []
        pos = ANSWER.size
        while pos < stop:
            begin = pos + UINT32.size
            pos = begin + self._number(pos, stop)
            strings.append(bytes(self.data[begin:pos]))
        if pos != stop:
            raise ProtocolError("a packet is too short")
        self.start = stop
        if b"limits@openssh.com" in strings[::2]:
            # STATs need not wait for the answer
            self._limits_known = False
            self._ask(FXP_EXTENDED, b"limits@openssh.com", b"", self._limits)
        self.greeted.set_result(None)

    def _limits(self, kind, pos, stop):
        """OpenSSH's PROTOCOL, 4.8. 0 is no limit, or an unknown one."""
        self._limits_known = True
        if kind == FXP_EXTENDED_REPLY and stop - pos >= LIMITS.size:
            _, read, _, handles = LIMITS.unpack_from(self.data, pos)
            self._read_size = min(max(read, READ), MAX_READ)
            self._max_handles = handles or HANDLES

    def _ask(self, kind, subject, tail, *pending):
        """Queue a packet"""
        self._id = ident = self._id + 1 & 0xffffffff
        self._pending[ident] = pending
        size = len(subject)
        self._output.append(REQUEST.pack(9 + size + len(tail), kind, ident, size) + subject + tail)

    def _read_packets(self):
        while self.end - self.start >= ANSWER.size:
            length, kind, ident = ANSWER.unpack_from(self.data, self.start)
            begin, stop = self.start + ANSWER.size, self.start + UINT32.size + length
            if stop > self.end or length < 5:
                break
            self.start = stop
            pending = self._pending.pop(ident, None)
            if pending is None:
                raise ProtocolError("%s: an answer without a request, id %s" % (self.origin.host, ident))
            pending[0](kind, begin, stop, *pending[1:])
        if self.end - self.start >= UINT32.size:
            length, = UINT32.unpack_from(self.data, self.start)
            if not 5 <= length <= MAX_PACKET:
                raise ProtocolError("%s: a packet of %s bytes" % (self.origin.host, length))

    def _number(self, pos, stop, number=UINT32):
        if stop - pos < number.size:
            raise ProtocolError("%s: a packet is too short" % self.origin.host)
        return number.unpack_from(self.data, pos)[0]

    def _string(self, pos, stop):
        """Where the string begins that is the rest of a packet"""
        if self._number(pos, stop) != stop - pos - UINT32.size:
            raise ProtocolError("%s: a string is not as long as its packet" % self.origin.host)
        return pos + UINT32.size

    def _expect(self, kind, expected):
        if kind != expected:
            raise ProtocolError("%s: a packet of type %s is not an answer to the request" % (self.origin.host, kind))

    # Requests and their answers

    def send(self, requests):
        """Does not block"""
        super().send(requests)
        for request in requests:
            if request.method == "GET":
                self._unopened.append(Transfer(request))
            else:
                self._ask(FXP_STAT, request.target, b"", self._stated, request)
        self._proceed()

    def _finish(self, request, response, error):
        if request.cancelled:
            response, error = None, Cancelled("the answer is not needed any more")
        if self.in_flight[0] is request:
            self.in_flight.popleft()
        else:
            self.in_flight.remove(request)
        self.answer(request, response, error)

    def _stated(self, kind, pos, stop, request):
        self._finish(request, *self._outcome(kind, pos, stop, request))

    def _outcome(self, kind, pos, stop, request):
        """What the answer to STAT or FSTAT, or a status, means: (response, error)"""
        if kind == FXP_STATUS:
            return self._status_outcome(pos, stop, request)
        self._expect(kind, FXP_ATTRS)
        flags = self._number(pos, stop)
        pos += UINT32.size
        size = None
        if flags & ATTR_SIZE:
            size = self._number(pos, stop, UINT64)
            pos += UINT64.size
        if flags & ATTR_PERMISSIONS:
            if flags & ATTR_UIDGID:
                pos += 2 * UINT32.size
            if not stat.S_ISREG(self._number(pos, stop)):
                return Response(404, {}, None), None
        if size is None:
            return None, StatusError("%s: the server does not announce the size of the file" % redact(request.url), 200)
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
            text = printable(self.data[begin:min(begin + self._number(pos + 4, stop), stop)])
        return None, StatusError("%s: SFTP status %s %s" % (redact(request.url), code, text), code)

    # GET

    def _proceed(self):
        """Send what is queued, and the OPENs and READs that there is room for: one READ for each file in its turn"""
        while self._unopened and self._handles < self._max_handles and self._limits_known:
            transfer = self._unopened.popleft()
            self._handles += 1
            self._ask(FXP_OPEN, transfer.request.target, READ_ONLY, self._opened, transfer)
        while self._ready:
            transfer = self._ready[0]
            size = transfer.next_read(READ, self._read_size)
            if size and self._outstanding and self._outstanding + size > WINDOW:
                break
            self._ready.popleft()
            transfer.queued = False
            if size:
                self._read(transfer, transfer.asked, size)
                transfer.asked += size
            if transfer.size is not None:
                self._advance(transfer)
        if self._output:
            self.transport.write(b"".join(self._output))
            self._output.clear()

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
        self._expect(kind, FXP_HANDLE)
        begin = self._string(pos, stop)
        if stop - begin > MAX_HANDLE:
            raise ProtocolError("%s: a handle of %s bytes" % (self.origin.host, stop - begin))
        transfer.handle = bytes(self.data[begin:stop])
        try:
            request.begin_body()
        except DestinationError as e:
            transfer.fail(e)
        if request.cancelled or transfer.failure:
            self._end_transfer(transfer)
            return
        self._ask(FXP_FSTAT, transfer.handle, b"", self._sized, transfer)
        if request.size != 0:
            self._want_read(transfer)

    def _sized(self, kind, pos, stop, transfer):
        if transfer.request is None:
            return
        response, error = self._outcome(kind, pos, stop, transfer.request)
        if error or response.status != 200:
            transfer.fail(error, response)
        else:
            transfer.size = response.length
        self._advance(transfer)

    def _received(self, kind, pos, stop, transfer, offset, size):
        """The answer to the READ of size bytes at offset"""
        self._outstanding -= size
        if transfer.request is None:
            return
        got = 0
        at_end = kind == FXP_STATUS and self._number(pos, stop) == FX_EOF
        try:
            if kind != FXP_STATUS:
                self._expect(kind, FXP_DATA)
                begin = self._string(pos, stop)
                got = stop - begin
                if not 0 < got <= size:
                    raise ProtocolError("%s: %s bytes in answer to a READ of %s" % (self.origin.host, got, size))
                transfer.write(self.view[begin:stop], offset)
            elif not at_end:
                response, error = self._status_outcome(pos, stop, transfer.request)
                transfer.fail(error, response)
        except DestinationError as e:
            transfer.fail(e)
        missing = transfer.received(offset, size, got, at_end)
        if missing:
            self._read(transfer, offset + got, missing)
        self._advance(transfer)

    def _advance(self, transfer):
        """Decide what is next"""
        if transfer.request is None:
            return
        if transfer.failure or transfer.request.cancelled:
            self._end_transfer(transfer)
        elif transfer.size is None:
            # FSTAT is not answered yet
            pass
        elif transfer.is_complete() or transfer.failure:
            self._end_transfer(transfer)
        elif transfer.asked < transfer.size and not transfer.queued:
            self._want_read(transfer)

    def _end_transfer(self, transfer):
        """Answer the request. Nothing is written from now on: the descriptor may be closed, or be that of another file."""
        request, transfer.request = transfer.request, None
        response, error = transfer.failure or (Response(200, {}, transfer.size), None)
        self._finish(request, response, error)
        self._ask(FXP_CLOSE, transfer.handle, b"", self._handle_closed)

    def _handle_closed(self, kind, pos, stop):
        self._expect(kind, FXP_STATUS)
        self._handles -= 1
