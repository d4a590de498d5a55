#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
What is known of the presence of sstate objects in a build.

The runqueue makes one Presence object for a build and passes it to the function
of the metadata that BB_HASHCHECK_FUNCTION names. That one tells which objects it
has found on this machine, so that restoring them does not need the network:

    def sstate_checkhashes(sq_data, d, presence=None, **kwargs):
        ...
        if presence is not None:
            presence.local(found)

Called in the runqueue's thread only. It asks nobody: what the metadata does not
tell is not known, and not local.
"""


class Presence:
    """rqdata is the build's RunQueueData, whose hashes an object belongs to"""

    def __init__(self, rqdata):
        self._rqdata = rqdata
        self._local = {}

    def _unihash(self, tid):
        return self._rqdata.runtaskentries[tid].unihash

    def local(self, tids):
        """The objects of these setscene tasks, with their current hashes, are on this machine"""
        for tid in tids:
            self._local[tid] = self._unihash(tid)

    def is_local(self, tid):
        """Whether that was said for tid, and its hash has not changed since"""
        return tid in self._local and self._local[tid] == self._unihash(tid)

    def forget(self, tids):
        """It is asked for these again: what was known may not be so any more"""
        for tid in tids:
            self._local.pop(tid, None)
