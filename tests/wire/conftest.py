# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
if str(TESTS) not in sys.path:
    sys.path.insert(0, str(TESTS))

from support import patched

patched.use()

import ssl
import threading
import types

import bb
import bb.data
import pytest

from bb.sharedconnections import SharedConnections
from netqueue.lab.certificates import make_certificates
from support.asking import Asking
from support.build import Build
from wire.peers import Peer


@pytest.fixture
def peer():
    """Called with a script (and what else Peer takes) returns a Peer, which is closed at the end."""
    peers = []

    def make(script, **kwargs):
        peers.append(Peer(script, **kwargs))
        return peers[-1]

    yield make
    for one in peers:
        one.close()


@pytest.fixture
def make_asking():
    """Called with what Asking takes returns one. Fails the test that leaves a thread behind."""
    made = []

    def make(*args, **kwargs):
        made.append(Asking(*args, **kwargs))
        return made[-1]

    yield make
    for one in made:
        assert one.stop(), "the thread has not ended"
        assert one.messages == [], "a fault of ours"


@pytest.fixture
def asking(make_asking):
    """Four connections a host"""
    return make_asking()


@pytest.fixture(scope="session")
def certificates(tmp_path_factory):
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="session")
def other_certificates(tmp_path_factory):
    """Of another CA, for the same names"""
    return make_certificates(tmp_path_factory.mktemp("other"))


@pytest.fixture(scope="session")
def tls(certificates):
    """A server's context"""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates.server_file, certificates.key_file)
    return context


@pytest.fixture(scope="session")
def trusting(certificates):
    """An environment that trusts the CA of certificates"""
    return {"SSL_CERT_FILE": str(certificates.ca_file)}


@pytest.fixture
def start():
    """Called with variables starts a build's SharedConnections, which are stopped at the end."""
    made = []
    before = threading.enumerate()

    def make(**variables):
        d = bb.data.init()
        for name, value in variables.items():
            d.setVar(name, value)
            if name.startswith("AWS_"):
                d.setVarFlag(name, "export", "1")
        connections = SharedConnections(types.SimpleNamespace(extraconfigdata={}), d)
        made.append(connections)
        connections.start()
        return connections

    yield make
    for connections in made:
        connections.stop()
    assert not [t for t in threading.enumerate() if t.name.startswith("connection") and t not in before]


@pytest.fixture
def connections(start):
    return start()


@pytest.fixture
def build(tmp_path, connections, monkeypatch):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return Build(tmp_path, connections.server.address)
