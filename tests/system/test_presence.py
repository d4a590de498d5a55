# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""The presence query of real builds: what is asked of real servers, and how often."""

import collections
import shutil
import stat

import pytest

from system.conftest import FEW, MANY
from system.observe import (SECONDS, add_class, asked, damaged, names, problems, restore, server_pid, snapshot, summary,
                            unfinished, wait_until)
from system.peer import HANDLED, is_object
from system.test_processes import UNBUFFERED, interrupt, started

pytestmark = pytest.mark.system

PROTOCOLS = ["http", "https", "sftp"]
# Recipes of hashes that no mirror has, beside the FEW that one has
ABSENT = ["demo-%04d" % number for number in range(FEW + 1, 2 * FEW + 1)]


@pytest.fixture
def half(make_build):
    """Called as make_build, returns a Build of which a mirror has half of the objects."""
    def make(tree, mirror, *args, **options):
        # Another size, another hash
        recipes = {name + ".bb": 'DEMO_SIZE = "77"\n' for name in ABSENT}
        return make_build(tree, mirror, *args, objects=2 * FEW, recipes=recipes, **options)
    return make


def recipe(name):
    """That an object or a .siginfo belongs to"""
    return name.rpartition("/")[2].split(":")[1]


def is_archive(name):
    return name.endswith(".tar.zst")


def asked_again(server, found, absent=0, alone=False):
    """
    A mirror is asked a HEAD for each archive, and a GET for archive and .siginfo of what was found. If tasks fetch alone, also
    a HEAD for both. Returns names of what was asked for beyond that, with a HEAD.
    """
    questions = asked(server)
    heads = collections.Counter(name for method, name in questions if method == "HEAD")
    gets = collections.Counter(name for method, name in questions if method == "GET")
    assert len(gets) == 2 * found and set(gets.values()) == {1}
    assert len([name for name in gets if is_archive(name)]) == found
    assert {name for name in gets if is_archive(name) or alone} <= set(heads)
    assert len([name for name in heads if is_archive(name)]) == found + absent
    assert {name for name in heads if not is_archive(name)} == {name for name in gets if alone and not is_archive(name)}
    expected = collections.Counter(name for name in heads if is_archive(name)) + collections.Counter(gets if alone else ())
    assert expected - heads == collections.Counter()
    return list((heads - expected).elements())


def assert_asked_in_turn(server, protocol, found, absent=0, alone=False):
    """Nothing beyond that, except for the test whether a HTTP server can pipeline, which asks for one archive again."""
    again = asked_again(server, found, absent, alone)
    assert len(again) <= (protocol != "sftp") and all(map(is_archive, again))


# What is asked, and over what

@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_asked_in_turn(protocol, any_mirror, mirror_files, make_build, patched_tree):
    server = any_mirror(protocol)
    build = make_build(patched_tree, server, objects=MANY, levels=4, threads=8)
    result = restore(build)
    assert (result.returncode, problems(result.output)) == (0, [])
    assert len(build.restored()) == MANY
    assert damaged(build.sstate, mirror_files) == [] and unfinished(build.sstate) == []
    assert_asked_in_turn(server, protocol, MANY)
    told, connections = summary(result.output), server.counters().connections
    assert 1 <= told.connections <= connections <= 4
    # A login that is under way at the end of the build is not told
    assert told.connections == connections or protocol == "sftp"
    assert (told.objects, told.requests) == (MANY, len(asked(server)))
    assert (told.retries, told.refusals) == (0, 0)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_one_connection(protocol, any_mirror, make_build, patched_tree):
    server = any_mirror(protocol)
    build = make_build(patched_tree, server, threads=8, extra_conf='BB_CONNECTION_CACHE_MAX = "1"')
    result = restore(build)
    assert (result.returncode, problems(result.output)) == (0, [])
    assert len(build.restored()) == FEW
    assert_asked_in_turn(server, protocol, FEW)
    assert summary(result.output).connections == server.counters().connections == 1


