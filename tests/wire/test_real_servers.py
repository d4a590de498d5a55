# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""Servers and proxies that mirrors run on, with their limits: all is found, fetched and right, over few connections.

nginx and OpenSSH have test_nginx.py and test_sshd.py.
"""

import os
import random
import shutil
import struct
import subprocess
import tempfile
import types
from pathlib import Path

import pytest

from netqueue.lab import mirror
from netqueue.lab.nginx import find_nginx
from support.asking import wait_until
from support.realservers import Apache, Haproxy, Lighttpd, Proftpd, Squid, Tinyproxy

# Files that there are, from 1 byte to 1 MiB, and further ones that there are not
PRESENT, ABSENT = 160, 80
LONG = 12
# Idle connections are kept for longer than anything here may take
KEEP_ALIVE = "KeepAlive On\nMaxKeepAliveRequests 0\nKeepAliveTimeout 60\n"


@pytest.fixture(scope="session")
def files():
    """A folder that everybody may read, and {name: content}"""
    folder = Path(tempfile.mkdtemp(prefix="netqueue-files-"))
    folder.chmod(0o755)
    rng = random.Random(16)
    sizes = [round(2 ** (20 * place / (LONG - 1))) for place in range(LONG)] + [100 + 7 * i for i in range(PRESENT - LONG)]
    contents = {"f%d" % number: rng.randbytes(size) for number, size in enumerate(rng.sample(sizes, PRESENT))}
    for number, (name, content) in enumerate(contents.items()):
        (folder / name).write_bytes(content)
        (folder / name).chmod(0o644)
        # As those of a mirror, they are of different times
        os.utime(folder / name, (1594105627 + 60 * number,) * 2)
    yield types.SimpleNamespace(folder=folder, contents=contents)
    shutil.rmtree(folder)


@pytest.fixture
def nginx(files):
    """Called with what serve() takes, returns one that serves files."""
    if not find_nginx():
        pytest.skip("nginx is not installed")
    contexts = []

    def make(**options):
        contexts.append(mirror.serve(files.folder, server="nginx", **options))
        return contexts[-1].__enter__()

    yield make
    for context in contexts:
        context.__exit__(None, None, None)


def head_all(asking, url, files, environment=None):
    """Ask for all files and some that there are not, a third, in one batch."""
    names = list(files.contents) + ["absent%d" % number for number in range(ABSENT)]
    random.Random(1).shuffle(names)
    asked = asking.ask("HEAD", ["%s/%s" % (url, name) for name in names], environment)
    assert [one.status() for one in asked] == [200 if name in files.contents else 404 for name in names]
    sizes = [len(files.contents[name]) if name in files.contents else None for name in names]
    assert [one.wait()[0].length if size is not None else None for one, size in zip(asked, sizes)] == sizes


def get_all(asking, url, files, environment=None):
    names = list(files.contents)
    asked = asking.ask("GET", ["%s/%s" % (url, name) for name in names], environment, first=False)
    assert [one.status() for one in asked] == [200] * len(names)
    assert [name for name, one in zip(names, asked) if one.body() != files.contents[name]] == []


def restore(make_asking, url, files, environment=None, known=True):
    """What a build asks for: first what there is, then files; without the first if it is not known. Returns the Asking."""
    asking = make_asking(4, most=16)
    if known:
        head_all(asking, url, files, environment)
    get_all(asking, url, files, environment)
    assert asking.troubles() == []
    return asking


REQUESTS = PRESENT + ABSENT + PRESENT


# Apache

@pytest.mark.parametrize("mpm", ["event", "worker", "prefork"])
def test_apache(files, make_asking, mpm):
    with Apache(files.folder, KEEP_ALIVE, mpm) as server:
        asking = restore(make_asking, server.url, files)
        assert server.connections(REQUESTS) <= 8
        assert (asking.count("refusals"), asking.count("files")) == (0, PRESENT)


@pytest.mark.parametrize("limit, connections", [(0, 8), (20, REQUESTS / 20 * 1.5)])
def test_apache_with_tls(files, make_asking, certificates, trusting, limit, connections):
    """It closes a connection after so many requests, 0 for never"""
    extra = "KeepAlive On\nMaxKeepAliveRequests %d\n" % limit
    with Apache(files.folder, extra, "prefork", certificates) as server:
        asking = restore(make_asking, server.url, files, trusting)
        assert server.connections(REQUESTS) <= connections
        assert (asking.count("refusals"), asking.count("files")) == (0, PRESENT)


def test_apache_without_questions(files, make_asking):
    """GETs of files of which nothing is known"""
    with Apache(files.folder, KEEP_ALIVE) as server:
        restore(make_asking, server.url, files, known=False)
        assert server.connections(PRESENT) <= 8


def test_apache_with_two_workers(files, make_asking):
    """Further connections are accepted by the kernel, and served when one of the two has ended. That is not waited for."""
    extra = KEEP_ALIVE + "StartServers 2\nMinSpareServers 1\nMaxSpareServers 2\nServerLimit 2\nMaxRequestWorkers 2\n"
    with Apache(files.folder, extra, "prefork") as server:
        asking = restore(make_asking, server.url, files)
        assert asking.count("files") == PRESENT
        assert server.connections(REQUESTS) <= 8


def test_apache_without_keep_alive(files, make_asking):
    """A connection for each request, as with stock, and no more"""
    with Apache(files.folder, "KeepAlive Off\n") as server:
        asking = restore(make_asking, server.url, files)
        assert asking.count("files") == PRESENT
        assert server.connections(REQUESTS) <= 1.1 * REQUESTS


def test_apache_that_closes_after_five(files, make_asking):
    with Apache(files.folder, "KeepAlive On\nMaxKeepAliveRequests 5\n") as server:
        asking = restore(make_asking, server.url, files)
        assert server.connections(REQUESTS) <= REQUESTS / 5 * 1.3
        assert asking.count("refusals") == 0


def test_apache_with_a_rate(files, make_asking):
    """mod_ratelimit: so many KiB a second of each connection"""
    extra = KEEP_ALIVE + """
