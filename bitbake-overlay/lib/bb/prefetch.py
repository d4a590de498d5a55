#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
Fetch sstate objects ahead of the setscene tasks that install them.

The runqueue creates one Prefetch object for a build and calls it at each turn.
The objects are fetched over the shared connections, in the order in which the
tasks would be started if all existing objects were installed. A task whose
object is being fetched is not started before the object has arrived or failed,
so installing and fetching overlap and no task waits for the network. Which
files belong to an object comes from the metadata, by way of presence.py.

BB_SETSCENE_PREFETCH limits the objects that are being fetched or have been
fetched and whose task has not been started yet. Up to one object for each
thread may exceed it, if tasks that could be started wait for them.

An object that cannot be fetched here is left to its task, which fetches it. All
state belongs to the runqueue's thread, and no method waits for the network.

    prefetch = Prefetch(rqexe, connections, presence)
    prefetch.process()                          # at each turn of the runqueue
    if prefetch.request_or_ready(tid):
        ...                                     # start the task
    prefetch.stop()
"""

import collections
import contextlib
import heapq
import logging
import os
import time

import bb
import bb.fetch2
from bb import prefetchfiles
from bb.connections import ConnectError, RefusedError, TimedOutError
from bb.connections.request import Request, last_modified, redact
from bb.fetch2 import shared

logger = logging.getLogger("BitBake.RunQueue")

# Objects that are fetched at the same time: enough for all connections, with few of the 1024 descriptors of select()
MAX_UNDER_WAY = 48
# How many of these are reserved for objects that a task waits for
RESERVED = 8
# Files of an object, to limit open files: the object, its .siginfo and its signature
FILES = 3
# Answers and starts in a turn of the runqueue: each costs file operations, which delay tasks that are ready
PER_TURN = 8
# Seconds without data after which an object is given up, so that no task depends on the connections' own time-outs
STALLED = 900
# Seconds between two progress events, and between two checks for stalled objects
INTERVAL = 0.5
# The runqueue spends at most one part in this many of its time on calling order()
ORDER_SHARE = 20


class Transfer:
    """
    The files of an object that are being fetched.

    temporary   {name: temporary path}
    requests    {name: Request without an answer}
    complete    names of the files that have arrived
    received    bytes in requests at the last check, active_at the time of the last change
    prioritised whether a task waits for the object, so its requests go first
    """
    def __init__(self, tid, files):
        self.tid = tid
        self.files = files
        self.temporary = {}
        self.requests = {}
        self.complete = set()
        self.error = None
        self.received = 0
        self.active_at = time.monotonic()
        self.prioritised = False


class Prefetch:
    """
    rqexe is the RunQueueExecute whose setscene tasks need the objects.

    waiting     tasks that could be started, but wait for their object
    objects     number of objects that were fetched
    """
    def __init__(self, rqexe, connections, presence):
        self.waiting = set()
        self.objects = 0
        self.bytes = 0
        self._rqexe = rqexe
        self._connections = connections
        self._presence = presence
        self._window = connections.settings.prefetch if connections.server and not rqexe.cooker.configuration.dry_run else 0
        self._under_way = {}
        # {request: (Transfer, name)} of requests without an answer
        self._requests = {}
        self._answers = collections.deque()
        # Tasks whose objects count for BB_SETSCENE_PREFETCH
        self._ahead = set()
        # Tasks that could be started since the last change, including those whose object has arrived
        self._startable = set()
        # Waiting tasks whose object is still to be requested
        self._to_start = collections.deque()
        # {tid: ObjectFiles} of objects that were requested; compared by identity, so a new hash is a new object
        self._tried = {}
        # Tasks whose object was requested again after its mirror had failed
        self._retried = set()
        # {mirror: deque of (number, tid)} of the objects to fetch next
        self._order = {}
        # Whether that has to be updated, and the earliest time to do so
        self._stale = True
        self._reorder_at = 0
        self._started = None
        # Values and time of the last progress event
        self._reported = (0, 0, 0)
        self._reported_at = 0
        # Time of the last check for stalled objects, and bytes that had arrived
        self._checked_at = self._arrived = 0
        if self._window:
            connections.prefetch = self

    def fds(self):
        """Return descriptors that are readable when process() has work to do"""
        server = self._connections.server
        if not self._window or not server:
            return []
        if self._answers:
            # A query has received them
            server.wake()
        return [server.fileno()]

    def changed(self):
        """Note that other tasks may be started, or in another order"""
        self._stale = True
        self._startable.clear()

    def _done(self, request, response, error):
        # Called by server.deliver()
        self._answers.append((*self._requests.pop(request), response, error))

    def process(self):
        """Install the files that have arrived and request more. Takes time for order() and file operations only."""
        if not self._window:
            return
        try:
            self._process()
        except bb.BBHandledException:
            raise
        except Exception as e:
            self._fail(e)

    def _fail(self, error):
        logger.debug("Prefetching sstate objects failed", exc_info=True)
        logger.warning("Prefetching sstate objects failed, setscene tasks will fetch them: %r" % error)
        self.stop()

    def _process(self):
        server = self._connections.server
        if server is None or not server.is_running:
            self.stop()
            return
        self._started = self._started or time.monotonic()
        server.deliver()
        self._drop_obsolete()
        for _ in range(min(len(self._answers), PER_TURN)):
            self._on_answer(*self._answers.popleft())
        first, later = [], []
        starts = PER_TURN
        while starts and self._room() > 0 and self._to_start and self._may_exceed_window():
            starts -= 1
            tid = self._to_start.popleft()
            if self._fetchable(tid):
                first += self._start(tid)
            elif tid not in self._under_way:
                self.waiting.discard(tid)
        if first:
            server.submit(first, self._done, first=True)
        # Each batch wakes the connection thread, so wait for room for several objects
        if self._room_ahead() >= min(PER_TURN, self._window // 8):
            while starts and self._room_ahead() > 0:
                starts -= 1
                tid = self._next_ahead(server)
                if tid is None:
                    break
                later += self._start(tid)
        if later:
            server.submit(later, self._done)
        if self._answers or not starts:
            # Continue in the next turn
            server.wake()
        self._report_progress()

    def _room(self):
        """Return how many more objects may be requested. Requests that were given up keep their file open until answered."""
        files = len(self._requests) + len(self._answers)
        return MAX_UNDER_WAY - max(len(self._under_way), -(-files // FILES))

    def _room_ahead(self):
        """Return how many more objects that no task waits for may be requested"""
        return min(self._room() - RESERVED, self._window - len(self._ahead))

    def _drop_obsolete(self):
        """Give up objects that no task will install, and those that have stalled"""
        running = self._rqexe.sq_running
        self._ahead = {tid for tid in self._ahead if tid not in running and self._tried[tid] is self._presence.files_of(tid)}
        # sq_running includes tasks that were skipped or have failed while they were waiting
        self.waiting = {tid for tid in self.waiting if tid not in running}
        for tid, transfer in list(self._under_way.items()):
            if tid in running:
                self._give_up(transfer, "its task does not run")
            elif self._presence.files_of(tid) is not transfer.files:
                self._give_up(transfer, "its hash has changed")
        now = time.monotonic()
        if now - self._checked_at < INTERVAL:
            return
        self._checked_at = now
        arrived, self._arrived = self._arrived, self._bytes()
        for transfer in list(self._under_way.values()):
            received = sum(request.received for request in transfer.requests.values())
            queued = not any(request.sent for request in transfer.requests.values())
            # A queued request is not stalled while the requests before it receive data
            if received != transfer.received or queued and arrived != self._arrived:
                transfer.received, transfer.active_at = received, now
            elif now - transfer.active_at > STALLED:
                self._give_up(transfer, "no data for %s seconds" % STALLED)

    def _bytes(self):
        return self.bytes + sum(request.received for transfer in self._under_way.values()
                                for request in transfer.requests.values())

    def _may_exceed_window(self):
        """Return whether an object that a task waits for may be requested, even if the window is full"""
        return len(self._ahead) < self._window or len(self._startable & self._ahead) < self._rqexe.number_tasks

    def request_or_ready(self, tid):
        """
        Request the object of tid, a task that could be started. Returns True if the task can be started now, with or
        without its object, False if it has to wait.
        """
        transfer = self._under_way.get(tid)
        if self._window and self._fetchable(tid):
            if tid not in self.waiting:
                self._to_start.append(tid)
                self._connections.server.wake()
        elif transfer is None:
            self.waiting.discard(tid)
            return True
        elif not transfer.prioritised:
            transfer.prioritised = True
            self._connections.server.prioritise(list(transfer.requests.values()))
        self.waiting.add(tid)
        self._startable.add(tid)
        return False

    def stop(self):
        """Cancel all requests and remove their files. Does not block."""
        if not self._window:
            return
        self._window = 0
        self.waiting.clear()
        self._to_start.clear()
        self._order.clear()
        for transfer in list(self._under_way.values()):
            self._give_up(transfer, "prefetching has ended")
        self._report_progress()

    def close(self):
        """Close the files that are still open. Called when the connections have ended, after stop()."""
        while self._answers:
            self._on_answer(*self._answers.popleft())

    def _next_ahead(self, server):
        """Return the next task to fetch an object for, or None"""
        now = time.monotonic()
        if self._stale and self._presence.files and now >= self._reorder_at:
            self._order = {}
            for number, tid in enumerate(filter(self._fetchable, order(self._rqexe))):
                self._order.setdefault(self._presence.files_of(tid).mirror, collections.deque()).append((number, tid))
            self._stale = False
            # If many of thousands of tasks fail, each failure would cause another call
            self._reorder_at = time.monotonic() + ORDER_SHARE * (time.monotonic() - now)
        # Objects that no task waits for yet can wait until their mirror has recovered
        queues = [queue for mirror, queue in self._order.items() if server.pool.is_healthy(*mirror)]
        while any(queues):
            _, tid = min(filter(None, queues), key=lambda queue: queue[0]).popleft()
            if self._fetchable(tid):
                return tid
        return None

    def _fetchable(self, tid):
        files = self._presence.files_of(tid)
        return files and self._tried.get(tid) is not files and tid not in self._rqexe.sq_running and \
            not self._presence.is_local(tid)

    def _start(self, tid):
        """Open the files of tid's object. Returns the requests for them, none if the object is left to its task."""
        files = self._presence.files_of(tid)
        self._tried[tid] = files
        transfer = Transfer(tid, files)
        try:
            if os.path.exists(os.path.join(files.directory, files.names[0])):
                raise FileExistsError("it exists already")
            # The object is the first, since the other files are of no use without it
            requests = [self._request(transfer, name) for name in files.names]
        except Exception as e:
            self.waiting.discard(tid)
            self._close(transfer)
            if isinstance(e, (OSError, ValueError, bb.fetch2.BBFetchException, bb.data_smart.ExpansionError)):
                logger.debug("Not fetching ahead for %s: %s", tid, e)
            else:
                self._fail(e)
            return []
        transfer.prioritised = tid in self.waiting
        logger.debug2("Fetching %s for %s", "now" if transfer.prioritised else "ahead", tid)
        self._under_way[tid] = transfer
        self._ahead.add(tid)
        return requests

    def _request(self, transfer, name):
        members = transfer.files.describe(name)
        final = os.path.join(transfer.files.directory, name)
        if name == transfer.files.names[0]:
            prefetchfiles.remove_stale(os.path.dirname(final))
        transfer.temporary[name], fd = prefetchfiles.create(final, transfer.files.umask)
        try:
            request = Request(fd=fd, empty=True, **members)
            if request.origin != transfer.files.mirror[0]:
                raise ValueError("another mirror has %s" % name)
        except BaseException:
            os.close(fd)
            raise
        transfer.requests[name] = request
        self._requests[request] = transfer, name
        return request

    def _on_answer(self, transfer, name, response, error):
        request = transfer.requests.pop(name)
        if self._under_way.get(transfer.tid) is transfer:
            self._on_file(transfer, name, request, response, error)
        try:
            os.close(request.fd)
        except OSError as e:
            # NFS reports here that the disk is full
            transfer.error = e
        if not transfer.requests and self._under_way.get(transfer.tid) is transfer:
            self._on_complete(transfer)

    def _on_file(self, transfer, name, request, response, error):
        logger.debug2("Requested %s for %s (connection %s): %s", redact(request.url), transfer.tid, request.connection,
                      error or "status %s" % response.status)
        if response is not None and response.status == 200:
            try:
                # The fetcher rejects empty files, too
                if not response.length or not shared.is_complete(transfer.temporary[name], request.fd, response.length,
                                                                 last_modified(response.headers)):
                    error = "empty or incomplete"
                elif not shared.has_expected_magic(transfer.temporary[name], name):
                    error = "unexpected content"
                    origin, _ = transfer.files.mirror
                    shared.warn_unexpected_content(origin.scheme, origin.host)
                    self._connections.server.reject(request)
                else:
                    transfer.complete.add(name)
                    return
            except OSError as e:
                error = e
        elif response is not None:
            error = "status %s" % response.status
        if name != transfer.files.names[0] and not isinstance(error, OSError):
            # The task can install the object without its other files
            logger.debug2("No %s: %s", name, error)
            return
        transfer.error = transfer.error or error

    def _on_complete(self, transfer):
        """Install the files, the object as the last one, since other builds look for that"""
        if not transfer.error:
            try:
                for name in reversed(transfer.files.names):
                    if name in transfer.complete:
                        prefetchfiles.install(transfer.temporary[name], os.path.join(transfer.files.directory, name))
                        del transfer.temporary[name]
            except OSError as e:
                transfer.error = e
        if transfer.error:
            if (isinstance(transfer.error, (ConnectError, RefusedError, TimedOutError)) and transfer.tid not in self.waiting and
                    transfer.tid not in self._retried):
                # Request it once more when the mirror has recovered
                self._retried.add(transfer.tid)
                del self._tried[transfer.tid]
                self._stale = True
            self._give_up(transfer, transfer.error)
            return
        del self._under_way[transfer.tid]
        self._unlink(transfer)
        self.waiting.discard(transfer.tid)
        self.objects += 1
        self.bytes += transfer.files.size or 0
        if transfer.complete.issuperset(transfer.files.names[:transfer.files.needed]):
            self._presence.local([transfer.tid])
        logger.debug2("Fetched ahead for %s", transfer.tid)

    def _give_up(self, transfer, reason):
        logger.debug("Not fetched ahead for %s: %s", transfer.tid, reason)
        self._under_way.pop(transfer.tid, None)
        self._ahead.discard(transfer.tid)
        self.waiting.discard(transfer.tid)
        for request in transfer.requests.values():
            request.cancelled = True
        self._unlink(transfer)

    def _close(self, transfer):
        """Close the files of a transfer whose requests have not been submitted"""
        for request in transfer.requests.values():
            del self._requests[request]
            with contextlib.suppress(OSError):
                os.close(request.fd)
        self._unlink(transfer)

    @staticmethod
    def _unlink(transfer):
        for path in transfer.temporary.values():
            with contextlib.suppress(OSError):
                os.unlink(path)
        transfer.temporary.clear()

    def _report_progress(self):
        now = time.monotonic()
        ended = not self._under_way and not self._order
        if not self._bytes() or not ended and now - self._reported_at < INTERVAL or \
                ended and self._reported[:2] == (self.objects,) * 2:
            return
        self._reported_at = now
        left = [transfer.files.size or 0 for transfer in self._under_way.values()]
        for mirror, queue in list(self._order.items()):
            # Some of their tasks may have been started since the queue was made
            queue = self._order[mirror] = collections.deque(entry for entry in queue if self._fetchable(entry[1]))
            left += [self._presence.files_of(tid).size or 0 for _, tid in queue]
            if not queue:
                del self._order[mirror]
        size = self._bytes()
        values = (self.objects, self.objects + len(left), size)
        if values != self._reported:
            self._reported = values
            # The sizes of the .siginfo files are not known in advance
            total = max(size, self.bytes + sum(left))
            bb.event.fire(bb.event.SstateFetchProgress(*values, total, now - self._started), self._rqexe.cfgData)


