# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""Mirrors with faults: at least what stock restores is restored, within a bounded time, and one line tells of it.

As users run it by default: objects are fetched ahead of their tasks. CASES.md of the project's notes has the list.
"""

import time

import pytest

from system.conftest import FEW, MANY, OFF
from system.observe import SECONDS, add_class, damaged, names, outcome, problems, restore, summary, unfinished
from system.peer import CLOSE, HANDLED, is_archive

pytestmark = pytest.mark.system

ALL = ["demo-%04d" % number for number in range(1, FEW + 1)]


def answers(status, text=b"", *headers):
    """A fault: the same for everything"""
    def fault(talk, request, body):
        talk.answer(request, text, *headers, status=status)
        return HANDLED
    return fault


PAGE = b"<html><body>Please log in</body></html>"


def test_page_for_everything(faulty_mirror, make_build, patched_tree):
    """A captive portal: nothing is stored, the user hears once of it, and all counts as absent."""
    build = make_build(patched_tree, faulty_mirror(answers(200, PAGE)))
    result = restore(build)
    assert result.returncode == 0
    assert build.restored() == [] and names(build.sstate) == []
    told = problems(result.output)
    assert told.count("WARNING: Sstate mirror http://127.0.0.1 has returned files that are not sstate objects, "
                      "treating them as missing") == 1
    assert not any(line.startswith("ERROR") for line in told)


def test_page_for_everything_alone(faulty_mirror, make_build, patched_tree):
    """If tasks find out. What they say of themselves is what stock's say of objects that cannot be installed."""
    build = make_build(patched_tree, faulty_mirror(answers(200, PAGE)), extra_conf=OFF)
    result = restore(build)
    assert build.restored() == [] and all(name.endswith(".siginfo") for name in names(build.sstate))
    assert len([line for line in problems(result.output) if "Sstate mirror" in line]) == 1


class Banning:
    """A fault: 403 for 10 seconds to who asks more than 50 a second"""

    def __init__(self):
        self.times = []
        self.until = 0

    def __call__(self, talk, request, body):
        now = time.monotonic()
        self.times = [then for then in self.times if then > now - 1] + [now]
        if len(self.times) > 50 and now >= self.until:
            self.until = now + 10
        if now < self.until:
            talk.answer(request, b"slow down", status=403)
            return HANDLED


@pytest.mark.long
def test_forbidden_for_a_while(faulty_mirror, mirror_files, make_build, patched_tree):
    """That is no absence."""
    banning = Banning()
    build = make_build(patched_tree, faulty_mirror(banning), objects=MANY, levels=4, threads=8)
    result = restore(build)
    assert banning.until > 0
    assert (result.returncode, problems(result.output)) == (0, [])
    assert len(build.restored()) == MANY
    assert damaged(build.sstate, mirror_files) == [] and unfinished(build.sstate) == []


def test_refuses_everything(faulty_mirror, make_build, patched_tree):
    """The wait has an end, then all is built, and no setscene task runs in vain."""
    server = faulty_mirror(answers(503))
    build = make_build(patched_tree, server)
    started = time.monotonic()
    result = build.run(["demo-all"], SECONDS)
    assert time.monotonic() - started < 60
    assert (result.returncode, result.left) == (0, 0)
    told = problems(result.output)
    assert len(told) == 1 and told[0].startswith("WARNING: Sstate mirror http://127.0.0.1 did not answer for "
                                                 "%d of %d objects, " % (FEW, FEW))
    assert "Mirrors 0 Missed %d" % FEW in result.output
    assert "do_populate_setscene" not in result.output
    assert len(build.archives()) == FEW and not any(request.method == "GET" for request in server.requests)


def test_first_of_two_refuses(faulty_mirror, serve_nginx, links, mirror_files, make_build, patched_tree):
    """The second one decides."""
    absent = ALL[::2]
    first, second = faulty_mirror(answers(503)), serve_nginx(links("half", absent))
    mirrors = " \\n ".join("file://.* %s/PATH;downloadfilename=PATH" % server.url for server in (first, second))
    build = make_build(patched_tree, first, extra_conf='SSTATE_MIRRORS = "%s"' % mirrors)
    result = restore(build)
    assert "Mirrors %d Missed %d" % (FEW - len(absent), len(absent)) in result.output
    assert build.restored() == [name for name in ALL if name not in absent]
    assert damaged(build.sstate, mirror_files) == [] and unfinished(build.sstate) == []
    assert result.returncode == 0
    told = problems(result.output)
    assert len(told) == 1 and told[0].startswith("WARNING: Sstate mirror http://127.0.0.1 did not answer for ")
    assert not any(request.method == "GET" for request in first.requests)


@pytest.mark.long
def test_away_for_a_while(faulty_mirror, mirror_files, make_build, patched_tree):
    """It is closed for 25 seconds while objects are fetched: that is waited for, and nothing is lost."""
    def fault(talk, request, body):
        if request.method == "GET" and is_archive(request) and not away:
            fetched.append(request.target)
            if len(fetched) > MANY // 3:
                away.append(time.monotonic())
                server.die(25)
                return CLOSE

    fetched, away = [], []
    server = faulty_mirror(fault)
    build = make_build(patched_tree, server, objects=MANY, levels=4, threads=8)
    result = restore(build)
    assert 25 < time.monotonic() - away[0] < 50
    assert (result.returncode, problems(result.output)) == (0, [])
    assert len(build.restored()) == MANY
    assert damaged(build.sstate, mirror_files) == [] and unfinished(build.sstate) == []
    assert summary(result.output).objects == MANY


# One that has answered is waited for, a minute long. Here it is not.
HASTY = """
addhandler be_hasty
be_hasty[eventmask] = "bb.event.BuildStarted"
python be_hasty() {
    import bb.connections.health
    bb.connections.health.AWAY = 2
}
"""


def test_dead_after_the_query(faulty_mirror, make_build, stock_tree, patched_tree):
    """The port is closed when what the query has found is asked for. All is lost, as with stock, and said once."""
    def fault(talk, request, body):
        if request.method == "GET" or server.peer.targets.count(request.target) > 1:
            server.die()
            return CLOSE

    outcomes = {}
    for name, tree, conf in (("stock", stock_tree, ""), ("off", patched_tree, OFF), ("on", patched_tree, "")):
        # Nothing is asked for twice by the query, as the trial of pipelining would
        server = faulty_mirror(fault, pipelined=False)
        conf += '\nINHERIT += "hasty"' if tree is patched_tree else ""
        build = make_build(tree, server, name, extra_conf=conf)
        add_class(build, "hasty", HASTY)
        result = restore(build)
        assert "Mirrors %d Missed 0" % FEW in result.output
        outcomes[name] = outcome(build, result)
        # wget leaves what it has not even begun
        assert [file for file in outcomes[name].pop("names") if not file.endswith(".tmp")] == []
    assert outcomes["stock"]["restored"] == [] and outcomes["stock"]["returncode"] == 0
    for name in ("off", "on"):
        shared = [line for line in outcomes[name]["said"] if "hared connections" in line]
        assert len(shared) == 1
        outcomes[name]["said"].remove(shared[0])
        assert outcomes[name] == outcomes["stock"]
