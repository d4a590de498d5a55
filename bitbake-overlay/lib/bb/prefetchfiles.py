#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
Files that are being fetched ahead of their tasks: under temporary names until
they are complete.

Used by prefetch.py, in the runqueue's thread. A server that is killed leaves
its temporary files behind; they are removed when the next one, of the same
machine, creates a file in that directory, or after a day by any.

    path, fd = prefetchfiles.create("/sstate-cache/ab/cd/sstate:zlib...", umask)
    ...
    prefetchfiles.install(path, final)
"""

import functools
import os
import re
import secrets
import time
import zlib

import bb.utils

# Characters of a file's name, which may be as long as names can be, that its temporary name begins with
MAX_NAME = 200
# Machine and process of the server, and a random number
TEMPORARY = re.compile(r".*\.([0-9a-f]{8})-([0-9]+)-[0-9a-f]{8}\.new")
# Seconds after which a temporary file belongs to nobody
MAX_AGE = 24 * 60 * 60


def create(final, umask):
    """
    Create a temporary file for final, and its directory, with the modes that umask, a number, leads to. Returns its path
    and a descriptor. Raises OSError.
    """
    directory, name = os.path.split(final)
    # Of our own: without the fetcher's lock somebody else may fetch the same
    path = os.path.join(directory, "%s.%s-%s-%s.new" % (name[:MAX_NAME], _machine(), os.getpid(), secrets.token_hex(4)))
    # Not chmod(): it would change what a default ACL grants
    with bb.utils.umask(umask):
        os.makedirs(directory, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    return path, fd

def install(path, final):
    """Give a complete file its final name, unless somebody else has put a file there meanwhile. Raises OSError."""
    try:
        os.link(path, final)
    except OSError:
        # Not every file system has links. What exists may be a link to nowhere.
        if not os.path.exists(final):
            os.rename(path, final)
            return
    os.unlink(path)

def remove_left(directory):
    """Remove the temporary files of servers that do not exist any more"""
    try:
        for entry in os.scandir(directory):
            match = TEMPORARY.fullmatch(entry.name)
            if match and _is_left(entry, *match.groups()):
                os.unlink(entry.path)
    except OSError:
        # There is no such directory, or another server does the same
        pass

def _is_left(entry, machine, pid):
    if machine == _machine():
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            return True
        except OSError:
            # It is another user's
            pass
    return time.time() - entry.stat().st_mtime > MAX_AGE

@functools.lru_cache(maxsize=None)
def _machine():
    """A number for this boot of this machine, and for the container in which process numbers are valid"""
    with open("/proc/sys/kernel/random/boot_id") as f:
        return "%08x" % zlib.crc32((f.read() + os.readlink("/proc/self/ns/pid")).encode())
