# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""An sstate mirror on loopback that counts: nginx, or a small server of our own.

The demo, the benchmarks and the system tests serve a folder with it and ask
afterwards how many connections were accepted and what was requested. nginx is
used when it is installed; mirror.software says which it is. https gets a CA of
its own, made by certificates.py.

Not a general server: 127.0.0.1 only, one folder, GET and HEAD.

    with serve(folder, protocol="https") as mirror:
        build.run(...)          # SSTATE_MIRRORS from mirror.url
        print(mirror.counters().connections)
"""

import contextlib
import shutil
import tempfile
from pathlib import Path

from netqueue import Problem
from netqueue.lab.certificates import make_certificates
from netqueue.lab.nginx import Nginx, find_nginx
from netqueue.lab.ownserver import OwnServer


@contextlib.contextmanager
def serve(directory, protocol="http", server=None, keepalive_requests=1000, http_extra="",
          server_extra="", certificates=None):
    """Serve the folder until the block ends. Yields a mirror: url, port, ca_file, software,
    counters(), requests(), reset(), stop().

    server: "nginx", "own" or None for the best there is. http_extra and
    server_extra are nginx configuration, such as limit_conn_zone and
    limit_conn; only nginx has them. certificates: what make_certificates()
    gave, to use one CA for several mirrors.
    """
    if protocol not in ("http", "https"):
        raise Problem("no mirror for the protocol %r: http or https" % protocol)
    nginx = find_nginx()
    server = server or ("nginx" if nginx else "own")
    if server == "nginx" and not nginx:
        raise Problem("nginx is not installed")
    if server == "own" and (http_extra or server_extra):
        raise Problem("limits need nginx, which is not installed")
    work = Path(tempfile.mkdtemp(prefix="netqueue-mirror-"))
    mirror = None
    try:
        if protocol == "http":
            certificates = None
        elif certificates is None:
            certificates = make_certificates(work / "tls")
        if server == "nginx":
            options = {"keepalive": keepalive_requests, "http_extra": http_extra,
                       "server_extra": server_extra}
            mirror = Nginx(nginx, Path(directory).resolve(), work, certificates, options)
        else:
            mirror = OwnServer(Path(directory).resolve(), certificates, keepalive_requests)
        yield mirror
    finally:
        if mirror is not None:
            mirror.stop()
        shutil.rmtree(work, ignore_errors=True)
