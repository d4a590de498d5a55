#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
What is known of the presence of sstate objects in a build.

The runqueue makes one Presence object for a build and passes it to the function
of the metadata that BB_HASHCHECK_FUNCTION names. That one tells which objects it
has found on this machine, so that restoring them does not need the network, and
lets it ask the mirrors for all others at once:

    def sstate_checkhashes(sq_data, d, siginfo=False, presence=None, **kwargs):
        ...
        if presence is not None:
            presence.local(found)
            sizes = presence.query([(tid, "file://..."), ...], localdata, siginfo)
            if sizes is not None:
                found.update(sizes)
            ...

BB_SETSCENE_PRESENCE says who is asked: the mirrors, or first the hash
equivalence server and the mirrors only for what that knows. presencequery.py
does the asking.

Called in the runqueue's thread only.
"""

import logging
import os

import bb
from bb.connections.request import ENVIRONMENT
from bb.fetch2 import shared
from bb.presencequery import Query

logger = logging.getLogger("BitBake.RunQueue")

# Fewer objects are asked for without a progress bar
PROGRESS_FROM = 100
# If the hash equivalence server knows less than a tenth of so many objects, it has not seen the builds that made them
MANY = 50
# What decides in the fetcher how a task fetches. PATH is another one for each recipe, and finds the same ssh.
SETTINGS = ("BB_NO_NETWORK", "BB_ALLOWED_NETWORKS", "BB_CHECK_SSL_CERTS", "BB_CONNECTION_CACHE", "FETCHCMD_sftp",
            "FETCHCMD_wget") + tuple(sorted(set(ENVIRONMENT) - {"PATH"}))


class Presence:
    """
    rqdata is the build's RunQueueData, whose hashes an object belongs to,
    connections the build's SharedConnections, over which mirrors are asked.
    """

    def __init__(self, rqdata, connections):
        self._rqdata = rqdata
        self._connections = connections
        self._local = {}
        self._usual = {}
        # {tid: (Locations, place, mirror, size)} of what was found over the shared connections
        self._places = {}
        # {tid: Files}: what can be fetched ahead
        self.files = {}
        # What the user was told already
        self._told = set()

    def _unihash(self, tid):
        return self._rqdata.runtaskentries[tid].unihash

    # What is on this machine

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

    # What is on the mirrors

    def query(self, objects, d, siginfo=False, title=None):
        """
        Ask for objects, a list of (task id, file:// URL), with the fetcher's settings of d: the mirrors of
        PREMIRRORS, the URL itself, those of MIRRORS. Each answer is remembered as long as the build runs.

        Returns {task id: size in bytes, or None if the mirror has not announced it} of those that exist. An
        object is missing if a mirror gave no answer in the end. Returns None if
        there are no shared connections, or they failed: the caller has to ask in its own way. siginfo tells
        that the URLs are not of the objects but of their signatures, which no hash equivalence server knows.

        Blocks until all is answered; raises BBHandledException if the user interrupts. Shows a
        progress bar with that title.
        """
        server = self._connections.server
        if server is None:
            return None
        progress = None
        try:
            if not siginfo and "hashserv" in self._connections.settings.sources:
                objects = self._known_to_hashserv(objects)
            progress = Progress(title if len(objects) >= PROGRESS_FROM else None, len(objects), d)
            progress.start()
            query = Query(server, d)

            def update(done):
                progress.update(done)
                self._connections.report_pauses()

            sizes = query.run(objects, update)
            self._report(query.unanswered())
            if not siginfo:
                self._places.update((tid, (query.locations, *place, sizes[tid])) for tid, place in query.places.items())
            return sizes
        except bb.BBHandledException:
            raise
        except Exception as e:
            logger.debug("The presence query failed", exc_info=True)
            self._warn("query", "The query for sstate objects over shared connections failed, asking without them: %r" % e)
            return None
        finally:
            if progress:
                progress.finish()

    def fetchable(self, files, umask, needed=1):
        """
        Allow that the objects which query() has found are fetched ahead of their tasks. files is {task id: list
        of file names below DL_DIR of the query's d}: the object is the first, and the others are there when it is,
        if they exist on the mirror. A task that has so many of them, from the first on, as needed says fetches
        nothing. All are made with that umask, a number. Tasks for which one of settings() is another than usual
        are left out.
        """
        for tid, names in files.items():
            locations, place, mirror, size = self._places.pop(tid, (None, None, None, None))
            old = self.files.get(tid)
            if old and (old.unihash, old.names, old.needed) == (self._unihash(tid), names, needed):
                continue
            if locations is not None and self._as_usual(tid):
                self.files[tid] = Files(names, needed, size, self._unihash(tid), umask, locations, place, mirror)

    def files_of(self, tid):
        """The Files of tid's object with its current hash, or None"""
        files = self.files.get(tid)
        return files if files and files.unihash == self._unihash(tid) else None

    def _as_usual(self, tid):
        """Whether a task fetches as the query did"""
        mc, _, _, taskfn = bb.runqueue.split_tid_mcfn(tid)
        if mc not in self._usual:
            mcdata = self._rqdata.cooker.databuilder.mcdata
            self._usual[mc] = not differences(mcdata[mc], mcdata[""])
        return self._usual[mc] and not self._rqdata.dataCaches[mc].own_settings[taskfn]

    def _known_to_hashserv(self, objects):
        """Those of objects whose hash the hash equivalence server knows; all if it cannot be asked, or knows hardly any"""
        try:
            exist = bb.parse.siggen.unihashes_exist
        except AttributeError:
            self._warn("hashserv", "BB_SETSCENE_PRESENCE names hashserv, but there is no hash equivalence server in use")
            return objects
        try:
            exists = exist({tid: self._unihash(tid) for tid, _ in objects})
            known = [(tid, url) for tid, url in objects if exists[tid]]
            if len(objects) < MANY or len(known) >= len(objects) / 10:
                return known
            self._warn("hashserv", "The hash equivalence server knows %d of %d sstate objects, asking the mirrors for all" %
                       (len(known), len(objects)))
            return objects
        except Exception as e:
            self._warn("hashserv", "The hash equivalence server cannot tell which sstate objects exist, asking the mirrors for all: %r" % e)
            return objects

    def _report(self, hosts):
        """Tell, once for each host, of the requests that remained without an answer"""
        for host in hosts:
            self._connections.reported.add(host.origin.host)
            self._warn(host.origin, "Sstate mirror %s://%s did not answer for %d of %d objects, treating them as missing there: %s" %
                       (host.origin.scheme, host.origin.host, host.unanswered, host.asked, host.reason))

    def _warn(self, topic, text):
        if topic not in self._told:
            self._told.add(topic)
            logger.warning(text)


def settings(d):
    """
    Names of the variables that decide from where, to where and how tasks fetch objects. The metadata has its own
    in the flag settings of the function that BB_HASHCHECK_FUNCTION names.
    """
    return tuple((d.getVarFlag(d.getVar("BB_HASHCHECK_FUNCTION") or "", "settings") or "").split()) + SETTINGS


def differences(d, other):
    """Those of settings() for which d has not the value of other, or none that can be told"""
    def differs(name):
        try:
            return d.getVar(name) != other.getVar(name)
        except bb.data_smart.ExpansionError:
            return True

    return [name for name in settings(other) if differs(name)]


def own_settings(d, config):
    """
    Those of settings() which a recipe, whose datastore is d, does not have from the configuration, for the cache.
    What has no influence on whether that is valid, as SSTATE_DIR, counts as it was when the recipe was parsed.
    """
    if d.getVar("__SKIPPED", False):
        return []
    own = differences(d, config)
    if d.getVarFlag("BB_ALLOWED_NETWORKS", d.getVar("PN") or "", False):
        own.append("BB_ALLOWED_NETWORKS")
    return own


class Files:
    """
    What can be fetched ahead for a task: names of files below directory. Compared by identity: if the
    task's hash changes there is another one.
    """
    __slots__ = ("names", "needed", "size", "unihash", "umask", "mirror", "_locations", "_place")

    def __init__(self, names, needed, size, unihash, umask, locations, place, mirror):
        self.names = names
        # With how many of them the task fetches nothing
        self.needed = needed
        # Of the object, in bytes; None if the mirror has not told
        self.size = size
        self.unihash = unihash
        self.umask = umask
        self._locations = locations
        self._place = place
        # Its origin, and the route to it
        self.mirror = mirror

    @property
    def directory(self):
        return self._locations.d.getVar("DL_DIR")

    def describe(self, name):
        """
        The members of a Request for one of the files, on the mirror that has the object. Raises ValueError
        if the fetcher would not get it from there under that name.
        """
        url = "file://%s;downloadfilename=%s" % (name, name)
        _, uds = self._locations.find(url)
        ud = uds[self._place] if self._place < len(uds) else None
        # A mirror need not be one for all of the files, then another has its place
        if ud is None or not shared.supports(ud, self._locations.d) or ud.localpath != os.path.join(self.directory, name):
            raise ValueError("the fetcher gets %s from, or puts it, elsewhere" % name)
        return self._locations.describe("GET", ud)


class Progress:
    """The progress bar of a query, updated a few times a second by presencequery.py; none without a title"""

    def __init__(self, title, total, d):
        self.title = title
        self.total = total
        self.d = d
        self._shown = False

    def start(self):
        if self.title:
            bb.event.fire(bb.event.ProcessStarted(self.title, self.total), self.d)
            self._shown = True

    def update(self, done):
        if self.title:
            bb.event.fire(bb.event.ProcessProgress(self.title, done), self.d)

    def finish(self):
        if self._shown:
            bb.event.fire(bb.event.ProcessFinished(self.title), self.d)
