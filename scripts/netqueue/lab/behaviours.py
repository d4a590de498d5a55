# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""The behaviours of the mirrors that faultymirrors.py has builds restore from; see faultyserver.py."""

import time

from netqueue.lab.faultyserver import Ended, Behaviour

# A whole answer, as what a 404 should not have in its body
STRAY = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nOK"


class Swaps(Behaviour):
    """After the first 200 answers, one is swapped with the next one of a pipeline if five were not before"""

    def __init__(self, names):
        super().__init__(names)
        self.faults = 0
        self.until = 200

    def answer(self, talk, request):
        with self.lock:
            self.until -= 1
            swap = self.until < 0
        if swap and talk.has_next(0.01):
            following = talk.request()
            # An answer to HEAD has no body
            if self.count(following.method == request.method):
                request, following = following, request
                with self.lock:
                    self.until = 5
            talk.serve(request)
            talk.serve(following)
        else:
            talk.serve(request)


class Page(Behaviour):
    """The same HTML page for everything"""
    there = 0

    def answer(self, talk, request):
        talk.reply(request, 200, b"<html><body>Please log in</body></html>\n", "Content-Type: text/html")


class Bans(Behaviour):
    """403 for 10 s to a client that sends more than 50 requests in a second"""

    def __init__(self, names):
        super().__init__(names)
        self.times = []
        self.until = 0

    def banned(self):
        with self.lock:
            now = time.monotonic()
            self.times = [then for then in self.times if then > now - 1] + [now]
            if len(self.times) > 50 and now >= self.until:
                self.until = now + 10
            return now < self.until

    def answer(self, talk, request):
        if self.count(self.banned()):
            talk.reply(request, 403, b"slow down\n")
        else:
            talk.serve(request)


class TooMany(Behaviour):
    """418 to what exceeds 20 requests in a second"""

    def __init__(self, names):
        super().__init__(names)
        self.times = []

    def allowed(self):
        with self.lock:
            now = time.monotonic()
            self.times = [then for then in self.times if then > now - 1]
            if len(self.times) < 20:
                self.times.append(now)
                return True
        return False

    def answer(self, talk, request):
        if self.count(not self.allowed()):
            talk.reply(request, 418, b"too many requests\n")
        else:
            talk.serve(request)


class NoContent(Behaviour):
    """204 to a HEAD"""

    def answer(self, talk, request):
        if self.count(request.method == "HEAD" and talk.server.read(request)[0] is not None):
            talk.reply(request, 204)
        else:
            talk.serve(request)


class LineFeeds(Behaviour):
    """Lines end with LF only"""

    def head(self, lines):
        return "\n".join(lines + ["", ""]).encode("ascii")


class OldHeaders(Behaviour):
    """A folded header, Transfer-Encoding: identity, and a blank before a colon in the last header"""

    def head(self, lines):
        return super().head(lines + ["X-Cache: MISS from cache,", "\tMISS from parent", "Transfer-Encoding: identity",
                                     "X-Served-By : cache"])


class ErrorForAbsent(Behaviour):
    """500 for what is absent"""

    def answer(self, talk, request):
        self.count(request.recipe in self.absent)
        talk.serve(request, absent=500)


class Refuses(Behaviour):
    """The same status for everything"""
    there = 0

    def __init__(self, names, status, *headers):
        super().__init__(names)
        self.status = status
        self.headers = headers

    def answer(self, talk, request):
        talk.reply(request, self.status, b"busy\n", *self.headers)


class RefusesSome(Behaviour):
    """503 with Retry-After for some objects"""

    def __init__(self, names, refused):
        super().__init__(names)
        self.withheld = set(refused)

    def answer(self, talk, request):
        if self.count(request.recipe in self.withheld):
            self.refuse(talk, request)
        else:
            talk.serve(request)

    def refuse(self, talk, request):
        talk.reply(request, 503, b"busy\n", "Retry-After: 60")


class ResetsSome(RefusesSome):
    """Some objects reset the connection"""

    def refuse(self, talk, request):
        talk.reset()


class TricklesSome(RefusesSome):
    """The archives of some objects come at a byte a second"""

    def refuse(self, talk, request):
        if request.method == "GET" and request.archive:
            talk.trickle(request, 1)
        else:
            talk.serve(request)


class GoesAway(Behaviour):
    """Once a third of the objects has been asked for by GET, it is away for so many seconds"""

    def __init__(self, names, seconds):
        super().__init__(names)
        self.seconds = seconds
        self.fetched = 0

    def answer(self, talk, request):
        if request.method == "GET" and request.archive:
            with self.lock:
                self.fetched += 1
                leave = self.fetched == len(self.names) // 3
            if self.count(leave):
                self.server.leave(self.seconds)
                raise Ended()
        talk.serve(request)


class StrayBodies(Behaviour):
    """The answer to a HEAD of what is absent has a body, 0.2 s late, which looks like an answer"""

    def answer(self, talk, request):
        if not self.count(request.method == "HEAD" and talk.server.read(request)[0] is None):
            talk.serve(request)
            return
        talk.send(self.head(["HTTP/1.1 404 Not Found", "Content-Length: %d" % len(STRAY)]))
        self.server.wait(0.2)
        talk.send(STRAY)


class Evicts(Behaviour):
    """Some objects are gone when the first file is fetched"""

    def __init__(self, names, gone):
        super().__init__(names)
        self.withheld = set(gone)

    def answer(self, talk, request):
        if request.method == "GET":
            self.absent = self.withheld
        self.count(request.recipe in self.absent)
        talk.serve(request)


class Forgets(Behaviour):
    """Of all that it reads at once, the first 4 KiB remain, and a half request gets 400"""

    def keep(self, data):
        self.count(len(data) > 4096)
        return data[:4096]


class SlowFirst(Behaviour):
    """Some archives are answered after so many seconds when they are asked for the first time, then at once"""

    def __init__(self, names, slow, seconds):
        super().__init__(names)
        self.slow = set(slow)
        self.seconds = seconds

    def answer(self, talk, request):
        with self.lock:
            slow = request.archive and request.recipe in self.slow
            if slow:
                self.slow.remove(request.recipe)
        if self.count(slow):
            self.server.wait(self.seconds)
        talk.serve(request)


class TakesTime(Behaviour):
    """Each answer takes so many seconds in the server"""

    def __init__(self, names, seconds):
        super().__init__(names)
        self.seconds = seconds

    def answer(self, talk, request):
        self.server.wait(self.seconds)
        talk.serve(request)


class DiesSilently(Behaviour):
    """When a fifth of the objects has been asked for by GET, nothing is answered any more on connections that there are"""

    def __init__(self, names):
        super().__init__(names)
        self.fetched = 0
        self.dead = 0

    def answer(self, talk, request):
        if request.method == "GET" and request.archive:
            with self.lock:
                self.fetched += 1
                if self.fetched == len(self.names) // 5:
                    self.dead = self.server.connections
        if self.count(talk.number <= self.dead):
            talk.swallow()
        talk.serve(request)
