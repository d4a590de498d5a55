# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""Requests to a pool or a connection, and what became of them.

    asked = Asked("GET", peer.url("/x"))
    pool.submit(asked.request)
    response, error = asked.wait()
    assert asked.body() == b"..."
"""

import tempfile
import threading

from bb.connections.request import Request

# Nothing here takes long; this only bounds a test that fails
SECONDS = 15


class Asked:
    """A Request with a done() that counts, and for a GET a file of its own."""

    def __init__(self, method, url, environment=None, **members):
        self.file = tempfile.TemporaryFile() if method == "GET" else None
        self.calls = []
        self._called = threading.Event()
        self.request = Request(method, url, environment or {}, done=self._done,
                               fd=self.file.fileno() if self.file else None, **members)

    def _done(self, request, response, error):
        self.calls.append((response, error))
        self._called.set()

    def wait(self):
        """(response, error), of which one is None."""
        assert self._called.wait(SECONDS), "no answer for %s" % self.request.url
        return self.calls[0]

    @property
    def answered(self):
        return self._called.is_set()

    def status(self):
        response, error = self.wait()
        assert error is None, "%r" % error
        return response.status

    def error(self):
        response, error = self.wait()
        assert response is None and error is not None, "answered with %s" % (response,)
        return error

    def body(self):
        """What is in the file now."""
        self.file.seek(0)
        return self.file.read()


def ask_all(pool, method, urls, **members):
    """Submit a request for each URL; returns their Asked objects."""
    asked = [Asked(method, url, **members) for url in urls]
    for one in asked:
        pool.submit(one.request)
    return asked


def wait_until(condition, what):
    """For what can only be looked at, such as the kernel's view of a socket."""
    tick = threading.Event()
    for _ in range(SECONDS * 200):
        if condition():
            return
        tick.wait(0.005)
    raise AssertionError("still not so: " + what)


def exchange_one(connection, request):
    """Send request, and return the Response to it."""
    connection.send([request])
    (answered, response, _), = connection.receive()
    assert answered is request
    return response
