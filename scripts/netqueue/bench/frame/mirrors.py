# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""A mirror of any protocol, and what those who ask it need in their environment.

    with open_mirror("sftp", folder, home, certificates) as mirror:
        mirror.equip(build)
        ... mirror.served.counters()
"""

import contextlib
import dataclasses
import os
import urllib.parse
from pathlib import Path

from netqueue.lab import s3server, sshd
from netqueue.lab.certificates import trust
from netqueue.lab.mirror import serve


@dataclasses.dataclass
class Mirror:
    """A mirror of lab/mirror.py, lab/sshd.py or lab/s3server.py, and what differs between them."""
    served: object
    variables: dict     # of the environment of who asks
    logs: str           # files with a line for each request

    def url_behind(self, port):
        """Its URL at another port of this machine."""
        parts = urllib.parse.urlsplit(self.served.url)
        return urllib.parse.urlunsplit(parts._replace(netloc="%s:%d" % (parts.hostname, port)))

    def equip(self, build):
        """Add to the environment of a Build what its programs need to ask this mirror."""
        build.environment.update(self.variables)


class SSHMirror(Mirror):
    def equip(self, build):
        build.environment.update(self.variables, PATH="%s:%s" % (self.served.tools, build.environment["PATH"]))

    def url_behind(self, port):
        # ssh knows the key by the port
        hosts = self.served.work / "known_hosts"
        line = hosts.read_text().splitlines()[0]
        with open(hosts, "a") as output:
            output.write("[127.0.0.1]:%d %s\n" % (port, line.partition(" ")[2]))
        return super().url_behind(port)


class S3Mirror(Mirror):
    def equip(self, build):
        build.environment.update(PATH="%s:%s" % (self.served.tools, build.environment["PATH"]))
        self._write(build.home)

    def url_behind(self, port):
        # The port is in the configuration of aws, which is in HOME
        self.served.configure(s3server.KEYS, port)
        self._write(Path(self.variables["HOME"]))
        return self.served.url

    def _write(self, home):
        for name, text in self.served.home_files.items():
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            (home / name).write_text(text)


@contextlib.contextmanager
def open_mirror(protocol, folder, home, certificates, log=False, keepalive=1000):
    """Serve folder; yields a Mirror. home is the HOME of who asks.

    log: whether requests are counted. keepalive: requests until a connection is ended, nginx's default.
    """
    home.mkdir(parents=True, exist_ok=True)
    if protocol == "sftp":
        with sshd.serve(folder, log=log) as served:
            path = "%s:%s" % (served.tools, os.environ.get("PATH", os.defpath))
            yield SSHMirror(served, {"HOME": str(home), "PATH": path}, "%s/sessions/*" % served.work)
        return
    if protocol == "s3":
        with s3server.serve(folder, certificates) as served:
            path = "%s:%s" % (served.tools, os.environ.get("PATH", os.defpath))
            # The machine's own setting would have precedence
            variables = {"HOME": str(home), "PATH": path, "AWS_CA_BUNDLE": str(served.nginx.ca_file)}
            mirror = S3Mirror(served, variables, "%s/access.log" % served.nginx.work)
            mirror.url_behind(served.port)
            yield mirror
        return
    with serve(folder, protocol, server="nginx", server_extra="log_not_found off;", certificates=certificates,
               keepalive_requests=keepalive) as served:
        variables = {"HOME": str(home)}
        if served.ca_file:
            variables.update(trust(served.ca_file, home))
        yield Mirror(served, variables, "%s/access.log" % served.work)
