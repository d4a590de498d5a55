# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""A small HTTP/1.1 server with keep-alive, where nginx is not installed.

Used by mirror.serve(), with the same interface and counters as its Nginx.
One thread accepts, one thread serves each connection; all of them belong to
the process that made it. RFC 9112 as far as GET and HEAD of whole files
need it: no ranges, no compression, no listings.
"""

import contextlib
import itertools
import os
import shutil
import socket
import socketserver
import ssl
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from netqueue.lab.counters import Request, summarise

IDLE_SECONDS = 60


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "netqueue"
    timeout = IDLE_SECONDS
    # The head must not wait for the body in another segment.
    wbufsize = -1

    def setup(self):
        self.owner = self.server.owner
        self.connection_id = next(self.owner.numbers)
        self.served = 0
        if self.owner.tls:
            # In this thread: a slow handshake must not keep others from being accepted.
            self.request.settimeout(IDLE_SECONDS)
            self.request = self.owner.tls.wrap_socket(self.request, server_side=True)
        self.owner.open_sockets.add(self.request)
        super().setup()

    def finish(self):
        super().finish()
        self.owner.open_sockets.discard(self.request)
        if self.owner.tls:
            # The server closes the plain socket, which gave its descriptor to this one.
            self.request.close()

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        self.served += 1
        if self.served >= self.owner.keepalive_requests:
            self.close_connection = True
        path = self.owner.find(self.path)
        if path is None:
            self.head(404, 0)
            return
        with open(path, "rb") as content:
            self.head(200, os.fstat(content.fileno()).st_size)
            if body:
                shutil.copyfileobj(content, self.wfile, 256 * 1024)
        self.wfile.flush()

    def head(self, status, length):
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        self.send_header("Content-Type", "application/octet-stream")
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.owner.note(Request(self.connection_id, self.served, self.command, self.path, status,
                                bool(self.owner.tls and self.request.session_reused)))

    def log_message(self, *args):
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 1024

    def __init__(self, owner):
        self.owner = owner
        super().__init__(("127.0.0.1", 0), _Handler)

    def server_bind(self):
        # http.server's own would look the name up in DNS.
        socketserver.TCPServer.server_bind(self)

    def get_request(self):
        accepted = super().get_request()
        self.owner.note_connection()
        return accepted

    def handle_error(self, request, client_address):
        pass    # a client that went away in the middle is nothing to print


class OwnServer:
    software = "own server (nginx is not installed)"

    def __init__(self, directory, certificates, keepalive_requests):
        self.directory = os.fspath(directory)
        self.keepalive_requests = keepalive_requests
        self.ca_file = certificates.ca_file if certificates else None
        self.tls = None
        if certificates:
            self.tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            self.tls.load_cert_chain(certificates.server_file, certificates.key_file)
        self.lock = threading.Lock()
        self.numbers = itertools.count(1)
        self.connections = 0
        self.open_sockets = set()
        self.log = []
        self.server = _Server(self)
        self.port = self.server.server_address[1]
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.1,), daemon=True)
        self.thread.start()

    @property
    def url(self):
        return "%s://localhost:%d" % ("https" if self.tls else "http", self.port)

    def find(self, target):
        """The file for a request target, or None."""
        path = urllib.parse.unquote(urllib.parse.urlsplit(target).path)
        full = os.path.normpath(os.path.join(self.directory, path.lstrip("/")))
        inside = full.startswith(self.directory + os.sep)
        return full if inside and os.path.isfile(full) else None

    def note(self, request):
        with self.lock:
            self.log.append(request)

    def note_connection(self):
        with self.lock:
            self.connections += 1

    def reset(self):
        with self.lock:
            self.connections = 0
            self.log = []

    def requests(self):
        with self.lock:
            return list(self.log)

    def counters(self):
        with self.lock:
            return summarise(self.connections, self.log)

    def stop(self):
        """Idempotent. Connections end with it."""
        if self.server is None:
            return
        self.server.shutdown()
        self.server.server_close()
        self.thread.join(5)
        for connection in list(self.open_sockets):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.server = None
