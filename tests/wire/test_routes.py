# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""Redirects, credentials and proxies: which server receives what."""

import pytest

from bb.connections import ConnectError, StatusError
from bb.connections.request import basic_auth
from support.asking import Asked
from wire import peers

LOGIN = basic_auth("user", "secret")


def ask(asking, url, method="GET", **members):
    asked, = asking.one_by_one(method, [url], **members)
    return asked


def redirects(targets):
    """targets: path to (status, Location); the rest is answered."""
    def script(talk):
        for request in talk.requests():
            if request.target in targets:
                status, location = targets[request.target]
                talk.answer(request, b"moved", "Location: " + location, status=status)
            else:
                talk.answer(request, b"found " + request.target.encode())
    return script


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_relative(peer, asking, status, method):
    there = peer(redirects({"/dir/a": (status, "../b")}))
    asked = ask(asking, there.url("/dir/a"), method, authorization=LOGIN)
    assert asked.status() == 200
    assert method == "HEAD" or asked.body() == b"found /b"
    assert there.targets == ["/dir/a", "/b"]
    assert there.methods == [method] * 2
    assert [r.headers["authorization"] for r in there.requests] == [LOGIN] * 2
    assert there.connections <= 2


def test_other_origin_gets_no_credentials(peer, asking):
    other = peer(redirects({}))
    there = peer(redirects({"/a": (302, other.url("/b", credentials="other:secret@"))}))
    asked = ask(asking, there.url("/a"), authorization=LOGIN)
    assert asked.body() == b"found /b"
    assert there.requests[0].headers["authorization"] == LOGIN
    assert b"uthorization" not in other.received
    assert b"secret" not in other.received


def test_from_https_to_http(peer, asking, tls, trusting):
    other = peer(redirects({}))
    there = peer(redirects({"/a": (302, other.url("/b"))}), tls=tls)
    asked = ask(asking, there.url("/a"), authorization=LOGIN, environment=trusting)
    assert asked.body() == b"found /b"
    assert b"uthorization" not in other.received


def test_loop(peer, asking):
    there = peer(redirects({"/a": (302, "/b"), "/b": (302, "/a")}))
    assert isinstance(ask(asking, there.url("/a")).error(), StatusError)
    assert len(there.requests) == 11


@pytest.mark.parametrize("location", ["file:///etc/passwd", "ftp://127.0.0.1/x", "gopher:x", "http://[::1"])
def test_to_what_is_not_http(peer, asking, location):
    there = peer(redirects({"/a": (302, location)}))
    asked = ask(asking, there.url("/a"))
    assert isinstance(asked.error(), StatusError)
    assert asked.body() == b""
    assert len(there.requests) == 1


def test_without_a_location_is_an_answer(peer, asking):
    assert ask(asking, peer(peers.with_status(302)).url()).status() == 302


def test_body_of_a_redirect_is_not_in_the_file(peer, asking):
    there = peer(redirects({"/a": (302, "/b")}))
    assert ask(asking, there.url("/a")).body() == b"found /b"


def test_http_through_a_proxy(peer, asking):
    proxy = peer(peers.proxy)
    environment = {"http_proxy": proxy.url("", credentials="us%40er:secret@")}
    for url in ("http://mirror.example/a?b", "http://mirror.example:81/a"):
        asked = ask(asking, url, environment=environment, authorization=LOGIN)
        assert asked.body() == b"by proxy " + url.encode()
    assert proxy.targets == ["http://mirror.example/a?b", "http://mirror.example:81/a"]
    request = proxy.requests[0]
    assert request.headers["host"] == "mirror.example"
    assert request.headers["proxy-authorization"] == basic_auth("us@er", "secret")
    assert request.headers["authorization"] == LOGIN


def test_https_through_a_proxy(peer, asking, tls, trusting):
    proxy = peer(peers.proxy)
    proxy.behind = tls
    environment = dict(trusting, https_proxy=proxy.url("", credentials="user:secret@"))
    url = "https://localhost:4443/a"
    for _ in range(2):
        assert ask(asking, url, environment=environment, authorization=LOGIN).status() == 200
    connect, first, second = proxy.requests
    assert (connect.method, connect.target) == ("CONNECT", "localhost:4443")
    assert connect.headers["proxy-authorization"] == basic_auth("user", "secret")
    assert "authorization" not in connect.headers
    # Behind the CONNECT is the origin
    assert first.target == second.target == "/a"
    assert "proxy-authorization" not in first.headers
    assert first.headers["authorization"] == LOGIN
    assert proxy.connections == 1