def order(rqexe):
    """
    Yield the setscene tasks that will be sent to a worker, in the order in which they can be started, assuming that
    all existing objects are installed. Simulates RunQueueExecute.execute() on copies of its state.
    """
    sqdata = rqexe.sqdata
    notcovered = set(rqexe.scenequeue_notcovered)
    covered = rqexe.scenequeue_covered | (rqexe.sq_running - notcovered)
    done = covered | notcovered
    notneeded = set(rqexe.scenequeue_notneeded)
    needed = set(rqexe.sq_needed_harddeps)
    queued = set()
    # {hard dependency that is not done: tasks that wait for it}
    held = {}
    # (place, task)
    queue = []

    def add(tids):
        for tid in tids:
            if tid not in queued and tid not in done:
                queued.add(tid)
                heapq.heappush(queue, (sqdata.places[tid], tid))

    add(rqexe.sq_buildable)
    for tid in rqexe.sq_running - rqexe.scenequeue_covered - notcovered:
        add(dep for dep in sqdata.sq_deps[tid] if sqdata.sq_revdeps[dep] <= done)
    while queue:
        _, tid = heapq.heappop(queue)
        if tid in done or rqexe.sq_deferred.get(tid, tid) != tid and rqexe.sq_deferred[tid] not in rqexe.runq_complete:
            # The outcome of a deferred task is not known yet
            continue
        finished = [tid]
        missing = [dep for dep in sorted(sqdata.sq_harddeps_rev.get(tid, ())) if dep not in done]
        if rqexe.setscene_not_needed(tid, covered, needed, notneeded):
            covered.add(tid)
            notneeded.add(tid)
        elif missing:
            needed.update(missing)
            held.setdefault(missing[0], []).append(tid)
            add(missing)
            continue
        else:
            outcome = rqexe.setscene_outcome(tid)
            if outcome is None:
                yield tid
            if outcome == "fail":
                # Tasks with a hard dependency on it fail as well
                finished += [other for other in sorted(sqdata.sq_harddeps.get(tid, ())) if other not in done]
                notcovered.update(finished)
            else:
                covered.add(tid)
        done.update(finished)
        for one in finished:
            add(dep for dep in sqdata.sq_deps[one] if sqdata.sq_revdeps[dep] <= done)
            waiting = held.pop(one, ())
            queued.difference_update(waiting)
            add(waiting)
