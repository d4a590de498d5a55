# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""Builds that restore from S3: rclone, which checks signatures, behind nginx, with the program aws as stock's client."""

import contextlib
import sys

import pytest

from netqueue.lab import s3server
from system.conftest import FEW, MANY, OFF
from system.observe import make_absent, names, problems, restore, snapshot, summary

pytestmark = pytest.mark.system

OTHER_KEYS = ("AKIANETQUEUE00000002", "another/secret+of+the+demo")


@pytest.fixture
def serve_s3(mirror_files):
    """Called with what s3server.serve() takes beside the folder, returns a mirror with the filled mirror's files."""
    if s3server.missing():
        pytest.skip("%s is not installed" % s3server.missing())
    with contextlib.ExitStack() as stack:
        yield lambda folder=mirror_files, **options: stack.enter_context(s3server.serve(folder, **options))


def secrets_in(build, *secrets):
    """(file, line) of a build's files where a secret is, without the files of aws"""
    # The server logs the user's environment, also in stock
    return [(path, line) for path in build.directory.rglob("*") if path.is_file() and ".aws" not in path.parts
            for line in path.read_bytes().splitlines()
            if any(secret.encode() in line for secret in secrets) and b"Running command ['updateConfig'" not in line]


def test_as_stock(serve_s3, certificates, make_build, stock_tree, patched_tree):
    """The same files as stock's, which starts five processes of aws for each object"""
    server = serve_s3(certificates=certificates)
    files, calls = {}, {}
    for tree in (stock_tree, patched_tree):
        server.reset()
        build = make_build(tree, server, objects=2, levels=1)
        result = restore(build)
        assert result.returncode == 0 and problems(result.output) == []
        assert len(build.restored()) == 2
        files[tree.name] = {name: entry.digest for name, entry in snapshot(build.sstate).items() if entry.digest}
        calls[tree.name] = len(server.aws_calls())
    objects = {name for name in files["patched"] if name.endswith((".zst", ".siginfo"))}
    assert len(objects) == 4
    assert {name: files["patched"][name] for name in objects} == {name: files["stock"][name] for name in objects}
    assert calls == {"stock": 5 * 2, "patched": 0}


@pytest.mark.parametrize("conf", ["", OFF])
def test_over_four_connections(conf, serve_s3, certificates, make_build, patched_tree):
    server = serve_s3(certificates=certificates)
    build = make_build(patched_tree, server, objects=MANY, levels=4, threads=8, extra_conf=conf)
    result = restore(build)
    assert result.returncode == 0 and problems(result.output) == []
    assert len(build.restored()) == MANY
    counters = server.counters()
    assert set(counters.statuses) == {200} and counters.connections <= 4
    asked = 5 if conf else 3
    assert counters.requests in (asked * MANY, asked * MANY + 1)
    assert summary(result.output).connections == counters.connections
    assert summary(result.output).objects == MANY
    assert server.aws_calls() == []
    assert secrets_in(build, *s3server.KEYS) == []


def test_absent_objects(serve_s3, make_build, patched_tree):
    server = serve_s3()
    build = make_build(patched_tree, server, objects=FEW + 2)
    make_absent(build, FEW + 1, FEW + 2)
    result = restore(build)
    assert len(build.restored()) == FEW
    assert "Mirrors %d Missed 2" % FEW in result.output
    assert problems(result.output) == [] and server.aws_calls() == []


def test_two_buckets(serve_s3, links, tmp_path, make_build, patched_tree):
    """The second is asked for what the first lacks"""
    server = serve_s3(links("half", ["demo-0001", "demo-0002"]), buckets={"second.bucket": links("all", [])})
    conf = 'SSTATE_MIRRORS .= " file://.* s3://second.bucket/PATH;downloadfilename=PATH"'
    build = make_build(patched_tree, server, extra_conf=conf)
    result = restore(build)
    assert (result.returncode, len(build.restored())) == (0, FEW)
    assert problems(result.output) == []
    heads = [request.path.split("/")[1] for request in server.requests() if request.method == "HEAD"]
    assert heads.count("sstate") >= FEW and heads.count("second.bucket") in (2, 3)


