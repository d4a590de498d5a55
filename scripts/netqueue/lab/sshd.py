# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""An sstate mirror over sftp on loopback that counts: a real OpenSSH sshd.

The demo, the benchmark and tests serve a folder with it and ask afterwards how
many logins there were and what was requested. It runs as the user who calls
it, root or not, with keys of its own and sshd's defaults, MaxStartups among
them.

ssh does not look at $HOME, so its configuration cannot be given that way:
mirror.tools is a folder with an ssh and an sftp that know the mirror's key and
use its identity. It has to be the first on the PATH of the client.

    with serve(folder) as mirror:
        build.run(...)          # SSTATE_MIRRORS from mirror.url, PATH from mirror.tools
        print(mirror.counters().logins)
"""

import contextlib
import dataclasses
import os
import pwd
import re
import select
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from netqueue import Problem
from netqueue.lab.processes import children
from netqueue.lab.serverprocess import PORT_ATTEMPTS, START_SECONDS, die_with_parent, end, free_port

SFTP_SERVERS = ("/usr/lib/openssh/sftp-server", "/usr/libexec/openssh/sftp-server", "/usr/libexec/sftp-server",
                "/usr/lib/ssh/sftp-server", "/usr/libexec/ssh/sftp-server", "/usr/local/libexec/sftp-server")
# Compiled into Debian's sshd; its service makes it. Needed by root only.
PRIVSEP = Path("/run/sshd")

SERVER_CONFIG = """
Port %(port)d
ListenAddress %(address)s
HostKey %(dir)s/host_key
PidFile %(dir)s/ready
AuthorizedKeysFile %(dir)s/authorized_keys
StrictModes no
UsePAM %(pam)s
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
UseDNS no
PrintMotd no
LogLevel VERBOSE
# Else bash, through which sshd starts a subsystem, reads the user's .bashrc, which may take longer than the login
SetEnv SHLVL=2
Subsystem sftp %(subsystem)s
%(extra)s
"""

CLIENT_CONFIG = """
IdentityFile %(identity)s
IdentitiesOnly %(only)s
UserKnownHostsFile %(known_hosts)s
GlobalKnownHostsFile /dev/null
StrictHostKeyChecking yes
UpdateHostKeys no
"""

# sshd and sftp-server keep no counters: this is what their logs say.
EVENTS = {
    "connections": re.compile(r"^Connection from ", re.M),
    "logins": re.compile(r"^Accepted publickey ", re.M),
    "dropped": re.compile(r"^(drop connection #|error: no more sessions)", re.M),
    "stats": re.compile(r"^stat name ", re.M),
    "opens": re.compile(r"^open ", re.M),
    "closes": re.compile(r"^close ", re.M),
}


@dataclasses.dataclass
class Counters:
    connections: int    # accepted and not dropped by MaxStartups
    logins: int
    dropped: int        # by MaxStartups
    sessions: int       # in which an sftp-server ran
    stats: int          # these three are 0 with internal-sftp, which has nowhere to log to
    opens: int          # that succeeded or not
    closes: int

    @property
    def requests(self):
        """What is counted of them: whether a file is there, and that it is fetched."""
        return self.stats + self.opens


@contextlib.contextmanager
def serve(directory, address="127.0.0.1", extra="", log=True):
    """Serve the folder until the block ends. Yields a mirror: url, port, host, user, tools,
    identity, software, work, counters(), reset(), stop().

    extra: lines of sshd_config. log: count STATs and OPENs, which costs the server time; without
    it, or where there is no sftp-server program, sftp is sshd's own.
    """
    lacking = missing()
    if lacking:
        raise Problem("%s is not installed" % lacking)
    try:
        pwd.getpwuid(os.geteuid())
    except KeyError as error:
        raise Problem("ssh needs an entry in /etc/passwd for the user %d" % os.geteuid()) from error
    work = Path(tempfile.mkdtemp(prefix="netqueue-sshd-"))
    mirror = None
    try:
        mirror = Sshd(find_sshd(), Path(directory).resolve(), work, address, extra, log)
        yield mirror
    finally:
        if mirror is not None:
            mirror.stop()
        shutil.rmtree(work, ignore_errors=True)


def missing():
    """The name of a program that serve() needs and that is not installed, or None."""
    lacking = [] if find_sshd() else ["sshd"]
    lacking += [program for program in ("ssh", "sftp", "ssh-keygen") if not shutil.which(program)]
    return lacking[0] if lacking else None


def find_sshd():
    # Absolute, since sshd starts itself anew for each connection.
    return shutil.which("sshd", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")


def make_key(path):
    """An ed25519 key pair without a passphrase, path and path.pub."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "netqueue", "-f", str(path)],
                   stdin=subprocess.DEVNULL, check=True, timeout=30)


def make_tools(folder, identity=None, known_hosts="/dev/null"):
    """The folder with an ssh and an sftp that use the identity, or the agent only, and believe known_hosts only."""
    folder.mkdir()
    config = folder / "ssh_config"
    config.write_text(CLIENT_CONFIG % {"identity": identity or "none", "only": "yes" if identity else "no",
                                       "known_hosts": known_hosts})
    for name in ("ssh", "sftp"):
        tool = folder / name
        tool.write_text('#!/bin/sh\nexec %s -F %s "$@"\n' % (shutil.which(name), config))
        tool.chmod(0o755)
    return folder


