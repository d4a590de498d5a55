# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""A server that needs its time for each answer, for `scripts/bench lanes`: bench/connectioncount.py starts it.

Argument: a JSON object, see main(). It writes its port.
"""

import http.server
import json
import os
import sys
import time


def main(folder, seconds):
    """Serve a folder until the end, with so many seconds for each answer."""
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
