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
import shutil
import signal
import socket
import stat
import struct
import sys
import tempfile
import threading
import unittest
import unittest.mock

from bb.connections import (Cancelled, ConnectError, DestinationError, Disconnected, ProtocolError, RefusedError,
                            StatusError, TimedOutError)
from bb.connections import sftp, ssh
from bb.connections.request import Request
from bb.connections.sftp import SFTPConnection

# Hands its input, output and errors to the test, and ends as it is told
FAKE_SSH = """#!%s -IS
import json, os, signal, socket, sys
sock = socket.socket(socket.AF_UNIX)
sock.connect(%r)
if "stubborn" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
socket.send_fds(sock, [json.dumps([sys.argv[1:], dict(os.environ)]).encode()], [0, 2])
for fd in range(3):
    os.close(fd)
status = sock.recv(1)
os._exit(status[0] if status else 0)
"""

# Only bounds a test that fails
SECONDS = 20


class Session:
    """The server's end of one fake ssh"""
    def __init__(self, control):
        self.control = control
        message, (sock, self.stderr), _, _ = socket.recv_fds(control, 65536, 2)
        self.sock = socket.socket(fileno=sock)
        self.sock.settimeout(SECONDS)
        self.arguments, self.environment = json.loads(message)

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
        """type, id (or version) and the rest of a packet"""
        length, kind, ident = struct.unpack(">IBI", self.read(9))
        return kind, ident, self.read(length - 5)

    def send(self, *packet):
        self.sock.sendall(encode(*packet))

    def greet(self, version=3, extensions=b""):
        assert self.receive()[:2] == (sftp.FXP_INIT, 3)
        self.send(sftp.FXP_VERSION, version, extensions)

    def end(self, status=0):
        """The process ends with status"""
        self.sock.close()
        os.close(self.stderr)
        with contextlib.suppress(OSError):
            self.control.sendall(bytes([status]))
        self.control.close()


