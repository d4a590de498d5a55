# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""A server that answers right at first, and mixes answers up later: no file gets the bytes of another. In virtual time."""

import asyncio
import random

import pytest

from support.asking import Asked
from support.mirror import Simulation
from support.virtualserver import HTTPServer

URL = "https://mirror.example"

# Right answers of the server at first, and the part of all later ones that are not
GOOD = 200
FAULTS = 0.02
# Files that are fetched at the same time, as bitbake does
WINDOW = 64


class MixedUp:
    """
    The script of a server. fault is "swap" (with the next answer of the pipeline), "duplicate", "drop", "delay", or "any".
    validators: whether there is an ETag.
    """

    def __init__(self, fault, seed, sizes, validators=False):
        self.fault = fault
        self.sizes = sizes
        self.validators = validators
        self.faults = 0
        self.depth = 0
        self.rng = random.Random(seed)
        self._answered = 0

    def body(self, target):
        """Begins with the name, and is as long as some others"""
        size = self.sizes[sum(target.encode()) % len(self.sizes)]
        return (target.encode() + b" ").ljust(size, b".")

    def answer(self, request):
        if request.method == "OPTIONS":
            return b"HTTP/1.1 405 No\r\nAllow: GET, HEAD\r\nContent-Length: 0\r\n\r\n"
        if "/absent/" in request.target:
            return b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"
        body = self.body(request.target)
        etag = 'ETag: "%s"\r\n' % request.target if self.validators else ""
        head = ("HTTP/1.1 200 OK\r\n%sContent-Length: %d\r\n\r\n" % (etag, len(body))).encode()
        return head + (body if request.method == "GET" else b"")

    async def __call__(self, talk):
        while True:
            request = await talk.request()
            self._answered += 1
            if request.method == "GET":
                self.depth = max(self.depth, 1 + talk.behind)
            fault = None
            if self._answered > GOOD and self.rng.random() < FAULTS:
                fault = self.rng.choice(["swap", "duplicate", "drop", "delay"]) if self.fault == "any" else self.fault
                self.faults += 1
            if fault == "swap" and talk.behind:
                other = await talk.request()
                talk.send(self.answer(other) + self.answer(request))
            elif fault == "duplicate":
                talk.send(2 * self.answer(request))
            elif fault == "drop" and talk.behind:
                pass
            else:
                if fault == "delay":
                    await asyncio.sleep(self.rng.choice([0.05, 1, 7]))
                talk.send(self.answer(request))


def fetch(simulation, targets):
    """GET all of targets, WINDOW at a time. Yields (target, response, error, bytes)."""
    waiting = list(targets)
    under_way = set()
    outcomes = []

    def submit():
        while waiting and len(under_way) < WINDOW:
            one = Asked("GET", URL + waiting.pop(0))
            under_way.add(one)
            one.request.done = lambda request, response, error, one=one: done(one, response, error)
            simulation.pool.submit([one.request])

    def done(one, response, error):
        under_way.discard(one)
        outcomes.append((one.request.key[1][len(URL):], response, error, one.body()))
        one.file.close()
        simulation.loop.call_soon(submit)

    submit()
    while waiting or under_way:
        simulation.advance(0.5)
        assert simulation.loop.time() < 20000, "%s are not answered" % len(under_way)
    return outcomes


def run(script, objects, siginfos):
    """A query for 2000 objects and some more, then a fetch of all that were found, with their siginfos"""
    server = HTTPServer(script)
    with Simulation(server) as simulation:
        asked = simulation.ask("HEAD", [URL + target for target in objects])
        simulation.settle()
        found = [one.request.key[1][len(URL):] for one in asked if one.wait()[0] and one.wait()[0].status == 200]
        simulation.asked.clear()
        wanted = [target + suffix for target in found for suffix in (("", ".siginfo") if siginfos else ("",))]
        outcomes = fetch(simulation, wanted)
        host, = simulation.pool.hosts.values()
        assert host.health.suspension_reason is None
    assert len(outcomes) == len(wanted)
    return found, outcomes


def check(script, found, outcomes):
    wrong = [target for target, response, _, data in outcomes
             if response and response.status == 200 and data != script.body(target)]
    assert wrong == []
    assert script.faults > 3


def test_bodies_are_pipelined():
    """As long as nothing is wrong; otherwise these tests would show nothing."""
    script = MixedUp("none", 0, [100, 101, 102, 103, 500])
    script.rng.random = lambda: 1
    found, outcomes = run(script, ["/x/%s" % i for i in range(300)], siginfos=False)
    assert all(data == script.body(target) for target, _, _, data in outcomes) and len(found) == 300
    assert script.depth > 3


@pytest.mark.parametrize("seed", range(5))
def test_no_file_gets_the_bytes_of_another(seed):
    """10,000 objects in all, of a few sizes, without an ETag"""
    script = MixedUp("any", seed, [100, 101, 102, 103, 500])
    found, outcomes = run(script, ["/x/%s" % i for i in range(2000)], siginfos=False)
    check(script, found, outcomes)
    assert len(found) > 1900
    assert sum(response is not None and response.status == 200 for _, response, _, _ in outcomes) > 0.99 * len(found)


@pytest.mark.parametrize("fault", ["swap", "duplicate", "drop", "delay", "any"])
@pytest.mark.parametrize("validators", [True, False])
@pytest.mark.parametrize("sizes", [[300], [100, 101, 102]])
def test_objects_and_siginfos(fault, validators, sizes):
    """Of siginfos nothing is known: they may be as long as their object."""
    script = MixedUp(fault, 1, sizes, validators)
    found, outcomes = run(script, ["/x/%s" % i for i in range(400)], siginfos=True)
    check(script, found, outcomes)
    assert sum(response is not None and response.status == 200 for _, response, _, _ in outcomes) > 0.98 * 2 * len(found)


@pytest.mark.parametrize("seed", range(3))
def test_questions(seed):
    """Half of the objects are absent. Whatever a HEAD is answered, a GET gets the right file or none."""
    script = MixedUp("any", 100 + seed, [100, 101, 102, 103, 500])
    found, outcomes = run(script, ["/%s/%s" % ("x" if i % 2 else "absent", i) for i in range(1000)], siginfos=False)
    wrong = [target for target, response, _, data in outcomes
             if response and response.status == 200 and ("/absent/" in target or data != script.body(target))]
    assert wrong == []
