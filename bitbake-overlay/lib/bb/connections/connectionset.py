#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
The connections of one host: opens, fills and closes them.

Used by host.py in the event loop's thread. health.py limits the number of
connections, and pipelining.py what may be in flight on each. Requests of
different routes (proxy, certificates, ssh) need different connections; if the
limit is reached, a connection of another route is closed for a new one. Does
not decide what happens to requests that fail (failures.py).

    connections = ConnectionSet(pool, host, connect, HTTPConnection)
    connections.open(route, queue)    # host.connected() or host.not_connected() are called
    for connection in connections.established:
        connections.fill(connection, queue)
    connections.close()
"""

import asyncio

from bb.connections import Cancelled, ConnectError, ConnectionCacheError, RefusedError, TimedOutError
from bb.connections.health import UNWILLING
from bb.connections.pipelining import Load

# Seconds without a byte of an answer after which requests are moved to another connection; healthy servers are faster
SLOW = 5
# The same in seconds for a connection without any answer while others have some: the server may have no worker for it
UNSERVED = 2
# Both time-outs are at least this many times the usual time of an answer, so that a distant host is not slow
SLOW_FACTOR = 4
# Seconds after which an idle connection is closed; nginx closes it after 75
IDLE = 60
# The same in seconds for a connection that was never used: servers close those sooner
UNUSED = 5
# Seconds for an attempt to connect: as long as a host may be silent before it is suspended (health.UNWILLING)
CONNECT_TIMEOUT = 15
# Seconds for an attempt that includes a login: the ConnectTimeout of ssh
LOGIN_TIMEOUT = 20
# Round trips that a login takes, to estimate the duration of one
LOGIN_ROUND_TRIPS = 12


class ConnectionSet:
    """
    connect(loop, host, origin, route, timeout) is a coroutine that returns an
    open connection, an instance of the class kind.

    established     list of open connections
    arrived         number of bytes received on connections that are closed now
    latency         seconds that the last HEAD took, or an estimate
    """

    def __init__(self, pool, host, connect, kind):
        self.established = []
        self.arrived = 0
        self.latency = 0
        self._pool = pool
        self._loop = pool.loop
        self._host = host
        self._connect = connect
        self._kind = kind
        # {task: route} for connections that are being opened
        self._connecting = {}
        # Seconds that opening the last connection took
        self._login = 0

    @property
    def size(self):
        """Number of connections, including those being opened"""
        return len(self.established) + len(self._connecting)

    def of_route(self, route):
        return [connection for connection in self.established if connection.route == route]

    def opening(self, route):
        return list(self._connecting.values()).count(route)

    def close(self):
        for task in self._connecting:
            task.cancel()
        connections, self.established = self.established, []
        for connection in connections:
            connection.close()

    def close_excess(self):
        """Close connections that are retiring or exceed the limit, as soon as they are idle"""
        excess = self.size - self._host.health.limit
        for connection in sorted(self.established, key=lambda one: (not one.retiring, len(one.in_flight))):
            if connection.retiring or excess > 0:
                excess -= 1
                connection.retiring = True
                if not connection.in_flight:
                    connection.close()

    def fill(self, connection, queue):
        """Send as many requests from queue on connection as it may have in flight"""
        host = self._host
        room = host.pipelining.room(connection)
        if len(connection.in_flight) > room and len(queue) > room:
            # Wait until half is answered: sending many requests at once needs fewer system calls, also in the server
            return
        room = min(room, self._share(connection, queue))
        allowance = host.health.rate_limit.allowance(self._loop.time())
        if allowance is not None:
            room = min(room, allowance)
        load = Load(connection.in_flight, self._kind.needs_trial)
        taken = []
        slow = self._slow_count() >= max(1, host.health.limit - 1)
        while room > 0 and queue and host.admits(queue.head):
            request = queue.head
            if not request.cancelled:
                if request.exclusive and slow or not load.admits(request, lambda: self._has_spare(connection)):
                    break
            queue.pop()
            if request.cancelled:
                self._pool.finish(request, None, Cancelled())
                continue
            load.add(request)
            taken.append(request)
            room -= 1
        if taken:
            self.send(connection, taken)

    def _share(self, connection, queue):
        """
        Number of further requests for connection if all of its route get equal shares: of the queue, or of queued and
        in-flight requests if that is more, so that the last requests are not split into ever smaller batches.
        """
        # A session that is still logging in gets no share: a login takes many round trips
        sharing = len(self.of_route(connection.route)) + (0 if self._kind.serial else self.opening(connection.route))
        in_flight = sum(len(one.in_flight) for one in self.of_route(connection.route))
        return max(-(-len(queue) // sharing), -(-(len(queue) + in_flight) // sharing) - len(connection.in_flight))

    def _has_spare(self, connection):
        """Whether another connection has no bodies in flight, or None if there is no other connection"""
        others = [one for one in self.of_route(connection.route) if one is not connection]
        return any(all(request.fd is None for request in one.in_flight) for one in others) if others else None

    def _slow_count(self):
        """Number of connections that wait for the answer to a request which was slow before"""
        return sum(bool(one.in_flight) and one.in_flight[0].exclusive for one in self.established)

    def send(self, connection, requests):
        now = self._loop.time()
        for request in requests:
            request.sent = now
            request.connection = connection.ordinal
        if not connection.in_flight:
            connection.set_timeout(min(self._patience(connection, requests[0]), self._pool.timeout))
        self._host.health.rate_limit.sent(len(requests), now)
        connection.send(requests)
        if connection.is_open:
            self._host.statistics.requests += len(requests)

    def _patience(self, connection, request):
        """Seconds without data after which connection is closed and its requests are moved to another one"""
        usual = SLOW_FACTOR * self.latency
        if self._kind.serial:
            # Another session needs a login and would not be faster
            return max(UNWILLING, usual)
        if not self._host.health.answers:
            return SLOW if self._host.health.is_healthy(request.route) else UNWILLING - SLOW
        if request.exclusive:
            return self._host.failures.patience
        served = connection.served or not any(one.served for one in self.established)
        return max(SLOW if served else UNSERVED, usual)

    def served(self, connection):
        """connection has received its first answers: shorten the time-out of those without any"""
        for one in self.established:
            if one.in_flight and not one.served and not one.in_answer and not self._kind.serial:
                one.set_timeout(self._patience(one, one.in_flight[0]))

    def open(self, route, queue):
        """Start opening the connections that are needed for queue and permitted"""
        while queue and self._is_needed(route, queue) and self._may_open(route):
            self._connecting[self._loop.create_task(self._open(route))] = route

    def _is_needed(self, route, queue):
        """Whether a further connection would be open before the existing ones have answered the queue"""
        if self.opening(route) >= len(queue) or self._kind.serial and self._connecting:
            return False
        if not self._kind.serial or any(request.fd is not None for request in queue):
            return True
        # Logins are slow, and sshd may refuse them. How long sessions remain busy with files is not known.
        sessions = sum(not any(request.fd is not None for request in connection.in_flight)
                       for connection in self.of_route(route))
        return not sessions or len(queue) * self.latency > sessions * self._host.pipelining.depth * self._login

    def _may_open(self, route):
        """Whether the limits permit a further connection. If not, one of another route may be retired for it."""
        # A connection that waits for a slow answer does not count, up to the absolute limit
        health = self._host.health
        if self.size < health.limit or self.size - self._slow_count() < health.limit and self.size < health.most:
            if self.size or self._pool.has_room():
                return self._pool.has_room()
            # Each host may have one
            if self._pool.make_room():
                return True
            error = ConnectError("%s: connections to too many hosts are open" % self._host.origin.host, False)
            self._host.fail(route, error)
            return False
        if not self.opening(route) and not self.of_route(route) and self.established and \
                not any(connection.retiring for connection in self.established):
            min(self.established, key=lambda connection: len(connection.in_flight)).retiring = True
            self.close_excess()
        return False

    async def _open(self, route):
        origin, started = self._host.origin, self._loop.time()
        timeout = min(self._pool.timeout, LOGIN_TIMEOUT if self._kind.serial else CONNECT_TIMEOUT)
        error = connection = None
        try:
            connection = await asyncio.wait_for(
                self._connect(self._loop, self._host, origin, route, self._pool.timeout), timeout)
            if not connection.is_open:
                error = RefusedError("%s: the server closed the new connection" % origin.host)
        except asyncio.TimeoutError:
            error = TimedOutError("cannot connect to %s: no connection within %s seconds" % (origin.host, timeout))
        except ConnectionCacheError as e:
            error = e
        except Exception as e:
            error = ConnectError("cannot connect to %s: %r" % (origin.host, e))
        finally:
            del self._connecting[asyncio.current_task()]
        if error:
            self._host.not_connected(route, error, started)
        elif self._pool.stopped:
            # Before Python 3.12 wait_for() ignores a cancellation if its coroutine has completed
            connection.close()
        else:
            self._login = self._loop.time() - started
            self.latency = self.latency or self._login / LOGIN_ROUND_TRIPS
            self.established.append(connection)
            connection.ordinal = self._host.statistics.connections + 1
            connection.set_idle(IDLE if self._kind.serial else UNUSED)
            self._host.connected(route)
