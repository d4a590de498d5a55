#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
What mirrors have answered in a build, so that nothing is asked twice.

Made by server.py together with the pool, and in front of it: the presence query
and the tasks submit their requests here. Whether a file exists, and its size,
is remembered as long as the build runs, as is that something is being asked.
Errors and what says neither yes nor no are not. That there is a file is asked
again after its host had failed: the task would be told of it, and then fail to
fetch it.

Thread-safe; no lock is held while a request's done is called.

    memory = Memory(pool)
    memory.submit(request)      # as pool.submit()
"""

import threading

from bb.connections import Cancelled
from bb.connections.host import finish
from bb.connections.request import ABSENT, MISSING, Response

# In place of a size
_NO_FILE = -1
_UNKNOWN = object()


class Memory:
    def __init__(self, pool):
        self._pool = pool
        self._lock = threading.Lock()
        # {(authorization, route): {url: size, which may be None}}
        self._answers = {}
        # {key: requests that wait for the answer to another one}
        self._asked = {}

    def submit(self, *requests, first=False):
        """
        As Pool.submit(). A HEAD that was answered before is answered at once, and so is the GET of a file
        that does not exist.
        """
        new = [request for request in requests if self._prepare(request)]
        if new:
            self._pool.submit(*new, first=first)

    def hurry(self, *requests):
        """As Pool.hurry()"""
        self._pool.hurry(*requests)

    def well(self, origin, route):
        """As Pool.well()"""
        return self._pool.well(origin, route)

    def has_answered(self, origin):
        """As Pool.has_answered()"""
        return self._pool.has_answered(origin)

    def give_way(self):
        """As Pool.give_way()"""
        self._pool.give_way()

    def _prepare(self, request):
        """Whether request has to be asked; its answer will be remembered then. If not, it is or will be answered."""
        key = request.key
        well = self._pool.well(request.origin, request.route)
        with self._lock:
            answer = self._known(key).get(request.url, _UNKNOWN)
            if request.method == "HEAD" and answer != _NO_FILE and not well:
                answer = _UNKNOWN
            if request.method == "GET":
                request.size = answer if answer not in (_UNKNOWN, _NO_FILE) else None
            elif answer is _UNKNOWN:
                if key in self._asked:
                    self._asked[key].append(request)
                    return False
                self._asked[key] = []
        if answer == _NO_FILE or request.method == "HEAD" and answer is not _UNKNOWN:
            finish(request, Response(404, {}, None) if answer == _NO_FILE else Response(200, {}, answer), None)
            return False
        # Of the URL and the method that were asked for: a redirect changes the one, a server that refuses HEAD the other
        head = request.method == "HEAD"
        done = request.done
        request.done = lambda *args: self._answered(key, head, done, *args)
        return True

    def _known(self, key):
        """Called with the lock held"""
        return self._answers.setdefault(key[1:], {})

    def _answered(self, key, head, done, request, response, error):
        others = ()
        with self._lock:
            self._remember(key, response, MISSING if head else ABSENT)
            if head:
                others = self._asked.pop(key)
        request.done = done
        finish(request, response, error)
        for other in others:
            if isinstance(error, Cancelled) and not other.cancelled:
                # It was the other's wish
                self.submit(other)
            else:
                finish(other, response, error)

    def _remember(self, key, response, missing):
        """Called with the lock held"""
        if response is not None and response.status == 200:
            self._known(key)[key[0]] = response.length
        elif response is not None and response.status in missing:
            self._known(key)[key[0]] = _NO_FILE
