#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
Shared connections to mirrors, over http, https, sftp and s3.

One thread runs a private asyncio event loop, which owns the connections, the
requests and the Unix socket for other processes. Map of the package, in which
modules import only from those below them; the error classes are in this file:

    client.py           blocking client of the socket, for tasks
    server.py           the thread: accepts batches of requests, delivers batches of answers
    peers.py            the server's end of the socket; protocol.py: the messages
    pool.py             all hosts, and the cache of answers; PROTOCOLS
    host.py             one host: dispatches its requests (requestqueue.py), sorts the answers
    failures.py         retries. HTTPConnection.classify() makes a 503 a RefusedError, which
                        refused() in here handles
    diagnosis.py        file or host at fault? First asked about a 403 and other 5xx; its
                        verdict comes to apply_verdict() in failures.py, and to health.py
    connectionset.py    opens, fills and closes the connections of a host
    growth.py           how many (do more help?), with health.py (refusals), and MAX_CONNECTIONS
                        in pool.py for all hosts together; joined in Host._update_limit()
    pipelining.py       requests in flight on a connection; ratelimit.py: requests per second
    http.py, splice.py, sftp.py, ssh.py, connection.py (base class)     the protocols
    s3.py, sigv4.py, awsconfig.py       S3, which is HTTP (http.py) with signed requests
    request.py          a request with its URL and route, and its answer

A new protocol needs a subclass of connection.Connection and a coroutine that opens
it in PROTOCOLS (or, with a state of its own, in bb.sharedconnections, as S3); URL,
DEFAULT_PORTS, _origin_and_route() and redirect() in request.py; supports(),
environment(), describe_mirror() and request_url() in fetch2/shared.py; and what
configures its fetcher in FETCHER_SETTINGS in presence.py.
"""


class ConnectionCacheError(Exception):
    """
    Base class of this package's errors; an instance of it is an internal error.
    "File not found" is an answer, not an error.

    kind        as in protocol.py
    retryable   whether the same request may succeed on another connection
    """
    kind = "error"
    retryable = False

    def __str__(self):
        return str(self.args[0]) if self.args else ""


class ConnectError(ConnectionCacheError):
    """The connection failed: name resolution, connection refused, TLS, login; or the host is suspended"""
    kind = "connect"

    def __init__(self, message, retryable=True):
        super().__init__(message, retryable)
        self.retryable = retryable


class ProtocolError(ConnectionCacheError):
    """The server violated its protocol, or closed the connection in the middle of an answer"""
    kind = "protocol"
    retryable = True


class Disconnected(ProtocolError):
    """The server closed the connection before the first byte of an answer, as some do to refuse service"""
    kind = "refused"


class IdleClosed(Disconnected):
    """The server closed the connection while it was idle, which it may do at any time (RFC 9112 9.5)"""


class InconsistentAnswer(ProtocolError):
    """The answer contradicts an earlier one about the same file, so it may belong to another request"""


class TimedOutError(ConnectionCacheError):
    """No data received within the time-out"""
    kind = "timeout"
    retryable = True


class RefusedError(ConnectionCacheError):
    """The server refuses service for now. retry_after is how many seconds it asks to wait, or None."""
    kind = "refused"
    retryable = True

    def __init__(self, message, retry_after=None):
        super().__init__(message, retry_after)
        self.retry_after = retry_after


class StatusError(ConnectionCacheError):
    """The status indicates neither that the file exists nor that it does not"""
    kind = "status"

    def __init__(self, message, status):
        super().__init__(message, status)
        self.status = status


class Unusable(ConnectionCacheError):
    """The host cannot be used over these connections, which leave its files to the fetcher"""
    kind = "status"


class DestinationError(ConnectionCacheError):
    """The body cannot be written to the destination file"""
    kind = "destination"


class Cancelled(ConnectionCacheError):
    """The request was given up on this side"""
    kind = "cancelled"

    def __init__(self, message="the answer is no longer needed"):
        super().__init__(message)


class Resubmit(ConnectionCacheError):
    """Not an error: the request was changed, for example by a redirect, and has to be submitted again"""
