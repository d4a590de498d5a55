#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
A task's end of the socket: sends a request to the server, and waits for the answer.

Used by fetch2/shared.py. Imports no asyncio, since every task pays for what is imported here. A Client belongs to one
thread. It does not know what to do without the server.

    client = Client(address)
    answer = client.ask({"method": "HEAD", "url": "https://..."})
"""

import collections
import socket
import time

from bb.connections import ConnectionCacheError, ProtocolError, protocol

# Seconds without a byte of the answer after which a request is given up
ANSWER_TIMEOUT = 1200

# size (bytes) and modified (seconds since the epoch) may be None
Answer = collections.namedtuple("Answer", "status size modified")


class ServerError(ConnectionCacheError):
    """The server, or its socket, has failed, and is not used any more"""


class Client:
    """A connection to the server at address, made by the first request. After a ServerError every call raises that."""

    def __init__(self, address):
        self.address = address
        self._sock = None
        self._schemes = ()
        self._number = 0
        self._error = None

    def ask(self, message, fd=None, interrupted=lambda: False):
        """
        Send a request (protocol.py, without an id), and return the Answer to it. Blocks until there is one: the server
        has to send something every protocol.SILENCE_SECONDS, and something new every ANSWER_TIMEOUT. Raises
        ServerError, and ConnectionCacheError with the kind that the server sent if the request itself has failed, or
        interrupted() is true.
        """
        if self._error:
            raise self._error
        self._number += 1
        # What is too long for a message is not a fault of the server
        data = protocol.encode(dict(message, id=self._number))
        try:
            if self._sock is None:
                self._connect()
            if message["url"].partition(":")[0].lower() not in self._schemes:
                raise ConnectionCacheError("the server does not support this kind of URL")
            protocol.send(self._sock, data, fd)
            reply = self._wait(interrupted)
        except (OSError, ProtocolError) as e:
            self.close()
            self._error = ServerError("the BitBake server's shared connections have failed: %s" % e)
            raise self._error from e
        if "error" in reply:
            error = ConnectionCacheError("%s: %s" % (reply["error"], reply.get("message")))
            error.kind = reply["error"]
            raise error
        return Answer(reply["status"], reply.get("size"), reply.get("modified"))

    def _connect(self):
        uid, _, name = self.address.partition(":")
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._sock.settimeout(protocol.SILENCE_SECONDS)
        self._sock.connect("\0" + name)
        if str(protocol.peer_uid(self._sock)) != uid:
            raise ProtocolError("the socket belongs to another user")
        hello = protocol.receive(self._sock, 0)[0]
        self._schemes = hello.get("schemes", ["http", "https"])
        if hello.get("hello") != protocol.VERSION or not isinstance(self._schemes, list):
            raise ProtocolError("the server speaks version %r, not %s" % (hello.get("hello"), protocol.VERSION))

    def _wait(self, interrupted):
        """Returns the answer to the last request, as it was sent"""
        progress, deadline = None, time.monotonic() + ANSWER_TIMEOUT
        while True:
            reply = protocol.receive(self._sock, 0)[0]
            if "progress" not in reply:
                if reply.get("id") != self._number or not ("status" in reply or "error" in reply):
                    raise ProtocolError("not an answer to the request: %s" % reply.get("message"))
                return reply
            if interrupted():
                # Closing the socket cancels the request
                self.close()
                raise ConnectionCacheError("interrupted")
            if reply["progress"] != progress:
                progress, deadline = reply["progress"], time.monotonic() + ANSWER_TIMEOUT
            elif time.monotonic() > deadline:
                raise ProtocolError("no progress for %s seconds" % ANSWER_TIMEOUT)

    def close(self):
        if self._sock is not None:
            self._sock.close()
            self._sock = None
