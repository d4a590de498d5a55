#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
The semaphore of tasks that use the network.

BB_NUMBER_NETWORK_THREADS is how many tasks may hold the network at the same
time, over normal and setscene tasks and over all multiconfigs. The runqueue
makes one NetworkSlots object for a build, and asks it before it starts a task.
All state belongs to the runqueue's thread; there is no lock.

A setscene task takes a slot if it has [network] and its object is not local. A
normal task takes one if it has [network] and no setscene variant: sstate.bbclass
gives [network] to every task that has one, for it to report to the hash
equivalence server. So a task id stands either for its setscene variant here, or
for itself.

This starts no task and does not order them: the scheduler does, among those
that remove_waiting() leaves. Without a limit it does nothing at all.

    slots = NetworkSlots(presence)
    slots.prepare(d, rqdata)                # fatal error if the variable is invalid
    ...
    slots.remove_waiting(buildable, runs)   # for the scheduler
    if slots.acquire(tid):
        ...                                 # the task is handed to the worker
    else:                                   # a scheduler that knows nothing of this has chosen it
        slots.withhold(scheduler, tid, buildable, runs)
    ...
    slots.release(tid)                      # when it has ended, however that was
    slots.restore(scheduler)
"""

import logging
import time

import bb
from bb import networksettings

logger = logging.getLogger("BitBake.RunQueue")

# Seconds after which the user is told which tasks hold all slots while others wait: they may hang
REPORT_AFTER = 60


def limit_from(d):
    """
    BB_NUMBER_NETWORK_THREADS as a number, None if there is no limit.

    Raises ValueError with one line that names the variable, its value and what
    is allowed.
    """
    return networksettings.number("BB_NUMBER_NETWORK_THREADS", d.getVar("BB_NUMBER_NETWORK_THREADS"))

def network_tasks(rqdata):
    """Yield (tid, True if its setscene variant is meant) for each task that needs a slot"""
    for tid in rqdata.runtaskentries:
        (mc, _, taskname, taskfn) = bb.runqueue.split_tid_mcfn(tid)
        setscene = tid + "_setscene" in rqdata.taskData[mc].taskentries
        # Caches of other versions don't have the flag
        flags = rqdata.dataCaches[mc].task_deps[taskfn].get("network", {})
        try:
            network = bb.utils.to_boolean(flags.get(taskname + "_setscene" if setscene else taskname))
        except ValueError:
            # It fails in the worker, which reads the flag too
            network = True
        if network:
            yield tid, setscene


class NetworkSlots:
    """
    Who holds the network. All methods return at once.

    limit       how many slots there are, None if there is no limit
    peak        the largest number of slots that were held at the same time
    withheld    the tasks that were taken from the scheduler until they need not wait any more
    """

    def __init__(self, presence):
        self.limit = None
        self.peak = 0
        self.withheld = set()
        self._presence = presence
        self._tasks = set()
        self._setscene = set()
        self._held = set()
        # Tasks that could start if they had a slot: a memory, as with thousands of
        # tasks that is too much to find out whenever the next one is looked for
        self._waiting = set()
        # Likewise those which need none after all. If that is no longer so, acquire() refuses.
        self._skippable = set()
        self._told = set()
        # When a slot was taken or given back, and whether the user was told of those who keep theirs since
        self._changed_at = 0
        self._reported = False
        # Tasks with the same stamp, in multiconfigs that share it: once one has run, the others don't
        self._twins = {}

    def prepare(self, d, rqdata):
        """Read the limit, fatal error if it is invalid, and look up which tasks of the build need a slot"""
        try:
            self.limit = limit_from(d)
        except ValueError as e:
            bb.fatal(str(e))
        self.find_tasks(rqdata)

    def find_tasks(self, rqdata):
        """Look up which tasks of the build need a slot"""
        if self.limit is not None:
            stamps = {}
            for tid, setscene in network_tasks(rqdata):
                (self._setscene if setscene else self._tasks).add(tid)
                if len(rqdata.dataCaches) > 1:
                    (_, _, taskname, taskfn) = bb.runqueue.split_tid_mcfn(tid)
                    stamp = bb.parse.siggen.stampfile_mcfn(taskname, taskfn, extrainfo=False)
                    stamps.setdefault(stamp, []).append(tid)
            for tids in stamps.values():
                if len(tids) > 1:
                    self._twins.update((tid, tids) for tid in tids)

    @property
    def used(self):
        return len(self._held)

    def full(self):
        """Whether a task that needs a slot would have to wait"""
        return self.limit is not None and len(self._held) >= self.limit

    def waiting(self):
        """The tasks of which is known that they cannot start, for lack of a slot"""
        if not self.full():
            return frozenset()
        if self._waiting and not self._reported and time.monotonic() - self._changed_at > REPORT_AFTER:
            self._reported = True
            logger.info("All %d network slots have been in use for %d seconds by %s, other tasks wait",
                        self.limit, REPORT_AFTER, ", ".join(sorted(self._held)))
        return self._waiting

    def _changed(self):
        self._changed_at = time.monotonic()
        self._reported = False

    def reconsider(self):
        """Forget who waits: after a change of hashes, who could start may not have to run any more"""
        self._waiting.clear()
        self._skippable.clear()

    def remove_waiting(self, buildable, runs):
        """
        Remove the tasks that have to wait for a slot from the set buildable.

        runs(tid) tells whether a task would be handed to the worker. One that
        is covered or has a current stamp would not, so that it needs no slot.
        """
        if not self.full():
            return
        buildable.difference_update(self._waiting)
        for tid in (buildable & self._tasks) - self._skippable:
            if runs(tid):
                self._wait(tid, "")
                buildable.remove(tid)
            else:
                self._skippable.add(tid)

    def withhold(self, scheduler, tid, buildable, runs):
        """
        Take from the scheduler the tasks of the set buildable that have to wait, for
        it has chosen tid, which is one of them. False if that was of no use before:
        it does not care for removebuildable().

        All of them at once, since it may take long to choose among thousands.
        """
        if tid in self.withheld:
            return False
        startable = set(buildable)
        self.remove_waiting(startable, runs)
        waiting = (buildable - startable | {tid}) - self.withheld
        self.withheld |= waiting
        for tid in waiting:
            scheduler.removebuildable(tid)
        return True

    def restore(self, scheduler):
        """Give back to the scheduler what need not wait any more"""
        if self.withheld:
            restored = self.withheld - self.waiting()
            self.withheld -= restored
            for tid in restored:
                scheduler.newbuildable(tid)

    def acquire(self, tid):
        """Take a slot for a normal task if it needs one. False if there is none: it has to wait."""
        return tid not in self._tasks or self._take(tid, "")

    def acquire_setscene(self, tid):
        """The same for the setscene variant of tid"""
        return tid not in self._setscene or self._presence.is_local(tid) or self._take(tid, "_setscene")

    def release(self, tid):
        """Give back the slot of tid, if it holds one: it has ended"""
        if tid in self._held:
            self._held.remove(tid)
            self._changed()
        self._waiting.difference_update(self._twins.get(tid, ()))

    def _take(self, tid, suffix):
        if self.full() and tid not in self._held:
            self._wait(tid, suffix)
            return False
        self._waiting.discard(tid)
        self._held.add(tid)
        self._changed()
        self.peak = max(self.peak, len(self._held))
        return True

    def _wait(self, tid, suffix):
        self._waiting.add(tid)
        if tid not in self._told:
            self._told.add(tid)
            logger.debug2("Task %s waits for a network slot, %d of %d are in use", tid + suffix, self.used, self.limit)
