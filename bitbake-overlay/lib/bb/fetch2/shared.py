#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
The shared connections (bb.connections) for fetchers.

They belong to the BitBake server. Setscene tasks use them, and the server
itself while it finds out which sstate objects exist; both find its socket in
the datastore. In all other cases, and whenever they fail, the answer is None,
which means: fetch in the usual way. A mirror that refuses, cannot be reached or
is silent is no such failure: it would not be better served by a connection of
the task's own, and the file counts as absent.

    found = shared.checkstatus(ud, d)               # True, False or None
    path = shared.download(ud, d, localpath)        # of a complete file, or None
"""

import contextlib
import functools
import logging
import netrc
import os
import threading
import urllib.parse

import bb
from bb.connections import ConnectionCacheError
from bb.connections.client import Answer, Client, ServerError
from bb.connections.request import ABSENT, ENVIRONMENT, HTTP_ENVIRONMENT, MISSING, basic_auth, redact
from bb.networksettings import ADDRESS, STRANGE

logger = logging.getLogger("BitBake.Fetcher")

# How files compressed by zstd, or pzstd, begin (RFC 8878 3.1.1 and 3.1.2)
ZSTD_FRAME = 0xfd2fb528
ZSTD_SKIPPABLE_FRAME = 0x184d2a50
# Characters of a variable that is not for ssh
LONG_VALUE = 1000
# As a gateway says it (RFC 9110 15.6.5)
NO_ANSWER = 504

# The client of each thread
_clients = threading.local()


def checkstatus(ud, d, verify=True):
    """
    Whether the file of ud exists: True, False, or None if that cannot be found
    out here. Blocks as long as the mirror takes.
    """
    if not _usable(ud, d):
        return None
    answer = _ask("HEAD", ud, d, verify)
    if answer is None:
        # Don't ask the mirror again if the build is about to end
        return False if bb.event._should_exit.is_set() else None
    if answer.status == 200:
        return True
    return False if answer.status in MISSING or answer.status >= 500 else None

def download(ud, d, localpath, verify=True):
    """
    Fetch the file of ud into a new file next to localpath and return its path;
    the caller renames it. Returns None, and leaves no file, if that is not
    possible here; raises FetchError if the mirror has no such file. Blocks as
    long as the mirror takes.
    """
    if not _usable(ud, d):
        return None
    bb.fetch2.check_network_access(d, "shared connections", ud.url)
    # Not the name that wget --continue resumes. The fetcher holds its lock for localpath, so an existing file was left
    # by a task that has been killed.
    path = localpath + ".new"
    answer = None
    complete = strange = False
    try:
        _remove(path)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            answer = _ask("GET", ud, d, verify, fd)
            written = answer is not None and answer.status == 200 and is_complete(path, fd, answer.size, answer.modified)
            strange = written and not is_of_its_kind(localpath, fd)
        finally:
            os.close(fd)
        complete = written and not strange
    except OSError as e:
        logger.debug("%s: not over shared connections: %s", redact(ud.url), e)
    finally:
        if not complete:
            _remove(path)
    if answer is not None and (answer.status in ABSENT or answer.status >= 500):
        raise bb.fetch2.FetchError("No such file on the server, or no answer (status %s)" % answer.status, redact(ud.url))
    if strange:
        bb.warnonce(STRANGE % (ud.type, urllib.parse.urlsplit(ud.url).hostname))
        raise bb.fetch2.FetchError("Not a file of this kind", redact(ud.url))
    return path if complete else None

def is_final(kind):
    """Whether an error of that kind is the mirror's, so that the fetcher need not be asked as well"""
    return kind in ("connect", "refused", "timeout")

def _remove(path):
    with contextlib.suppress(OSError):
        os.unlink(path)