LoadModule ratelimit_module /usr/lib/apache2/modules/mod_ratelimit.so
SetOutputFilter RATE_LIMIT
SetEnv rate-limit 800
"""
    with Apache(files.folder, extra) as server:
        asking = restore(make_asking, server.url, files)
        assert asking.count("files") == PRESENT
        assert server.connections(REQUESTS) <= 20


# lighttpd

@pytest.mark.parametrize("requests, connections", [(0, REQUESTS), (100, 12), (1000, 8)])
def test_lighttpd(files, make_asking, requests, connections):
    """It closes a connection after so many requests besides the first"""
    with Lighttpd(files.folder, "server.max-keep-alive-requests = %d" % requests) as server:
        asking = restore(make_asking, server.url, files)
        assert server.connections(REQUESTS) <= connections * 1.1
        assert (asking.count("refusals"), asking.count("files")) == (0, PRESENT)


def test_lighttpd_with_two_connections(files, make_asking):
    """What is more is accepted when one of these has ended. That is not waited for."""
    extra = "server.max-connections = 2\nserver.max-keep-alive-requests = 1000\nserver.max-keep-alive-idle = 60\n"
    with Lighttpd(files.folder, extra) as server:
        asking = restore(make_asking, server.url, files)
        assert asking.count("files") == PRESENT
        assert server.connections(REQUESTS) <= 8


# haproxy

@pytest.mark.parametrize("reuse", ["never", "safe", "aggressive", "always"])
def test_haproxy(files, nginx, make_asking, reuse):
    with Haproxy(nginx().port, extra="http-reuse " + reuse) as server:
        asking = restore(make_asking, server.url, files)
        assert server.connections(REQUESTS) <= 8
        assert (asking.count("refusals"), asking.count("files")) == (0, PRESENT)


@pytest.mark.parametrize("front, limit", [("maxconn 2", ""), ("", "maxconn 2")])
def test_haproxy_with_two_connections(files, nginx, make_asking, front, limit):
    """In front, or to the server behind it"""
    with Haproxy(nginx().port, front, limit=limit) as server:
        asking = restore(make_asking, server.url, files)
        assert asking.count("files") == PRESENT
        assert server.connections(REQUESTS) <= 8


def test_haproxy_with_a_rate(files, nginx, make_asking):
    """429 for more than 100 requests within a second, those that are refused among them"""
    front = """
    stick-table type ip size 1k expire 10s store http_req_rate(1s)
    http-request track-sc0 src
    http-request deny deny_status 429 if { sc_http_req_rate(0) gt 100 }
