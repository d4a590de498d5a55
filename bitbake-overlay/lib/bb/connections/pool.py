#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
All connections to the mirrors, by host.

Made by server.py for the time of a build's runqueue. Each host (scheme, name,
port, user) has one queue and at most as many threads as connections are
allowed; a thread owns one connection. So whatever the number of tasks, and
whether it is a query or a download, no host sees more connections than that.

A host that refuses (429, 503, closed without an answer) is asked after a pause,
over half the connections; one more after each RISE_AFTER answers. A host that
does nothing else, cannot be reached or stays silent is left alone for
BREAKER_PAUSE seconds: requests fail at once until then, and the next one after
that is the probe.

The state of a host is guarded by its condition; nothing blocks while it is held.

    pool = Pool(limit=4)
    pool.submit(request)        # request.done is called in a thread of the pool
    ...
    pool.stop()                 # all that wait hear a Cancelled
"""

import collections
import random
import threading
import time

from bb.connections import ConnectError, ConnectionCacheError, RefusedError, StatusError, TimedOutError
from bb.connections.http import Cancelled, Disconnected, HTTPConnection, retry_after
from bb.connections.request import MAX_REDIRECTS, REDIRECTS, redact

# How often a request is tried, and how often if nothing was heard for a long time
ATTEMPTS = 4
TIMEOUT_ATTEMPTS = 2
# Seconds: the first pause and the longest, also of what a Retry-After may ask
PAUSE = 0.5
MAX_PAUSE = 60
# Failures in a row before a host is left alone, if it at least refuses, and for how many seconds
BREAKER_FAILURES = 4
BREAKER_REFUSALS = 8
BREAKER_PAUSE = 30
# Seconds until a connection that is not used is closed
IDLE = 60
RISE_AFTER = 32


class Statistics:
    """Counters of a build, all hosts together"""
    FIELDS = ("requests", "connections", "retries", "refusals", "files", "bytes")

    def __init__(self):
        self._lock = threading.Lock()
        for field in self.FIELDS:
            setattr(self, field, 0)

    def count(self, **fields):
        with self._lock:
            for field, n in fields.items():
                setattr(self, field, getattr(self, field) + n)


class Pool:
    """
    limit is the number of connections per host. connection_class is called
    with origin, route and timeout (seconds).
    """
    def __init__(self, limit, timeout=100, connection_class=HTTPConnection):
        self.limit = limit
        self.timeout = timeout
        self.connection_class = connection_class
        self.statistics = Statistics()
        self._lock = threading.Lock()
        self._hosts = {}
        self._stopped = False

    def submit(self, request):
        """Queue request. Does not block, unless in request.done if the request fails at once."""
        with self._lock:
            stopped = self._stopped
            host = self._hosts.get(request.origin)
            if host is None and not stopped:
                host = self._hosts[request.origin] = Host(self, request.origin)
        if stopped:
            finish(request, None, Cancelled("the build has ended"))
        else:
            host.submit(request)

    def stop(self, timeout=10):
        """
        End all connections and threads; what waits or is under way is
        cancelled. Returns False if a thread is left after timeout seconds.
        """
        with self._lock:
            self._stopped = True
            hosts = list(self._hosts.values())
        for host in hosts:
            host.stop()
        deadline = time.monotonic() + timeout
        return all([host.join(deadline) for host in hosts])

    def troubles(self):
        """Name of the host and what was wrong, for each host that was left alone"""
        with self._lock:
            return [(host.origin.host, host.trouble) for host in self._hosts.values() if host.trouble]

    def connections(self):
        """The connections that exist now. Takes no lock, for use after a fork."""
        return [c for host in list(self._hosts.values()) for c in list(host.connections)]


class Host:
    """The queue and the connections of one origin"""

    def __init__(self, pool, origin):
        self.pool = pool
        self.origin = origin
        self.connections = set()
        # Why the host was left alone in this build, for whoever reports it
        self.trouble = None
        self._cond = threading.Condition()
        self._queue = collections.deque()
        self._threads = set()
        # Of the threads: those which may have a connection, and of these those which wait
        self._active = 0
        self._idle = 0
        self._limit = pool.limit
        self._answers = 0
        # Refusals, time-outs and failures to connect in a row, the time of the last, and until when nothing is asked
        self._failures = 0
        self._failed_at = 0
        self._pause_until = 0
        # What all hear until then if the breaker is open
        self._broken = None
        self._stopped = False

    def submit(self, request, first=False):
        error = None
        thread = None
        with self._cond:
            if self._stopped:
                error = Cancelled("the build has ended")
            elif self._broken and time.monotonic() < self._pause_until:
                error = self._broken
            else:
                if first:
                    self._queue.appendleft(request)
                else:
                    self._queue.append(request)
                thread = self._grow()
                if not thread:
                    self._cond.notify()
        if error:
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
            with self._cond:
                self._active -= 1
                self._threads.discard(thread)
                victims = [] if self._active else list(self._queue)
                if victims:
                    self._queue.clear()
            for victim in victims:
                finish(victim, None, ConnectionCacheError(str(e)))

    def _grow(self):
        """Called with the condition held. Returns a thread to start, if one is of use and allowed."""
        if self._stopped or self._idle >= len(self._queue) or self._active >= self._limit:
            return None
        self._active += 1
        thread = threading.Thread(target=self._run, name="connection to %s" % self.origin.host)
        self._threads.add(thread)
        return thread

    def stop(self):
        with self._cond:
            self._stopped = True
            queue = list(self._queue)
            self._queue.clear()
            self._cond.notify_all()
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
            request = self._take()
            if request is None:
                # Close before another thread may be started in our place
                self._drop(connection)
                connection = None
                if self._leave():
                    return
                continue
            if connection and connection.route != request.route:
                self._drop(connection)
                connection = None
            connection = self._attempt(connection, request)

    def _finish(self, call, *args):
        """
        call(*args) with this thread counted as one that waits, which it is about to: what
        is submitted meanwhile, because of the answer, needs no further connection.
        """
        with self._cond:
            self._idle += 1
        try:
            call(*args)
        finally:
            with self._cond:
                self._idle -= 1

    def _take(self):
        """Wait for a request. Returns None if the connection is not needed any more."""
        idle_until = time.monotonic() + IDLE
        with self._cond:
            while not self._stopped and self._active <= self._limit:
                now = time.monotonic()
                if self._queue and now >= self._pause_until:
                    return self._queue.popleft()
                if not self._queue and now >= idle_until:
                    return None
                self._idle += 1
                self._cond.wait((self._pause_until if self._queue else idle_until) - now)
                self._idle -= 1
        return None

    def _leave(self):
        """End the thread, unless there is work for it again. Returns True if it has to end."""
        with self._cond:
            if self._queue and not self._stopped and self._active <= self._limit:
                return False
            self._active -= 1
            self._threads.discard(threading.current_thread())
            # The wake-up of a request may have been ours
            self._cond.notify()
            return True

    def _attempt(self, connection, request):
        """Try request once. Returns the connection if it can be used further, else None."""
        if request.cancelled:
            finish(request, None, Cancelled("nobody waits for it"))
            return connection
        started = time.monotonic()
        try:
            connection, response = self._exchange(connection, request)
        except ConnectionCacheError as e:
            self._finish(self._failed, request, e, started)
            return None
        except Exception as e:
            # A fault of ours must not leave a task waiting
            finish(request, None, ConnectionCacheError("internal error: %r" % e))
            return None
        if not connection.reusable:
            self._drop(connection)
            connection = None
        if response.status in (429, 503):
            error = RefusedError("%s: status %s" % (redact(request.url), response.status), retry_after(response.headers))
            self._finish(self._failed, request, error, started)
        else:
            self._succeeded()
            self._finish(self._answer, request, response)
        return connection

    def _exchange(self, connection, request):
        """Returns the connection that was used, and the response. After an exception no connection is left."""
        try:
            if connection is not None:
                try:
                    self.pool.statistics.count(requests=1)
                    return connection, connection.exchange(request)
                except Disconnected:
                    # A server may end a connection at any time (RFC 9112 9.5), that is no failure
                    self._drop(connection)
            connection = self._connect(request.route)
            self.pool.statistics.count(requests=1)
            try:
                return connection, connection.exchange(request)
            except Disconnected as e:
                # How those with a limit of connections refuse which do not get as far as 503
                raise RefusedError(str(e)) from e
        except BaseException:
            self._drop(connection)
            raise

    def _connect(self, route):
        connection = self.pool.connection_class(self.origin, route, self.pool.timeout)
        self.connections.add(connection)
        with self._cond:
            stopped = self._stopped
        try:
            if stopped:
                raise Cancelled("the build has ended")
            connection.connect()
        except BaseException:
            self._drop(connection)
            raise
        self.pool.statistics.count(connections=1)
        return connection

    def _drop(self, connection):
        if connection is not None:
            connection.close()
            self.connections.discard(connection)

    def _succeeded(self):
        with self._cond:
            self._failures = 0
            self._broken = None
            self._answers += 1
            if self._answers % RISE_AFTER == 0 and self._limit < self.pool.limit:
                self._limit += 1
            # What waits may be all there is: nobody submits any more
            thread = self._grow()
        self._start(thread)

    def _failed(self, request, error, started):
        """Pause or break the host as error demands; try request again or end it."""
        victims = []
        request.attempts += 1
        with self._cond:
            if self._stopped:
                error = Cancelled("the build has ended")
            elif isinstance(error, (RefusedError, ConnectError, TimedOutError)):
                self._pause(error, started)
            if self._broken:
                error = self._broken
                victims = list(self._queue)
                self._queue.clear()
        attempts = TIMEOUT_ATTEMPTS if isinstance(error, TimedOutError) else ATTEMPTS
        if error.retryable and request.attempts < attempts and not request.cancelled:
            self.pool.statistics.count(retries=1)
            self.submit(request, first=True)
        else:
            victims.append(request)
        for victim in victims:
            finish(victim, None, error)

    def _pause(self, error, started):
        """Called with the condition held"""
        if isinstance(error, RefusedError):
            self.pool.statistics.count(refusals=1)
        # Connections fail together: what was under way at the last failure is part of it
        if started >= self._failed_at:
            self._failed_at = time.monotonic()
            self._failures += 1
            self._limit = max(1, self._limit // 2)
        pause = min(PAUSE * 2 ** min(self._failures - 1, 10), MAX_PAUSE) * random.uniform(0.5, 1)
        failures = BREAKER_FAILURES
        if isinstance(error, RefusedError):
            failures = BREAKER_REFUSALS
            pause = max(pause, min(error.retry_after or 0, MAX_PAUSE))
        if self._failures >= failures or not error.retryable:
            self.trouble = str(error)
            text = "%s is left alone for %s seconds: %s" % (self.origin.host, BREAKER_PAUSE, error)
            self._broken = RefusedError(text) if isinstance(error, RefusedError) else ConnectError(text, retryable=False)
            self._limit = 1
            pause = BREAKER_PAUSE
        self._pause_until = max(self._pause_until, time.monotonic() + pause)
        # Who waits waits longer, or leaves because of the new limit
        self._cond.notify_all()

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
        if request.method == "GET" and response.status == 200:
            self.pool.statistics.count(files=1, bytes=response.length or 0)
        finish(request, response, None)


def finish(request, response, error):
    """Tell whoever waits for request"""
    try:
        request.done(request, response, error)
    except Exception:
        # Whoever waits has a deadline
        pass
