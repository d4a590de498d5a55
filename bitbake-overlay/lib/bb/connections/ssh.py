#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
Start and end the program ssh with a subsystem of the server.

Used by sftp.py in the event loop's thread. ssh is started in the same way as by
sftp(1), so that agent, keys, known_hosts and ~/.ssh/config apply, but with the
environment of the request. Its error messages are the only indication why a
connection fails. The data on its standard input and output is not handled here.

    ssh = SSH(loop, origin, environment, "sftp")    # ssh.sock is its input and output
    ssh.established = True                          # after the login
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

# The options that sftp(1) passes when fetch2/sftp.py calls it. Additionally, ssh must not become a master that other
# sessions depend on, nor use one, which has limits of its own, and has to end by itself if this process is killed.
OPTIONS = ("-oForwardX11=no", "-oForwardAgent=no", "-oPermitLocalCommand=no", "-oClearAllForwardings=yes",
           "-oBatchMode=yes", "-oControlMaster=no", "-oControlPath=none", "-oRequestTTY=no", "-oRemoteCommand=none",
           "-oConnectTimeout=20", "-oServerAliveInterval=10", "-oServerAliveCountMax=2")
# Seconds for ssh to end by itself during the login: sshd counts interrupted logins and may block the client for them
LOGIN_GRACE = 5
# Seconds for ssh to end by itself at other times, and after a signal
GRACE = 1
# Bytes of messages that are kept: the last ones contain the reason for the failure
MAX_MESSAGES = 4096
# Messages after which another attempt would fail in the same way
PERMANENT = re.compile(
    r"Permission denied \(|Host key verification failed|Too many authentication failures|Unable to negotiate|"
    r"Could not resolve hostname (?!.*(Temporary failure|Try again))|subsystem request failed|"
    r"[Bb]ad configuration option|Bad owner or permissions|Can't open user config|banner exchange: .*invalid format")
# Messages if sshd refuses the connection because of MaxStartups, PerSourcePenalties or too many processes; and if other
# servers have too many connections (reason 12 in RFC 4253 11.1)
REFUSED = re.compile(
    r"exchange_identification: ((read|write): )?Connection|Broken pipe|Connection (closed|reset) by |"
    r"closed by remote host|Not allowed at this time|Exceeded MaxStartups|Received disconnect from \S+ port [0-9]+:12: ")


class SSH:
    """Raises ConnectError if ssh cannot be started. The caller closes sock, and sets established after the login."""

    def __init__(self, loop, origin, environment, subsystem):
        self.established = False
        self._loop, self._origin = loop, origin
        self._ending = None
        self._messages = b""
        # Completed when ssh has closed its standard error, usually by terminating
        self._stderr_closed = loop.create_future()
        command = [ssh_program(environment.get("PATH", "")), *OPTIONS]
        for option, value in (("-p", origin.port), ("-l", origin.user)):
            if value:
                command += [option, str(value)]
        command += ["-s", "--", origin.host, subsystem]
        self.sock, theirs = socket.socketpair()
        try:
            with theirs:
                # A new session: ssh ignores Ctrl-C, cannot prompt for a password, and is killed with all its children
                self._process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, bufsize=0,
                                                 env=environment, close_fds=True, start_new_session=True)
        except (OSError, ValueError) as e:
            self.sock.close()
            # Permanent if the program does not exist or an argument cannot be passed to it
            retryable = not isinstance(e, (ValueError, FileNotFoundError, PermissionError))
            raise self.connect_error("cannot start ssh: %s" % e, retryable) from e
        loop.add_reader(self._process.stderr, self._read_messages)

    def _read_messages(self):
        data = self._process.stderr.read(MAX_MESSAGES)
        self._messages = (self._messages + data)[-MAX_MESSAGES:]
        if not data:
            self._loop.remove_reader(self._process.stderr)
            self._stderr_closed.set_result(None)

    def connect_error(self, reason, retryable):
        return ConnectError("cannot connect to %s: %s" % (self._origin.host, reason), retryable)

    async def error(self):
        """Returns the error for a login that has failed, with the most specific message of ssh. Waits until ssh has ended."""
        await self._ends_within(GRACE)
        lines = [printable(line) for line in reversed(self._messages.splitlines()) if line.strip()]
        for line in filter(PERMANENT.search, lines):
            return self.connect_error(line, False)
        for line in filter(REFUSED.search, lines):
            return RefusedError("%s: %s" % (self._origin.host, line))
        return self.connect_error(lines[0] if lines else "ssh exited with status %s" % self._process.poll(), True)

    async def _ends_within(self, seconds):
        # A ProxyCommand may keep standard error open
        await asyncio.wait([self._stderr_closed], timeout=seconds)
        if self._stderr_closed.done():
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(0.05)
        return self._process.poll() is not None

    def end(self):
        """Start a task that ends ssh within LOGIN_GRACE + 2 * GRACE seconds, after its socket was closed"""
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
    """Returns the first line of bytes from another program for use in a message"""
    line = bytes(data[:4 * limit]).strip().partition(b"\n")[0].decode("utf-8", "replace").strip()
    return "".join(c if c.isprintable() else "?" for c in line)[:limit]
