# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""SFTP by a ConnectionServer with a real OpenSSH sshd and the real ssh."""

import asyncio
import os
import select
import shutil
import signal
import socket
import subprocess
from pathlib import Path
from unittest import mock

import pytest

from bb.connections import Cancelled, ConnectError, sftp
from bb.connections.request import Request
from netqueue.lab import sshd
from support.asking import Asked, wait_until

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


def environment(mirror, tools=None, **variables):
    return dict(variables, PATH="%s:%s" % (tools or mirror.tools, os.environ["PATH"]))


def numbered(mirror, numbers):
    return ["%s/%s" % (mirror.url, i) for i in numbers]


def ask(asking, mirror, method, urls, tools=None, **variables):
    return asking.ask(method, urls, environment(mirror, tools, **variables))


def test_head(mirror, make_asking):
    asked = ask(make_asking(connections=1), mirror, "HEAD", numbered(mirror, range(FILES + 100)))
    assert [one.status() for one in asked] == [200] * FILES + [404] * 100
    assert [one.wait()[0].length for one in asked[:FILES]] == [len(content(i)) for i in range(FILES)]
    counters = mirror.counters()
    assert (counters.connections, counters.logins, counters.sessions) == (1, 1, 1)
    if mirror.counts_requests:
        assert counters.stats == FILES + 100


@pytest.mark.parametrize("log", [True, False])
def test_get(serve, make_asking, log):
    mirror = serve(log=log)
    asking = make_asking(connections=1)
    asked = ask(asking, mirror, "GET", numbered(mirror, range(FILES)))
    assert [one.status() for one in asked] == [200] * FILES
    assert [one.body() for one in asked] == [content(i) for i in range(FILES)]
    assert ask(asking, mirror, "GET", [mirror.url + "/absent"])[0].status() == 404
    if mirror.counts_requests:
        counters = mirror.counters()
        # The last was only asked for
        assert counters.opens >= FILES and counters.closes == FILES


def test_big(mirror, folder, make_asking):
    """Beside small ones, which do not wait for its end"""
    asked = [Asked("GET", url, environment(mirror)) for url in [mirror.url + "/big"] + numbered(mirror, range(15))]
    by_request = {one.request: one for one in asked}
    order = []

    def answered(request, response, error):
        order.append(request)
        by_request[request].answer(request, response, error)
    make_asking(connections=1).server.submit(list(by_request), answered, True)
    assert [one.status() for one in asked] == [200] * 16
    assert asked[0].body() == (folder / "big").read_bytes()
    assert [one.body() for one in asked[1:]] == [content(i) for i in range(15)]
    assert order[-1] is asked[0].request


def test_home(mirror, folder, asking):
    home = os.path.realpath(os.path.expanduser("~%s" % mirror.user))
    if not os.path.isdir(home):
        pytest.skip("%s has no home directory" % mirror.user)
    name = os.path.relpath(os.path.realpath(folder), home)
    url = "sftp://%s:%s/~/%s/7" % (mirror.host, mirror.port, name)
    assert ask(asking, mirror, "HEAD", [url])[0].wait()[0].length == len(content(7))
    one, = ask(asking, mirror, "GET", [url])
    assert one.status() == 200
    assert one.body() == content(7)


def test_names(mirror, asking):
    one, = ask(asking, mirror, "GET", [mirror.url + "/gr%C3%BCn%20+%2541%20x"])
    assert one.status() == 200
    assert one.body() == b"name"


@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_not_a_file(mirror, asking, method):
    asked = ask(asking, mirror, method, [mirror.url, mirror.url + "/absent", mirror.url + "/0/x", mirror.url + "/3"])
    assert [one.status() for one in asked] == [404, 404, 404, 200]


def test_denied(serve, asking):
    """For root there is no other way"""
    mirror = serve(extra="ForceCommand internal-sftp -P open")
    assert ask(asking, mirror, "GET", [mirror.url + "/1"])[0].status() == 403
    assert ask(asking, mirror, "HEAD", [mirror.url + "/1"])[0].status() == 200


