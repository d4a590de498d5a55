# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""The requests of one variant of `scripts/bench lanes`: bench/connectioncount.py starts it as a process.

Argument: a JSON object, see main(). It writes {"seconds": 0.25, "connections": 4}.
"""

import json
import sys
import tempfile
import time

# Until all is answered
SECONDS = 300


def main(lib, url, files, connections, most, folder):
    """
    HEADs of all files, or GETs into files in folder, all at once. Writes how many seconds that took, and the largest
    number of connections that there were.
    """
    sys.path.insert(0, lib)
    import bb.server.process  # noqa: F401
    from bb.connections.request import Request
    from bb.connections.server import ConnectionServer
    server = ConnectionServer(connections, most)
    server.start()
    bodies = [tempfile.TemporaryFile(dir=folder) for _ in range(files)] if folder else [None] * files
    left = {Request("GET" if body else "HEAD", "%s/%d" % (url, number), {}, fd=body.fileno() if body else None, empty=True)
            for number, body in enumerate(bodies)}

    def answered(request, response, error):
        if error or response.status != 200:
            sys.exit("%s: %s" % (request.url, error or response.status))
        left.remove(request)

    started, peak = time.monotonic(), 0
    server.submit(list(left), answered, first=not folder)
    while left:
        server.deliver(0.1)
        peak = max([peak] + [host.connections.size for host in list(server.pool.hosts.values())])
        if time.monotonic() - started > SECONDS:
            sys.exit("no answer within %d s" % SECONDS)
    print(json.dumps({"seconds": time.monotonic() - started, "connections": peak}), flush=True)
    server.stop()


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
