#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
Shared connections to the mirrors that setscene tasks restore objects from.

All connections belong to the bitbake server process. The presence query,
which runs in that process, and the setscene tasks, which reach it over a Unix
socket, share them:

    http.py       one HTTP/1.1 connection
    sftp.py       one SFTP session
    ssh.py        the program that it runs over
    pool.py       all connections, by host
    host.py       for each host: the connections, the queue, back-off, breaker
    pipelining.py whether a host can have many requests under way
    memory.py     what has been answered in this build
    protocol.py   what a task and the server say to each other
    server.py     the socket, its peers, start and end with a build's runqueue
    client.py     what a fetcher calls, in a task or in the server

This file holds what they have in common: the errors and the settings.
"""

import collections

# Of the server's socket, in the datastores of tasks
ADDRESS = "BB_CONNECTION_CACHE_ADDRESS"

# The server.Connections that runs in this process, or None
_current = None

def current():
    """The memory.Memory before the pool that runs in this process, or None"""
    return _current.memory if _current else None

def set_current(connections):
    global _current
    _current = connections


class ConnectionCacheError(Exception):
    """
    Root of the errors of this package, and what is left when nothing more
    specific is known.

    retryable tells whether the same request may succeed on another connection.
    That an object does not exist is an answer, not an error.
    """
    kind = "error"
    retryable = False

class ConnectError(ConnectionCacheError):
    """No connection: name resolution, refused, TLS, or left alone after failures"""
    kind = "connect"

    def __init__(self, message, retryable=True):
        super().__init__(message, retryable)
        self.retryable = retryable

    def __str__(self):
        return self.args[0]

class ProtocolError(ConnectionCacheError):
    """The other side sent what its protocol does not allow, or ended too early"""
    kind = "protocol"
    retryable = True

class Disconnected(ProtocolError):
    """Closed before a byte of the answer: on a used connection the server had just given it up"""

class TimedOutError(ConnectionCacheError):
    """Nothing was heard for as long as is waited"""
    kind = "timeout"
    retryable = True

class RefusedError(ConnectionCacheError):
    """
    The server is there but does not want to serve now. retry_after is the
    number of seconds it asked to wait, None if it did not say.
    """
    kind = "refused"
    retryable = True

    def __init__(self, message, retry_after=None):
        super().__init__(message, retry_after)
        self.retry_after = retry_after

    def __str__(self):
        return self.args[0]

class StatusError(ConnectionCacheError):
    """The server answered with a status that says neither yes nor no"""
    kind = "status"

    def __init__(self, message, status):
        super().__init__(message, status)
        self.status = status

    def __str__(self):
        return self.args[0]

class DestinationError(ConnectionCacheError):
    """The file that the body goes to cannot be written"""
    kind = "destination"

class Cancelled(ConnectionCacheError):
    """Nobody waits for the answer any more"""
    kind = "cancelled"


# Who may be asked which objects there are
SOURCES = ("mirror", "hashserv mirror")

Settings = collections.namedtuple("Settings", "enabled connections depth threads sources prefetch")

def settings(d):
    """
    Read the variables from the datastore d.

    Raises ValueError with one line that names the variable, its value and what
    is allowed.
    """
    enabled = d.getVar("BB_CONNECTION_CACHE") or "1"
    if enabled not in ("0", "1"):
        raise ValueError('Invalid BB_CONNECTION_CACHE = "%s", allowed are "0" and "1"' % enabled)

    connections = number(d, "BB_CONNECTION_CACHE_MAX", 4, 64, "connections")
    depth = number(d, "BB_CONNECTION_CACHE_DEPTH", 64, 1024, "requests")

    prefetch = number(d, "BB_SETSCENE_PREFETCH", 64, 1024, "objects", smallest=0)

    sources = " ".join((d.getVar("BB_SETSCENE_PRESENCE") or "mirror").split())
    if sources not in SOURCES:
        raise ValueError('Invalid BB_SETSCENE_PRESENCE = "%s", allowed are "mirror" and "hashserv mirror"' % sources)

    try:
        threads = int(d.getVar("BB_NUMBER_THREADS") or 1)
    except ValueError:
        # Not ours to complain about
        threads = 1

    return Settings(enabled == "1", connections, depth, threads, sources.split(), prefetch)

def number(d, name, default, largest, unit, smallest=1):
    """The variable name as a number from smallest to largest. Raises ValueError as settings() does."""
    value = d.getVar(name) or str(default)
    if not (value.isascii() and value.isdigit() and len(value) < 10 and smallest <= int(value) <= largest):
        raise ValueError('Invalid %s = "%s", allowed is a number of %s from %s to %s' %
                         (name, value[:80], unit, smallest, largest))
    return int(value)
