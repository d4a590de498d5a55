# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""A mirror with a fault, where nginx is too well behaved. See wire/peers.py for the peer it is made of.

    def fault(talk, request, body):
        if request.method == "GET" and is_object(request, "demo-0007"):
            talk.answer(request, b"gone", status=404)
            return HANDLED

    with FaultyMirror(folder, fault) as mirror:
        build = Build(..., mirror=mirror)
"""

import email.utils
import os
import threading
import time
import urllib.parse

from wire.peers import Peer

# What a fault returns if it has sent an answer, or if the connection shall end; nothing: answer as usual
HANDLED = "handled"
CLOSE = "close"


def is_object(request, recipe):
    """Whether the request is for the archive of a recipe"""
    path = urllib.parse.unquote(request.target)
    return "/sstate:%s:" % recipe in path and path.endswith(".tar.zst")


def is_archive(request):
    return request.target.endswith(".tar.zst")


def by_wget(request):
    return request.headers.get("user-agent", "").startswith("Wget")


def send_part(talk, body, size, announced=None):
    """The head of a 200 and so many bytes of the body"""
    length = len(body) if announced is None else announced
    talk.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % length + body[:size])


class FaultyMirror:
    """
    Serves a folder. fault(talk, request, body) is asked first; body is None if there is no such file. Unless it is
    pipelined it speaks HTTP/1.0, so that it gets one request at a time on each connection.
    """

    ca_file = None

    def __init__(self, directory, fault, pipelined=True):
        self.directory = directory
        self.fault = fault
        self.pipelined = pipelined
        self._closer = None
        self._earlier = []
        self.peer = Peer(self._script)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if self._closer:
            self._closer.join()
        if not self._closer or self._earlier:
            self.peer.close()

    def die(self, seconds=None):
        """Close the port and all connections, for so many seconds or for ever. For a fault: that returns CLOSE."""
        if not self._closer:
            # It waits for the thread that calls this
            self._closer = threading.Thread(target=self._leave, args=(seconds,))
            self._closer.start()

    def _leave(self, seconds):
        self.peer.close()
        if seconds is not None:
            time.sleep(seconds)
            self._earlier += self.peer.requests
            self.peer = Peer(self._script, port=self.peer.port)

    @property
    def url(self):
        return self.peer.url("")

    @property
    def requests(self):
        return self._earlier + self.peer.requests

    def asked(self, method, recipe):
        """The requests with this method for the archive of a recipe"""
        return [request for request in self.requests if request.method == method and is_object(request, recipe)]

    def _script(self, talk):
        for request in talk.requests():
            path = self.directory / urllib.parse.unquote(request.target).lstrip("/")
            body = path.read_bytes() if path.is_file() else None
            outcome = self.fault(talk, request, body)
            if outcome == CLOSE:
                return
            if outcome == HANDLED:
                continue
            headers = [] if self.pipelined else ["Connection: keep-alive"]
            version = "HTTP/1.1" if self.pipelined else "HTTP/1.0"
            if body is None:
                talk.answer(request, b"no such file", *headers, status=404, version=version)
            else:
                headers.append("Last-Modified: " + email.utils.formatdate(os.stat(path).st_mtime, usegmt=True))
                talk.answer(request, body, *headers, version=version)