class Sshd:
    """One sshd with its own keys, configuration and logs, ended by its pid."""

    ca_file = None      # as the mirrors of mirror.py have it

    def __init__(self, program, directory, work, address, extra, log):
        self.program = program
        self.directory = directory
        self.work = work
        self.address = address
        self.user = pwd.getpwuid(os.geteuid()).pw_name
        self.tools = work / "tools"
        self.identity = work / "user_key"
        self.process = None
        self.port = None
        self.software = _version()
        self.base = dict.fromkeys(EVENTS, 0)
        self.base_sessions = 0
        self.base_lines = {}
        self._make_keys()
        make_tools(self.tools, self.identity, work / "known_hosts")
        self._start({"dir": work, "address": address, "extra": extra, "subsystem": self._subsystem(log),
                     "pam": "yes" if _locked(self.user) else "no"})

    @property
    def host(self):
        """As it stands in a URL."""
        return "[%s]" % self.address if ":" in self.address else self.address

    @property
    def counts_requests(self):
        """Whether it is logged what is asked for."""
        return (self.work / "sessions").exists()

    @property
    def url(self):
        return "sftp://%s:%d%s" % (self.host, self.port, self.directory)

    def _make_keys(self):
        make_key(self.work / "host_key")
        make_key(self.identity)
        shutil.copy(self.work / "user_key.pub", self.work / "authorized_keys")

    def _subsystem(self, log):
        servers = [server for server in SFTP_SERVERS if os.access(server, os.X_OK)]
        if not log or not servers:
            return "internal-sftp"
        # Its log goes to syslog or to its stderr, which is the client's: so one file for each session.
        (self.work / "sessions").mkdir()
        wrapper = self.work / "sftp-server"
        wrapper.write_text("#!/bin/sh\nexec %s -e -l VERBOSE 2>>%s/sessions/$$\n" % (servers[0], self.work))
        wrapper.chmod(0o755)
        return wrapper

    def _start(self, values):
        if os.geteuid() == 0:
            PRIVSEP.mkdir(mode=0o755, parents=True, exist_ok=True)
        for _ in range(PORT_ATTEMPTS):
            self.port = free_port()
            (self.work / "sshd_config").write_text(SERVER_CONFIG % dict(values, port=self.port))
            key = " ".join((self.work / "host_key.pub").read_text().split()[:2])
            names = ["[%s]:%d" % (name, self.port) for name in ("127.0.0.1", "localhost", "::1")]
            (self.work / "known_hosts").write_text("%s %s\n" % (",".join(names), key))
            if self._run():
                return
            self.stop()
            output = self._log()
            if "Address already in use" not in output:
                break
        raise Problem("sshd does not start: %s" % (output.strip().splitlines() or ["no message"])[-1])

    def _run(self):
        """Start it; True once it listens. It writes its pid after that, here into a fifo: so we hear it at once."""
        ready = self.work / "ready"
        if not ready.exists():
            os.mkfifo(ready)
        fifo = os.open(ready, os.O_RDONLY | os.O_NONBLOCK)
        try:
            with open(self.work / "sshd.log", "wb") as log:
                self.process = subprocess.Popen(
                    [self.program, "-D", "-e", "-f", str(self.work / "sshd_config")], stdin=subprocess.DEVNULL,
                    stdout=log, stderr=log, cwd="/", preexec_fn=die_with_parent)
            poll = select.poll()
            poll.register(fifo, select.POLLIN)
            deadline = time.monotonic() + START_SECONDS
            while time.monotonic() < deadline:
                if poll.poll(100):
                    return True
                if self.process.poll() is not None:
                    return False
            return False
        finally:
            os.close(fifo)

    def _log(self):
        return (self.work / "sshd.log").read_text(errors="replace")

    def _read(self):
        """The counts of EVENTS since the start, and the number of sessions."""
        sessions = list(self.work.glob("sessions/*"))
        text = "\n".join([self._log()] + [path.read_text(errors="replace") for path in sessions])
        counts = {name: len(event.findall(text)) for name, event in EVENTS.items()}
        return counts, len(sessions) or text.count("Starting session: subsystem 'sftp'")

    def reset(self):
        """Count from here."""
        self.base, self.base_sessions = self._read()
        self.base_lines = {path: len(lines) for path, lines in self._session_lines().items()}

    def counters(self):
        """Since the start or the last reset()."""
        counts, sessions = self._read()
        return Counters(sessions=sessions - self.base_sessions,
                        **{name: count - self.base[name] for name, count in counts.items()})

    def _session_lines(self):
        return {path: path.read_text(errors="replace").splitlines() for path in sorted(self.work.glob("sessions/*"))}

    def requests(self):
        """What each session has logged since the start or the last reset(), a list of lines for each."""
        return [lines[self.base_lines.get(path, 0):] for path, lines in self._session_lines().items()]

    def start_again(self):
        """After stop(), on the same port. What was logged before is not counted any more."""
        if not self._run():
            lines = self._log().strip().splitlines() or ["no message"]
            raise Problem("sshd does not start again: %s" % lines[-1])

    def stop(self):
        """Idempotent; as serverprocess.end(). Ends the sessions too."""
        if self.process is None:
            return
        # sshd does not end its sessions when it ends itself.
        sessions = children(self.process.pid)
        end(self.process)
        for pid in sessions:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        self.process = None


def _locked(user):
    """Whether the account is locked, which keys do not open without PAM. Only root is told."""
    with contextlib.suppress(OSError):
        for line in Path("/etc/shadow").read_text(errors="replace").splitlines():
            if line.startswith(user + ":"):
                return line.split(":")[1].startswith("!")
    return False


def _version():
    done = subprocess.run(["ssh", "-V"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, timeout=10)
    # "OpenSSH_9.2p1 Debian-2+deb12u3, OpenSSL 3.0.11 19 Sep 2023"
    return done.stdout.strip().partition(",")[0].replace("_", " ", 1) or "OpenSSH"
