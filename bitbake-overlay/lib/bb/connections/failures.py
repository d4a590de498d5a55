#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
Retry or fail requests that were not answered, and record failures of the host.

Used by host.py in the event loop's thread. The number of attempts for each
request is bounded. diagnosis.py determines whether a refusal or a server error
concerns the file or the host; health.py, whether the host is used at all.

    failures = Failures(host, pool)
    failures.refused(request, RefusedError("status 503"))
"""

from bb.connections import Cancelled, RefusedError, StatusError
from bb.connections.diagnosis import ANSWERED, HOST
from bb.connections.health import MAX_PAUSE, PAUSE, UNWILLING
from bb.connections.request import redact

# Attempts for a request whose connection fails; a server that breaks connections at random is unlikely to break four
ATTEMPTS = 4
# Attempts for a request that is refused while others are answered: they last about 40 seconds
REFUSED_ATTEMPTS = 12
# Attempts for a refused request if no other one has succeeded after a refusal meanwhile: the refusals concern the files
UNRECOVERED_ATTEMPTS = 4
# Attempts for a request that is answered with a server error: the second one shows whether it was temporary
ERROR_ATTEMPTS = 2
# Consecutive refusals that suggest a rate limit; shorter runs also occur at random
REFUSAL_RUN = 16


class Failures:
    """
    The failures of one Host.

    delayed     {request: timer} of refused requests, which are queued again when the timer expires
    run         number of consecutive refusals
    patience    seconds to wait for a slow answer while others arrive; reduced after the first that never arrived
    """

    def __init__(self, host, pool):
        self.delayed = {}
        self.run = 0
        self.patience = pool.timeout
        self._host = host
        self._pool = pool
        self._loop = pool.loop
        # Whether run has reached REFUSAL_RUN since the last verdict
        self._had_long_run = False
        # Unanswered requests whose refusal has lowered the rate
        self._lowered = set()
        # Number of requests that were answered after a refusal
        self._recovered = 0

    def retry(self, request, error):
        """Send request again, or fail it: an attempt has failed, which indicates nothing about the host"""
        request.attempts += 1
        if isinstance(error, StatusError) and error.status == 200 and request.fd is not None and not self._host.unsupported:
            # The server does not announce the size of bodies
            self._host.unsupported[True] = error
            self._host.submit(self._host.queues.clear())
        if request.cancelled:
            error = Cancelled()
        elif error.retryable and request.attempts < ATTEMPTS and \
                not self._host.health.suspended(request.route, self._loop.time()):
            self._resend(request, front=True)
            return
        self._pool.finish(request, None, error)

    def _resend(self, request, front=False):
        """Queue request again, behind the others or in front of them"""
        self._host.statistics.retries += 1
        (self._host.put_back if front else self._host.submit)([request])

    def timed_out(self, connection, request, error):
        """connection was closed because of a time-out; request was the first one in flight"""
        if request.exclusive:
            # It was slow before while others were answered. A probe determines whether they still are.
            self.patience = UNWILLING
            self._host.diagnosis.probe_host()
            if request.fd is not None and (connection.in_answer or self._host.health.answered_at > request.sent):
                # The host is not silent: don't let the task wait again
                self._pool.reject(request)
            self._host.finish([request], error)
            return
        health = self._host.health
        if health.answered_at <= request.sent and not connection.in_answer and request.answers_before in (None, health.answers):
            # The host has answered nothing since it was sent, or since its last time-out
            request.answers_before = health.answers
            self._host.diagnosis.probe_host()
            self.host_failed(error, request.sent)
        elif not connection.served and not connection.in_answer and not request.attempts:
            # The server may have fewer workers than there are connections
            request.attempts = 1
            self._host.limit_connections(len(self._host.connections.established))
        else:
            request.exclusive = True
        self._resend(request)

    def refused(self, request, error):
        """Delay, hold or fail request after a RefusedError, which is how a 503 or 429 arrives here"""
        self._host.statistics.refusals += 1
        self._host.limit_connections()
        self.run += 1
        self._had_long_run = self._had_long_run or self.run >= REFUSAL_RUN
        if request.cancelled or request.probe:
            self._host.finish([request], error)
        elif (request.refusals + 1) % UNRECOVERED_ATTEMPTS and self._is_expected(request):
            self._lower_rate(request)
            self._delay(request, error)
        else:
            probes_only = self._had_long_run or not self._host.health.rate_limit.is_ineffective
            self._host.diagnosis.hold(request, None, error, probes_only)

    def _is_expected(self, request):
        """Whether a probe would reveal nothing new about the refusal of request"""
        rate_limit = self._host.health.rate_limit
        if self._host.diagnosis.is_certain() or rate_limit.is_ineffective:
            return not self._had_long_run
        if rate_limit.rate is not None:
            # A rising rate reaches the server's limit from time to time
            return self.run == 1 or rate_limit.lowered_since(request.sent)
        # One of the queued requests may become the reference
        return self.run == 1 and not self._host.diagnosis.has_reference and len(self._host.queues) > 0

    def _lower_rate(self, request):
        if request in self._lowered:
            # Refused again at the lower rate: the first refusal was probably due to the file as well
            self._lowered.discard(request)
            self._host.health.rate_limit.restore()
        elif self._host.health.rate_limit.refused(request.sent, self._loop.time()):
            self._lowered.add(request)

    def answered(self, request):
        """request has received an unambiguous answer"""
        self._lowered.discard(request)
        if request.refusals and not request.probe:
            self._recovered += 1
            self._host.diagnosis.reset(True)

    def apply_verdict(self, verdict, held, outcome):
        had_long_run, self._had_long_run = self._had_long_run, False
        if verdict == ANSWERED and had_long_run:
            self._host.health.rate_limit.reinstate()
        # Send requests that had to wait for the verdict
        self._host.submit([])
        if verdict == HOST:
            self._apply_host_verdict(held, outcome)
        elif verdict == ANSWERED:
            self._apply_answered_verdict(held, outcome)
        else:
            self._apply_files_verdict(held)

    def _apply_answered_verdict(self, held, answer):
        """The refusals were due to the rate: the first request, repeated, has been answered"""
        for request, response, refusal in held:
            self._host.health.rate_limit.refused(request.sent, self._loop.time(), start=True)
            if request is held[0][0] and request.fd is None:
                self._host.statistics.retries += 1
                self.answered(request)
                self._pool.finish(request, answer, None)
            else:
                self._delay(request, refusal, response)

    def _apply_files_verdict(self, held):
        for request, response, refusal in held:
            if refusal:
                self._delay(request, refusal)
            else:
                self._host.health.rate_limit.answered(1)
                request.attempts += 1
                if response.status >= 500 and request.attempts < ERROR_ATTEMPTS:
                    self._resend(request)
                else:
                    self._pool.finish(request, response, None)

    def _apply_host_verdict(self, held, error):
        if held:
            request, response, refusal = held[-1]
            started = request.sent
            error = refusal or error or RefusedError("%s: status %s" % (redact(request.url), response.status))
        else:
            started = self._loop.time()
        answers = self._host.health.answers
        for request, response, refusal in held:
            if request.answers_before is not None and request.answers_before != answers:
                # The host has answered others since the last such verdict
                request.refusals += 1
            request.answers_before = answers
            if request.refusals >= REFUSED_ATTEMPTS:
                self._pool.finish(request, response, refusal)
            else:
                self._resend(request)
        if error:
            self.host_failed(error, started)

    def _delay(self, request, error, response=None):
        """Send a refused request again after a pause, or fail it after the last attempt"""
        if not request.refusals:
            request.recoveries_before = self._recovered
        request.refusals += 1
        attempts = UNRECOVERED_ATTEMPTS if request.recoveries_before == self._recovered and error else REFUSED_ATTEMPTS
        if request.cancelled or request.refusals >= attempts:
            self._lowered.discard(request)
            self._pool.finish(request, response, error)
            return
        pause = min(PAUSE * 2 ** (request.refusals - 1), MAX_PAUSE)
        self.delayed[request] = self._loop.call_later(pause, self._retry_refused, request)

    def _retry_refused(self, request):
        del self.delayed[request]
        # In front: another refusal soon indicates that the file is the reason. At the back every second time, since a
        # server may refuse every second request.
        self._resend(request, front=request.refusals % 2 == 1)

    def clear(self):
        """Remove and return all delayed requests"""
        requests = list(self.delayed)
        for timer in self.delayed.values():
            timer.cancel()
        self.delayed.clear()
        return requests

    def host_failed(self, error, started):
        """Record a failure of the host in an attempt made at the time started; if that suspends it, fail all requests"""
        if self._host.health.suspended(None, self._loop.time()):
            # One of several connections that fail at once has suspended it, which failed all requests
            return
        suspended = self._host.health.failed(error, started, self._loop.time())
        if suspended:
            for connection in list(self._host.connections.established):
                if not connection.in_answer:
                    connection.close()
            self._host.finish(self._host.diagnosis.clear() + self.clear(), suspended)
            self._host.fail(None, suspended)
