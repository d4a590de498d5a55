#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
One file that is read over SFTP into a descriptor.

Used by sftp.py, which sends the packets and tells what was answered. Several
READs of a file may be in flight, and their answers come in any order.
"""

import os

from bb.connections import ProtocolError
from bb.connections.request import redact, unwritable


class Transfer:
    """
    request     None once it has been answered: data that still arrives is dropped
    size        of the file, from FSTAT; None before
    asked       READs have been sent for the bytes up to here
    failure     (response, error) that a READ has led to, or None
    queued      it is in the session's queue of transfers to send a READ for
    """
    __slots__ = ("request", "handle", "size", "asked", "failure", "queued")

    def __init__(self, request):
        self.request = request
        self.handle = None
        self.size = None
        self.asked = 0
        self.failure = None
        self.queued = False

    def next_read(self, guess, largest):
        """How many bytes to ask for at offset asked, 0 for none. Before the size is known there is one READ of guess."""
        if self.request is None:
            return 0
        if self.size is None:
            return min(self.request.size or guess, largest)
        return max(0, min(self.size - self.asked, largest))

    def write(self, data, offset):
        """Write a memoryview. Raises DestinationError."""
        size = len(data)
        try:
            while data:
                data = data[os.pwrite(self.request.fd, data, offset + size - len(data)):]
        except OSError as e:
            raise unwritable(e) from e
        # The ranges of READs are disjoint, so that their sum tells whether the file is complete
        self.request.received += size

    def received(self, offset, size, got, at_end):
        """
        got of the size bytes at offset have been written; at_end if that was all there is. Returns how many bytes
        have to be asked for once more, behind these.
        """
        if self.size is None:
            # It was the first
            self.asked = got
            return 0
        missing = min(size, self.size - offset) - got
        if missing > 0 and got:
            return missing
        if missing > 0 and at_end:
            self.fail(ProtocolError("%s: ends at %s of %s bytes" % (redact(self.request.url), offset, self.size)))
        return 0

    def fail(self, error, response=None):
        self.failure = self.failure or (response, error)

    def is_complete(self):
        """Sets failure if the file is longer than it was"""
        if self.request.received > self.size:
            self.fail(ProtocolError("%s: grows while it is read" % redact(self.request.url)))
        return self.request.received == self.size
