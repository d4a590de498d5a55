#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
All connections to the mirrors.

Made by server.py for the time of a build's runqueue. Each host (scheme, name,
port, user) has at most limit connections, whatever the number of tasks, and
whether it is a query or a download; on each at most depth requests are under
way. host.py does the work.

    pool = Pool(limit=4, depth=64)
    pool.submit(request)        # request.done is called in a thread of the pool
    ...
    pool.stop()                 # all that wait hear a Cancelled
"""

import threading
import time

from bb.connections import Cancelled
from bb.connections.host import Host, Statistics, finish
from bb.connections.http import HTTPConnection
from bb.connections.sftp import SFTPConnection

# Connections to all hosts together. Each is a thread and one or two descriptors, of which select() in
# server/process.py can deal with the first 1024 only.
MAX_CONNECTIONS = 128

# A thread that only computes may do so for WORK seconds before those of the connections have YIELD seconds for
# themselves. Unasked, Python lets them run after 5 ms, and again for each of the many short waits of an answer.
WORK = 0.0015
YIELD = 0.00005

CLASSES = {"http": HTTPConnection, "https": HTTPConnection, "sftp": SFTPConnection}


class Pool:
    """
    limit is the number of connections per host, depth how many requests may be
    under way on one of them. classes are the classes of the connections, by
    scheme, called with origin, route and timeout (seconds).
    """
    def __init__(self, limit, depth=1, timeout=100, classes=CLASSES):
        self.limit = limit
        self.depth = depth
        self.timeout = timeout
        self.classes = classes
        self._lock = threading.Lock()
        self._hosts = {}
        self._reserved = 0
        self._stopped = False
        self._yielded = 0

    def submit(self, *requests, first=False):
        """
        Queue requests, if first before all that are not first. Does not block, unless in the done of a request
        that fails at once.
        """
        groups = {}
        for request in requests:
            request.first = request.first or first
            groups.setdefault((request.origin, request.route), []).append(request)
        for (origin, _), group in groups.items():
            with self._lock:
                host = self._hosts.get(origin)
                if host is None and not self._stopped:
                    host = self._hosts[origin] = Host(self, origin)
            if host:
                host.submit(group)
            else:
                for request in group:
                    finish(request, None, Cancelled("the build has ended"))

    def hurry(self, *requests):
        """Those of requests which were submitted and are still queued come before all others now. Does not block."""
        with self._lock:
            hosts = {request.origin: self._hosts.get(request.origin) for request in requests}
        for origin, host in hosts.items():
            if host:
                host.hurry([request for request in requests if request.origin == origin])

    def reserve(self):
        """For a host: whether there may be one more connection. It is counted then."""
        with self._lock:
            if self._reserved >= MAX_CONNECTIONS:
                return False
            self._reserved += 1
            return True

    def release(self):
        """One of those has ended"""
        with self._lock:
            self._reserved -= 1

    def stop(self, timeout=10):
        """
        End all connections and threads; what waits or is under way is
        cancelled. Returns False if a thread is left after timeout seconds.
        """
        with self._lock:
            self._stopped = True
            hosts = list(self._hosts.values())
        for host in hosts:
            host.stop()
        deadline = time.monotonic() + timeout
        return all([host.join(deadline) for host in hosts])

    def well(self, origin, route):
        """Whether the last that was heard of a host by that route is an answer, or nothing is known of it"""
        with self._lock:
            host = self._hosts.get(origin)
        return host is None or host.well(route)

    def has_answered(self, origin):
        """Whether a host has given an answer, at any time"""
        with self._lock:
            host = self._hosts.get(origin)
        return host is not None and host.has_answered()

    def give_way(self):
        """
        Let the connections work, if they could not for a while. For the runqueue's thread, when there is
        something to be asked or awaited. Blocks for a fraction of a millisecond, if at all.
        """
        if time.monotonic() - self._yielded > WORK:
            time.sleep(YIELD)
            self._yielded = time.monotonic()

    def hosts(self):
        """The hosts that were asked: for each its Origin and Statistics"""
        with self._lock:
            return [(host.origin, host.statistics) for host in self._hosts.values()]

    @property
    def statistics(self):
        """The sum of those of all hosts"""
        total = Statistics()
        for _, one in self.hosts():
            total.count(**{field: getattr(one, field) for field in Statistics.FIELDS})
        return total

    def troubles(self):
        """Name of the host and what was wrong, for each host that was left alone"""
        with self._lock:
            return [(host.origin.host, host.trouble) for host in self._hosts.values() if host.trouble]

    def connections(self):
        """The connections that exist now. Takes no lock, for use after a fork."""
        return [c for host in list(self._hosts.values()) for c in list(host.connections)]
