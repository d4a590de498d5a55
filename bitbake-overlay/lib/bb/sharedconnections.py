#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
The shared connections (bb.connections) during a build.

The runqueue makes one SharedConnections object, starts it before the metadata
is asked which sstate objects exist and stops it at its own end, so that a
memory resident server parses, and forks, without any connection or thread.
Setscene tasks and the fetchers in the server find the socket in the datastore
(fetch2/shared.py); the presence query and prefetch use the server directly.

    connections = SharedConnections(cooker, d)
    connections.start()                     # fatal error if a variable is invalid
    if connections.server:
        ...
    connections.stop()                      # reports what was done

Called in the runqueue's thread only.
"""

import bb
import bb.event
from bb.connections.server import ConnectionServer
from bb.networksettings import ADDRESS, STRANGE, settings

# Seconds of a pause that a mirror asks for which the user wants to know about
REPORTED_PAUSE = 5


class SharedConnections:
    """
    server      a ConnectionServer, None if there are no shared connections
    settings    of bb.networksettings, once it has been started
    prefetch    what fetches objects ahead of their tasks (bb.prefetch), or None
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
        # Origins of hosts which have sent something else than was asked for
        self._strange = set()

    def start(self, needed=True):
        """
        Start the server, and publish its address. Does not block. If that is
        not possible, the build continues without. Fatal error if a variable is
        invalid, even if there is nothing to start.
        """
        try:
            self.settings = settings(self.d)
        except ValueError as e:
            bb.fatal(str(e))
        if not needed or not self.settings.enabled or self.server:
            return
        server = ConnectionServer(self.settings.connections, self.settings.most_connections, log=serverlog)
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
        Cancel what has not been answered, close everything and report what was done. Blocks until the server's thread
        has ended, which is at most 20 seconds. May be called more than once.
        """
        server, self.server = self.server, None
        if not server:
            return
        self.cooker.extraconfigdata.pop(ADDRESS, None)
        self.d.delVar(ADDRESS)
        if self.prefetch:
            self.prefetch.stop()
        if not server.stop():
            serverlog("the thread did not terminate")
        server.deliver()
        if self.prefetch:
            self.prefetch.close()
        self._report(server)

    def report_pauses(self):
        """Tell the user, once for each, which hosts want to be left in peace for a while"""
        for host in list(self.server.pool.hosts.values()) if self.server else ():
            seconds = host.health.retry_after
            if seconds and seconds >= REPORTED_PAUSE and host.origin not in self._paused:
                self._paused.add(host.origin)
                bb.note("Sstate mirror %s://%s asks to wait for %d seconds" % (host.origin.scheme, host.origin.host, seconds))

    def report_strange(self, origin):
        """A file of this host does not begin as it has to"""
        if origin not in self._strange:
            self._strange.add(origin)
            # Tasks may find the same
            bb.warnonce(STRANGE % (origin.scheme, origin.host))

    def _report(self, server):
        hosts = list(server.pool.hosts.values())
        for host in hosts:
            if host.health.trouble and host.origin.host not in self.reported:
                bb.warn("Shared connections to %s were suspended: %s" % (host.origin.host, host.health.trouble))
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
    """What was done over the network, for a message"""
    return "%.1f MiB%s, %s over %s (%s, %s)" % (size / 1048576, "" if seconds is None else " in %.1f s" % seconds,
                                               count(requests, "request"), count(connections, "connection"),
                                               "1 retry" if retries == 1 else "%s retries" % retries,
                                               count(refusals, "refusal"))

def count(number, noun):
    return "%s %s%s" % (number, noun, "" if number == 1 else "s")

def serverlog(message):
    # Importing it earlier would be circular
    import bb.server.process
    bb.server.process.serverlog("Shared connections: " + message)