"""
    with Haproxy(nginx().port, front) as server:
        asking = restore(make_asking, server.url, files)
        assert asking.count("files") == PRESENT
        assert server.connections(REQUESTS) <= 8
        log = server.log()
        assert len([line for line in log if line[1] == "429"]) > 0
        # Once the limit has been met
        later = [line for line in log if float(line[2]) > float(log[0][2]) + 1]
        assert len([line for line in later if line[1] == "429"]) < len(later) / 5


# Proxies

def proxied(proxy, **variables):
    return dict(variables, http_proxy=proxy.url, https_proxy=proxy.url)


def test_squid(files, nginx, make_asking):
    origin = nginx()
    with Squid("cache deny all") as proxy:
        asking = restore(make_asking, origin.url, files, proxied(proxy))
        assert origin.counters().requests >= REQUESTS
        assert proxy.connections(REQUESTS) <= 8
        assert (asking.count("refusals"), asking.count("files")) == (0, PRESENT)


def test_squid_that_caches(files, nginx, make_asking):
    """For two builds: the second has all files from it"""
    origin = nginx()
    with Squid("cache_mem 32 MB\nmaximum_object_size_in_memory 2 MB\n") as proxy:
        for _ in range(2):
            restore(make_asking, origin.url, files, proxied(proxy))
        assert origin.counters().methods["GET"] == PRESENT
        assert proxy.connections(2 * REQUESTS) <= 16


def test_squid_before_the_mirror(files, nginx, make_asking):
    """As a server that others ask"""
    origin = nginx()
    extra = "cache_peer 127.0.0.1 parent %d 0 no-query originserver\n" % origin.port
    with Squid(extra, "accel defaultsite=localhost no-vhost") as server:
        restore(make_asking, server.url, files)
        assert server.connections(REQUESTS) <= 8


def test_squid_and_https(files, nginx, make_asking, certificates, trusting):
    """CONNECT"""
    origin = nginx(protocol="https", certificates=certificates)
    with Squid() as proxy:
        asking = restore(make_asking, origin.url, files, proxied(proxy, **trusting))
        assert asking.count("files") == PRESENT
        assert origin.counters().connections <= 8


def test_tinyproxy(files, nginx, make_asking):
    """It closes the connection after each answer"""
    origin = nginx()
    with Tinyproxy() as proxy:
        asking = restore(make_asking, origin.url, files, proxied(proxy))
        assert asking.count("files") == PRESENT
        assert asking.count("connections") <= 1.1 * REQUESTS


def test_tinyproxy_and_https(files, nginx, make_asking, certificates, trusting):
    origin = nginx(protocol="https", certificates=certificates)
    with Tinyproxy() as proxy:
        asking = restore(make_asking, origin.url, files, proxied(proxy, **trusting))
        assert origin.counters().connections == asking.count("connections") <= 8


# proftpd

def with_tools(server):
    return {"PATH": "%s:%s" % (server.tools, os.environ["PATH"]), "HOME": os.environ.get("HOME", "/")}


@pytest.mark.parametrize("extra, most", [("", 4), ("MaxClientsPerHost 1", 1), ("MaxConnectionsPerHost 1", 1)])
def test_proftpd(files, make_asking, extra, most):
    with Proftpd(files.folder, extra) as server:
        asking = restore(make_asking, server.url, files, with_tools(server))
        assert asking.count("files") == PRESENT
        assert 1 <= asking.count("connections") <= most


def test_proftpd_that_ends_idle_sessions(files, make_asking):
    """Between the query and the first task"""
    with Proftpd(files.folder, "TimeoutIdle 1") as server:
        asking = make_asking()
        head_all(asking, server.url, files, with_tools(server))
        wait_until(lambda: server.sessions() == 0, "the sessions have ended")
        get_all(asking, server.url, files, with_tools(server))
        assert asking.troubles() == []
        assert 2 <= asking.count("connections") <= 8


def test_proftpd_that_is_full(files, make_asking):
    """Another client has the only session there may be: that is a refusal, and ends with it"""
    with Proftpd(files.folder, "MaxClients 1") as server:
        other = subprocess.Popen([server.tools / "ssh", "-p", str(server.port), "-s", "127.0.0.1", "sftp"],
                                 stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            # It counts once it has greeted
            other.stdin.write(struct.pack(">IBI", 5, 1, 3))
            other.stdin.flush()
            assert len(other.stdout.read(9)) == 9
            asking = make_asking()
            one, = asking.ask("HEAD", [server.url + "/f1"], with_tools(server))
            wait_until(lambda: asking.count("refusals"), "it is refused")
        finally:
            other.kill()
            other.communicate()
        assert one.status() == 200
        assert asking.troubles() == []
