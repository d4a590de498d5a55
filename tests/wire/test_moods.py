# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""Many requests before a server that does a bit of everything: nothing is lost, doubled, mixed up or left over."""

import random
import threading

import pytest

from bb.connections import host as host_module
from bb.connections.pool import Pool
from support.asking import ask_all


def moody(seed):
    """Answers mostly, with the body that belongs to the target; else any of what servers do."""
    rng = random.Random(seed)
    lock = threading.Lock()

    def script(talk):
        for request in talk.requests():
            body = request.target.encode() * 50
            with lock:
                mood = rng.random()
            if mood < 0.70:
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
                talk.answer(request, b"busy", status=503)
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
def test_moody_server(peer, monkeypatch, seed):
    monkeypatch.setattr(host_module, "PAUSE", 0.002)
    monkeypatch.setattr(host_module, "BREAKER_AFTER", 0)
    monkeypatch.setattr(host_module, "BREAKER_PAUSE", 0.01)
    there = peer(moody(seed))
    pool = Pool(4, timeout=10)
    asked = ask_all(pool, "GET", [there.url("/%s" % i) for i in range(300)])
    statuses = []
    for i, one in enumerate(asked):
        response, error = one.wait()
        statuses.append(response.status if response else error.kind)
        if response and response.status == 200:
            assert one.body() == b"/%d" % i * 50
            assert response.length == len(one.body())
    assert pool.stop()
    assert [len(one.calls) for one in asked] == [1] * 300
    assert statuses.count(200) > 250
    assert pool.statistics.files == statuses.count(200)
    assert pool.connections() == []
