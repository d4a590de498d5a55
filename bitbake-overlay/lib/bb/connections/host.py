#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
One host: dispatches its requests to its connections, and sorts the answers.

Used by pool.py in the event loop's thread, which owns all state here; nothing
blocks. Each event (new requests, answers, the end of a connection, a timer)
changes the state and schedules _dispatch(), which fills, opens and closes
connections by means of connectionset.py. How many connections and requests are
permitted is decided in health.py, growth.py and pipelining.py, and what happens
to requests without an answer in failures.py.

    host = Host(pool, origin, connect, HTTPConnection)
    host.submit(requests)       # pool.finish() is called for each
    host.stop()
"""

import types

from bb.connections import (Cancelled, ConnectError, DestinationError, Disconnected, IdleClosed, InconsistentAnswer,
                            ProtocolError, RefusedError, Resubmit, TimedOutError, Unusable)
from bb.connections.connectionset import IDLE, ConnectionSet
from bb.connections.diagnosis import Diagnosis, is_ambiguous
from bb.connections.failures import ATTEMPTS, Failures
from bb.connections.growth import Growth
from bb.connections.health import Health
from bb.connections.pipelining import Pipelining
from bb.connections.request import FORBIDDEN, HEAD_REFUSED, redact
from bb.connections.requestqueue import RequestQueues

# Requests per second below which no trial is made, since the rate limit would probably refuse a part of it
TRIAL_RATE = 128


class Host:
    """
    The queues and connections of one origin. connect(loop, host, origin, route,
    timeout) is a coroutine that returns an open connection of the class kind.

    connections     a ConnectionSet
    queues          RequestQueues of the requests to be sent
    unsupported     {whether requests have a destination: error, if the server cannot be used for those}
    unusable        {route: error, if the host cannot be used over it}
    statistics      counters for reports
    health, growth, diagnosis, failures, pipelining     an instance of each class
    """

    def __init__(self, pool, origin, connect, kind):
        self.origin = origin
        self.statistics = types.SimpleNamespace(requests=0, connections=0, retries=0, refusals=0, files=0, bytes=0)
        self.health = Health(origin.host, pool.limit, kind.serial)
        self.connections = ConnectionSet(pool, self, connect, kind)
        self._pool = pool
        self._loop = pool.loop
        self._kind = kind
        self.pipelining = Pipelining(kind.needs_trial)
        self._trial = None
        self.failures = Failures(self, pool)
        self.diagnosis = Diagnosis(pool, self.failures.apply_verdict)
        # Further logins are often refused and rarely increase the throughput
        self.growth = Growth(pool.limit, pool.limit if kind.serial else pool.most)
        self.queues = RequestQueues()
        # {status with which a HEAD was refused: whether a GET was answered then}
        self._get_helps = {}
        # Whether it has sent stray data, such as a body after the answer to a HEAD
        self._sends_stray_data = False
        self.unsupported = {}
        self.unusable = {}
        self._scheduled = False
        self._timer = None

    def submit(self, requests):
        """Queue requests, or fail them if the host is suspended"""
        for request in requests:
            error = self.health.suspended(request.route, self._loop.time()) or \
                self.unsupported.get(request.fd is not None) or self.unusable.get(request.route)
            if error:
                self._pool.finish(request, None, error)
            else:
                self.queues.add(request)
        self._schedule()

    def put_back(self, requests):
        self.queues.put_back(requests)
        self._schedule()

    def stop(self):
        """Fail all requests and close all connections. No requests may be submitted afterwards."""
        # Before the requests are collected: those that are answered are not failed
        for connection in list(self.connections.established):
            connection.report()
        requests = self.queues.clear() + self.diagnosis.clear() + self.failures.clear()
        for connection in self.connections.established:
            requests += self._trial.requests if self._in_trial(connection) else connection.in_flight
        self.connections.close()
        self.finish(requests, Cancelled("the build has ended"))

    def fail(self, route, error):
        """Fail the requests queued for route, or for all routes if it is None"""
        self.finish(self.queues.clear(route), error)

    def _give_up(self, route, error):
        """Fail all requests for route for the rest of the build"""
        self.unusable[route] = error
        self.fail(route, error)

    def finish(self, requests, error):
        for request in list(requests):
            self._pool.finish(request, None, error)

    def _schedule(self):
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._dispatch)

    def _dispatch(self):
        """Send requests on the open connections; open and close connections as needed"""
        self._scheduled = False
        self.connections.close_excess()
        now = self._loop.time()
        idle = not self.queues and not any(connection.in_flight for connection in self.connections.established)
        self.diagnosis.proceed(idle, self.health.answers)
        if now < self.health.paused_until:
            self._wake_at(self.health.paused_until)
            return
        self._update_limit(now)
        # First those on which a request is answered soonest
        for connection in sorted(self.connections.established, key=lambda connection: len(connection.in_flight)):
            if not (connection.retiring or connection.reporting or self._in_trial(connection)) and \
                    self.queues.get(connection.route):
                self.connections.fill(connection, self.queues.get(connection.route))
        for route, queue in self.queues.items():
            if self.health.rate_limit.allowance(now) == 0:
                self._wake_at(self.health.rate_limit.next_at())
            elif self.admits(queue.head):
                self.connections.open(route, queue)

    def admits(self, request):
        """Whether request may be sent now, or has to wait for the verdict on ambiguous answers"""
        return request.probe or not self.diagnosis.probes_only

    def _update_limit(self, now):
        waiting = len(self.queues)
        if waiting and self.health.limit == self.health.most:
            arrived = self.connections.arrived + sum(connection.arrived for connection in self.connections.established)
            self.health.set_most(self.growth.update(now, self.connections.size, self.pipelining.depth, arrived, self.health.answers,
                                                 waiting))
        else:
            self.growth.pause()

    def limit_connections(self, number=None):
        """Permit this number of connections, or the usual one, for the rest of the build: see Growth.restrict()"""
        self.growth.restrict(number)
        self.health.set_most(min(self.health.most, self.growth.limit))

    def _wake_at(self, time):
        if self._timer:
            self._timer.cancel()
        self._timer = self._loop.call_at(time, self._schedule)

    def connected(self, route):
        self.statistics.connections += 1
        self.health.connected(route)
        self._schedule()

    def not_connected(self, route, error, started):
        """An attempt to connect, made at the time started, has failed"""
        self.statistics.refusals += isinstance(error, RefusedError)
        if isinstance(error, Unusable):
            self._give_up(route, error)
        elif self.connections.of_route(route):
            # The server accepts only as many connections as are open now
            self.health.lower_limit(len(self.connections.established))
        elif isinstance(error, ConnectError) and not error.retryable:
            if not self.connections.opening(route):
                self.fail(route, self.health.suspend(route, error, self._loop.time()))
        else:
            self.failures.host_failed(error, started)
        self._schedule()

    def answered(self, connection, answers):
        """Called by Connection with [(request, response, error)]"""
        if connection.served == len(answers):
            self.connections.served(connection)
        at_once = len(answers)
        if self._in_trial(connection):
            if not self._trial.add(answers):
                return
            answers = self._finish_trial(connection)
        good = []
        counted = 0
        for request, response, error in answers:
            if not error:
                response, error = self._classify(connection, request, response)
            # Over SFTP, "permission denied" always concerns the file
            ambiguous = response is not None and is_ambiguous(response) and (self._kind.needs_trial or response.status >= 500)
            if isinstance(error, RefusedError):
                # Count the answers before each refusal: whether refusals are consecutive matters
                self._count(len(good) - counted)
                counted = len(good)
                self.failures.refused(request, error)
            elif ambiguous and not request.probe:
                self.diagnosis.hold(request, response, None,
                                    response.status == FORBIDDEN or not self.health.rate_limit.is_ineffective)
            else:
                good.append((request, response, error))
                # An ambiguous answer to a probe is not counted: it does not show that the host has recovered
                counted += ambiguous
        self._count(len(good) - counted)
        latency = None
        if good and good[-1][0].fd is None:
            self.connections.latency = latency = self._loop.time() - good[-1][0].sent
        waiting = len(self.queues.get(connection.route)) // max(1, len(self.connections.of_route(connection.route)))
        self.pipelining.answered(connection, at_once, latency, waiting)
        if connection.is_open and not connection.in_flight:
            if self._sends_stray_data and answers and answers[-1][1] and answers[-1][1].status != 200:
                # Stray data may follow, and be mistaken for the next answer
                connection.close()
            elif not answers or not self._try_pipelining(connection, answers[-1]):
                connection.set_idle(IDLE)
        self._schedule()
        self.diagnosis.note_answers(good)
        for request, response, error in good:
            self._conclude(request, response, error)

    def _classify(self, connection, request, response):
        """Connection.classify(), and a GET in place of a HEAD that the server refuses. Returns the same."""
        response, error = connection.classify(request, response)
        if error or not self._kind.needs_trial:
            return response, error
        if request.before_redirects and 400 <= response.status < 500:
            self._pool.ignore_targets()
            request.restore_url()
            return None, Resubmit()
        if response.status not in HEAD_REFUSED:
            if request.method != request.original_method and response.status < 500:
                self._get_helps[request.refused_head] = True
            return response, None
        if request.method != request.original_method:
            # Not if it has helped before: the file may be absent, and the server answer that with the same status
            self._get_helps.setdefault(request.refused_head, False)
        elif request.method == "HEAD" and self._get_helps.get(response.status, True):
            # As in fetch2/wget.py, unless it has not helped before
            request.method = "GET"
            request.refused_head = response.status
            return None, Resubmit()
        elif request.size is not None and response.status == FORBIDDEN:
            return None, RefusedError("%s: status %s" % (redact(request.url), FORBIDDEN))
        return response, None

    def _count(self, number):
        if number:
            self.failures.run = 0
            self.health.answered(number, self._loop.time())

    def _conclude(self, request, response, error):
        if not error:
            self.failures.answered(request)
        if isinstance(error, Resubmit):
            request.attempts = 0
            if request.origin == self.origin:
                # In front, to find out whether a GET helps before all HEADs have been refused
                self.put_back([request])
            else:
                self._pool.resubmit(request)
        elif error:
            if isinstance(error, Unusable):
                self._give_up(request.route, error)
            self.failures.retry(request, error)
        else:
            if request.exclusive and request.identity not in (None, (response.length, response.validators)):
                # The answer that ended pipelining was right: the file has changed since the HEAD
                self.pipelining.revoke_strike()
            if request.fd is not None and response.status == 200:
                self.statistics.files += 1
                self.statistics.bytes += response.length or 0
            self._pool.finish(request, response, None)

    def _in_trial(self, connection):
        return self._trial is not None and self._trial.connection is connection

    def _try_pipelining(self, connection, answer):
        queue = self.queues.get(connection.route)
        rate = self.health.rate_limit.rate
        if queue and not self._trial and not self.diagnosis.probes_only and not connection.retiring and \
                self._loop.time() >= self.health.paused_until and (rate is None or rate > TRIAL_RATE):
            self._trial = self.pipelining.trial(connection, answer, queue)
            if self._trial:
                self.connections.send(connection, self._trial.sent)
        return self._in_trial(connection)

    def _finish_trial(self, connection):
        """Returns the answers of the trial that can be used"""
        trial, self._trial = self._trial, None
        outcome, answers = trial.evaluate()
        self.pipelining.finish(outcome)
        if not answers:
            self.put_back(trial.requests)
        if outcome == "fails":
            connection.close()
        return answers

    def ended(self, connection, error):
        """Called by Connection. Retries the requests in flight, of which the first one may have caused error."""
        if connection not in self.connections.established:
            # It is still being opened, or the host has been stopped
            return
        self.connections.established.remove(connection)
        if connection.has_stray_data:
            self._sends_stray_data = True
            self.pipelining.disable()
        self.connections.arrived += connection.arrived
        # Not failures of the server
        own = isinstance(error, (Cancelled, DestinationError))
        self.pipelining.ended(connection, None if own else error)
        self._schedule()
        requests = list(connection.in_flight)
        if self._in_trial(connection):
            trial, self._trial = self._trial, None
            self.pipelining.finish(trial.ended(error))
            self.put_back(trial.requests)
            return
        if error is None:
            self.pipelining.closed(connection)
        elif isinstance(error, InconsistentAnswer) or \
                len(requests) > 1 and not own and not isinstance(error, (IdleClosed, TimedOutError)):
            self.pipelining.broken(connection)
        if error is None or not requests or isinstance(error, IdleClosed):
            # A server may close a connection at any time (RFC 9112 9.5)
            self.put_back(requests)
            return
        self.put_back(requests[1:])
        if isinstance(error, TimedOutError):
            self.failures.timed_out(connection, requests[0], error)
        elif isinstance(error, RefusedError) or \
                isinstance(error, Disconnected) and not connection.served and not self._kind.serial:
            # Servers that have reached their limit of connections may close further ones; an sshd refuses the login instead
            self.failures.refused(requests[0], RefusedError(str(error)))
        elif isinstance(error, Disconnected) and requests[0].attempts < ATTEMPTS:
            # Servers may close connections at any time; it is a failure only if it always concerns the same request
            requests[0].attempts += 1
            self.put_back(requests[:1])
        else:
            requests[0].exclusive = requests[0].exclusive or isinstance(error, InconsistentAnswer)
            if type(error) is ProtocolError and not self.health.answers and requests[0].attempts:
                # The server does not speak HTTP as implemented here: leave it to the fetcher
                self.unsupported = {True: error, False: error}
                self.fail(None, error)
            self.failures.retry(requests[0], error)
