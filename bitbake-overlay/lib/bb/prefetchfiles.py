#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
Create and install the files that prefetch.py fetches, which have temporary
names until they are complete.

Called in the runqueue's thread. Keeps no state. A server that is killed leaves
its temporary files behind: another server removes them when it fetches into the
same directory, after a day if it runs on another machine.

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

# Characters of a file's name in its temporary name, which may not exceed 255 characters either
MAX_NAME = 200
# Temporary names: machine and process of the server, and a random number
TEMPORARY = re.compile(r".*\.([0-9a-f]{8})-([0-9]+)-[0-9a-f]{8}\.new")
# Seconds without a change after which another machine's temporary file is removed: longer than any transfer
MAX_AGE = 24 * 60 * 60


def create(final, umask):
    """Create a temporary file for final, and its directory, with umask. Returns its path and a descriptor. Raises OSError."""
    directory, name = os.path.split(final)
    # The name is unique, since another process may fetch the same file: the fetcher's lock is not held here
    path = os.path.join(directory, "%s.%s-%s-%s.new" % (name[:MAX_NAME], _machine(), os.getpid(), secrets.token_hex(4)))
    # chmod() would reduce the rights that a default ACL grants
    with bb.utils.umask(umask):
        os.makedirs(directory, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    return path, fd

def install(path, final):
    """Rename a complete file to final; a file that exists there is kept. Raises OSError."""
    try:
        os.link(path, final)
    except OSError:
        # The file system does not support hard links, or final is a dangling symbolic link
        if not os.path.exists(final):
            os.rename(path, final)
            return
    os.unlink(path)

def remove_stale(directory):
    """Remove the temporary files of servers that have been killed"""
    try:
        for entry in os.scandir(directory):
            match = TEMPORARY.fullmatch(entry.name)
            if match and _is_stale(entry, *match.groups()):
                os.unlink(entry.path)
    except OSError:
        # The directory does not exist, or another server removes them as well
        pass

def _is_stale(entry, machine, pid):
    if machine == _machine():
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            return True
        except OSError:
            # The process belongs to another user
            pass
    return time.time() - entry.stat().st_mtime > MAX_AGE

@functools.lru_cache(maxsize=None)
def _machine():
    """Return a number that identifies this boot of the machine and the PID namespace"""
    with open("/proc/sys/kernel/random/boot_id") as f:
        return "%08x" % zlib.crc32((f.read() + os.readlink("/proc/self/ns/pid")).encode())
