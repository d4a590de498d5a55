#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
An SFTP session over ssh: HEAD, which is a STAT, and GET into a descriptor.

Used by connectionset.py in the event loop's thread; host.py receives the
answers. Follows SFTP version 3 (draft-ietf-secsh-filexfer-02) with the extension
limits@openssh.com (OpenSSH's PROTOCOL, 4.8). Requests for many files are in
flight together, and may be answered in any order.

    connection = await connect(loop, host, origin, route, timeout)
    connection.send(requests)       # host.answered() and host.ended() are called
"""

import collections
import os
import stat
import struct

from bb.connections import Cancelled, DestinationError, Disconnected, ProtocolError, StatusError
from bb.connections.connection import Connection
from bb.connections.request import Response, redact, unwritable
from bb.connections.ssh import SSH, printable

# Constants of the protocol: version, packet types, status codes, flags of ATTRS
VERSION = 3
FXP_INIT, FXP_VERSION, FXP_OPEN, FXP_CLOSE, FXP_READ, FXP_FSTAT, FXP_STAT = 1, 2, 3, 4, 5, 8, 17
FXP_STATUS, FXP_HANDLE, FXP_DATA, FXP_ATTRS, FXP_EXTENDED, FXP_EXTENDED_REPLY = 101, 102, 103, 105, 200, 201
FX_EOF, FX_NO_SUCH_FILE, FX_PERMISSION_DENIED = 1, 2, 3
ATTR_SIZE, ATTR_UIDGID, ATTR_PERMISSIONS = 1, 2, 4
# Equivalent HTTP statuses; SERVER_ERROR for all other codes
STATUSES = {FX_NO_SUCH_FILE: 404, FX_PERMISSION_DENIED: 403}
SERVER_ERROR = 500
# Layouts: length, type and id of a packet; the same of a request with the length of its string; range of a READ
HEADER, REQUEST, RANGE = struct.Struct(">IBI"), struct.Struct(">IBII"), struct.Struct(">QI")
UINT32, UINT64 = struct.Struct(">I"), struct.Struct(">Q")
# Flags of an OPEN for reading, and no attributes
READ_ONLY = struct.pack(">II", 1, 0)
# Bytes of the longest packet that is accepted: OpenSSH's limit, 256 KiB, and a margin
MAX_PACKET = 256 * 1024 + 1024
# Bytes of the longest handle that is accepted: the draft's limit
MAX_HANDLE = 256
# Bytes of a READ that every server allows
READ = 32 * 1024
# The largest number of bytes of a READ, so that its answer fits into a packet of OpenSSH
MAX_READ = 255 * 1024
# Bytes of all READs in flight: enough for 100 MB per second at 20 ms per round trip
WINDOW = 2 * 1024 * 1024
# Number of files that are open together unless the server announces a limit; reduced if an OPEN fails
HANDLES = 100


async def connect(loop, owner, origin, route, timeout):
    """Returns an open SFTPConnection. Raises ConnectError or RefusedError; ends ssh if it fails or is cancelled."""
    ssh = SSH(loop, origin, dict(route.environment), "sftp")
    connection = SFTPConnection(loop, owner, origin, route, timeout, ssh)
    try:
        await loop.create_connection(lambda: connection, sock=ssh.sock)
        await connection.greeted
        ssh.established = True
        return connection
    except Disconnected as e:
        raise await ssh.error() from e
    except ProtocolError as e:
        raise ssh.connect_error(e, False) from e
    finally:
        if not ssh.established:
            connection.close()
            ssh.end()


class SFTPConnection(Connection):
    """An error that concerns one file fails its request only"""
    # sshd refuses logins if many are in progress at the same time
    serial = True

    def __init__(self, loop, owner, origin, route, timeout, ssh):
        super().__init__(loop, owner, origin, route, timeout)
        self._ssh = ssh
        self.greeted = loop.create_future()
        # End of the packet whose next field is at start
        self._stop = 0
        # {id: pending of ask()} of packets without an answer, and the last id
        self._id, self._pending = 0, {}
        self._output = []
        # GETs whose file is not open yet; (Download, begin, end) of the ranges that are still to be requested
        self._unopened, self.unread = collections.deque(), collections.deque()
        # Number of open files, and of bytes of the READs in flight
        self.handles = self.reading = 0
        self.max_handles = self.announced_handles = HANDLES
        self.max_read = READ

    def send(self, requests):
        super().send(requests)
        for request in requests:
            if request.method == "GET":
                self._unopened.append(request)
            else:
                self.ask(FXP_STAT, request.target, b"", FXP_ATTRS, self._stated, request)
        self._proceed()

    def ask(self, kind, subject, tail, *pending):
        """Queue a packet. pending: expected type of the answer, besides STATUS; function for the type; further arguments"""
        self._id = ident = self._id + 1 & 0xffffffff
        self._pending[ident] = pending
        self._output.append(REQUEST.pack(9 + len(subject) + len(tail), kind, ident, len(subject)) + subject + tail)

    def _proceed(self):
        """Send the queued packets, and as many OPENs and READs as permitted, the files taking turns"""
        while self._unopened and self.handles < self.max_handles:
            self.handles += 1
            Download(self, self._unopened.popleft())
        while self.unread and self.reading + self.max_read <= WINDOW:
            download, begin, end = self.unread.popleft()
            size = min(end - begin, self.max_read)
            if size > 0 and not download.is_done:
                self.reading += size
                self.ask(FXP_READ, download.handle, RANGE.pack(begin, size), FXP_DATA, download.answered, begin, size)
                self.unread.append((download, begin + size, end))
        self.transport.write(b"".join(self._output))
        self._output.clear()

    def parse(self):
        self.transport.write(HEADER.pack(5, FXP_INIT, VERSION))
        try:
            while True:
                while self._use_packet():
                    self.start = self._stop
                self._proceed()
                yield
        except Exception as e:
            if not self.greeted.done():
                self.greeted.set_exception(e)
            raise
        finally:
            # Also after close()
            self._ssh.end()

    def _use_packet(self):
        """Handle the next packet. Returns False if it is not complete."""
        if self.end - self.start < 4:
            return False
        length, = UINT32.unpack_from(self.data, self.start)
        if not 5 <= length <= MAX_PACKET:
            if self.greeted.done():
                raise self.error("invalid packet length %s" % length)
            raise ProtocolError("the server sent '%s' instead of SFTP, perhaps because ~/.bashrc or the like prints it in "
                                "sessions without a terminal" % printable(self.data[self.start:self.end]))
        self._stop = self.start + 4 + length
        if self._stop > self.end:
            return False
        _, kind, ident = HEADER.unpack_from(self.data, self.start)
        self.start += HEADER.size
        pending = self._pending.pop(ident, None)
        if pending and (kind == pending[0] or kind == FXP_STATUS):
            pending[1](kind, *pending[2:])
        elif self.greeted.done():
            raise self.error("the packet of type %s with id %s does not answer a request" % (kind, ident))
        else:
            self._greet(kind, ident)
        return True

    def _greet(self, kind, version):
        if kind != FXP_VERSION or version < VERSION:
            raise ProtocolError("the server does not support SFTP version %s" % VERSION)
        names_and_data = []
        while self.start < self._stop:
            names_and_data.append(bytes(self.string()))
        if b"limits@openssh.com" in names_and_data[::2]:
            # OPENs wait for the limits, STATs do not
            self.max_handles = 0
            self.ask(FXP_EXTENDED, b"limits@openssh.com", b"", FXP_EXTENDED_REPLY, self._limited)
        self.greeted.set_result(None)

    def _limited(self, kind):
        self.max_handles = HANDLES
        if kind == FXP_EXTENDED_REPLY and self._stop - self.start >= 4 * UINT64.size:
            _, size, _, handles = [self.number(UINT64) for _ in range(4)]
            # 0 means that there is no limit, or that it is unknown
            self.max_read = min(max(size, READ), MAX_READ)
            self.max_handles = self.announced_handles = handles or HANDLES

    def error(self, text):
        return ProtocolError("%s: %s" % (self.origin.host, text))

    def number(self, layout=UINT32):
        """Consume and return the next field of the packet"""
        begin = self.start
        self.start = begin + layout.size
        if self.start > self._stop:
            raise self.error("a packet is too short")
        return layout.unpack_from(self.data, begin)[0]

    def string(self):
        """The same, as a view of the receive buffer"""
        size = self.number()
        self.start += size
        if self.start > self._stop:
            raise self.error("a packet is too short")
        return self.view[self.start - size:self.start]

    def last_string(self, limit):
        """Consume and return the last field, which has to be a string of 1 to limit bytes"""
        string = self.string()
        if self.start != self._stop or not 0 < len(string) <= limit:
            raise self.error("invalid string of %s bytes in a packet" % len(string))
        return string

    def outcome(self, kind, request):
        """Returns (response, error) for request from an ATTRS or STATUS"""
        if kind == FXP_ATTRS:
            flags = self.number()
            size = self.number(UINT64) if flags & ATTR_SIZE else None
            if flags & ATTR_UIDGID:
                self.start += UINT64.size
            if flags & ATTR_PERMISSIONS and not stat.S_ISREG(self.number()):
                return Response(404, {}, None), None
            if size is None:
                return None, StatusError("%s: the server does not announce the size of the file" % redact(request.url), 200)
            return Response(200, {}, size), None
        code = self.number()
        # Servers of earlier versions send no message
        text = printable(self.string()) if self.start < self._stop else ""
        if code == FX_EOF:
            return None, ProtocolError("%s: the file ends after %s bytes, before its announced size" %
                                       (redact(request.url), request.received))
        # Some servers report FAILURE for a file that does not exist
        return Response(STATUSES.get(code, SERVER_ERROR), {"reason": "SFTP status %s %s" % (code, text)}, None), None

    def _stated(self, kind, request):
        self.finish(request, *self.outcome(kind, request))

    def finish(self, request, response, error):
        if request.cancelled:
            response, error = None, Cancelled()
        self.in_flight.remove(request)
        self.answer(request, response, error)

    def postpone(self, request):
        """Queue request again, and open fewer files at the same time"""
        self.max_handles = max(1, self.handles - 1)
        self._unopened.appendleft(request)

    def closed(self, _):
        self.handles -= 1


class Download:
    """A GET: OPEN; FSTAT with the first READ; further READs; CLOSE. is_done: nothing is written to the file any more."""

    def __init__(self, session, request):
        self.handle = None
        self.is_done = False
        self._session, self._request = session, request
        self._steps = self._run()
        next(self._steps)

    def _run(self):
        """Generator that is resumed with the arguments of answered(). Returns (response, error), both None to postpone."""
        request, session = self._request, self._session
        session.ask(FXP_OPEN, request.target, READ_ONLY, FXP_HANDLE, self.answered)
        kind, _, _ = yield
        if kind == FXP_STATUS:
            response, error = session.outcome(kind, request)
            if not error and response.status == SERVER_ERROR:
                if session.handles == 1:
                    session.max_handles = session.announced_handles
                    return response, error
                # The server may have a limit of open files that it does not announce, unless the file does not exist
                session.ask(FXP_STAT, request.target, b"", FXP_ATTRS, self.answered)
                kind, _, _ = yield
                response, error = session.outcome(kind, request)
                if not error and response.status == 200:
                    return None, None
            return response, error
        self.handle = bytes(session.last_string(MAX_HANDLE))
        request.begin_body()
        session.ask(FXP_FSTAT, self.handle, b"", FXP_ATTRS, self.answered)
        # One byte more than the file has, so that growth is noticed
        begin = min(READ if request.size is None else request.size + 1, session.max_read)
        session.unread.append((self, 0, begin))
        kind, offset, asked = yield
        # End of the last range that was answered
        reached = 0
        if asked:
            # The READ was answered before the FSTAT. If it failed, the next one fails as well and shows the reason.
            begin = 0 if kind == FXP_STATUS else self._write(offset, asked)
            reached = 0 if kind == FXP_STATUS else asked
            kind, _, _ = yield
        response, error = session.outcome(kind, request)
        if kind == FXP_STATUS and request.size is not None:
            # FSTAT failed: use the size that STAT has reported
            response = Response(200, {}, request.size)
        if error or response.status != 200:
            return response, error
        session.unread.append((self, begin, response.length + 1))
        while request.received < response.length or reached <= response.length:
            kind, offset, asked = yield
            if kind == FXP_STATUS and offset < response.length:
                return session.outcome(kind, request)
            reached = max(reached, offset + asked)
            if kind == FXP_STATUS:
                # End of file where it is expected
                continue
            got = self._write(offset, asked)
            # Request the rest if the answer was short. The first READ may have extended beyond the end of the file.
            session.unread.append((self, offset + got, min(offset + asked, response.length)))
        if request.received > response.length:
            return None, ProtocolError("%s: the file grows while it is read" % redact(request.url))
        return response, None

    def _write(self, offset, asked):
        """Write the answer to a READ of asked bytes. Returns its number of bytes."""
        data = self._session.last_string(asked)
        size = len(data)
        while data:
            data = data[os.pwrite(self._request.fd, data, offset + size - len(data)):]
        # The ranges of READs are disjoint, so that the sum shows whether the file is complete
        self._request.received += size
        return size

    def answered(self, kind, offset=None, asked=0):
        """Handle the answer to OPEN, to STAT or FSTAT, or to the READ of asked bytes at offset"""
        session, request = self._session, self._request
        session.reading -= asked
        if self.is_done:
            return
        response = error = None
        try:
            self._steps.send((kind, offset, asked))
            if not request.cancelled:
                return
        except StopIteration as e:
            response, error = e.value
        except (DestinationError, OSError) as e:
            error = e if isinstance(e, DestinationError) else unwritable(e)
        # From now on the descriptor may be closed, or belong to another file
        self.is_done = True
        if response or error or request.cancelled:
            session.finish(request, response, error)
        else:
            session.postpone(request)
        if self.handle is None:
            session.handles -= 1
        else:
            session.ask(FXP_CLOSE, self.handle, b"", FXP_STATUS, session.closed)
