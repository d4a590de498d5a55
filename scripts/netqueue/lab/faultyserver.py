# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""An HTTP mirror on loopback that does what nginx and sshd do not do.

Used by faultymirrors.py. A FaultyServer serves a folder of sstate objects with a
thread for each connection and reads requests as a stream, so that a client may
pipeline. A Behaviour decides what becomes of each request. It is called by these
threads; what it counts is guarded by its lock.

    class Teapot(Behaviour):
        def answer(self, talk, request):
            talk.reply(request, 418)

    with FaultyServer(folder, Teapot(names)) as server:
        build = Build(..., mirror=server)

behaviours.py has the kinds of Behaviour. Nothing waits for longer than LONGEST, and all
threads end with the server.
"""

import collections
import email.utils
import http.client
import os
import re
import select
import socket
import struct
import threading
import urllib.parse

# Seconds, more than any build gets: bounds what a client, or the server's end, would leave behind
LONGEST = 300
# Bytes read at a time
READ_SIZE = 65536
_REQUEST_LINE = re.compile(r"(GET|HEAD|OPTIONS) (/\S*|\*) HTTP/1\.[01]$")
_HEADER = re.compile(r"([A-Za-z0-9-]+):[ \t]*(.*)$")

# path: below the folder; recipe: whose object it is, or ""
Request = collections.namedtuple("Request", "method path recipe archive headers")


class Ended(Exception):
    """The connection has ended, or shall end"""


class Behaviour:
    """A mirror that does all right, and what its kinds replace.

    names       the recipes of the objects that are wanted
    absent      those that the mirror does not have
    withheld    those that it has, but does not give in the end
    there       how many objects it gives
    server      the FaultyServer
    faults      how often it has done something wrong, if it does not always do
    """

    def __init__(self, names, absent=()):
        self.names = names
        self.absent = set(absent)
        self.withheld = set()
        self.lock = threading.Lock()
        self.server = None
        self.faults = None

    @property
    def there(self):
        return len(self.names) - len(self.absent | self.withheld)

    def count(self, wrong):
        """Returns wrong, and counts it if it is true"""
        with self.lock:
            self.faults = (self.faults or 0) + bool(wrong)
        return wrong

    def answer(self, talk, request):
        """Send an answer, or raise Ended to close the connection"""
        talk.serve(request)

    def head(self, lines):
        """The bytes of an answer's head"""
        return "\r\n".join(lines + ["", ""]).encode("ascii")

    def keep(self, data):
        """What is left of data that was read at once"""
        return data


