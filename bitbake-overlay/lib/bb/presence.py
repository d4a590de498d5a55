#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
Which sstate objects exist, locally and on mirrors.

The runqueue creates one Presence object for a build and passes it to the
function of the metadata that BB_HASHCHECK_FUNCTION names. That function reports
the local objects, whose setscene tasks need no network, and queries the mirrors
for all other objects at once:

    def sstate_checkhashes(sq_data, d, siginfo=False, presence=None, **kwargs):
        ...
        if presence is not None:
            presence.local(found)
            sizes = presence.query([(tid, "file://..."), ...], localdata, siginfo)
            if sizes is not None:
                found.update(sizes)
            ...

BB_SETSCENE_PRESENCE selects what is queried: the mirrors, or first the hash
equivalence server and then the mirrors, for the objects that the server knows.
The requests to mirrors are in presencequery.py, prefetch.py fetches the objects.

All state belongs to the runqueue's thread.
"""

import logging
import os

import bb
from bb.connections.awsconfig import OTHERS as AWS_VARIABLES
from bb.connections.request import ENVIRONMENT
from bb.fetch2 import shared
from bb.presencequery import Query

logger = logging.getLogger("BitBake.RunQueue")

# Smallest number of objects with a progress bar, as openembedded-core has it
PROGRESS_FROM = 100
# Smallest number of objects of which the server is expected to know a tenth; of fewer it may know none by chance
MANY = 50
# Variables that select how the fetcher gets an object, besides those of its environment
FETCHER_SETTINGS = ("BB_NO_NETWORK", "BB_ALLOWED_NETWORKS", "BB_CHECK_SSL_CERTS", "BB_CONNECTION_CACHE", "FETCHCMD_sftp",
                    "FETCHCMD_wget", "FETCHCMD_s3", "AZ_SAS") + AWS_VARIABLES


class Presence:
    """
    rqdata is the build's RunQueueData, connections its SharedConnections.

    files       {tid: ObjectFiles} of the objects that can be fetched ahead
    """

    def __init__(self, rqdata, connections):
        self.files = {}
        self._rqdata = rqdata
        self._connections = connections
        # {tid: unihash}
        self._local = {}
        # {multiconfig: result of _fetches_as_query()}
        self._same_settings = {}
        # {tid: (Locations, mirror_index, mirror, size)} of objects that were found over the shared connections
        self._found = {}
        # Tasks whose object was missing in the last query: it may have reached a mirror since, so a cached answer is not used
        self._missing = set()
        # Topics of the warnings that have been issued
        self._warned = set()

    def _unihash(self, tid):
        return self._rqdata.runtaskentries[tid].unihash

    def local(self, tids):
        """Note that the objects of these setscene tasks, with their current hashes, are local"""
        for tid in tids:
            self._local[tid] = self._unihash(tid)

    def is_local(self, tid):
        """Return whether the object of tid, with its current hash, is local"""
        return tid in self._local and self._local[tid] == self._unihash(tid)

    def forget(self, tids):
        """Forget which of these objects are local, since they may have been removed"""
        for tid in tids:
            self._local.pop(tid, None)

    def query(self, objects, d, siginfo=False, title=None):
        """
        Query the mirrors of PREMIRRORS, the URL itself and the mirrors of MIRRORS, with the fetcher's settings of d, for
        objects, a list of (task id, file:// URL). With siginfo, these are URLs of .siginfo files, which the hash
        equivalence server does not know. title is that of the progress bar.

        Returns {task id: size in bytes, or None if the mirror has not announced it} of the objects that exist; those
        without an answer count as missing. Returns None if the shared connections cannot be used, so that the caller has
        to query by other means. Blocks until there are all answers; raises BBHandledException if the user interrupts.
        """
        server = self._connections.server
        if server is None:
            return None
        progress = None
        try:
            if not siginfo and "hashserv" in self._connections.settings.sources:
                objects = self._known_to_hashserv(objects)
            progress = Progress(title if len(objects) >= PROGRESS_FROM else None, len(objects), d)
            query = Query(server, d, self._missing)

            def update(done):
                progress.update(done)
                self._connections.report_hosts()

            sizes = query.run(objects, update)
            self._report(query.unanswered())
            if not siginfo:
                self._missing.update(tid for tid, _ in objects if tid not in sizes)
                self._missing.difference_update(sizes)
                self._found.update((tid, (query.locations, *where, sizes[tid])) for tid, where in query.found.items())
            return sizes
        except bb.BBHandledException:
            raise
        except Exception as e:
            logger.debug("The presence query failed", exc_info=True)
            self._warn("query", "The query for sstate objects over shared connections failed, querying without them: %r" % e)
            return None
        finally:
            if progress:
                progress.finish()

    def fetchable(self, files, umask, needed=1, settings=()):
        """
        Allow objects that query() has found to be fetched ahead of their tasks. files is {task id: list of file names
        below DL_DIR of the query's d}, the object first; the other files need not exist on the mirror. A task needs no
        network if the first needed files exist. Files are created with umask, a number. Objects of multiconfigs in which
        one of the variables in settings, or one of the fetcher's, differs from the default configuration are ignored.
        """
        for tid, names in files.items():
            locations, mirror_index, mirror, size = self._found.pop(tid, (None, None, None, None))
            old = self.files.get(tid)
            if old and (old.unihash, old.names, old.needed) == (self._unihash(tid), names, needed):
                continue
            if locations is not None and self._fetches_as_query(bb.runqueue.split_tid_mcfn(tid)[0], settings):
                self.files[tid] = ObjectFiles(names, needed, size, self._unihash(tid), umask, locations, mirror_index, mirror)

    def files_of(self, tid):
        """Return the ObjectFiles of tid's object with its current hash, or None"""
        files = self.files.get(tid)
        return files if files and files.unihash == self._unihash(tid) else None

    def _fetches_as_query(self, mc, settings):
        """Return whether the settings of the multiconfig mc are those of the query"""
        if mc not in self._same_settings:
            mcdata = self._rqdata.cooker.databuilder.mcdata
            # PATH may differ between multiconfigs, but leads to the same ssh
            names = set(settings) | set(FETCHER_SETTINGS) | set(ENVIRONMENT) - {"PATH"}
            self._same_settings[mc] = all(mcdata[mc].getVar(name) == mcdata[""].getVar(name) for name in names)
        return self._same_settings[mc]

    def _known_to_hashserv(self, objects):
        """Return the objects whose hash the hash equivalence server knows, all if it fails or knows too few of them"""
        if "hashserv" in self._warned:
            # Don't wait for its time-outs again
            return objects
        try:
            exist = bb.parse.siggen.unihashes_exist
        except AttributeError:
            self._warn("hashserv", "BB_SETSCENE_PRESENCE names hashserv, but no hash equivalence server is in use")
            return objects
        try:
            exists = exist({tid: self._unihash(tid) for tid, _ in objects})
            known = [(tid, url) for tid, url in objects if exists[tid]]
            if len(objects) < MANY or len(known) >= len(objects) / 10:
                return known
            self._warn("hashserv", "The hash equivalence server knows %d of %d sstate objects, querying the mirrors for all of them" %
                       (len(known), len(objects)))
            return objects
        except Exception as e:
            self._warn("hashserv", "The hash equivalence server could not be queried for sstate objects, querying the mirrors for "
                       "all of them: %r" % e)
            return objects

    def _report(self, mirrors):
        for mirror in mirrors:
            self._connections.reported.add(mirror.origin.host)
            self._warn(mirror.origin, "Sstate mirror %s://%s did not answer for %d of %d objects, treating them as missing there: "
                       "%s" % (mirror.origin.scheme, mirror.origin.host, mirror.unanswered, mirror.asked, mirror.reason))

    def _warn(self, topic, text):
        if topic not in self._warned:
            self._warned.add(topic)
            logger.warning(text)


class ObjectFiles:
    """
    The files of an object that can be fetched ahead of its task. Compared by identity: a new hash has a new one.

    names       file names below directory, the object first
    needed      how many of these the task needs, so that it fetches nothing
    size        of the object in bytes, None if the mirror has not announced it
    mirror      (origin, route)
    """
    __slots__ = ("names", "needed", "size", "unihash", "umask", "mirror", "_locations", "_mirror_index")

    def __init__(self, names, needed, size, unihash, umask, locations, mirror_index, mirror):
        self.names = names
        self.needed = needed
        self.size = size
        self.unihash = unihash
        self.umask = umask
        self.mirror = mirror
        self._locations = locations
        self._mirror_index = mirror_index

    @property
    def directory(self):
        return self._locations.d.getVar("DL_DIR")

    def describe(self, name):
        """
        Return the arguments of a Request for one of the files, on the mirror that has the object. Raises ValueError
        if the fetcher would not fetch it from there, or to another path.
        """
        url = "file://%s;downloadfilename=%s" % (name, name)
        _, uds = self._locations.find(url)
        ud = uds[self._mirror_index] if self._mirror_index < len(uds) else None
        # A mirror may apply to some of the names only, which shifts the index of the others
        if ud is None or not shared.supports(ud, self._locations.d) or ud.localpath != os.path.join(self.directory, name):
            raise ValueError("the fetcher uses another location or path for %s" % name)
        return self._locations.describe("GET", ud)


class Progress:
    """The progress bar of a query; none without a title"""

    def __init__(self, title, total, d):
        self._title = title
        self._d = d
        self._fire(bb.event.ProcessStarted, total)

    def update(self, done):
        self._fire(bb.event.ProcessProgress, done)

    def finish(self):
        self._fire(bb.event.ProcessFinished)

    def _fire(self, event, *args):
        if self._title:
            bb.event.fire(event(self._title, *args), self._d)
