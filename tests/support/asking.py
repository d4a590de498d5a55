# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""Requests to a real ConnectionServer, and what became of them.

    with Asking(connections=4) as asking:
        one, = asking.ask("GET", [peer.url("/x")])
        response, error = one.wait()
        assert one.body() == b"..."

A thread delivers the answers meanwhile, as the runqueue does.
"""

import tempfile
import threading

from bb.connections.request import Request
from bb.connections.server import ConnectionServer

# Nothing here takes long; this only bounds a test that fails
SECONDS = 15


class Asked:
    """A Request, how often and with what it was answered, and for a GET a file of its own."""

    def __init__(self, method, url, environment=None, **members):
        self.file = tempfile.TemporaryFile() if method == "GET" else None
        self.calls = []
        self._called = threading.Event()
        self.request = Request(method, url, environment or {}, fd=self.file.fileno() if self.file else None, **members)

    def answer(self, request, response, error):
        assert request is self.request
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


class Asking:
    """A ConnectionServer, and a thread that delivers its answers. messages: what it has logged."""

    def __init__(self, connections=4, timeout=10, **options):
        self.messages = []
        self.server = ConnectionServer(connections, timeout=timeout, log=self.messages.append, **options)
        self.server.start()
        self._ended = False
        self._thread = threading.Thread(target=self._deliver)
        self._thread.start()

    def _deliver(self):
        while not self._ended:
            self.server.deliver(SECONDS)

    def submit(self, *asked, first=True):
        """Submit all in one batch"""
        by_request = {one.request: one for one in asked}
        self.server.submit(list(by_request), lambda request, *answer: by_request[request].answer(request, *answer), first)

    def ask(self, method, urls, environment=None, first=True, **members):
        """Submit a request for each URL in one batch. Returns their Asked objects."""
        asked = [Asked(method, url, environment, **members) for url in urls]
        self.submit(*asked, first=first)
        return asked

    def one_by_one(self, method, urls, environment=None, **members):
        """Each is answered before the next is submitted"""
        asked = []
        for url in urls:
            asked += self.ask(method, [url], environment, **members)
            asked[-1].wait()
        return asked

    def error_of_read_only_file(self, url, folder):
        """The error of a GET whose descriptor is of a file in folder and cannot be written to"""
        (folder / "file").write_bytes(b"")
        asked = Asked("GET", url)
        with open(folder / "file", "rb") as file:
            asked.request.fd = file.fileno()
            self.submit(asked)
            return asked.error()

    def count(self, name):
        """The sum of a counter over all hosts"""
        return sum(getattr(host.statistics, name) for host in self.server.pool.hosts.values())

    def troubles(self):
        """[(name of a host, reason)] of those that have been suspended"""
        return [(host.origin.host, host.health.suspension_reason) for host in self.server.pool.hosts.values()
                if host.health.suspension_reason]

    def stop(self):
        """Returns whether everything has ended. What was left is answered then."""
        if self._ended:
            return True
        self._ended = True
        self.server.wake()
        self._thread.join(SECONDS)
        ended = self.server.stop()
        self.server.deliver()
        return ended

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        assert self.stop(), "the thread has not ended"


def wait_until(condition, what, seconds=SECONDS):
    """For what can only be looked at, such as the kernel's view of a socket."""
    tick = threading.Event()
    for _ in range(seconds * 200):
        if condition():
            return
        tick.wait(0.005)
    raise AssertionError("still not so: " + what)
