# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""Messages and descriptors over a socket pair."""

import array
import gc
import os
import socket

import pytest

from bb.connections import ProtocolError, protocol


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        yield ours, theirs


@pytest.fixture
def open_files():
    """Fails the test that leaves a descriptor open"""
    # Those of earlier tests do not end meanwhile
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) == before


def send_fds(sock, data, fds):
    sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])


def test_message(pair):
    protocol.send(pair[0], protocol.encode({"id": 1, "url": "\u00e9"}))
    assert protocol.receive(pair[1]) == ({"id": 1, "url": "\u00e9"}, None)


def test_end(pair):
    pair[0].close()
    with pytest.raises(ConnectionResetError):
        protocol.receive(pair[1])


def test_descriptor(pair, tmp_path):
    with open(tmp_path / "file", "wb") as f:
        protocol.send(pair[0], protocol.encode({"id": 1}), f.fileno())
        message, fd = protocol.receive(pair[1])
        assert message == {"id": 1}
        assert os.fstat(fd).st_ino == os.fstat(f.fileno()).st_ino
        assert not os.get_inheritable(fd)
        os.close(fd)


def test_longest_message(pair):
    overhead = len(protocol.encode({"url": ""}))
    message = {"url": "x" * (protocol.MAX_MESSAGE - overhead)}
    protocol.send(pair[0], protocol.encode(message))
    assert protocol.receive(pair[1])[0] == message
    with pytest.raises(ValueError):
        protocol.encode({"url": message["url"] + "x"})


@pytest.mark.parametrize("data", [
    b"x" * (protocol.MAX_MESSAGE + 1),
    b'{"id": 1}' + b" " * protocol.MAX_MESSAGE,
    b"{", b"\xff\xfe\xfd", b"[1]", b"1", b"null", b'"x"', b"[" * 60000,
])
def test_what_is_no_message(pair, data, tmp_path, open_files):
    with open(tmp_path / "file", "wb") as f:
        send_fds(pair[0], data, [f.fileno()])
        with pytest.raises(ProtocolError):
            protocol.receive(pair[1])


@pytest.mark.parametrize("number", [2, 3, 20])
def test_too_many_descriptors(pair, number, tmp_path, open_files):
    with open(tmp_path / "file", "wb") as f:
        send_fds(pair[0], b'{"id": 1}', [f.fileno()] * number)
        with pytest.raises(ProtocolError):
            protocol.receive(pair[1])
