# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""Servers that scripts play in virtual time, byte for byte, and the real HTTPConnection and SFTPConnection before them.

For a Simulation of support/mirror.py, in the place of a Mirror. A script is a
coroutine, which is run for each connection, and cancelled at its end; of time
it may take as much as it likes.

    async def script(talk):
        while True:
            request = await talk.request()
            await asyncio.sleep(90)
            talk.answer(request, b"body")

    server = HTTPServer(script)
    simulation = Simulation(server)
    assert simulation.statuses("HEAD", ["https://mirror.example/x"]) == [200]

URLs are of https: where there is no TLS, HTTPConnection uses the socket itself.
There is none here, and no TLS either.
"""

import asyncio
import collections
import struct

from bb.connections.http import HTTPConnection
from bb.connections.sftp import SFTPConnection

Received = collections.namedtuple("Received", "method target headers connection time")


class Direction:
    """What is passed to take() arrives seconds later, in this order"""

    def __init__(self, loop, seconds, take):
        self._loop = loop
        self._seconds = seconds
        self._take = take
        self._under_way = collections.deque()

    def put(self, *item):
        self._under_way.append(item)
        self._loop.call_later(self._seconds, self._arrive)

    def _arrive(self):
        self._take(*self._under_way.popleft())


class Talk:
    """
    One connection from the server's side, and the transport of the client's. number counts the connections from 1.

    behind      how many requests are there already besides those that request() has returned
    closed      whether the client has closed
    """

    def __init__(self, server, connection, number):
        self.server = server
        self.number = number
        self.closed = False
        self._connection = connection
        self._buffer = bytearray()
        # What is sent at once, if hold_answers() was called
        self._held = None
        self._arrived = asyncio.Event()
        self._to_server = Direction(connection.loop, server.latency / 2, self._received)
        self._to_client = Direction(connection.loop, server.latency / 2, self._deliver)
        connection.connection_made(self)
        self._task = connection.loop.create_task(self._run())

    async def _run(self):
        await self.server.script(self)
        self.close()

    # The client's transport

    def write(self, data):
        if data and not self.closed:
            self._to_server.put(bytes(data))

    def abort(self):
        if not self.closed:
            self.closed = True
            self.server.open -= 1
            self._task.cancel()

    def _deliver(self, data, error=None):
        connection = self._connection
        while data and connection.is_open:
            buffer = connection.get_buffer(-1)
            size = min(len(data), len(buffer))
            buffer[:size] = data[:size]
            data = data[size:]
            connection.buffer_updated(size)
        if data is None and connection.is_open:
            connection.connection_lost(error)

    # The script's

    def _received(self, data):
        self._buffer += data
        self._arrived.set()

    async def read(self, end):
        """What comes up to end, a number of bytes or a separator"""
        while True:
            size = end if isinstance(end, int) else self._buffer.find(end) + len(end)
            if len(self._buffer) >= size >= (0 if isinstance(end, int) else len(end)):
                data = bytes(self._buffer[:size])
                del self._buffer[:size]
                return data
            self._arrived.clear()
            await self._arrived.wait()

    async def request(self):
        """The next request of HTTP"""
        head = (await self.read(b"\r\n\r\n")).decode("ascii")
        lines = head[:-4].split("\r\n")
        method, target, _ = lines[0].split(" ")
        headers = {line.partition(":")[0].lower(): line.partition(":")[2].strip() for line in lines[1:]}
        request = Received(method, target, headers, self.number, self._connection.loop.time())
        self.server.requests.append(request)
        return request

    @property
    def behind(self):
        return self._buffer.count(b"\r\n\r\n")

    def forget(self):
        """What has arrived, and has not been asked for"""
        self._buffer.clear()

    def hold_answers(self):
        """From now on, answers to requests that have come together arrive together"""
        self._held = bytearray()

    def send(self, data):
        if self._held is None:
            self._to_client.put(data)
            return
        if not self._held:
            self._connection.loop.call_soon(self._flush)
        self._held += data

    def _flush(self):
        if self._held:
            data = bytes(self._held)
            self._held.clear()
            self._to_client.put(data)

    def answer(self, request, body=b"", *headers, status=200, length=None):
        """A whole answer; to a HEAD without the body. length, if given, is a lie."""
        lines = ["HTTP/1.1 %d Whatever" % status, "Content-Length: %d" % (len(body) if length is None else length), *headers]
        head = ("\r\n".join(lines) + "\r\n\r\n").encode("ascii")
        self.send(head if request.method == "HEAD" else head + body)

    def close(self):
        self._flush()
        self._to_client.put(None)

    def reset(self):
        self._flush()
        self._to_client.put(None, ConnectionResetError("reset"))

    async def forever(self):
        await asyncio.Event().wait()


class Server:
    """
    latency is a round trip in seconds, login what else it takes to connect; connecting(server) may raise an error then.

    connections, open, peak     so far, now, and at most
    requests                    of HTTP, in the order of arrival
    """
    kind = None

    def __init__(self, script, latency=0.02, login=0.0):
        self.script = script
        self.latency = latency
        self.login = login
        self.connecting = lambda server: None
        self.connections = self.open = self.peak = 0
        self.requests = []

    @property
    def targets(self):
        return [request.target for request in self.requests]

    async def connect(self, loop, owner, origin, route, timeout):
        await asyncio.sleep(self.latency + self.login)
        self.connecting(self)
        return await self.accept(self.make(loop, owner, origin, route, timeout))

    def make(self, *arguments):
        return self.kind(*arguments)

    async def accept(self, connection):
        self.connections += 1
        self.open += 1
        self.peak = max(self.peak, self.open)
        Talk(self, connection, self.connections)
        return connection


class HTTPServer(Server):
    kind = HTTPConnection


class NoSSH:
    """In the place of the program"""

    def end(self):
        pass


class SFTPServer(Server):
    """
    SFTP for files, {path: content}. A subclass says what is wrong with it: stat() and so on return a packet without its
    length and id, or None for no answer.

    statted, opened     paths, in the order of arrival
    most                how many files were open at the same time at most
    """
    kind = SFTPConnection

    INIT, VERSION, OPEN, CLOSE, READ, FSTAT, STAT = 1, 2, 3, 4, 5, 8, 17
    STATUS, HANDLE, DATA, ATTRS = 101, 102, 103, 105
    EOF, ABSENT, DENIED, FAILURE, UNSUPPORTED = 1, 2, 3, 4, 8

    def __init__(self, files, **options):
        super().__init__(self._serve, **options)
        self.files = files
        self.statted, self.opened = [], []
        self.most = 0

    def make(self, *arguments):
        return SFTPConnection(*arguments, NoSSH())

    async def accept(self, connection):
        await super().accept(connection)
        await connection.greeted
        return connection

    def status(self, code, text=b"what it says"):
        return struct.pack(">B", self.STATUS), struct.pack(">II", code, len(text)) + text + struct.pack(">I", 0)

    def attributes(self, size):
        return struct.pack(">B", self.ATTRS), struct.pack(">IQI", 1 | 4, size, 0o100644)

    def stat(self, path):
        return self.attributes(len(self.files[path])) if path in self.files else self.status(self.ABSENT)

    def may_open(self, path, files):
        """An answer other than a handle, or None. files are those that are open."""
        return None if path in self.files else self.status(self.ABSENT)

    def fstat(self, path):
        return self.attributes(len(self.files[path]))

    def read(self, path, offset, size):
        data = self.files[path][offset:offset + size]
        return (struct.pack(">B", self.DATA), struct.pack(">I", len(data)) + data) if data else self.status(self.EOF)

    async def _serve(self, talk):
        open_files, number = {}, 0
        while True:
            length, kind, ident = struct.unpack(">IBI", await talk.read(9))
            rest = await talk.read(length - 5)
            if kind == self.INIT:
                talk.send(struct.pack(">IBI", 5, self.VERSION, 3))
                continue
            size, = struct.unpack_from(">I", rest)
            subject, rest = rest[4:4 + size], rest[4 + size:]
            if kind == self.STAT:
                self.statted.append(subject.decode())
                answer = self.stat(subject.decode())
            elif kind == self.OPEN:
                path = subject.decode()
                self.opened.append(path)
                answer = self.may_open(path, open_files)
                if answer is None:
                    number += 1
                    handle = b"%d" % number
                    open_files[handle] = path
                    self.most = max(self.most, len(open_files))
                    answer = struct.pack(">B", self.HANDLE), struct.pack(">I", len(handle)) + handle
            elif kind == self.CLOSE:
                answer = self.status(0 if open_files.pop(subject, None) else self.FAILURE)
            elif subject not in open_files:
                answer = self.status(self.FAILURE)
            elif kind == self.FSTAT:
                answer = self.fstat(open_files[subject])
            elif kind == self.READ:
                answer = self.read(open_files[subject], *struct.unpack(">QI", rest))
            else:
                answer = self.status(self.UNSUPPORTED)
            if answer:
                head, tail = answer
                talk.send(struct.pack(">I", 4 + len(head) + len(tail)) + head + struct.pack(">I", ident) + tail)
