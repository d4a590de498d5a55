# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""Everything is restored over few connections, and what is on disk afterwards is what stock leaves."""

import re
import stat

import pytest

from netqueue.lab.certificates import make_certificates, trust
from system.conftest import FEW, MANY
from system.observe import SECOND, make_absent, names, problems, restore, snapshot, summary

pytestmark = pytest.mark.system

ARCHIVE = re.compile(r"../../sstate:demo-\d{4}:.*\.tar\.zst(\.siginfo)?")


@pytest.mark.parametrize("protocol", ["http", "https"])
def test_as_stock_over_four_connections(protocol, mirror, certificates, make_build, stock_tree, patched_tree):
    server = mirror(protocol, certificates=certificates)
    results, counters, files = {}, {}, {}
    for tree in (stock_tree, patched_tree):
        server.reset()
        build = make_build(tree, server, objects=MANY, levels=4, threads=8)
        result = results[tree.name] = restore(build)
        counters[tree.name] = server.counters()
        files[tree.name] = snapshot(build.sstate)
        assert result.returncode == 0 and problems(result.output) == []
        assert len(build.restored()) == MANY

    assert counters["stock"].connections >= 3 * MANY
    assert 1 <= counters["patched"].connections <= 4
    # Stock's tasks ask again for what the query has found. The test of pipelining is one more.
    assert counters["stock"].requests == 5 * MANY
    assert counters["patched"].requests in (3 * MANY, 3 * MANY + 1)
    assert set(counters["patched"].statuses) == {200}

    regular = {name: entry for name, entry in files["patched"].items() if stat.S_ISREG(entry.mode)}
    assert regular == {name: entry for name, entry in files["stock"].items() if stat.S_ISREG(entry.mode)}
    # Folders have OE_SHARED_UMASK, too: the stock query makes them first, for its locks, with another one
    assert {stat.S_IMODE(entry.mode) for entry in files["patched"].values() if stat.S_ISDIR(entry.mode)} == {0o775}
    assert len(regular) == 2 * MANY and all(ARCHIVE.fullmatch(name) for name in regular)
    # OE_SHARED_UMASK is 002
    assert {stat.S_IMODE(entry.mode) for entry in regular.values()} == {0o664}

    assert summary(results["stock"].output) is None
    told = summary(results["patched"].output)
    size = sum((build.sstate / name).stat().st_size for name in regular)
    assert told.objects == MANY
    assert told.mib == round(size / 1048576, 1)
    assert (told.requests, told.connections) == (counters["patched"].requests, counters["patched"].connections)
    assert (told.retries, told.refusals) == (0, 0)


def test_one_connection(mirror, make_build, patched_tree):
    server = mirror()
    build = make_build(patched_tree, server, threads=8, extra_conf='BB_CONNECTION_CACHE_MAX = "1"')
    result = restore(build)
    assert (result.returncode, len(build.restored())) == (0, FEW)
    assert problems(result.output) == []
    assert server.counters().connections == summary(result.output).connections == 1


def test_server_ends_connections(mirror, make_build, patched_tree):
    """After each third request, as a server with a small keepalive_requests"""
    server = mirror(keepalive_requests=3)
    build = make_build(patched_tree, server)
    result = restore(build)
    assert (result.returncode, len(build.restored())) == (0, FEW)
    assert problems(result.output) == []
    counters = server.counters()
    assert 3 * FEW <= counters.requests <= 4 * FEW
    assert summary(result.output).connections == counters.connections <= counters.requests // 3 + 4


def test_absent_objects(mirror, mirror_files, make_build, patched_tree):
    """What the mirror does not have is known from the query, and not asked for again."""
    server = mirror()
    build = make_build(patched_tree, server, objects=FEW + 2)
    make_absent(build, FEW + 1, FEW + 2)
    result = restore(build)
    assert len(build.restored()) == FEW
    assert "Mirrors %d Missed 2" % FEW in result.output
    counters = server.counters()
    # The test of pipelining is one more: a HEAD behind an answer of 200, OPTIONS behind one of 404
    assert counters.statuses in ({200: 3 * FEW, 404: 2}, {200: 3 * FEW + 1, 404: 2}, {200: 3 * FEW, 404: 2, 405: 1})
    assert counters.connections <= 4


def test_multiconfigs_share(mirror, make_build, patched_tree):
    server = mirror()
    build = make_build(patched_tree, server, threads=8, multiconfigs=SECOND)
    result = restore(build, "demo-all", "mc:second:demo-all")
    assert result.returncode == 0 and problems(result.output) == []
    assert len(build.restored()) == len(build.restored("second")) == FEW
    assert len(build.archives()) == 2 * FEW
    counters = server.counters()
    assert counters.requests in (3 * 2 * FEW, 3 * 2 * FEW + 1)
    assert summary(result.output).connections == counters.connections <= 4
    assert summary(result.output).objects == 2 * FEW


def test_wrong_ca(mirror, certificates, make_build, tmp_path, stock_tree, patched_tree):
    """As stock: all objects are lost, the build ends. The user hears why."""
    server = mirror("https", certificates=certificates)
    other = make_certificates(tmp_path / "other").ca_file
    ends = {}
    for tree in (stock_tree, patched_tree):
        build = make_build(tree, server)
        build.environment.update(trust(other, build.home))
        result = restore(build)
        assert build.restored() == [] and names(build.sstate) == []
        ends[tree.name] = result.returncode, problems(result.output)
    assert server.requests() == []
    assert ends["stock"][0] == ends["patched"][0]
    assert ends["stock"][1] == []
    assert len(ends["patched"][1]) == 1 and "certificate" in ends["patched"][1][0]