class Talk:
    """One connection. number counts from 1."""

    def __init__(self, server, sock, number):
        self.server = server
        self.sock = sock
        self.number = number
        self._buffer = b""
        sock.settimeout(LONGEST)

    def run(self):
        """Answer until the connection ends"""
        try:
            while True:
                request = self.request()
                self.server.behaviour.answer(self, request)
                if request.headers.get("connection", "").lower() == "close":
                    return
        except (Ended, OSError):
            pass
        finally:
            self.sock.close()

    def request(self):
        """The next request"""
        while b"\r\n\r\n" not in self._buffer:
            self._read()
        head, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        match = _REQUEST_LINE.match(first)
        headers = [_HEADER.match(line) for line in lines]
        if not match or None in headers:
            self.send(self.server.behaviour.head(["HTTP/1.1 400 Bad Request", "Content-Length: 0", "Connection: close"]))
            raise Ended()
        path = urllib.parse.unquote(match.group(2)).lstrip("/")
        name = path.rpartition("/")[2]
        return Request(match.group(1), path, name.split(":")[1] if name.startswith("sstate:") else "",
                       name.endswith(".tar.zst"), {header.group(1).lower(): header.group(2) for header in headers})

    def has_next(self, seconds):
        """Whether another request has arrived, or arrives in that time"""
        while b"\r\n\r\n" not in self._buffer and select.select([self.sock], [], [], seconds)[0]:
            self._read()
        return b"\r\n\r\n" in self._buffer

    def _read(self):
        data = self.sock.recv(READ_SIZE)
        if not data:
            raise Ended()
        self._buffer += self.server.behaviour.keep(data)

    def send(self, data):
        self.sock.sendall(data)

    def reply(self, request, status, body=b"", *headers):
        """A whole answer; to a HEAD without the body"""
        lines = ["HTTP/1.1 %d %s" % (status, http.client.responses.get(status, "Whatever"))]
        if status != 204:
            lines.append("Content-Length: %d" % len(body))
        head = self.server.behaviour.head(lines + list(headers))
        self.send(head if request.method == "HEAD" else head + body)

    def serve(self, request, *headers, absent=404):
        """The file, if there is one"""
        if request.method == "OPTIONS":
            self.reply(request, 200, b"", "Allow: GET, HEAD, OPTIONS", *headers)
            return
        body, modified = self.server.read(request)
        if body is None:
            self.reply(request, absent, b"there is no such file\n", *headers)
        else:
            self.reply(request, 200, body, *headers, 'ETag: "%x-%x"' % (modified, len(body)),
                       "Last-Modified: " + email.utils.formatdate(modified, usegmt=True))

    def trickle(self, request, interval):
        """The file, a byte each interval seconds"""
        body, _ = self.server.read(request)
        self.send(self.server.behaviour.head(["HTTP/1.1 200 OK", "Content-Length: %d" % len(body)]))
        for place in range(len(body)):
            self.server.wait(interval)
            self.send(body[place:place + 1])

    def reset(self):
        """Close with RST instead of FIN"""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        raise Ended()

    def swallow(self):
        """Answer nothing any more, until the client closes"""
        while self.sock.recv(READ_SIZE):
            pass
        raise Ended()

    def shut_down(self):
        """Called by another thread"""
        try:
            self.sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            # It is closed already
            pass


class FaultyServer:
    """Serves directory on 127.0.0.1. As the mirrors of mirror.py for a Build.

    connections     how many were accepted
    """

    ca_file = None

    def __init__(self, directory, behaviour):
        self.directory = directory
        self.behaviour = behaviour
        self.connections = 0
        self._talks = []
        self._threads = []
        self._ending = threading.Event()
        self._port = 0
        self._listener = self._bind()
        self._port = self._listener.getsockname()[1]
        behaviour.server = self
        self._listen()

    @property
    def url(self):
        return "http://127.0.0.1:%d" % self._port

    def read(self, request):
        """(bytes, time) of the file, or (None, None)"""
        path = self.directory / request.path
        if request.recipe in self.behaviour.absent or not path.is_file():
            return None, None
        return path.read_bytes(), int(os.stat(path).st_mtime)

    def wait(self, seconds):
        """Sleep. Raises Ended if the server ends."""
        if self._ending.wait(seconds):
            raise Ended()

    def leave(self, seconds):
        """Close the port and all connections for so many seconds. To be called by a Behaviour, which raises Ended then."""
        listener = self._listener
        self._start(self._away, listener, seconds)

    def _away(self, listener, seconds):
        self._stop_listening(listener)
        # It keeps the port, and refuses
        self._listener = self._bind()
        for talk in list(self._talks):
            talk.shut_down()
        if not self._ending.wait(seconds):
            self._listen()

    def _bind(self):
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", self._port))
        return sock

    def _listen(self):
        self._listener.listen(128)
        self._start(self._accept, self._listener)

    def _stop_listening(self, listener):
        try:
            listener.shutdown(socket.SHUT_RDWR)
        except OSError:
            # It does not listen
            pass
        listener.close()

    def _start(self, function, *args):
        thread = threading.Thread(target=function, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener):
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.connections += 1
            talk = Talk(self, sock, self.connections)
            self._talks.append(talk)
            self._start(talk.run)

    def stop(self):
        self._ending.set()
        self._stop_listening(self._listener)
        for talk in list(self._talks):
            talk.shut_down()
        for thread in self._threads:
            thread.join(LONGEST)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.stop()
