#
# BitBake tests for the shared connections
#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

import contextlib
import http.server
import os
import shutil
import socket
import tempfile
import threading
import types
import unittest
import unittest.mock
import urllib.parse

import bb
import bb.data
import bb.fetch2
from bb.connections import ConnectError, ProtocolError, RefusedError, settings
from bb.connections.http import HTTPConnection
from bb.connections.request import Request
from bb.connections import host, pool
from bb.connections import memory
from bb.connections import protocol, server
from bb.connections import client

class Handler(http.server.BaseHTTPRequestHandler):
    """/<n> is a file of n bytes, /status/<n> an answer, /to/<url> a redirect"""
    protocol_version = "HTTP/1.1"
    timeout = 30

    def do_HEAD(self):
        self.server.requests.append((self.command, self.path, dict(self.headers)))
        if self.path.startswith("/to/"):
            self.send_response(302)
            # fetch2 quotes the colons, and makes one slash of two
            scheme, _, rest = urllib.parse.unquote(self.path[len("/to/"):]).partition(":")
            self.send_header("Location", "%s://%s" % (scheme, rest.lstrip("/")))
            body = b""
        elif self.path.startswith("/status/"):
            status = self.server.statuses.pop() if self.server.statuses else int(self.path[len("/status/"):])
            self.send_response(status)
            body = b"no"
        else:
            self.send_response(200)
            self.send_header("Last-Modified", "Thu, 01 Jan 2015 00:00:00 GMT")
            body = content(int(self.path.rpartition("/")[2]))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_GET = do_HEAD

    def log_message(self, *args):
        pass

class Mirror(http.server.ThreadingHTTPServer):
    """A HTTP/1.1 server that counts"""
    daemon_threads = True
    request_queue_size = 64

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests = []
        self.statuses = []
        self.connections = 0
        self.url = "http://127.0.0.1:%s" % self.server_port
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05})
        self.thread.start()

    def process_request(self, request, address):
        self.connections += 1
        super().process_request(request, address)

    def stop(self):
        self.shutdown()
        self.thread.join()
        self.server_close()