@pytest.mark.long
def test_sftp_as_stock(any_mirror, make_build, stock_tree, patched_tree):
    """The same files with the same modes. sftp gives them the time at which they arrive."""
    server = any_mirror("sftp")
    files, counters = {}, {}
    for tree in (stock_tree, patched_tree):
        server.reset()
        build = make_build(tree, server, objects=MANY, levels=4)
        result = restore(build)
        assert (result.returncode, problems(result.output)) == (0, [])
        assert len(build.restored()) == MANY
        counters[tree.name] = server.counters()
        files[tree.name] = {name: (entry.mode, entry.digest) for name, entry in snapshot(build.sstate).items()
                            if stat.S_ISREG(entry.mode)}
    assert files["patched"] == files["stock"] and len(files["stock"]) == 2 * MANY
    assert counters["stock"].logins == 2 * MANY
    assert 1 <= counters["patched"].logins <= 4


def test_default_max_startups(any_mirror, make_build, patched_tree):
    """With so many tasks at a time sshd drops some of stock's connections, and what they were for is lost."""
    server = any_mirror("sftp", log=False)
    build = make_build(patched_tree, server, objects=MANY, levels=4, threads=16)
    result = restore(build)
    assert (result.returncode, problems(result.output)) == (0, [])
    assert len(build.restored()) == MANY
    counters = server.counters()
    assert (1 <= counters.logins <= 4, counters.dropped) == (True, 0)


# What a mirror does not have

@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_build_of_what_is_absent(protocol, any_mirror, half, patched_tree):
    """What the mirror lacks is built, and not asked for after the query."""
    server = any_mirror(protocol)
    build = half(patched_tree, server)
    result = build.run(["demo-all"], SECONDS)
    assert (result.returncode, result.left, problems(result.output)) == (0, 0, [])
    assert "Mirrors %d Missed %d" % (FEW, FEW) in result.output
    assert len(build.restored()) == FEW and len(build.archives()) == 2 * FEW
    assert_asked_in_turn(server, protocol, FEW, absent=FEW)
    assert {recipe(name) for method, name in asked(server) if method == "GET"}.isdisjoint(ABSENT)
    assert server.counters().connections <= 4


def test_build_of_what_is_absent_stock(any_mirror, half, stock_tree):
    """What the test above is compared with: over sftp everything is thought to be there."""
    server = any_mirror("sftp")
    build = half(stock_tree, server)
    result = build.run(["demo-all"], SECONDS)
    assert "Mirrors %d Missed 0" % (2 * FEW) in result.output
    assert result.returncode == 1
    errors = [line for line in problems(result.output) if line.startswith("ERROR")]
    assert len(errors) >= FEW
    assert len(build.restored()) == FEW and len(build.archives()) == 2 * FEW


LACKING = {"demo-0002", "demo-0005", "demo-0007"}
TWO = pytest.mark.parametrize("first, second", [("http", "http"), ("http", "sftp"), ("sftp", "http")])


@pytest.fixture
def two_mirrors(any_mirror, mirror_files, links, make_build, patched_tree):
    """Called with their protocols restores all from two mirrors, of which the first lacks LACKING. Returns both."""
    def make(first, second):
        servers = [any_mirror(first, links("some", LACKING)), any_mirror(second)]
        mirrors = " \\n ".join("file://.* %s/PATH;downloadfilename=PATH" % server.url for server in servers)
        # The one whose ssh has to be found
        build = make_build(patched_tree, servers[1] if second == "sftp" else servers[0],
                           extra_conf='SSTATE_MIRRORS = "%s"' % mirrors)
        result = restore(build)
        assert (result.returncode, problems(result.output)) == (0, [])
        assert "Mirrors %d Missed 0" % FEW in result.output
        assert len(build.restored()) == FEW
        assert damaged(build.sstate, mirror_files) == []
        return servers
    return make


def of(recipes, server):
    """What a mirror was asked for that belongs to recipes"""
    return [(method, name) for method, name in asked(server) if recipe(name) in recipes]


@TWO
def test_second_mirror(first, second, two_mirrors):
    """It is asked only for what the first lacks."""
    servers = two_mirrors(first, second)
    assert {recipe(name) for _, name in asked(servers[1])} == LACKING
    # Only three are asked for: that is too few for the test of pipelining
    assert asked_again(servers[1], len(LACKING)) == []
    assert all(server.counters().connections <= 4 for server in servers)


