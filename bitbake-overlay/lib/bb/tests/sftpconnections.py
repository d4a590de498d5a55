#
# BitBake tests for the shared connections: SFTP
#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

import contextlib
import json
import os
import secrets
import select
import socket
import stat
import struct
import sys
import tempfile
import threading
import unittest.mock

from bb.connections import Cancelled, ConnectError, DestinationError, ProtocolError
from bb.connections import sftp
from bb.tests.connections import SECONDS, ConnectionsTest, content

# Passes its standard input and error to the test, and exits with the status that the test sends
FAKE_SSH = """#!%s -IS
import array, json, os, signal, socket, sys
sock = socket.socket(socket.AF_UNIX)
sock.connect(%r)
if "stubborn" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
message = json.dumps([os.getpid(), sys.argv[1:], dict(os.environ)]).encode()
sock.sendmsg([message], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 2]))])
for fd in range(3):
    os.close(fd)
status = sock.recv(1)
os._exit(status[0] if status else 0)
"""


class Session:
    """The server's end of one fake ssh"""
    def __init__(self, control):
        self.control = control
        # Not socket.recv_fds(), which Python 3.8 does not have
        message, ancillary, _, _ = control.recvmsg(65536, socket.CMSG_LEN(2 * struct.calcsize("i")))
        sock, self.stderr = struct.unpack("2i", ancillary[0][2])
        self.sock = socket.socket(fileno=sock)
        self.sock.settimeout(SECONDS)
        self.pid, self.arguments, self.environment = json.loads(message)
        self.host = self.arguments[-2]

    def say(self, text):
        os.write(self.stderr, text.encode())

    def read(self, size):
        data = b""
        while len(data) < size:
            more = self.sock.recv(size - len(data))
            if not more:
                raise EOFError
            data += more
        return data

    def receive(self):
        """Returns type, id (or version) and the rest of a packet"""
        length, kind, ident = struct.unpack(">IBI", self.read(9))
        return kind, ident, self.read(length - 5)

    def send(self, *packet):
        self.sock.sendall(encode(*packet))

    def greet(self, version=3, extensions=b""):
        assert self.receive()[:2] == (sftp.FXP_INIT, 3)
        self.send(sftp.FXP_VERSION, version, extensions)

    def end(self, status=0):
        self.sock.close()
        os.close(self.stderr)
        with contextlib.suppress(OSError):
            self.control.sendall(bytes([status]))
        self.control.close()


class SSHMirror:
    """
    The peer of the fake ssh processes, for each of which it runs script(session)
    in a thread. path is the directory of the fake ssh, for PATH.
    """
    def __init__(self, script, path):
        self.script = script
        self.path = path
        self.sessions = []
        self.failures = []
        # An abstract name, since a path may be too long
        address = "\0bitbake-sftp-" + secrets.token_hex(16)
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(address)
        self.listener.listen(64)
        program = os.path.join(path, "ssh")
        with open(program, "w") as f:
            f.write(FAKE_SSH % (sys.executable, address))
        os.chmod(program, 0o755)
        self.threads = [threading.Thread(target=self.accept)]
        self.threads[0].start()

    def accept(self):
        while True:
            try:
                control, _ = self.listener.accept()
            except OSError:
                return
            try:
                self.sessions.append(Session(control))
            except ValueError:
                # The process has ended before it could send anything
                control.close()
                continue
            thread = threading.Thread(target=self.run, args=(self.sessions[-1],))
            self.threads.append(thread)
            thread.start()

    def run(self, session):
        status = 0
        try:
            status = self.script(session) or 0
        except (EOFError, ConnectionError):
            pass
        except Exception as e:
            self.failures.append(e)
        session.end(status)

    def stop(self):
        self.listener.shutdown(socket.SHUT_RDWR)
        for thread in self.threads:
            thread.join(SECONDS)
        self.listener.close()


