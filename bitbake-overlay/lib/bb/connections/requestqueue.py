#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
The requests to a host that wait to be sent: a queue for each route.

Used by host.py. Probes are sent first, then requests that are marked as first;
apart from that the order is that of submission.

    queues = RequestQueues()
    queues.add(request)
    queues.get(route).pop()
"""

import collections


class RequestQueue:
    def __init__(self):
        self._probes = collections.deque()
        self._first = collections.deque()
        self._others = collections.deque()
        # Those that were slow before, behind all others
        self._slow = collections.deque()

    def __iter__(self):
        yield from self._probes
        yield from self._first
        yield from self._others
        yield from self._slow

    def __len__(self):
        return len(self._probes) + len(self._first) + len(self._others) + len(self._slow)

    @property
    def head(self):
        """The next request; there has to be one"""
        return (self._probes or self._first or self._others or self._slow)[0]

    def add(self, request):
        (self._slow if request.alone else self._deque(request)).append(request)

    def put_back(self, request):
        """A request that was taken before is the next one again, also one that is to be sent alone"""
        self._deque(request).appendleft(request)

    def _deque(self, request):
        return self._probes if request.probe else self._first if request.first else self._others

    def hurry(self, request):
        """Mark request as first, if it is in the queue"""
        if request in self._others:
            self._others.remove(request)
            request.first = True
            self._first.append(request)

    def pop(self):
        return (self._probes or self._first or self._others or self._slow).popleft()


class RequestQueues:
    def __init__(self):
        # {route: RequestQueue}
        self._queues = {}

    def __iter__(self):
        """All requests"""
        for queue in self._queues.values():
            yield from queue

    def __len__(self):
        return sum(len(queue) for queue in self._queues.values())

    def items(self):
        """(route, queue) of each queue that is not empty; others are removed"""
        self._queues = {route: queue for route, queue in self._queues.items() if queue}
        return list(self._queues.items())

    def get(self, route):
        """The RequestQueue of route"""
        if route not in self._queues:
            self._queues[route] = RequestQueue()
        return self._queues[route]

    def add(self, request):
        self.get(request.route).add(request)

    def put_back(self, requests):
        """Requests that were taken before are the next ones again"""
        for request in reversed(requests):
            self.get(request.route).put_back(request)

    def hurry(self, request):
        self.get(request.route).hurry(request)

    def clear(self, route=None):
        """Remove and return all requests, or those of route"""
        queues = self._queues.values() if route is None else [self.get(route)]
        requests = [request for queue in queues for request in queue]
        self._queues = {} if route is None else {other: queue for other, queue in self._queues.items() if other != route}
        return requests
