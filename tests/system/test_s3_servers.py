# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""Builds that restore from S3 servers which know regions, roles and session tokens. See s3servers.py."""

import contextlib
import importlib.util
import shutil
import subprocess

import pytest

from netqueue.lab import s3server
from system import s3servers
from system.conftest import FEW, MANY, OFF
from system.observe import problems, restore, summary
from system.test_s3 import secrets_in

pytestmark = pytest.mark.system

SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
ROLE_CONFIG = """role_arn = %s
source_profile = builder

[profile builder]
aws_access_key_id = %s
aws_secret_access_key = %s
"""


@pytest.fixture
def few(links):
    """The part of the filled mirror that builds of FEW objects need"""
    if s3server.missing():
        pytest.skip("%s is not installed" % s3server.missing())
    return links("few", ["demo-%04d" % number for number in range(FEW + 1, MANY + 1)])


@pytest.fixture
def swift(few, tmp_path_factory):
    """In eu-west-1"""
    if not importlib.util.find_spec("swift"):
        pytest.skip("Swift is not installed")
    with s3servers.swift(tmp_path_factory.mktemp("swift"), few, "eu-west-1") as mirror:
        yield mirror


@pytest.fixture
def serve_moto(few, tmp_path_factory):
    """Called with a program aws, if it is not the installed one, returns an S3Mirror and a Moto"""
    if not importlib.util.find_spec("moto"):
        pytest.skip("moto is not installed")
    with contextlib.ExitStack() as stack:
        yield lambda aws=None: stack.enter_context(s3servers.moto(tmp_path_factory.mktemp("moto"), few, aws))


@pytest.fixture
def aws_2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("aws")
    program = s3servers.unpack_aws(folder)
    if not program or subprocess.run([program, "--version"], stdout=subprocess.DEVNULL, timeout=60).returncode:
        pytest.skip("version 2 of aws is not installed")
    yield program
    shutil.rmtree(folder)


def test_other_region(swift, make_build, patched_tree):
    """The server refuses what is signed for the configured region, and names its own. Each connection learns it once"""
    build = make_build(patched_tree, swift)
    result = restore(build)
    assert (result.returncode, len(build.restored())) == (0, FEW)
    assert problems(result.output) == [] and swift.aws_calls() == []
    counters = swift.counters()
    assert counters.connections <= 2 * 4
    # Status 400 to HEAD does not tell why, so that each is followed by a GET
    refused = counters.statuses.pop(400)
    assert 2 <= refused <= 2 * 4 and counters.requests - refused == 3 * FEW
    assert set(counters.statuses) <= {200, 206}
    done = summary(result.output)
    assert (done.objects, done.requests, done.connections) == (FEW, counters.requests, counters.connections)


@pytest.mark.parametrize("conf", ["", OFF], ids=["prefetch", "tasks"])
def test_session_token(conf, serve_moto, make_build, patched_tree):
    mirror, server = serve_moto()
    mirror.configure(None)
    build = make_build(patched_tree, mirror, extra_conf=conf, environment=dict(zip(SECRETS, server.temporary)))
    # With messages for developers
    result = restore(build, "-DDD", "demo-all")
    assert (result.returncode, len(build.restored())) == (0, FEW)
    assert problems(result.output) == [] and mirror.aws_calls() == []
    counters = mirror.counters()
    assert set(counters.statuses) == {200} and counters.connections <= 4
    assert secrets_in(build, *server.temporary[1:]) == []


def test_invalid_session_token(serve_moto, make_build, patched_tree):
    """One line, then as stock, which finds nothing"""
    mirror, server = serve_moto()
    mirror.configure(None)
    keys = (*server.temporary[:2], "another" + server.temporary[2])
    build = make_build(patched_tree, mirror, environment=dict(zip(SECRETS, keys)))
    result = restore(build)
    assert result.returncode == 0 and build.restored() == []
    line, = problems(result.output)
    assert "s3://sstate" in line and "InvalidToken" in line
    assert [call.split()[1] for call in mirror.aws_calls()] == ["ls"] * FEW


@pytest.mark.parametrize("conf", ["", OFF], ids=["prefetch", "tasks"])
def test_role(conf, serve_moto, aws_2, make_build, patched_tree):
    """aws is called once for the keys of the role; with the user's own, nothing can be read"""
    mirror, server = serve_moto(aws_2)
    mirror.configure(None, more=ROLE_CONFIG % (s3servers.ROLE, *server.keys))
    build = make_build(patched_tree, mirror, extra_conf=conf)
    result = restore(build)
    assert (result.returncode, len(build.restored())) == (0, FEW)
    assert problems(result.output) == []
    assert mirror.aws_calls() == ["configure export-credentials --format process"]
    counters = mirror.counters()
    assert set(counters.statuses) == {200}
    # The request of aws, to assume the role
    assert counters.methods["POST"] == 1 and counters.connections <= 4 + 1
