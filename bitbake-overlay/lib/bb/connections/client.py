#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
The other end of the socket: sends requests to the server, and waits for them.

Used by fetch2/shared.py. Imports no asyncio, since every task pays for what is
imported here.

    client = Client(address)
    answer = client.ask({"method": "HEAD", "url": "https://..."})
"""

import collections
import os
import socket
import struct
import time

from bb.connections import ConnectionCacheError, ProtocolError, protocol

# Seconds without a byte of the answer after which a request is given up
ANSWER_TIMEOUT = 1200

# size (bytes) and modified (seconds since the epoch) may be None
Answer = collections.namedtuple("Answer", "status size modified")


class ServerError(ConnectionCacheError):
    """The server, or its socket, has failed, and is not used any more"""


class Client:
    """The connection of one thread to the server at address. After one failure every call fails."""

    def __init__(self, address):
        self.address = address
        self._number = 0
        self._sock = None
        self._schemes = ()
        self._error = None

    def ask(self, message, fd=None, interrupted=lambda: False):
        """
        Send a request (protocol.py, without an id), and return the Answer to it. Blocks until there is one: the server
        has to send something every protocol.SILENCE_SECONDS, and something new every ANSWER_TIMEOUT. Raises
        ServerError, and ConnectionCacheError if the request itself has failed or interrupted() is true.
        """
        if self._error:
            raise self._error
        self._number += 1
        # What is too long for a message is not a fault of the server
        data = protocol.encode(dict(message, id=self._number))
        try:
            reply = self._exchange(message, data, fd, interrupted)
        except socket.timeout:
            self._fail("no message for %s seconds" % protocol.SILENCE_SECONDS)
        except (OSError, ValueError, ProtocolError) as e:
            self._fail(e)
        if "error" in reply:
            raise ConnectionCacheError("%s: %s" % (reply["error"], reply.get("message")))
        return Answer(reply["status"], reply.get("size"), reply.get("modified"))

    def _exchange(self, message, data, fd, interrupted):
        if self._sock is None:
            self._connect()
        if message["url"].partition(":")[0].lower() not in self._schemes:
            raise ConnectionCacheError("the server does not support this kind of URL")
        protocol.send(self._sock, data, fd)
        progress, deadline = None, time.monotonic() + ANSWER_TIMEOUT
        while True:
            reply = self._receive()
            if "progress" not in reply:
                break
            if interrupted():
                # Closing the socket cancels the request
                self.close()
                raise ConnectionCacheError("interrupted")
            if reply["progress"] != progress:
                progress, deadline = reply["progress"], time.monotonic() + ANSWER_TIMEOUT
            elif time.monotonic() > deadline:
                raise ProtocolError("no progress for %s seconds" % ANSWER_TIMEOUT)
        if reply.get("id") != self._number or not ("status" in reply or "error" in reply):
            raise ProtocolError("answer to another request")
        return reply

    def _connect(self):
        uid, _, name = self.address.partition(":")
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._sock.settimeout(protocol.SILENCE_SECONDS)
        self._sock.connect("\0" + name)
        credentials = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        if str(struct.unpack("3i", credentials)[1]) != uid:
            raise ProtocolError("the socket belongs to another user")
        hello = self._receive()
        if hello.get("hello") != protocol.VERSION:
            raise ProtocolError("the server speaks version %r, not %s" % (hello.get("hello"), protocol.VERSION))
        self._schemes = hello.get("schemes", ["http", "https"])
        if not isinstance(self._schemes, list):
            raise ProtocolError("schemes is not a list")

    def _receive(self):
        message, fd = protocol.receive(self._sock)
        if fd is not None:
            os.close(fd)
        if message is None:
            raise ProtocolError("the server has closed the connection")
        return message

    def close(self):
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    def _fail(self, reason):
        self.close()
        self._error = ServerError("the BitBake server's shared connections have failed: %s" % reason)
        raise self._error
