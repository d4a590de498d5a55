# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""URLs, redirects and routes, without a network."""

import base64

import pytest

from bb.connections import DestinationError
from bb.connections.request import Request, Response, redact

PLAIN = "http://mirror.example/x"
SECURE = "https://mirror.example/x"


def make(url, environment=None, **members):
    return Request("HEAD", url, environment or {}, **members)


@pytest.mark.parametrize("url, origin, target", [
    ("http://Mirror.Example/a/b%3Ac?d=e#f", ("http", "mirror.example", 80, ""), "/a/b%3Ac?d=e"),
    ("https://mirror.example", ("https", "mirror.example", 443, ""), "/"),
    ("https://user:secret@mirror.example:8443/x", ("https", "mirror.example", 8443, "user"), "/x"),
    ("http://[::1]:8080/x", ("http", "::1", 8080, ""), "/x"),
    ("HTTP://mirror.example:/?d=e", ("http", "mirror.example", 80, ""), "/?d=e"),
    ("http://mirror.example?d=e", ("http", "mirror.example", 80, ""), "/?d=e"),
    ("http://us@er:se@cr:et@mirror.example/x", ("http", "mirror.example", 80, "us@er"), "/x"),
    ("sftp://us%40er@[::1]:22/a%20b?c", ("sftp", "::1", 22, "us@er"), b"/a b"),
    ("sftp://Alias/~/x", ("sftp", "Alias", 0, ""), b"x"),
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


@pytest.mark.parametrize("credentials", ["user:secret@", "user:se@cret@", "user:se?cret@", "user:se#cret@", "user@", ""])
def test_redact(credentials):
    assert redact("https://%smirror.example:8/x//y@z?token=secret#f" % credentials) == "https://mirror.example:8/x//y@z"


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


@pytest.mark.parametrize("url, environment, proxy", [
    (PLAIN, {}, None),
    (PLAIN, {"http_proxy": "http://proxy.example:3128"}, ("proxy.example", 3128, None)),
    (PLAIN, {"HTTP_PROXY": "proxy.example"}, ("proxy.example", 80, None)),
    (PLAIN, {"http_proxy": "http://a.example", "HTTP_PROXY": "http://b.example"}, ("a.example", 80, None)),
    (PLAIN, {"https_proxy": "http://proxy.example:3128"}, None),
    (SECURE, {"https_proxy": "http://proxy.example:3128"}, ("proxy.example", 3128, None)),
    (PLAIN, {"http_proxy": "http://proxy.example", "no_proxy": "mirror.example"}, None),
    (PLAIN, {"http_proxy": "http://proxy.example", "NO_PROXY": "other, .example"}, None),
    (PLAIN, {"http_proxy": "http://proxy.example", "no_proxy": "mirror.example:80"}, None),
    (PLAIN, {"http_proxy": "http://proxy.example", "no_proxy": "*"}, None),
    (PLAIN, {"http_proxy": "http://proxy.example", "no_proxy": "rror.example"}, ("proxy.example", 80, None)),
    (PLAIN, {"http_proxy": "http://proxy.example", "no_proxy": "mirror.example:81"}, ("proxy.example", 80, None)),
])
def test_route(url, environment, proxy):
    assert make(url, environment).route.proxy == proxy


def test_credentials_of_a_proxy():
    proxy = make(PLAIN, {"http_proxy": "http://us%40er:pass%3Aword@proxy.example"}).route.proxy
    assert proxy[:2] == ("proxy.example", 80)
    assert base64.b64decode(proxy[2].partition(" ")[2]) == b"us@er:pass:word"


@pytest.mark.parametrize("proxy", ["socks5://user:secret@proxy.example", "https://user:secret@proxy.example", "http://",
                                   "http://user:sec/ret@proxy.example", "http://user:secret@proxy.example:port"])
def test_proxy_of_another_kind(proxy):
    with pytest.raises(ValueError) as error:
        make(PLAIN, {"http_proxy": proxy})
    assert "sec" not in str(error.value)


def test_certificates_belong_to_https_routes_only():
    environment = {"SSL_CERT_FILE": "/ca", "SSL_CERT_DIR": "/cas"}
    route = make(SECURE, environment, verify=False).route
    assert (route.cafile, route.capath, route.verify) == ("/ca", "/cas", False)
    assert make(PLAIN, environment, verify=False).route == make(PLAIN).route


def test_one_route_for_each_set_of_certificates():
    assert make(SECURE, {"SSL_CERT_FILE": "/1"}).route != make(SECURE, {"SSL_CERT_FILE": "/2"}).route
    assert make(SECURE, {"SSL_CERT_FILE": "/1"}).route == make(SECURE, {"SSL_CERT_FILE": "/1", "HOME": "/h"}).route


def test_another_route_authorization_or_url_is_another_question():
    """Requests with equal keys share one answer."""
    keys = {make(SECURE).key, make(SECURE, {"https_proxy": "http://proxy.example"}).key, make(SECURE, verify=False).key,
            make(SECURE, authorization="Basic eA==").key, make(SECURE + "?y").key}
    assert len(keys) == 5
    assert make(SECURE, {"HOME": "/h"}).key == make(SECURE).key


def test_redirect_keeps_the_key():
    request = make(SECURE)
    key = request.key
    request.redirect("https://other.example/y")
    assert request.key == key


@pytest.mark.parametrize("one, other", [({"etag": '"a"'}, {"etag": '"b"'}), ({"etag": '"a"'}, {}),
                                        ({"last-modified": "Tue, 07 Jul 2020 07:07:07 GMT"}, {})])
def test_validators(one, other):
    assert Response(200, one, 1).validators != Response(200, other, 1).validators
    assert Response(200, one, 1).validators == Response(200, dict(one, date="now"), 2).validators


@pytest.mark.parametrize("received, empty, left", [(0, False, b""), (5, True, b""), (0, True, b"old content")])
def test_begin_body(tmp_path, received, empty, left):
    """A file that is known to be empty is not truncated: ext4 would write it to the disk on close()."""
    with open(tmp_path / "file", "w+b") as f:
        f.write(b"old content")
        f.flush()
        request = Request("GET", PLAIN, {}, fd=f.fileno(), empty=empty)
        request.received = received
        request.begin_body()
        assert (tmp_path / "file").read_bytes() == left
        assert request.received == 0


def test_begin_body_of_a_file_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_bytes(b"old content")
    with open(tmp_path / "file", "rb") as f:
        with pytest.raises(DestinationError):
            Request("GET", PLAIN, {}, fd=f.fileno()).begin_body()