@TWO
def test_first_mirror_is_not_asked_again(first, second, two_mirrors):
    """What it has said that it lacks"""
    servers = two_mirrors(first, second)
    questions = of(LACKING, servers[0])
    assert {method for method, _ in questions} == {"HEAD"}
    assert len({name for _, name in questions}) == len(LACKING) and len(questions) <= len(LACKING) + 1


# How long an answer is believed

@pytest.mark.parametrize("protocol", ["http", "sftp"])
def test_resident_server_asks_afresh(protocol, any_mirror, links, make_build, patched_tree):
    """What has come to the mirror between two builds is found, what has gone is not thought to be there."""
    folder = links("changing", {"demo-0003"})
    server = any_mirror(protocol, folder)
    build = make_build(patched_tree, server, environment={"BB_SERVER_TIMEOUT": "60"})
    pids, restored = [], []
    for absent in ("demo-0003", "demo-0004"):
        shutil.rmtree(folder)
        links("changing", {absent})
        server.reset()
        shutil.rmtree(build.sstate, ignore_errors=True)
        shutil.rmtree(build.tmp / "default", ignore_errors=True)
        result = build.run(["--setscene-only", "demo-all"], SECONDS)
        assert problems(result.output) == []
        assert "Mirrors %d Missed 1" % (FEW - 1) in result.output
        assert_asked_in_turn(server, protocol, FEW - 1, absent=1)
        pids.append(server_pid(build))
        restored.append({"demo-%04d" % number for number in range(1, FEW + 1)} - set(build.restored()))
    build.run(["--kill-server"], SECONDS)
    assert pids[0] == pids[1]
    assert restored == [{"demo-0003"}, {"demo-0004"}]


# Who else asks

# As openembedded-core without the series' patches
OLD_CLASS = """
def sstate_checkhashes(sq_data, d, siginfo=False, currentcount=0, summary=True, **kwargs):
    found, tasklist = set(), []
    for tid in sq_data["hash"]:
        spec = sq_data["hashfn"][tid].split()[1]
        task = bb.runqueue.taskname_from_tid(tid)[3:]
        tasklist.append((tid, sstate_filename(spec, sq_data["unihash"][tid], task) + (".siginfo" if siginfo else "")))
    found = sstate_query_each(tasklist, sstate_mirror_data(d), "Checking sstate mirror object availability", d)
    bb.plain("The old class: Mirrors %d Missed %d" % (len(found), len(tasklist) - len(found)))
    return found
"""


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_old_class(protocol, any_mirror, half, patched_tree):
    """The bitbake part alone: such a class does not say what can be fetched ahead."""
    server = any_mirror(protocol)
    build = half(patched_tree, server, threads=8, extra_conf='INHERIT += "old"')
    add_class(build, "old", OLD_CLASS)
    result = build.run(["demo-all"], SECONDS)
    assert (result.returncode, result.left, problems(result.output)) == (0, 0, [])
    assert "The old class: Mirrors %d Missed %d" % (FEW, FEW) in result.output
    assert len(build.restored()) == FEW and len(build.archives()) == 2 * FEW
    assert_asked_in_turn(server, protocol, FEW, absent=FEW, alone=True)
    assert server.counters().connections <= 4


def test_no_hash_server(any_mirror, half, patched_tree):
    """One warning, then as without"""
    server = any_mirror("http")
    build = half(patched_tree, server, extra_conf='BB_SETSCENE_PRESENCE = "hashserv mirror"')
    result = build.run(["demo-all"], SECONDS)
    assert (result.returncode, result.left) == (0, 0)
    told = problems(result.output)
    assert len(told) == 1 and told[0].startswith("WARNING: BB_SETSCENE_PRESENCE names hashserv")
    assert len(build.restored()) == FEW
    assert_asked_in_turn(server, "http", FEW, absent=FEW)


# A mirror that refuses

