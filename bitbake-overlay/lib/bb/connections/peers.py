#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
The Unix socket, and the processes at its other end.

Used by server.py, in the thread of the event loop. protocol.py describes the
messages. Only processes of the same user are accepted; one that violates the
protocol is sent an error and disconnected.

    peers = Peers(loop, submit, schemes, most=64)
    peers.listen()
    ...
    peers.close()
"""

import collections
import os
import secrets
import socket
import stat
import struct

from bb.connections import ConnectionCacheError, protocol
from bb.connections.request import ENVIRONMENT, Request, last_modified, unwritable

# Descriptors: select() in server/process.py, which is in the same process, supports the first 1024. Further peers wait
# in the backlog, and give up after protocol.SILENCE_SECONDS.
MAX_PEERS = 128
MAX_FILES = 128
BACKLOG = 1024

# Characters of an error, so that it fits into a message
MAX_TEXT = 1000

# Messages that wait to be read by a peer
MAX_OUTPUT = 64


class Peer:
    """
    One process. requests are those without an answer, by their number; files is the number of files it has got.
    """
    def __init__(self, sock):
        self.sock = sock
        self.requests = {}
        self.output = collections.deque()
        self.files = 0


class Peers:
    """
    submit is called with requests, schemes are those of URLs it supports, log
    with messages for bitbake's developers, most is how many peers are served
    at the same time.

    address     as in protocol.py
    served      number of peers which have got a file and left
    """

    def __init__(self, loop, submit, schemes, log, most):
        self.served = 0
        self._loop = loop
        self._submit = submit
        self._schemes = sorted(schemes)
        self._log = log
        self._most = min(most, MAX_PEERS)
        # {socket: Peer}
        self._peers = {}
        # Descriptors of the requests without an answer, also of peers that have left
        self._files = set()
        self._listening = False
        name = "bitbake-" + secrets.token_hex(16)
        self.address = "%s:%s" % (os.geteuid(), name)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        self._listener.bind("\0" + name)
        self._listener.listen(BACKLOG)

    def listen(self):
        """Accept further peers while there is room for them"""
        room = len(self._peers) < self._most and self._listener.fileno() >= 0
        if room and not self._listening:
            self._loop.add_reader(self._listener, self._accept)
        elif self._listening and not room:
            self._loop.remove_reader(self._listener)
        self._listening = room

    def close_listener(self):
        if self._listening:
            self._loop.remove_reader(self._listener)
            self._listening = False
        self._listener.close()

    def close(self):
        """Their requests have to be answered before"""
        self.close_listener()
        for peer in list(self._peers.values()):
            self._leave(peer)

    def descriptors(self):
        """What a forked child has to close and the event loop does not know"""
        return [self._listener.fileno(), *self._files]

    def send_progress(self):
        """Show that the server is alive. Also try again to accept, if that has failed."""
        for peer in list(self._peers.values()):
            # Not to one that does not read
            if not peer.output:
                for number, request in list(peer.requests.items()):
                    self._send(peer, {"id": number, "progress": request.received})
        self.listen()

    def _accept(self):
        try:
            sock, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as e:
            # No descriptor left, for example
            self._log("cannot accept: %s" % e)
            self._loop.remove_reader(self._listener)
            self._listening = False
            return
        sock.setblocking(False)
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        if struct.unpack("3i", credentials)[1] != os.geteuid():
            sock.close()
            return
        peer = self._peers[sock] = Peer(sock)
        self._loop.add_reader(sock, self._receive, peer)
        self._send(peer, {"hello": protocol.VERSION, "schemes": self._schemes})
        self.listen()

    def _leave(self, peer):
        """Forget peer; its requests end without an answer"""
        if self._peers.pop(peer.sock, None):
            self._loop.remove_reader(peer.sock)
            self._loop.remove_writer(peer.sock)
            peer.sock.close()
            self.served += bool(peer.files)
            for request in peer.requests.values():
                request.cancelled = True
            self.listen()

    def _receive(self, peer):
        try:
            message, fd = protocol.receive(peer.sock)
        except BlockingIOError:
            return
        except ValueError as e:
            self._reject(peer, e)
            return
        except OSError:
            message = None
        if message is None:
            self._leave(peer)
            return
        if fd is not None:
            self._files.add(fd)
        try:
            request = self._request(peer, message, fd)
        except ValueError as e:
            self._close_file(fd)
            self._reject(peer, e)
            return
        if request:
            request.first = True
            request.done = self._answered
            request.context = peer, message["id"]
            peer.requests[message["id"]] = request
            self._submit([request])

    def _reject(self, peer, error):
        self._log("protocol error from a peer: %s" % error)
        self._send(peer, {"id": None, "error": "protocol", "message": str(error)[:MAX_TEXT]})
        self._leave(peer)

    def _request(self, peer, message, fd):
        """Returns the Request of message, or None after an error that is about its URL. Raises ValueError for other errors."""
        number = message.get("id")
        if not isinstance(number, int) or number in peer.requests:
            raise ValueError("id is not a number, or in use")
        if len(peer.requests) >= protocol.MAX_REQUESTS:
            raise ValueError("more than %s requests at once" % protocol.MAX_REQUESTS)
        method, url, environment = message.get("method"), message.get("url"), message.get("environment", {})
        verify, authorization = message.get("verify", True), message.get("authorization")
        if method not in ("HEAD", "GET") or (method == "GET") != (fd is not None):
            raise ValueError("not a HEAD, nor a GET with a descriptor")
        file = os.fstat(fd) if fd is not None else None
        if file and not stat.S_ISREG(file.st_mode):
            raise ValueError("the descriptor is not that of a regular file")
        if not isinstance(url, str) or not isinstance(verify, bool) or not isinstance(environment, dict):
            raise ValueError("a member has the wrong type")
        if any(not isinstance(value, str) for value in environment.values()):
            raise ValueError("a member of environment is not a string")
        if authorization is not None and not (isinstance(authorization, str) and authorization.isascii()
                                              and authorization.isprintable()):
            raise ValueError("authorization is not the value of a header")
        try:
            if len(self._files) > MAX_FILES:
                raise ValueError("too many files at once")
            environment = {name: environment[name] for name in ENVIRONMENT if name in environment}
            return Request(method, url, environment, verify, authorization, fd, bool(file) and not file.st_size)
        except ValueError as e:
            self._close_file(fd)
            self._send(peer, {"id": number, "error": "url", "message": str(e)[:MAX_TEXT]})
            return None

    def _close_file(self, fd):
        """Returns the error of close(), with which NFS reports that the disk is full, or None"""
        if fd is not None:
            # In this order: a child that is forked in between must not close what has the number by then
            self._files.discard(fd)
            try:
                os.close(fd)
            except OSError as e:
                return unwritable(e)
        return None

    def _answered(self, request, response, error):
        """Of Request"""
        peer, number = request.context
        error = self._close_file(request.fd) or error
        if peer.requests.pop(number, None) is None or peer.sock not in self._peers:
            return
        if error:
            kind = error.kind if isinstance(error, ConnectionCacheError) else "error"
            message = {"id": number, "error": kind, "message": str(error)[:MAX_TEXT]}
        else:
            message = {"id": number, "status": response.status}
            if response.status == 200:
                message.update(size=response.length, modified=last_modified(response.headers))
                peer.files += request.asked == "GET"
        self._send(peer, message)

    def _send(self, peer, message):
        peer.output.append(protocol.encode(message))
        if len(peer.output) > MAX_OUTPUT:
            # It submits requests and does not read the answers
            self._leave(peer)
        elif len(peer.output) == 1:
            self._flush(peer)

    def _flush(self, peer):
        try:
            while peer.output:
                protocol.send(peer.sock, peer.output[0])
                peer.output.popleft()
            self._loop.remove_writer(peer.sock)
        except BlockingIOError:
            self._loop.add_writer(peer.sock, self._flush, peer)
        except OSError:
            self._leave(peer)
