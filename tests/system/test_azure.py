# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""Builds that restore from az://, which is https with a token in the query. nginx stands for the storage account."""

import pytest

from system.conftest import FEW, OFF
from system.observe import make_absent, problems, restore, summary

pytestmark = pytest.mark.system

SAS = "?sv=2018-11-09&sr=c&sig=a%2Bsecret%3D"


@pytest.mark.parametrize("conf", ["", OFF], ids=["prefetch", "tasks"])
def test_token(conf, mirror, certificates, make_build, patched_tree):
    """Each request has the token, and no file of the build contains it"""
    server = mirror("https", certificates=certificates)
    conf += '\nSSTATE_MIRRORS = "file://.* az://localhost:%d/PATH;downloadfilename=PATH"' % server.port
    build = make_build(patched_tree, server, extra_conf=conf + '\nAZ_SAS = "%s"' % SAS)
    result = restore(build, "-DDD", "demo-all")
    assert (result.returncode, len(build.restored())) == (0, FEW)
    assert problems(result.output) == []
    requests = [request for request in server.requests() if request.method != "OPTIONS"]
    assert len(requests) >= 3 * FEW and all(request.path.endswith(SAS) for request in requests)
    connections = server.counters().connections
    assert connections <= 4 and "over %d connection" % connections in result.output
    assert [path for path in build.tmp.rglob("*") if path.is_file() and b"secret" in path.read_bytes()] == []
    assert "secret" not in result.output


def test_absent(mirror, certificates, make_build, patched_tree):
    server = mirror("https", certificates=certificates)
    conf = 'SSTATE_MIRRORS = "file://.* az://localhost:%d/PATH;downloadfilename=PATH"' % server.port
    build = make_build(patched_tree, server, objects=FEW + 1, extra_conf=conf)
    make_absent(build, FEW + 1)
    result = restore(build)
    assert len(build.restored()) == FEW and problems(result.output) == []
    assert "Mirrors %d Missed 1" % FEW in result.output
    assert summary(result.output).objects == FEW
