# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""One variant of `scripts/bench pace`: pacebench.py starts it as a process.

In it are what shares the bitbake server with each other: the runqueue (as in
dispatch.py, whose tasks do nothing), and, of a patched tree, the pool with its
connections to a mirror. The pool's threads alone keep the transfers going, as
many at a time as there are slots: an object is a file and its .siginfo, each a
GET into a descriptor, of which the size of the first is known from a query.
So what the main thread does is the runqueue's work, and to give way to the
transfers as Prefetch.process() does.

Argument: a JSON object, see main(). Each line of its input is a mode, and what
Meter.read() returns is written for it. An empty object comes before, when all
is prepared.

    dispatch    tasks are started, nothing is fetched
    transfers   the main thread waits on a condition, as a runqueue with nothing to do waits in select()
    both        tasks are started while objects are fetched
    start       objects are fetched from now on; an empty object is written
    stop        no more; what is measured is the time between the two
"""

import gc
import itertools
import json
import os
import select
import statistics
import sys
import tempfile
import threading
import time

from netqueue.dispatch import load, make_data, make_queue
from netqueue.query import object_name

SHARE = 0.5
SIGINFO = ".siginfo"
# About that of one of openembedded-core, compressed
SIGINFO_SIZE = 3000
# Until the transfers have begun or ended, and until a turn has ended
TRANSFER_SECONDS = 60
TURN_SECONDS = 600


def main(lib, tasks, starts, setscene, threads, rate, seconds, traffic):
    bb, d = load(lib, "", threads)
    fetching = Traffic(**traffic) if traffic else None
    data = make_data(tasks, setscene, SHARE)
    meter = None
    print("{}", flush=True)
    for line in sys.stdin:
        mode = line.strip()
        queue = make_queue(bb, d, data) if mode in ("dispatch", "both") else None
        gc.collect()
        if mode in ("transfers", "both", "start"):
            fetching.start()
        meter = meter if mode == "stop" else Meter(fetching if mode != "dispatch" else None)
        late = []
        if mode == "transfers":
            fetching.wait(seconds)
        elif queue:
            execute = give_way(queue.rqexe.execute, fetching.pool) if mode == "both" else queue.rqexe.execute
            if rate:
                late = start_at_rate(queue, execute, starts, rate)
            else:
                start_all(queue, execute, starts)
        result = meter.read(starts if queue else None, late) if mode != "start" else {}
        if mode in ("transfers", "both", "stop"):
            fetching.stop()
        print(json.dumps(result), flush=True)
    if fetching:
        fetching.end()


class Meter:
    """What happens from now on. fetching: a Traffic, or None."""

    def __init__(self, fetching):
        self.fetching = fetching
        self.objects = fetching.objects if fetching else None
        self.started, self.thread, self.process = time.monotonic(), time.thread_time(), time.process_time()

    def read(self, tasks, late):
        """
        Since it was made: seconds; tasks and objects, None if there are none of the kind; CPU seconds of this
        thread and of the others. late are the seconds from the time when a task was to be started until it was; of
        these the median and what 95 % keep to.
        """
        seconds = time.monotonic() - self.started
        thread, process = time.thread_time() - self.thread, time.process_time() - self.process
        return {"seconds": seconds, "tasks": tasks,
                "objects": self.fetching.objects - self.objects if self.fetching else None,
                "thread_cpu": thread, "other_cpu": process - thread,
                "late": statistics.median(late) if late else None,
                "late95": sorted(late)[len(late) * 95 // 100] if late else None}


def give_way(execute, pool):
    """execute(), with what it does while objects are under way"""
    def call():
        pool.give_way()
        return execute()
    return call


def start_all(queue, execute, starts):
    wanted = queue.ended + starts
    deadline = time.monotonic() + TURN_SECONDS
    while queue.ended < wanted:
        execute()
        if time.monotonic() > deadline:
            sys.exit("the runqueue has not started %d tasks within %d s" % (starts, TURN_SECONDS))


def start_at_rate(queue, execute, starts, rate):
    """One task ends each 1 / rate seconds, and the next is started in its place. Returns by how much each was late."""
    ready = []
    queue.may_end = lambda: bool(ready) and ready.pop()
    while execute() is True:
        pass
    late = []
    due = time.monotonic()
    deadline = due + starts / rate + TURN_SECONDS
    for _ in range(starts):
        due += 1 / rate
        # The server's select() would hear of the end of the task
        select.select([], [], [], max(0, due - time.monotonic()))
        ready.append(True)
        while ready:
            execute()
            if time.monotonic() > deadline:
                sys.exit("the runqueue has not started %d tasks within %d s" % (starts, TURN_SECONDS))
        late.append(time.monotonic() - due)
    return late


def content(number, size):
    """What a file of the mirror has, of the object of that number."""
    return (b"%08d" % number * (size // 8 + 1))[:size]


class Slot:
    """What an object is fetched into."""

    def __init__(self, folder):
        self.files = tempfile.TemporaryFile(dir=folder), tempfile.TemporaryFile(dir=folder)
        self.number = 0
        self.left = 0


class Traffic:
    """Keeps fetching the objects below url, as many at a time as there are slots, in all threads of a real pool.

    objects     how many were fetched, with their .siginfo
    """

    def __init__(self, url, files, size, connections, depth, slots, folder):
        from bb.connections.pool import Pool
        from bb.connections.request import ENVIRONMENT, Request

        self.url = url
        self.files = files
        self.size = size
        self.request = Request
        # Peers are on this machine
        self.environment = {name: os.environ[name] for name in ENVIRONMENT
                            if name in os.environ and not name.lower().endswith("_proxy")}
        self.pool = Pool(connections, depth)
        self.condition = threading.Condition()
        self.numbers = itertools.cycle(range(files))
        self.slots = [Slot(folder) for _ in range(slots)]
        self.objects = 0
        self.flying = 0
        self.going = False
        self.problem = None
        self.query()

    def query(self):
        """Ask for all of them, as a build does before: it is by HEADs that the pool finds out whether it may pipeline."""
        left = [self.files]

        def done(request, response, error):
            with self.condition:
                self.judge(request, response, error, self.size)
                left[0] -= 1
                self.condition.notify_all()

        self.pool.submit(*[self.request("HEAD", self.address(number), self.environment, done=done)
                           for number in range(self.files)])
        self.wait_for(lambda: not left[0])

    def address(self, number):
        return "%s/%s" % (self.url, object_name(number))

    def judge(self, request, response, error, size):
        if error or response.status != 200 or response.length != size:
            self.problem = self.problem or "%s %s: %s" % (request.method, request.url, error or response)

    def start(self):
        """Returns when the transfers are under way: as many have ended as there are slots."""
        wanted = self.objects + len(self.slots)
        self.going = True
        self.flying = len(self.slots)
        for slot in self.slots:
            self.pool.submit(*self.requests(slot))
        self.wait_for(lambda: self.objects >= wanted)

    def requests(self, slot):
        slot.number = next(self.numbers)
        slot.left = 2

        def done(request, response, error):
            self.done(slot, self.size if request.fd == slot.files[0].fileno() else SIGINFO_SIZE, request, response, error)

        url = self.address(slot.number)
        return [self.request("GET", url, self.environment, fd=slot.files[0].fileno(), size=self.size, done=done),
                self.request("GET", url + SIGINFO, self.environment, fd=slot.files[1].fileno(), done=done)]

    def done(self, slot, size, request, response, error):
        with self.condition:
            self.judge(request, response, error, size)
            slot.left -= 1
            if slot.left:
                return
            self.objects += 1
            again = self.going and not self.problem
            if not again:
                self.flying -= 1
            if not again or self.objects % len(self.slots) == 0:
                self.condition.notify_all()
        if again:
            self.pool.submit(*self.requests(slot))

    def wait(self, seconds):
        with self.condition:
            self.condition.wait_for(lambda: self.problem, seconds)

    def wait_for(self, predicate):
        with self.condition:
            if not self.condition.wait_for(lambda: self.problem or predicate(), TRANSFER_SECONDS):
                self.problem = "the mirror has not answered within %d s" % TRANSFER_SECONDS
        if self.problem:
            self.pool.stop()
            sys.exit(self.problem)

    def stop(self):
        """Returns when nothing is under way. What was fetched last is looked at."""
        self.going = False
        self.wait_for(lambda: not self.flying)
        for slot in self.slots:
            for file, size in zip(slot.files, (self.size, SIGINFO_SIZE)):
                file.seek(0)
                if file.read() != content(slot.number, size):
                    self.pool.stop()
                    sys.exit("what was fetched is not what the mirror has")

    def end(self):
        if not self.pool.stop():
            sys.exit("a thread of the pool does not end")


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
