# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""A presence query to a mirror which mixes up the answers of a pipeline, after some that were right."""

import collections
import random

import bb
import bb.data
import pytest

from bb.connections.server import ConnectionServer
from bb.presencequery import CHECKED_FROM, SAMPLE, Query

# Right answers at first, and the part of those after them that are not: a dropped one spoils all after it on its connection,
# and so many swapped ones that a sample of SAMPLE files does not miss them
GOOD = 150
FAULTS = {"dropped": 0.05, "swapped": 0.2}


@pytest.fixture
def query(peer, tmp_path):
    """Called with a script and a number of objects, of which every second exists: returns (peer, those that were found)"""
    servers = []

    def ask(script, count):
        there = peer(script)
        d = bb.data.init()
        for name, value in (("DL_DIR", str(tmp_path)), ("FILESPATH", str(tmp_path)), ("TOPDIR", str(tmp_path)), ("FILE", "x.bb"),
                            ("BB_NUMBER_THREADS", "4"), ("PREMIRRORS", "file://.* %s/PATH" % there.url(""))):
            d.setVar(name, value)
        servers.append(ConnectionServer(4, timeout=10))
        servers[-1].start()
        asking = Query(servers[-1], d)
        sizes = asking.run([(number, "file://%d" % number) for number in range(count)], lambda done: None)
        assert asking.unanswered() == []
        return there, set(sizes)

    yield ask
    for server in servers:
        assert server.stop()


def answer(talk, request):
    if request.method == "OPTIONS":
        talk.answer(request, b"", "Allow: GET, HEAD", status=405)
        return
    number = int(request.target.rpartition("/")[2])
    if number % 2:
        talk.answer(request, b"no such file", status=404)
    else:
        talk.answer(request, b"x" * number, 'ETag: "%d"' % number)


def mixed_up(fault, seed):
    rng = random.Random(seed)
    answered = []

    def script(talk):
        for request in talk.requests():
            answered.append(request)
            wrong = len(answered) > GOOD and b"\r\n\r\n" in talk._buffer and rng.random() < FAULTS[fault]
            if wrong and fault == "swapped":
                other = talk.request()
                answer(talk, other)
            elif wrong:
                continue
            answer(talk, request)
    return script


@pytest.mark.parametrize("fault, seed", [("swapped", 0), ("swapped", 1), ("swapped", 2), ("dropped", 0)])
def test_mixed_up_answers(query, fault, seed):
    """Nothing that exists is missing; what does not exist may be tried in vain, as it is without a query."""
    there, found = query(mixed_up(fault, seed), 1000)
    assert set(range(0, 1000, 2)) - found == set()
    assert len(there.requests) < 3 * 1000


def test_right_answers_are_checked_by_a_sample(query):
    def script(talk):
        for request in talk.requests():
            answer(talk, request)
    there, found = query(script, 1000)
    assert found == set(range(0, 1000, 2))
    # One more is the trial of pipelining, with a file that may be in the sample, too
    assert len(there.requests) == 1000 + SAMPLE + 1
    times = collections.Counter(collections.Counter(there.targets).values())
    assert times in ({1: 1000 - SAMPLE - 1, 2: SAMPLE + 1}, {1: 1000 - SAMPLE, 2: SAMPLE - 1, 3: 1})


def test_few_files_are_not_checked(query):
    def script(talk):
        for request in talk.requests():
            answer(talk, request)
    there, found = query(script, 2 * CHECKED_FROM - 2)
    assert found == set(range(0, 2 * CHECKED_FROM - 2, 2))
    assert len(there.requests) <= 2 * CHECKED_FROM - 2 + 1
