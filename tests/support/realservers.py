# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""Servers and proxies from Debian on loopback, each with a folder and a port of its own: in the foreground, ended by pid.

    with Apache(files.folder, "KeepAlive Off") as server:
        asking.ask("HEAD", [server.url + "/x"])[0].wait()
        assert server.connections(requests=1) == 1

A program that is not installed skips the test. Started by root, Apache and squid
serve as nobody.
"""

import contextlib
import grp
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import pytest

from netqueue.lab import sshd
from netqueue.lab.serverprocess import PORT_ATTEMPTS, accepts, die_with_parent, end, free_port
from support.asking import wait_until

SYSTEM_PATH = ":/usr/sbin:/usr/local/sbin:/sbin"
APACHE_MODULES = "/usr/lib/apache2/modules"
# The part of a configuration that lets it run for a RealServer
APACHE_PROCESS = """
ServerName localhost
Listen 127.0.0.1:%(port)d
PidFile %(work)s/pid
DefaultRuntimeDir %(work)s
ErrorLog %(work)s/error.log
User %(user)s
Group %(group)s
"""


def user():
    """Who serves: not root, which some programs refuse to be. Returns names of the user and its group."""
    entry = pwd.getpwnam("nobody") if os.getuid() == 0 else pwd.getpwuid(os.getuid())
    return entry.pw_name, grp.getgrgid(entry.pw_gid).gr_name


class Started:
    """
    A context in which a program runs, at a port that was free, with a folder work of its own. A subclass has program for
    messages, _start(), which returns whether it runs, output() and stop().
    """

    def __enter__(self):
        try:
            for _ in range(PORT_ATTEMPTS):
                if self._start():
                    return self
                self.stop()
            raise AssertionError("%s does not start: %s" % (self.program, self.output()[-2000:]))
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *exception):
        self.stop()
        shutil.rmtree(self.work, ignore_errors=True)

    def is_ready(self):
        return accepts(self.port)


class RealServer(Started):
    """
    A program with the configuration CONFIG, in which %(work)s is its folder, %(root)s what it serves, %(port)d its port
    and %(extra)s what the test adds. LOG, if it has one, has a line for each request that begins with the client's port.
    """
    program = CONFIG = None
    LOG = "access.log"
    arguments = ("%(work)s/conf",)
    scheme = "http"

    def __init__(self, root=None, extra="", **values):
        self.path = shutil.which(self.program, path=os.environ.get("PATH", os.defpath) + SYSTEM_PATH)
        if not self.path:
            pytest.skip("%s is not installed" % self.program)
        self.work = Path(tempfile.mkdtemp(prefix="netqueue-%s-" % self.program))
        name, group = user()
        if os.getuid() == 0:
            # Who serves writes logs there
            shutil.chown(self.work, name)
            self.work.chmod(0o755)
        self.values = dict(values, work=self.work, root=root, extra=extra, user=name, group=group)
        self.port = self.process = None

    @property
    def url(self):
        return "%s://127.0.0.1:%d" % (self.scheme, self.port)

    def _start(self):
        self.port = self.values["port"] = free_port()
        (self.work / "conf").write_text(self.CONFIG % self.values)
        with open(self.work / "output", "wb") as output:
            self.process = subprocess.Popen([self.path, *(argument % self.values for argument in self.arguments)], cwd=self.work,
                                            stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
                                            preexec_fn=die_with_parent)
        wait_until(lambda: self.process.poll() is not None or self.is_ready(), "%s listens" % self.program)
        return self.process.poll() is None

    def output(self):
        """What it has said, also into files"""
        paths = [self.work / name for name in ("output", "error.log", "cache.log", "log")]
        return "".join(path.read_text(errors="replace") for path in paths if path.exists())

    def log(self):
        """The lines of its log, as lists of words"""
        path = self.work / self.LOG
        return [line.split() for line in path.read_text(errors="replace").splitlines()] if path.exists() else []

    def connections(self, requests):
        """Ends the server, which has logged at least so many requests then. Returns over how many connections they came."""
        self.stop()
        log = self.log()
        assert len(log) >= requests, "%d requests are logged" % len(log)
        return len({line[0] for line in log})

    def stop(self):
        if self.process:
            end(self.process)
            # Its children, if it had no time to end them
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process = None


class Apache(RealServer):
    """mpm is one of event, worker and prefork; with certificates it serves https"""
    program = "apache2"
    arguments = ("-d", "%(work)s", "-f", "%(work)s/conf", "-D", "FOREGROUND")
    CONFIG = APACHE_PROCESS + """
LoadModule mpm_%(mpm)s_module %(modules)s/mod_mpm_%(mpm)s.so
LoadModule authz_core_module %(modules)s/mod_authz_core.so
LoadModule env_module %(modules)s/mod_env.so
LogFormat "%%{remote}p %%>s" port
CustomLog %(work)s/access.log port
DocumentRoot "%(root)s"
%(extra)s
"""

    TLS = """