class SSHMirror:
    """
    Where the fake ssh's connect to: runs script(session) for each, in a thread.
    path is for PATH.
    """
    def __init__(self, script, path):
        self.script = script
        self.path = path
        self.sessions = []
        self.failures = []
        # Abstract, since a path may be too long
        address = "\0bitbake-sftp-" + secrets.token_hex(16)
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(address)
        self.listener.listen(16)
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
                # Ended before it could say anything
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
    A plain SFTP server of files in memory (name: content), None for a directory
    and an Exception's subclass for one that must not be read.
    """
    extensions = b""
    # What FSTAT and STAT say of sizes that are not true
    sizes = {}
    max_read = 1 << 20

    def __init__(self, files):
        self.files = files
        self.handles = {}
        self.opened = 0
        self.most_handles = 0
        # Names and ranges of the READs, in their order
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
    """Takes all that is asked before it answers, the last first"""
    def __init__(self, files):
        super().__init__(files)
        # Bytes that READs asked for at a time
        self.asked = []

    def __call__(self, session):
        session.greet(extensions=self.extensions)
        while True:
            answers = [self.answer(*session.receive())]
            before = len(self.reads) - (answers[0][0] == sftp.FXP_DATA)
            while select.select([session.sock], [], [], 0.01)[0]:
                answers.append(self.answer(*session.receive()))
            self.asked.append(sum(size for _, _, size in self.reads[before:]))
            for answer in reversed(answers):
                session.send(*answer)


def encode(kind, ident, body=b""):
    return struct.pack(">IBI", 5 + len(body), kind, ident) + body

def string(data):
    return struct.pack(">I", len(data)) + data

def status(ident, code, text=""):
    return sftp.FXP_STATUS, ident, struct.pack(">I", code) + string(text.encode()) + string(b"")

def content(size):
    return (b"sstate object %d " % size * (size // 14 + 1))[:size]


class SFTPTest(unittest.TestCase):
    def setUp(self):
        self.tempdir = tempfile.mkdtemp(prefix="bitbake-sftp-")
        self.addCleanup(shutil.rmtree, self.tempdir)

    def mirror(self, script):
        mirror = SSHMirror(script, tempfile.mkdtemp(dir=self.tempdir))
        self.addCleanup(lambda: self.assertEqual(mirror.failures, []))
        self.addCleanup(mirror.stop)
        self.environment = {"PATH": mirror.path}
        return mirror

    def request(self, method, path, url="sftp://mirror", **kwargs):
        if method == "GET" and "fd" not in kwargs:
            kwargs["fd"] = fd = os.open(os.path.join(self.tempdir, "file"), os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            os.unlink(os.path.join(self.tempdir, "file"))
            self.addCleanup(os.close, fd)
            # Of an earlier attempt
            os.pwrite(fd, b"old", 1000000)
        return Request(method, url + path, self.environment, **kwargs)

    def connection(self, url="sftp://mirror", timeout=10):
        request = self.request("HEAD", "/x", url)
        connection = SFTPConnection(request.origin, request.route, timeout)
        self.addCleanup(connection.close)
        return connection

    def connect(self, script):
        self.mirror(script)
        connection = self.connection()
        connection.connect()
        return connection

    def ask(self, connection, *requests):
        """Send all at once. Returns the outcomes in the same order: a status and a length, or the error."""
        outcomes = {}
        connection.send(requests)
        while connection.in_flight:
            for request, response, error in connection.receive():
                self.assertNotIn(request, outcomes)
                self.assertNotEqual(response is None, error is None)
                outcomes[request] = error or (response.status, response.length)
        self.assertTrue(connection.reusable)
        return [outcomes[request] for request in requests]

    def read(self, request):
        return os.pread(request.fd, 1 << 26, 0)


class FilesTest(SFTPTest):
    def get_all(self, server, sizes=(0, 1, 5000, 32768, 32769, 3000000), known=False):
        server.files.update({"/%s" % size: content(size) for size in sizes})
        connection = self.connect(server)
        requests = [self.request("GET", "/%s" % size, size=size if known else None) for size in sizes]
        self.assertEqual(self.ask(connection, *requests), [(200, size) for size in sizes])
        for request, size in zip(requests, sizes):
            self.assertEqual(self.read(request), content(size))
            self.assertEqual(request.received, size)
        self.assertEqual(connection.served, len(sizes))
        # The CLOSEs were before it
        self.ask(connection, self.request("HEAD", "/0"))
        self.assertEqual(server.handles, {})
        return connection

    def test_head(self):
        files = {"/%s" % n: content(n) for n in range(500)}
        files.update({"/directory": None, "relative": b"home"})
        connection = self.connect(Server(files))
        requests = [self.request("HEAD", "/%s" % n) for n in range(501)]
        self.assertEqual(self.ask(connection, *requests), [(200, n) for n in range(500)] + [(404, None)])
        self.assertEqual(self.ask(connection, self.request("HEAD", "/directory"), self.request("HEAD", "/~/relative")),
                         [(404, None), (200, 4)])

    def test_get(self):
        self.get_all(Server({}))

    def test_get_with_known_sizes(self):
        server = Server({})
        self.get_all(server, known=True)
        self.assertIn(("/5000", 0, 5000), server.reads)
        self.assertNotIn("/0", [name for name, _, _ in server.reads])

    def test_answers_in_another_order(self):
        self.get_all(Shuffling({}))

    def test_short_reads(self):
        for kind in (Server, Shuffling):
            server = kind({})
            server.max_read = 10000
            self.get_all(server)

    def test_wrong_sizes(self):
        for size in (1, 4000, 100000):
            with self.subTest(size=size):
                connection = self.connect(Server({"/x": content(40000)}))
                request = self.request("GET", "/x", size=size)
                self.assertEqual(self.ask(connection, request), [(200, 40000)])
                self.assertEqual(self.read(request), content(40000))

    def test_what_is_no_file(self):
        server = Server({"/directory": None, "/denied": PermissionError, "/broken": OSError, "/good": b"good"})
        connection = self.connect(server)
        names = ("/absent", "/directory", "/denied", "/broken", "/good")
        outcomes = self.ask(connection, *[self.request("GET", name) for name in names])
        self.assertEqual(outcomes[:3] + outcomes[4:], [(404, None), (404, None), (403, None), (200, 4)])
        self.assertIsInstance(outcomes[3], StatusError)
        self.assertEqual(outcomes[3].status, 4)
        self.assertEqual(str(outcomes[3]), "sftp://mirror/broken: SFTP status 4 Failure")

    def test_a_server_that_tells_no_size(self):
        class Sizeless(Server):
            def attributes(self, ident, name):
                return sftp.FXP_ATTRS, ident, struct.pack(">II", sftp.ATTR_PERMISSIONS, stat.S_IFREG)

        connection = self.connect(Sizeless({"/x": b"x"}))
        for error in self.ask(connection, self.request("HEAD", "/x"), self.request("GET", "/x")):
            self.assertIsInstance(error, StatusError)

    def test_files_that_change_while_they_are_read(self):
        for kind in (Server, Shuffling):
            with self.subTest(kind=kind):
                server = kind({"/short": content(40000), "/long": content(5000), "/good": b"good"})
                server.sizes = {"/short": 90000, "/long": 4000}
                connection = self.connect(server)
                requests = [self.request("GET", name) for name in ("/short", "/long", "/good")]
                short, long, good = self.ask(connection, *requests)
                self.assertIsInstance(short, ProtocolError)
                self.assertIsInstance(long, ProtocolError)
                self.assertEqual(good, (200, 4))
                self.ask(connection, self.request("HEAD", "/good"))
                self.assertEqual(server.handles, {})

    def test_destination_that_cannot_be_written(self):
        server = Server({"/x": content(100000), "/good": b"good"})
        connection = self.connect(server)
        fd = os.open("/dev/null", os.O_RDONLY)
        self.addCleanup(os.close, fd)
        bad, good = self.ask(connection, self.request("GET", "/x", fd=fd), self.request("GET", "/good"))
        self.assertIsInstance(bad, DestinationError)
        self.assertEqual(good, (200, 4))
        request = self.request("GET", "/x")
        with unittest.mock.patch("os.pwrite", side_effect=OSError(28, "No space left on device")):
            error, = self.ask(connection, request)
        self.assertEqual(str(error), "cannot write the file: No space left on device")
        self.assertEqual(self.ask(connection, self.request("GET", "/x")), [(200, 100000)])
        self.ask(connection, self.request("HEAD", "/x"))
        self.assertEqual(server.handles, {})

    def test_cancelled(self):
        class Cancelling(Server):
            """Cancels what is read the second time"""
            def answer(self, kind, ident, body):
                if len(self.reads) == 2:
                    self.request.cancelled = True
                return super().answer(kind, ident, body)

        server = Cancelling({"/x": content(10000000), "/good": b"good"})
        connection = self.connect(server)
        server.request = self.request("GET", "/x")
        before = [self.request("HEAD", "/x"), self.request("GET", "/x")]
        for request in before:
            request.cancelled = True
        for error in self.ask(connection, *before, server.request):
            self.assertIsInstance(error, Cancelled)
        self.assertEqual(self.ask(connection, self.request("GET", "/good")), [(200, 4)])
        self.assertLess(len(server.reads), 200)
        self.ask(connection, self.request("HEAD", "/good"))
        self.assertEqual(server.handles, {})

    def test_limits(self):
        class Limited(Shuffling):
            extensions = string(b"x@y") + string(b"limits@openssh.com") + string(b"limits@openssh.com") + string(b"1")
            limits = (261120, 0, 3)

        sizes = (8000001, 8000000) + tuple(range(40))
        server = Limited({})
        self.get_all(server, sizes)
        self.assertEqual(server.most_handles, 3)
        self.assertLessEqual(max(server.asked), sftp.WINDOW)
        self.assertGreater(max(server.asked), sftp.WINDOW // 2)
        self.assertEqual(max(size for _, _, size in server.reads), sftp.MAX_READ)
        # Both large files get on at the same time: neither is asked for to its end long before the other
        large = [name for name, _, _ in server.reads if name in ("/8000001", "/8000000")]
        self.assertGreater(min(max(i for i, name in enumerate(large) if name == each) for each in set(large)), len(large) * 0.65)

    def test_limits_that_are_not_told(self):
        class Refusing(Server):
            extensions = string(b"limits@openssh.com") + string(b"1")

            def answer(self, kind, ident, body):
                return status(ident, 8) if kind == sftp.FXP_EXTENDED else super().answer(kind, ident, body)

        self.get_all(Refusing({}))

    def test_limits_that_are_told_late(self):
        """STATs do not wait for them, OPENs do"""
        class Late(Shuffling):
            limits = (261120, 0, 2)

            def __call__(self, session):
                session.greet(extensions=string(b"limits@openssh.com") + string(b"1"))
                limits, stat = session.receive(), session.receive()
                self.kinds = limits[0], stat[0], bool(select.select([session.sock], [], [], 0.1)[0])
                session.send(*self.answer(*stat))
                session.send(*self.answer(*limits))
                session.greet = lambda extensions: None
                super().__call__(session)

        files = {"/%s" % n: content(n) for n in range(10)}
        server = Late(files)
        connection = self.connect(server)
        requests = [self.request("GET", "/%s" % n) for n in range(10)]
        self.assertEqual(self.ask(connection, *requests, self.request("HEAD", "/9"))[9:], [(200, 9), (200, 9)])
        self.assertEqual(server.kinds, (sftp.FXP_EXTENDED, sftp.FXP_STAT, False))
        self.assertEqual(server.most_handles, 2)

    def test_limits_that_never_come(self):
        class Silent(Server):
            extensions = string(b"limits@openssh.com") + string(b"1")

            def __call__(self, session):
                session.greet(extensions=self.extensions)
                self.kind = session.receive()[0]
                while True:
                    session.send(*self.answer(*session.receive()))

        server = Silent({"/x": b"x"})
        connection = self.connect(server)
        self.assertEqual(self.ask(connection, self.request("HEAD", "/x")), [(200, 1)])
        self.assertEqual(server.kind, sftp.FXP_EXTENDED)
        connection.timeout = 0.1
        request = self.request("GET", "/x")
        connection.send([request])
        with self.assertRaises(TimedOutError):
            connection.receive()
        self.assertEqual(list(connection.in_flight), [request])
        self.assertEqual(server.opened, 0)

    def test_nobody_waits_for_the_other(self):
        """More requests than the system buffers, for a server that waits until each answer is taken"""
        server = Server({"/" + "x" * 200: b"x"})
        connection = self.connect(server)
        outcomes = self.ask(connection, *[self.request("HEAD", "/" + "x" * 200) for _ in range(12000)])
        self.assertEqual(set(outcomes), {(200, 1)})


class FaultsTest(SFTPTest):
    def fault(self, answer, method="HEAD"):
        """What receive() raises when the server answers with the bytes of answer(id) and closes"""
        def script(session):
            session.greet()
            session.sock.sendall(answer(session.receive()[1]))

        connection = self.connect(script)
        request = self.request(method, "/x")
        connection.send([request])
        with self.assertRaises(Exception) as raised:
            connection.receive()
        self.assertFalse(connection.reusable)
        self.assertEqual(list(connection.in_flight), [request])
        return raised.exception

    def test_malformed_packets(self):
        attributes = struct.pack(">IQ", 1, 5)
        for name, method, answer in (
                ("truncated", "HEAD", lambda i: encode(sftp.FXP_ATTRS, i, attributes)[:-3]),
                ("oversized", "HEAD", lambda i: struct.pack(">I", sftp.MAX_PACKET + 1)),
                ("huge", "HEAD", lambda i: struct.pack(">IBI", 0xffffffff, sftp.FXP_ATTRS, i)),
                ("empty", "HEAD", lambda i: struct.pack(">I", 0)),
                ("no id", "HEAD", lambda i: struct.pack(">IB", 1, sftp.FXP_STATUS) + b"\0" * 9),
                ("unknown id", "HEAD", lambda i: encode(sftp.FXP_ATTRS, i + 1, attributes)),
                ("unknown type", "HEAD", lambda i: encode(99, i, attributes)),
                ("wrong type", "HEAD", lambda i: encode(sftp.FXP_HANDLE, i, string(b"x"))),
                ("wrong type", "GET", lambda i: encode(sftp.FXP_ATTRS, i, attributes)),
                ("short status", "HEAD", lambda i: encode(sftp.FXP_STATUS, i)),
                ("short attributes", "HEAD", lambda i: encode(sftp.FXP_ATTRS, i, attributes[:-1])),
                ("short handle", "GET", lambda i: encode(sftp.FXP_HANDLE, i, string(b"x") + b"x")),
                ("long handle", "GET", lambda i: encode(sftp.FXP_HANDLE, i, string(b"x" * 257)))):
            with self.subTest(name=name):
                error = self.fault(answer, method)
                self.assertIs(type(error), ProtocolError, error)

    def test_malformed_data(self):
        for name, data in (("more than asked", string(b"x" * 32769)), ("none", string(b"")), ("short", b"\0\0\0\7xxx")):
            with self.subTest(name=name):
                class Lying(Server):
                    def answer(self, kind, ident, body, data=data):
                        if kind == sftp.FXP_READ:
                            return sftp.FXP_DATA, ident, data
                        return super().answer(kind, ident, body)

                connection = self.connect(Lying({"/x": content(100000)}))
                with self.assertRaises(ProtocolError):
                    self.ask(connection, self.request("GET", "/x"))
                self.assertEqual(len(connection.in_flight), 1)

    def test_closed(self):
        error = self.fault(lambda i: b"")
        self.assertIs(type(error), Disconnected)

    def test_silent(self):
        connection = self.connect(lambda session: (session.greet(), session.receive(), session.read(1)) and None)
        connection.timeout = 0.1
        connection.send([self.request("HEAD", "/x")])
        with self.assertRaises(TimedOutError):
            connection.receive()

    def test_answers_before_the_end_count(self):
        def script(session):
            session.greet()
            idents = [session.receive()[1] for _ in range(3)]
            # Both with one read
            session.sock.sendall(encode(*status(idents[1], sftp.FX_NO_SUCH_FILE)) + encode(*status(12345, 0)))

        connection = self.connect(script)
        requests = [self.request("HEAD", "/%s" % n) for n in range(3)]
        connection.send(requests)
        (request, response, error), = connection.receive()
        self.assertEqual((request, response.status, error), (requests[1], 404, None))
        self.assertFalse(connection.reusable)
        self.assertEqual(list(connection.in_flight), [requests[0], requests[2]])
        with self.assertRaises(ProtocolError):
            connection.receive()

    def test_abort(self):
        connection = self.connect(lambda session: (session.greet(), session.receive(), session.read(1)) and None)
        connection.send([self.request("HEAD", "/x")])
        timer = threading.Timer(0.05, connection.abort)
        timer.start()
        self.addCleanup(timer.join)
        with self.assertRaises(Cancelled):
            connection.receive()


class ConnectTest(SFTPTest):
    def refused(self, script, timeout=10):
        self.mirror(script)
        connection = self.connection(timeout=timeout)
        with self.assertRaises(Exception) as raised:
            connection.connect()
        self.assertFalse(connection.reusable)
        connection.close()
        self.assertIsNotNone(connection._ssh._process.returncode)
        return raised.exception

    def test_command_and_environment(self):
        os.environ["BITBAKE_TEST_SFTP"] = "not for ssh"
        self.addCleanup(os.environ.pop, "BITBAKE_TEST_SFTP")
        mirror = self.mirror(Server({}))
        self.environment.update(HOME="/home/somebody", SSH_AUTH_SOCK="/agent", SOCKS5_USER="somebody", CFLAGS="-O2")
        connection = self.connection("sftp://somebody@Mirror.example:2222")
        connection.connect()
        session, = mirror.sessions
        self.assertEqual(session.arguments, ["-oForwardX11=no", "-oForwardAgent=no", "-oPermitLocalCommand=no",
                         "-oClearAllForwardings=yes", "-oBatchMode=yes", "-oControlMaster=no", "-p", "2222",
                         "-l", "somebody", "-s", "--", "Mirror.example", "sftp"])
        # Python sets it where there is no locale
        session.environment.pop("LC_CTYPE", None)
        # A ProxyCommand may need the last
        self.assertEqual(session.environment, {"PATH": mirror.path, "HOME": "/home/somebody", "SSH_AUTH_SOCK": "/agent",
                                               "SOCKS5_USER": "somebody"})

        self.connection("sftp://[::1]").connect()
        self.assertEqual(mirror.sessions[1].arguments[6:], ["-s", "--", "::1", "sftp"])

    def test_path_of_a_recipe(self):
        """It finds the same ssh as that of another, which can use the same connection"""
        def route(path, **environment):
            return Request("HEAD", "sftp://mirror/x", dict(environment, PATH=path)).route

        path = self.mirror(Server({})).path
        hosttools = tempfile.mkdtemp(dir=self.tempdir)
        os.symlink(path + "/ssh", hosttools + "/ssh")
        usual = route(path)
        for other in (route("/recipe/bin:" + path), route(hosttools)):
            self.assertEqual((usual, hash(usual)), (other, hash(other)))
        own = self.mirror(Server({})).path
        for other in (route(own + ":" + path), route(path, HOME="/home/somebody"), route(path, SSH_AUTH_SOCK="/agent")):
            self.assertNotEqual(usual, other)

    def test_no_program(self):
        self.environment = {}
        connection = self.connection()
        with unittest.mock.patch("shutil.which", return_value="/nonexistent/ssh"):
            with self.assertRaises(ConnectError) as raised:
                connection.connect()
        self.assertFalse(raised.exception.retryable)

    def test_what_ssh_says(self):
        for kind, retryable, text in (
                (ConnectError, False, "Host key verification failed."),
                (ConnectError, False, "somebody@mirror: Permission denied (publickey,password)."),
                (ConnectError, False, "Received disconnect from 127.0.0.1 port 22:2: Too many authentication failures"),
                (ConnectError, False, "ssh: Could not resolve hostname mirror: Name or service not known"),
                (ConnectError, True, "ssh: Could not resolve hostname mirror: Temporary failure in name resolution"),
                (ConnectError, False, "command-line: line 0: Bad configuration option: nonsense"),
                (ConnectError, False, "Bad owner or permissions on /home/somebody/.ssh/config"),
                (ConnectError, False, "subsystem request failed on channel 0"),
                (ConnectError, True, "ssh: connect to host mirror port 22: Connection refused"),
                (ConnectError, True, "ssh: connect to host mirror port 22: No route to host"),
                (ConnectError, True, "ssh: connect to host mirror port 22: Connection timed out"),
                (RefusedError, True, "kex_exchange_identification: Connection closed by remote host"),
                (RefusedError, True, "kex_exchange_identification: read: Connection reset by peer"),
                (RefusedError, True, "ssh_exchange_identification: Connection closed by remote host"),
                (RefusedError, True, "Connection closed by 127.0.0.1 port 22"),
                (RefusedError, True, "Connection reset by 127.0.0.1 port 22"),
                (RefusedError, True, "Not allowed at this time"),
                (RefusedError, True, "Exceeded MaxStartups")):
            with self.subTest(text=text):
                def script(session):
                    session.say("Warning: \x1b[1mno such identity\x1b[0m\r\n%s\r\n\r\n" % text)
                    return 255

                error = self.refused(script)
                self.assertIs(type(error), kind, error)
                self.assertEqual(error.retryable, retryable)
                self.assertTrue(str(error).endswith("mirror: " + text), error)

    def test_what_ssh_says_is_bounded(self):
        def script(session):
            for _ in range(100):
                session.say("x" * 1000 + "\n")
            session.say("\x1b[1m\u20ac \t" + "y" * 1000 + "\n\n")
            return 255

        self.assertEqual(str(self.refused(script)), "cannot connect to mirror: ?[1m\u20ac ?" + "y" * 193)

    def test_ssh_says_nothing(self):
        error = self.refused(lambda session: 254)
        self.assertEqual(str(error), "cannot connect to mirror: ssh has ended with status 254")
        self.assertTrue(error.retryable)

    def test_text_before_the_protocol(self):
        def script(session):
            session.sock.sendall(b"Welcome\x07 to mirror\n" + encode(sftp.FXP_VERSION, 3))
            session.read(1000)

        error = self.refused(script)
        self.assertIs(type(error), ConnectError)
        self.assertFalse(error.retryable)
        self.assertRegex(str(error), r"^cannot connect to mirror: instead of SFTP it sends 'Welcome\? to mirror'.*bashrc")

    def test_other_versions(self):
        for answer in (encode(sftp.FXP_VERSION, 2), encode(sftp.FXP_STATUS, 3),
                       encode(sftp.FXP_VERSION, 3, string(b"x") + b"\0"), encode(sftp.FXP_VERSION, 3, b"\0\0\1\0x")):
            with self.subTest(answer=answer):
                error = self.refused(lambda session: session.sock.sendall(answer))
                self.assertIs(type(error), ConnectError, error)
                self.assertFalse(error.retryable)

    def test_silent(self):
        with unittest.mock.patch.object(ssh, "LOGIN_GRACE", 0.1):
            error = self.refused(lambda session: session.read(1000), timeout=0.2)
        self.assertIs(type(error), ConnectError)
        self.assertTrue(error.retryable)

    def test_abort(self):
        self.mirror(lambda session: session.read(1000) and None)
        connection = self.connection()
        timer = threading.Timer(0.2, connection.abort)
        timer.start()
        self.addCleanup(timer.join)
        with self.assertRaises(Cancelled):
            connection.connect()

        connection = self.connection()
        connection.abort()
        with self.assertRaises(Cancelled):
            connection.connect()

    def test_a_handshake_is_not_broken_off(self):
        """sshd counts those: ssh hears that its input ends, and has time to finish"""
        ended = []

        def script(session):
            with self.assertRaises(EOFError):
                session.read(1000)
            # It logs in
            threading.Event().wait(0.3)
            ended.append(True)

        self.mirror(script)
        connection = self.connection(timeout=0.1)
        with self.assertRaises(ConnectError):
            connection.connect()
        connection.close()
        self.assertEqual(ended, [True])
        self.assertEqual(connection._ssh._process.returncode, 0)

    def test_close(self):
        self.mirror(Server({}))
        connection = self.connection()
        connection.close()
        connection.close()
        self.assertEqual(connection.fileno(), -1)

        connection = self.connection()
        connection.connect()
        self.assertGreater(connection.fileno(), 2)
        connection.close()
        connection.close()
        self.assertEqual(connection.fileno(), -1)
        self.assertEqual(connection._ssh._process.returncode, 0)

    def test_close_of_what_does_not_end(self):
        over = threading.Event()
        self.mirror(lambda session: (session.greet(), over.wait(SECONDS)) and None)
        self.addCleanup(over.set)
        for host, end in (("mirror", signal.SIGTERM), ("stubborn", signal.SIGKILL)):
            connection = self.connection("sftp://" + host)
            connection.connect()
            with unittest.mock.patch.multiple(ssh, GRACE=0.1, TERMINATE_GRACE=0.1):
                connection.close()
            self.assertEqual(connection._ssh._process.returncode, -end)

    def test_close_in_a_forked_child(self):
        connection = self.connect(Server({"/x": b"x"}))
        child = os.fork()
        if not child:
            try:
                connection.close()
            finally:
                os._exit(0 if connection.fileno() == -1 else 1)
        self.assertEqual(os.waitpid(child, 0)[1], 0)
        self.assertEqual(self.ask(connection, self.request("HEAD", "/x")), [(200, 1)])
