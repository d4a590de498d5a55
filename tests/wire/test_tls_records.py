# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""https: answers that come in one record each, several at once, and connections that start together."""

import shutil
import ssl

import pytest

from wire import peers

# So many answers that as many requests as possible are in flight afterwards
WARM = 150


def head(number):
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % number


@pytest.fixture
def questions(peer, make_asking, tls, trusting):
    """
    Called with play(talk) and a number asks so many questions on a connection, all at once; play() sends the answers on
    the first connection. Returns the peer and the lengths that were answered.
    """
    def ask(play, number):
        def script(talk):
            for request in talk.requests():
                if talk.number > 1 or request.target.startswith("/warm"):
                    talk.send(head(int(request.target.rpartition("/")[2])))
                    continue
                for _ in range(number - 1):
                    talk.request()
                play(talk)
                return
        there = peer(script, tls=tls)
        asking = make_asking(1)
        warm = asking.ask("HEAD", [there.url("/warm/%s" % i) for i in range(WARM)], trusting)
        assert [one.status() for one in warm] == [200] * WARM
        asked = asking.ask("HEAD", [there.url("/%s" % i) for i in range(number)], trusting)
        return there, [one.wait()[0].length for one in asked]
    return ask


def test_a_record_for_each_answer(questions):
    def play(talk):
        for number in range(50):
            talk.send(head(number))
        talk.wait_closed()
    there, lengths = questions(play, 50)
    assert lengths == list(range(50))
    assert there.connections == 1


def test_an_answer_in_many_records(questions):
    """What follows the first answer must be waited for, though some of it is there."""
    def play(talk):
        talk.send(head(0))
        for byte in head(1):
            talk.send(bytes([byte]))
        talk.wait_closed()
    there, lengths = questions(play, 2)
    assert lengths == [0, 1]
    assert there.connections == 1


def test_more_records_than_the_buffer_holds(questions):
    """Nothing is lost, and nothing waits for the server while there is something to use."""
    padding = b"X-Padding: " + b"x" * 15000 + b"\r\n\r\n"

    def play(talk):
        talk.send(b"".join(head(number)[:-2] + padding for number in range(60)))
        talk.wait_closed()
    there, lengths = questions(play, 60)
    assert lengths == list(range(60))
    assert there.connections == 1


def test_closed_without_close_notify_behind_answers(questions):
    """The answers before it count; what was not answered is asked again."""
    def play(talk):
        talk.send(head(0) + head(1))
    there, lengths = questions(play, 4)
    assert lengths == [0, 1, 2, 3]
    assert [there.targets.count("/%s" % i) for i in range(4)] == [1, 1, 2, 2]
    assert there.connections == 2


def test_closed_in_order_behind_answers(questions):
    def play(talk):
        talk.send(head(0) + head(1))
        talk.sock.unwrap()
    there, lengths = questions(play, 4)
    assert lengths == [0, 1, 2, 3]
    assert [there.targets.count("/%s" % i) for i in range(4)] == [1, 1, 2, 2]


def test_one_context_for_all_connections(peer, asking, tls, certificates, tmp_path, monkeypatch):
    """Reading the certificates takes tens of milliseconds."""
    made = []
    create = ssl.create_default_context

    def counted(*args, **kwargs):
        made.append(kwargs)
        return create(*args, **kwargs)
    monkeypatch.setattr(ssl, "create_default_context", counted)
    # A file that no other test has used
    bundle = tmp_path / "ca.pem"
    shutil.copy(certificates.ca_file, bundle)
    there = peer(peers.keep_alive, tls=tls)
    asked = asking.ask("GET", [there.url("/%s" % i) for i in range(100)], {"SSL_CERT_FILE": str(bundle)})
    assert [one.status() for one in asked] == [200] * 100
    assert there.connections > 1
    assert len(made) == 1
