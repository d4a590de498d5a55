#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
The Unix socket of the server, and the processes connected to it.

Used by server.py in the event loop's thread, which owns all state here. protocol.py specifies the messages. Processes of
other users are not accepted; one that violates the protocol is sent an error and disconnected. Requests are submitted to
the pool, and its answers sent back.

    peers = Peers(loop, pool.submit, ["http"], log)
    loop.call_soon(peers.tick)
    ...
    peers.close()               # once all requests are answered
"""

import os
import secrets
import socket
import stat

from bb.connections import ProtocolError, protocol
from bb.connections.request import Request, last_modified, unwritable

# Number of peers, and of files: select() in server/process.py, in the same process, supports only 1024 descriptors
MAX_OPEN = 128
# Number of processes that wait to be accepted; one that waits for protocol.SILENCE_SECONDS fetches without the server
BACKLOG = 1024
# Bytes in the send buffer of a peer, including the kernel's overhead: more than a hundred messages
MAX_OUTPUT = 64 * 1024
# Characters of an error text, so that it fits into a message
MAX_TEXT = 1000


class Peer:
    """
    A process connected to sock. peers is the Peers it belongs to.

    requests        {id: Request} without an answer
    received_file   whether a GET was successful
    """

    def __init__(self, peers, sock):
        self.requests = {}
        self.received_file = False
        self._peers = peers
        self._sock = sock
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MAX_OUTPUT)
        peers.loop.add_reader(sock, self._receive)

    def disconnect(self):
        """Disconnect and cancel the unanswered requests"""
        if self._sock.fileno() >= 0:
            self._peers.loop.remove_reader(self._sock)
            self._sock.close()
            for request in self.requests.values():
                request.cancelled = True
            self.requests.clear()
            self._peers.disconnected(self)

    def send(self, message):
        try:
            protocol.send(self._sock, protocol.encode(message))
        except OSError:
            # It has disconnected, or sends requests without reading the answers
            self.disconnect()

    def _send_error(self, number, kind, error):
        self.send({"id": number, "error": kind, "message": str(error)[:MAX_TEXT]})

    def _receive(self):
        fd = None
        try:
            message, fd = protocol.receive(self._sock)
            self._peers.files.update(() if fd is None else (fd,))
            request = self._request(message, fd)
        except (OSError, ProtocolError) as e:
            self._peers.close_file(fd)
            if isinstance(e, ProtocolError):
                self._peers.log("protocol error from a peer: %s" % e)
                self._send_error(None, "protocol", e)
            self.disconnect()
        except ValueError as e:
            # The error concerns this request only
            self._peers.close_file(fd)
            self._send_error(message["id"], "url", e)
        else:
            request.first = request.fresh = True
            request.context = message["id"]
            request.done = self._answered
            self.requests[message["id"]] = request
            self._peers.submit([request])

    def _request(self, message, fd):
        """Returns the Request of message. Raises ProtocolError, or ValueError if only this request has to fail."""
        number, method, url, authorization = (message.get(name) for name in ("id", "method", "url", "authorization"))
        environment, verify = message.get("environment", {}), message.get("verify", True)
        file = None if fd is None else os.fstat(fd)
        valid = {
            "number of requests": len(self.requests) < protocol.MAX_REQUESTS,
            "id": isinstance(number, int) and number not in self.requests,
            "method, or a file that does not belong to it": method == ("GET" if file else "HEAD"),
            "file": not file or stat.S_ISREG(file.st_mode),
            "url": isinstance(url, str),
            "environment": isinstance(environment, dict) and all(isinstance(one, str) for one in environment.values()),
            "verify": isinstance(verify, bool),
            "authorization": authorization is None or (isinstance(authorization, str) and authorization.isascii()
                                                       and authorization.isprintable()),
        }
        if not all(valid.values()):
            raise ProtocolError("invalid " + ", ".join(name for name in valid if not valid[name]))
        if len(self._peers.files) > MAX_OPEN:
            raise ValueError("too many files are open")
        return Request(method, url, environment, verify, authorization, fd, file is not None and not file.st_size)

    def _answered(self, request, response, error):
        error = self._peers.close_file(request.fd) or error
        if self.requests.pop(request.context, None) is None:
            # The peer has disconnected
            return
        if error:
            self._send_error(request.context, getattr(error, "kind", "error"), error)
            return
        message = {"id": request.context, "status": response.status}
        if response.status == 200:
            message.update(size=response.length, modified=last_modified(response.headers))
            self.received_file = self.received_file or request.original_method == "GET"
        self.send(message)


class Peers:
    """
    submit is called with lists of requests, log with messages for BitBake's developers; schemes are the supported ones.

    address     as in protocol.py
    served      number of peers that have received a file and disconnected
    files       descriptors of unanswered requests, including those of disconnected peers
    """

    def __init__(self, loop, submit, schemes, log):
        self.loop = loop
        self.submit = submit
        self.log = log
        self.served = 0
        self.files = set()
        self._hello = {"hello": protocol.VERSION, "schemes": sorted(schemes)}
        self._peers = set()
        name = "bitbake-" + secrets.token_hex(16)
        self.address = "%s:%s" % (os.geteuid(), name)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        self._listener.bind("\0" + name)
        self._listener.listen(BACKLOG)

    def tick(self):
        """Accept peers, and send progress messages, from now on every protocol.PROGRESS_SECONDS"""
        for peer in list(self._peers):
            for number, request in list(peer.requests.items()):
                peer.send({"id": number, "progress": request.received})
        self.loop.add_reader(self._listener, self._accept)
        self.loop.call_later(protocol.PROGRESS_SECONDS, self.tick)

    def _accept(self):
        try:
            if len(self._peers) >= MAX_OPEN:
                raise OSError("too many peers")
            sock, _ = self._listener.accept()
        except OSError as e:
            self.log("cannot accept a connection: %s" % e)
            # Until a peer disconnects, or the next tick()
            self.loop.remove_reader(self._listener)
            return
        sock.setblocking(False)
        if protocol.peer_uid(sock) != os.geteuid():
            sock.close()
            return
        peer = Peer(self, sock)
        self._peers.add(peer)
        peer.send(self._hello)

    def disconnected(self, peer):
        self._peers.discard(peer)
        self.served += peer.received_file
        self.loop.add_reader(self._listener, self._accept)

    def close_file(self, fd):
        """Close fd unless it is None. Returns the error of close(), by which NFS reports a full disk, or None."""
        if fd is not None:
            # Before close(): a child forked afterwards must not close another file that has got the number
            self.files.discard(fd)
            try:
                os.close(fd)
            except OSError as e:
                return unwritable(e)
        return None

    def descriptors(self):
        """Descriptors that a forked child has to close, besides those watched by the event loop"""
        return [self._listener.fileno(), *self.files]

    def close(self):
        for peer in list(self._peers):
            peer.disconnect()
        self.loop.remove_reader(self._listener)
        self._listener.close()
