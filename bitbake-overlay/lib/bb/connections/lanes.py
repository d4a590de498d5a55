#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
The connections of one host: opens them as needed, sends on them, and closes
unused ones.

Used by host.py, in the thread of the event loop. health.py decides how many
connections there may be, and pipelining.py what may be in flight on each.
Requests of different routes need connections of their own; if there is no place
for one, another one has to give way.

    lanes = Lanes(pool, host, connect, HTTPConnection)
    lanes.open(route, queue)    # host.connected() or host.not_connected() are called
    for connection in lanes.by_load():
        lanes.fill(connection, queue)
    lanes.close()
"""

import asyncio

from bb.connections import Cancelled, ConnectError, ConnectionCacheError, RefusedError, TimedOutError
from bb.connections.health import UNWILLING
from bb.connections.pipelining import Load

# Seconds without a byte of an answer until requests are moved to another connection, and until the same is done if
# the connection has never been served while others have; at least so many times the usual seconds of an answer
SLOW = 5
UNSERVED = 2
SLOWER = 4
# Seconds until an unused connection is closed, and one that was never used: servers close those sooner
IDLE = 60
UNUSED = 5
# Seconds until an attempt to connect is given up, and one that includes a login
CONNECT_TIMEOUT = 15
LOGIN_TIMEOUT = 20
# Round trips of a login, to estimate a round trip from it
LOGIN = 12


class Lanes:
    """
    connect(loop, host, origin, route, timeout) is the coroutine that opens a
    connection of the class kind.

    connections     those that are open
    arrived         bytes received on connections that are closed
    latency         seconds that the last HEAD took, or an estimate
    """

    def __init__(self, pool, host, connect, kind):
        self.connections = []
        self.arrived = 0
        self.latency = 0
        self._pool = pool
        self._loop = pool.loop
        self._host = host
        self._connect = connect
        self._kind = kind
        # {task: route} for connections that are being opened
        self._connecting = {}
        # Seconds that the last login took
        self._login = 0

    @property
    def size(self):
        """Number of connections, including those that are being opened"""
        return len(self.connections) + len(self._connecting)

    def of_route(self, route):
        return [connection for connection in self.connections if connection.route == route]

    def opening(self, route):
        return list(self._connecting.values()).count(route)

    def close(self):
        for task in self._connecting:
            task.cancel()
        connections, self.connections = self.connections, []
        for connection in connections:
            connection.close()

    def close_excess(self):
        """Close connections that are retiring or exceed the limit, as soon as they are idle"""
        excess = self.size - self._host.health.limit
        for connection in sorted(self.connections, key=lambda one: (not one.retiring, len(one.in_flight))):
            if connection.retiring or excess > 0:
                excess -= 1
                connection.retiring = True
                if not connection.in_flight:
                    connection.close()

    # Sending

    def by_load(self):
        """The connections, first those on which something that is sent now is answered soonest"""
        return sorted(self.connections, key=lambda connection: len(connection.in_flight))

    def fill(self, connection, queue):
        """Send from queue what fits on connection"""
        host = self._host
        room = host.pipelining.room(connection, host.health.depth)
        if len(connection.in_flight) > room and len(queue) > room:
            # A server answers many requests at once if they arrive at once, and so few system calls are needed
            return
        room = min(room, self._share(connection, queue))
        allowance = host.health.pace.allowance(self._loop.time())
        if allowance is not None:
            room = min(room, allowance)
        load = Load(connection.in_flight, self._kind.tried)
        taken = []
        slow = self._slow_ones() >= max(1, host.health.limit - 1)
        while room > 0 and queue and host.admits(queue.head):
            request = queue.head
            if not request.cancelled:
                if request.alone and slow or not load.admits(request, lambda: self._has_spare(connection)):
                    break
            queue.pop()
            if request.cancelled:
                self._pool.finish(request, None, Cancelled("the answer is not needed any more"))
                continue
            load.add(request)
            taken.append(request)
            room -= 1
        if taken:
            self.send(connection, taken)

    def _share(self, connection, queue):
        """
        How many more requests connection may have, so that the others get theirs: its part of the queue, or what it
        lacks of its part of all, so that the last ones are not divided again and again
        """
        # A login takes many round trips
        sharing = len(self.of_route(connection.route)) + (0 if self._kind.serial else self.opening(connection.route))
        in_flight = sum(len(one.in_flight) for one in self.of_route(connection.route))
        return max(-(-len(queue) // sharing), -(-(len(queue) + in_flight) // sharing) - len(connection.in_flight))

    def _has_spare(self, connection):
        """Whether another connection has no bodies in flight; None if there is no other connection"""
        others = [one for one in self.of_route(connection.route) if one is not connection]
        return any(all(request.fd is None for request in one.in_flight) for one in others) if others else None

    def _slow_ones(self):
        """How many connections are waiting for a request that was slow before"""
        return sum(bool(one.in_flight) and one.in_flight[0].alone for one in self.connections)

    def send(self, connection, requests):
        now = self._loop.time()
        for request in requests:
            request.sent = now
        if not connection.in_flight:
            connection.set_timeout(min(self._patience(connection, requests[0]), self._pool.timeout))
        self._host.health.pace.sent(len(requests), now)
        connection.send(requests)
        if connection.is_open:
            self._host.statistics.requests += len(requests)

    def _patience(self, connection, request):
        """Seconds without any data after which what is in flight on connection is to be sent on another one"""
        usual = SLOWER * self.latency
        if self._kind.serial:
            # Another session needs a login, and does not answer sooner
            return max(UNWILLING, usual)
        if not self._host.health.answers:
            return SLOW if self._host.health.is_healthy(request.route) else UNWILLING - SLOW
        if request.alone:
            return self._host.failures.patience
        served = connection.served or not any(one.served for one in self.connections)
        return max(SLOW if served else UNSERVED, usual)

    def served(self, connection):
        """connection has its first answers: shorten the time-out of those that have none yet"""
        for one in self.connections:
            if one.in_flight and not one.served and not one.in_answer and not self._kind.serial:
                one.set_timeout(self._patience(one, one.in_flight[0]))

    # Opening and closing

    def open(self, route, queue):
        """Open further connections for what is in queue"""
        while queue and self._is_needed(route, queue) and self._has_place(route):
            self._connecting[self._loop.create_task(self._open(route))] = route

    def _is_needed(self, route, queue):
        """Whether a further connection would be of use before the queue is answered by those there are"""
        if self.opening(route) >= len(queue) or self._kind.serial and self._connecting:
            return False
        if not self._kind.serial or any(request.fd is not None for request in queue):
            return True
        # A login takes long, and sshd may refuse each. Of sessions that are busy with files nothing is known.
        sessions = sum(not any(request.fd is not None for request in connection.in_flight)
                       for connection in self.of_route(route))
        return not sessions or len(queue) * self.latency > sessions * self._host.health.depth * self._login

    def _has_place(self, route):
        """Whether there may be a further connection. If not, one by another route may have to give way."""
        # A connection that waits for a slow answer counts only if there can be no other
        health = self._host.health
        if self.size < health.limit or self.size - self._slow_ones() < health.limit and self.size < health.most:
            if not self._pool.has_room() and not self.size and not self._pool.make_room():
                self._host.fail(route, ConnectError("%s: there are connections to too many hosts" % self._host.origin.host, False))
            return self._pool.has_room()
        if not self.opening(route) and not self.of_route(route) and self.connections and \
                not any(connection.retiring for connection in self.connections):
            min(self.connections, key=lambda connection: len(connection.in_flight)).retiring = True
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
                error = RefusedError("%s: closed the connection at once" % origin.host)
        except asyncio.TimeoutError:
            error = TimedOutError("cannot connect to %s: not done within %s seconds" % (origin.host, timeout))
        except ConnectionCacheError as e:
            error = e
        except Exception as e:
            error = ConnectError("cannot connect to %s: %r" % (origin.host, e))
        finally:
            del self._connecting[asyncio.current_task()]
        if error:
            self._host.not_connected(route, error, started)
        elif self._pool.stopped:
            # Before Python 3.12 wait_for() ignores a cancellation if the connection is ready already
            connection.close()
        else:
            self._login = self._loop.time() - started
            self.latency = self.latency or self._login / LOGIN
            self.connections.append(connection)
            connection.set_idle(IDLE if self._kind.serial else UNUSED)
            self._host.connected(route)
