#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
A limit on the number of tasks that use the network at the same time.

BB_NUMBER_NETWORK_THREADS is the number of slots, shared by normal and setscene
tasks and by all multiconfigs. The runqueue creates one NetworkSlots object for
a build and calls it before it starts a task and when the task has ended. All
state belongs to the runqueue's thread. Prefetched objects take no slots.

A setscene task takes a slot if it has [network] and its object is not local. A
normal task takes one if it has [network] and no setscene variant: sstate.bbclass
sets [network] for all tasks with a setscene variant, since they report to the
hash equivalence server. So each task ID stands either for the task or for its
setscene variant here.

    slots = NetworkSlots(presence)
    slots.prepare(d, rqdata)                # fatal error if the variable is invalid
    slots.remove_waiting(buildable, runs)   # for the scheduler
    if slots.acquire(tid):                  # or acquire_setscene(tid)
        ...                                 # start the task
        slots.release(tid)                  # when it has ended, whatever its result
"""

import logging
import time

import bb
from bb import networksettings

logger = logging.getLogger("BitBake.RunQueue")

# Seconds after which a task that holds a slot is reported while others wait, since it may hang
REPORT_AFTER = 60


def network_tasks(rqdata):
    """Yield (tid, whether its setscene variant is meant) for each task that needs a slot"""
    for tid in rqdata.runtaskentries:
        (mc, _, taskname, taskfn) = bb.runqueue.split_tid_mcfn(tid)
        task_deps = rqdata.dataCaches[mc].task_deps[taskfn]
        setscene = tid + "_setscene" in rqdata.taskData[mc].taskentries
        if not setscene and (taskname in task_deps.get("noexec", {}) or
                             not bb.runqueue.check_setscene_enforce_ignore_tasks(rqdata.dataCaches[mc].pkg_fn[taskfn], taskname,
                                                                                 rqdata.setscene_ignore_tasks)):
            # Never sent to a worker
            continue
        flag = task_deps.get("network", {}).get(taskname + "_setscene" if setscene else taskname)
        try:
            network = bb.utils.to_boolean(flag)
        except ValueError:
            # The worker, which reads the flag as well, fails the task
            network = True
        if network:
            yield tid, setscene


class NetworkSlots:
    """
    limit       number of slots, None if there is no limit
    peak        largest number of slots that were held at the same time
    """

    def __init__(self, presence):
        self.limit = None
        self.peak = 0
        self._presence = presence
        self._tasks = set()
        self._setscene = set()
        # {task: time when it took its slot}
        self._held = {}
        # Tasks that were refused a slot: while there is none, they are not examined again, since with thousands of them
        # this would take too long
        self._waiting = set()
        # Tasks that have been reported since they took their slots
        self._reported = set()

    def prepare(self, d, rqdata):
        """Read the limit and find the tasks that need a slot. An invalid limit is a fatal error."""
        try:
            self.limit = networksettings.number("BB_NUMBER_NETWORK_THREADS", d.getVar("BB_NUMBER_NETWORK_THREADS"))
        except ValueError as e:
            bb.fatal(str(e))
        if self.limit is not None:
            for tid, setscene in network_tasks(rqdata):
                (self._setscene if setscene else self._tasks).add(tid)

    @property
    def used(self):
        return len(self._held)

    def full(self):
        return self.limit is not None and len(self._held) >= self.limit

    def waiting(self):
        """Return the tasks that are known to wait for a slot. Reports tasks that hold a slot for long."""
        if not self.full():
            # Setscene variants ask again, if they are still needed
            self._waiting &= self._tasks
            return frozenset()
        if self._waiting:
            self._report_holders()
        return self._waiting

    def _report_holders(self):
        now = time.monotonic()
        slow = {tid for tid, since in self._held.items() if now - since > REPORT_AFTER} - self._reported
        if slow:
            self._reported |= slow
            logger.info("Other tasks have to wait for the network slots of %s, which have been in use for %d seconds",
                        ", ".join(sorted(tid + "_setscene" if tid in self._setscene else tid for tid in slow)), REPORT_AFTER)

    def remove_waiting(self, buildable, runs):
        """
        Remove the tasks that have to wait for a slot from the set buildable. runs(tid) returns whether a task would be
        sent to a worker: a task that is covered or has a current stamp needs no slot.
        """
        if self.full():
            self._waiting.update(tid for tid in (buildable & self._tasks) - self._waiting if runs(tid))
            # Of a task in _setscene, only the setscene variant waits
            buildable -= self._tasks & self.waiting()

    def acquire(self, tid):
        """Take a slot for a normal task if it needs one. Returns False if the task has to wait."""
        return tid not in self._tasks or self._acquire(tid)

    def acquire_setscene(self, tid):
        """Take a slot for the setscene variant of tid if it needs one. Returns False if the task has to wait."""
        if tid not in self._setscene or self._presence.is_local(tid):
            self._waiting.discard(tid)
            return True
        return self._acquire(tid)

    def release(self, tid):
        """Release the slot of tid, if it holds one"""
        self._held.pop(tid, None)
        self._reported.discard(tid)

    def update(self, stats):
        """Write the numbers for the user interface to the RunQueueStats stats"""
        stats.network_used = self.used
        stats.network_limit = self.limit

    def _acquire(self, tid):
        if self.full() and tid not in self._held:
            logger.debug2("%s waits for a network slot, %d of %d are in use", tid, self.used, self.limit)
            self._waiting.add(tid)
            return False
        self._waiting.discard(tid)
        self._held.setdefault(tid, time.monotonic())
        self.peak = max(self.peak, len(self._held))
        return True
