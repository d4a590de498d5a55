# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""The number of connections: more than usual only while that pays, with pretended connections in virtual time."""

import pytest

from bb.connections.request import Response
from support.mirror import REFUSED, Mirror, Simulation

URL = "http://mirror.example/x"


def found(request):
    return Response(200, {"etag": request.url}, 250)


@pytest.fixture
def mirror():
    mirror = Mirror()
    mirror.size = 250
    # Different files, so that pipelining can be tried
    mirror.answer = found
    return mirror


def ask(mirror, number, limit=4, most=16):
    """The seconds that number HEADs take"""
    with Simulation(mirror, limit=limit, most=most) as simulation:
        assert simulation.statuses("HEAD", [URL + str(i) for i in range(number)]) == [200] * number
        return simulation.loop.time()


@pytest.mark.parametrize("each", [0.5, 1])
def test_server_that_needs_its_time_for_each_answer(mirror, each):
    mirror.each = each
    seconds = ask(mirror, 400)
    assert mirror.peak == 16
    assert seconds < 400 * each / 4 / 2


@pytest.mark.parametrize("latency", [0, 0.02, 0.2])
@pytest.mark.parametrize("number", [300, 3000])
def test_healthy_server(mirror, latency, number):
    mirror.latency = latency
    ask(mirror, number)
    assert mirror.peak <= 4


def test_limit_of_all_connections_together(mirror):
    """Ten answers a second, over however many connections: more of them are tried, and taken back."""
    mirror.each = 0.4

    def answer(request):
        mirror.each = mirror.open / 10
        return found(request)
    mirror.answer = answer
    ask(mirror, 400)
    assert mirror.peak == 8
    assert mirror.open <= 8


def test_not_after_a_refusal(mirror):
    mirror.each = 1
    refused = iter([REFUSED] * 2)
    mirror.answer = lambda request: next(refused, found(request)) if len(mirror.urls) > 8 else found(request)
    ask(mirror, 200)
    assert mirror.peak <= 4


def test_limit_that_is_set(mirror):
    mirror.each = 1
    ask(mirror, 100, limit=4, most=4)
    assert mirror.peak == 4
