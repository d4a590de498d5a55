# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""nginx with a configuration of its own, as a mirror that counts. Called by mirror.py.

    server = Nginx(find_nginx(), folder, work, certificates=None, options={...})
    print(server.url, server.counters().connections)
    server.stop()
"""

import grp
import os
import pwd
import shutil
import socket
import subprocess
import time
from typing import Optional

from netqueue import Problem
from netqueue.lab.counters import Request, summarise
from netqueue.lab.serverprocess import PORT_ATTEMPTS, START_SECONDS, die_with_parent, end, free_port

CONFIG = """
%(user)s
worker_processes 1;
daemon off;
pid %(dir)s/nginx.pid;
error_log %(dir)s/error.log;
events { worker_connections 4096; }
http {
    types { }
    default_type application/octet-stream;
    sendfile on;
    tcp_nodelay on;
    client_body_temp_path %(dir)s/body;
    proxy_temp_path %(dir)s/proxy;
    fastcgi_temp_path %(dir)s/fastcgi;
    uwsgi_temp_path %(dir)s/uwsgi;
    scgi_temp_path %(dir)s/scgi;
    log_format count '$connection $connection_requests $request $status $ssl_session_reused';
    %(http_extra)s
    server {
        listen 127.0.0.1:%(port)d%(ssl)s;
        server_name localhost;
        access_log %(dir)s/access.log count;
        keepalive_requests %(keepalive)d;
        %(certificate)s
        %(server_extra)s
        location / { root "%(root)s"; }
    }
    server {
        listen unix:%(dir)s/status.sock;
        access_log off;
        location / { stub_status; }
    }
}
"""


def find_nginx() -> Optional[str]:
    # It is in sbin, which a user's PATH often lacks.
    return shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")


class Nginx:
    """One nginx with its own configuration, logs and pid file, ended by its pid."""

    def __init__(self, program, directory, work, certificates, options):
        self.program = program
        self.directory = directory
        self.work = work
        self.options = options
        self.certificates = certificates
        self.ca_file = certificates.ca_file if certificates else None
        self.software = _version(program)
        self.process = None
        self.port = None
        self.status = {}
        self.base = {}
        self.log_start = 0
        self._start()
        self.reset()

    @property
    def url(self):
        return "%s://localhost:%d" % ("https" if self.certificates else "http", self.port)

    def _start(self):
        for _ in range(PORT_ATTEMPTS):
            self.port = free_port()
            (self.work / "nginx.conf").write_text(self._config())
            # nginx tries a taken port for 2.5 seconds, then gives up.
            with open(self.work / "output.log", "wb") as output:
                self.process = subprocess.Popen(
                    [self.program, "-p", str(self.work), "-c", str(self.work / "nginx.conf")],
                    stdin=subprocess.DEVNULL, stdout=output, stderr=output, preexec_fn=die_with_parent)
            if self._wait_until_ready():
                return
            self.stop()
            output = (self.work / "output.log").read_text(errors="replace")
            if "Address already in use" not in output:
                break
        raise Problem("nginx does not start: %s" % (output.strip().splitlines() or ["no message"])[-1])

    def _config(self):
        values = dict(self.options, dir=self.work, root=self.directory, port=self.port, user="",
                      ssl="", certificate="")
        if os.geteuid() == 0:
            # Else the worker becomes nobody, who may not read a private folder.
            values["user"] = "user %s %s;" % (pwd.getpwuid(0).pw_name, grp.getgrgid(0).gr_name)
        if self.certificates:
            values["ssl"] = " ssl"
            values["certificate"] = ("ssl_certificate %s; ssl_certificate_key %s;"
                                     % (self.certificates.server_file, self.certificates.key_file))
        return CONFIG % values

    def _wait_until_ready(self):
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                self._read_status()
                return True
            except OSError:
                time.sleep(0.02)    # nginx has no way to tell that it listens
        return False

    def _read_status(self):
        """stub_status, over its Unix socket. Costs one accept and one request, counted by nginx."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(5)
            connection.connect(str(self.work / "status.sock"))
            connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
            answer = b""
            while True:
                data = connection.recv(4096)
                if not data:
                    break
                answer += data
        words = answer.partition(b"\r\n\r\n")[2].split()
        # "Active connections: A / server accepts handled requests / accepts handled requests / ..."
        try:
            return {"accepts": int(words[7]), "requests": int(words[9])}
        except (IndexError, ValueError) as error:
            raise OSError("no status from nginx: %r" % answer) from error

    def reset(self):
        """Count from here."""
        self.base = self._read_status()
        self.log_start = self._log_size()

    def counters(self):
        """Since the start or the last reset()."""
        # This reading is one of the connections; that of reset() is in the base.
        connections = self._read_status()["accepts"] - self.base["accepts"] - 1
        return summarise(connections, self.requests())

    def _log_size(self):
        log = self.work / "access.log"
        return log.stat().st_size if log.exists() else 0

    def requests(self):
        """Since the start or the last reset(), in the order in which they ended."""
        log = self.work / "access.log"
        if not log.exists():
            return []
        with open(log, "rb") as lines:
            lines.seek(self.log_start)
            text = lines.read().decode("ascii", "replace")
        return [_parse(line) for line in text.splitlines()]

    def stop(self):
        """Idempotent; as serverprocess.end()."""
        if self.process is not None:
            end(self.process)
            self.process = None


def _parse(line):
    # The request may be anything a client sent, with any number of blanks in it.
    connection, number, rest = line.split(" ", 2)
    request, status, reused = rest.rsplit(" ", 2)
    words = request.split(" ") + ["", ""]
    return Request(int(connection), int(number), words[0], words[1], int(status), reused == "r")


def _version(program):
    done = subprocess.run([program, "-v"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, timeout=10)
    # "nginx version: nginx/1.22.1"
    return done.stdout.strip().rpartition(" ")[2].replace("/", " ") or "nginx"