class Server:
    """
    An SFTP server of files in memory, {name: content}: None for a directory, and a
    class of exceptions for a file that cannot be opened.
    """
    extensions = b""
    # {name: size} that FSTAT and STAT report if it differs from the content
    sizes = {}
    max_read = 1 << 20

    def __init__(self, files):
        self.files = files
        self.handles = {}
        self.opened = 0
        self.most_handles = 0
        # Names and ranges of the READs, in order
        self.reads = []

    def __call__(self, session):
        session.greet(extensions=self.extensions)
        while True:
            session.send(*self.answer(*session.receive()))

    def answer(self, kind, ident, body):
        size, = struct.unpack_from(">I", body)
        subject, rest = body[4:4 + size], body[4 + size:]
        if kind == sftp.FXP_EXTENDED:
            return sftp.FXP_EXTENDED_REPLY, ident, struct.pack(">QQQQ", 1 << 18, *self.limits)
        if kind == sftp.FXP_STAT:
            return self.attributes(ident, subject.decode())
        if kind == sftp.FXP_OPEN:
            return self.open(ident, subject.decode())
        name = self.handles[subject]
        if kind == sftp.FXP_FSTAT:
            return self.attributes(ident, name)
        if kind == sftp.FXP_CLOSE:
            del self.handles[subject]
            return status(ident, 0)
        assert kind == sftp.FXP_READ
        offset, size = struct.unpack(">QI", rest)
        self.reads.append((name, offset, size))
        if self.files[name] is None:
            return status(ident, 4, "Is a directory")
        data = self.files[name][offset:offset + min(size, self.max_read)]
        return (sftp.FXP_DATA, ident, string(data)) if data else status(ident, sftp.FX_EOF)

    def attributes(self, ident, name):
        if name not in self.files:
            return status(ident, sftp.FX_NO_SUCH_FILE, "No such file")
        content = self.files[name]
        mode = stat.S_IFDIR if content is None else stat.S_IFREG
        size = self.sizes.get(name, len(content) if isinstance(content, bytes) else 4096)
        return sftp.FXP_ATTRS, ident, struct.pack(">IQIIIII", 15, size, 0, 0, mode | 0o644, 0, 0)

    def open(self, ident, name):
        if name not in self.files:
            return status(ident, sftp.FX_NO_SUCH_FILE, "No such file")
        if self.files[name] is PermissionError:
            return status(ident, sftp.FX_PERMISSION_DENIED, "Permission denied")
        if self.files[name] is OSError:
            return status(ident, 4, "Failure\nof\x1b[1m a disk")
        self.opened += 1
        handle = b"handle %d" % self.opened
        self.handles[handle] = name
        self.most_handles = max(self.most_handles, len(self.handles))
        return sftp.FXP_HANDLE, ident, string(handle)


class Shuffling(Server):
    """Receives all packets in flight before it answers, in reverse order"""
    def __init__(self, files):
        super().__init__(files)
        # Bytes of the READs that were in flight together
        self.in_flight = []

    def __call__(self, session):
        session.greet(extensions=self.extensions)
        while True:
            answers = [self.answer(*session.receive())]
            before = len(self.reads) - (answers[0][0] == sftp.FXP_DATA)
            while select.select([session.sock], [], [], 0.01)[0]:
                answers.append(self.answer(*session.receive()))
            self.in_flight.append(sum(size for _, _, size in self.reads[before:]))
            for answer in reversed(answers):
                session.send(*answer)


def encode(kind, ident, body=b""):
    return struct.pack(">IBI", 5 + len(body), kind, ident) + body

def string(data):
    return struct.pack(">I", len(data)) + data

def status(ident, code, text=""):
    return sftp.FXP_STATUS, ident, struct.pack(">I", code) + string(text.encode()) + string(b"")


