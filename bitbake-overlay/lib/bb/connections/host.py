#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
One host: the requests that wait for it, and the connections to it.

Used by pool.py. Each event (requests, answers, the end of a connection, a
timer) changes the state and schedules _dispatch(), which alone sends requests,
opens connections and closes unused ones. When, and how many, is decided by
health.py and pipelining.py. Everything runs in the thread of the event loop,
and nothing blocks.

    host = Host(pool, origin, connect, HTTPConnection)
    host.submit(requests)       # pool.finish() is called for each
    host.stop()
"""

import asyncio

from bb.connections import (Cancelled, Changed, ConnectError, ConnectionCacheError, Disagreement, Disconnected,
                            IdleClosed, ProtocolError, RefusedError, TimedOutError)
from bb.connections.health import Health, Statistics
from bb.connections.pipelining import TRIAL_TIMEOUT, Pipelining
from bb.connections.requestqueue import RequestQueue

# Attempts for a request, and if they time out
ATTEMPTS = 4
TIMEOUT_ATTEMPTS = 2
# Seconds until an unused connection is closed, and one that was never used: servers close those sooner
IDLE = 60
UNUSED = 5
# Round trips of a login, to estimate a round trip from it
LOGIN = 12
# Bytes of bodies in flight on a connection, if there is more than one
MAX_BODIES = 1024 * 1024
# Requests in flight on a connection to begin with, where a trial is needed and where not
DEPTH = 8
UNTRIED_DEPTH = 64


class Host:
    """
    The queues and connections of one origin. connect(loop, host, origin, route,
    timeout) is the coroutine that opens a connection of the class kind.
    """

    def __init__(self, pool, origin, connect, kind):
        self.origin = origin
        self.statistics = Statistics()
        self.health = Health(pool.limit, DEPTH if kind.tried else UNTRIED_DEPTH)
        self._pool = pool
        self._loop = pool.loop
        self._connect = connect
        self._serial = kind.serial
        self._http = kind.tried
        self._pipelining = Pipelining(kind.tried)
        self._connections = []
        # {task: route} for connections that are being opened
        self._connecting = {}
        # {route: RequestQueue}
        self._queues = {}
        # {connection: Trial}, one at most
        self._trials = {}
        # Seconds that the last login took, and that the last HEAD took
        self._login = self._latency = 0
        self._scheduled = False
        self._timer = None
        self._stopped = False

    @property
    def size(self):
        """Number of connections, including those that are being opened"""
        return len(self._connections) + len(self._connecting)

    # Requests

    def submit(self, requests):
        """Queue requests, or fail them if the host is suspended"""
        for request in requests:
            error = self.health.suspended(request.route, self._loop.time())
            if error:
                self._pool.finish(request, None, error)
            else:
                self._queue(request.route).add(request)
        self._schedule()

    def _queue(self, route):
        if route not in self._queues:
            self._queues[route] = RequestQueue()
        return self._queues[route]

    def _put_back(self, requests):
        """Requests whose connection has failed are the next ones again"""
        for request in reversed(requests):
            self._queue(request.route).put_back(request)
        self._schedule()

    def hurry(self, requests):
        """Send those of requests that are still queued before others"""
        for queue in self._queues.values():
            queue.hurry(requests)

    def unanswered(self):
        """All requests that are queued or in flight"""
        for queue in self._queues.values():
            yield from queue
        for connection in self._connections:
            yield from self._trials[connection].requests if connection in self._trials else connection.in_flight

    def stop(self):
        """Fail all requests, and close all connections"""
        self._stopped = True
        requests = list(self.unanswered())
        self._queues.clear()
        for task in self._connecting:
            task.cancel()
        connections, self._connections = self._connections, []
        for connection in connections:
            connection.close()
        for request in requests:
            self._pool.finish(request, None, Cancelled("the build has ended"))

    def _fail(self, queue, error):
        for request in queue.clear():
            self._pool.finish(request, None, error)

    # Sending

    def _schedule(self):
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._dispatch)

    def _dispatch(self):
        """Send what fits on the connections that there are; open and close connections as needed"""
        self._scheduled = False
        paused = self._loop.time() < self.health.paused_until
        excess = self.size - self.health.limit
        for connection in sorted(self._connections, key=lambda connection: len(connection.in_flight)):
            if connection.retiring or excess > 0:
                excess -= 1
                if not connection.in_flight:
                    connection.close()
            elif not paused and self._queues.get(connection.route) and connection not in self._trials:
                self._fill(connection, self._queues[connection.route])
        if paused:
            if self._timer:
                self._timer.cancel()
            self._timer = self._loop.call_at(self.health.paused_until, self._schedule)
            return
        for route, queue in list(self._queues.items()):
            while queue and self._needs_connection(route, queue) and self._has_place(route, queue):
                task = self._loop.create_task(self._open(route))
                self._connecting[task] = route
            if not queue:
                del self._queues[route]

    def _fill(self, connection, queue):
        room = self._pipelining.room(connection, self.health.depth)
        if len(connection.in_flight) > room and len(queue) > room:
            # A server answers many requests at once if they arrive at once, and so few system calls are needed
            return
        room = min(room, self._share(connection, queue))
        bodies = sum(request.body_size() for request in connection.in_flight)
        unknown = any(request.is_unknown for request in connection.in_flight)
        taken = []
        while room > 0 and queue:
            if queue.head.cancelled:
                self._pool.finish(queue.pop(), None, Cancelled("the answer is not needed any more"))
                continue
            if self._http and queue.head.is_unknown:
                if unknown:
                    # Nothing would tell if the answers to the two were mixed up
                    break
                unknown = True
            bodies += queue.head.body_size()
            if (taken or connection.in_flight) and bodies > MAX_BODIES and queue.head.fd is not None:
                break
            taken.append(queue.pop())
            room -= 1
        if taken:
            self._send(connection, taken)

    def _share(self, connection, queue):
        """
        How many more requests connection may have, so that the others get theirs: its part of the queue, or what it
        lacks of its part of all, so that the last ones are not divided again and again
        """
        connections = self._of_route(connection.route)
        # A login takes many round trips
        sharing = len(connections) + (0 if self._serial else list(self._connecting.values()).count(connection.route))
        in_flight = sum(len(one.in_flight) for one in connections)
        return max(-(-len(queue) // sharing), -(-(len(queue) + in_flight) // sharing) - len(connection.in_flight))

    def _of_route(self, route):
        return [connection for connection in self._connections if connection.route == route]

    def _send(self, connection, requests):
        now = self._loop.time()
        for request in requests:
            request.sent = now
        self.statistics.requests += len(requests)
        connection.send(requests)

    # Opening connections

    def _needs_connection(self, route, queue):
        """Whether a further connection would be of use before the queue is answered by those there are"""
        connecting = list(self._connecting.values()).count(route)
        if connecting >= len(queue) or self._serial and self._connecting:
            return False
        if not self._serial or queue.head.fd is not None or queue.last.fd is not None:
            return True
        # A login takes long, and sshd may refuse each. Of sessions that are busy with files nothing is known.
        sessions = sum(not any(request.fd is not None for request in connection.in_flight)
                       for connection in self._of_route(route))
        return not sessions or len(queue) * self._latency > sessions * self.health.depth * self._login

    def _has_place(self, route, queue):
        """Whether there may be a further connection. If not, one by another route may have to give way."""
        if self.size < self.health.limit:
            if self._pool.has_room():
                return True
            if not self._connections and not self._connecting:
                # Not the host's fault
                self._fail(queue, ConnectionCacheError("%s: connections to too many hosts" % self.origin.host))
        elif route not in self._connecting.values() and not self._of_route(route) and \
                not any(connection.retiring for connection in self._connections) and self._connections:
            min(self._connections, key=lambda connection: len(connection.in_flight)).retiring = True
            self._schedule()
        return False

    async def _open(self, route):
        started = self._loop.time()
        error = connection = None
        try:
            connection = await asyncio.wait_for(self._connect(self._loop, self, self.origin, route, self._pool.timeout),
                                                self._pool.timeout)
            if not connection.is_open:
                error = RefusedError("%s: closed the connection at once" % self.origin.host)
        except asyncio.TimeoutError:
            error = ConnectError("cannot connect to %s: not done within %s seconds" % (self.origin.host, self._pool.timeout))
        except ConnectionCacheError as e:
            error = e
        except Exception as e:
            error = ConnectError("cannot connect to %s: %r" % (self.origin.host, e))
        finally:
            del self._connecting[asyncio.current_task()]
        if error:
            self._not_connected(route, error, started)
        elif self._stopped:
            # Before Python 3.12 wait_for() ignores a cancellation if the connection is ready already
            connection.close()
        else:
            self._login = self._loop.time() - started
            self._latency = self._latency or self._login / LOGIN
            self.statistics.connections += 1
            self.health.connected(route)
            self._connections.append(connection)
            connection.set_idle(IDLE if self._serial else UNUSED)
        self._schedule()

    def _not_connected(self, route, error, started):
        queue = self._queues.get(route) or RequestQueue()
        if isinstance(error, ConnectError) and not error.retryable:
            if self._of_route(route) or route in self._connecting.values():
                # There can be fewer of them than we want
                self.health.at_limit(self.size)
            else:
                self._fail(queue, self.health.route_failed(self.origin.host, route, error, self._loop.time()))
        elif self.health.is_new(started):
            # Connections fail together: that is one failure, of the request that has waited longest
            self._failed(queue.pop() if queue else None, error, started)

    # Answers

    def answered(self, connection, answers):
        """Of Connection"""
        trial = self._trials.get(connection)
        if trial:
            if not trial.add(answers):
                return
            answers = self._finish_trial(connection, trial)
        good = []
        for request, response, error in answers:
            if not error:
                response, error = connection.judge(request, response)
            if isinstance(error, RefusedError):
                self._failed(request, error, request.sent)
            else:
                good.append((request, response, error))
        if good:
            self.health.answered(len(good))
            if good[-1][0].fd is None:
                self._latency = self._loop.time() - good[-1][0].sent
        if connection.is_open and not connection.in_flight:
            if not answers or not self._try_pipelining(connection, answers[-1]):
                connection.set_idle(IDLE)
        self._schedule()
        for request, response, error in good:
            self._conclude(request, response, error)

    def _conclude(self, request, response, error):
        if isinstance(error, Changed):
            request.attempts = 0
            self._pool.resubmit(request)
        elif error:
            self._failed(request, error, request.sent)
        else:
            if request.fd is not None and response.status == 200:
                self.statistics.files += 1
                self.statistics.bytes += response.length or 0
            self._pool.finish(request, response, None)

    def _try_pipelining(self, connection, answer):
        queue = self._queues.get(connection.route)
        if not queue or self._trials or connection.retiring or self._loop.time() < self.health.paused_until:
            return False
        trial = self._pipelining.trial(connection, answer, queue, self.health.depth)
        if not trial:
            return False
        self._trials[connection] = trial
        connection.set_timeout(min(TRIAL_TIMEOUT, self._pool.timeout))
        self._send(connection, trial.sent)
        return True

    def _finish_trial(self, connection, trial):
        """Returns the answers that can be used"""
        del self._trials[connection]
        outcome, answers = trial.judge()
        self._pipelining.finish(outcome)
        if not answers:
            self._put_back(trial.requests)
        if outcome == "fails":
            connection.close()
        else:
            connection.set_timeout(self._pool.timeout)
        return answers

    def ended(self, connection, error):
        """Of Connection. Requests without an answer are sent again; the first of them may be the reason."""
        if connection not in self._connections:
            # It is not open yet, or the host has stopped
            return
        self._connections.remove(connection)
        self._schedule()
        unanswered = list(connection.in_flight)
        trial = self._trials.pop(connection, None)
        if error is None:
            self._pipelining.closed(connection)
        if trial:
            self._pipelining.finish(trial.ended(error))
            self._put_back(trial.requests)
            return
        if isinstance(error, Disagreement) or len(unanswered) > 1 and isinstance(error, (ProtocolError, TimedOutError)) and \
                not isinstance(error, IdleClosed):
            self._pipelining.broken(connection, error)
        if error is None or isinstance(error, Disconnected) and connection.served:
            # A server may close a connection at any time (RFC 9112 9.5)
            self._put_back(unanswered)
            return
        if isinstance(error, Disconnected):
            # How servers with a limit of connections refuse if they do not get as far as 503
            error = RefusedError(str(error))
        if unanswered:
            self._put_back(unanswered[1:])
            self._failed(unanswered[0], error, unanswered[0].sent)

    def _failed(self, request, error, started):
        """An attempt has failed. The request, if there is one, is retried or fails."""
        lone = False
        if isinstance(error, RefusedError):
            self.statistics.refusals += 1
            lone = request is not None and self.health.is_lone(request)
        if isinstance(error, (RefusedError, ConnectError, TimedOutError)) and not lone:
            suspended = self.health.failed(self.origin.host, error, started, self._loop.time())
            if suspended:
                error = suspended
                for queue in self._queues.values():
                    self._fail(queue, error)
        if request is None:
            return
        request.answers = self.health.answers
        request.attempts += 1
        attempts = TIMEOUT_ATTEMPTS if isinstance(error, TimedOutError) else ATTEMPTS
        if request.cancelled:
            self._pool.finish(request, None, Cancelled("the answer is not needed any more"))
        elif not error.retryable or request.attempts >= attempts or self.health.suspended(request.route, self._loop.time()):
            self._pool.finish(request, None, error)
        else:
            self.statistics.retries += 1
            if lone:
                # Behind those that are answered
                self.submit([request])
            else:
                self._put_back([request])
