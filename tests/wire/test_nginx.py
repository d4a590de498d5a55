# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""Real nginx, with its limits."""

import os
import shutil
import signal
import socket
import subprocess

import pytest

from netqueue.lab.serverprocess import accepts
from support.asking import wait_until

CONFIG = """
daemon off;
{user}
pid {folder}/pid;
worker_processes 1;
error_log {folder}/error.log;
events {{ worker_connections 64; }}
http {{
    access_log {folder}/access.log combined buffer=1k flush=10ms;
    log_format connections '$connection $request_uri $status';
    access_log {folder}/connections.log connections;
    client_body_temp_path {folder}/t1; proxy_temp_path {folder}/t2; fastcgi_temp_path {folder}/t3;
    uwsgi_temp_path {folder}/t4; scgi_temp_path {folder}/t5;
    limit_conn_zone $binary_remote_addr zone=address:1m;
    limit_req_zone $binary_remote_addr zone=rate:1m rate=200r/s;
    keepalive_requests 10;
    server {{
        listen 127.0.0.1:{port};
        root {folder}/root;
        location /one/ {{ limit_conn address 1; limit_rate 200k; }}
        location /rate/ {{ limit_req zone=rate burst=1 nodelay; }}
        location /keep/ {{ alias {folder}/root/; keepalive_requests 1000; }}
    }}
}}
"""


class Nginx:
    def __init__(self, folder):
        self.folder = folder
        with socket.create_server(("127.0.0.1", 0)) as sock:
            self.port = sock.getsockname()[1]
        for name in ("", "one", "rate"):
            (folder / "root" / name).mkdir(parents=True, exist_ok=True)
            (folder / "root" / name / "x").write_bytes(b"content" * 1000)
        user = "user root;" if os.getuid() == 0 else ""
        (folder / "conf").write_text(CONFIG.format(folder=folder, port=self.port, user=user))
        self._process = subprocess.Popen(["nginx", "-p", str(folder), "-c", str(folder / "conf")],
                                         stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_until(self._accepts, "nginx accepts")

    def _accepts(self):
        assert self._process.poll() is None, (self.folder / "error.log").read_text()
        return accepts(self.port)

    def url(self, path):
        return "http://127.0.0.1:%s%s" % (self.port, path)

    def log(self):
        """(connection, status) of each request"""
        lines = [line.split() for line in (self.folder / "connections.log").read_text().splitlines()]
        return [(line[0], line[2]) for line in lines]

    def stop(self):
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(15)


@pytest.fixture
def nginx(tmp_path):
    if not shutil.which("nginx"):
        pytest.skip("no nginx")
    server = Nginx(tmp_path)
    yield server
    server.stop()


def test_keepalive_requests(nginx, asking):
    """It closes each connection after ten answers, and announces that."""
    asked = asking.ask("GET", [nginx.url("/x?%s" % i) for i in range(100)])
    assert [one.status() for one in asked] == [200] * 100
    wait_until(lambda: len(nginx.log()) >= 100, "the log is written")
    log = nginx.log()
    assert len(log) == 100
    assert 10 <= len({connection for connection, _ in log}) <= 13
    assert (asking.count("retries"), asking.count("refusals")) == (0, 0)


def test_keepalive_requests_and_questions(nginx, asking):
    """Also in the middle of a trial of pipelining, which has to be repeated then."""
    asked = asking.ask("HEAD", [nginx.url("/x?%s" % i) for i in range(100)])
    assert [one.status() for one in asked] == [200] * 100
    assert (asking.count("retries"), asking.count("refusals")) == (0, 0)


def test_one_connection_an_address(nginx, asking):
    """limit_conn 1: 503 on further connections; their number falls to what it allows, and all is fetched."""
    asked = asking.ask("GET", [nginx.url("/one/x")] * 20)
    assert [one.status() for one in asked] == [200] * 20
    assert [one.body() for one in asked] == [b"content" * 1000] * 20
    assert asking.troubles() == []


def test_rate(nginx, asking):
    """limit_req: requests are refused, and repeated after a pause."""
    asked = asking.ask("HEAD", [nginx.url("/rate/x?%s" % i) for i in range(15)])
    assert [one.status() for one in asked] == [200] * 15
    assert asking.troubles() == []


def test_pipelined(nginx, make_asking):
    """All at once on a single connection, also files that do not exist."""
    asking = make_asking(1)
    paths = ["/%s?%s" % ("x" if i % 3 else "missing", i) for i in range(200)]
    asked = asking.ask("HEAD", [nginx.url("/keep" + path) for path in paths])
    assert [one.status() for one in asked] == [200 if i % 3 else 404 for i in range(200)]
    assert asking.count("connections") == 1
    wait_until(lambda: len(nginx.log()) >= 201, "the log is written")
    assert len(nginx.log()) == 201


def test_files_and_times(nginx, asking):
    os.utime(nginx.folder / "root" / "x", (1594105627, 1594105627))
    asked = asking.ask("GET", [nginx.url("/x")] * 8)
    for one in asked:
        response, error = one.wait()
        assert error is None
        assert response.headers["last-modified"] == "Tue, 07 Jul 2020 07:07:07 GMT"
        assert one.body() == b"content" * 1000


def test_long_file(nginx, asking):
    content = os.urandom(20 * 1024 * 1024)
    (nginx.folder / "root" / "long").write_bytes(content)
    asked = asking.ask("GET", [nginx.url("/long")] * 4)
    assert [one.status() for one in asked] == [200] * 4
    assert [one.body() == content for one in asked] == [True] * 4
