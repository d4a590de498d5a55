#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
The connections to one host of the pool, and what waits for them.

A host has one queue and at most as many threads as connections are allowed; a
thread owns one connection, and takes from the queue what it has room for.

A host that refuses (408, 429, 503, closed without an answer) is asked after a pause,
over half the connections and with half the depth; one more, and twice the
depth, after each RISE_AFTER answers. What it refuses again while it answers many
others is asked behind these. A host that does nothing else, cannot be
reached or stays silent is left alone for BREAKER_PAUSE seconds: requests fail
at once until then, and the next one after that is the probe. Where trying again
would not help, as with a certificate that is not trusted, that is so for requests
of the same route only; if others of its connections work it just gets no more.

The state is guarded by the condition; nothing blocks while it is held. Only
pool.py uses Host.

    host = Host(pool, origin)
    host.submit([request])
    ...
    host.stop()
    host.join(deadline)
"""

import collections
import itertools
import random
import threading
import time

from bb.connections import (Cancelled, ConnectError, ConnectionCacheError, Disconnected, ProtocolError, RefusedError,
                            StatusError, TimedOutError)
from bb.connections.http import IdleClosed
from bb.connections.pipelining import TEST_REQUESTS, Pipelining
from bb.connections.request import HEAD_REFUSED, MAX_REDIRECTS, REDIRECTS, of_whole_file, redact, retry_after

# How often a request is tried, and how often if nothing was heard for a long time
ATTEMPTS = 4
TIMEOUT_ATTEMPTS = 2
# How many others a host answers between two refusals of one for that to be about the one
LONE = 32
# Seconds: the first pause and the longest, also of what a Retry-After may ask
PAUSE = 0.5
MAX_PAUSE = 60
# Failures in a row before a host is left alone, if it at least refuses, for how many seconds it must have failed, as one
# does that is being restarted, and for how many seconds it is left alone
BREAKER_FAILURES = 4
BREAKER_REFUSALS = 8
BREAKER_AFTER = 10
BREAKER_PAUSE = 30
# Seconds until a connection that is not used is closed; those which never were are what servers have less patience with
IDLE = 60
UNUSED = 5
# Round trips, about, that a login takes: what is known of these before the first answer
LOGIN = 12
RISE_AFTER = 32
# Bytes that a body of unknown size counts, which is a siginfo mostly
UNKNOWN_BODY = 64 * 1024
# Bytes of bodies that are awaited on one connection if there is more than one of them, and
# of requests: what does not fit into the system's buffers might make both sides wait for the other
MAX_BODIES = 1024 * 1024
MAX_REQUESTS = 32 * 1024


class Statistics:
    """Counters of a host in a build, or of all hosts together"""
    FIELDS = ("requests", "connections", "retries", "refusals", "files", "bytes")

    def __init__(self):
        self._lock = threading.Lock()
        for field in self.FIELDS:
            setattr(self, field, 0)

    def count(self, **fields):
        with self._lock:
            for field, n in fields.items():
                setattr(self, field, getattr(self, field) + n)


class Host:
    """The queue and the connections of one origin"""

    def __init__(self, pool, origin):
        self.pool = pool
        self.origin = origin
        self.connections = set()
        self.statistics = Statistics()
        # Why the host was left alone in this build, for whoever reports it
        self.trouble = None
        self._class = pool.classes[origin.scheme]
        self._cond = threading.Condition()
        # For those who wait until another one has connected
        self._turn = threading.Condition(self._cond)
        self._queue = collections.deque()
        self._threads = set()
        # Of the threads, each of which may have a connection: those which wait for a request or are about to look for
        # one, and how many connect
        self._idle = set()
        self._connecting = 0
        # How many connections it may have now, and at most
        self._limit = self._most = pool.limit
        self._depth = pool.depth
        self._pipelining = Pipelining(self._class.trial and pool.depth > 1)
        self._answers = 0
        # Seconds that the last login took, and that the last STAT was under way, which waits for those before it
        self._login = self._latency = 0
        # Refusals, time-outs and failures to connect in a row, the time of the first and of the last, and until when
        # nothing is asked
        self._failures = 0
        self._failing_since = self._failed_at = 0
        self._pause_until = 0
        # What all hear until then if the breaker is open
        self._broken = None
        # {route that could not be used, and was not since: (until when, what its requests hear until then)}
        self._barred = {}
        self._stopped = False

    def well(self, route):
        """Whether the last that was heard, by that route, is an answer, or nothing was"""
        with self._cond:
            return not self._failures and route not in self._barred

    def has_answered(self):
        """Whether it has given an answer, at any time"""
        with self._cond:
            return self._answers > 0

    def hurry(self, requests):
        """Move those of requests that are queued to the front"""
        with self._cond:
            waiting = [request for request in requests if request in self._queue]
            for request in waiting:
                self._queue.remove(request)
                request.first = True
            self._insert(waiting)

    def _insert(self, requests):
        """Called with the condition held. Queue requests behind those which come first before all others."""
        place = sum(1 for _ in itertools.takewhile(lambda request: request.first, self._queue))
        self._queue.rotate(-place)
        self._queue.extendleft(reversed(requests))
        self._queue.rotate(place)

    def submit(self, requests, again=False):
        """
        Queue requests, which are all first or none, and of one route. If they were queued before they come before all
        others again. If they cannot be they hear it at once.
        """
        if not requests:
            return
        thread = None
        with self._cond:
            if self._stopped:
                error = Cancelled("the build has ended")
            elif self._broken and time.monotonic() < self._pause_until:
                error = self._broken
            else:
                until, error = self._barred.get(requests[0].route, (0, None))
                error = error if time.monotonic() < until else None
            if not error:
                if again:
                    self._queue.extendleft(reversed(requests))
                elif requests[0].first:
                    self._insert(requests)
                else:
                    self._queue.extend(requests)
                thread = self._grow()
                self._cond.notify(len(requests))
                if not self._threads:
                    # Not the host's fault
                    error = ConnectionCacheError("%s: there are connections to too many hosts" % self.origin.host)
                    requests = list(self._queue)
                    self._queue.clear()
        if error:
            for request in requests:
                finish(request, None, error)
        self._start(thread)

    def _start(self, thread):
        """Start what _grow() has returned, with the condition not held"""
        if thread is None:
            return
        try:
            thread.start()
        except RuntimeError as e:
            # The system has no more. The others do the work, if there are any.
            self.pool.release()
            with self._cond:
                self._threads.discard(thread)
                self._idle.discard(thread)
                victims = [] if self._threads else list(self._queue)
                if victims:
                    self._queue.clear()
            for victim in victims:
                finish(victim, None, ConnectionCacheError(str(e)))

    def _grow(self):
        """Called with the condition held. Returns a thread to start, if one is of use and allowed."""
        waiting = len(self._idle) + self._connecting
        if (self._stopped or waiting >= len(self._queue) or len(self._threads) >= self._limit or
                not self._pays(waiting) or not self.pool.reserve()):
            return None
        thread = threading.Thread(target=self._run, name="connection to %s" % self.origin.host)
        self._threads.add(thread)
        self._idle.add(thread)
        return thread

    def _pays(self, others=0):
        """
        Called with the condition held, something being queued. Whether one more connection would be there before
        what is queued was answered by those there are, or by so many others. Logins are dear: each is one more that
        sshd may drop. This goes by how long STATs take on sessions that are not busy with files; of files nothing
        is known.
        """
        first, last = self._queue[0], self._queue[-1]
        if not self._class.serial or first.fd is not None or last.fd is not None:
            return True
        others = max(others, sum(one.reusable and one.route == first.route and not any(map(weight, list(one.in_flight)))
                                 for one in list(self.connections)))
        return not others or len(self._queue) * self._latency > others * self._depth * self._login

    def stop(self):
        with self._cond:
            self._stopped = True
            queue = list(self._queue)
            self._queue.clear()
            self._cond.notify_all()
            self._turn.notify_all()
        for connection in list(self.connections):
            connection.abort()
        for request in queue:
            finish(request, None, Cancelled("the build has ended"))

    def join(self, deadline):
        """Wait for the threads. Returns False if one is left."""
        with self._cond:
            threads = list(self._threads)
        for thread in threads:
            # One that submit() is about to start will see that we have stopped
            if thread.ident is not None:
                thread.join(max(deadline - time.monotonic(), 0))
        return not any(thread.is_alive() for thread in threads)

    # In the threads

    def _run(self):
        connection = None
        while True:
            route = self._wait(connection)
            if connection and connection.route != route:
                # Close before another thread may be started in our place
                self._drop(connection)
                connection = None
            if route is None:
                if self._leave():
                    return
                continue
            if connection is None:
                connection = self._open(route)
            if connection is not None:
                connection = self._serve(connection)

    def _wait(self, connection):
        """
        Wait for a request. Returns its route, None if the connection is not needed any more. If it
        has to be made first, it is counted as one that connects.
        """
        unused = connection and not connection.served and not self._class.serial
        idle_until = time.monotonic() + (UNUSED if unused else IDLE)
        self._be_idle()
        with self._cond:
            while not self._has_to_end():
                now = time.monotonic()
                condition, wait = self._cond, self._pause_until - now
                if not self._queue:
                    wait = idle_until - now if connection else 0
                    if wait <= 0:
                        break
                elif wait <= 0:
                    route = self._queue[0].route
                    found = connection and connection.route == route
                    if not found and not self._pays():
                        # The wake-up may have been meant for one that has a connection
                        self._cond.notify()
                        break
                    if found or not (self._class.serial and self._connecting):
                        self._connecting += not found
                        self._idle.discard(threading.current_thread())
                        return route
                    condition, wait = self._turn, IDLE
                condition.wait(wait)
            if connection:
                # To close it may take a while
                connection.reusable = False
                self._idle.discard(threading.current_thread())
        return None

    def _leave(self):
        """End the thread, unless there is work for it again. Returns True if it has to end."""
        with self._cond:
            if self._queue and self._pays() and not self._has_to_end():
                return False
            self.pool.release()
            self._threads.discard(threading.current_thread())
            self._idle.discard(threading.current_thread())
            # The wake-up of a request may have been ours
            self._cond.notify()
            return True

    def _open(self, route):
        """Connect. Returns the connection; if there is none, None, and it counts for the request that waits longest."""
        started = time.monotonic()
        connection = None
        error = None
        try:
            connection = self._connect(route)
        except ConnectionCacheError as e:
            error = e
        except Exception as e:
            error = internal(e)
        hopeless = isinstance(error, ConnectError) and not error.retryable
        thread = None
        victims = []
        with self._cond:
            self._connecting -= 1
            self._turn.notify_all()
            request = None
            if connection:
                self._barred.pop(route, None)
            if connection and self._class.serial:
                self._login = time.monotonic() - started
                self._latency = self._latency or self._login / LOGIN
                self._be_idle()
                thread = self._grow()
            if hopeless:
                victims = self._bar(route, error)
            # Connections fail together: that is one failure for who waits
            elif error and started >= self._failed_at and self._queue and self._queue[0].route == route:
                request = self._queue.popleft()
            if error:
                self._be_idle()
        self._start(thread)
        for victim in victims:
            finish(victim, None, self._left_alone(error))
        if error and not hopeless:
            self._failed(request, error, started)
        return connection

    def _bar(self, route, error):
        """
        Called with the condition held. It is how the host is reached that is wrong, or who asks. Returns those that
        hear it.
        """
        if self._connecting or any(one.reusable and one.route == route for one in list(self.connections)):
            # There can be less of them than we want
            self._most = max(1, len(self._threads) - 1)
            self._limit = min(self._limit, self._most)
            return []
        self.trouble = str(error)
        self._most = self.pool.limit
        self._barred[route] = time.monotonic() + BREAKER_PAUSE, self._left_alone(error)
        victims = [request for request in self._queue if request.route == route]
        self._queue = collections.deque(request for request in self._queue if request.route != route)
        return victims

    def _connect(self, route):
        connection = self._class(self.origin, route, self.pool.timeout)
        self.connections.add(connection)
        with self._cond:
            stopped = self._stopped
            self._pipelining.connecting(connection)
        try:
            if stopped:
                raise Cancelled("the build has ended")
            connection.connect()
        except BaseException:
            self._drop(connection)
            raise
        self.statistics.count(connections=1)
        return connection

    def _drop(self, connection):
        if connection is not None:
            connection.close()
            self.connections.discard(connection)

    def _serve(self, connection):
        """Ask what waits, until nothing does. Returns the connection if it can be used further, else None."""
        try:
            while True:
                self._refill(connection)
                if not connection.in_flight:
                    return connection
                answers = judged(connection.receive())
                try:
                    if self._may_go_on(connection, answers):
                        # Who waits for the answers can do so while the host has work again
                        self._refill(connection)
                finally:
                    self._answered(answers)
                if connection.error:
                    raise connection.error
                if not connection.reusable:
                    self._closed(connection)
                    return None
                if self._pipelining.untested and not self._test(connection, answers[-1]):
                    return None
        except ConnectionCacheError as e:
            self._lost(connection, e)
        except Exception as e:
            # A fault of ours must not leave a task waiting
            victims = list(connection.in_flight)
            self._drop(connection)
            for request in victims:
                finish(request, None, internal(e))
        return None

    def _refill(self, connection):
        requests = self._take(connection)
        if requests:
            self._send(connection, requests)

    def _may_go_on(self, connection, answers):
        """Whether answers say nothing that has to be thought about before more is sent"""
        return (connection.reusable and not connection.error and not self._pipelining.untested and
                not any(error for _, _, error in answers))

    def _take(self, connection):
        """The requests to send next on connection: those which wait longest, no more than fit"""
        thread = None
        with self._cond:
            self._idle.discard(threading.current_thread())
            taken, cancelled = self._fitting(connection)
            if not taken and connection.in_flight:
                # What was queued may have counted on this thread
                thread = self._grow()
        self._start(thread)
        for request in cancelled:
            finish(request, None, Cancelled("nobody waits for it"))
        return taken

    def _fitting(self, connection):
        """Called with the condition held. Returns those requests, and the cancelled ones before them, taken out of the queue."""
        taken, cancelled = [], []
        if self._paused():
            return taken, cancelled
        room = min(self._pipelining.room(connection, self._depth), self._share(connection))
        flying = connection.in_flight
        count = len(flying)
        bodies = sum(map(weight, flying))
        size = sum(map(length, flying))
        while room > 0 and self._queue and self._queue[0].route == connection.route:
            request = self._queue[0]
            if request.cancelled:
                cancelled.append(self._queue.popleft())
                continue
            bodies += weight(request)
            size += length(request)
            if count and (bodies > MAX_BODIES and request.fd is not None or size > MAX_REQUESTS):
                break
            taken.append(self._queue.popleft())
            count += 1
            room -= 1
        return taken, cancelled

    def _paused(self):
        """Called with the condition held. Whether nothing is to be asked now, or not by this thread."""
        return self._has_to_end() or time.monotonic() < self._pause_until

    def _has_to_end(self):
        """Called with the condition held. Whether nothing is to be asked any more, or there are more threads than allowed."""
        return self._stopped or len(self._threads) > self._limit

    def _share(self, connection):
        """
        Called with the condition held. How many more requests connection may have, the others being to get theirs:
        its part of what waits, or what it lacks of its part of all, lest the last are divided again and again.
        """
        connections = list(self.connections)
        sharing = len(self._threads)
        if self._class.serial:
            # One that logs in is not there for many round trips
            sharing = max(sum(one.reusable for one in connections), 1)
        queued = len(self._queue)
        flying = sum(len(one.in_flight) for one in connections)
        return max(-(-queued // sharing), -(-(queued + flying) // sharing) - len(connection.in_flight))

    def _send(self, connection, requests):
        now = time.monotonic()
        for request in requests:
            request.sent = now
        self.statistics.count(requests=len(requests))
        connection.send(requests)

    def _be_idle(self):
        """
        Count this thread as one that waits until it has looked for requests: what is queued before, because of
        an answer or its absence, needs no further connection.
        """
        with self._cond:
            self._idle.add(threading.current_thread())

    def _answered(self, answers):
        """Pass on answers, which were judged"""
        good = sum(not error for _, _, error in answers)
        thread = None
        if good:
            last = answers[-1][0]
            with self._cond:
                if last.fd is None:
                    self._latency = time.monotonic() - last.sent
                thread = self._succeeded(good)
        self._start(thread)
        self._be_idle()
        for request, response, error in answers:
            try:
                if error:
                    self._failed(request, error, request.sent)
                else:
                    self._answer(request, response)
            except Exception as e:
                # A fault of ours must not leave a task waiting
                finish(request, None, internal(e))

    def _succeeded(self, count):
        """Called with the condition held. Returns a thread to start: what waits may be all there is."""
        self._failures = 0
        self._broken = None
        before = self._answers
        self._answers += count
        if self._answers // RISE_AFTER > before // RISE_AFTER:
            self._limit = min(self._limit + 1, self._most)
            self._depth = min(self._depth * 2, self.pool.depth)
        return self._grow()

    def _test(self, connection, answer):
        """Find out whether requests can be pipelined, if the time has come. Returns False if the connection is gone."""
        known, response, error = answer
        requests = []
        with self._cond:
            if error or self._paused() or not self._pipelining.begin(connection, known, response, self._queue):
                return True
            # It takes a round trip, or many seconds
            self._idle.discard(threading.current_thread())
            while len(requests) < TEST_REQUESTS:
                requests.append(self._queue.popleft())
        self.statistics.count(requests=len(requests) + 1)
        outcome, answers = None, []
        try:
            outcome, answers = self._pipelining.test(connection, known, response, requests)
        finally:
            with self._cond:
                self._pipelining.end(outcome)
            if not answers:
                self._be_idle()
                self.submit(requests, again=True)
        self._answered(judged(answers))
        if outcome in ("fails", "broke") or connection.in_flight:
            self._drop(connection)
            return False
        if not connection.reusable:
            self._closed(connection)
            return False
        return True

    # The end of a connection

    def _closed(self, connection):
        """The server has said that it ends the connection. What it has not answered is asked again."""
        with self._cond:
            self._pipelining.closed(connection)
        unanswered = list(connection.in_flight)
        self._drop(connection)
        self._be_idle()
        self.submit(unanswered, again=True)

    def _lost(self, connection, error):
        """The connection is broken. What was not answered is asked again; the first of it may be the reason."""
        unanswered = list(connection.in_flight)
        served = connection.served
        self._drop(connection)
        self._be_idle()
        with self._cond:
            if len(unanswered) > 1 and isinstance(error, (ProtocolError, TimedOutError)) and not isinstance(error, IdleClosed):
                self._pipelining.broken(served, error)
        if isinstance(error, Disconnected):
            if served:
                # A server may end a connection at any time (RFC 9112 9.5), that is no failure
                self.submit(unanswered, again=True)
                return
            # How those with a limit of connections refuse which do not get as far as 503
            error = RefusedError(str(error))
        if unanswered:
            self.submit(unanswered[1:], again=True)
            self._failed(unanswered[0], error, unanswered[0].sent)

    def _failed(self, request, error, started):
        """Pause or break the host as error demands; try request, if there is one, again or end it."""
        victims = []
        lone = False
        with self._cond:
            refused = isinstance(error, RefusedError)
            self.statistics.count(refusals=refused)
            if request is not None and refused:
                request.refusals += 1
                others = self._answers - request.answers
                # Says nothing of the host: like a file that a server cannot read
                lone = request.refusals > 1 and others >= LONE
                if others and not lone:
                    # As long as the host answers others it will be this one's turn
                    request.attempts = 0
            if self._stopped:
                error = Cancelled("the build has ended")
            elif isinstance(error, (RefusedError, ConnectError, TimedOutError)) and not lone:
                self._pause(error, started)
                if self._broken:
                    error = self._broken
                    victims = list(self._queue)
                    self._queue.clear()
            if request is not None:
                request.answers = self._answers
                request.attempts += 1
                if request.cancelled:
                    error = Cancelled("nobody waits for it")
        attempts = TIMEOUT_ATTEMPTS if isinstance(error, TimedOutError) else ATTEMPTS
        if request is None:
            pass
        elif error.retryable and request.attempts < attempts and not request.cancelled:
            self.statistics.count(retries=1)
            # Not before those which are answered
            self.submit([request], again=not lone)
        else:
            victims.append(request)
        for victim in victims:
            finish(victim, None, error)

    def _pause(self, error, started):
        """Called with the condition held"""
        now = time.monotonic()
        if not self._failures:
            self._failing_since = now
        # Connections fail together: what was under way at the last failure is part of it
        if started >= self._failed_at:
            self._failed_at = now
            self._failures += 1
            self._limit = max(1, self._limit // 2)
            self._depth = max(1, self._depth // 2)
        pause = min(PAUSE * 2 ** min(self._failures - 1, 10), MAX_PAUSE) * random.uniform(0.5, 1)
        failures = BREAKER_FAILURES
        if isinstance(error, RefusedError):
            failures = BREAKER_REFUSALS
            pause = max(pause, min(error.retry_after or 0, MAX_PAUSE))
        if self._failures >= failures and now - self._failing_since >= BREAKER_AFTER:
            self.trouble = str(error)
            self._broken = self._left_alone(error)
            self._limit = 1
            pause = BREAKER_PAUSE
        self._pause_until = max(self._pause_until, now + pause)
        # Who waits waits longer, or leaves because of the new limit
        self._cond.notify_all()
        self._turn.notify_all()

    def _left_alone(self, error):
        """The error that who comes later hears because of error"""
        text = "%s is left alone for %s seconds: %s" % (self.origin.host, BREAKER_PAUSE, error)
        return RefusedError(text) if isinstance(error, RefusedError) else ConnectError(text, retryable=False)

    def _answer(self, request, response):
        location = response.headers.get("location")
        if response.status in REDIRECTS and location:
            try:
                if request.redirects >= MAX_REDIRECTS:
                    raise ValueError("more than %s redirects" % MAX_REDIRECTS)
                request.redirect(location)
            except ValueError as e:
                finish(request, None, StatusError("%s: %s" % (redact(request.url), e), response.status))
                return
            request.attempts = 0
            self.pool.submit(request)
            return
        if request.method == "HEAD" and response.status in HEAD_REFUSED and self._class.trial:
            # Some say that of HEAD only, as fetch2/wget.py knows
            request.method = "GET"
            self.submit([request], again=True)
            return
        if request.method == "GET" and request.fd is None:
            response = of_whole_file(response)
        elif request.method == "GET" and response.status == 200:
            self.statistics.count(files=1, bytes=response.length or 0)
        finish(request, response, None)


def judged(answers):
    """answers, with the error that a response means"""
    return [(request, response, error or refusal(request, response)) for request, response, error in answers]

def refusal(request, response):
    """The error that response to request means, if it does"""
    if response.status in (408, 429, 503):
        return RefusedError("%s: status %s" % (redact(request.url), response.status), retry_after(response.headers))
    return None

def length(request):
    """About how many bytes request itself has"""
    return 300 + len(request.target) + len(request.authorization or "")

def weight(request):
    """Bytes of body that request leads to"""
    if request.fd is None:
        return 0
    return UNKNOWN_BODY if request.size is None else request.size

def internal(error):
    return ConnectionCacheError("internal error: %r" % error)

def finish(request, response, error):
    """Tell whoever waits for request"""
    try:
        request.done(request, response, error)
    except Exception:
        # Whoever waits has a deadline
        pass