class SFTPTest(ConnectionsTest):
    """Base class: checks that all ssh processes have ended when the ConnectionServer has stopped"""

    def setUp(self):
        super().setUp()
        self.mirrors = []
        self.addCleanup(self.stop_mirrors)
        self.start_server(connections=1)

    def stop_mirrors(self):
        for mirror in self.mirrors:
            mirror.stop()
            self.assertEqual(mirror.failures, [])
            for session in mirror.sessions:
                self.assertRaises(ProcessLookupError, os.kill, session.pid, 0)

    def mirror(self, script):
        self.mirrors.append(SSHMirror(script, tempfile.mkdtemp(dir=self.tempdir)))
        return self.mirrors[-1]

    def request(self, method, path, host="mirror", environment={}, **members):
        environment = dict({"PATH": self.mirrors[-1].path}, **environment)
        if method == "GET" and "fd" not in members:
            members["fd"] = self.open("file%s" % len(os.listdir(self.tempdir)))
            # Data of an earlier attempt
            os.pwrite(members["fd"], b"old", 1000000)
        return super().request(method, "sftp://" + host + path, environment, **members)

    def get(self, *names, **members):
        return [self.request("GET", name, **members) for name in names]

    def ask_hosts(self, hosts, method="HEAD"):
        return self.ask(*[self.request(method, "/x", host) for host in hosts])

    def count(self, name, host):
        return {one.origin.host: getattr(one.statistics, name) for one in self.server.pool.hosts.values()}[host]


