#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
The shared connections (bb.connections) of a build.

The runqueue creates one SharedConnections object, starts it before the metadata
queries sstate objects and stops it when the build ends, so that a memory
resident server parses, and forks, without connections or their thread. Setscene
tasks and the fetchers in the server find the socket's address in the datastore
(fetch2/shared.py). The presence query and prefetch use the server directly.

    connections = SharedConnections(cooker, d)
    connections.start()                     # fatal error if a variable is invalid
    if connections.server:
        ...
    connections.stop()                      # reports the statistics

All state belongs to the runqueue's thread; that of server.pool and
server.peers, which is only read here, to the server's.
"""

import bb
import bb.event
from bb.connections.pool import PROTOCOLS
from bb.connections.s3 import S3
from bb.connections.server import ConnectionServer
from bb.fetch2 import shared
from bb.networksettings import ADDRESS, settings

# Shortest pause in seconds, requested by a mirror, that is reported: shorter ones are not noticed
REPORTED_PAUSE = 5


class SharedConnections:
    """
    server      ConnectionServer, None if there are no shared connections
    settings    bb.networksettings.Settings, once start() has been called
    prefetch    Prefetch object of the build, or None
    reported    names of the hosts whose failures have been reported
    """

    def __init__(self, cooker, d):
        self.cooker = cooker
        self.d = d
        self.server = None
        self.settings = None
        self.prefetch = None
        self.reported = set()
        # Origins of hosts whose pauses have been reported
        self._paused = set()
        self._s3 = None

    def start(self, needed=True):
        """
        Start the server, if needed, and publish its address. Does not block. If
        the server cannot be started, the build continues without it. An invalid
        variable is a fatal error in any case.
        """
        try:
            self.settings = settings(self.d)
        except ValueError as e:
            bb.fatal(str(e))
        if not needed or not self.settings.enabled or self.server:
            return
        self._s3 = S3({**bb.fetch2.get_fetcher_environment(self.d), **shared.aws_environment(self.d)})
        server = ConnectionServer(self.settings.connections, self.settings.most_connections, log=serverlog,
                                  protocols={**PROTOCOLS, "s3": self._s3.protocol})
        try:
            server.start()
        except (OSError, RuntimeError) as e:
            bb.warn("Could not start shared connections, fetching directly instead: %s" % e)
            return
        self.server = server
        self.cooker.extraconfigdata[ADDRESS] = server.address
        self.d.setVar(ADDRESS, server.address)

    def stop(self):
        """
        Cancel the requests without an answer, close all connections and report the statistics. Blocks until the server's
        thread has ended, 20 seconds at most. May be called more than once.
        """
        server, self.server = self.server, None
        if not server:
            return
        self.cooker.extraconfigdata.pop(ADDRESS, None)
        self.d.delVar(ADDRESS)
        if self.prefetch:
            self.prefetch.stop()
        self._s3.close()
        if not server.stop():
            serverlog("the thread did not terminate")
        server.deliver()
        if self.prefetch:
            self.prefetch.close()
        self._report(server)

    def report_hosts(self):
        """Report the hosts that request a pause, and those that are left to the fetcher, each of them once"""
        self._report_unusable(self.server)
        for host in list(self.server.pool.hosts.values()):
            seconds = host.health.retry_after
            if seconds and seconds >= REPORTED_PAUSE and host.origin not in self._paused:
                self._paused.add(host.origin)
                bb.note("Sstate mirror %s://%s requests a pause of %d seconds" % (host.origin.scheme, host.origin.host, seconds))

    def _report_unusable(self, server):
        for host in list(server.pool.hosts.values()):
            for error in list(host.unusable.values())[:1]:
                if host.origin.host not in self.reported:
                    self.reported.add(host.origin.host)
                    bb.warn("Cannot use shared connections to %s://%s, using the fetcher instead: %s" %
                            (host.origin.scheme, host.origin.host, error))

    def _report(self, server):
        self._report_unusable(server)
        hosts = list(server.pool.hosts.values())
        for host in hosts:
            if host.health.suspension_reason and host.origin.host not in self.reported:
                bb.warn("Shared connections to %s were suspended: %s" % (host.origin.host, host.health.suspension_reason))
            done = host.statistics
            bb.debug(1, "Sstate network, %s://%s: %s, %s" % (host.origin.scheme, host.origin.host, count(done.files, "file"),
                                                            describe(done.bytes, done.requests, done.connections,
                                                                     done.retries, done.refusals)))
        size, requests, connections, retries, refusals = (sum(getattr(host.statistics, name) for host in hosts) for name in
                                                          ("bytes", "requests", "connections", "retries", "refusals"))
        if requests:
            objects = server.peers.served + (self.prefetch.objects if self.prefetch else 0)
            seconds = server.pool.busy_seconds()
            if objects or retries or refusals:
                bb.note("Sstate network: %s, %s" % (count(objects, "object"),
                                                    describe(size, requests, connections, retries, refusals, seconds)))
            bb.event.fire(bb.event.SstateNetworkSummary(objects, size, seconds, requests, connections, retries, refusals), self.d)


def describe(size, requests, connections, retries, refusals, seconds=None):
    """Return statistics as a part of a message"""
    return "%.1f MiB%s, %s over %s (%s, %s)" % (size / 1048576, "" if seconds is None else " in %.1f s" % seconds,
                                               count(requests, "request"), count(connections, "connection"),
                                               "1 retry" if retries == 1 else "%s retries" % retries,
                                               count(refusals, "refusal"))

def count(number, noun):
    return "%s %s%s" % (number, noun, "" if number == 1 else "s")

def serverlog(message):
    # At the top of the file, the import would be circular
    import bb.server.process
    bb.server.process.serverlog("Shared connections: " + message)
