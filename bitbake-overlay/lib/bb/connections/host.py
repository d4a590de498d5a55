#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
One host: its queued requests and its connections.

Used by pool.py. Each event (requests, answers, the end of a connection, a
timer) changes the state and schedules _dispatch(), which alone sends requests
and has lanes.py open and close connections. When, and how many, is decided by
health.py and pipelining.py. Everything runs in the thread of the event loop,
and nothing blocks.

    host = Host(pool, origin, connect, HTTPConnection)
    host.submit(requests)       # pool.finish() is called for each
    host.stop()
"""

import types

from bb.connections import (Cancelled, Changed, ConnectError, Disagreement, Disconnected, IdleClosed, ProtocolError,
                            RefusedError, TimedOutError)
from bb.connections.doubt import Doubt, is_doubtful
from bb.connections.failures import ATTEMPTS, Failures
from bb.connections.growth import Growth
from bb.connections.health import Health
from bb.connections.lanes import IDLE, Lanes
from bb.connections.pipelining import Pipelining
from bb.connections.request import FORBIDDEN, HEAD_REFUSED, redact
from bb.connections.requestqueue import RequestQueues

# Requests in flight on a connection to begin with, where a trial is needed and where not
DEPTH = 8
UNTRIED_DEPTH = 64
# Requests a second above which a limit does not keep a trial from being answered
TRIAL_PACE = 128


class Host:
    """
    The queues and connections of one origin. connect(loop, host, origin, route,
    timeout) is the coroutine that opens a connection of the class kind.

    health, growth, doubt, failures, pipelining     decide what to do
    lanes       the connections
    queues      the requests that wait
    unsupported why there are no shared connections for GETs (True), or for HEADs (False)
    statistics  what has been done so far
    """

    def __init__(self, pool, origin, connect, kind):
        self.origin = origin
        self.statistics = types.SimpleNamespace(requests=0, connections=0, retries=0, refusals=0, files=0, bytes=0)
        self.health = Health(origin.host, pool.limit, DEPTH if kind.tried else UNTRIED_DEPTH, kind.serial)
        self.lanes = Lanes(pool, self, connect, kind)
        self._pool = pool
        self._loop = pool.loop
        self._kind = kind
        self.pipelining = Pipelining(kind.tried)
        self._trial = None
        self.failures = Failures(self, pool)
        self.doubt = Doubt(pool, self.failures.settle)
        # Further logins are often refused, and rarely faster
        self.growth = Growth(pool.limit, pool.limit if kind.serial else pool.most)
        self.queues = RequestQueues()
        # {status that a HEAD was refused with: whether a GET is answered then}
        self._get_helps = {}
        # Whether it sends more than answers, as servers do that send a body with the answer to a HEAD
        self._untidy = False
        self.unsupported = {}
        self._scheduled = False
        self._timer = None

    # Requests

    def submit(self, requests):
        """Queue requests, or fail them if the host is suspended"""
        for request in requests:
            error = self.health.suspended(request.route, self._loop.time()) or \
                self.unsupported.get(request.fd is not None)
            if error:
                self._pool.finish(request, None, error)
            else:
                self.queues.add(request)
        self._schedule()

    def put_back(self, requests):
        """Put requests of a failed connection at the front of the queue"""
        self.queues.put_back(requests)
        self._schedule()

    def hurry(self, request):
        """Send request before others, if it is still queued"""
        self.queues.hurry(request)

    def unanswered(self):
        """All requests that are queued, in flight or in doubt"""
        yield from self.queues
        for connection in self.lanes.connections:
            yield from self._trial.requests if self._is_tried(connection) else connection.in_flight
        yield from [request for request, _, _ in self.doubt.held]
        yield from self.failures.waiting

    def stop(self):
        """Fail all requests, and close all connections. Nothing is submitted any more."""
        requests = list(self.unanswered())
        self.queues.clear()
        self.doubt.clear()
        self.failures.clear()
        self.lanes.close()
        self.finish(requests, Cancelled("the build has ended"))

    def fail(self, route, error):
        """Fail what is queued for route, or for all routes if that is None"""
        self.finish(self.queues.clear(route), error)

    def finish(self, requests, error):
        for request in list(requests):
            self._pool.finish(request, None, error)

    # Sending

    def _schedule(self):
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._dispatch)

    def _dispatch(self):
        """Send what fits on the connections that there are; open and close connections as needed"""
        self._scheduled = False
        self.lanes.close_excess()
        now = self._loop.time()
        idle = not self.queues and not any(connection.in_flight for connection in self.lanes.connections)
        self.doubt.proceed(idle, self.health.answers)
        if now < self.health.paused_until:
            self._wake_at(self.health.paused_until)
            return
        self._grow(now)
        for connection in self.lanes.by_load():
            if not connection.retiring and self.queues.get(connection.route) and not self._is_tried(connection):
                self.lanes.fill(connection, self.queues.get(connection.route))
        for route, queue in self.queues.items():
            if self.health.pace.allowance(now) == 0:
                self._wake_at(self.health.pace.next_at())
            elif self.admits(queue.head):
                self.lanes.open(route, queue)

    def admits(self, request):
        """Whether request may be sent as far as refusals are concerned"""
        return request.probe or not self.doubt.holds_up

    def _grow(self, now):
        """Decide how many connections there may be"""
        waiting = len(self.queues)
        if waiting and self.health.limit == self.health.most:
            arrived = self.lanes.arrived + sum(connection.arrived for connection in self.lanes.connections)
            self.health.allow(self.growth.look(now, self.lanes.size, self.health.depth, arrived, self.health.answers,
                                                waiting))
        else:
            self.growth.pause()

    def limit_connections(self, number=None):
        """There may be so many connections from now on, or as many as usual"""
        self.growth.end(number)
        self.health.allow(min(self.health.most, self.growth.limit))

    def _wake_at(self, time):
        if self._timer:
            self._timer.cancel()
        self._timer = self._loop.call_at(time, self._schedule)

    # Connections

    def connected(self, route):
        """Called by Lanes"""
        self.statistics.connections += 1
        self.health.connected(route)
        self._schedule()

    def not_connected(self, route, error, started):
        """Called by Lanes"""
        self.statistics.refusals += isinstance(error, RefusedError)
        if self.lanes.of_route(route):
            # The server accepts fewer connections than we want
            self.health.at_limit(len(self.lanes.connections))
        elif isinstance(error, ConnectError) and not error.retryable:
            if not self.lanes.opening(route):
                self.fail(route, self.health.suspend(route, error, self._loop.time()))
        else:
            self.failures.host_failed(error, started)
        self._schedule()

    # Answers

    def answered(self, connection, answers):
        """Called by Connection"""
        if connection.served == len(answers):
            self.lanes.served(connection)
        if self._is_tried(connection):
            if not self._trial.add(answers):
                return
            answers = self._finish_trial(connection)
        good = []
        counted = 0
        for request, response, error in answers:
            if not error:
                response, error = self._judge(connection, request, response)
            # Over SFTP permission is denied for a file
            doubtful = response is not None and is_doubtful(response) and (self._kind.tried or response.status >= 500)
            if isinstance(error, RefusedError):
                # In this order: answers between refusals matter
                self._count(len(good) - counted)
                counted = len(good)
                self.failures.refuse(request, error)
            elif doubtful and not request.probe:
                self.doubt.hold(request, response, None, response.status == FORBIDDEN or not self.health.pace.is_useless)
            else:
                good.append((request, response, error))
                # Such an answer to a probe: the host still fails
                counted += doubtful
        self._count(len(good) - counted)
        if good and good[-1][0].fd is None:
            self.lanes.latency = self._loop.time() - good[-1][0].sent
        if connection.is_open and not connection.in_flight:
            if len(answers) > self.health.depth // 2 and self.queues.get(connection.route):
                self.health.ran_dry()
            if self._untidy and answers and answers[-1][1] and answers[-1][1].status != 200:
                # Something may follow that is taken for the next answer
                connection.close()
            elif not answers or not self._try_pipelining(connection, answers[-1]):
                connection.set_idle(IDLE)
        self._schedule()
        self.doubt.learn(good)
        for request, response, error in good:
            self._conclude(request, response, error)

    def _judge(self, connection, request, response):
        """Returns (response, None), or (None, error)"""
        response, error = connection.judge(request, response)
        if error or not self._kind.tried:
            return response, error
        if response.status not in HEAD_REFUSED:
            if request.method != request.asked and response.status < 500:
                self._get_helps[request.refused_head] = True
            return response, None
        if request.method != request.asked:
            # An absent file may be answered in the same way where it has helped before
            self._get_helps.setdefault(request.refused_head, False)
        elif request.method == "HEAD" and self._get_helps.get(response.status, True):
            # As in fetch2/wget.py, unless it was in vain before
            request.method = "GET"
            request.refused_head = response.status
            return None, Changed()
        elif request.size is not None and response.status == FORBIDDEN:
            return None, RefusedError("%s: status %s" % (redact(request.url), FORBIDDEN))
        return response, None

    def _count(self, number):
        if number:
            self.failures.others_answered()
            self.health.answered(number, self._loop.time())

    def _conclude(self, request, response, error):
        if not error:
            self.failures.answered(request)
        if isinstance(error, Changed):
            request.attempts = 0
            if request.origin == self.origin:
                # As the next one: whether a GET helps is to be known before all HEADs have been refused
                self.put_back([request])
            else:
                self._pool.resubmit(request)
        elif error:
            self.failures.retry(request, error)
        else:
            if request.alone and request.size is not None and (response.length, response.validators) != (request.size, request.validators):
                self.pipelining.forgive()
            if request.fd is not None and response.status == 200:
                self.statistics.files += 1
                self.statistics.bytes += response.length or 0
            self._pool.finish(request, response, None)

    def _is_tried(self, connection):
        return self._trial is not None and self._trial.connection is connection

    def _try_pipelining(self, connection, answer):
        queue = self.queues.get(connection.route)
        pace = self.health.pace.rate
        if queue and not self._trial and not self.doubt.holds_up and not connection.retiring and \
                self._loop.time() >= self.health.paused_until and (pace is None or pace > TRIAL_PACE):
            self._trial = self.pipelining.trial(connection, answer, queue, self.health.depth)
            if self._trial:
                self.lanes.send(connection, self._trial.sent)
        return self._is_tried(connection)

    def _finish_trial(self, connection):
        """Returns the answers that can be used"""
        trial, self._trial = self._trial, None
        outcome, answers = trial.judge()
        self.pipelining.finish(outcome)
        if not answers:
            self.put_back(trial.requests)
        if outcome == "fails":
            connection.close()
        return answers

    def ended(self, connection, error):
        """Called by Connection. Requests without an answer are sent again; the first of them may be the reason."""
        if connection not in self.lanes.connections:
            # It is not open yet, or the host has stopped
            return
        self.lanes.connections.remove(connection)
        if connection.untidy:
            self._untidy = True
            self.pipelining.end()
        self.lanes.arrived += connection.arrived
        self._schedule()
        requests = list(connection.in_flight)
        if self._is_tried(connection):
            trial, self._trial = self._trial, None
            self.pipelining.finish(trial.ended(error))
            self.put_back(trial.requests)
            return
        if error is None:
            self.pipelining.closed(connection)
        elif isinstance(error, Disagreement) or len(requests) > 1 and not isinstance(error, (IdleClosed, TimedOutError)):
            self.pipelining.broken(connection)
        if error is None or not requests or isinstance(error, IdleClosed):
            # A server may close a connection at any time (RFC 9112 9.5)
            self.put_back(requests)
            return
        self.put_back(requests[1:])
        if isinstance(error, TimedOutError):
            self.failures.slow(connection, requests[0], error)
        elif isinstance(error, RefusedError) or isinstance(error, Disconnected) and not connection.served and not self._kind.serial:
            # How servers with a limit of connections refuse if they do not get as far as 503; an sshd refuses the login
            self.failures.refuse(requests[0], RefusedError(str(error)))
        elif isinstance(error, Disconnected) and requests[0].attempts < ATTEMPTS:
            # No failure, unless it is always the same request
            requests[0].attempts += 1
            self.put_back(requests[:1])
        else:
            requests[0].alone = requests[0].alone or isinstance(error, Disagreement)
            if type(error) is ProtocolError and not self.health.answers and requests[0].attempts:
                # Not HTTP as it is understood here: leave it to the fetcher
                self.unsupported = {True: error, False: error}
                self.fail(None, error)
            self.failures.retry(requests[0], error)