def fails_at_once(asking, mirror, tools=None):
    """The error of a request for which nothing is tried again"""
    error = ask(asking, mirror, "HEAD", [mirror.url + "/0"], tools)[0].error()
    assert isinstance(error, ConnectError)
    assert not error.retryable
    assert asking.count("retries") == 0
    return str(error)


def connect_error(mirror):
    """The error of a single attempt to connect, which would be tried again for a while"""
    request = Request("HEAD", mirror.url + "/0", environment(mirror))

    async def connect():
        loop = asyncio.get_running_loop()
        with pytest.raises(ConnectError) as error:
            await sftp.connect(loop, mock.Mock(), request.origin, request.route, 15)
        # Until ssh has ended
        await asyncio.gather(*asyncio.all_tasks(loop) - {asyncio.current_task()})
        return error.value
    return asyncio.run(connect())


def test_wrong_key(mirror, asking, tmp_path):
    sshd.make_key(tmp_path / "other")
    tools = sshd.make_tools(tmp_path / "tools", tmp_path / "other", mirror.work / "known_hosts")
    text = fails_at_once(asking, mirror, tools)
    assert "127.0.0.1: " in text and "Permission denied (publickey)" in text
    assert asking.troubles() and asking.troubles()[0][0] == "127.0.0.1"


def test_unknown_host_key(mirror, asking, tmp_path):
    tools = sshd.make_tools(tmp_path / "tools", mirror.identity)
    assert "Host key verification failed" in fails_at_once(asking, mirror, tools)


def test_bad_configuration(mirror, asking, tmp_path):
    tools = sshd.make_tools(tmp_path / "tools", mirror.identity)
    (tools / "ssh_config").write_text("Nonsense yes\n")
    assert "onfiguration option" in fails_at_once(asking, mirror, tools)


def test_route_that_fails_is_no_failure_of_others(mirror, asking, tmp_path):
    """Those with another environment log in"""
    sshd.make_key(tmp_path / "other")
    tools = sshd.make_tools(tmp_path / "tools", tmp_path / "other", mirror.work / "known_hosts")
    fails_at_once(asking, mirror, tools)
    assert ask(asking, mirror, "HEAD", [mirror.url + "/0"])[0].status() == 200


def test_noise(serve, asking):
    mirror = serve(extra="ForceCommand echo Welcome here; exec cat")
    text = fails_at_once(asking, mirror)
    assert "sent 'Welcome here'" in text and "bashrc" in text


def test_nobody_listens(mirror, asking):
    mirror.stop()
    error = connect_error(mirror)
    assert error.retryable and "Connection refused" in str(error)
    # It is waited for: a restart of sshd takes some seconds
    one, = ask(asking, mirror, "HEAD", [mirror.url + "/0"])
    wait_until(lambda: any(host.health.paused_until for host in asking.server.pool.hosts.values()), "it has been tried")
    assert not one.answered
    assert (asking.count("retries"), asking.count("refusals")) == (0, 0)
    assert asking.stop()
    assert isinstance(one.error(), Cancelled)


def test_no_sftp_there(serve):
    error = connect_error(serve(extra="ForceCommand exit 3"))
    assert error.retryable and "ssh exited with status 3" in str(error)


def test_many_logins(mirror, make_asking):
    """One after the other, default MaxStartups drops none of them"""
    asking = make_asking(connections=12)
    # Each file is large enough for a session of its own
    urls = [mirror.url + "/big"] * 24
    asked = ask(asking, mirror, "GET", urls)
    assert [one.status() for one in asked] == [200] * 24
    counters = mirror.counters()
    assert counters.logins > 1
    assert (counters.logins, counters.dropped) == (asking.count("connections"), 0)


def test_refused(serve, asking):
    """sshd drops what is more than MaxStartups; that is tried again"""
    mirror = serve(extra="MaxStartups 1")
    with socket.create_connection((mirror.address, mirror.port)) as other:
        # It counts as soon as sshd has greeted
        assert other.recv(100).startswith(b"SSH-2.0")
        one, = ask(asking, mirror, "HEAD", [mirror.url + "/0"])
        wait_until(lambda: asking.count("refusals"), "sshd refuses")
    assert one.status() == 200
    assert mirror.counters().dropped >= 1
    # The request itself was sent once
    assert asking.count("refusals") >= 1
    assert (asking.count("requests"), asking.count("retries")) == (1, 0)


