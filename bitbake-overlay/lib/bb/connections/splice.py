#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
Move data from a socket to a file inside the kernel, by splice(2).

Used by http.py in the event loop's thread for long bodies without TLS, with half of the CPU time of reading and writing.
The transport's reading is paused meanwhile.

    with Splice(loop, transport, fd, offset, left, moved) as splice:
        while splice.left:
            ...         # moved() is called when data has been moved, or after an error
"""

import contextlib
import errno
import fcntl
import os

from bb.connections import DestinationError, ProtocolError
from bb.connections.request import unwritable

# Bytes of the pipe between socket and file: the default of /proc/sys/fs/pipe-max-size
PIPE = 1024 * 1024
# fcntl.F_SETPIPE_SZ, which Python has since 3.10
F_SETPIPE_SZ = 1031

# os.splice() exists since Python 3.10. Cleared if the kernel does not support it for a file, for example with O_APPEND.
is_supported = hasattr(os, "splice")

# Descriptors in use, which a forked child has to close
descriptors = set()


class Splice:
    """
    left    number of bytes still to be moved
    offset  their offset in the file fd
    error   the OSError, ProtocolError or DestinationError that has ended it, or None
    """

    def __init__(self, loop, transport, fd, offset, left, moved):
        self.offset = offset
        self.left = left
        self.error = None
        self._loop = loop
        self._transport = transport
        self._fd = fd
        self._moved = moved

    def __enter__(self):
        sock = self._transport.get_extra_info("socket").fileno()
        with contextlib.ExitStack() as stack:
            # add_reader() refuses the transport's own descriptor
            self._sock = os.dup(sock)
            stack.callback(os.close, self._sock)
            self._pipe = os.pipe2(os.O_CLOEXEC)
            for fd in self._pipe:
                stack.callback(os.close, fd)
            with contextlib.suppress(OSError):
                # Refused beyond /proc/sys/fs/pipe-user-pages-soft: the pipe is smaller then
                fcntl.fcntl(self._pipe[1], F_SETPIPE_SZ, PIPE)
            used = {sock, self._sock, *self._pipe}
            descriptors.update(used)
            stack.callback(descriptors.difference_update, used)
            self._transport.pause_reading()
            stack.callback(self._transport.resume_reading)
            self._loop.add_reader(self._sock, self._move)
            stack.callback(self._loop.remove_reader, self._sock)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception):
        self._stack.close()

    def _move(self):
        global is_supported
        try:
            size = os.splice(self._sock, self._pipe[1], min(self.left, PIPE))
            if not size:
                raise ProtocolError("closed by the server in the middle of an answer")
            self._write(size)
        except BlockingIOError:
            return
        except (OSError, ProtocolError, DestinationError) as e:
            if isinstance(e, OSError) and e.errno == errno.EINVAL:
                is_supported = False
            self.error = e
            self._loop.remove_reader(self._sock)
        self._moved()

    def _write(self, size):
        while size:
            try:
                written = os.splice(self._pipe[0], self._fd, size, offset_dst=self.offset)
            except OSError as e:
                if e.errno == errno.EINVAL:
                    raise
                raise unwritable(e) from e
            size -= written
            self.left -= written
            self.offset += written
