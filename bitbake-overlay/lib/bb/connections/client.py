#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
What a fetcher calls to use the shared connections.

In a setscene task that is over the server's socket, which the task's datastore
names (protocol.py); in the server itself, where the presence query runs, it is
the pool directly. Everywhere else, and whenever anything is not as it should
be, the answer is None, which means: fetch as without shared connections.

    found = client.checkstatus(ud, d)               # True, False or None
    path = client.download(ud, d, localpath)        # of a complete file, or None
"""

import collections
import contextlib
import functools
import logging
import netrc
import os
import socket
import struct
import threading
import time
import urllib.parse

import bb
import bb.connections
from bb.connections import ADDRESS, ConnectionCacheError, ProtocolError, TimedOutError, protocol
from bb.connections.request import (ABSENT, ENVIRONMENT, HTTP_ENVIRONMENT, MISSING, Request, basic_auth, last_modified,
                                    redact)

logger = logging.getLogger("BitBake.Fetcher")

# What takes longer, without a byte of an answer, is done without shared connections
POOL_SECONDS = 1200

# size and modified (seconds since the epoch) may be None
Answer = collections.namedtuple("Answer", "status size modified")


def checkstatus(ud, d, verify=True):
    """
    Whether the file of ud exists: True, False, or None if that cannot be told
    here. Blocks as long as the mirror takes.
    """
    if not _usable(ud, d):
        return None
    answer = _ask("HEAD", ud, d, verify)
    if answer is None:
        # The mirror is not asked again if the build is to end anyway
        return False if bb.event._should_exit.is_set() else None
    if answer.status in MISSING:
        return False
    return True if answer.status == 200 else None

def download(ud, d, localpath, verify=True):
    """
    Fetch the file of ud into a new file next to localpath and return its path;
    the caller renames it. Returns None, and leaves no file, if that is not
    possible here; raises FetchError if the mirror says that there is none.
    Blocks as long as the mirror takes.
    """
    # In the server nothing downloads
    if not _usable(ud, d) or bb.connections.current():
        return None
    bb.fetch2.check_network_access(d, "shared connections", ud.url)
    # Not the name that wget --continue takes up. The fetcher holds its lock for
    # localpath, so what has that name was left by a task that was killed.
    path = localpath + ".new"
    answer = None
    complete = False
    try:
        _remove(path)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            answer = _ask("GET", ud, d, verify, fd)
            complete = answer is not None and answer.status == 200 and is_complete(path, fd, answer)
        finally:
            os.close(fd)
    except OSError as e:
        logger.debug("%s: not over shared connections: %s", redact(ud.url), e)
    finally:
        if not complete:
            _remove(path)
    if answer is not None and answer.status in ABSENT:
        raise bb.fetch2.FetchError("No such file on the server (status %s)" % answer.status, redact(ud.url))
    return path if complete else None

def _remove(path):
    with contextlib.suppress(OSError):
        os.unlink(path)

def is_complete(path, fd, answer):
    """Whether path is still the file that was written, and all of it. Sets its time as wget does."""
    written, named = os.fstat(fd), os.stat(path)
    if (written.st_dev, written.st_ino) != (named.st_dev, named.st_ino) or written.st_size != answer.size:
        return False
    if answer.modified is not None:
        os.utime(fd, (answer.modified, answer.modified))
    return True

def _usable(ud, d):
    """Whether requests for ud may go over shared connections, as far as d says"""
    if not supports(ud, d):
        return False
    if not bb.utils.to_boolean(d.getVar("BB_WORKERCONTEXT")):
        return bb.connections.current() is not None
    return bool(d.getVar(ADDRESS)) and (d.getVar("BB_CURRENTTASK") or "").endswith("_setscene")

def supports(ud, d):
    """Whether the user wants ud fetched in a way that shared connections can do"""
    if d.getVar("BB_CONNECTION_CACHE") == "0":
        return False
    if ud.type in ("http", "https"):
        return not d.getVar("FETCHCMD_wget") and "redirectauth" not in ud.parm
    # ssh asks for no password
    return ud.type == "sftp" and not d.getVar("FETCHCMD_sftp") and not ud.pswd

def environment(scheme, d):
    """What of the fetcher's environment decides how a host is reached, and HOME for ~/.netrc"""
    return bb.fetch2.get_fetcher_environment(d, ENVIRONMENT if scheme == "sftp" else HTTP_ENVIRONMENT + ("HOME",))

def describe(method, ud, environ, verify):
    """The members of a Request, with environ as environment() returned it"""
    return dict(describe_mirror(ud, environ, verify), method=method, url=request_url(ud))