def test_unsigned(serve_s3, make_build, patched_tree):
    """A public bucket, and no credentials"""
    server = serve_s3(keys=None)
    build = make_build(patched_tree, server, extra_conf='FETCHCMD_s3 = "aws s3 --no-sign-request"')
    result = restore(build)
    assert (result.returncode, len(build.restored())) == (0, FEW)
    assert problems(result.output) == [] and server.aws_calls() == []


def test_keys_of_the_environment(serve_s3, make_build, patched_tree):
    """Tasks, too, find what the user has set"""
    server = serve_s3()
    server.configure(None)
    variables = dict(zip(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), s3server.KEYS))
    build = make_build(patched_tree, server, extra_conf=OFF, environment=variables)
    # With messages for developers
    result = restore(build, "-DDD", "demo-all")
    assert (result.returncode, len(build.restored())) == (0, FEW)
    assert problems(result.output) == [] and server.aws_calls() == []
    assert secrets_in(build, s3server.KEYS[1]) == []


def test_keys_that_change_in_the_middle(serve_s3, tmp_path, make_build, patched_tree):
    """The server refuses the first keys once the query is done; the command that has given them is called again"""
    server = serve_s3()
    calls, change = tmp_path / "calls", tmp_path / "change"
    process = tmp_path / "process.py"
    process.write_text(
        "import json, os\n"
        "open(%r, 'a').write('called\\n')\n"
        "keys = %r[os.path.exists(%r)]\n"
        "print(json.dumps({'Version': 1, 'AccessKeyId': keys[0], 'SecretAccessKey': keys[1]}))\n"
        % (str(calls), (s3server.KEYS, OTHER_KEYS), str(change)))
    server.configure(None, more="credential_process = %s %s\n" % (sys.executable, process))
    build = make_build(patched_tree, server, objects=MANY, levels=4, extra_conf=OFF)
    running = build.start(["--setscene-only", "demo-all"])
    changed = []

    def watch(output):
        if "task do_populate_setscene: Succeeded" in output and not changed:
            changed.append(True)
            change.touch()
            server.rclone.restart([OTHER_KEYS])

    result = running.wait(120, watch)
    assert changed and (result.returncode, len(build.restored())) == (0, MANY), result.output
    assert problems(result.output) == []
    assert calls.read_text().splitlines() == ["called"] * 2
    assert server.aws_calls() == []


@pytest.mark.parametrize("keys, reason", [(None, "no AWS credentials"),
                                          ((s3server.KEYS[0], "wrong"), "SignatureDoesNotMatch")], ids=["none", "wrong"])
def test_without_valid_keys(keys, reason, serve_s3, make_build, stock_tree, patched_tree):
    """As stock, which finds nothing, with one line"""
    server = serve_s3()
    server.configure(keys)
    ends = {}
    for tree in (stock_tree, patched_tree):
        build = make_build(tree, server, objects=2)
        build.environment["AWS_EC2_METADATA_DISABLED"] = "true"
        result = restore(build)
        assert build.restored() == [] and [name for name in names(build.sstate) if name.endswith(".zst")] == []
        ends[tree.name] = result.returncode, problems(result.output)
    assert ends["stock"] == (0, [])
    returncode, lines = ends["patched"]
    assert returncode == 0 and len(lines) == 1 and reason in lines[0] and "s3://sstate" in lines[0]


def test_endpoint_that_cannot_be_reached(serve_s3, make_build, patched_tree):
    server = serve_s3()
    server.rclone.stop()
    server.nginx.stop()
    build = make_build(patched_tree, server)
    result = restore(build)
    assert result.returncode == 0 and build.restored() == []
    lines = problems(result.output)
    assert len(lines) == 1 and "s3://sstate" in lines[0] and "cannot connect" in lines[0]


def test_own_command(serve_s3, make_build, patched_tree):
    """A custom FETCHCMD_s3 is used as in stock"""
    server = serve_s3()
    build = make_build(patched_tree, server, objects=1, extra_conf='FETCHCMD_s3 = "aws --region us-east-1 s3"')
    result = restore(build)
    assert (result.returncode, len(build.restored())) == (0, 1)
    assert len(server.aws_calls()) == 5 and summary(result.output) is None
