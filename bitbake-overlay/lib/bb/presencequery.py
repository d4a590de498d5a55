#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
One batch query for the presence of files on mirrors.

Called by presence.py. fetch2 turns each URL into those of the mirrors, in the
order in which it would try them. A mirror is queried only for files that the
mirrors before it lack, or while these do not answer. http, https, sftp, s3 and
az mirrors are queried over the shared connections; all others (file, gs, with a
FETCHCMD_wget), and servers whose answers those do not understand, by the
fetcher's own checkstatus() in BB_NUMBER_THREADS threads.

All state belongs to the caller's thread, except in _checkstatus() and _exists().
Answers are not kept for other queries.

    query = Query(server, d)
    sizes = query.run([(tid, "file://..."), ...], update=print)
    query.unanswered()      # the mirrors that have not answered all requests
"""

import collections
import concurrent.futures
import contextlib
import logging
import random
import threading
import time

import bb
import bb.fetch2
from bb.connections import Cancelled, ConnectionCacheError, TimedOutError
from bb.connections.request import MISSING, Request, Response, redact
from bb.fetch2 import shared

logger = logging.getLogger("BitBake.RunQueue")

# Objects that are queried at the same time: their URLs and requests take much more memory than the answers
WINDOW = 2048
# Requests that are submitted together: each batch wakes the connection thread
BATCH = 64
# Requests in the first batch, a small one so that connecting starts early
FIRST_BATCH = 8
# Statuses below 500 for which the fetcher's checkstatus() is not called
FINAL = (200,) + MISSING
# Seconds between two checks for an interrupt while there are no answers
STEP = 0.5
# Seconds between two progress updates
PROGRESS = 0.2
# Absent files of a pipelining mirror that are queried again at the end, since some servers mix up answers, which is not
# noticed between two answers of 404
SAMPLE = 64
# Smallest number of absent files for that check: few of them cost little if they exist
CHECKED_FROM = 32
# Seconds without any answer after which the query fails; a mirror without answers is suspended much earlier
DEADLINE = 900


class Item:
    """
    An object that is being queried.

    candidates      FetchData of the URLs where it may be
    mirror_index    index of the last candidate that was queried
    waiting         number of candidates without an answer
    mirrors         Mirrors of the candidates that were queried
    """
    __slots__ = ("tid", "ud", "candidates", "mirror_index", "waiting", "mirrors")

    def __init__(self, tid, ud, candidates):
        self.tid = tid
        self.ud = ud
        self.candidates = candidates
        self.mirror_index = -1
        self.waiting = 0
        self.mirrors = []


class Mirror:
    """
    The requests to a mirror at origin. route is that of the first request, reason describes the first failure.
    """
    def __init__(self, origin, route):
        self.origin = origin
        self.route = route
        self.asked = self.unanswered = 0
        self.reason = None


class Locations:
    """The URLs where files may be, and requests for them, with the fetcher's settings of d"""

    def __init__(self, d):
        self.d = d
        self._premirrors = bb.fetch2.mirror_from_string(d.getVar("PREMIRRORS"))
        self._mirrors = bb.fetch2.mirror_from_string(d.getVar("MIRRORS"))
        self._described = {}

    def find(self, url):
        """Return the FetchData of url, and a list of all FetchData that the fetcher would try, including that"""
        ud = bb.fetch2.FetchData(url, self.d)
        ud.setup_localpath(self.d)
        uds = bb.fetch2.build_mirroruris(ud, self._premirrors, self.d)[1]
        uds.append(ud)
        if self._mirrors:
            uds += bb.fetch2.build_mirroruris(ud, self._mirrors, self.d)[1]
        return ud, uds

    def describe(self, method, ud):
        """Return the arguments of a Request for ud. Reads ~/.netrc once for each mirror."""
        mirror = ud.url.partition("://")[2].partition("/")[0], ud.type, ud.user, ud.pswd
        if mirror not in self._described:
            self._described[mirror] = shared.describe_mirror(ud, self.d)
        return dict(self._described[mirror], method=method, url=shared.request_url(ud, self.d))


