# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""URLs, redirects and routes, without a network."""

import base64

import pytest

from bb.connections.request import MAX_REDIRECTS, Request, redact, route, Origin

ORIGIN = Origin("http", "mirror.example", 80, "")
SECURE = Origin("https", "mirror.example", 443, "")


def make(url, **members):
    return Request("HEAD", url, members.pop("environment", {}), **members)


@pytest.mark.parametrize("url, origin, target", [
    ("http://Mirror.Example/a/b%3Ac?d=e#f", ("http", "mirror.example", 80, ""), "/a/b%3Ac?d=e"),
    ("https://mirror.example", ("https", "mirror.example", 443, ""), "/"),
    ("https://user:secret@mirror.example:8443/x", ("https", "mirror.example", 8443, "user"), "/x"),
    ("http://[::1]:8080/x", ("http", "::1", 8080, ""), "/x"),
])
def test_url(url, origin, target):
    request = make(url)
    assert tuple(request.origin) == origin
    assert request.target == target


@pytest.mark.parametrize("url", [
    "ftp://mirror.example/x", "file:///etc/passwd", "http:///x", "mirror.example/x", "",
    "http://mirror.example/a b", "http://mirror.example/a\r\nX: y", "http://mirror.example/\u00e9",
    "http://mirror.example:port/", "http://mirror.example:99999/", "http://[::1/x",
])
def test_url_that_cannot_be_asked_for(url):
    with pytest.raises(ValueError):
        make(url)


@pytest.mark.parametrize("url", [
    "ftp://user:secret@mirror.example/x?token=secret",
    "http://user:secret@mirror.example/a b",
    "http://user:secret@mirror.example/\u00e9",
    "http://user:secret@mirror.example:port/",
    "http://user:secret@\uff0fmirror.example/",
])
def test_errors_hold_no_credentials(url):
    with pytest.raises(ValueError) as error:
        make(url)
    assert "secret" not in str(error.value)


def test_redact():
    assert redact("https://user:se@cret@mirror.example:8/x?token=secret#f") == "https://mirror.example:8/x"


@pytest.mark.parametrize("location, url", [
    ("b", "https://mirror.example/dir/b"),
    ("/b", "https://mirror.example/b"),
    ("//other.example/b", "https://other.example/b"),
    ("http://other.example/b c", "http://other.example/b%20c"),
    ("?q=1", "https://mirror.example/dir/a?q=1"),
])
def test_redirect(location, url):
    request = make("https://mirror.example/dir/a")
    request.redirect(location)
    assert request.url == url
    assert request.redirects == 1


@pytest.mark.parametrize("location, kept", [
    ("/b", True), ("https://mirror.example:443/b", True), ("https://MIRROR.example/b", True),
    ("http://mirror.example/b", False), ("https://mirror.example:444/b", False), ("https://other.example/b", False),
    ("https://sub.mirror.example/b", False),
])
def test_credentials_never_cross_an_origin(location, kept):
    request = make("https://mirror.example/a", authorization="Basic x")
    request.redirect(location)
    assert request.authorization == ("Basic x" if kept else None)


def test_credentials_do_not_come_back():
    request = make("https://mirror.example/a", authorization="Basic x")
    request.redirect("https://other.example/")
    request.redirect("https://mirror.example/a")
    assert request.authorization is None


def test_credentials_of_a_location_are_ignored():
    request = make("https://mirror.example/a")
    request.redirect("https://user:secret@other.example/b")
    assert request.url == "https://other.example/b"
    assert request.origin.user == ""
    assert request.authorization is None


@pytest.mark.parametrize("location", ["file:///etc/passwd", "ftp://mirror.example/x", "http://mirror.example:x/"])
def test_redirect_that_cannot_be_followed(location):
    with pytest.raises(ValueError):
        make("http://mirror.example/a").redirect(location)


@pytest.mark.parametrize("origin, environment, proxy", [
    (ORIGIN, {}, None),
    (ORIGIN, {"http_proxy": "http://proxy.example:3128"}, ("proxy.example", 3128, None)),
    (ORIGIN, {"HTTP_PROXY": "proxy.example"}, ("proxy.example", 80, None)),
    (ORIGIN, {"http_proxy": "http://a.example", "HTTP_PROXY": "http://b.example"}, ("a.example", 80, None)),
    (ORIGIN, {"https_proxy": "http://proxy.example:3128"}, None),
    (SECURE, {"https_proxy": "http://proxy.example:3128"}, ("proxy.example", 3128, None)),
    (ORIGIN, {"http_proxy": "http://proxy.example", "no_proxy": "mirror.example"}, None),
    (ORIGIN, {"http_proxy": "http://proxy.example", "NO_PROXY": "other, .example"}, None),
    (ORIGIN, {"http_proxy": "http://proxy.example", "no_proxy": "mirror.example:80"}, None),
    (ORIGIN, {"http_proxy": "http://proxy.example", "no_proxy": "*"}, None),
    (ORIGIN, {"http_proxy": "http://proxy.example", "no_proxy": "rror.example"}, ("proxy.example", 80, None)),
    (ORIGIN, {"http_proxy": "http://proxy.example", "no_proxy": "mirror.example:81"}, ("proxy.example", 80, None)),
])
def test_route(origin, environment, proxy):
    assert route(origin, environment, True).proxy == proxy


def test_credentials_of_a_proxy():
    proxy = route(ORIGIN, {"http_proxy": "http://us%40er:pass%3Aword@proxy.example"}, True).proxy
    assert proxy[:2] == ("proxy.example", 80)
    assert base64.b64decode(proxy[2].partition(" ")[2]) == b"us@er:pass:word"


@pytest.mark.parametrize("proxy", ["socks5://user:secret@proxy.example", "https://user:secret@proxy.example", "http://"])
def test_proxy_of_another_kind(proxy):
    with pytest.raises(ValueError) as error:
        route(ORIGIN, {"http_proxy": proxy}, True)
    assert "secret" not in str(error.value)


def test_certificates_belong_to_https_routes_only():
    environment = {"SSL_CERT_FILE": "/ca", "SSL_CERT_DIR": "/cas"}
    assert route(SECURE, environment, False)[1:] == ("/ca", "/cas", False)
    assert route(ORIGIN, environment, False) == route(ORIGIN, {}, True)


def test_one_route_per_environment():
    assert make("https://m.example/a", environment={"SSL_CERT_FILE": "/1"}).route \
        != make("https://m.example/a", environment={"SSL_CERT_FILE": "/2"}).route
    assert MAX_REDIRECTS >= 5