def test_no_proxy(peer, asking):
    proxy, there = peer(peers.proxy), peer(peers.keep_alive)
    environment = {"http_proxy": proxy.url("", credentials="user:secret@"), "no_proxy": "localhost,127.0.0.1"}
    assert ask(asking, there.url(), environment=environment).body() == b"/x"
    assert proxy.connections == 0
    assert b"Proxy-Auth" not in there.received


def test_routes_are_kept_apart(peer, asking):
    """The same origin for two tasks, of which one has a proxy: never over the other's connection."""
    proxy, there = peer(peers.proxy), peer(peers.keep_alive)
    environments = [{"http_proxy": proxy.url("")}, {}]
    asked = [Asked("GET", there.url("/%s" % i), environments[i % 2]) for i in range(40)]
    asking.submit(*asked)
    for i, one in enumerate(asked):
        assert one.status() == 200
        assert one.body() == (b"/%d" % i if i % 2 else b"by proxy " + there.url("/%s" % i).encode())
    assert len(proxy.requests) == len(there.requests) == 20


@pytest.mark.parametrize("status", [403, 407])
def test_proxy_that_does_not_connect(peer, asking, status):
    """Trying again would not help."""
    proxy = peer(peers.with_status(status))
    asked = ask(asking, "https://mirror.example/", environment={"https_proxy": proxy.url("", credentials="user:secret@")})
    assert isinstance(asked.error(), ConnectError)
    assert str(status) in str(asked.error())
    assert "secret" not in str(asked.error())
    assert proxy.methods == ["CONNECT"]


@pytest.mark.parametrize("status", [502, 503, 504])
def test_proxy_that_cannot_connect_for_now(peer, asking, tls, trusting, status):
    def script(talk):
        if talk.number > 1:
            peers.proxy(talk)
        else:
            talk.answer(talk.request(), status=status)
    proxy = peer(script)
    proxy.behind = tls
    asked = ask(asking, "https://localhost/a", environment=dict(trusting, https_proxy=proxy.url("")))
    assert asked.status() == 200
    assert proxy.connections == 2
    # The request itself was sent once
    assert (asking.count("requests"), asking.count("retries")) == (1, 0)


@pytest.mark.parametrize("answer", [b"SSH-2.0-x\r\n\r\n", b"HTTP/1.1 OK\r\n\r\n", b"HTTP/2 200 Connected\r\n\r\n",
                                    b"x" * 200000])
def test_proxy_that_answers_nonsense(peer, asking, answer):
    def script(talk):
        talk.request()
        talk.send(answer)
        talk.wait_closed()
    asked = ask(asking, "https://mirror.example/", environment={"https_proxy": peer(script).url("")})
    assert isinstance(asked.error(), ConnectError)
    assert asked.error().kind == "connect"


def test_proxy_that_closes_instead_of_an_answer(peer, asking, tls, trusting):
    def script(talk):
        talk.request()
        if talk.number > 1:
            talk.send(b"HTTP/1.1 200 Connected\r\n\r\n")
            talk.start_tls(tls)
            peers.keep_alive(talk)
    proxy = peer(script)
    assert ask(asking, "https://localhost/a", environment=dict(trusting, https_proxy=proxy.url(""))).status() == 200
    assert proxy.connections == 2


def test_what_a_proxy_sends_ahead_of_tls_is_no_answer(peer, asking, tls, trusting):
    """Else whoever sits between could put a plain answer in the place of the https origin's."""
    forged = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nforged"

    def script(talk):
        talk.request()
        talk.send(b"HTTP/1.1 200 Connected\r\n\r\n" + (forged if talk.number == 1 else b""))
        talk.start_tls(tls)
        peers.keep_alive(talk)
    proxy = peer(script)
    asked = ask(asking, "https://localhost/a", environment=dict(trusting, https_proxy=proxy.url("")))
    assert asked.status() == 200
    assert asked.body() == b"/a"
    assert proxy.connections == 2


def test_other_name_behind_a_proxy(peer, asking, tls, trusting):
    """The certificate has to be that of the origin."""
    proxy = peer(peers.proxy)
    proxy.behind = tls
    asked = ask(asking, "https://mirror.example/a", environment=dict(trusting, https_proxy=proxy.url("")))
    assert isinstance(asked.error(), ConnectError)
    assert "certificate" in str(asked.error())
    assert proxy.methods == ["CONNECT"]


def test_proxy_that_nothing_is_known_of(peer, asking):
    with pytest.raises(ValueError):
        Asked("GET", "http://mirror.example/", {"http_proxy": "socks5://127.0.0.1:1"})
