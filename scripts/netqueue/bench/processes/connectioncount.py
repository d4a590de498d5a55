# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""The processes of `scripts/bench lanes`: bench/connectioncount.py starts them. Argument: a JSON object, see main()."""

import http.server
import json
import os
import sys
import tempfile
import time

# Until all is answered
SECONDS = 300


def main(folder, serve=None, **arguments):
    if serve:
        serve_slowly(folder, serve)
    else:
        ask(folder=folder, **arguments)


def ask(lib, url, files, connections, most, folder):
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
        peak = max([peak] + [host.lanes.size for host in list(server.pool.hosts.values())])
        if time.monotonic() - started > SECONDS:
            sys.exit("no answer within %d s" % SECONDS)
    print(json.dumps({"seconds": time.monotonic() - started, "connections": peak}), flush=True)
    server.stop()


def serve_slowly(folder, seconds):
    """Serve a folder until the end, with so many seconds for each answer. Writes the port."""
    class Handler(http.server.SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def send_head(self):
            time.sleep(seconds)
            return super().send_head()

        def log_message(self, *args):
            pass

    os.chdir(folder)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(json.dumps(server.server_address[1]), flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
