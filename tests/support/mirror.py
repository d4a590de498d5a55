# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""A mirror that is only pretended, and the pool of connections to it, in virtual time.

    mirror = Mirror()
    with Simulation(mirror) as simulation:
        asked = simulation.ask("HEAD", [URL])
        simulation.settle()
        assert asked[0].status() == 200 and mirror.urls == [URL]
"""

import asyncio

from bb.connections import ConnectionCacheError
from bb.connections.connection import Connection
from bb.connections.http import HTTPConnection
from bb.connections.pool import Pool
from bb.connections.request import Response
from support.asking import Asked
from support.virtualtime import VirtualLoop

# Virtual seconds within which all is answered, also by a host that has been suspended meanwhile
SECONDS = 3600

FOUND = Response(200, {}, 0)
REFUSED = Response(503, {}, 0)
# Instead of an answer: it never comes
NEVER = None


class Mirror:
    """
    answer(request) returns a function which is called with the connection, a Response, an error that ends the connection, (None, error of this request), or NEVER;
    connecting(route) raises an error if there is no connection. login and latency are seconds, of an answer to all that
    is in flight then; each are those that each connection needs for one answer after the other, size its bytes.

    made, open, peak    connections so far, now, and at most
    attempts            to connect, with those that have failed
    connections         those so far
    urls                that were asked for, in this order
    sends               how many requests were sent at once, each time
    log                 (time, url)
    """

    def __init__(self, serial=False, needs_trial=True):
        self.answer = lambda request: FOUND
        self.connecting = lambda route: None
        self.login = 0.001
        self.latency = 0.01
        self.each = self.size = 0
        self.made = self.open = self.peak = self.attempts = 0
        self.connections = []
        self.urls = []
        self.sends = []
        self.log = []
        self.kind = type("Pretended", (PretendedConnection,), {"serial": serial, "needs_trial": needs_trial, "mirror": self})

    async def connect(self, loop, owner, origin, route, timeout):
        self.attempts += 1
        await asyncio.sleep(self.login)
        self.connecting(route)
        connection = self.kind(loop, owner, origin, route, timeout)
        self.connections.append(connection)
        connection.connection_made(PretendedTransport(self))
        return connection


class PretendedTransport:
    def __init__(self, mirror):
        self.mirror = mirror
        self.is_open = True
        mirror.made += 1
        mirror.open += 1
        mirror.peak = max(mirror.peak, mirror.open)

    def abort(self):
        self.mirror.open -= self.is_open
        self.is_open = False


class PretendedConnection(Connection):
    """Answers what is in flight, in this order, with what its mirror says"""
    mirror = None
    version = (1, 1)
    classify = staticmethod(HTTPConnection.classify)

    def send(self, requests):
        super().send(requests)
        self.mirror.urls += [request.url for request in requests]
        self.mirror.log += [(self.loop.time(), request.url) for request in requests]
        self.mirror.sends.append(len(requests))
        self.loop.call_later(self.mirror.latency, self.updated)

    def parse(self):
        ready = 0
        while True:
            yield
            while self.in_flight:
                if self.mirror.each:
                    now = self.loop.time()
                    if now < ready:
                        break
                    if ready < self.in_flight[0].sent + self.mirror.latency:
                        ready = now + self.mirror.each
                    else:
                        ready += self.mirror.each
                    self.loop.call_at(ready, self.updated)
                    if now < self.in_flight[0].sent + self.mirror.latency + self.mirror.each:
                        break
                self.arrived += self.mirror.size
                answer = self.mirror.answer(self.in_flight[0])
                if callable(answer):
                    answer = answer(self)
                if answer is NEVER:
                    break
                if isinstance(answer, ConnectionCacheError):
                    raise answer
                if isinstance(answer, Response):
                    answer = answer, None
                self.answer(self.in_flight.popleft(), *answer)


class Simulation:
    """A Pool of connections to one or more mirrors: {scheme: Mirror}"""

    def __init__(self, mirror, limit=4, timeout=100, most=None, **mirrors):
        mirrors = dict({"http": mirror, "https": mirror}, **mirrors)
        self.loop = VirtualLoop()
        self.errors = []
        self.loop.set_exception_handler(lambda loop, context: self.errors.append(context))
        self.pool = Pool(self.loop, limit, most or limit, timeout, {scheme: (one.connect, one.kind) for scheme, one in mirrors.items()})
        self.asked = []
        self._answered = asyncio.Event()

    def submit(self, *asked):
        """All in one batch"""
        for one in asked:
            one.request.done = self._done(one.request.done or one.answer)
        self.asked += asked
        self.pool.submit([one.request for one in asked])

    def _done(self, done):
        def answered(*answer):
            done(*answer)
            self._answered.set()
        return answered

    def ask(self, method, urls, environment=None, **members):
        asked = [Asked(method, url, environment, **members) for url in urls]
        self.submit(*asked)
        return asked

    def answers(self, method, urls, environment=None, **members):
        """Ask, wait, and return (response, error) of each"""
        asked = self.ask(method, urls, environment, **members)
        self.settle()
        return [one.wait() for one in asked]

    def statuses(self, method, urls, environment=None, **members):
        return [response.status if response else error for response, error in self.answers(method, urls, environment, **members)]

    def settle(self):
        """Until all is answered"""
        async def wait():
            while not all(one.answered for one in self.asked):
                self._answered.clear()
                await self._answered.wait()
        self.loop.run_until_complete(asyncio.wait_for(wait(), SECONDS))

    def until(self, condition, what):
        """Until condition() is true, for what is not an answer; looked at every virtual millisecond"""
        async def wait():
            end = self.loop.time() + 100
            while not condition():
                assert self.loop.time() < end, "still not so: " + what
                await asyncio.sleep(0.001)
        self.loop.run_until_complete(wait())

    def advance(self, seconds):
        self.loop.run_until_complete(asyncio.sleep(seconds))

    def counters(self, url):
        """The Statistics of the host of url"""
        return self.pool.hosts[Asked("HEAD", url).request.origin].statistics

    def __enter__(self):
        return self

    def __exit__(self, kind, *exc):
        self.pool.stop()
        self.advance(0.1)
        self.loop.close()
        if kind is None:
            assert self.errors == []
            assert [len(one.calls) for one in self.asked] == [1] * len(self.asked), "each is answered once"