def test_limited(any_mirror, mirror_files, make_build, patched_tree):
    """nginx's limit_req refuses what comes faster: that is no absence."""
    server = any_mirror("http", http_extra="limit_req_zone $binary_remote_addr zone=few:1m rate=20r/s;",
                        server_extra="limit_req zone=few burst=4 nodelay;")
    build = make_build(patched_tree, server, objects=MANY, levels=4, threads=8)
    result = restore(build)
    assert (result.returncode, problems(result.output)) == (0, [])
    assert len(build.restored()) == MANY
    assert damaged(build.sstate, mirror_files) == []
    refused = server.counters().statuses.get(503, 0)
    assert refused > 0 and summary(result.output).refusals >= 1


REFUSED = "demo-0005"


def test_refused_during_the_query(faulty_mirror, mirror_files, make_build, patched_tree):
    """One that is refused goes behind the others, is asked for again, and nobody hears of it."""
    def fault(talk, request, body):
        if request.method == "HEAD" and is_object(request, REFUSED) and len(server.asked("HEAD", REFUSED)) < 3:
            talk.answer(request, b"", status=503)
            return HANDLED

    server = faulty_mirror(fault)
    build = make_build(patched_tree, server)
    result = restore(build)
    assert (result.returncode, problems(result.output)) == (0, [])
    assert len(build.restored()) == FEW
    assert damaged(build.sstate, mirror_files) == []
    assert len(server.asked("HEAD", REFUSED)) == 3
    # A refusal in the test of pipelining is none of the mirror's
    told = summary(result.output)
    assert 1 <= told.retries <= 2 and told.refusals <= 2


def test_refused_always(faulty_mirror, mirror_files, make_build, patched_tree):
    """Missing in the end, as with stock. Told once for the host; the others are restored."""
    def fault(talk, request, body):
        if is_object(request, REFUSED):
            talk.answer(request, b"", status=503)
            return HANDLED

    server = faulty_mirror(fault)
    build = make_build(patched_tree, server)
    result = restore(build)
    assert result.returncode == 0
    assert set(build.restored()) == {"demo-%04d" % number for number in range(1, FEW + 1)} - {REFUSED}
    assert damaged(build.sstate, mirror_files) == []
    told = problems(result.output)
    assert len(told) == 1 and told[0].startswith("WARNING: Sstate mirror http://127.0.0.1 did not answer for 1 of %d "
                                                 "objects, " % FEW)
    # Its task does not run
    assert server.asked("GET", REFUSED) == []


# The end

# Stands in for sftp-server. Answers the greeting, or nothing.
GREETING = r"printf '\0\0\0\5\2\0\0\0\3'"
STUCK = """#!/bin/sh
%s
head -c %d >/dev/null
echo waiting >>%s
exec cat >/dev/null
"""


@pytest.mark.parametrize("greeting, size", [("", 9), (GREETING, 60)], ids=["greeting", "question"])
def test_interrupted_query(greeting, size, any_mirror, make_build, tmp_path, patched_tree):
    """Nothing is waited for, and no ssh is left, at neither end."""
    waiting = tmp_path / "waiting"
    script = tmp_path / "stuck"
    script.write_text(STUCK % (greeting, size, waiting))
    script.chmod(0o755)
    server = any_mirror("sftp", extra="ForceCommand %s" % script)
    build = make_build(patched_tree, server, environment=UNBUFFERED)
    running = started(build)
    try:
        wait_until(waiting.exists, "the query waits")
        assert "ssh" in commands(build.processes())
        interrupt(running, build, "stateShutdown")
        interrupt(running, build, "stateForceShutdown")
        result = running.wait(SECONDS)
    finally:
        running.kill()
    assert result.returncode != 0 and result.left == 0
    assert build.restored() == [] and names(build.sstate) == []
    wait_until(lambda: not children(server.process.pid), "sshd's sessions end")


def commands(pids):
    found = []
    for pid in pids:
        try:
            with open("/proc/%d/comm" % pid) as file:
                found.append(file.read().strip())
        except FileNotFoundError:
            pass
    return found


def children(pid):
    with open("/proc/%d/task/%d/children" % (pid, pid)) as file:
        return file.read().split()
