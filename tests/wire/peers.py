# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""Scripted HTTP peers on raw sockets, for what well-behaved servers never do.

A Peer accepts connections on loopback and runs its script, a function, in a
thread for each. It records what it saw: connections accepted, the most that
were open at once, requests in order of arrival, bytes received.

    def script(talk):
        request = talk.request()        # None once the client has closed
        talk.answer(request, b"body")

    with Peer(script) as peer:
        ... peer.url("/x") ... peer.connections, peer.targets, peer.peak

The named scripts below are the servers of the world, good and bad. What takes
an argument returns a script.
"""

import collections
import socket
import ssl
import struct
import threading

# Only bounds a test that fails
SECONDS = 15

Received = collections.namedtuple("Received", "method target headers connection")


class Gone(Exception):
    """The client has closed"""


class Talk:
    """One connection, from the peer's side. number counts the connections from 1."""

    def __init__(self, peer, sock, number):
        self.peer = peer
        self.sock = sock
        self.number = number
        self._buffer = b""

    def request(self):
        """The next request; None once the client has closed."""
        while b"\r\n\r\n" not in self._buffer:
            try:
                data = self.sock.recv(65536)
            except ConnectionError:
                data = b""
            if not data:
                return None
            self.peer.note(data)
            self._buffer += data
        head, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
        lines = head.decode("ascii").split("\r\n")
        method, target, _ = lines[0].split(" ")
        headers = {}
        for line in lines[1:]:
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        request = Received(method, target, headers, self.number)
        self.peer.add(request)
        return request

    def requests(self):
        """All requests until the client closes."""
        while True:
            request = self.request()
            if request is None:
                return
            yield request

    def send(self, data):
        self.sock.sendall(data)

    def answer(self, request, body=b"", *headers, status=200, version="HTTP/1.1", length=None):
        """A whole answer; to a HEAD without the body. length, if given, is a lie."""
        lines = ["%s %d Whatever" % (version, status)]
        lines.append("Content-Length: %d" % (len(body) if length is None else length))
        head = "\r\n".join(lines + list(headers) + ["", ""]).encode("ascii")
        self.send(head if request.method == "HEAD" else head + body)

    def start_tls(self, context):
        self.sock = context.wrap_socket(self.sock, server_side=True)

    def reset(self):
        """Close with RST instead of FIN."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def wait_closed(self):
        """Until the client closes; what it sends is only counted."""
        while True:
            try:
                data = self.sock.recv(65536)
            except (ConnectionError, ssl.SSLError):
                return
            if not data:
                return
            self.peer.note(data)


class Peer:
    """tls is an SSLContext, if https is spoken from the first byte on."""

    def __init__(self, script, tls=None, host="127.0.0.1", port=0):
        self.script = script
        self.tls = tls
        self.host = host
        self.scheme = "https" if tls else "http"
        self.connections = 0
        self.open = 0
        self.peak = 0
        self.requests = []
        self.received = b""
        # Of scripts, for close()
        self.faults = []
        self._changed = threading.Condition()
        self._talks = []
        self._threads = []
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, port), family=family, backlog=128)
        self.port = self._listener.getsockname()[1]
        self._acceptor = threading.Thread(target=self._accept, daemon=True)
        self._acceptor.start()

    def url(self, path="/x", name=None, credentials=""):
        name = name or ("[%s]" % self.host if ":" in self.host else self.host)
        return "%s://%s%s:%s%s" % (self.scheme, credentials, name, self.port, path)

    @property
    def targets(self):
        return [request.target for request in self.requests]

    @property
    def methods(self):
        return [request.method for request in self.requests]

    def wait_for(self, condition, what="the peer to see it"):
        """Until condition(peer), which is looked at when anything arrives or a connection comes or goes."""
        with self._changed:
            assert self._changed.wait_for(lambda: condition(self), SECONDS), "waited in vain for " + what

    def note(self, data):
        with self._changed:
            self.received += data
            self._changed.notify_all()

    def add(self, request):
        with self._changed:
            self.requests.append(request)
            self._changed.notify_all()

    def _accept(self):
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            sock.settimeout(SECONDS)
            with self._changed:
                self.connections += 1
                self.open += 1
                self.peak = max(self.peak, self.open)
                talk = Talk(self, sock, self.connections)
                self._talks.append(talk)
                self._changed.notify_all()
            thread = threading.Thread(target=self._serve, args=(talk,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, talk):
        try:
            if self.tls:
                talk.start_tls(self.tls)
            self.script(talk)
        except OSError:
            # The client went away, which some are made to do
            pass
        except Exception as e:
            self.faults.append(e)
        finally:
            with self._changed:
                self.open -= 1
                self._changed.notify_all()
            talk.sock.close()

    def close(self):
        # First the listener: a client whose connection ends may come again at once
        self._listener.shutdown(socket.SHUT_RDWR)
        self._acceptor.join(SECONDS)
        self._listener.close()
        for talk in self._talks:
            try:
                socket.socket.shutdown(talk.sock, socket.SHUT_RDWR)
            except OSError:
                pass
        for thread in self._threads:
            thread.join(SECONDS)
        assert not self.faults, self.faults

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()


# Scripts

def keep_alive(talk):
    """HTTP/1.1 as it should be; the body is the target."""
    for request in talk.requests():
        talk.answer(request, request.target.encode())

def serve(files):
    """What is in files (path to bytes), 404 for the rest."""
    def script(talk):
        for request in talk.requests():
            path = request.target.partition("?")[0]
            if path in files:
                talk.answer(request, files[path], "Last-Modified: Tue, 07 Jul 2020 07:07:07 GMT")
            else:
                talk.answer(request, b"no such file", status=404)
    return script

def with_status(status, *headers):
    """The same status for everything."""
    def script(talk):
        for request in talk.requests():
            talk.answer(request, b"page", *headers, status=status)
    return script

def only_known(status, *headers):
    """/known is there; the same status for everything else."""
    def script(talk):
        for request in talk.requests():
            if request.target == "/known":
                talk.answer(request)
            else:
                talk.answer(request, b"page", *headers, status=status)
    return script

def raw(*answers):
    """Sends answers (bytes) for the first, second... request of each connection, then closes."""
    def script(talk):
        for data in answers:
            if talk.request() is None:
                return
            talk.send(data)
    return script

def closes_after(n, announced):
    """Closes after n answers, and says so with the last if announced."""
    def script(talk):
        for i in range(n):
            request = talk.request()
            if request is None:
                return
            last = ["Connection: close"] if announced and i == n - 1 else []
            talk.answer(request, request.target.encode(), *last)
    return script

def closes_idle(talk):
    """One answer, then closes the idle connection once peer.close_idle is set."""
    request = talk.request()
    if request is not None:
        talk.answer(request, request.target.encode())
        if not talk.peer.close_idle.wait(SECONDS):
            raise AssertionError("nobody has set close_idle")

def dies_in_body(answers):
    """answers: for each connection (body, number of bytes of it that are sent before it dies)."""
    def script(talk):
        body, sent = answers[talk.number - 1]
        request = talk.request()
        if request is None:
            return
        talk.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body[:sent])
        if sent == len(body):
            talk.wait_closed()
    return script

def hangs(talk):
    """Takes the request and never answers."""
    talk.request()
    talk.wait_closed()

def refuses_second(talk):
    """503 while another connection is open, as a server with a limit for an address."""
    for request in talk.requests():
        if talk.peer.open > 1:
            talk.answer(request, b"busy", "Connection: close", status=503)
            return
        talk.answer(request, request.target.encode())

def proxy(talk):
    """Forwards nothing: answers absolute-form itself, and to CONNECT continues as the TLS origin peer.behind."""
    for request in talk.requests():
        if request.method != "CONNECT":
            talk.answer(request, b"by proxy " + request.target.encode())
            continue
        talk.send(b"HTTP/1.1 200 Connected\r\n\r\n")
        talk.start_tls(talk.peer.behind)
