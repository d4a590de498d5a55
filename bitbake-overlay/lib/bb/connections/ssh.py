#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
The program ssh, with a subsystem of the server at its standard input and output.

Used by sftp.py, in the thread of the event loop. ssh is started as sftp(1)
starts it, so that agent, keys, known_hosts and ~/.ssh/config apply; its
environment is the one that is given. Its error messages are kept, since
nothing else tells why there is no connection.

    ssh = SSH(loop, origin, environment)
    sock = ssh.start("sftp")        # one end of a socket pair
    ...
    ssh.end()
"""

import asyncio
import os
import re
import signal
import socket
import subprocess

from bb.connections import ConnectError, RefusedError
from bb.connections.request import ssh_program

# As sftp(1) passes them when fetch2/sftp.py calls it. ssh must not become a master that other sessions depend on.
OPTIONS = ("-oForwardX11=no", "-oForwardAgent=no", "-oPermitLocalCommand=no", "-oClearAllForwardings=yes",
           "-oBatchMode=yes", "-oControlMaster=no")

# Seconds for ssh to end by itself: during the login, which sshd should not see interrupted, and later; after SIGTERM
LOGIN_GRACE = 5
GRACE = 1
TERMINATE_GRACE = 1
# Seconds to wait for the last error messages, once the connection has ended
MESSAGE_GRACE = 1

# Bytes of its messages that are kept
MAX_MESSAGES = 4096

# Another attempt would fail in the same way
PERMANENT = re.compile(
    r"Permission denied \(|Host key verification failed|Too many authentication failures|Unable to negotiate|"
    r"Could not resolve hostname (?!.*(Temporary failure|Try again))|subsystem request failed|"
    r"[Bb]ad configuration option|Bad owner or permissions|Can't open user config|banner exchange: .*invalid format")

# How sshd declines to serve: MaxStartups, PerSourcePenalties, too many processes
REFUSED = re.compile(
    r"exchange_identification: ((read|write): )?(Connection|Broken pipe)|Connection (closed|reset) by |"
    r"closed by remote host|Not allowed at this time|Exceeded MaxStartups")


class SSH:
    """established is set by the owner once the login is done"""

    def __init__(self, loop, origin, environment):
        self.established = False
        self._loop = loop
        self._origin = origin
        self._environment = environment
        self._sock = None
        self._process = None
        self._ending = False
        self._messages = b""
        # Set when ssh has closed its standard error, which is when it has ended
        self._silent = asyncio.Event()

    def start(self, subsystem):
        """Returns a non-blocking socket, which the caller closes. Does not wait for the connection. Raises ConnectError."""
        command = [ssh_program(self._environment.get("PATH", "")), *OPTIONS]
        if self._origin.port:
            command += ["-p", str(self._origin.port)]
        if self._origin.user:
            command += ["-l", self._origin.user]
        command += ["-s", "--", self._origin.host, subsystem]
        try:
            self._sock, theirs = socket.socketpair()
            with theirs:
                # A session of its own: not interrupted by the terminal's Ctrl-C, no terminal to ask for a password
                self._process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, bufsize=0,
                                                 env=self._environment, close_fds=True, start_new_session=True)
        except (OSError, ValueError) as e:
            if self._sock:
                self._sock.close()
            # No such program, or a name that cannot be passed to it
            permanent = isinstance(e, (ValueError, FileNotFoundError, PermissionError))
            raise self.connect_error("cannot start ssh: %s" % e, not permanent) from e
        self._sock.setblocking(False)
        os.set_blocking(self._process.stderr.fileno(), False)
        self._loop.add_reader(self._process.stderr, self._read_messages)
        return self._sock

    def _read_messages(self):
        data = self._process.stderr.read(MAX_MESSAGES)
        if data:
            self._messages = (self._messages + data)[-MAX_MESSAGES:]
        elif data == b"":
            self._loop.remove_reader(self._process.stderr)
            self._silent.set()

    def connect_error(self, reason, retryable):
        return ConnectError("cannot connect to %s: %s" % (self._origin.host, reason), retryable)

    async def error(self):
        """Returns the error for an end of ssh before the session was established, with the most specific of its messages"""
        await self._ends_within(MESSAGE_GRACE)
        lines = [printable(line) for line in reversed(self._messages.splitlines()) if line.strip()]
        for line in lines:
            if PERMANENT.search(line):
                return self.connect_error(line, False)
        for line in lines:
            if REFUSED.search(line):
                return RefusedError("%s: %s" % (self._origin.host, line))
        return self.connect_error(lines[0] if lines else "ssh has ended with status %s" % self._process.poll(), True)

    async def _ends_within(self, seconds):
        try:
            await asyncio.wait_for(self._silent.wait(), seconds)
            # It ends right after it has closed its standard error
            self._process.wait(0.05)
        except (asyncio.TimeoutError, subprocess.TimeoutExpired):
            # A program that ssh has started may keep standard error open
            pass
        return self._process.poll() is not None

    def end(self):
        """The socket being closed, let a task wait until ssh has ended: at most LOGIN_GRACE + TERMINATE_GRACE seconds"""
        if self._process and not self._ending:
            self._ending = True
            self._loop.create_task(self._end())

    async def _end(self):
        if not await self._ends_within(GRACE if self.established else LOGIN_GRACE):
            self._process.terminate()
            if not await self._ends_within(TERMINATE_GRACE):
                # With what it has started
                os.killpg(self._process.pid, signal.SIGKILL)
                await self._ends_within(TERMINATE_GRACE)
        self._loop.remove_reader(self._process.stderr)
        self._process.stderr.close()


def printable(data, limit=200):
    """The first line of bytes from another program, for a message"""
    line = bytes(data[:4 * limit]).strip().partition(b"\n")[0].decode("utf-8", "replace").strip()
    return "".join(c if c.isprintable() else "?" for c in line)[:limit]
