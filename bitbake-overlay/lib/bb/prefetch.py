#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
Fetching sstate objects ahead of the setscene tasks that install them.

The metadata has told which files the object of a setscene task consists of
(presence.py). The bitbake server fetches them over the shared connections, in
the order in which the tasks will be started if each object that exists can be
installed. A task whose object is under way is not started before that is there,
or has failed; so no task waits for the network, and installing and fetching
overlap. Whatever is not fetched here is fetched by its task.

BB_SETSCENE_PREFETCH is how many objects may have been fetched, or be under way,
that no task has taken yet. A task that could be started now gets its object
even so.

Called in the runqueue's thread only.

    prefetch = Prefetch(rqexe, connections, presence)
    ...
    prefetch.process()          # at each turn of the runqueue
    if prefetch.awaits(tid):
        ...                     # the task that could be started has to wait
    prefetch.stop()
"""

import collections
import logging
import os
import time

import bb
import bb.fetch2
from bb import prefetchfiles
from bb.connections import ConnectError, RefusedError, TimedOutError
from bb.connections.request import Request, last_modified
from bb.fetch2 import shared

logger = logging.getLogger("BitBake.RunQueue")

# Objects under way at the same time, some of which are kept for those that a task waits for
MAX_UNDER_WAY = 48
RESERVED = 8
# Files of an object, and files that are open for all of them, also those that nobody waits for any more
MAX_FILES = 3
MAX_OPEN = MAX_UNDER_WAY * MAX_FILES
# Answers that are taken, and objects that are asked for, in a turn of the runqueue: each costs file operations, and
# tasks whose objects are there should not wait for those of many others. As each turn has threads to wake up, what
# nobody waits for is also put off until there are so many answers, or room for so many objects, at most an eighth of
# the window; but from turn to turn room is not left longer than FILL_EACH, in seconds.
ANSWERS_EACH = 8
STARTS_EACH = 8
FILL_EACH = 1
# Seconds after which an object of which nothing more arrives is given up, whatever the connections say, and how
# often that is looked at
STALLED = 900
LOOK_EACH = 10
# Of its time the runqueue may spend one part in so many on finding out what comes next
ORDER_SHARE = 20
# Seconds between two progress events
PROGRESS = 0.5


class Transfer:
    """
    The files of an object that are under way. temporary is {name: its temporary path}, requests those
    which have no answer yet, found the names of those which are complete. received and heard tell how many bytes had
    arrived when that was last looked at, and when it had last changed. hurried tells that a task waits for it,
    and that its requests come first.
    """
    def __init__(self, tid, files):
        self.tid = tid
        self.files = files
        self.temporary = {}
        self.requests = {}
        self.found = set()
        self.error = None
        self.received = 0
        self.heard = time.monotonic()
        self.hurried = False


class Prefetch:
    """
    rqexe is the RunQueueExecute whose tasks it serves.

    awaited     the tasks that could be started, but have to wait for their object
    objects     how many were fetched
    """
    def __init__(self, rqexe, connections, presence):
        self.awaited = set()
        self.objects = 0
        self.bytes = 0
        self._rqexe = rqexe
        self._connections = connections
        self._presence = presence
        self._window = connections.settings.prefetch if connections.server and not rqexe.cooker.configuration.dry_run else 0
        self._under_way = {}
        # {request: (Transfer, name)} of those without an answer
        self._requests = {}
        # Under way or fetched, and not taken by its task yet
        self._ahead = set()
        # Those which were awaited, also when their object is there. Cleared with each change of what is started.
        self._startable = set()
        # Those of awaited that are not under way yet, and those that are since before
        self._wanted = collections.deque()
        self._hurried = []
        # {tid: files} that were tried, so that another name is another object
        self._tried = {}
        # Those which got a second chance since the mirror was gone
        self._retried = set()
        # {mirror: (number, tid) of those which come next}, whether that is to be found out (again), and not before when
        self._order = {}
        self._stale = True
        self._again_at = 0
        # When room was last used for what nobody waits for
        self._filled_at = 0
        self._started = None
        self._open = 0
        # Of the last progress event, and of the last look for what has stalled
        self._told = (0, 0, 0)
        self._told_at = self._looked_at = self._arrived = 0
        self._answers = collections.deque()
        if self._window:
            connections.prefetch = self

    def fds(self):
        """What is readable when there is something to process"""
        server = self._connections.server
        return [server.fileno()] if self._window and server else []

    def changed(self):
        """What will be started, and in which order, may have changed"""
        self._stale = True
        self._startable.clear()

    def _done(self, request, response, error):
        """Of the server"""
        self._answers.append((*self._requests.pop(request), response, error))

    def process(self):
        """
        Take what has arrived, and ask for more. Does not wait for the network; to find out what comes next,
        and the disk, may take some time.
        """
        if not self._window:
            return
        try:
            self._process()
        except bb.BBHandledException:
            raise
        except Exception as e:
            self._fail(e)

    def _fail(self, error):
        """A fault of ours"""
        logger.debug("Fetching sstate objects ahead failed", exc_info=True)
        logger.warning("Prefetching sstate objects failed, setscene tasks will fetch them: %r" % error)
        self.stop()

    def _process(self):
        server = self._connections.server
        if server is None or not server.is_running:
            # The connections have ended before the build: the tasks fetch themselves
            self.stop()
            return
        self._started = self._started or time.monotonic()
        server.deliver()
        self._forget()
        for _ in range(min(len(self._answers), ANSWERS_EACH)):
            self._answered(*self._answers.popleft())
        first, later = [], []
        starts = STARTS_EACH
        while starts and self._room() > 0 and self._wanted and self._may_start():
            starts -= 1
            tid = self._wanted.popleft()
            if self._fetchable(tid):
                first += self._start(tid)
            elif tid not in self._under_way:
                self.awaited.discard(tid)
        if first:
            server.submit(first, self._done, first=True)
        hurried, self._hurried = self._hurried, []
        if hurried:
            server.hurry([request for transfer in hurried for request in transfer.requests.values()])
        now = time.monotonic()
        enough = self._room_ahead() >= min(STARTS_EACH, self._window // 8) or now - self._filled_at > FILL_EACH
        while enough and starts and self._room_ahead() > 0:
            starts -= 1
            tid = self._following(server)
            if tid is None:
                break
            later += self._start(tid)
            self._filled_at = now
        if later:
            server.submit(later, self._done)
        if self._answers or not starts:
            # Continue in the next turn
            server.wake()
        self._tell()

    def _room(self):
        """For how many more objects"""
        return min(MAX_UNDER_WAY - len(self._under_way), (MAX_OPEN - self._open) // MAX_FILES)

    def _room_ahead(self):
        """For how many that no task waits for"""
        return min(self._room() - RESERVED, self._window - len(self._ahead))

    def _forget(self):
        """Give up what no task will take"""
        running = self._rqexe.sq_running
        # With another hash it is another object that the task will take
        self._ahead = {tid for tid in self._ahead if tid not in running and self._tried[tid] is self._presence.files_of(tid)}
        # A task may also be skipped, or given up, while it waits
        self.awaited = {tid for tid in self.awaited if tid not in running}
        for tid, transfer in list(self._under_way.items()):
            if tid in running:
                self._give_up(transfer, "its task does not run")
            elif self._presence.files_of(tid) is not transfer.files:
                self._give_up(transfer, "it has another hash now")
        now = time.monotonic()
        if now - self._looked_at < LOOK_EACH:
            return
        self._looked_at = now
        arrived, self._arrived = self._arrived, self._bytes()
        for transfer in list(self._under_way.values()):
            received = sum(request.received for request in transfer.requests.values())
            waits = not any(request.sent for request in transfer.requests.values())
            if received != transfer.received or waits and arrived != self._arrived:
                # Or it waits behind others, which arrive
                transfer.received, transfer.heard = received, now
            elif now - transfer.heard > STALLED:
                self._give_up(transfer, "nothing arrives for %s seconds" % STALLED)

    def _bytes(self):
        """How many bytes have arrived"""
        return self.bytes + sum(request.received for transfer in self._under_way.values()
                                for request in transfer.requests.values())

    def _may_start(self):
        """Whether one more for a task that could be started: with a full window there may be one for each thread"""
        return len(self._ahead) < self._window or len(self._startable & self._ahead) < self._rqexe.number_tasks

    def awaits(self, tid):
        """Whether tid, which could be started, has to wait for its object. If that is not under way it will be."""
        if self._window and self._fetchable(tid):
            if tid not in self.awaited:
                self._wanted.append(tid)
                # For the next turn
                self._connections.server.wake()
        elif tid not in self._under_way:
            self.awaited.discard(tid)
            return False
        elif not self._under_way[tid].hurried:
            self._under_way[tid].hurried = True
            self._hurried.append(self._under_way[tid])
            self._connections.server.wake()
        self.awaited.add(tid)
        self._startable.add(tid)
        return True

    def stop(self):
        """Cancel what is under way, and leave no file behind. Does not block."""
        if not self._window:
            return
        self._window = 0
        self.awaited.clear()
        self._wanted.clear()
        self._order.clear()
        for transfer in list(self._under_way.values()):
            self._give_up(transfer, "no more is fetched ahead")
        self._tell()

    def close(self):
        """After the connections have ended"""
        while self._answers:
            self._answered(*self._answers.popleft())

    def _following(self, server):
        """The next task to fetch for, or None"""
        now = time.monotonic()
        if self._stale and now >= self._again_at:
            self._order = {}
            for number, tid in enumerate(filter(self._fetchable, order(self._rqexe))):
                self._order.setdefault(self._presence.files_of(tid).mirror, collections.deque()).append((number, tid))
            self._stale = False
            # With thousands of tasks of which many fail it is not worth a large part of the time
            self._again_at = time.monotonic() + ORDER_SHARE * (time.monotonic() - now)
        # What is not needed yet can wait until a mirror that refuses, or is gone, is there again
        queues = [queue for mirror, queue in self._order.items() if server.pool.is_healthy(*mirror)]
        while any(queues):
            _, tid = min(filter(None, queues), key=lambda queue: queue[0]).popleft()
            if self._fetchable(tid):
                return tid
        return None

    def _fetchable(self, tid):
        """Whether there is something to fetch for tid, which was not tried"""
        files = self._presence.files_of(tid)
        return files and self._tried.get(tid) is not files and tid not in self._rqexe.sq_running and \
            not self._presence.is_local(tid)

    def _start(self, tid):
        """Open the files of tid. Returns the requests for them, none if that is not possible or not needed."""
        files = self._presence.files_of(tid)
        self._tried[tid] = files
        transfer = Transfer(tid, files)
        try:
            if os.path.exists(os.path.join(files.directory, files.names[0])):
                raise FileExistsError("it is there")
            # The first is the object, without which the others are of no use
            requests = [self._request(transfer, name) for name in files.names]
        except Exception as e:
            self.awaited.discard(tid)
            self._close(transfer)
            if isinstance(e, (OSError, ValueError, bb.fetch2.BBFetchException, bb.data_smart.ExpansionError)):
                logger.debug("Not fetching ahead for %s: %s", tid, e)
            else:
                self._fail(e)
            return []
        transfer.hurried = tid in self.awaited
        logger.debug2("Fetching %s for %s", "now" if transfer.hurried else "ahead", tid)
        self._under_way[tid] = transfer
        self._ahead.add(tid)
        return requests

    def _request(self, transfer, name):
        members = transfer.files.describe(name)
        final = os.path.join(transfer.files.directory, name)
        if name == transfer.files.names[0]:
            prefetchfiles.remove_left(os.path.dirname(final))
        transfer.temporary[name], fd = prefetchfiles.create(final, transfer.files.umask)
        self._open += 1
        try:
            request = Request(fd=fd, empty=True, **members)
        except BaseException:
            self._close_file(fd)
            raise
        transfer.requests[name] = request
        self._requests[request] = transfer, name
        return request

    def _answered(self, transfer, name, response, error):
        request = transfer.requests.pop(name)
        if self._under_way.get(transfer.tid) is transfer:
            self._take(transfer, name, request, response, error)
        transfer.error = self._close_file(request.fd) or transfer.error
        if not transfer.requests and self._under_way.get(transfer.tid) is transfer:
            self._finish(transfer)

    def _take(self, transfer, name, request, response, error):
        if response is not None and response.status == 200:
            try:
                # The fetcher takes no empty file
                if not response.length or not shared.is_complete(transfer.temporary[name], request.fd, response.length,
                                                                 last_modified(response.headers)):
                    error = "empty, or not complete"
                elif not shared.is_of_its_kind(name, request.fd):
                    error = "not a file of this kind"
                    self._connections.report_strange(transfer.files.mirror[0])
                    self._connections.server.reject(request)
                else:
                    transfer.found.add(name)
                    return
            except OSError as e:
                error = e
        elif response is not None:
            error = "status %s" % response.status
        if name != transfer.files.names[0] and not isinstance(error, OSError):
            # There need not be each of the files that belong to an object, and the task goes on without as well
            logger.debug2("No %s: %s", name, error)
            return
        transfer.error = transfer.error or error

    def _finish(self, transfer):
        """All of the files of an object were answered: install them, the object as the last"""
        if not transfer.error:
            try:
                for name in reversed(transfer.files.names):
                    if name in transfer.found:
                        prefetchfiles.install(transfer.temporary[name], os.path.join(transfer.files.directory, name))
                        del transfer.temporary[name]
            except OSError as e:
                transfer.error = e
        if transfer.error:
            if (isinstance(transfer.error, (ConnectError, RefusedError, TimedOutError)) and transfer.tid not in self.awaited and
                    transfer.tid not in self._retried):
                # It may be tried again when the mirror is there again
                self._retried.add(transfer.tid)
                del self._tried[transfer.tid]
                self._stale = True
            self._give_up(transfer, transfer.error)
            return
        del self._under_way[transfer.tid]
        self._close(transfer)
        self.awaited.discard(transfer.tid)
        self.objects += 1
        self.bytes += transfer.files.size or 0
        if transfer.found.issuperset(transfer.files.names[:transfer.files.needed]):
            self._presence.local([transfer.tid])
        logger.debug2("Fetched ahead for %s", transfer.tid)

    def _give_up(self, transfer, reason):
        """The task will fetch itself, if it is started"""
        logger.debug("Not fetched ahead for %s: %s", transfer.tid, reason)
        self._under_way.pop(transfer.tid, None)
        self._ahead.discard(transfer.tid)
        self.awaited.discard(transfer.tid)
        for request in transfer.requests.values():
            request.cancelled = True
        self._unlink(transfer)

    def _close_file(self, fd):
        """Returns the error of close(), with which NFS reports that the disk is full, or None"""
        self._open -= 1
        try:
            os.close(fd)
        except OSError as e:
            return e
        return None

    def _close(self, transfer):
        for request in transfer.requests.values():
            # They have not been submitted
            del self._requests[request]
            self._close_file(request.fd)
        transfer.requests.clear()
        self._unlink(transfer)

    @staticmethod
    def _unlink(transfer):
        for path in transfer.temporary.values():
            try:
                os.unlink(path)
            except OSError:
                pass
        transfer.temporary.clear()

    def _tell(self):
        """Fire a progress event, from time to time and at the end"""
        now = time.monotonic()
        ended = not self._under_way and not self._order
        if not self.objects or not ended and now - self._told_at < PROGRESS or ended and self._told[:2] == (self.objects,) * 2:
            return
        self._told_at = now
        left = [transfer.files.size or 0 for transfer in self._under_way.values()]
        for mirror, queue in list(self._order.items()):
            # Their tasks may have been started meanwhile
            queue = self._order[mirror] = collections.deque(one for one in queue if self._fetchable(one[1]))
            left += [self._presence.files_of(tid).size or 0 for _, tid in queue]
            if not queue:
                del self._order[mirror]
        size = self._bytes()
        told = (self.objects, self.objects + len(left), size)
        if told != self._told:
            self._told = told
            # The siginfos have no announced size
            total = max(size, self.bytes + sum(left))
            bb.event.fire(bb.event.SstateFetchProgress(*told, total, now - self._started), self._rqexe.cfgData)


def order(rqexe):
    """
    Yield the setscene tasks that will be handed to a worker, in the order in which they could be started, if
    each object that exists is installed. It goes the way that RunQueueExecute.execute() goes, on copies.
    """
    sqdata = rqexe.sqdata
    notcovered = set(rqexe.scenequeue_notcovered)
    covered = rqexe.scenequeue_covered | (rqexe.sq_running - notcovered)
    done = covered | notcovered
    notneeded = set(rqexe.scenequeue_notneeded)
    needed = set(rqexe.sq_needed_harddeps)
    queued = set()
    # Tasks that hard dependencies let wait, by the first of these
    held = {}
    queue = collections.deque()

    def add(tids):
        new = [tid for tid in tids if tid not in queued and tid not in done]
        queued.update(new)
        queue.extend(new)

    add(tid for tid in rqexe.rqdata.runq_setscene_tids if tid in rqexe.sq_buildable)
    for tid in sorted(rqexe.sq_running - rqexe.scenequeue_covered - notcovered):
        add(dep for dep in sorted(sqdata.sq_deps[tid]) if sqdata.sq_revdeps[dep] <= done)
    while queue:
        tid = queue.popleft()
        if tid in done or rqexe.sq_deferred.get(tid, tid) != tid and rqexe.sq_deferred[tid] not in rqexe.runq_complete:
            # Of a deferred task it is not known yet what becomes of it
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
                # What needs it fails with it
                finished += [other for other in sorted(sqdata.sq_harddeps.get(tid, ())) if other not in done]
                notcovered.update(finished)
            else:
                covered.add(tid)
        done.update(finished)
        for one in finished:
            add(dep for dep in sorted(sqdata.sq_deps[one]) if sqdata.sq_revdeps[dep] <= done)
            waiting = held.pop(one, ())
            queued.difference_update(waiting)
            add(waiting)
