#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
One batch query for the presence of files on mirrors.

Used by presence.py. Where a file may be is what fetch2 says: its own rules turn
a URL into those of the mirrors, in the order in which it would try them, and a
mirror is asked only for what those before it lack, or while those do not answer.
http, https and sftp are asked over the shared connections, everything else
(file, s3, a FETCHCMD_wget), and a server that those do not understand, by the
fetcher's own checkstatus(), as many at a time as BB_NUMBER_THREADS.

Everything runs in the caller's thread, except for one function that is marked.

    query = Query(server, d)
    sizes = query.run([(tid, "file://..."), ...], update=print)
    query.unanswered()      # the hosts that have not answered all
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

# Objects that are being asked for at the same time. What is behind them is not even turned into
# URLs yet, for which much more memory is needed than for the answer.
WINDOW = 2048

# Requests that are handed over together: each batch wakes the connection thread. The first is smaller, so that connecting
# starts early.
BATCH = 64
FIRST_BATCH = 8

# Statuses that the fetcher need not check, nor those of 500 and above
FINAL = (200,) + MISSING

# Seconds between two looks at the clock and at the user's interrupts, and between two updates of the progress
STEP = 0.5
PROGRESS = 0.2

# Files that a mirror is asked for again at the end, of those that it has said to be absent, if it answers many requests
# at once: some servers mix up answers, which is not noticed if both of them are 404
SAMPLE = 64
# Queries for fewer files are not checked
CHECKED_FROM = 32

# Seconds without any answer after which the query fails; a silent mirror is suspended much earlier
DEADLINE = 900


class Item:
    """
    An object that is being asked for. candidates are FetchData, where it may be; those up to place were asked for, and
    waiting have not answered yet. hosts are the Mirrors of these.
    """
    __slots__ = ("tid", "ud", "candidates", "place", "waiting", "hosts")

    def __init__(self, tid, ud, candidates):
        self.tid = tid
        self.ud = ud
        self.candidates = candidates
        self.place = -1
        self.waiting = 0
        self.hosts = []


class Mirror:
    """
    What became of the requests to a mirror at origin. route is that of the first request, reason why the first that
    has no answer has none.
    """
    def __init__(self, origin, route):
        self.origin = origin
        self.route = route
        self.asked = self.unanswered = 0
        self.reason = None


class Locations:
    """Where files may be, and how they are asked for there, with the fetcher's settings of d"""

    def __init__(self, d):
        self.d = d
        self._premirrors = bb.fetch2.mirror_from_string(d.getVar("PREMIRRORS"))
        self._mirrors = bb.fetch2.mirror_from_string(d.getVar("MIRRORS"))
        self._asked = {}

    def find(self, url):
        """The FetchData of url, and the list of those where the fetcher would look, itself among them"""
        ud = bb.fetch2.FetchData(url, self.d)
        ud.setup_localpath(self.d)
        uds = bb.fetch2.build_mirroruris(ud, self._premirrors, self.d)[1]
        uds.append(ud)
        if self._mirrors:
            uds += bb.fetch2.build_mirroruris(ud, self._mirrors, self.d)[1]
        return ud, uds

    def describe(self, method, ud):
        """The members of a Request for ud. ~/.netrc is read once for each mirror."""
        mirror = ud.url.partition("://")[2].partition("/")[0], ud.type, ud.user, ud.pswd
        if mirror not in self._asked:
            verify = ud.type == "sftp" or ud.method.check_certs(self.d)
            self._asked[mirror] = shared.describe_mirror(ud, shared.environment(ud.type, self.d), verify)
        return dict(self._asked[mirror], method=method, url=shared.request_url(ud))


