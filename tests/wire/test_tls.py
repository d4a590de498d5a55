# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""https: whose certificate is trusted, and that connections are kept."""

import os
import shutil
import ssl

import pytest

from bb.connections import ConnectError
from bb.connections.pool import Pool
from support.asking import Asked, ask_all
from wire import peers


def ask(pool, url, environment, verify=True):
    asked = Asked("GET", url, environment, verify=verify)
    pool.submit(asked.request)
    asked.wait()
    return asked


def test_ca_of_the_environment(peer, pool, tls, trusting):
    there = peer(peers.keep_alive, tls=tls)
    for i in range(20):
        assert ask(pool, there.url("/%s" % i), trusting).body() == b"/%d" % i
    assert there.connections == 1


def test_at_most_four_handshakes(peer, pool, tls, trusting):
    there = peer(peers.keep_alive, tls=tls)
    asked = ask_all(pool, "GET", [there.url("/%s" % i) for i in range(100)], environment=trusting)
    assert [a.body() for a in asked if a.status()] == [b"/%d" % i for i in range(100)]
    assert there.connections <= 4


def test_ca_folder_of_the_environment(peer, pool, tls, certificates, tmp_path):
    context = ssl.create_default_context(cafile=str(certificates.ca_file))
    assert context.get_ca_certs()
    if not shutil.which("openssl"):
        pytest.skip("no openssl for the name that a CA folder needs")
    name = os.popen("openssl x509 -hash -noout -in %s" % certificates.ca_file).read().strip()
    shutil.copy(certificates.ca_file, tmp_path / (name + ".0"))
    there = peer(peers.keep_alive, tls=tls)
    assert ask(pool, there.url(), {"SSL_CERT_DIR": str(tmp_path)}).body() == b"/x"


def test_long_body(peer, pool, tls, trusting):
    body = os.urandom(3 * 1024 * 1024)
    there = peer(peers.serve({"/x": body}), tls=tls)
    assert ask(pool, there.url(), trusting).body() == body


@pytest.mark.parametrize("which", ["other", "default"])
def test_wrong_ca(peer, pool, tls, other_certificates, which):
    there = peer(peers.keep_alive, tls=tls)
    environment = {"SSL_CERT_FILE": str(other_certificates.ca_file)} if which == "other" else {}
    asked = ask(pool, there.url(), environment)
    assert isinstance(asked.error(), ConnectError)
    assert "certificate" in str(asked.error())
    assert there.requests == []
    assert there.connections == 1, "trying again does not help"


def test_wrong_name(peer, pool, tls, trusting):
    there = peer(peers.keep_alive, tls=tls)
    try:
        asked = ask(pool, there.url(name="127.0.0.2"), trusting)
    except OSError as e:
        pytest.skip(str(e))
    assert isinstance(asked.error(), ConnectError)
    assert there.requests == []


def test_without_checking(peer, pool, tls):
    there = peer(peers.keep_alive, tls=tls)
    assert ask(pool, there.url(), {}, verify=False).body() == b"/x"


def test_one_who_does_not_check_is_no_way_in_for_one_who_does(peer, pool, tls):
    there = peer(peers.keep_alive, tls=tls)
    pool.limit = 1
    assert ask(pool, there.url("/unchecked"), {}, verify=False).status() == 200
    assert isinstance(ask(pool, there.url("/checked"), {}).error(), ConnectError)
    assert there.targets == ["/unchecked"]


def test_missing_ca_file_is_not_the_default(peer, pool, tls, certificates, monkeypatch, tmp_path):
    """The task's SSL_CERT_FILE counts, not the server's."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates.ca_file))
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path))
    there = peer(peers.keep_alive, tls=tls)
    asked = ask(pool, there.url(), {"SSL_CERT_FILE": str(tmp_path / "missing"), "SSL_CERT_DIR": str(tmp_path / "none")})
    assert isinstance(asked.error(), ConnectError)
    assert there.requests == []
    # Of another task that says nothing
    assert ask(pool, there.url(), {"SSL_CERT_FILE": str(certificates.ca_file)}).status() == 200


def test_ca_file_that_is_renewed(peer, tls, certificates, other_certificates, tmp_path):
    """A server that stays in memory lives longer than a CA bundle; each build has a pool of its own."""
    bundle = tmp_path / "ca.pem"
    there = peer(peers.keep_alive, tls=tls)
    environment = {"SSL_CERT_FILE": str(bundle)}
    for ca_file, found in ((other_certificates.ca_file, False), (certificates.ca_file, True)):
        shutil.copy(ca_file, bundle)
        pool = Pool(4, timeout=10)
        response, _ = ask(pool, there.url(), environment).wait()
        assert pool.stop()
        assert (response is not None) is found


def test_reset_in_the_handshake(peer, pool, tls, trusting):
    """Counts as being refused: fewer connections, and tried again."""
    def script(talk):
        if talk.number <= 2:
            talk.sock.recv(1)
            talk.reset()
            return
        talk.start_tls(tls)
        peers.keep_alive(talk)
    there = peer(script)
    asked = ask(pool, there.url().replace("http:", "https:"), trusting)
    assert asked.status() == 200
    assert there.connections == 3
    assert pool._hosts[asked.request.origin]._limit == 1


def test_plain_server(peer, pool, trusting):
    def script(talk):
        talk.sock.recv(1)
        talk.send(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
        talk.wait_closed()
    there = peer(script)
    asked = ask(pool, there.url().replace("http:", "https:"), trusting)
    assert isinstance(asked.error(), ConnectError)
