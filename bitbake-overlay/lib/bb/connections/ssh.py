#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
The program ssh, with a subsystem of the server at its standard input and output.

Used by sftp.py. One thread owns it, but for abort() which may be called by any.
ssh is started as sftp(1) starts it, so that agent, keys, known_hosts and
~/.ssh/config are what they are there. Its environment is the one that is given,
nothing of this process. What it says is kept, since it is all that tells why
there is no connection.

    ssh = SSH(origin, environment, "sftp", timeout)
    ssh.start()
    ssh.output += data
    n = ssh.receive_into(view, deadline)        # blocks; sends output as well
    ssh.close()
"""

import math
import os
import re
import select
import socket
import subprocess
import time

from bb.connections import Cancelled, ConnectError, Disconnected, RefusedError, TimedOutError
from bb.connections.request import ssh_program

# What OpenSSH's sftp(1) passes, as fetch2/sftp.py calls it; and ssh is not to become
# a master (ControlMaster) that sessions of others would end with
OPTIONS = ("-oForwardX11=no", "-oForwardAgent=no", "-oPermitLocalCommand=no", "-oClearAllForwardings=yes",
           "-oBatchMode=yes", "-oControlMaster=no")

# Seconds for ssh to end by itself: while it logs in, which sshd must not see broken off, and
# later; then after SIGTERM; and after the end of its output
LOGIN_GRACE = 5
GRACE = 1
TERMINATE_GRACE = 1
EXIT_GRACE = 1

# Of what it says the end is kept, in bytes
MAX_SAID = 4096

# What the next attempt would hear as well
PERMANENT = re.compile(
    r"Permission denied \(|Host key verification failed|Too many authentication failures|Unable to negotiate|"
    r"Could not resolve hostname (?!.*(Temporary failure|Try again))|subsystem request failed|"
    r"[Bb]ad configuration option|Bad owner or permissions|Can't open user config|banner exchange: .*invalid format")

# sshd's ways of not serving now: MaxStartups, PerSourcePenalties, too many processes
REFUSED = re.compile(
    r"exchange_identification: ((read|write): )?(Connection|Broken pipe)|Connection (closed|reset) by |"
    r"closed by remote host|Not allowed at this time|Exceeded MaxStartups")


class SSH:
    """output is what is to be sent. established is for the owner to set once it is logged in."""

    def __init__(self, origin, environment, subsystem, timeout):
        self.origin = origin
        self.environment = environment
        self.subsystem = subsystem
        # Seconds, for a message
        self.timeout = timeout
        self.output = bytearray()
        self.established = False
        self._sock = None
        self._process = None
        self._owner = os.getpid()
        self._aborted = False
        self._closed = False
        self._said = b""

    def start(self):
        """Does not wait for the connection. Raises ConnectError or Cancelled."""
        command = [ssh_program(self.environment.get("PATH", "")), *OPTIONS]
        if self.origin.port:
            command += ["-p", str(self.origin.port)]
        if self.origin.user:
            command += ["-l", self.origin.user]
        command += ["-s", "--", self.origin.host, self.subsystem]
        try:
            self._sock, theirs = socket.socketpair()
            with theirs:
                # From here on abort() finds the socket
                self._check_aborted()
                self._sock.setblocking(False)
                # In a session of its own: it does not get the terminal's Ctrl-C, and has no terminal to ask on
                self._process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE,
                                                 bufsize=0, env=self.environment, close_fds=True,
                                                 start_new_session=True)
            os.set_blocking(self._process.stderr.fileno(), False)
        except (OSError, ValueError) as e:
            # No such program, or a name that cannot be passed to one
            permanent = isinstance(e, (ValueError, FileNotFoundError, PermissionError))
            raise self.connect_error("cannot start ssh: %s" % e, not permanent) from e

    def connect_error(self, reason, retryable):
        return ConnectError("cannot connect to %s: %s" % (self.origin.host, reason), retryable)

    def reason(self):
        """The error for an end of ssh before there was a connection. Blocks for up to EXIT_GRACE seconds."""
        text = self._last_words()
        if PERMANENT.search(text):
            return self.connect_error(text, False)
        if REFUSED.search(text):
            return RefusedError("%s: %s" % (self.origin.host, text))
        return self.connect_error(text, True)

    def _last_words(self):
        """Why ssh has ended, in one line: the most telling of what it has said"""
        self._await_exit(EXIT_GRACE)
        lines = [printable(line) for line in self._said.splitlines() if line.strip()]
        for pattern in (PERMANENT, REFUSED):
            for line in reversed(lines):
                if pattern.search(line):
                    return line
        return lines[-1] if lines else "ssh has ended with status %s" % self._process.poll()

    # The end

    def _check_aborted(self):
        if self._aborted:
            raise Cancelled("aborted")

    def abort(self):
        """Make whatever blocks fail soon. May be called from any thread."""
        self._aborted = True
        self._shutdown()

    def _shutdown(self):
        sock = self._sock
        if sock is not None:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def close(self):
        """
        Blocks until ssh has ended, which is at most LOGIN_GRACE + TERMINATE_GRACE
        seconds. In a forked child only the descriptors are closed.
        """
        if self._closed:
            return
        self._closed = True
        process = self._process
        if process is not None:
            if os.getpid() == self._owner:
                self._end(process)
            process.stderr.close()
        if self._sock is not None:
            self._sock.close()

    def _end(self, process):
        # Closing would not do if a forked child still has the socket
        self._shutdown()
        if not self._await_exit(GRACE if self.established else LOGIN_GRACE):
            process.terminate()
            if not self._await_exit(TERMINATE_GRACE):
                process.kill()
                process.wait()

    def _await_exit(self, seconds):
        """Whether ssh ends within that time. That it does is seen by the end of what it says."""
        deadline = time.monotonic() + seconds
        poll = select.poll()
        poll.register(self._process.stderr, select.POLLIN)
        while poll.poll(max(deadline - time.monotonic(), 0) * 1000) and self._listen():
            pass
        try:
            # Where a command that ssh has started keeps stderr open it has ended all the same
            self._process.wait(max(deadline - time.monotonic(), 0))
            return True
        except subprocess.TimeoutExpired:
            return False

    def fileno(self):
        """The descriptor, -1 without one"""
        return self._sock.fileno() if self._sock is not None else -1

    # Input and output

    def flush(self):
        """Send output as far as it goes without blocking"""
        try:
            while self.output:
                del self.output[:self._sock.send(self.output, socket.MSG_NOSIGNAL)]
        except BlockingIOError:
            pass
        except OSError:
            # Reading comes to the same end, after the answers before it
            self.output.clear()

    def receive_into(self, view, deadline):
        """
        Read once, and send output as far as it goes: ssh may be blocked because
        we do not read. Blocks until something is read; returns how many bytes.
        Raises Disconnected at the end, TimedOutError at deadline, or Cancelled.
        """
        while True:
            self.flush()
            try:
                n = self._sock.recv_into(view)
            except BlockingIOError:
                self._wait(deadline)
                continue
            except ConnectionResetError:
                n = 0
            self._check_aborted()
            if n == 0:
                raise Disconnected("%s: %s" % (self.origin.host, self._last_words()))
            return n

    def _wait(self, deadline):
        """Until the socket can be used"""
        stderr = self._process.stderr
        poll = select.poll()
        poll.register(self._sock, select.POLLIN | (select.POLLOUT if self.output else 0))
        poll.register(stderr, select.POLLIN)
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimedOutError("%s: nothing heard for %s seconds" % (self.origin.host, self.timeout))
            ready = [fd for fd, _ in poll.poll(math.ceil(left * 1000))]
            if stderr.fileno() in ready and not self._listen():
                poll.unregister(stderr)
            if self._sock.fileno() in ready:
                return

    def _listen(self):
        """Take what ssh has said. Returns False if that was all."""
        data = self._process.stderr.read(MAX_SAID)
        if data:
            self._said = (self._said + data)[-MAX_SAID:]
        return data != b""


def printable(data, limit=200):
    """The first line of bytes that another program has sent, for a message"""
    line = bytes(data[:4 * limit]).strip().partition(b"\n")[0].decode("utf-8", "replace").strip()
    return "".join(c if c.isprintable() else "?" for c in line)[:limit]
