#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
The fetchers' side of the shared connections (bb.connections).

try_mirror_url() calls this module for each file from a mirror, and falls back to
the fetcher's own method. The connections belong to the BitBake server; setscene
tasks, and fetchers in the server itself, find the address of its socket in the
datastore. A file whose mirror refuses requests, is unreachable or does not
answer counts as missing: the fetcher would only add to the mirror's load.

    found = shared.checkstatus(ud, d)       # True, False, or None: use the fetcher's method
    done = shared.download(ud, d)           # False: use the fetcher's method

Each thread has a Client of its own.
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
from bb.connections import awsconfig
from bb.connections.client import Answer, Client, ServerError
from bb.connections.request import ABSENT, ENVIRONMENT, HTTP_ENVIRONMENT, MISSING, basic_auth, quote_key, redact
from bb.networksettings import ADDRESS, is_enabled

logger = logging.getLogger("BitBake.Fetcher")

# Magic number of a zstd frame (RFC 8878 3.1.1)
ZSTD_FRAME = 0xfd2fb528
# Magic number of a skippable frame, except its last four bits (RFC 8878 3.1.2); pzstd writes such a frame first
ZSTD_SKIPPABLE_FRAME = 0x184d2a50
# Length in characters from which an exported variable is not passed to ssh, since all of them have to fit into a message
LONG_VALUE = 1000
# Status for a mirror that gives no answer, as a gateway reports it (RFC 9110 15.6.5)
NO_ANSWER = 504

# (Client, process ID) of each thread
_clients = threading.local()


def checkstatus(ud, d):
    """
    Return whether the file of ud exists on its mirror, or None if the shared
    connections cannot determine that. Blocks until the mirror has answered.
    """
    if not _usable(ud, d):
        return None
    answer = _send("HEAD", ud, d)
    if answer is None:
        # Don't let the fetcher query the mirror if the build is about to end
        return False if bb.event._should_exit.is_set() else None
    if answer.status == 200:
        return True
    return False if answer.status in MISSING or answer.status >= 500 else None

def download(ud, d):
    """
    Fetch the file of ud to ud.localpath, for which the caller holds the lock.
    Returns False, and leaves no file, if the shared connections cannot fetch
    it. Raises FetchError if the mirror does not have the file or gives no
    answer. Blocks until the mirror has answered. Does not verify checksums.
    """
    if not _usable(ud, d):
        return False
    bb.fetch2.check_network_access(d, "shared connections", ud.url)
    # Not .tmp, which wget --continue would resume. Because of the lock, an existing file was left by a killed task.
    path = ud.localpath + ".new"
    try:
        answer = _download_to(path, ud, d)
        if answer is None:
            return False
        if answer.status != 200:
            reason = "No such file on the mirror" if answer.status in ABSENT else "The mirror has refused or not answered"
            raise bb.fetch2.FetchError("%s (status %s)" % (reason, answer.status), redact(ud.url))
        if not os.path.getsize(path):
            raise bb.fetch2.FetchError("The file is empty", redact(ud.url))
        # As with wget, what a mirror sends as a .siginfo file is no error: installing the object does not need it
        if not ud.localpath.endswith(".siginfo") and not has_expected_magic(path, ud.localpath):
            warn_unexpected_content(ud.type, urllib.parse.urlsplit(ud.url).hostname)
            raise bb.fetch2.FetchError("The content is not that of an sstate object", redact(ud.url))
        os.rename(path, ud.localpath)
        logger.debug2("%s: %s bytes over shared connections", redact(ud.url), answer.size)
        # May exist after an earlier download by wget
        _remove(ud.localpath + ".tmp")
        return True
    except OSError as e:
        logger.debug("%s: not over shared connections: %s", redact(ud.url), e)
        return False
    finally:
        _remove(path)

def _download_to(path, ud, d):
    """
    Fetch the file of ud to the new file path. Returns the Answer if the file is complete, missing or the mirror gives no
    answer, None in all other cases. Raises OSError.
    """
    bb.utils.mkdirhier(os.path.dirname(path))
    _remove(path)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        answer = _send("GET", ud, d, fd)
        if answer is not None and answer.status == 200:
            return answer if is_complete(path, fd, answer.size, answer.modified) else None
        return answer if answer is not None and (answer.status in ABSENT or answer.status >= 500) else None
    finally:
        # NFS reports here that the disk is full
        os.close(fd)

def is_final(kind):
    """Return whether an error of that kind is the mirror's, so that the fetcher would not get a better answer"""
    return kind in ("connect", "refused", "timeout")

def _remove(path):
    with contextlib.suppress(OSError):
        os.unlink(path)

def is_complete(path, fd, size, modified):
    """Return whether path still is the file at fd, with size bytes. Sets its modification time as wget does."""
    written, named = os.fstat(fd), os.stat(path)
    if (written.st_dev, written.st_ino) != (named.st_dev, named.st_ino) or written.st_size != size:
        return False
    if modified is not None:
        os.utime(fd, (modified, modified))
    return True

