# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""Many requests to a server that does a bit of everything: nothing is lost, doubled, mixed up or left over.

It refuses only once, since each refusal takes a real pause; unit/test_host.py has those.
"""

import random
import threading

import pytest



def moody(seed):
    """Answers mostly, with the body that belongs to the target; else any of what servers do."""
    rng = random.Random(seed)
    lock = threading.Lock()
    refusals = iter([503])

    def script(talk):
        for number, request in enumerate(talk.requests()):
            body = request.target.encode() * 50
            with lock:
                mood = rng.random()
            if number == 0 or mood < 0.70:
                # A connection without a single answer would be a refusal
                talk.answer(request, body)
            elif mood < 0.75:
                talk.answer(request, body, "Connection: close")
                return
            elif mood < 0.80:
                talk.answer(request, body)
                return
            elif mood < 0.83:
                talk.answer(request, body + b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nbad", length=len(body))
            elif mood < 0.86:
                talk.answer(request, body[:20], length=len(body))
                return
            elif mood < 0.89:
                status = next(refusals, None)
                talk.answer(request, body, status=status or 200)
            elif mood < 0.91:
                talk.answer(request, b"", "Location: " + request.target, status=302)
            elif mood < 0.93:
                talk.send(b"nonsense\r\n\r\n")
                return
            elif mood < 0.95:
                talk.reset()
                return
            elif mood < 0.97:
                return
            else:
                talk.answer(request, b"no", status=404)
    return script


@pytest.mark.parametrize("seed", range(4))
def test_moody_server(peer, make_asking, seed):
    there = peer(moody(seed))
    asking = make_asking()
    asked = asking.ask("GET", [there.url("/%s" % i) for i in range(300)])
    statuses = []
    for i, one in enumerate(asked):
        response, error = one.wait()
        statuses.append(response.status if response else error.kind)
        if response and response.status == 200:
            assert one.body() == b"/%d" % i * 50
            assert response.length == len(one.body())
    assert asking.stop()
    assert [len(one.calls) for one in asked] == [1] * 300
    assert statuses.count(200) > 250
    assert asking.count("files") == statuses.count(200)
    there.wait_for(lambda p: p.open == 0, "all connections are closed")


@pytest.mark.parametrize("seed", range(4))
def test_moody_server_and_questions(peer, make_asking, seed):
    """The same with HEAD, several in flight as long as it seems to work. No size is that of another file."""
    there = peer(moody(seed))
    asking = make_asking(2)
    asked = asking.ask("HEAD", [there.url("/" + "x" * i) for i in range(300)])
    for i, one in enumerate(asked):
        response, error = one.wait()
        assert error or response.status in (200, 404)
        if response and response.status == 200:
            assert response.length == 50 * (i + 1)
    assert [one.wait()[0] is not None for one in asked].count(True) > 250