LoadModule ssl_module %s/mod_ssl.so
LoadModule socache_shmcb_module %s/mod_socache_shmcb.so
SSLEngine on
SSLCertificateFile %s
SSLCertificateKeyFile %s
"""

    def __init__(self, root, extra="", mpm="event", certificates=None):
        self.scheme = "https" if certificates else "http"
        if certificates:
            extra += self.TLS % (APACHE_MODULES, APACHE_MODULES, certificates.server_file, certificates.key_file)
        super().__init__(root, extra, mpm=mpm, modules=APACHE_MODULES)


class Lighttpd(RealServer):
    program = "lighttpd"
    arguments = ("-D", "-f", "%(work)s/conf")
    CONFIG = """
server.bind = "127.0.0.1"
server.port = %(port)d
server.document-root = "%(root)s"
server.errorlog = "%(work)s/error.log"
server.modules = ("mod_accesslog")
accesslog.filename = "%(work)s/access.log"
accesslog.format = "%%{remote}p %%s"
%(extra)s
"""


class Haproxy(RealServer):
    """Before the server at the port behind; front and extra are for the frontend and the backend"""
    program = "haproxy"
    arguments = ("-db", "-f", "%(work)s/conf")
    # That of standard output
    LOG = "output"
    CONFIG = """
global
    log stdout format raw daemon
    stats socket %(work)s/socket
defaults
    mode http
    log global
    option dontlognull
    timeout connect 5s
    timeout client 60s
    timeout server 60s
frontend front
    bind 127.0.0.1:%(port)d
    log-format "%%cp %%ST %%Ts.%%ms"
    %(front)s
    default_backend back
backend back
    %(extra)s
    server one 127.0.0.1:%(behind)d %(limit)s
"""

    def __init__(self, behind, front="", extra="", limit=""):
        super().__init__(None, extra, behind=behind, front=front, limit=limit)


class Squid(RealServer):
    program = "squid"
    arguments = ("-N", "-f", "%(work)s/conf")
    # listen: its port as a proxy, or as the server of others
    CONFIG = """
http_port 127.0.0.1:%(port)d %(listen)s
pid_filename %(work)s/pid
cache_effective_user %(user)s
cache_log %(work)s/cache.log
logformat port %%>p %%>Hs
access_log stdio:%(work)s/access.log port
buffered_logs off
coredump_dir %(work)s
visible_hostname localhost
shutdown_lifetime 0 seconds
pinger_enable off
http_access allow all
%(extra)s
"""

    def __init__(self, extra="", listen=""):
        super().__init__(None, extra, listen=listen)


class Tinyproxy(RealServer):
    program = "tinyproxy"
    arguments = ("-d", "-c", "%(work)s/conf")
    CONFIG = """
Port %(port)d
Listen 127.0.0.1
LogFile "%(work)s/log"
LogLevel Info
MaxClients 100
Timeout 30
%(extra)s
"""


class Proftpd(RealServer):
    """sftp by mod_sftp for the user who runs it. Who has tools first in PATH is logged in."""
    program = "proftpd"
    arguments = ("-n", "-q", "-c", "%(work)s/conf")
    CONFIG = """
ServerType standalone
DefaultAddress 127.0.0.1
Port %(port)d
PidFile %(work)s/pid
ScoreboardFile %(work)s/scoreboard
SystemLog %(work)s/log
WtmpLog off
DelayEngine off
UseIPv6 off
UseFtpUsers off
RequireValidShell off
RootLogin on
AuthOrder mod_auth_unix.c
ModulePath /usr/lib/proftpd
ControlsEngine off
LoadModule mod_sftp.c
SFTPEngine on
SFTPHostKey %(work)s/host_key
SFTPAuthMethods publickey
SFTPAuthorizedUserKeys file:%(work)s/keys
%(extra)s
"""

    def __init__(self, root, extra=""):
        if sshd.missing() or os.getuid() != 0:
            pytest.skip("%s is not installed" % sshd.missing() if sshd.missing() else "proftpd has to be started by root")
        super().__init__(root, extra)
        for name in ("host_key", "user_key"):
            sshd.make_key(self.work / name)
        with open(self.work / "keys", "wb") as keys:
            subprocess.run(["ssh-keygen", "-e", "-f", str(self.work / "user_key.pub")], stdout=keys, check=True, timeout=30)
        self.tools = sshd.make_tools(self.work / "tools", self.work / "user_key", self.work / "known_hosts")

    @property
    def url(self):
        return "sftp://127.0.0.1:%d%s" % (self.port, self.values["root"])

    def _start(self):
        started = super()._start()
        key = " ".join((self.work / "host_key.pub").read_text().split()[:2])
        (self.work / "known_hosts").write_text("[127.0.0.1]:%d %s\n" % (self.port, key))
        return started

    def sessions(self):
        """How many there are now: each has a process"""
        children = Path("/proc/%d/task/%d/children" % (self.process.pid, self.process.pid))
        return len(children.read_text().split())
