# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""Mirrors that fail: what can be had is restored, the rest is absent, and nothing is half there."""

import pytest

from system.conftest import FEW
from system.observe import damaged, names, problems, restore, summary, unfinished
from system.peer import CLOSE, HANDLED, by_wget, is_object, send_part

pytestmark = pytest.mark.system

# Of 1 MiB; demo-0003 is small
LARGE, SMALL = "demo-0007", "demo-0003"


def all_but(*absent):
    return [name for name in ("demo-%04d" % number for number in range(1, FEW + 1)) if name not in absent]


def final_names(build, recipe):
    """What there is of a recipe's archive under its final name"""
    return [name for name in names(build.sstate) if "sstate:%s:" % recipe in name and name.endswith(".tar.zst")]


def test_gone_after_the_query(faulty_mirror, mirror_files, make_build, patched_tree):
    """GET is answered with 404 for objects whose HEAD is answered with 200: no error, their real tasks can run."""
    def fault(talk, request, body):
        if request.method == "GET" and (is_object(request, SMALL) or is_object(request, LARGE)):
            talk.answer(request, b"gone", status=404)
            return HANDLED

    server = faulty_mirror(fault)
    build = make_build(patched_tree, server)
    result = restore(build)
    assert build.restored() == all_but(SMALL, LARGE)
    assert result.returncode == 0 and not any(line.startswith("ERROR") for line in problems(result.output))
    assert final_names(build, SMALL) == final_names(build, LARGE) == []
    # That there is no such file is an answer, also for the task and for wget. Behind other requests on its connection it may be
    # the answer to one of these: so it is asked again alone, once.
    assert 1 <= len(server.asked("GET", SMALL)) <= 2 and 1 <= len(server.asked("GET", LARGE)) <= 2
    assert not any(by_wget(request) for request in server.requests)
    assert damaged(build.sstate, mirror_files) == []
    assert summary(result.output).retries == len(server.asked("GET", SMALL) + server.asked("GET", LARGE)) - 2


def restore_everything(build, mirror_files):
    """The build and its result, of which nobody would say that there was a fault"""
    result = restore(build)
    assert result.returncode == 0 and problems(result.output) == []
    assert build.restored() == all_but()
    assert damaged(build.sstate, mirror_files) == []
    return build, result


@pytest.mark.parametrize("recipe", [SMALL, LARGE])
def test_body_ends_early_once(recipe, faulty_mirror, mirror_files, make_build, patched_tree):
    def fault(talk, request, body):
        if request.method == "GET" and is_object(request, recipe) and len(server.asked("GET", recipe)) == 1:
            send_part(talk, body, len(body) // 2)
            return CLOSE

    server = faulty_mirror(fault)
    _, result = restore_everything(make_build(patched_tree, server), mirror_files)
    assert len(server.asked("GET", recipe)) == 2
    assert not any(by_wget(request) for request in server.requests)
    assert summary(result.output).retries == 1


def test_body_ends_early_for_bitbake(faulty_mirror, mirror_files, make_build, patched_tree):
    """wget gets the object then, and starts from nothing."""
    def fault(talk, request, body):
        if request.method == "GET" and is_object(request, LARGE) and not by_wget(request):
            send_part(talk, body, len(body) - 1)
            return CLOSE

    server = faulty_mirror(fault)
    build, _ = restore_everything(make_build(patched_tree, server), mirror_files)
    by = [request for request in server.requests if by_wget(request)]
    assert [is_object(request, LARGE) for request in by] == [True]
    assert "range" not in by[0].headers
    assert unfinished(build.sstate) == []


@pytest.mark.parametrize("announced_more", [0, 100], ids=["ends early", "shorter than Content-Length"])
def test_body_always_wrong(announced_more, faulty_mirror, mirror_files, make_build, patched_tree):
    """Nobody can get the object, so it is not there; also wget's half is not under the final name."""
    def fault(talk, request, body):
        if request.method == "GET" and is_object(request, LARGE):
            size = len(body) if announced_more else len(body) // 2
            send_part(talk, body, size, len(body) + announced_more)
            return CLOSE

    server = faulty_mirror(fault)
    build = make_build(patched_tree, server)
    restore(build)
    assert build.restored() == all_but(LARGE)
    assert final_names(build, LARGE) == []
    assert damaged(build.sstate, mirror_files) == []
    # What wget leaves, with stock, too
    assert all(name.endswith(".tar.zst.tmp") for name in unfinished(build.sstate))
    asked = server.asked("GET", LARGE)
    # The tries of who fetches ahead, and those of the task
    assert len([request for request in asked if not by_wget(request)]) == 2 * 4
    assert [request for request in asked if by_wget(request)]


class EverySecond:
    """503 for each second request"""

    def __init__(self):
        self.count = 0

    def __call__(self, talk, request, body):
        self.count += 1
        if self.count % 2 == 0:
            talk.answer(request, b"busy", status=503)
            return HANDLED


def test_refused_every_second_time(faulty_mirror, mirror_files, make_build, patched_tree):
    server = faulty_mirror(EverySecond())
    build = make_build(patched_tree, server, objects=3, extra_conf='BB_CONNECTION_CACHE_MAX = "2"')
    result = restore(build)
    assert result.returncode == 0 and problems(result.output) == []
    assert len(build.restored()) == 3
    assert damaged(build.sstate, mirror_files) == []
    told = summary(result.output)
    # What the connections ask of themselves, to know whether the host is there, is not retried
    assert told.refusals >= told.retries > 0
    assert told.requests == len(server.requests)
    assert not any(by_wget(request) for request in server.requests)


def test_refused_every_second_time_stock(faulty_mirror, make_build, stock_tree):
    """What the test above is compared with; one thread makes it predictable."""
    build = make_build(stock_tree, faulty_mirror(EverySecond()), objects=3, threads=1)
    restore(build)
    assert len(build.restored()) < 3