class FilesTest(SFTPTest):
    def get_all(self, server, sizes=(0, 1, 5000, 32768, 32769, 3000000), known=False):
        server.files = {"/%s" % size: content(size) for size in sizes}
        mirror = self.mirror(server)
        if known:
            self.ask(*[self.request("HEAD", name) for name in server.files])
        requests = self.get(*server.files)
        self.assertEqual(self.ask(*requests), [(200, size) for size in sizes])
        for request, size in zip(requests, sizes):
            self.assertEqual(self.read(request.fd), content(size))
            self.assertEqual(request.received, size)
        self.all_closed(server)
        self.assertEqual(len(mirror.sessions), 1)

    def all_closed(self, server):
        # This is sent after the CLOSEs
        self.assertEqual(self.ask(self.request("HEAD", "/other/%s" % len(self.outcomes))), [(404, None)])
        self.assertEqual(server.handles, {})

    def test_head(self):
        files = {"/%s" % n: content(n) for n in range(500)}
        files.update({"/directory": None, "relative": b"home"})
        mirror = self.mirror(Server(files))
        requests = [self.request("HEAD", "/%s" % n) for n in range(501)]
        self.assertEqual(self.ask(*requests), [(200, n) for n in range(500)] + [(404, None)])
        self.assertEqual(self.ask(self.request("HEAD", "/directory"), self.request("HEAD", "/~/relative")),
                         [(404, None), (200, 4)])
        self.assertEqual(len(mirror.sessions), 1)

    def test_get(self):
        self.get_all(Server({}))

    def test_get_with_known_sizes(self):
        server = Server({})
        self.get_all(server, known=True)
        # With one byte more, to notice growth
        self.assertIn(("/5000", 0, 5001), server.reads)

    def test_answers_in_another_order(self):
        self.get_all(Shuffling({}))

    def test_short_reads(self):
        for kind in (Server, Shuffling):
            with self.subTest(kind=kind):
                server = kind({})
                server.max_read = 10000
                self.get_all(server)

    def test_sizes_that_have_changed(self):
        server = Server({"/%s" % size: content(40000) for size in (1, 4000, 100000)})
        server.sizes = {"/1": 1, "/4000": 4000, "/100000": 100000}
        self.mirror(server)
        self.assertEqual(self.ask(*[self.request("HEAD", name) for name in server.files]), [(200, 1), (200, 4000), (200, 100000)])
        server.sizes = {}
        requests = self.get(*server.files)
        self.assertEqual(self.ask(*requests), [(200, 40000)] * 3)
        self.assertEqual([self.read(request.fd) for request in requests], [content(40000)] * 3)

    def test_not_a_file(self):
        for kind in (Server, Shuffling):
            with self.subTest(kind=kind):
                self.mirror(kind({"/directory": None, "/denied": PermissionError, "/broken": OSError, "/good": b"good"}))
                self.ask(self.request("HEAD", "/good"))
                self.assertEqual(self.ask(*self.get("/absent", "/directory", "/denied", "/good", "/broken")),
                                 [(404, None), (404, None), (403, None), (200, 4), (500, None)])

    def test_files_that_change_while_they_are_read(self):
        for kind in (Server, Shuffling):
            with self.subTest(kind=kind):
                server = kind({"/short": content(40000), "/long": content(5000), "/good": b"good"})
                server.sizes = {"/short": 90000, "/long": 4000}
                mirror = self.mirror(server)
                short, long, good = self.ask(*self.get("/short", "/long", "/good"))
                self.assertIsInstance(short, ProtocolError)
                self.assertIsInstance(long, ProtocolError)
                self.assertEqual(good, (200, 4))
                self.all_closed(server)
                self.assertEqual(len(mirror.sessions), 1)

    def test_destination_that_cannot_be_written(self):
        server = Server({"/x": content(100000), "/good": b"good"})
        mirror = self.mirror(server)
        fd = os.open("/dev/null", os.O_RDONLY)
        self.addCleanup(os.close, fd)
        bad, good = self.ask(*self.get("/x", fd=fd), *self.get("/good"))
        self.assertIsInstance(bad, DestinationError)
        self.assertEqual(good, (200, 4))
        with unittest.mock.patch("os.pwrite", side_effect=OSError(28, "No space left on device")):
            error, = self.ask(*self.get("/x", fd=self.open()))
        self.assertEqual(str(error), "cannot write the file: No space left on device")
        self.assertEqual(self.ask(*self.get("/x")), [(200, 100000)])
        self.all_closed(server)
        self.assertEqual(len(mirror.sessions), 1)

    def test_cancelled(self):
        class Cancelling(Server):
            """Cancels a request after its second READ"""
            def answer(self, kind, ident, body):
                if len(self.reads) == 2:
                    self.request.cancelled = True
                return super().answer(kind, ident, body)

        server = Cancelling({"/x": content(10000000), "/good": b"good"})
        self.mirror(server)
        requests = [self.request("HEAD", "/x"), *self.get("/x", "/x")]
        requests[0].cancelled = requests[1].cancelled = True
        server.request = requests[2]
        for error in self.ask(*requests):
            self.assertIsInstance(error, Cancelled)
        self.assertEqual(self.ask(*self.get("/good")), [(200, 4)])
        self.assertLess(len(server.reads), 200)
        self.all_closed(server)

    def test_limits(self):
        class Limited(Shuffling):
            extensions = string(b"x@y") + string(b"limits@openssh.com") + string(b"limits@openssh.com") + string(b"1")
            limits = (261120, 0, 3)

        server = Limited({})
        self.get_all(server, (8000001, 8000000) + tuple(range(40)))
        self.assertEqual(server.most_handles, 3)
        self.assertLessEqual(max(server.in_flight), sftp.WINDOW)
        self.assertGreater(max(server.in_flight), sftp.WINDOW // 2)
        self.assertEqual(max(size for _, _, size in server.reads), sftp.MAX_READ)
        # Both large files are read concurrently: the READs of neither end long before those of the other
        large = [name for name, _, _ in server.reads if name in ("/8000001", "/8000000")]
        self.assertGreater(min(max(i for i, name in enumerate(large) if name == each) for each in set(large)), len(large) * 0.65)

    def test_limits_that_are_announced_late(self):
        """OPENs wait for them, STATs do not"""
        stated = threading.Event()

        class Late(Shuffling):
            limits = (261120, 0, 2)

            def __call__(self, session):
                session.greet(extensions=string(b"limits@openssh.com") + string(b"1"))
                limits, stat = session.receive(), session.receive()
                session.send(*self.answer(*stat))
                stated.wait(SECONDS)
                self.kinds = limits[0], stat[0], bool(select.select([session.sock], [], [], 0)[0])
                session.send(*self.answer(*limits))
                session.greet = lambda extensions: None
                super().__call__(session)

        server = Late({"/%s" % n: content(n) for n in range(10)})
        self.mirror(server)
        requests = [*self.get(*server.files), self.request("HEAD", "/9")]
        self.server.submit(requests, self.answered)
        self.assertEqual(self.wait(requests[10:]), [(200, 9)])
        stated.set()
        self.assertEqual(self.wait(requests), [(200, n) for n in range(10)] + [(200, 9)])
        self.assertEqual(server.kinds, (sftp.FXP_EXTENDED, sftp.FXP_STAT, False))
        self.assertEqual(server.most_handles, 2)


class FaultsTest(SFTPTest):
    """Which faults lead to a retry in another session. The host names are those of the faults."""

    def faulty(self, faults, server=None):
        """The first session of each host runs a script from faults, all others server"""
        faults = dict(faults)
        server = server or Server({"/x": b"x"})
        return self.mirror(lambda session: faults.pop(session.host, server)(session))

    def test_malformed_packets(self):
        attributes = struct.pack(">IQ", 1, 5)
        answers = {"truncated": lambda i: encode(sftp.FXP_ATTRS, i, attributes)[:-3],
                   "oversized": lambda i: struct.pack(">I", sftp.MAX_PACKET + 1),
                   "huge": lambda i: struct.pack(">IBI", 0xffffffff, sftp.FXP_ATTRS, i),
                   "empty": lambda i: struct.pack(">I", 0),
                   "no-id": lambda i: struct.pack(">IB", 1, sftp.FXP_STATUS) + b"\0" * 9,
                   "unknown-id": lambda i: encode(sftp.FXP_ATTRS, i + 1, attributes),
                   "unknown-type": lambda i: encode(99, i, attributes),
                   "wrong-type": lambda i: encode(sftp.FXP_HANDLE, i, string(b"x")),
                   "short-status": lambda i: encode(sftp.FXP_STATUS, i),
                   "short-attributes": lambda i: encode(sftp.FXP_ATTRS, i, attributes[:-1]),
                   "get-wrong-type": lambda i: encode(sftp.FXP_ATTRS, i, attributes),
                   "get-short-handle": lambda i: encode(sftp.FXP_HANDLE, i, string(b"x") + b"x"),
                   "get-long-handle": lambda i: encode(sftp.FXP_HANDLE, i, string(b"x" * 257)),
                   "closed": lambda i: b""}

        def fault(session):
            session.greet()
            session.sock.sendall(answers[session.host](session.receive()[1]))

        self.faulty({name: fault for name in answers})
        requests = [self.request("GET" if name.startswith("get") else "HEAD", "/x", name) for name in answers]
        for name, outcome in zip(answers, self.ask(*requests)):
            with self.subTest(name=name):
                self.assertEqual(outcome, (200, 1))
                # A session may end at any time, which does not count as a retry
                self.assertEqual((self.count("connections", name), self.count("retries", name)), (2, 0 if name == "closed" else 1))
                self.assertEqual(self.count("refusals", name), 0)

    def test_malformed_data(self):
        """The request fails after several attempts"""
        data = {"more": string(b"x" * 32769), "none": string(b""), "short": b"\0\0\0\7xxx"}

        class Lying(Server):
            def answer(self, kind, ident, body):
                return (sftp.FXP_DATA, ident, self.data) if kind == sftp.FXP_READ else super().answer(kind, ident, body)

        def fault(session):
            server = Lying({"/x": content(100000)})
            server.data = data[session.host]
            server(session)

        mirror = self.mirror(fault)
        for error in self.ask_hosts(data, "GET"):
            self.assertIs(type(error), ProtocolError)
        self.assertEqual(len(mirror.sessions), 4 * len(data))

    def test_answers_before_the_end_count(self):
        def fault(session):
            session.greet()
            idents = [session.receive()[1] for _ in range(3)]
            # In a single read
            session.sock.sendall(encode(*status(idents[1], sftp.FX_NO_SUCH_FILE)) + encode(*status(12345, 0)))

        self.faulty({"mirror": fault}, Server({"/%s" % n: content(n) for n in range(3)}))
        # The second session would report that the file exists
        self.assertEqual(self.ask(*[self.request("HEAD", "/%s" % n) for n in range(3)]), [(200, 0), (404, None), (200, 2)])

    def test_silence(self):
        """Instead of the limits, of an answer, and during the login"""
        def silent(session):
            if session.host != "login":
                session.greet(extensions=string(b"limits@openssh.com") + string(b"1") if session.host == "limits" else b"")
                opened.append(session.receive()[0] == sftp.FXP_OPEN)
            session.read(1000)

        opened = []
        hosts = ("limits", "answer", "login")
        self.start_server(connections=1, timeout=1)
        self.faulty(dict.fromkeys(hosts, silent))
        self.assertEqual(self.ask_hosts(hosts, "GET"), [(200, 1)] * 3)
        self.assertEqual(sorted(opened), [False, True])

    def test_errors_of_ssh(self):
        """Some are permanent, some indicate that the host refuses, and others that it cannot be reached"""
        permanent = ("Host key verification failed.", "somebody@mirror: Permission denied (publickey,password).",
                     "Received disconnect from 127.0.0.1 port 22:2: Too many authentication failures",
                     "ssh: Could not resolve hostname mirror: Name or service not known",
                     "command-line: line 0: Bad configuration option: nonsense",
                     "Bad owner or permissions on /home/somebody/.ssh/config", "subsystem request failed on channel 0")
        refused = ("kex_exchange_identification: Connection closed by remote host",
                   "kex_exchange_identification: read: Connection reset by peer",
                   "ssh_exchange_identification: Connection closed by remote host", "Connection closed by 127.0.0.1 port 22",
                   "Connection reset by 127.0.0.1 port 22", "Not allowed at this time", "Exceeded MaxStartups")
        others = ("ssh: Could not resolve hostname mirror: Temporary failure in name resolution",
                  "ssh: connect to host mirror port 22: Connection refused",
                  "ssh: connect to host mirror port 22: No route to host", "")
        texts = {str(n): text for n, text in enumerate(permanent + refused + others)}

        def fault(session):
            for line in ("x" * 1000, "\x1b[1mWarning: \u20ac \tno such identity\x1b[0m\r", texts[session.host] + "\r", ""):
                session.say(line + "\n")
            return 255

        mirror = self.faulty(dict.fromkeys(texts, fault))
        for host, outcome in zip(texts, self.ask_hosts(texts)):
            with self.subTest(text=texts[host]):
                if texts[host] in permanent:
                    self.assertIsInstance(outcome, ConnectError)
                    self.assertTrue(str(outcome).endswith("cannot connect to %s: %s" % (host, texts[host])))
                else:
                    self.assertEqual(outcome, (200, 1))
                self.assertEqual(self.count("refusals", host), 1 if texts[host] in refused else 0)
        # Permanent errors are not retried
        self.assertEqual(len(mirror.sessions), len(permanent) + 2 * len(refused + others))
        self.assertEqual(len([host for host in self.server.pool.hosts.values() if host.health.suspension_reason]), len(permanent))
        self.assertIsInstance(self.ask(self.request("HEAD", "/y", "0"))[0], ConnectError)
        self.assertEqual(len(mirror.sessions), len(permanent) + 2 * len(refused + others))

    def test_not_sftp(self):
        greetings = {"text": b"Welcome\x07 to mirror\n" + encode(sftp.FXP_VERSION, 3), "old": encode(sftp.FXP_VERSION, 2),
                     "status": encode(sftp.FXP_STATUS, 3), "short": encode(sftp.FXP_VERSION, 3, string(b"x") + b"\0"),
                     "long": encode(sftp.FXP_VERSION, 3, b"\0\0\1\0x")}
        mirror = self.mirror(lambda session: session.sock.sendall(greetings[session.host]) or session.read(1000) and None)
        errors = self.ask_hosts(greetings)
        for error in errors:
            self.assertIs(type(error), ConnectError)
            self.assertFalse(error.retryable)
        self.assertRegex(str(errors[0]), r"cannot connect to text: the server sent 'Welcome\? to mirror' instead of SFTP.*bashrc")
        self.assertEqual(len(mirror.sessions), len(greetings))

    def test_program_that_cannot_be_started(self):
        mirror = self.mirror(None)
        with open(mirror.path + "/ssh", "w") as f:
            f.write("#!/nonexistent/python\n")
        error, = self.ask_hosts(["mirror"])
        self.assertRegex(str(error), "cannot connect to mirror: cannot start ssh: ")
        self.assertFalse(error.retryable)


class SSHTest(SFTPTest):
    """Start and end of ssh"""

    def test_command_and_environment(self):
        os.environ["BITBAKE_TEST_SFTP"] = "not for ssh"
        self.addCleanup(os.environ.pop, "BITBAKE_TEST_SFTP")
        mirror = self.mirror(Server({}))
        # The last one may be needed by a ProxyCommand
        environment = {"HOME": "/home/somebody", "SSH_AUTH_SOCK": "/agent", "SOME_TOKEN": "secret"}
        self.ask(self.request("HEAD", "/x", "somebody@Mirror.example:2222", environment))
        session, = mirror.sessions
        self.assertEqual([argument for argument in session.arguments if not argument.startswith("-o")],
                         ["-p", "2222", "-l", "somebody", "-s", "--", "Mirror.example", "sftp"])
        self.assertIn("-oBatchMode=yes", session.arguments)
        # Python sets this if there is no locale
        session.environment.pop("LC_CTYPE", None)
        self.assertEqual(session.environment, dict(environment, PATH=mirror.path))

        self.ask(self.request("HEAD", "/x", "[::1]"))
        self.assertEqual(mirror.sessions[1].arguments[-4:], ["-s", "--", "::1", "sftp"])

    def test_path_of_a_recipe(self):
        """Recipes whose PATH leads to the same ssh share a session"""
        mirror = self.mirror(Server({"/%s" % n: content(n) for n in range(6)}))
        path = mirror.path
        hosttools = tempfile.mkdtemp(dir=self.tempdir)
        os.symlink(path + "/ssh", hosttools + "/ssh")
        environments = [{"PATH": path}, {"PATH": "/recipe/bin:" + path}, {"PATH": hosttools}, {"HOME": "/home/somebody"}]
        sessions = []
        for n, environment in enumerate(environments):
            self.assertEqual(self.ask(self.request("HEAD", "/%s" % n, environment=environment)), [(200, n)])
            sessions.append(len(mirror.sessions))
        self.assertEqual(sessions, [1, 1, 1, 2])

    def test_stop(self):
        """Logins are not interrupted, since sshd counts that: ssh has time to finish them after its input has ended"""
        waiting = threading.Barrier(3, timeout=SECONDS)
        finished = []

        def script(session):
            if session.host == "established":
                session.greet()
            waiting.wait()
            try:
                while session.read(1):
                    pass
            except EOFError:
                # If ssh is killed, its end of this socket is closed
                finished.append(not select.select([session.control], [], [], 0.3)[0])

        self.mirror(script)
        requests = [self.request("HEAD", "/x", host) for host in ("login", "established")]
        self.server.submit(requests, self.answered)
        waiting.wait()
        self.assertTrue(self.server.stop())
        self.assertEqual([type(outcome) for outcome in self.wait(requests)], [Cancelled, Cancelled])
        self.assertEqual(finished, [True, True])

    def test_stop_with_an_ssh_that_does_not_end(self):
        over = threading.Event()
        self.addCleanup(over.set)

        def script(session):
            session.greet()
            session.send(*status(session.receive()[1], sftp.FX_NO_SUCH_FILE))
            over.wait(SECONDS)

        mirror = self.mirror(script)
        self.ask_hosts(["mirror", "stubborn"])
        self.assertTrue(self.server.stop())
        for session in mirror.sessions:
            self.assertRaises(ProcessLookupError, os.kill, session.pid, 0)

    def test_forked_child(self):
        mirror = self.mirror(Server({"/x": b"x", "/y": b"yy"}))
        self.assertEqual(self.ask(self.request("HEAD", "/x")), [(200, 1)])
        child = os.fork()
        if not child:
            os._exit(0)
        self.assertEqual(os.waitpid(child, 0)[1], 0)
        self.assertEqual(self.ask(self.request("HEAD", "/y")), [(200, 2)])
        self.assertEqual(len(mirror.sessions), 1)
