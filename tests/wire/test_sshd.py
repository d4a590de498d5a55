# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""SFTPConnection with a real OpenSSH sshd and the real ssh."""

import os
import select
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from bb.connections import ConnectError, Disconnected, RefusedError
from bb.connections.pool import Pool
from bb.connections.sftp import SFTPConnection
from netqueue import sshd
from support.asking import Asked, ask_all, wait_until

FILES = 400
BIG = 20 * 1024 * 1024


def content(i):
    return b"sstate object %d\n" % i * (i * i % 1000)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("sftp")
    for i in range(FILES):
        (made / str(i)).write_bytes(content(i))
    (made / "big").write_bytes(os.urandom(BIG))
    (made / "gr\u00fcn +%41 x").write_bytes(b"name")
    return made


@pytest.fixture
def serve(folder):
    """Called with what sshd.serve() takes starts an sshd, which is stopped at the end."""
    if sshd.missing():
        pytest.skip("%s is not installed" % sshd.missing())
    contexts = []

    def make(**options):
        contexts.append(sshd.serve(folder, **options))
        return contexts[-1].__enter__()

    yield make
    for context in contexts:
        context.__exit__(None, None, None)


@pytest.fixture
def mirror(serve):
    return serve()


@pytest.fixture
def connect():
    """Called with a mirror returns a connection to it, which is closed at the end."""
    made = []

    def make(mirror, tools=None, timeout=20, **environment):
        environment["PATH"] = path(mirror, tools)
        request = Asked("HEAD", mirror.url + "/0", environment).request
        made.append(SFTPConnection(request.origin, request.route, timeout))
        made[-1].connect()
        return made[-1]

    yield make
    for connection in made:
        connection.close()


def path(mirror, tools=None):
    return "%s:%s" % (tools or mirror.tools, os.environ["PATH"])


def ask(connection, method, urls, depth=64):
    """Asked objects of all URLs, each answered"""
    asked = [Asked(method, url) for url in urls]
    waiting = [one.request for one in reversed(asked)]
    while waiting or connection.in_flight:
        room = min(depth - len(connection.in_flight), len(waiting))
        if room:
            connection.send([waiting.pop() for _ in range(room)])
        for request, response, error in connection.receive():
            request.done(request, response, error)
    return asked


def numbered(mirror, numbers):
    return ["%s/%s" % (mirror.url, i) for i in numbers]


def test_head(mirror, connect):
    asked = ask(connect(mirror), "HEAD", numbered(mirror, range(FILES + 100)))
    assert [one.status() for one in asked] == [200] * FILES + [404] * 100
    assert [one.wait()[0].length for one in asked[:FILES]] == [len(content(i)) for i in range(FILES)]
    counters = mirror.counters()
    assert (counters.connections, counters.logins, counters.sessions) == (1, 1, 1)
    if (mirror.work / "sessions").exists():
        assert counters.stats == FILES + 100


@pytest.mark.parametrize("log", [True, False])
def test_get(serve, connect, log):
    mirror = serve(log=log)
    connection = connect(mirror)
    for part in range(0, FILES, 100):
        asked = ask(connection, "GET", numbered(mirror, range(part, part + 100)))
        assert [one.status() for one in asked] == [200] * 100
        assert [one.body() for one in asked] == [content(i) for i in range(part, part + 100)]
    assert ask(connection, "GET", [mirror.url + "/absent"])[0].status() == 404
    if (mirror.work / "sessions").exists():
        counters = mirror.counters()
        # The last was only asked for
        assert counters.opens >= FILES and counters.closes == FILES


def test_big(mirror, folder, connect):
    """Beside small ones, which do not wait for its end"""
    connection = connect(mirror)
    asked = [Asked("GET", url) for url in [mirror.url + "/big"] + numbered(mirror, range(50))]
    connection.send([one.request for one in asked])
    order = []
    while connection.in_flight:
        for request, response, error in connection.receive():
            order.append(request)
            request.done(request, response, error)
    assert asked[0].body() == (folder / "big").read_bytes()
    assert [one.body() for one in asked[1:]] == [content(i) for i in range(50)]
    assert order[-1] is asked[0].request


def test_home(mirror, folder, connect):
    home = os.path.realpath(os.path.expanduser("~%s" % mirror.user))
    if not os.path.isdir(home):
        pytest.skip("%s has no home directory" % mirror.user)
    name = os.path.relpath(os.path.realpath(folder), home)
    url = "sftp://%s:%s/~/%s/7" % (mirror.host, mirror.port, name)
    connection = connect(mirror)
    assert ask(connection, "HEAD", [url])[0].wait()[0].length == len(content(7))
    assert ask(connection, "GET", [url])[0].body() == content(7)


def test_names(mirror, connect):
    url = mirror.url + "/gr%C3%BCn%20+%2541%20x"
    assert ask(connect(mirror), "GET", [url])[0].body() == b"name"


def test_what_is_no_file(mirror, connect):
    connection = connect(mirror)
    for method in ("HEAD", "GET"):
        asked = ask(connection, method, [mirror.url, mirror.url + "/absent", mirror.url + "/0/x", mirror.url + "/3"])
        assert [one.status() for one in asked] == [404, 404, 404, 200]


def test_denied(serve, connect):
    """For root there is no other way"""
    mirror = serve(extra="ForceCommand internal-sftp -P open")
    connection = connect(mirror)
    assert ask(connection, "GET", [mirror.url + "/1"])[0].status() == 403
    assert ask(connection, "HEAD", [mirror.url + "/1"])[0].status() == 200


