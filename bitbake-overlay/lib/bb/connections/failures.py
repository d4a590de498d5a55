#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
Retry or fail requests that were not answered, and report failures of the host.

Used by host.py, in the thread of the event loop. Whether a refusal or an error
of the server is about a file or about the host is found out by doubt.py. A file
takes a bounded number of attempts. health.py decides whether the host is asked
at all.

    failures = Failures(host, pool)
    failures.refuse(request, RefusedError("status 503"))
"""

from bb.connections import Cancelled, RefusedError, StatusError
from bb.connections.doubt import ANSWERED, HOST
from bb.connections.health import MAX_PAUSE, PAUSE, UNWILLING
from bb.connections.request import redact

# Attempts for a request if the connection fails, if it is refused while others are answered, and if it is answered by an
# error of the server or not at all
ATTEMPTS = 4
REFUSED_ATTEMPTS = 12
ERROR_ATTEMPTS = 2
# Consecutive refusals that suggest a limit of the host
LONG = 16
# Attempts for a request that is refused, if meanwhile none is answered that was refused before
LONE_ATTEMPTS = 4


class Failures:
    """
    Of one Host.

    waiting     requests that were refused, {request: timer}: they are queued when that expires
    patience    seconds to wait for an answer that is slow while others are not; reduced after the first that did not come
    """

    def __init__(self, host, pool):
        self.waiting = {}
        self.patience = pool.timeout
        self._host = host
        self._pool = pool
        self._loop = pool.loop
        # Refusals since the last answer, and whether there were LONG of them since the last verdict
        self._in_row = 0
        self._was_long = False
        # Requests whose refusal has lowered the rate, and which have not been answered since
        self._lowered = set()
        # How many requests have been answered after they were refused
        self._recovered = 0

    def retry(self, request, error):
        """An attempt has failed in a way that says nothing about the host"""
        request.attempts += 1
        if isinstance(error, StatusError) and error.status == 200 and request.fd is not None and not self._host.unsupported:
            # It does not announce the size of bodies
            self._host.unsupported[True] = error
            self._host.submit(self._host.queues.clear())
        if request.cancelled:
            error = Cancelled("the answer is not needed any more")
        elif error.retryable and request.attempts < ATTEMPTS and \
                not self._host.health.suspended(request.route, self._loop.time()):
            self._host.statistics.retries += 1
            self._host.put_back([request])
            return
        self._pool.finish(request, None, error)

    def again(self, request):
        """Queue request again, behind all others"""
        self._host.statistics.retries += 1
        self._host.submit([request])

    def slow(self, connection, request, error):
        """connection has been silent while request, and maybe others, was in flight"""
        if request.alone:
            # Others were answered when it became slow. The answer to a probe tells whether they still are.
            self.patience = UNWILLING
            self._host.doubt.probe_host()
            self._host.finish([request], error)
            return
        health = self._host.health
        if health.answered_at <= request.sent and not connection.in_answer and request.heard in (None, health.answers):
            # Nothing was answered since it was sent, or since its last time-out
            request.heard = health.answers
            self._host.doubt.probe_host()
            self.host_failed(error, request.sent)
        elif not connection.served and not connection.in_answer and not request.attempts:
            # There may be fewer workers than connections
            request.attempts = 1
            self._host.limit_connections(len(self._host.lanes.connections))
        else:
            request.alone = True
        self.again(request)

    def refuse(self, request, error):
        """request was refused"""
        self._host.statistics.refusals += 1
        self._host.limit_connections()
        self._in_row += 1
        self._was_long = self._was_long or self._in_row >= LONG
        if request.cancelled or request.probe:
            self._host.finish([request], error)
        elif (request.refusals + 1) % LONE_ATTEMPTS and self._is_expected(request):
            self._adapt_pace(request)
            self._wait(request, error)
        else:
            self._host.doubt.hold(request, None, error, self._was_long or not self._host.health.pace.is_useless)

    def _is_expected(self, request):
        """Whether there is nothing to be found out by a probe"""
        pace = self._host.health.pace
        if self._host.doubt.is_certain() or pace.is_useless:
            return not self._was_long
        if pace.rate is not None:
            # The limit is tried out from time to time
            return self._in_row == 1 or pace.was_lowered_since(request.sent)
        # Another file is asked for first
        return self._in_row == 1 and not self._host.doubt.can_probe and len(self._host.queues) > 0

    def _adapt_pace(self, request):
        if request in self._lowered:
            # Its first refusal was due to the file, unless both were due to the rate
            self._lowered.discard(request)
            self._host.health.pace.forgive()
        elif self._host.health.pace.refused(request.sent, self._loop.time()):
            self._lowered.add(request)

    def answered(self, request):
        """request was answered, and that is beyond doubt"""
        self._lowered.discard(request)
        if request.refusals and not request.probe:
            self._recovered += 1
            self._host.doubt.reset(True)

    def others_answered(self):
        self._in_row = 0

    def settle(self, verdict, held, outcome):
        """Called by Doubt"""
        was_long, self._was_long = self._was_long, False
        if verdict == ANSWERED and was_long:
            self._host.health.pace.renew()
        # What was held up can be sent
        self._host.submit([])
        if verdict == HOST:
            self._settle_host(held, outcome)
        elif verdict == ANSWERED:
            self._settle_answered(held, outcome)
        else:
            self._settle_files(held)

    def _settle_answered(self, held, answer):
        """The refusals were due to the rate: the first request has been answered now"""
        for request, response, refusal in held:
            self._host.health.pace.refused(request.sent, self._loop.time(), start=True)
            if request is held[0][0] and request.fd is None:
                self._host.statistics.retries += 1
                self.answered(request)
                self._pool.finish(request, answer, None)
            else:
                self._wait(request, refusal, response)

    def _settle_files(self, held):
        for request, response, refusal in held:
            if refusal:
                self._wait(request, refusal)
            else:
                self._host.health.pace.answered(1)
                request.attempts += 1
                if response.status >= 500 and request.attempts < ERROR_ATTEMPTS:
                    self.again(request)
                else:
                    self._pool.finish(request, response, None)

    def _settle_host(self, held, error):
        if held:
            request, response, refusal = held[-1]
            started = request.sent
            error = refusal or error or RefusedError("%s: status %s" % (redact(request.url), response.status))
        else:
            started = self._loop.time()
        answers = self._host.health.answers
        for request, response, refusal in held:
            if request.heard is not None and request.heard != answers:
                # Others were answered since the last such verdict
                request.refusals += 1
            request.heard = answers
            if request.refusals >= REFUSED_ATTEMPTS:
                self._pool.finish(request, response, refusal)
            else:
                self.again(request)
        if error:
            self.host_failed(error, started)

    def _wait(self, request, error, response=None):
        """Send a request that was refused again, later, unless that is in vain"""
        if not request.refusals:
            request.recovered = self._recovered
        request.refusals += 1
        attempts = LONE_ATTEMPTS if request.recovered == self._recovered and error else REFUSED_ATTEMPTS
        if request.cancelled or request.refusals >= attempts:
            self._lowered.discard(request)
            self._pool.finish(request, response, error)
            return
        pause = min(PAUSE * 2 ** (request.refusals - 1), MAX_PAUSE)
        self.waiting[request] = self._loop.call_later(pause, self._waited, request)

    def _waited(self, request):
        del self.waiting[request]
        if request.refusals % 2:
            # As the next one: whether it is refused again tells what the refusals are about
            self._host.statistics.retries += 1
            self._host.put_back([request])
        else:
            # At the end of the queue: a server may refuse every second request
            self.again(request)

    def clear(self):
        """Remove and return all requests that wait"""
        requests = list(self.waiting)
        for timer in self.waiting.values():
            timer.cancel()
        self.waiting.clear()
        return requests

    def host_failed(self, error, started):
        """The host has failed to answer what began at started. If it is suspended now, all that waits fails."""
        if self._host.health.suspended(None, self._loop.time()):
            # By this error, and all that waited has failed
            return
        suspended = self._host.health.failed(error, started, self._loop.time())
        if suspended:
            for connection in list(self._host.lanes.connections):
                if not connection.in_answer:
                    connection.close()
            self._host.finish(self._host.doubt.clear() + self.clear(), suspended)
            self._host.fail(None, suspended)
