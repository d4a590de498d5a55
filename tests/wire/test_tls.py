# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""https: whose certificate is trusted, and that connections are kept."""

import os
import shutil
import ssl

import pytest

from bb.connections import ConnectError
from wire import peers


def ask(asking, url, environment, verify=True):
    asked, = asking.one_by_one("GET", [url], environment, verify=verify)
    return asked


def test_ca_of_the_environment(peer, asking, tls, trusting):
    there = peer(peers.keep_alive, tls=tls)
    for i in range(20):
        assert ask(asking, there.url("/%s" % i), trusting).body() == b"/%d" % i
    assert there.connections == 1


def test_at_most_four_handshakes(peer, asking, tls, trusting):
    there = peer(peers.keep_alive, tls=tls)
    asked = asking.ask("GET", [there.url("/%s" % i) for i in range(100)], trusting)
    assert [a.body() for a in asked if a.status()] == [b"/%d" % i for i in range(100)]
    assert there.connections <= 4


def test_ca_folder_of_the_environment(peer, asking, tls, certificates, tmp_path):
    context = ssl.create_default_context(cafile=str(certificates.ca_file))
    assert context.get_ca_certs()
    if not shutil.which("openssl"):
        pytest.skip("no openssl for the name that a CA folder needs")
    name = os.popen("openssl x509 -hash -noout -in %s" % certificates.ca_file).read().strip()
    shutil.copy(certificates.ca_file, tmp_path / (name + ".0"))
    there = peer(peers.keep_alive, tls=tls)
    assert ask(asking, there.url(), {"SSL_CERT_DIR": str(tmp_path)}).body() == b"/x"


def test_long_body(peer, asking, tls, trusting):
    body = os.urandom(3 * 1024 * 1024)
    there = peer(peers.serve({"/x": body}), tls=tls)
    assert ask(asking, there.url(), trusting).body() == body


@pytest.mark.parametrize("which", ["other", "default"])
def test_wrong_ca(peer, asking, tls, other_certificates, which):
    there = peer(peers.keep_alive, tls=tls)
    environment = {"SSL_CERT_FILE": str(other_certificates.ca_file)} if which == "other" else {}
    asked = ask(asking, there.url(), environment)
    assert isinstance(asked.error(), ConnectError)
    assert "certificate" in str(asked.error())
    assert there.requests == []
    assert there.connections == 1, "trying again does not help"


def test_wrong_name(peer, asking, tls, trusting):
    try:
        there = peer(peers.keep_alive, tls=tls, host="127.0.0.2")
    except OSError as e:
        pytest.skip("no second address: %s" % e)
    asked = ask(asking, there.url(), trusting)
    assert isinstance(asked.error(), ConnectError)
    assert "certificate" in str(asked.error())
    assert there.requests == []
    assert there.connections == 1


def test_without_checking(peer, asking, tls):
    there = peer(peers.keep_alive, tls=tls)
    assert ask(asking, there.url(), {}, verify=False).body() == b"/x"


def test_unchecked_connection_is_not_used_by_those_who_check(peer, make_asking, tls):
    there = peer(peers.keep_alive, tls=tls)
    asking = make_asking(1)
    assert ask(asking, there.url("/unchecked"), {}, verify=False).status() == 200
    assert isinstance(ask(asking, there.url("/checked"), {}).error(), ConnectError)
    assert there.targets == ["/unchecked"]


def test_missing_ca_file_is_not_the_default(peer, asking, tls, certificates, monkeypatch, tmp_path):
    """The task's SSL_CERT_FILE counts, not the server's."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates.ca_file))
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path))
    there = peer(peers.keep_alive, tls=tls)
    asked = ask(asking, there.url(), {"SSL_CERT_FILE": str(tmp_path / "missing"), "SSL_CERT_DIR": str(tmp_path / "none")})
    assert isinstance(asked.error(), ConnectError)
    assert there.requests == []
    # Of another task that says nothing
    assert ask(asking, there.url(), {"SSL_CERT_FILE": str(certificates.ca_file)}).status() == 200


def test_ca_file_that_is_renewed(peer, make_asking, tls, certificates, other_certificates, tmp_path):
    """A server that stays in memory lives longer than a CA bundle; each build starts anew."""
    bundle = tmp_path / "ca.pem"
    there = peer(peers.keep_alive, tls=tls)
    environment = {"SSL_CERT_FILE": str(bundle)}
    for ca_file, found in ((other_certificates.ca_file, False), (certificates.ca_file, True)):
        shutil.copy(ca_file, bundle)
        response, _ = ask(make_asking(), there.url(), environment).wait()
        assert (response is not None) is found


def test_reset_in_the_handshake(peer, asking, tls, trusting):
    """It is tried again after a pause."""
    def script(talk):
        if talk.number == 1:
            talk.sock.recv(1)
            talk.reset()
            return
        talk.start_tls(tls)
        peers.keep_alive(talk)
    there = peer(script)
    assert ask(asking, there.url().replace("http:", "https:"), trusting).status() == 200
    assert there.connections == 2
    assert (asking.count("requests"), asking.count("retries")) == (1, 0)


def test_plain_server(peer, make_asking, trusting):
    """What it answers is no TLS. One attempt is enough here."""
    def script(talk):
        talk.sock.recv(1)
        talk.send(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
        talk.wait_closed()
    asking = make_asking()
    there = peer(script)
    one, = asking.ask("GET", [there.url().replace("http:", "https:")], trusting)
    there.wait_for(lambda p: p.connections == 2, "it is tried again")
    assert not one.answered
    assert asking.stop()
    assert one.error().kind == "cancelled"


def test_handshake_that_never_ends(peer, make_asking, trusting):
    there = peer(lambda talk: talk.wait_closed())
    asking = make_asking(timeout=0.2)
    ask_one, = asking.ask("GET", [there.url().replace("http:", "https:")], trusting)
    there.wait_for(lambda p: p.connections == 2 and p.open == 1, "it is closed, and tried again")
    assert asking.stop()
    assert ask_one.error().kind == "cancelled"
