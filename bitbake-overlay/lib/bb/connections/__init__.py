#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
Shared connections to mirrors, over http, https and sftp.

One thread runs a private asyncio event loop which owns everything: the
connections, the requests that are queued or in flight, and the Unix socket by
which other processes use them. Nothing in here knows what the files are for.

    server.py       the thread; batches of requests in, batches of answers out
    peers.py        the socket and the processes at its other end
    protocol.py     the messages on the socket
    client.py       the other end of the socket: blocking, without asyncio
    pool.py         all hosts, and what they have answered so far
    host.py         one host: its requests, and what becomes of them
    failures.py     what becomes of requests that were not answered
    lanes.py        its connections
    health.py       when to ask it
    growth.py       over how many connections it pays to ask it
    doubt.py        answers that may be about a file or about the host
    requestqueue.py the requests that wait
    pipelining.py   what may be in flight on a connection at the same time
    pace.py         how many requests a second a host takes
    connection.py   what the protocols have in common
    http.py         HTTP/1.1
    splice.py       long bodies from a socket into a file
    sftp.py, ssh.py SFTP over the program ssh
    request.py      a request and its answer, URLs, proxies

Modules import from those below them only. This file has the errors.
"""


class ConnectionCacheError(Exception):
    """
    Base class of the errors of this package; itself an internal error. A file
    that does not exist is an answer, not an error.

    kind        as in protocol.py
    retryable   whether the same request may succeed on another connection
    """
    kind = "error"
    retryable = False

    def __str__(self):
        return str(self.args[0]) if self.args else ""


class ConnectError(ConnectionCacheError):
    """No connection: name resolution, connection refused, TLS, login, or the host is suspended"""
    kind = "connect"

    def __init__(self, message, retryable=True):
        super().__init__(message, retryable)
        self.retryable = retryable


class ProtocolError(ConnectionCacheError):
    """The server violated its protocol, or closed the connection in the middle of an answer"""
    kind = "protocol"
    retryable = True


class Disconnected(ProtocolError):
    """Closed before the first byte of an answer, which is how some servers decline to serve"""
    kind = "refused"


class IdleClosed(Disconnected):
    """Closed while no request was in flight, which a server may do at any time (RFC 9112 9.5)"""


class Disagreement(ProtocolError):
    """The answer contradicts an earlier one about the same file: it may be the answer to another request"""


class TimedOutError(ConnectionCacheError):
    """No data received within the time-out"""
    kind = "timeout"
    retryable = True


class RefusedError(ConnectionCacheError):
    """The server is up but declines to serve. retry_after: the seconds it asked to wait, or None."""
    kind = "refused"
    retryable = True

    def __init__(self, message, retry_after=None):
        super().__init__(message, retry_after)
        self.retry_after = retry_after


class StatusError(ConnectionCacheError):
    """A status which says neither that the file exists nor that it does not"""
    kind = "status"

    def __init__(self, message, status):
        super().__init__(message, status)
        self.status = status


class DestinationError(ConnectionCacheError):
    """The file for the body cannot be written"""
    kind = "destination"


class Cancelled(ConnectionCacheError):
    """The answer is not needed any more"""
    kind = "cancelled"


class Changed(ConnectionCacheError):
    """Not an error: the request has been changed, by a redirect for example, and has to be sent again"""
