# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""S3 with a server that checks signatures, rclone, beside the program aws."""

import contextlib
import os
import subprocess

import pytest

from bb.connections import Unusable, awsconfig
from bb.connections.pool import PROTOCOLS
from bb.connections.request import quote_key
from bb.connections.s3 import S3
from netqueue.lab import s3server
from support.build import Build

NAMES = ("plain", "sstate:a:b:1.0:r0:x:14:00_populate.tar.zst", "with blank", "a+b~c", "50%25", "ü", "(x)'!*$@,;=&", "#?",
         "a/b:c/d")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bucket")
    for name in NAMES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode() * 9)
    return folder


@pytest.fixture
def serve_s3(folder):
    """Called with what s3server.serve() takes beside the folder."""
    if s3server.missing():
        pytest.skip("%s is not installed" % s3server.missing())
    with contextlib.ExitStack() as stack:
        yield lambda **options: stack.enter_context(s3server.serve(folder, **options))


def write_home(server, home):
    for name, text in server.home_files.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(text)


@pytest.fixture
def ask(make_asking, tmp_path):
    """Called with a server, a method and names, asks it as a user with ~/.aws. Returns the Asked objects."""
    made = {}

    def make(server, method, names, bucket="sstate"):
        write_home(server, tmp_path)
        environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
        if server not in made:
            made[server] = make_asking(protocols={**PROTOCOLS, "s3": S3(environment).protocol})
        environment[awsconfig.KEYS_HASH] = awsconfig.keys_hash(environment)
        return made[server].one_by_one(method, ["s3://%s/%s" % (bucket, quote_key(name)) for name in names], environment)
    return make


def test_names(serve_s3, certificates, ask, tmp_path):
    """What needs encoding is found and fetched, as by aws."""
    server = serve_s3(certificates=certificates)
    sizes = [asked.wait()[0].length for asked in ask(server, "HEAD", NAMES)]
    assert sizes == [9 * len(name.encode()) for name in NAMES]
    assert [asked.body() for asked in ask(server, "GET", NAMES)] == [name.encode() * 9 for name in NAMES]
    done = subprocess.run([server.tools / "aws", "s3", "cp", "s3://sstate/" + NAMES[3], "-"], stdout=subprocess.PIPE,
                          timeout=60, env={"HOME": str(tmp_path), "PATH": os.environ["PATH"]})
    assert done.stdout == NAMES[3].encode() * 9
    paths = [request.path for request in server.requests() if quote_key(NAMES[3]) in request.path]
    # HEAD and GET of both
    assert len(set(paths)) == 1 and len(paths) >= 4


def test_absent(serve_s3, ask):
    server = serve_s3()
    assert [asked.status() for asked in ask(server, "HEAD", ["plain", "absent"])] == [200, 404]
    assert [asked.status() for asked in ask(server, "GET", ["absent"], bucket="other-bucket")] == [404]


def test_wrong_secret(serve_s3, ask):
    server = serve_s3()
    server.configure((s3server.KEYS[0], "wrong"))
    asked, = ask(server, "HEAD", ["plain"])
    assert isinstance(asked.error(), Unusable) and "SignatureDoesNotMatch" in str(asked.error())
    assert "wrong" not in str(asked.error())


def test_task(serve_s3, start, tmp_path):
    """A task fetches with the keys that only the server has."""
    server = serve_s3()
    keys = dict(zip(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), s3server.KEYS))
    home = tmp_path / "task"
    connections = start(HOME=str(home), AWS_ENDPOINT_URL="http://localhost:%d" % server.port, **keys)
    build = Build(home, connections.server.address)
    for name, value in dict(keys, AWS_ENDPOINT_URL="http://localhost:%d" % server.port).items():
        build.d.setVar(name, value)
        build.d.setVarFlag(name, "export", "1")
    build.fetch("s3://sstate/plain")
    assert build.read("plain") == b"plain" * 9
    assert build.exists("s3://sstate/plain") and not build.exists("s3://sstate/absent")
    assert server.aws_calls() == []
    assert server.counters().connections <= 4