def test_all_together(mirror, asking):
    asked = ask(asking, mirror, "HEAD", numbered(mirror, range(FILES)))
    asked += ask(asking, mirror, "GET", numbered(mirror, range(FILES // 2)))
    assert [one.status() for one in asked] == [200] * len(asked)
    assert [one.body() for one in asked[FILES:]] == [content(i) for i in range(FILES // 2)]
    counters = mirror.counters()
    assert 1 <= counters.logins <= 4 and counters.dropped == 0


def test_one_login_for_a_few(mirror, asking):
    """Another one takes longer than they do on the session that there is."""
    asked = ask(asking, mirror, "HEAD", numbered(mirror, range(100)))
    assert [one.status() for one in asked] == [200] * 100
    assert mirror.counters().connections == 1


def test_ipv6(serve, asking):
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no ::1")
    mirror = serve(address="::1")
    assert ask(asking, mirror, "HEAD", [mirror.url + "/5"])[0].status() == 200


def test_agent(mirror, asking, tmp_path):
    if not shutil.which("ssh-agent"):
        pytest.skip("no ssh-agent")
    # The address of a socket has 107 bytes, which a test's own folder may exceed
    address = str(mirror.work / "agent")
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", address], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    try:
        # It prints where it listens once it does
        assert select.select([agent.stdout], [], [], 20)[0] and os.read(agent.stdout.fileno(), 1000)
        subprocess.run(["ssh-add", "-q", str(mirror.identity)], check=True, env=dict(os.environ, SSH_AUTH_SOCK=address))
        tools = sshd.make_tools(tmp_path / "tools", None, mirror.work / "known_hosts")
        assert ask(asking, mirror, "HEAD", [mirror.url + "/5"], tools, SSH_AUTH_SOCK=address)[0].status() == 200
        assert "Permission denied" in fails_at_once(asking, mirror, tools)
    finally:
        agent.terminate()
        agent.communicate(timeout=20)


def children_of(pid):
    """Processes that the threads of pid have started, and for which it has not waited"""
    children = []
    for thread in Path("/proc/%s/task" % pid).glob("*"):
        try:
            children += (thread / "children").read_text().split()
        except FileNotFoundError:
            # It has ended meanwhile
            pass
    return children


def own_ssh():
    return set(children_of(os.getpid()))


def test_session_that_is_lost(mirror, asking):
    """The same requests are asked on another one"""
    assert ask(asking, mirror, "HEAD", [mirror.url + "/5"])[0].status() == 200
    session, = children_of(mirror.process.pid)
    # The process of sshd for this session, and what it has started: with OpenSSH 10 the latter has the connection
    for pid in (session, *children_of(session)):
        os.kill(int(pid), signal.SIGKILL)
    assert ask(asking, mirror, "HEAD", [mirror.url + "/6"])[0].status() == 200
    assert asking.count("connections") == 2
    assert asking.count("refusals") == 0


@pytest.mark.parametrize("files", [0, 4])
def test_stop(mirror, make_asking, files):
    """Whatever is under way, ssh and what it has started at the server's end have gone"""
    before = own_ssh()
    asking = make_asking()
    assert ask(asking, mirror, "HEAD", [mirror.url + "/5"])[0].status() == 200
    assert own_ssh() > before
    asked = ask(asking, mirror, "GET", [mirror.url + "/big"] * files)
    assert asking.stop()
    assert all(one.answered for one in asked)
    assert {type(one.wait()[1]) for one in asked} <= {Cancelled, type(None)}
    assert own_ssh() == before
    wait_until(lambda: not children_of(mirror.process.pid), "the sessions end")


def test_stop_during_the_login(mirror, make_asking):
    """It is not interrupted, and its ssh is waited for"""
    before = own_ssh()
    asking = make_asking()
    asked = ask(asking, mirror, "HEAD", [mirror.url + "/5"])
    wait_until(lambda: own_ssh() > before, "ssh is started")
    assert asking.stop()
    assert isinstance(asked[0].error(), Cancelled)
    assert own_ssh() == before