def test_wrong_key(mirror, connect, tmp_path):
    sshd.make_key(tmp_path / "other")
    tools = sshd.make_tools(tmp_path / "tools", tmp_path / "other", mirror.work / "known_hosts")
    with pytest.raises(ConnectError, match=r"127\.0\.0\.1: .*Permission denied \(publickey\)") as raised:
        connect(mirror, tools)
    assert not raised.value.retryable


def test_unknown_host_key(mirror, connect, tmp_path):
    tools = sshd.make_tools(tmp_path / "tools", mirror.identity)
    with pytest.raises(ConnectError, match="Host key verification failed") as raised:
        connect(mirror, tools)
    assert not raised.value.retryable


def test_bad_configuration(mirror, connect, tmp_path):
    tools = sshd.make_tools(tmp_path / "tools", mirror.identity)
    (tools / "ssh_config").write_text("Nonsense yes\n")
    with pytest.raises(ConnectError, match="onfiguration option") as raised:
        connect(mirror, tools)
    assert not raised.value.retryable


def test_nobody_listens(mirror, connect):
    mirror.stop()
    with pytest.raises(ConnectError, match="Connection refused") as raised:
        connect(mirror)
    assert raised.value.retryable


def test_no_sftp_there(serve, connect):
    mirror = serve(extra="ForceCommand exit 3")
    with pytest.raises(ConnectError):
        connect(mirror)


def test_noise(serve, connect):
    mirror = serve(extra="ForceCommand echo Welcome here; exec cat")
    with pytest.raises(ConnectError, match="sends 'Welcome here'.*bashrc") as raised:
        connect(mirror)
    assert not raised.value.retryable


def test_many_connections(mirror, connect):
    """One after the other, default MaxStartups drops none of them"""
    connections = [connect(mirror) for _ in range(12)]
    for connection in connections:
        assert ask(connection, "HEAD", [mirror.url + "/0"])[0].status() == 200
    counters = mirror.counters()
    assert (counters.logins, counters.dropped) == (12, 0)


def test_refused(serve, connect):
    """sshd drops what is more than MaxStartups; that is no failure for ever"""
    mirror = serve(extra="MaxStartups 1")
    with socket.create_connection((mirror.address, mirror.port)) as other:
        # It counts as soon as sshd has greeted
        assert other.recv(100).startswith(b"SSH-2.0")
        with pytest.raises(RefusedError):
            connect(mirror)
    wait_until(lambda: _connects(connect, mirror), "sshd has forgotten the other")
    assert mirror.counters().dropped >= 1


def _connects(connect, mirror):
    try:
        return connect(mirror)
    except RefusedError:
        return None


def test_pool(mirror, pool):
    asked = ask_all(pool, "HEAD", numbered(mirror, range(FILES)), environment={"PATH": path(mirror)})
    asked += ask_all(pool, "GET", numbered(mirror, range(FILES // 2)), environment={"PATH": path(mirror)})
    assert [one.status() for one in asked] == [200] * len(asked)
    assert [one.body() for one in asked[FILES:]] == [content(i) for i in range(FILES // 2)]
    counters = mirror.counters()
    assert 1 <= counters.logins <= 4 and counters.dropped == 0


def test_one_login_for_a_few(mirror):
    """Another one takes longer than they do on the session that there is."""
    pool = Pool(4, 64, timeout=10)
    try:
        asked = ask_all(pool, "HEAD", numbered(mirror, range(100)), environment={"PATH": path(mirror)})
        assert [one.status() for one in asked] == [200] * 100
    finally:
        assert pool.stop()
    assert mirror.counters().connections == 1


def test_ipv6(serve, connect):
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no ::1")
    mirror = serve(address="::1")
    assert ask(connect(mirror), "HEAD", [mirror.url + "/5"])[0].status() == 200


def test_agent(mirror, connect, tmp_path):
    if not shutil.which("ssh-agent"):
        pytest.skip("no ssh-agent")
    # The address of a socket has 107 bytes, which a test's own folder may exceed
    address = str(mirror.work / "agent")
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", address], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    try:
        # Says where it listens once it does
        assert select.select([agent.stdout], [], [], 20)[0] and os.read(agent.stdout.fileno(), 1000)
        subprocess.run(["ssh-add", "-q", str(mirror.identity)], check=True, env=dict(os.environ, SSH_AUTH_SOCK=address))
        tools = sshd.make_tools(tmp_path / "tools", None, mirror.work / "known_hosts")
        assert ask(connect(mirror, tools, SSH_AUTH_SOCK=address), "HEAD", [mirror.url + "/5"])[0].status() == 200
        with pytest.raises(ConnectError, match="Permission denied"):
            connect(mirror, tools)
    finally:
        agent.terminate()
        agent.communicate(timeout=20)


def test_lost(mirror, connect):
    connection = connect(mirror)
    assert ask(connection, "HEAD", [mirror.url + "/5"])[0].status() == 200
    mirror.stop()
    asked = Asked("HEAD", mirror.url + "/6")
    connection.send([asked.request])
    with pytest.raises(Disconnected):
        connection.receive()
    assert list(connection.in_flight) == [asked.request]


def test_close(mirror, connect):
    """Whatever is under way, ssh and what it has started at the server's end are gone soon"""
    for urls in ([], [mirror.url + "/big"] * 4):
        connection = connect(mirror)
        connection.send([Asked("GET", url).request for url in urls])
        connection.close()
        assert connection._ssh._process.returncode is not None
    wait_until(lambda: not _sessions(mirror), "the sessions end")


def _sessions(mirror):
    children = Path("/proc/%s/task/%s/children" % (mirror.process.pid, mirror.process.pid))
    return children.read_text().split() if children.exists() else []
