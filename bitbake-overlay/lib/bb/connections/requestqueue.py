#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
The requests to a host by one route that wait to be sent.

Used by host.py. Requests that are marked as first are sent before all others;
apart from that the order is that of submission.
"""

import collections


class RequestQueue:
    def __init__(self):
        self._first = collections.deque()
        self._others = collections.deque()

    def __iter__(self):
        yield from self._first
        yield from self._others

    def __len__(self):
        return len(self._first) + len(self._others)

    @property
    def head(self):
        """The next request; there has to be one"""
        return (self._first or self._others)[0]

    @property
    def last(self):
        return (self._others or self._first)[-1]

    def add(self, request):
        (self._first if request.first else self._others).append(request)

    def put_back(self, request):
        """A request that was taken before is the next one again"""
        (self._first if request.first else self._others).appendleft(request)

    def hurry(self, requests):
        """Mark those of requests that are in the queue as first"""
        for request in requests:
            if not request.first and request in self._others:
                self._others.remove(request)
                request.first = True
                self._first.append(request)

    def pop(self):
        return (self._first or self._others).popleft()

    def take(self, number, fits):
        """Remove and return up to number requests, as long as fits(request) is true"""
        taken = []
        while len(taken) < number and self and fits(self.head):
            taken.append(self.pop())
        return taken

    def clear(self):
        """Remove and return all requests"""
        requests = list(self)
        self._first.clear()
        self._others.clear()
        return requests
