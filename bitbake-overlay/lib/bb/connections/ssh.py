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

    ssh = SSH(loop, origin, environment, "sftp")    # ssh.sock is its input and output
    ssh.end()
"""

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess

from bb.connections import ConnectError, RefusedError
from bb.connections.request import ssh_program

# As sftp(1) passes them when fetch2/sftp.py calls it. ssh must not become a master that other sessions depend on, nor use
# one, whose limits are others; and it has to end by itself if this process is killed.
OPTIONS = ("-oForwardX11=no", "-oForwardAgent=no", "-oPermitLocalCommand=no", "-oClearAllForwardings=yes",
           "-oBatchMode=yes", "-oControlMaster=no", "-oControlPath=none", "-oRequestTTY=no", "-oRemoteCommand=none",
           "-oConnectTimeout=20", "-oServerAliveInterval=10", "-oServerAliveCountMax=2")
# Seconds for ssh to end by itself: during the login, which sshd should not see interrupted, and in all other cases
LOGIN_GRACE, GRACE = 5, 1
# Bytes of its messages that are kept
MAX_MESSAGES = 4096
# Another attempt would fail in the same way
PERMANENT = re.compile(
    r"Permission denied \(|Host key verification failed|Too many authentication failures|Unable to negotiate|"
    r"Could not resolve hostname (?!.*(Temporary failure|Try again))|subsystem request failed|"
    r"[Bb]ad configuration option|Bad owner or permissions|Can't open user config|banner exchange: .*invalid format")
# How sshd declines to serve: MaxStartups, PerSourcePenalties, too many processes; and others: too many connections (12 in
# RFC 4253 11.1)
REFUSED = re.compile(
    r"exchange_identification: ((read|write): )?Connection|Broken pipe|Connection (closed|reset) by |"
    r"closed by remote host|Not allowed at this time|Exceeded MaxStartups|Received disconnect from \S+ port [0-9]+:12: ")


class SSH:
    """The owner closes sock, and sets established after the login. Raises ConnectError if ssh cannot be started."""

    def __init__(self, loop, origin, environment, subsystem):
        self.established = False
        self._loop, self._origin = loop, origin
        self._ending = None
        self._messages = b""
        # Done when ssh has closed its standard error, which is when it ends
        self._silent = loop.create_future()
        command = [ssh_program(environment.get("PATH", "")), *OPTIONS]
        for option, value in (("-p", origin.port), ("-l", origin.user)):
            if value:
                command += [option, str(value)]
        command += ["-s", "--", origin.host, subsystem]
        self.sock, theirs = socket.socketpair()
        try:
            with theirs:
                # A session of its own: no Ctrl-C of the terminal, no terminal to ask for a password, killed with all in it
                self._process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, bufsize=0,
                                                 env=environment, close_fds=True, start_new_session=True)
        except (OSError, ValueError) as e:
            self.sock.close()
            # Permanent: no such program, or a name that cannot be passed to it
            retryable = not isinstance(e, (ValueError, FileNotFoundError, PermissionError))
            raise self.connect_error("cannot start ssh: %s" % e, retryable) from e
        loop.add_reader(self._process.stderr, self._read_messages)

    def _read_messages(self):
        data = self._process.stderr.read(MAX_MESSAGES)
        self._messages = (self._messages + data)[-MAX_MESSAGES:]
        if not data:
            self._loop.remove_reader(self._process.stderr)
            self._silent.set_result(None)

    def connect_error(self, reason, retryable):
        return ConnectError("cannot connect to %s: %s" % (self._origin.host, reason), retryable)

    async def error(self):
        """Returns the error for an end of ssh before the session was established, with the most specific of its messages"""
        await self._ends_within(GRACE)
        lines = [printable(line) for line in reversed(self._messages.splitlines()) if line.strip()]
        for line in filter(PERMANENT.search, lines):
            return self.connect_error(line, False)
        for line in filter(REFUSED.search, lines):
            return RefusedError("%s: %s" % (self._origin.host, line))
        return self.connect_error(lines[0] if lines else "ssh has ended with status %s" % self._process.poll(), True)

    async def _ends_within(self, seconds):
        # A program that ssh has started may keep standard error open
        await asyncio.wait([self._silent], timeout=seconds)
        if self._silent.done():
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(0.05)
        return self._process.poll() is not None

    def end(self):
        """The socket is closed: let a task wait until ssh has ended, for at most LOGIN_GRACE + 2 * GRACE seconds"""
        self._ending = self._ending or self._loop.create_task(self._end())

    async def _end(self):
        if not await self._ends_within(GRACE if self.established else LOGIN_GRACE):
            self._process.terminate()
            if not await self._ends_within(GRACE):
                os.killpg(self._process.pid, signal.SIGKILL)
                await self._ends_within(GRACE)
        self._loop.remove_reader(self._process.stderr)
        self._process.stderr.close()


def printable(data, limit=200):
    """The first line of bytes from another program, for a message"""
    line = bytes(data[:4 * limit]).strip().partition(b"\n")[0].decode("utf-8", "replace").strip()
    return "".join(c if c.isprintable() else "?" for c in line)[:limit]
