#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
All hosts, and a cache of their answers.

Used by server.py in the event loop's thread, except for methods marked
otherwise. Each host (scheme, name, port, user) has a limited number of
connections. Whether a file exists, and its size, are remembered as long as the
pool exists, so that nothing is requested twice; errors, and statuses that do
not indicate whether the file exists, are not remembered.

    pool = Pool(loop, limit=4, most=16, timeout=100)
    pool.submit(requests)       # calls done() of each request, maybe at once
    pool.stop()                 # fails the remaining requests with Cancelled
"""

from bb.connections import Cancelled, http, sftp
from bb.connections.host import Host
from bb.connections.request import ABSENT, MISSING, Response

# Connections to all hosts together, beyond which a host opens none but its first: each uses up to four descriptors, of
# which select() in server/process.py, in the same process, supports only the first 1024
MAX_CONNECTIONS = 64
# Limit for the first connections as well
MAX_ALL = 96

# {scheme: (coroutine that opens a connection, its class)}; a protocol is added here
PROTOCOLS = {"http": (http.connect, http.HTTPConnection), "https": (http.connect, http.HTTPConnection),
             "sftp": (sftp.connect, sftp.SFTPConnection)}

# Seconds for which a GET is sent to where the HEAD of its file was redirected: signed URLs are usually valid for minutes
TARGET_SECONDS = 60
# Cached in place of (size, validators) if there is no file
NO_FILE = ()


class Pool:
    """
    limit is the number of connections for each host, most the number up to which
    it is increased where that helps. A connection times out after timeout seconds
    without data. protocols is like PROTOCOLS.

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
        # {Request.key: (URL to which a HEAD was redirected, time)}, or None if those do not serve a GET
        self._targets = {}
        # Number of unanswered requests
        self._open = 0
        # Seconds in which there were any until _open last became 0, and the time since when there are some
        self._busy = self._busy_since = 0

    def submit(self, requests):
        """
        Queue requests, in front of the others if they are marked as first. A HEAD that is in the cache is answered at
        once, as is a GET if the file does not exist.
        """
        if not self._open:
            self._busy_since = self.loop.time()
        self._open += len(requests)
        groups = {}
        for request in requests:
            if self.stopped:
                self.finish(request, None, Cancelled("the build has ended"))
            elif not self._answer_from_cache(request):
                groups.setdefault(request.origin, []).append(request)
        for origin, group in groups.items():
            self._host(origin).submit(group)

    def _host(self, origin):
        if origin not in self.hosts:
            self.hosts[origin] = Host(self, origin, *self._protocols[origin.scheme])
        return self.hosts[origin]

    def _answer_from_cache(self, request):
        """Returns whether request has been answered"""
        if request.probe or request.recheck:
            return False
        known = self._answers.get(request.key[0], {}).get(request.key[1])
        if known == NO_FILE:
            self._conclude(request, Response(404, {}, None), None)
            return True
        if request.method == "GET":
            request.size, request.validators = known or (None, None)
            target, since = (self._targets or {}).get(request.key, (None, 0))
            if target and self.loop.time() - since < TARGET_SECONDS:
                request.skip_redirects(target)
        elif known and not request.fresh and self.is_healthy(request.origin, request.route):
            # That the file exists is of no use while its host fails
            self._conclude(request, Response(200, {}, known[0]), None)
            return True
        return False

    def resubmit(self, request):
        """Called by a Host: request has been changed, and may belong to another host now"""
        if self.stopped:
            self.finish(request, None, Cancelled("the build has ended"))
        else:
            self._host(request.origin).submit([request])

    def finish(self, request, response, error):
        """Called by a Host: cache and deliver the answer to request"""
        if response and not request.probe:
            answers = self._answers.setdefault(request.key[0], {})
            if response.status == 200:
                answers[request.key[1]] = response.length, response.validators
                if request.redirects and request.original_method == "HEAD" and self._targets is not None:
                    self._targets[request.key] = request.url, self.loop.time()
            elif response.status in (MISSING if request.original_method == "HEAD" else ABSENT):
                answers[request.key[1]] = NO_FILE
        self._conclude(request, response, error)

    def reject(self, request):
        """Treat the file of request as absent from now on, since its content is unexpected or does not arrive"""
        self._answers.setdefault(request.key[0], {})[request.key[1]] = NO_FILE

    def ignore_targets(self):
        """Called by a Host: the target of a HEAD has refused the GET, probably since its URL is signed for HEAD"""
        self._targets = None

    def _conclude(self, request, response, error):
        self._open -= 1
        if not self._open:
            self._busy += self.loop.time() - self._busy_since
        request.done(request, response, error)

    def prioritise(self, requests):
        """Move requests, where they are still queued, to the front"""
        for request in requests:
            if request.origin in self.hosts:
                self.hosts[request.origin].queues.prioritise(request)
            # Also for those in flight, whose answers are urgent now
            request.first = True

    def has_room(self):
        """Called by a Host: whether one more connection may be opened"""
        return sum(host.connections.size for host in self.hosts.values()) < MAX_CONNECTIONS

    def make_room(self):
        """Called by a Host that has no connection: close an idle one to another host. Returns whether one may be opened."""
        for host in self.hosts.values():
            for connection in host.connections.established:
                if not connection.in_flight:
                    connection.close()
                    return True
        return sum(host.connections.size for host in self.hosts.values()) < MAX_ALL

    def is_healthy(self, origin, route):
        """Whether a host, and the route to it, have not failed since they last succeeded. May be called from any thread."""
        host = self.hosts.get(origin)
        return host is None or host.health.is_healthy(route)

    def has_pipelined(self, origin):
        """Whether requests to a host are pipelined over HTTP. May be called from any thread."""
        host = self.hosts.get(origin)
        return host is not None and origin.scheme != "sftp" and bool(host.pipelining.works)

    def disable_pipelining(self, origin):
        """Send requests to a host one by one from now on, since its answers were mixed up"""
        self._host(origin).pipelining.disable()

    def busy_seconds(self):
        """Number of seconds in which there were unanswered requests"""
        return self._busy + (self.loop.time() - self._busy_since if self._open else 0)

    def stop(self):
        self.stopped = True
        for host in self.hosts.values():
            host.stop()