def describe_mirror(ud, environ, verify):
    """Those that are the same for all files which are fetched from the host of ud as the user of ud"""
    if ud.type == "sftp":
        return {"environment": environ}
    home = environ.get("HOME", "")
    environ = {name: value for name, value in environ.items() if name != "HOME"}
    return {"environment": environ, "verify": verify, "authorization": _authorization(ud, home)}

def request_url(ud):
    return ud.url.partition(";")[0]

def _ask(method, ud, d, verify, fd=None):
    """Returns an Answer, or None if there is none to be had here"""
    try:
        message = describe(method, ud, environment(ud.type, d), verify)
        memory = bb.connections.current()
        if memory:
            return _ask_here(memory, message)
        address = d.getVar(ADDRESS)
        # In the server the connections may just have ended
        return _task_client(address).ask(message, fd) if address else None
    except (ConnectionCacheError, ValueError) as e:
        logger.debug("%s: not over shared connections: %s", redact(ud.url), e)
    return None

def _authorization(ud, home):
    """What is in the URL, else in ~/.netrc, as a value for Authorization, or None"""
    if ud.user and ud.pswd:
        # The fetcher leaves them as they are in the URL; in a parameter nothing is quoted
        return basic_auth(*(value if ud.parm.get(name) == value else urllib.parse.unquote(value)
                            for name, value in (("user", ud.user), ("pswd", ud.pswd))))
    if not home:
        return None
    path = os.path.join(home, ".netrc")
    try:
        login = _netrc(path, os.stat(path).st_mtime_ns).authenticators(urllib.parse.urlsplit(ud.url).hostname)
    except (OSError, netrc.NetrcParseError):
        return None
    return basic_auth(login[0], login[2]) if login and login[2] else None

@functools.lru_cache(maxsize=4)
def _netrc(path, mtime):
    return netrc.netrc(path)


# In the server

def _ask_here(memory, message):
    answered = threading.Event()
    outcome = []

    def done(request, response, error):
        outcome.extend((response, error))
        answered.set()

    request = Request(done=done, **message)
    memory.submit(request)
    deadline = time.monotonic() + POOL_SECONDS
    # In steps, since nothing wakes the query if the user wants to end it
    while not answered.wait(1):
        if bb.event._should_exit.is_set() or time.monotonic() > deadline:
            request.cancelled = True
            raise TimedOutError("interrupted, or no answer in %s seconds" % POOL_SECONDS)
    response, error = outcome
    if error:
        raise error
    return Answer(response.status, response.length, last_modified(response.headers))


# In a task

_client = None

def _task_client(address):
    """The one connection of this process to the server"""
    global _client
    if _client is None or _client.process != os.getpid() or _client.address != address:
        _client = TaskClient(address)
    return _client


class TaskClient:
    """
    The socket to the bitbake server. If it fails once, the task goes on
    without it, and the user is told.
    """
    def __init__(self, address):
        self.address = address
        self.process = os.getpid()
        self._number = 0
        self._sock = None
        self._schemes = ()
        self._failed = False

    def ask(self, message, fd=None):
        """
        Blocks until the server has an answer; each protocol.SILENCE_SECONDS it
        has to say something, and something new each POOL_SECONDS. Raises
        ConnectionCacheError.
        """
        if self._failed:
            raise ConnectionCacheError("the bitbake server's part has failed before")
        self._number += 1
        progress, deadline = None, time.monotonic() + POOL_SECONDS
        # What is too long for a message is not the server's fault
        data = protocol.encode(dict(message, id=self._number))
        try:
            if self._sock is None:
                self._connect()
            if message["url"].partition(":")[0].lower() not in self._schemes:
                raise ConnectionCacheError("the server has no connections of that scheme")
            protocol.send(self._sock, data, fd)
            reply = self._receive()
            while "progress" in reply:
                if reply["progress"] != progress:
                    progress, deadline = reply["progress"], time.monotonic() + POOL_SECONDS
                elif time.monotonic() > deadline:
                    raise ProtocolError("nothing comes of it for %s seconds" % POOL_SECONDS)
                reply = self._receive()
            if reply.get("id") != self._number or not ("status" in reply or "error" in reply):
                raise ProtocolError("answer to something else")
        except (OSError, ValueError, ProtocolError) as e:
            self._fail(e)
        if "error" in reply:
            raise ConnectionCacheError("%s: %s" % (reply["error"], reply.get("message")))
        return Answer(reply["status"], reply.get("size"), reply.get("modified"))

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

    def _fail(self, error):
        self._failed = True
        if self._sock is not None:
            self._sock.close()
        if isinstance(error, socket.timeout):
            error = TimedOutError("silent for %s seconds" % protocol.SILENCE_SECONDS)
        # All tasks may find that out, the user needs to know once
        bb.warnonce("The bitbake server's shared connections cannot be used, fetching without them")
        raise ConnectionCacheError("the bitbake server's part has failed: %s" % error) from error
