#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
All hosts, and what they have answered, so that nothing is asked twice.

Used by server.py, in the thread of the event loop. A host (scheme, name, port,
user) has a limited number of connections. Whether a file exists, and its size, are
remembered as long as the pool exists; errors, and answers which say neither
yes nor no, are not.

    pool = Pool(loop, limit=4, most=16, timeout=100)
    pool.submit(requests)       # calls done() of each request, maybe at once
    pool.stop()                 # fails those that are left with Cancelled
"""

from bb.connections import Cancelled, http, sftp
from bb.connections.host import Host
from bb.connections.request import ABSENT, MISSING, Response

# Connections to all hosts together: each has up to four descriptors, of which select() in server/process.py, which is
# in the same process, supports the first 1024
MAX_CONNECTIONS = 64

PROTOCOLS = {"http": (http.connect, http.HTTPConnection), "https": (http.connect, http.HTTPConnection),
             "sftp": (sftp.connect, sftp.SFTPConnection)}

# In place of (size, validators)
NO_FILE = ()


class Pool:
    """
    limit is the number of connections for each host, most the largest if more of
    them pay, timeout how many seconds
    without any data end a connection. protocols has, for each scheme, the
    coroutine that opens a connection and the class of that.

    hosts       {origin: Host}
    stopped     whether stop() has been called
    """

    def __init__(self, loop, limit, most, timeout=100, protocols=PROTOCOLS):
        self.loop = loop
        self.limit = limit
        self.most = most
        self.timeout = timeout
        self.hosts = {}
        self.stopped = False
        self._protocols = protocols
        # {(authorization, route): {url: (size, validators) or NO_FILE}}
        self._answers = {}
        # Requests that are not answered, and seconds in which there were any, before the time _busy_since
        self._open = 0
        self._busy = self._busy_since = 0

    def submit(self, requests):
        """
        Queue requests; those marked as first before all others. A HEAD that has been answered before is answered at
        once, and so is the GET of a file that does not exist.
        """
        if not self._open:
            self._busy_since = self.loop.time()
        self._open += len(requests)
        groups = {}
        for request in requests:
            if self.stopped:
                self.finish(request, None, Cancelled("the build has ended"))
            elif self._has_to_be_asked(request):
                groups.setdefault(request.origin, []).append(request)
        for origin, group in groups.items():
            self._host(origin).submit(group)

    def _host(self, origin):
        if origin not in self.hosts:
            self.hosts[origin] = Host(self, origin, *self._protocols[origin.scheme])
        return self.hosts[origin]

    def _has_to_be_asked(self, request):
        """If not, it has been answered"""
        if request.probe or request.doubted:
            return True
        known = self._answers.get(request.key[0], {}).get(request.key[1])
        if known == NO_FILE:
            self._conclude(request, Response(404, {}, None), None)
            return False
        if request.method == "GET":
            request.size, request.validators = known or (None, None)
        elif known and not request.fresh and self.is_healthy(request.origin, request.route):
            # Otherwise to answer that there is a file would be of no use: it cannot be fetched
            self._conclude(request, Response(200, {}, known[0]), None)
            return False
        return True

    def resubmit(self, request):
        """Of a host: request has been changed, and may belong to another host now"""
        if self.stopped:
            self.finish(request, None, Cancelled("the build has ended"))
        else:
            self._host(request.origin).submit([request])

    def finish(self, request, response, error):
        """Of a host: request is answered"""
        if response and not request.probe:
            answers = self._answers.setdefault(request.key[0], {})
            if response.status == 200:
                answers[request.key[1]] = response.length, response.validators
            elif response.status in (MISSING if request.asked == "HEAD" else ABSENT):
                answers[request.key[1]] = NO_FILE
        self._conclude(request, response, error)

    def reject(self, request):
        """What request was answered with is not the file that it should be: count that as absent"""
        self._answers.setdefault(request.key[0], {})[request.key[1]] = NO_FILE

    def _conclude(self, request, response, error):
        self._open -= 1
        if not self._open:
            self._busy += self.loop.time() - self._busy_since
        request.done(request, response, error)

    def hurry(self, requests):
        """Send those of requests that are still queued before all others"""
        for request in requests:
            if request.origin in self.hosts:
                self.hosts[request.origin].hurry(request)
            # Also of those that are in flight the answers are urgent
            request.first = True

    def has_room(self):
        """Of a host: whether there may be one more connection"""
        return sum(host.lanes.size for host in self.hosts.values()) < MAX_CONNECTIONS

    def make_room(self):
        """Close an idle connection to another host. Returns False if there is none."""
        for host in self.hosts.values():
            for connection in host.lanes.connections:
                if not connection.in_flight:
                    connection.close()
                    return True
        return False

    def is_healthy(self, origin, route):
        """Whether the last event of a host was an answer, or there was none. From any thread."""
        host = self.hosts.get(origin)
        return host is None or host.health.is_healthy(route)

    def has_pipelined(self, origin):
        """Whether several requests at a time have been in flight on a connection to a host over HTTP. From any thread."""
        host = self.hosts.get(origin)
        return host is not None and origin.scheme != "sftp" and host.pipelining.works

    def distrust(self, origin):
        """Answers of a host were mixed up: no more than one request is in flight on a connection from now on"""
        self._host(origin).pipelining.end()

    def busy_seconds(self):
        """Seconds in which there were requests that had not been answered"""
        return self._busy + (self.loop.time() - self._busy_since if self._open else 0)

    def stop(self):
        self.stopped = True
        for host in self.hosts.values():
            host.stop()