def has_expected_magic(path, name):
    """Return whether a file begins as its name demands: some servers answer every request with an HTML page"""
    if not name.endswith((".zst", ".zst.siginfo")):
        return True
    with open(path, "rb") as f:
        magic = int.from_bytes(f.read(4), "little")
    return magic == ZSTD_FRAME or magic & ~0xf == ZSTD_SKIPPABLE_FRAME

def warn_unexpected_content(scheme, host):
    bb.warnonce("Sstate mirror %s://%s has returned files that are not sstate objects, treating them as missing" % (scheme, host))

def _usable(ud, d):
    if not d.getVar(ADDRESS) or not supports(ud, d):
        return False
    # In the server, the datastore has the address only while the runqueue of a build exists
    return not bb.utils.to_boolean(d.getVar("BB_WORKERCONTEXT")) or (d.getVar("BB_CURRENTTASK") or "").endswith("_setscene")

def supports(ud, d):
    """Return whether the user's settings allow fetching ud over shared connections"""
    try:
        if not is_enabled(d):
            return False
    except ValueError as e:
        # In a recipe or a multiconfig: that of the configuration is checked before the build
        bb.fatal("%s: %s" % (d.getVar("FILE"), e))
    if ud.type == "az" and not (d.getVar("AZ_SAS") or "?").startswith("?"):
        # The fetcher reports it
        return False
    if ud.type in ("http", "https", "az"):
        return not d.getVar("FETCHCMD_wget") and "redirectauth" not in ud.parm
    if ud.type == "s3":
        return awsconfig.is_default(d.getVar("FETCHCMD_s3")) and not ud.user
    # A password cannot be passed to ssh
    return ud.type == "sftp" and not d.getVar("FETCHCMD_sftp") and not ud.pswd

def environment(scheme, d):
    """
    Return the variables that select the route to a host, and HOME for ~/.netrc; for ssh all exported variables, for s3
    those of aws without its keys
    """
    if scheme == "s3":
        environ = aws_environment(d)
        keys = {name: environ.pop(name) for name in awsconfig.SECRETS if name in environ}
        return dict(environ, **{awsconfig.KEYS_HASH: awsconfig.keys_hash(keys)})
    if scheme != "sftp":
        return bb.fetch2.get_fetcher_environment(d, HTTP_ENVIRONMENT + ("HOME",))
    exported = os.environ if bb.utils.to_boolean(d.getVar("BB_WORKERCONTEXT")) else dict(bb.data.exported_vars(d))
    exported = {name: value for name, value in exported.items() if len(value) < LONG_VALUE}
    return {**exported, **bb.fetch2.get_fetcher_environment(d), **bb.fetch2.get_fetcher_environment(d, ENVIRONMENT)}

def aws_environment(d):
    """Return the variables that select bucket, user and route for s3, including the keys"""
    environ = bb.fetch2.get_fetcher_environment(d, HTTP_ENVIRONMENT + awsconfig.EXPORTED + awsconfig.SECRETS)
    # Of the others, aws sees those that are exported
    environ.update((name, d.getVar(name)) for name in awsconfig.OTHERS + ("FETCHCMD_s3",)
                   if d.getVar(name) and (name == "FETCHCMD_s3" or d.getVarFlag(name, "export", False)))
    return environ

def describe_mirror(ud, d):
    """Return the arguments of a Request that are the same for all files of a host and user"""
    environ = environment(ud.type, d)
    if ud.type in ("sftp", "s3"):
        return {"environment": environ}
    home = environ.pop("HOME", "")
    return {"environment": environ, "verify": ud.method.check_certs(d), "authorization": _authorization(ud, home)}

def request_url(ud, d):
    url = ud.url.partition(";")[0]
    if ud.type == "s3":
        # As the fetcher passes them to aws
        return "s3://%s%s" % (ud.host, quote_key(ud.path))
    if ud.type == "az":
        # Its fetcher may have changed the URL
        sas = d.getVar("AZ_SAS") or ""
        return url.replace("az://", "https://", 1) + (sas if sas not in url else "")
    return url

def _send(method, ud, d, fd=None):
    """Return an Answer, with status NO_ANSWER if the mirror gives none, or None if the shared connections cannot be used"""
    message = dict(describe_mirror(ud, d), method=method, url=request_url(ud, d))
    try:
        return _client(d.getVar(ADDRESS)).ask(message, fd, bb.event._should_exit.is_set)
    except ServerError as e:
        logger.debug("%s", e)
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
    """Return the value of the Authorization header from the URL or else ~/.netrc, or None"""
    if ud.user and ud.pswd:
        # The fetcher does not unquote them; they are quoted in the URL, but not in a parameter
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
