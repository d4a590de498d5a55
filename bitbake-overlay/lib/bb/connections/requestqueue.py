#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
The requests to a host that are to be sent: a queue for each route.

Used by host.py and connectionset.py in the event loop's thread. Probes are sent
first, then requests marked as first, then the others in the order of
submission, and at last those that were slow before.

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
        return (self._probes or self._first or self._others or self._slow)[0]

    def add(self, request):
        (self._slow if request.exclusive else self._deque(request)).append(request)

    def put_back(self, request):
        """Add a request at the front, even one that was slow before"""
        self._deque(request).appendleft(request)

    def _deque(self, request):
        return self._probes if request.probe else self._first if request.first else self._others

    def prioritise(self, request):
        """Mark request as first and move it, if it is in the queue"""
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
        for queue in self._queues.values():
            yield from queue

    def __len__(self):
        return sum(len(queue) for queue in self._queues.values())

    def items(self):
        """Returns (route, queue) of each queue that is not empty"""
        self._queues = {route: queue for route, queue in self._queues.items() if queue}
        return list(self._queues.items())

    def get(self, route):
        if route not in self._queues:
            self._queues[route] = RequestQueue()
        return self._queues[route]

    def add(self, request):
        self.get(request.route).add(request)

    def put_back(self, requests):
        for request in reversed(requests):
            self.get(request.route).put_back(request)

    def prioritise(self, request):
        self.get(request.route).prioritise(request)

    def clear(self, route=None):
        """Remove and return the requests of route, or all of them if it is None"""
        queues = self._queues.values() if route is None else [self.get(route)]
        requests = [request for queue in queues for request in queue]
        self._queues = {} if route is None else {other: queue for other, queue in self._queues.items() if other != route}
        return requests