def is_complete(path, fd, size, modified):
    """Whether path is still the file that was written, with all of its size bytes. Sets its time as wget does."""
    written, named = os.fstat(fd), os.stat(path)
    if (written.st_dev, written.st_ino) != (named.st_dev, named.st_ino) or written.st_size != size:
        return False
    if modified is not None:
        os.utime(fd, (modified, modified))
    return True

def is_of_its_kind(name, fd):
    """Whether the file fd begins as one of that name has to: a server may answer everything with a page in HTML"""
    if not name.endswith((".zst", ".zst.siginfo")):
        return True
    magic = int.from_bytes(os.pread(fd, 4, 0), "little")
    return magic == ZSTD_FRAME or magic & ~0xf == ZSTD_SKIPPABLE_FRAME

def _usable(ud, d):
    if not d.getVar(ADDRESS) or not supports(ud, d):
        return False
    # The server's own datastore has the address only while it asks which objects exist
    return not bb.utils.to_boolean(d.getVar("BB_WORKERCONTEXT")) or (d.getVar("BB_CURRENTTASK") or "").endswith("_setscene")

def supports(ud, d):
    """Whether the user wants ud to be fetched in a way that shared connections support"""
    if not bb.utils.to_boolean(d.getVar("BB_CONNECTION_CACHE"), True):
        return False
    if ud.type in ("http", "https"):
        return not d.getVar("FETCHCMD_wget") and "redirectauth" not in ud.parm
    # ssh does not ask for a password
    return ud.type == "sftp" and not d.getVar("FETCHCMD_sftp") and not ud.pswd

def environment(scheme, d):
    """The variables of the fetcher which select the way to a host, and HOME for ~/.netrc; for ssh all that a task has"""
    if scheme != "sftp":
        return bb.fetch2.get_fetcher_environment(d, HTTP_ENVIRONMENT + ("HOME",))
    exported = os.environ if bb.utils.to_boolean(d.getVar("BB_WORKERCONTEXT")) else dict(bb.data.exported_vars(d))
    # All of them have to fit into a message
    exported = {name: value for name, value in exported.items() if len(value) < LONG_VALUE}
    return {**exported, **bb.fetch2.get_fetcher_environment(d), **bb.fetch2.get_fetcher_environment(d, ENVIRONMENT)}

def describe_mirror(ud, environ, verify):
    """
    The members of a Request that are the same for all files of a host and user. environ is that of environment().
    """
    if ud.type == "sftp":
        return {"environment": environ}
    home = environ.get("HOME", "")
    environ = {name: value for name, value in environ.items() if name != "HOME"}
    return {"environment": environ, "verify": verify, "authorization": _authorization(ud, home)}

def request_url(ud):
    return ud.url.partition(";")[0]

def _ask(method, ud, d, verify, fd=None):
    """Returns an Answer, with the status NO_ANSWER if the mirror does not answer, or None if there is a failure here"""
    message = dict(describe_mirror(ud, environment(ud.type, d), verify), method=method, url=request_url(ud))
    try:
        return _client(d.getVar(ADDRESS)).ask(message, fd, bb.event._should_exit.is_set)
    except ServerError as e:
        logger.debug("%s", e)
        # All tasks may find that out, the user needs to know once
        bb.warnonce("Cannot use the BitBake server's shared connections, fetching directly instead")
    except ConnectionCacheError as e:
        logger.debug("%s: %s", redact(ud.url), e)
        if is_final(e.kind):
            return Answer(NO_ANSWER, None, None)
    except ValueError as e:
        logger.debug("%s: not over shared connections: %s", redact(ud.url), e)
    return None

def _client(address):
    client, pid = getattr(_clients, "client", (None, None))
    if client is None or client.address != address or pid != os.getpid():
        if client:
            client.close()
        client = Client(address)
        _clients.client = client, os.getpid()
    return client

def _authorization(ud, home):
    """Value for Authorization from the URL, or else ~/.netrc, or None"""
    if ud.user and ud.pswd:
        # The fetcher leaves them as they are in the URL; those in a parameter are not quoted
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