class Query:
    """server is a ConnectionServer, d has the fetcher's settings"""

    def __init__(self, server, d):
        # {task id: (where its object was found over the shared connections, as Locations.find() counts, (the mirror's origin,
        # the route to it))}
        self.places = {}
        self.locations = Locations(d.createCopy())
        self._server = server
        self._d = self.locations.d
        # What is left to the fetchers is not for the shared connections
        self._d.delVar(shared.ADDRESS)
        self._network = not bb.utils.to_boolean(d.getVar("BB_NO_NETWORK"))
        self._mirrors = {}
        self._sizes = {}
        self._pending = set()
        # {Mirror: [(Item, place)] that it has not}, and whether that is being checked
        self._absent = collections.defaultdict(list)
        self._checking = False
        # Requests that are not submitted yet, {request: (Item, place, Mirror)} of all without an answer, and answers of the
        # fetchers
        self._requests = []
        self._asked = {}
        self._answers = collections.deque()
        # When the last answer arrived
        self._heard = 0
        self._executor = None
        self._ended = False
        self._caches = threading.local()
        self._caches_made = []
        self._stack = contextlib.ExitStack()

    def run(self, objects, update):
        """
        Ask for objects, a list of (task id, file:// URL). update(n) is called with how many are
        answered, not more often than each PROGRESS seconds. Blocks until all are answered. Returns
        {task id: size, or None if the mirror has not announced it} of those that exist; what a mirror did not answer
        is missing. Raises BBHandledException if the user interrupts, and TimedOutError.
        """
        with self._stack:
            try:
                self._loop(collections.deque(objects), update)
                self._check_absent()
            finally:
                # Also of mirrors whose answers were not needed in the end
                self._ended = True
                for request in self._asked:
                    request.cancelled = True
        return self._sizes

    def unanswered(self):
        """The Mirrors that have left something unanswered"""
        return [host for host in self._mirrors.values() if host.unanswered]

    def _loop(self, waiting, update):
        total = len(waiting)
        self._heard = shown = time.monotonic()
        while waiting or self._pending:
            for _ in range(min(BATCH if self._mirrors else FIRST_BATCH, len(waiting), WINDOW - len(self._pending))):
                self._begin(*waiting.popleft())
            requests, self._requests = self._requests, []
            if requests:
                self._server.submit(requests, self._done, first=True)
            idle = self._pending and not self._answers and (len(self._pending) >= WINDOW or not waiting)
            self._server.deliver(STEP if idle else 0)
            while self._answers:
                self._conclude(*self._answers.popleft())
            bb.event.check_for_interrupts()
            if not self._server.is_running:
                raise ConnectionCacheError("the shared connections have failed")
            now = time.monotonic()
            if now - shown >= PROGRESS:
                shown = now
                self._ask_further()
                update(total - len(waiting) - len(self._pending))
            if now - self._heard > DEADLINE:
                raise TimedOutError("no answer for %s seconds" % DEADLINE)

    def _check_absent(self):
        """Ask again for some of the files that are absent; if one of them is there now, for all of that mirror"""
        self._checking = True
        for host, all_absent in self._absent.items():
            if len(all_absent) >= CHECKED_FROM and self._server.pool.has_pipelined(host.origin):
                sample = random.sample(all_absent, min(SAMPLE, len(all_absent)))
                if self._recheck(host, sample):
                    logger.debug("%s: answers were mixed up, asking for one file at a time", host.origin.host)
                    self._server.distrust(host.origin)
                    self._recheck(host, all_absent)

    def _recheck(self, host, absent):
        """Returns whether any of the files is there after all"""
        found = len(self._sizes)
        for item, place in absent:
            if item.tid not in self._sizes:
                request = Request(**self.locations.describe("HEAD", item.candidates[place]))
                request.doubted = True
                item.waiting += 1
                # All candidates have been asked
                self._asked[request] = item, place, host
                self._pending.add(item)
                self._requests.append(request)
        self._loop(collections.deque(), lambda done: None)
        return len(self._sizes) > found

    # An object

    def _begin(self, tid, url):
        """Find out where it may be, and ask there first"""
        try:
            ud, uds = self.locations.find(url)
        except bb.fetch2.BBFetchException as e:
            logger.debug2("Presence of %s cannot be asked for: %s", redact(url), e)
            return
        item = Item(tid, ud, uds)
        self._pending.add(item)
        self._ask(item)

    def _ask(self, item):
        """Ask for the next candidate of item. If there is none, and no answer is awaited, it is missing."""
        while item.place + 1 < len(item.candidates):
            item.place += 1
            if self._ask_for(item, item.candidates[item.place]):
                item.waiting += 1
                return
        if not item.waiting:
            self._pending.discard(item)

    def _ask_further(self):
        """Ask the next mirror for what one that has no answer now was asked for"""
        failing = {host for host in self._mirrors.values() if not self._server.pool.is_healthy(host.origin, host.route)}
        for item in list(self._pending) if failing else ():
            if item.waiting == 1 and item.hosts and item.hosts[-1] in failing:
                self._ask(item)

    def _ask_for(self, item, ud):
        """Returns False if ud is not asked for"""
        if ud is item.ud and ud.type == "file":
            # The metadata has already checked the local file
            return False
        if not shared.supports(ud, self._d):
            self._check(item, ud)
            return True
        if not self._network:
            return False
        try:
            request = Request(**self.locations.describe("HEAD", ud))
        except ValueError as e:
            # A proxy that is not http, for example: the fetcher may know what to do
            logger.debug2("%s: not over shared connections: %s", redact(ud.url), e)
            self._check(item, ud)
            return True
        if request.origin not in self._mirrors:
            self._mirrors[request.origin] = Mirror(request.origin, request.route)
        # A redirect changes request.origin; the mirror stays the same
        host = self._mirrors[request.origin]
        host.asked += 1
        item.hosts.append(host)
        self._asked[request] = item, item.place, host
        self._requests.append(request)
        return True

    def _conclude(self, item, place, host, response, error):
        """The candidate of item at place was asked for, over the shared connections if there is a host"""
        self._heard = time.monotonic()
        if item not in self._pending:
            # Another mirror has answered before
            return
        if host and type(error) in (Cancelled, ConnectionCacheError):
            # The connections have ended, or have a fault: that says nothing of the mirror
            raise error
        if host and not (shared.is_final(error.kind) if error else response.status in FINAL or response.status >= 500):
            # The fetcher may understand it
            logger.debug2("%s: not over shared connections: %s", redact(item.candidates[place].url), error or response.status)
            self._check(item, item.candidates[place], place)
            return
        if error and not host:
            bb.error("Presence of %s cannot be asked for: %r" % (redact(item.candidates[place].url), error))
        item.waiting -= 1
        if response is not None and response.status == 200:
            self._sizes[item.tid] = response.length
            if host:
                self.places[item.tid] = place, (host.origin, host.route)
            self._pending.discard(item)
            return
        if host and not self._checking and (error or response.status >= 500):
            host.unanswered += 1
            host.reason = host.reason or (str(error) if error else "status %s" % response.status)
        elif host and not self._checking:
            self._absent[host].append((item, place))
        self._ask(item)

    def _done(self, request, response, error):
        """Of the server"""
        if not self._ended:
            self._conclude(*self._asked.pop(request), response, error)

    # By the fetcher's own means

    def _check(self, item, ud, place=None):
        if self._executor is None:
            # Once for all threads: the environment belongs to the process
            self._stack.enter_context(bb.utils.environment(**bb.fetch2.get_fetcher_environment(self._d)))
            bb.event.enable_threadlock()
            self._stack.callback(bb.event.disable_threadlock)
            threads = int(self._d.getVar("BB_NUMBER_THREADS") or 1)
            self._stack.callback(self._close_caches)
            self._executor = self._stack.enter_context(concurrent.futures.ThreadPoolExecutor(threads))
        self._executor.submit(self._checkstatus, item, ud, item.place if place is None else place)

    def _close_caches(self):
        for cache in self._caches_made:
            cache.close_connections()

    def _checkstatus(self, item, ud, place):
        """In a thread of the executor"""
        response = error = None
        try:
            if not self._ended and not bb.event._should_exit.is_set() and self._found(item, ud):
                response = Response(200, {}, None)
        except bb.fetch2.BBFetchException as e:
            logger.debug2("%s: %s", redact(ud.url), e)
        except Exception as e:
            error = e
        self._answers.append((item, place, None, response, error))
        self._server.wake()

    def _found(self, item, ud):
        """What Fetch.checkstatus() does with one of the URLs"""
        if not hasattr(self._caches, "connections"):
            self._caches.connections = bb.fetch2.FetchConnectionCache()
            self._caches_made.append(self._caches.connections)
        d = self._d.createCopy()
        d.setVar("SRC_URI", item.ud.url)
        fetch = bb.fetch2.Fetch([item.ud.url], d, cache=False, connection_cache=self._caches.connections)
        if ud is item.ud:
            return ud.method.checkstatus(fetch, ud, d)
        return bb.fetch2.try_mirror_url(fetch, item.ud, ud, d, True)
