#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
Blocking client of the connection server's socket.

Used by fetch2/shared.py in setscene tasks, which fetch in another way if the server fails. Does not import asyncio,
which would slow down every task. A Client must be used by one thread only. protocol.py specifies the messages.

    client = Client(address)
    answer = client.ask({"method": "HEAD", "url": "https://..."})
"""

import collections
import socket
import time

from bb.connections import ConnectionCacheError, ProtocolError, protocol

# Seconds without progress after which a request fails; longer than the server takes to give up on a silent host
ANSWER_TIMEOUT = 1200

# size (bytes) and modified (seconds since the epoch) may be None
Answer = collections.namedtuple("Answer", "status size modified")


class ServerError(ConnectionCacheError):
    """The server or its socket has failed and is no longer used"""


class Client:
    """The first request connects to address. After a ServerError every further call raises it again."""

    def __init__(self, address):
        self.address = address
        self._sock = None
        self._schemes = ()
        self._number = 0
        self._error = None

    def ask(self, message, fd=None, interrupted=lambda: False):
        """
        Send a request (see protocol.py, without an id) and return its Answer. Blocks until the answer arrives, as long
        as the server sends a message every protocol.SILENCE_SECONDS and reports progress every ANSWER_TIMEOUT seconds.
        Raises ServerError, or, if the request has failed or interrupted() returns true, a ConnectionCacheError whose
        kind is the one that the server reported.
        """
        if self._error:
            raise self._error
        self._number += 1
        # Outside the try block: a request that is too long for a message is not a failure of the server
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
        """Returns the answer message for the last request"""
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
