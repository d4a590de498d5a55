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
from bb.fetch2.shared import ADDRESS
from bb.networksettings import settings

# Tasks that may still be leaving when others come
SPARE_PEERS = 16


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
        server = ConnectionServer(self.settings.connections, self.settings.threads + SPARE_PEERS, log=serverlog)
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

    def _report(self, server):
        for host, trouble in server.troubles():
            if host not in self.reported:
                bb.warn("Shared connections to %s were suspended: %s" % (host, trouble))
        hosts = server.statistics()
        for origin, done in hosts.items():
            bb.debug(1, "Sstate network, %s://%s: %s files, %.1f MiB, %s requests over %s connections (%s retries, %s refusals)" %
                     (origin.scheme, origin.host, done.files, done.bytes / 1048576, done.requests, done.connections,
                      done.retries, done.refusals))
        size, requests, connections, retries, refusals = (sum(getattr(done, name) for done in hosts.values()) for name in
                                                          ("bytes", "requests", "connections", "retries", "refusals"))
        if requests:
            objects = server.peers_served() + (self.prefetch.objects if self.prefetch else 0)
            seconds = server.busy_seconds()
            bb.note("Sstate network: %s objects, %.1f MiB in %.1f s, %s requests over %s connections (%s retries, %s refusals)" %
                    (objects, size / 1048576, seconds, requests, connections, retries, refusals))
            bb.event.fire(bb.event.SstateNetworkSummary(objects, size, seconds, requests, connections, retries, refusals), self.d)


def serverlog(message):
    # Importing it earlier would be circular
    import bb.server.process
    bb.server.process.serverlog("Shared connections: " + message)