def content(size):
    return (b"sstate object %d " % size * (size // 14 + 1))[:size]

def own_threads():
    """Names of the threads of what is tested here"""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("connection ")]

class Peer:
    """A server that answers each connection with bytes from a list, then closes it"""
    def __init__(self, *answers):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = "http://127.0.0.1:%s" % self.listener.getsockname()[1]
        self.thread = threading.Thread(target=self.serve, args=(answers,))
        self.thread.start()

    def serve(self, answers):
        for answer in answers:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            with sock:
                sock.settimeout(30)
                with contextlib.suppress(OSError):
                    while b"\r\n\r\n" not in sock.recv(65536):
                        pass
                    sock.sendall(answer)

    def stop(self):
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join()


class ConnectionsTest(unittest.TestCase):
    def setUp(self):
        self.d = bb.data.init()
        self.tempdir = tempfile.mkdtemp(prefix="bitbake-connections-")
        self.addCleanup(shutil.rmtree, self.tempdir)

    def mirror(self):
        mirror = Mirror()
        self.addCleanup(mirror.stop)
        return mirror

    def peer(self, *answers):
        peer = Peer(*answers)
        self.addCleanup(peer.stop)
        return peer

    def open(self):
        fd = os.open(os.path.join(self.tempdir, "file"), os.O_RDWR | os.O_CREAT)
        self.addCleanup(os.close, fd)
        return fd

    def read(self, fd):
        return os.pread(fd, 1 << 24, 0)


class SettingsTest(ConnectionsTest):
    def test_defaults(self):
        self.assertEqual(settings(self.d), (True, 4, 64, 1, ["mirror"], 64))

    def test_values(self):
        self.d.setVar("BB_CONNECTION_CACHE", "0")
        self.d.setVar("BB_CONNECTION_CACHE_MAX", "8")
        self.d.setVar("BB_CONNECTION_CACHE_DEPTH", "16")
        self.assertEqual(settings(self.d), (False, 8, 16, 1, ["mirror"], 64))

    def test_invalid(self):
        for name, value in (("BB_CONNECTION_CACHE", "yes"), ("BB_CONNECTION_CACHE_MAX", "0"),
                            ("BB_CONNECTION_CACHE_MAX", "-1"), ("BB_CONNECTION_CACHE_DEPTH", "four"),
                            ("BB_CONNECTION_CACHE_DEPTH", "1025"), ("BB_SETSCENE_PRESENCE", "hashserv")):
            with self.subTest(name=name, value=value):
                d = self.d.createCopy()
                d.setVar(name, value)
                with self.assertRaisesRegex(ValueError, '^Invalid %s = "%s", allowed .*$' % (name, value)):
                    settings(d)


class HTTPTest(ConnectionsTest):
    def connect(self, url, environment={}):
        request = Request("HEAD", url, environment)
        connection = HTTPConnection(request.origin, request.route, timeout=10)
        self.addCleanup(connection.close)
        connection.connect()
        return connection

    def exchange(self, connection, request):
        connection.send([request])
        (answered, response, _), = connection.receive()
        self.assertIs(answered, request)
        return response

    def test_requests_share_a_connection(self):
        mirror = self.mirror()
        connection = self.connect(mirror.url)
        fd = self.open()
        for size in (3000000, 0, 5000):
            self.assertEqual(self.exchange(connection, Request("HEAD", mirror.url + "/%s" % size, {})).length, size)
            self.assertEqual(self.exchange(connection, Request("GET", mirror.url + "/%s" % size, {}, fd=fd)).length, size)
            self.assertEqual(self.read(fd), content(size))
            self.assertTrue(connection.reusable)
        self.assertEqual(self.exchange(connection, Request("GET", mirror.url + "/status/404", {}, fd=fd)).status, 404)
        self.assertTrue(connection.reusable)
        self.assertEqual(mirror.connections, 1)

    def test_a_new_file_is_not_truncated(self):
        mirror = self.mirror()
        with unittest.mock.patch("os.ftruncate") as truncate:
            self.exchange(self.connect(mirror.url), Request("GET", mirror.url + "/5", {}, fd=self.open()))
        truncate.assert_not_called()

    def test_chunked(self):
        peer = self.peer(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
                         b"5;x=y\r\nhello\r\n6\r\n world\r\n0\r\nTrailer: 1\r\n\r\n")
        fd = self.open()
        connection = self.connect(peer.url)
        self.assertEqual(self.exchange(connection, Request("GET", peer.url, {}, fd=fd)).length, 11)
        self.assertEqual(self.read(fd), b"hello world")
        self.assertTrue(connection.reusable)

    def test_faults(self):
        for answer in (b"", b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello",
                       b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
                       b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\nhello",
                       b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
                       b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\nhello\r\n",
                       b"SSH-2.0-OpenSSH\r\n\r\n", b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 20000):
            with self.subTest(answer=answer[:70]):
                peer = self.peer(answer)
                connection = self.connect(peer.url)
                with self.assertRaises(ProtocolError):
                    self.exchange(connection, Request("GET", peer.url, {}, fd=self.open()))
                self.assertFalse(connection.reusable)

    def test_proxy(self):
        proxy = self.mirror()
        url = "http://mirror.example/5"
        environment = {"http_proxy": proxy.url.replace("//", "//user:word@"), "no_proxy": "other.example"}
        connection = self.connect(url, environment)
        self.assertEqual(self.exchange(connection, Request("HEAD", url, environment)).length, 5)
        command, target, headers = proxy.requests[0]
        self.assertEqual(target, url)
        self.assertEqual(headers["Host"], "mirror.example")
        self.assertEqual(headers["Proxy-Authorization"], "Basic dXNlcjp3b3Jk")
        self.assertIsNone(Request("HEAD", "http://other.example/", environment).route.proxy)


class PoolTest(ConnectionsTest):
    DEPTH = 1

    def setUp(self):
        super().setUp()
        for name, value in (("PAUSE", 0.01), ("MAX_PAUSE", 0.05), ("BREAKER_AFTER", 0), ("BREAKER_PAUSE", 0.05)):
            patch = unittest.mock.patch.object(host, name, value)
            patch.start()
            self.addCleanup(patch.stop)
        self.pool = pool.Pool(4, self.DEPTH, timeout=10)
        self.addCleanup(self.pool.stop)

    def ask(self, *requests):
        """Submit all (method, url, fd) at once; returns [(response, error)] in the same order"""
        outcomes = [None] * len(requests)
        answered = threading.Semaphore(0)
        for i, (method, url, fd) in enumerate(requests):
            def done(request, response, error, i=i):
                self.assertIsNone(outcomes[i])
                outcomes[i] = (response, error)
                answered.release()
            self.pool.submit(Request(method, url, {}, authorization="Basic eA==", fd=fd, done=done))
        for request in requests:
            self.assertTrue(answered.acquire(timeout=30))
        return outcomes

    def test_connections_are_limited(self):
        mirror = self.mirror()
        outcomes = self.ask(*[("HEAD", mirror.url + "/%s" % n, None) for n in range(200)])
        self.assertEqual([response.length for response, _ in outcomes], list(range(200)))
        self.assertLessEqual(mirror.connections, 4)
        self.assertEqual(self.pool.statistics.connections, mirror.connections)
        self.assertEqual(self.pool.statistics.requests, 200)

    def test_half_a_body_is_fetched_again(self):
        peer = self.peer(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n" + b"x" * 50,
                         b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello")
        fd = self.open()
        self.assertEqual(self.ask(("GET", peer.url, fd))[0][0].length, 5)
        self.assertEqual(self.read(fd), b"hello")
        self.assertEqual(self.pool.statistics.retries, 1)

    def test_a_body_that_stays_short_is_an_error(self):
        peer = self.peer(*[b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n" + b"x" * 50] * host.ATTEMPTS)
        self.assertIsInstance(self.ask(("GET", peer.url, self.open()))[0][1], ProtocolError)

    def test_refused_is_not_missing(self):
        mirror = self.mirror()
        mirror.statuses = [200, 200, 503, 429]
        outcomes = self.ask(*[("HEAD", mirror.url + "/status/200", None)] * 2)
        self.assertEqual([response.status for response, _ in outcomes], [200, 200])
        self.assertEqual(self.pool.statistics.refusals, 2)

    def test_who_refuses_for_ever_is_an_error(self):
        mirror = self.mirror()
        self.assertIsInstance(self.ask(("HEAD", mirror.url + "/status/503", None))[0][1], RefusedError)
        self.assertEqual(len(mirror.requests), host.ATTEMPTS)

    def test_redirects_keep_credentials_at_their_origin(self):
        mirror, other = self.mirror(), self.mirror()
        mirror_to = mirror.url + "/to/" + mirror.url + "/7"
        other_to = mirror.url + "/to/" + other.url.replace("//", "//user:word@") + "/8"
        outcomes = self.ask(("HEAD", mirror_to, None), ("HEAD", other_to, None))
        self.assertEqual([response.length for response, _ in outcomes], [7, 8])
        self.assertTrue(all("Authorization" in headers for _, _, headers in mirror.requests))
        self.assertNotIn("Authorization", other.requests[0][2])

    def test_redirect_without_end_and_to_elsewhere(self):
        mirror = self.mirror()
        loop = self.peer(*[b"HTTP/1.1 302 Found\r\nLocation: /\r\nContent-Length: 0\r\n\r\n"] * 20)
        for url in (loop.url, mirror.url + "/to/file:///etc/passwd"):
            (response, error), = self.ask(("HEAD", url, None))
            self.assertIsNone(response)
            self.assertEqual(error.status, 302)

    def test_a_dead_host_is_left_alone(self):
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        self.addCleanup(listener.close)
        url = "http://127.0.0.1:%s/" % listener.getsockname()[1]
        with unittest.mock.patch.object(host, "BREAKER_PAUSE", 60):
            for _, error in self.ask(*[("HEAD", url, None)] * 20):
                self.assertIsInstance(error, ConnectError)
            with unittest.mock.patch.object(HTTPConnection, "connect") as connect:
                self.assertIsInstance(self.ask(("HEAD", url, None))[0][1], ConnectError)
            connect.assert_not_called()
        self.assertEqual([host for host, _ in self.pool.troubles()], ["127.0.0.1"])

    def test_a_host_that_is_back_is_used_again(self):
        mirror = self.mirror()
        mirror.statuses = [503] * 2
        with unittest.mock.patch.object(host, "BREAKER_REFUSALS", 2):
            self.assertIsInstance(self.ask(("HEAD", mirror.url + "/status/200", None))[0][1], RefusedError)
        self.assertEqual([host for host, _ in self.pool.troubles()], ["127.0.0.1"])
        pause = threading.Event()
        for _ in range(100):
            response, _ = self.ask(("HEAD", mirror.url + "/status/200", None))[0]
            if response:
                break
            pause.wait(0.05)
        self.assertEqual(response.status, 200)

    def test_stop_ends_what_waits(self):
        peer = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(peer.close)
        url = "http://127.0.0.1:%s/" % peer.getsockname()[1]
        errors = []
        for n in range(10):
            self.pool.submit(Request("HEAD", url, {}, done=lambda request, response, error: errors.append(error)))
        with peer.accept()[0] as sock:
            sock.recv(4096)
            self.assertTrue(self.pool.stop())
        self.assertEqual(len(errors), 10)
        self.assertNotIn(None, errors)
        self.assertEqual(own_threads(), [])


class HurryTest(ConnectionsTest):
    def test_what_is_awaited_comes_first(self):
        one = pool.Pool(1)
        self.addCleanup(one.stop)
        listener = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(listener.close)
        url = "http://127.0.0.1:%s/" % listener.getsockname()[1]
        answered = threading.Semaphore(0)
        requests = [Request("HEAD", url + str(n), {}, done=lambda *args: answered.release()) for n in range(6)]
        one.submit(*requests)
        asked = []
        with listener.accept()[0] as sock, sock.makefile("rb") as stream:
            for n in range(6):
                asked.append(int(stream.readline().split()[1][1:]))
                while stream.readline() != b"\r\n":
                    pass
                if n == 0:
                    # The first has been sent already
                    one.hurry(requests[4], requests[0], requests[2])
                sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n")
            for _ in requests:
                self.assertTrue(answered.acquire(timeout=30))
        self.assertEqual(asked, [0, 4, 2, 1, 3, 5])

    def test_who_is_awaited_longer_comes_first(self):
        """What is first stays in its order, before all others"""
        requests = [Request("HEAD", "http://127.0.0.1/%s" % n, {}) for n in range(6)]
        queue = host.Host(pool.Pool(1), requests[0].origin)
        with unittest.mock.patch.object(queue, "_grow", return_value=None), unittest.mock.patch.object(queue, "_threads", {1}):
            queue.submit(requests[:2])
            requests[2].first = requests[3].first = requests[4].first = True
            queue.submit(requests[2:3])
            queue.submit(requests[3:5])
            queue.hurry(requests[1:2])
            queue.submit(requests[5:])
        self.assertEqual([request.target for request in queue._queue], ["/2", "/3", "/4", "/1", "/0", "/5"])


class PipeliningTest(PoolTest):
    """What the pool does must not depend on how many requests are under way"""
    DEPTH = 16

    def heads(self, mirror, number):
        """Sizes that the mirror has told, in the order of the requests"""
        answered = threading.Semaphore(0)
        sizes = [None] * number
        requests = []
        for i in range(number):
            def done(request, response, error, i=i):
                sizes[i] = response.length
                answered.release()
            requests.append(Request("HEAD", mirror.url + "/%s" % i, {}, done=done))
        self.pool.submit(*requests)
        for _ in requests:
            self.assertTrue(answered.acquire(timeout=30))
        return sizes

    def test_connections_are_limited(self):
        mirror = self.mirror()
        self.assertEqual(self.heads(mirror, 1000), list(range(1000)))
        self.assertLessEqual(mirror.connections, 4)
        # One is asked for twice, to find out whether this works
        self.assertEqual(len(mirror.requests), 1001)

    def test_a_server_that_closes_behind_each_answer(self):
        answers = [b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % i for i in range(20)]
        self.pool.limit = 1
        self.assertEqual(self.heads(self.peer(*answers), 20), list(range(20)))


class CountingMemory(memory.Memory):
    """With what the tests of the pool need of that"""
    statistics = property(lambda self: self._pool.statistics)

    def stop(self):
        return self._pool.stop()

    def troubles(self):
        return self._pool.troubles()


class MemoryTest(PoolTest):
    def setUp(self):
        super().setUp()
        self.pool = CountingMemory(self.pool)

    def test_nothing_is_asked_twice(self):
        mirror = self.mirror()
        wanted = [("HEAD", mirror.url + path, None) for path in ("/5", "/status/404", "/5", "/6")]
        for _ in range(2):
            outcomes = self.ask(*wanted)
            self.assertEqual([(r.status, r.length) for r, _ in outcomes if r.status == 200], [(200, 5), (200, 5), (200, 6)])
            self.assertEqual(outcomes[1][0].status, 404)
        self.assertEqual(sorted(path for _, path, _ in mirror.requests), ["/5", "/6", "/status/404"])

    def test_a_download_is_an_answer(self):
        mirror = self.mirror()
        self.ask(("GET", mirror.url + "/5", self.open()))
        self.ask(("HEAD", mirror.url + "/5", None))
        self.assertEqual([command for command, _, _ in mirror.requests], ["GET"])

    def test_who_waits_for_the_answer_to_a_cancelled_request(self):
        mirror = self.mirror()
        answered = threading.Event()
        first = Request("HEAD", mirror.url + "/5", {}, done=lambda *args: None)
        first.cancelled = True
        second = Request("HEAD", mirror.url + "/5", {}, done=lambda *args: answered.set())
        with unittest.mock.patch.object(self.pool._pool, "submit") as submit:
            self.pool.submit(first)
            self.pool.submit(second)
            submit.assert_called_once()
        self.pool._pool.submit(first)
        self.assertTrue(answered.wait(30))
        self.assertEqual(len(mirror.requests), 1)

    # The same request again and again, which is what is not done here
    test_who_refuses_for_ever_is_an_error = None


class ServerTest(ConnectionsTest):
    def setUp(self):
        super().setUp()
        self.cooker = types.SimpleNamespace(extraconfigdata={})
        self.connections = server.Connections(self.cooker, self.d)
        self.connections.start()
        self.addCleanup(self.connections.stop)

    def connect(self):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.addCleanup(sock.close)
        sock.settimeout(30)
        sock.connect("\0" + self.cooker.extraconfigdata[bb.connections.ADDRESS].partition(":")[2])
        self.assertEqual(protocol.receive(sock)[0]["hello"], protocol.VERSION)
        return sock

    def ask(self, sock, message, fd=None):
        protocol.send(sock, protocol.encode(message), fd)
        return protocol.receive(sock)[0]

    def test_head_and_get(self):
        mirror = self.mirror()
        sock = self.connect()
        self.assertEqual(self.ask(sock, {"id": 1, "method": "HEAD", "url": mirror.url + "/6", "news": 1}),
                         {"id": 1, "status": 200, "size": 6, "modified": 1420070400})
        fd = self.open()
        self.assertEqual(self.ask(sock, {"id": 2, "method": "GET", "url": mirror.url + "/700000"}, fd)["size"], 700000)
        self.assertEqual(self.read(fd), content(700000))
        self.assertEqual(self.ask(sock, {"id": 3, "method": "GET", "url": mirror.url + "/status/404"}, fd),
                         {"id": 3, "status": 404})

    def test_what_is_not_protocol_ends_the_connection(self):
        message = {"id": 1, "method": "HEAD", "url": "http://127.0.0.1:1/"}
        read, write = os.pipe()
        self.addCleanup(os.close, read)
        self.addCleanup(os.close, write)
        for data, fd in ((b"hello", None), (b"[]", None), (b"x" * (protocol.MAX_MESSAGE + 1), None),
                         (protocol.encode(dict(message, id="x")), None),
                         (protocol.encode(dict(message, method="PUT")), None),
                         (protocol.encode(dict(message, environment=[])), None),
                         (protocol.encode(dict(message, authorization="a\r\nb")), None),
                         (protocol.encode(dict(message, method="GET")), None),
                         (protocol.encode(dict(message, method="GET")), write)):
            with self.subTest(data=data[:80]):
                sock = self.connect()
                protocol.send(sock, data, fd)
                self.assertEqual(protocol.receive(sock)[0]["error"], "protocol")
                self.assertIsNone(protocol.receive(sock)[0])

    def test_a_url_that_is_none_of_ours(self):
        sock = self.connect()
        for url in ("file:///etc/passwd", "http://", "http://host/a b", "http://host:port/"):
            with self.subTest(url=url):
                self.assertEqual(self.ask(sock, {"id": 1, "method": "HEAD", "url": url})["error"], "url")

    def test_stop_closes_everything(self):
        sock = self.connect()
        self.assertEqual(own_threads(), ["connection server"])
        self.connections.stop()
        self.assertIsNone(protocol.receive(sock)[0])
        self.assertEqual(own_threads(), [])
        self.assertIsNone(bb.connections.current())
        self.assertEqual(self.cooker.extraconfigdata, {})

    def test_a_forked_child_has_none_of_it(self):
        sockets = {os.readlink("/proc/self/fd/%s" % fd) for fd in
                   (self.connections._listener.fileno(), self.connections._wakeup.fileno())}
        pid = os.fork()
        if pid == 0:
            left = set()
            for fd in os.listdir("/proc/self/fd"):
                with contextlib.suppress(OSError):
                    left.add(os.readlink("/proc/self/fd/" + fd))
            os._exit(1 if left & sockets or bb.connections.current() else 0)
        self.assertEqual(os.waitpid(pid, 0)[1], 0)
        self.assertIsNotNone(bb.connections.current())

    def test_off(self):
        self.connections.stop()
        self.d.setVar("BB_CONNECTION_CACHE", "0")
        connections = server.Connections(self.cooker, self.d)
        connections.start()
        self.assertIsNone(bb.connections.current())
        self.assertEqual(self.cooker.extraconfigdata, {})


class TaskTest(ConnectionsTest):
    """A server, and what makes a datastore look like a setscene task's"""

    def setUp(self):
        super().setUp()
        self.cooker = types.SimpleNamespace(extraconfigdata={})
        self.connections = server.Connections(self.cooker, self.d)
        self.connections.start()
        self.addCleanup(self.connections.stop)
        self.addCleanup(setattr, client, "_client", None)
        self.d.setVar("DL_DIR", self.tempdir)
        self.d.setVar("BB_WORKERCONTEXT", "1")
        self.d.setVar("BB_CURRENTTASK", "populate_sysroot_setscene")
        self.d.setVar(bb.connections.ADDRESS, self.cooker.extraconfigdata[server.ADDRESS])
        # As in a task: no pool in this process
        patch = unittest.mock.patch.object(bb.connections, "current", return_value=None)
        patch.start()
        self.addCleanup(patch.stop)


class ClientTest(TaskTest):
    def urldata(self, url):
        return bb.fetch2.Fetch([url], self.d, cache=False).ud[url]

    def test_checkstatus(self):
        mirror = self.mirror()
        self.assertIs(client.checkstatus(self.urldata(mirror.url + "/5"), self.d), True)
        self.assertIs(client.checkstatus(self.urldata(mirror.url + "/status/404"), self.d), False)
        self.assertFalse(client.checkstatus(self.urldata(mirror.url + "/status/403"), self.d))
        self.assertEqual(mirror.connections, 1)

    def test_download(self):
        mirror = self.mirror()
        target = os.path.join(self.tempdir, "object")
        path = client.download(self.urldata(mirror.url + "/300000"), self.d, target)
        with open(path, "rb") as f:
            self.assertEqual(f.read(), content(300000))
        self.assertEqual(os.stat(path).st_mtime, 1420070400)
        self.assertFalse(os.path.exists(target))

    def test_download_of_nothing(self):
        mirror = self.mirror()
        with self.assertRaises(bb.fetch2.FetchError):
            client.download(self.urldata(mirror.url + "/status/404"), self.d, os.path.join(self.tempdir, "object"))
        self.assertEqual(os.listdir(self.tempdir), [])

    def test_not_for_this(self):
        mirror = self.mirror()
        for name, value in (("BB_CURRENTTASK", "fetch"), ("BB_CONNECTION_CACHE", "0"), (bb.connections.ADDRESS, None),
                            ("FETCHCMD_wget", "wget --tries=5")):
            with self.subTest(name=name):
                d = self.d.createCopy()
                d.setVar(name, value)
                self.assertIsNone(client.checkstatus(self.urldata(mirror.url + "/5"), d))
        self.assertEqual(mirror.requests, [])

    def test_without_the_server_once_is_enough(self):
        mirror = self.mirror()
        self.connections.stop()
        with unittest.mock.patch.object(bb, "warnonce") as warn:
            for _ in range(2):
                self.assertIsNone(client.checkstatus(self.urldata(mirror.url + "/5"), self.d))
                self.assertIsNone(client.download(self.urldata(mirror.url + "/5"), self.d, os.path.join(self.tempdir, "object")))
        warn.assert_called_once()
        self.assertEqual(os.listdir(self.tempdir), [])

    def test_a_silent_server_is_gone(self):
        mirror = self.mirror()
        with unittest.mock.patch.object(protocol, "SILENCE_SECONDS", 0.2), \
             unittest.mock.patch.object(self.connections, "_submit"), unittest.mock.patch.object(bb, "warnonce") as warn:
            self.assertIsNone(client.checkstatus(self.urldata(mirror.url + "/5"), self.d))
        warn.assert_called_once()


class WgetTest(TaskTest):
    def setUp(self):
        super().setUp()
        patch = unittest.mock.patch("bb.fetch2.wget.runfetchcmd", side_effect=self.runfetchcmd)
        self.wget = patch.start()
        self.addCleanup(patch.stop)

    def runfetchcmd(self, command, d, quiet, **kwargs):
        """In place of wget: what --output-document has when it starts decides what it continues"""
        path, = [arg.partition("=")[2] for arg in command if arg.startswith("--output-document=")]
        self.assertEqual(os.listdir(self.tempdir), ["5.lock"])
        with open(path, "wb") as f:
            f.write(content(5))

    def fetch(self, url):
        fetcher = bb.fetch2.Fetch([url], self.d, cache=False)
        fetcher.download()
        with open(fetcher.localpath(url), "rb") as f:
            return f.read()

    def test_download_over_shared_connections(self):
        mirror = self.mirror()
        with open(os.path.join(self.tempdir, "70000.tmp"), "wb") as f:
            f.write(b"\0" * 70000)
        self.assertEqual(self.fetch(mirror.url + "/70000"), content(70000))
        self.wget.assert_not_called()
        self.assertEqual(sorted(os.listdir(self.tempdir)), ["70000", "70000.done"])

    def test_half_a_file_is_not_continued(self):
        peer = self.peer(*[b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n" + b"x" * 50] * host.ATTEMPTS)
        self.assertEqual(self.fetch(peer.url + "/5"), content(5))
        self.wget.assert_called_once()
        self.assertEqual(sorted(os.listdir(self.tempdir)), ["5", "5.done"])

    def test_no_network(self):
        mirror = self.mirror()
        self.d.setVar("BB_NO_NETWORK", "1")
        with self.assertRaises(bb.fetch2.NetworkAccess):
            self.fetch(mirror.url + "/5")
        self.assertEqual(mirror.requests, [])

    def test_the_query_in_the_server(self):
        mirror = self.mirror()
        self.d.delVar("BB_WORKERCONTEXT")
        with unittest.mock.patch.object(bb.connections, "current", return_value=self.connections.pool):
            for n in range(50):
                fetcher = bb.fetch2.Fetch([mirror.url + "/%s" % n], self.d, cache=False)
                fetcher.checkstatus()
            with self.assertRaises(bb.fetch2.FetchError):
                bb.fetch2.Fetch([mirror.url + "/status/404"], self.d, cache=False).checkstatus()
        self.assertEqual((mirror.connections, len(mirror.requests)), (1, 51))