class Query:
    """
    server is a ConnectionServer, d has the fetcher's settings. Cached answers are not used for the objects of the tasks
    missing_before.

    found       {task id: (index in the list of Locations.find(), (origin, route))} of objects that exist on a mirror with
                shared connections
    """

    def __init__(self, server, d, missing_before=()):
        self._missing_before = missing_before
        self.found = {}
        self.locations = Locations(d.createCopy())
        self._server = server
        self._d = self.locations.d
        # checkstatus() must not use the shared connections
        self._d.delVar(shared.ADDRESS)
        self._network = not bb.utils.to_boolean(d.getVar("BB_NO_NETWORK"))
        self._mirrors = {}
        self._sizes = {}
        # Items without a result
        self._pending = set()
        # {Mirror: [(Item, mirror_index)]} of absent files, and whether these are being checked
        self._absent = collections.defaultdict(list)
        self._checking = False
        # Requests to submit
        self._requests = []
        # {Request: (Item, mirror_index, Mirror)} of requests without an answer
        self._asked = {}
        # Results of _checkstatus()
        self._answers = collections.deque()
        # Time of the last answer
        self._answered_at = 0
        self._executor = None
        self._ended = False
        self._caches = threading.local()
        self._caches_made = []
        self._stack = contextlib.ExitStack()

    def run(self, objects, update):
        """
        Query objects, a list of (task id, file:// URL). update(number of results) is called every PROGRESS seconds at
        most. Blocks until there are all results. Returns {task id: size, or None if the mirror has not announced it} of
        the objects that exist; an object without an answer is missing. Raises BBHandledException if the user interrupts,
        ConnectionCacheError if the shared connections fail and TimedOutError after DEADLINE.
        """
        with self._stack:
            try:
                self._loop(collections.deque(objects), update)
                self._check_absent()
            finally:
                # Includes requests to mirrors whose answers were not needed in the end
                self._ended = True
                for request in self._asked:
                    request.cancelled = True
        return self._sizes

    def unanswered(self):
        """Return the Mirrors that have not answered all requests"""
        return [mirror for mirror in self._mirrors.values() if mirror.unanswered]

    def _loop(self, waiting, update):
        total = len(waiting)
        self._answered_at = shown = time.monotonic()
        while waiting or self._pending:
            for _ in range(min(BATCH if self._mirrors else FIRST_BATCH, len(waiting), WINDOW - len(self._pending))):
                self._begin(*waiting.popleft())
            requests, self._requests = self._requests, []
            if requests:
                self._server.submit(requests, self._done, first=True)
            idle = self._pending and not self._answers and (len(self._pending) >= WINDOW or not waiting)
            self._server.deliver(STEP if idle else 0)
            while self._answers:
                self._on_answer(*self._answers.popleft())
            # Not check_for_interrupts(), whose arguments depend on the version
            if bb.event._should_exit.is_set():
                logger.warning("Interrupted, the query for sstate objects ends")
                raise bb.BBHandledException()
            if not self._server.is_running:
                raise ConnectionCacheError("the shared connections have failed")
            now = time.monotonic()
            if now - shown >= PROGRESS:
                shown = now
                self._bypass_failing()
                update(total - len(waiting) - len(self._pending))
            if now - self._answered_at > DEADLINE:
                raise TimedOutError("no answer for %s seconds" % DEADLINE)

    def _check_absent(self):
        """Query a sample of the absent files again; if one of them exists, query all absent files of that mirror"""
        self._checking = True
        for mirror, absent in self._absent.items():
            if len(absent) >= CHECKED_FROM and self._server.pool.has_pipelined(mirror.origin):
                if self._recheck(mirror, random.sample(absent, min(SAMPLE, len(absent)))):
                    logger.debug("%s: answers were mixed up, querying one file at a time", mirror.origin.host)
                    self._server.disable_pipelining(mirror.origin)
                    self._recheck(mirror, absent)

    def _recheck(self, mirror, absent):
        """Return whether any of the files exists"""
        before = len(self._sizes)
        for item, mirror_index in absent:
            if item.tid not in self._sizes:
                request = Request(**self.locations.describe("HEAD", item.candidates[mirror_index]))
                request.recheck = True
                item.waiting += 1
                # All candidates have been queried
                self._asked[request] = item, mirror_index, mirror
                self._pending.add(item)
                self._requests.append(request)
        self._loop(collections.deque(), lambda done: None)
        return len(self._sizes) > before

    def _begin(self, tid, url):
        try:
            ud, uds = self.locations.find(url)
        except bb.fetch2.BBFetchException as e:
            logger.debug2("Cannot query %s: %s", redact(url), e)
            return
        item = Item(tid, ud, uds)
        self._pending.add(item)
        self._query_next(item)

    def _query_next(self, item):
        """Query the next candidate of item. If there is none, and no request without an answer, the object is missing."""
        while item.mirror_index + 1 < len(item.candidates):
            item.mirror_index += 1
            if self._query(item):
                item.waiting += 1
                return
        if not item.waiting:
            self._pending.discard(item)

    def _bypass_failing(self):
        """Query the next mirror for objects whose mirror does not answer now"""
        failing = {mirror for mirror in self._mirrors.values() if not self._server.pool.is_healthy(mirror.origin, mirror.route)}
        for item in list(self._pending) if failing else ():
            if item.waiting == 1 and item.mirrors and item.mirrors[-1] in failing:
                self._query_next(item)

    def _query(self, item):
        """Query the current candidate of item. Returns False if the file cannot exist there."""
        ud = item.candidates[item.mirror_index]
        if ud is item.ud and ud.type == "file":
            # The metadata has checked the local file already
            return False
        if not shared.supports(ud, self._d):
            self._check(item, item.mirror_index)
            return True
        if not self._network:
            return False
        try:
            request = Request(**self.locations.describe("HEAD", ud))
            request.recheck = item.tid in self._missing_before
        except ValueError as e:
            # The fetcher may support it, such as a SOCKS proxy
            logger.debug2("%s: not over shared connections: %s", redact(ud.url), e)
            self._check(item, item.mirror_index)
            return True
        if request.origin not in self._mirrors:
            self._mirrors[request.origin] = Mirror(request.origin, request.route)
        # A redirect changes request.origin; the mirror stays the same
        mirror = self._mirrors[request.origin]
        mirror.asked += 1
        item.mirrors.append(mirror)
        self._asked[request] = item, item.mirror_index, mirror
        self._requests.append(request)
        return True

    def _on_answer(self, item, mirror_index, mirror, response, error):
        """Process the result for a candidate of item. mirror is None if it comes from the fetcher's checkstatus()."""
        self._answered_at = time.monotonic()
        if item not in self._pending:
            # Another mirror has answered before
            return
        ud = item.candidates[mirror_index]
        if not mirror:
            logger.debug2("Queried %s for %s by its fetcher: %s", redact(ud.url), item.tid,
                          error or ("missing" if response is None else "found"))
        if mirror and type(error) in (Cancelled, ConnectionCacheError):
            # The shared connections have ended or failed, so the object may exist
            raise error
        if mirror and not (shared.is_final(error.kind) if error else response.status in FINAL or response.status >= 500):
            # The fetcher may understand the answer
            logger.debug2("%s: not over shared connections: %s", redact(ud.url), error or response.status)
            self._check(item, mirror_index)
            return
        if error and not mirror:
            bb.error("Cannot query %s: %r" % (redact(ud.url), error))
        item.waiting -= 1
        if response is not None and response.status == 200:
            self._sizes[item.tid] = response.length
            if mirror:
                self.found[item.tid] = mirror_index, (mirror.origin, mirror.route)
            self._pending.discard(item)
            return
        if mirror and not self._checking:
            if error or response.status >= 500:
                mirror.unanswered += 1
                mirror.reason = mirror.reason or (str(error) if error else "status %s" % response.status)
            else:
                self._absent[mirror].append((item, mirror_index))
        self._query_next(item)

    def _done(self, request, response, error):
        # Called by server.deliver()
        if not self._ended:
            item, mirror_index, mirror = self._asked.pop(request)
            logger.debug2("Queried %s for %s (connection %s): %s", redact(request.url), item.tid, request.connection,
                          error or "status %s" % response.status)
            self._on_answer(item, mirror_index, mirror, response, error)

    def _check(self, item, mirror_index):
        """Query a candidate of item by the fetcher's checkstatus()"""
        if self._executor is None:
            # Set once, since all threads share the environment of the process
            self._stack.enter_context(bb.utils.environment(**bb.fetch2.get_fetcher_environment(self._d)))
            bb.event.enable_threadlock()
            self._stack.callback(bb.event.disable_threadlock)
            threads = int(self._d.getVar("BB_NUMBER_THREADS") or 1)
            self._stack.callback(self._close_caches)
            self._executor = self._stack.enter_context(concurrent.futures.ThreadPoolExecutor(threads))
        self._executor.submit(self._checkstatus, item, mirror_index)

    def _close_caches(self):
        for cache in self._caches_made:
            cache.close_connections()

    def _checkstatus(self, item, mirror_index):
        # Called in a thread of the executor
        ud = item.candidates[mirror_index]
        response = error = None
        try:
            if not self._ended and not bb.event._should_exit.is_set() and self._exists(item, ud):
                response = Response(200, {}, None)
        except bb.fetch2.BBFetchException as e:
            logger.debug2("%s: %s", redact(ud.url), e)
        except Exception as e:
            error = e
        self._answers.append((item, mirror_index, None, response, error))
        self._server.wake()

    def _exists(self, item, ud):
        """Return what Fetch.checkstatus() returns for one of the URLs. Called in a thread of the executor."""
        if not hasattr(self._caches, "connections"):
            self._caches.connections = bb.fetch2.FetchConnectionCache()
            self._caches_made.append(self._caches.connections)
        d = self._d.createCopy()
        d.setVar("SRC_URI", item.ud.url)
        fetch = bb.fetch2.Fetch([item.ud.url], d, cache=False, connection_cache=self._caches.connections)
        if ud is item.ud:
            return ud.method.checkstatus(fetch, ud, d)
        return bb.fetch2.try_mirror_url(fetch, item.ud, ud, d, True)
