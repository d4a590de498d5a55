#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
What becomes of the requests to a host that were not answered: whether they are
sent again, when, and what that says about the host.

Used by host.py, in the thread of the event loop. What a server does is about
one request first: that is sent again behind the others, or alone. Only if
others fail as well, or nothing else can be asked for, it is about the host,
whose health.py decides then.

    failures = Failures(host, pool)
    failures.refuse(request, RefusedError("status 503"))
"""

from bb.connections import Cancelled, RefusedError, StatusError
from bb.connections.doubt import ANSWERED, HOST
from bb.connections.health import PAUSE, UNWILLING
from bb.connections.request import FORBIDDEN, redact

# Attempts for a request if the connection fails, if it is refused while others are answered, and if it is answered by an
# error of the server, or not at all
ATTEMPTS = 4
REFUSED_ATTEMPTS = 8
ERROR_ATTEMPTS = 2
# Longest pause, in seconds, before a request that alone is refused is sent again
LONE_PAUSE = 2

CANCELLED = Cancelled("the answer is not needed any more")


class Failures:
    """
    Of one Host.

    last_refused    the last request that was refused, None if another one has been answered since
    refusals_end    a request that was refused has been answered later
    lone_since      when a request was refused again while others were answered, if none of these has been answered since
    """

    def __init__(self, host, pool):
        self.last_refused = None
        self.refusals_end = False
        self.lone_since = None
        self._host = host
        self._pool = pool
        self._loop = pool.loop

    def retry(self, request, error, attempts=ATTEMPTS):
        """An attempt has failed in a way that says nothing about the host"""
        request.attempts += 1
        if isinstance(error, StatusError) and error.status == 200 and request.fd is not None and not self._host.unsupported:
            # It does not announce the size of bodies
            self._host.unsupported[True] = error
            self._host.submit(self._host.queues.clear())
        if request.cancelled:
            error = CANCELLED
        elif error.retryable and request.attempts < attempts and \
                not self._host.health.suspended(request.route, self._loop.time()):
            self._host.statistics.retries += 1
            self._host.put_back([request])
            return
        self._pool.finish(request, None, error)

    def again(self, request):
        """Behind all others"""
        self._host.statistics.retries += 1
        self._host.submit([request])

    def slow(self, connection, request, error):
        """connection has been silent while request, and maybe others, was in flight"""
        was_slow, request.alone = request.alone, True
        if self._host.health.answered_at > request.sent or connection.in_answer:
            if not connection.served and not connection.in_answer and not was_slow and not request.attempts:
                # There may be fewer workers than connections
                request.alone = False
                request.attempts = 1
                self._host.health.at_limit(len(self._host.lanes.connections))
            elif was_slow:
                self._host.finish([request], error)
                return
            self.again(request)
        elif was_slow and self._host.doubt.can_probe:
            # It may be the request alone
            self._host.doubt.probe_host()
            self._host.finish([request], error)
        else:
            self._host.doubt.probe_host()
            self.host_failed(error, request.sent)
            self.again(request)

    def refuse(self, request, error):
        """request was refused. That says something about the host if another one was, too."""
        self._host.statistics.refusals += 1
        self._host.growth.end()
        self._host.health.allow(min(self._host.health.most, self._pool.limit))
        if request.cancelled or request.probe:
            self.host_failed(error, request.sent)
            self._host.finish([request], error)
            return
        in_turn = False
        if request.answers != self._host.health.answers:
            # Others were answered since it was refused before
            request.answers = self._host.health.answers
            request.refusals += 1
            in_turn = request.refusals % 2 == 0
        now = self._loop.time()
        if request.refusals < 2 or self.refusals_end:
            self._host.health.pace.refused(request.sent, now)
        another = self.last_refused not in (None, request)
        self.last_refused = request
        # Others tell whether the host answers them
        others = any(other.refusals < 2 and not other.probe for one in [self._host.queues, *(one.in_flight for one in self._host.lanes.connections)]
                     for other in one)
        if another and request.refusals < 2 or not others and not self._host.doubt.can_probe:
            if (error.retry_after or 0) > UNWILLING and self._host.doubt.can_probe:
                # Before the host is given up for that long
                self._host.doubt.probe_host()
            else:
                self.host_failed(error, request.sent)
        elif request.refusals >= REFUSED_ATTEMPTS or self._is_lone_for_long(request, now) or \
                request.refusals > 1 and not others and (error.retry_after or 0) > UNWILLING:
            self._host.finish([request], error)
            return
        if others and in_turn:
            # As the next one: it may be every second request that is refused
            self._host.statistics.retries += 1
            self._host.put_back([request])
            return
        if others:
            self.again(request)
            return
        self._host.health.pause(now + min(PAUSE * 2 ** (request.refusals - 1), LONE_PAUSE))
        # In turns with and without a probe before it, since some servers refuse every second request
        request.attempts += 1
        if request.attempts % 2:
            self._host.doubt.probe_host()
        self.again(request)

    def _is_lone_for_long(self, request, now):
        """Whether requests have been refused again and again for some time, while others, but none of them, were answered"""
        if request.refusals > 1 and self.lone_since is None:
            self.lone_since = now
        return request.refusals > 1 and now - self.lone_since > UNWILLING

    def settle(self, verdict, held):
        """Of Doubt"""
        if verdict == HOST:
            self._host.put_back([request for request, _ in held])
            request, response = held[-1]
            self.host_failed(RefusedError("%s: status %s" % (redact(request.url), response.status)), request.sent)
            return
        for request, response in held:
            if response.status == FORBIDDEN and verdict == ANSWERED:
                # There were too many requests; or the file exists, and cannot be read
                self._host.health.pace.refused(request.sent, self._loop.time(), start=True)
                request.refusals += 1
                again = request.refusals < REFUSED_ATTEMPTS
            else:
                request.attempts += 1
                again = response.status >= 500 and request.attempts < ERROR_ATTEMPTS
            if again:
                self.again(request)
            else:
                self._pool.finish(request, response, None)

    def host_failed(self, error, started):
        """The host has failed to answer what began at started. If it is suspended now, all that waits fails."""
        suspended = self._host.health.failed(error, started, self._loop.time())
        if suspended:
            for connection in list(self._host.lanes.connections):
                if not connection.in_answer:
                    connection.close()
            held = [request for request, _ in self._host.doubt.held]
            self._host.doubt.held.clear()
            self._host.finish(held, suspended)
            self._host.fail(None, suspended)
