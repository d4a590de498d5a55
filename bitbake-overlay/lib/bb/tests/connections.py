#
# BitBake tests for the shared connections
#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

import errno
import http.server
import os
import shlex
import shutil
import socket
import tempfile
import threading
import time
import types
import unittest
import unittest.mock

import bb
import bb.data
import bb.fetch2
from bb.connections import Cancelled, ConnectionCacheError, ProtocolError
from bb.connections.request import Request
from bb.connections.server import ConnectionServer
from bb.connections import protocol
from bb.connections.client import Client, ServerError
from bb.networksettings import ADDRESS, settings
from bb.sharedconnections import SharedConnections
from bb.fetch2 import shared

# Seconds after which a test that waits fails
SECONDS = 30


class Handler(http.server.BaseHTTPRequestHandler):
    """
    /<n> is a file of n bytes, /status/<n> an answer with that status. As long as the server has answers (bytes), those
    are sent instead, and the connection is closed after each.
    """
    protocol_version = "HTTP/1.1"
    timeout = SECONDS

    def do_HEAD(self):
        self.server.requests.append((self.command, self.path, dict(self.headers)))
        self.server.gate.wait(SECONDS)
        if self.server.answers:
            self.wfile.write(self.server.answers.pop(0))
            self.close_connection = True
            return
        if self.path.startswith("/status/"):
            self.send_response(int(self.path[len("/status/"):]))
            body = b"no"
        else:
            self.send_response(200)
            self.send_header("Last-Modified", "Thu, 01 Jan 2015 00:00:00 GMT")
            body = content(int(self.path.rpartition("/")[2].partition(".")[0]))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_GET = do_HEAD

    def log_message(self, *args):
        pass

class Mirror(http.server.ThreadingHTTPServer):
    """An HTTP/1.1 server that counts connections and requests. It answers while gate is set."""
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, answers):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers = answers
        self.requests = []
        self.connections = 0
        self.gate = threading.Event()
        self.gate.set()
        self.url = "http://127.0.0.1:%s" % self.server_port
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05})
        self.thread.start()

    def process_request(self, request, address):
        self.connections += 1
        super().process_request(request, address)

    def stop(self):
        self.gate.set()
        self.shutdown()
        self.thread.join()
        self.server_close()

def answer(head, body=b""):
    return b"HTTP/1.1 %s\r\n\r\n%s" % (head.replace("; ", "\r\n").encode(), body)

def content(size):
    return (b"sstate object %d " % size * (size // 14 + 1))[:size]

def own_threads():
    """Returns the names of the connection server's threads"""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("connection ")]


class ConnectionsTest(unittest.TestCase):
    """Base class: submits requests to a ConnectionServer, and delivers the answers in the test's thread"""

    def setUp(self):
        self.d = bb.data.init()
        self.tempdir = tempfile.mkdtemp(prefix="bitbake-connections-")
        self.addCleanup(shutil.rmtree, self.tempdir)
        self.outcomes = {}

    def mirror(self, *answers):
        mirror = Mirror(list(answers))
        self.addCleanup(mirror.stop)
        return mirror

    def start_server(self, **options):
        self.messages = messages = []
        self.server = server = ConnectionServer(log=messages.append, **options)
        server.start()
        # A message is an exception, for example
        self.addCleanup(self.assertEqual, messages, [])
        self.addCleanup(lambda: self.assertTrue(server.stop()))

    def open(self, name="file"):
        fd = os.open(os.path.join(self.tempdir, name), os.O_RDWR | os.O_CREAT)
        self.addCleanup(os.close, fd)
        return fd

    def request(self, method, url, environment={}, **members):
        if method == "GET":
            members.setdefault("fd", self.open())
        return Request(method, url, environment, **members)

    def answered(self, request, response, error):
        self.assertNotIn(request, self.outcomes)
        self.outcomes[request] = error or (response.status, response.length)

    def until(self, condition):
        """Deliver answers until condition() is true"""
        deadline = time.monotonic() + SECONDS
        while not condition():
            self.assertLess(time.monotonic(), deadline)
            self.server.deliver(0.05)

    def wait(self, requests):
        """Returns (status, size), or an error, for each request"""
        self.until(lambda: self.outcomes.keys() >= set(requests))
        return [self.outcomes[request] for request in requests]

    def ask(self, *requests):
        self.server.submit(requests, self.answered)
        return self.wait(requests)

    def heads(self, url, numbers):
        return self.ask(*[self.request("HEAD", "%s/%s" % (url, n)) for n in numbers])

    def read(self, fd):
        return os.pread(fd, 1 << 26, 0)

    def count(self, name):
        return sum(getattr(host.statistics, name) for host in self.server.pool.hosts.values())


class HTTPTest(ConnectionsTest):
    def setUp(self):
        super().setUp()
        self.start_server()

    def test_requests_share_a_connection(self):
        mirror = self.mirror()
        fd = self.open()
        for size in (3000000, 0, 5000):
            for method in ("HEAD", "GET"):
                request = self.request(method, mirror.url + "/%s" % size, fd=fd if method == "GET" else None)
                self.assertEqual(self.ask(request), [(200, size)])
            self.assertEqual(self.read(fd), content(size))
        self.assertEqual(self.ask(self.request("GET", mirror.url + "/status/404"))[0][0], 404)
        self.assertEqual((mirror.connections, len(mirror.requests)), (1, 7))

    def test_faults(self):
        mirror = self.mirror()
        # Without a valid answer, a server that does not speak HTTP is abandoned sooner
        self.heads(mirror.url, [6])
        for fault in (answer("200 OK; Content-Length: 10", b"hello"), answer("200 OK; Content-Length: -5", b"hello"),
                      answer("200 OK; Content-Length: 5; Content-Length: 6", b"hello"),
                      answer("200 OK; Transfer-Encoding: chunked", b"5\r\nhello\r\n"),
                      answer("200 OK; Transfer-Encoding: chunked", b"-5\r\nhello\r\n"),
                      b"SSH-2.0-OpenSSH\r\n\r\n", answer("200 OK; X: " + "y" * 100000)):
            with self.subTest(fault=fault[:70]):
                request = self.request("GET", mirror.url + "/5")
                mirror.answers = [fault] * 3
                self.assertEqual(self.ask(request), [(200, 5)])
                self.assertEqual(self.read(request.fd), content(5))
                mirror.answers = [fault] * 4
                self.assertIs(type(self.ask(self.request("GET", mirror.url + "/5"))[0]), ProtocolError)
                self.assertEqual(mirror.answers, [])

    def test_refused_is_not_missing(self):
        mirror = self.mirror(answer("503 Busy; Content-Length: 0"))
        self.assertEqual(self.heads(mirror.url, [5]), [(200, 5)])
        self.assertEqual((self.count("refusals"), self.count("retries")), (1, 1))

    def redirect(self, method, *targets):
        mirror = self.mirror(*[answer("302 Found; Content-Length: 0; Location: " + target) for target in targets])
        return mirror, self.ask(self.request(method, mirror.url + "/5", authorization="Basic eA=="))[0]

    def test_redirects(self):
        other = self.mirror()
        mirror, outcome = self.redirect("GET", "/6", other.url.replace("//", "//user:word@") + "/7")
        self.assertEqual(outcome, (200, 7))
        self.assertEqual(["Authorization" in headers for _, _, headers in mirror.requests + other.requests], [True, True, False])
        for targets in (["/5"] * 11, ["file:///etc/passwd"]):
            _, error = self.redirect("HEAD", *targets)
            self.assertEqual(error.status, 302)
        # The fetcher sends the credentials to the other host, which may have the file
        for method in ("HEAD", "GET"):
            other.answers = [answer("401 Unauthorized; Content-Length: 0")]
            _, error = self.redirect(method, other.url + "/5")
            self.assertEqual(error.status, 401)
        self.assertEqual(self.redirect("HEAD", "/status/401")[1], (401, 2))


class PoolTest(ConnectionsTest):
    """Which requests are sent, in which order and over how many connections"""

    def test_connections_are_limited(self):
        self.start_server()
        mirror = self.mirror()
        self.assertEqual(self.heads(mirror.url, range(1000)), [(200, n) for n in range(1000)])
        self.assertLessEqual(mirror.connections, 4)
        # One is sent twice, as the probe of the trial of pipelining
        self.assertEqual(len(mirror.requests), 1001)
        self.assertEqual(self.count("connections"), mirror.connections)
        self.assertEqual(self.count("requests"), 1001)

    def test_server_that_closes_after_each_answer(self):
        self.start_server(connections=1)
        answers = [answer("200 OK; Connection: close; Content-Length: %s" % n) for n in range(20)]
        self.assertEqual(self.heads(self.mirror(*answers).url, range(20)), [(200, n) for n in range(20)])
        self.assertEqual(self.count("retries"), 0)

    def test_answers_are_cached(self):
        self.start_server()
        mirror = self.mirror()
        for _ in range(2):
            outcomes = self.heads(mirror.url, ("5", "6", "status/404"))
            self.assertEqual((outcomes[:2], outcomes[2][0]), ([(200, 5), (200, 6)], 404))
        self.ask(self.request("GET", mirror.url + "/7"))
        self.heads(mirror.url, [7])
        self.assertEqual(sorted((command, path) for command, path, _ in mirror.requests),
                         [("GET", "/7"), ("HEAD", "/5"), ("HEAD", "/6"), ("HEAD", "/status/404")])

    def test_order(self):
        self.start_server(connections=1)
        mirror = self.mirror()
        mirror.gate.clear()
        requests = [self.request("HEAD", mirror.url + "/%s" % n) for n in range(8)]
        self.server.submit(requests[:6], self.answered)
        self.server.submit(requests[6:], self.answered, first=True)
        self.until(lambda: mirror.requests)
        self.server.prioritise([requests[4], requests[2]])
        mirror.gate.set()
        self.wait(requests)
        # Ignore the probe of the trial of pipelining. The first request may have been sent before the others.
        order = list(dict.fromkeys(path for _, path, _ in mirror.requests))
        order.remove("/0")
        self.assertEqual(order, ["/6", "/7", "/4", "/2", "/1", "/3", "/5"])


class ServerTest(ConnectionsTest):
    """The socket"""

    def setUp(self):
        super().setUp()
        self.start_server()

    def connect(self):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.addCleanup(sock.close)
        sock.settimeout(SECONDS)
        sock.connect("\0" + self.server.address.partition(":")[2])
        self.assertEqual(protocol.receive(sock)[0]["hello"], protocol.VERSION)
        return sock

    def exchange(self, sock, message, fd=None):
        protocol.send(sock, protocol.encode(message), fd)
        return protocol.receive(sock)[0]

    def test_violations_of_the_protocol(self):
        message = {"id": 1, "method": "HEAD", "url": "http://127.0.0.1:1/"}
        pipe = os.pipe()
        for fd in pipe:
            self.addCleanup(os.close, fd)
        for data, fd in ((b"hello", None), (b"[]", None), (b"x" * (protocol.MAX_MESSAGE + 1), None),
                         (protocol.encode(dict(message, id="x")), None),
                         (protocol.encode(dict(message, method="PUT")), None),
                         (protocol.encode(dict(message, environment=[])), None),
                         (protocol.encode(dict(message, authorization="a\r\nb")), None),
                         (protocol.encode(dict(message, method="GET")), None),
                         (protocol.encode(dict(message, method="GET")), pipe[1])):
            with self.subTest(data=data[:80]):
                sock = self.connect()
                protocol.send(sock, data, fd)
                self.assertEqual(protocol.receive(sock)[0]["error"], "protocol")
                self.assertRaises(ConnectionResetError, protocol.receive, sock)
                self.assertIn("protocol error from a peer: ", self.messages.pop())

    def test_disk_that_is_full_on_close(self):
        """As reported by NFS. Only this file is affected."""
        mirror = self.mirror()
        full, good = self.open("full"), self.open("good")
        close = os.close

        def close_and_fail(fd):
            path = os.readlink("/proc/self/fd/%s" % fd)
            close(fd)
            if path.endswith("/full"):
                raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

        one, other = self.connect(), self.connect()
        with unittest.mock.patch("os.close", close_and_fail):
            answer = self.exchange(one, {"id": 1, "method": "GET", "url": mirror.url + "/5"}, full)
            self.assertEqual(answer, {"id": 1, "error": "destination",
                                      "message": "cannot write the file: " + os.strerror(errno.EDQUOT)})
            for sock in (one, other):
                self.assertEqual(self.exchange(sock, {"id": 2, "method": "GET", "url": mirror.url + "/6"}, good)["size"], 6)

    def test_stop(self):
        mirror = self.mirror()
        mirror.gate.clear()
        sock = self.connect()
        protocol.send(sock, protocol.encode({"id": 1, "method": "HEAD", "url": mirror.url + "/5"}))
        self.until(lambda: mirror.requests)
        requests = [self.request("HEAD", mirror.url + "/%s" % n) for n in range(10)]
        self.server.submit(requests, self.answered)
        self.assertEqual(own_threads(), ["connection server"])
        self.assertTrue(self.server.stop())
        self.assertEqual([type(outcome) for outcome in self.wait(requests)], [Cancelled] * 10)
        self.assertEqual(protocol.receive(sock)[0]["error"], "cancelled")
        self.assertRaises(ConnectionResetError, protocol.receive, sock)
        self.assertEqual((self.server.address, own_threads()), (None, []))
        self.assertIsInstance(self.heads(mirror.url, [11])[0], Cancelled)

    def test_forked_child(self):
        """It inherits no descriptors, and the server continues to work"""
        def descriptors():
            names = os.listdir("/proc/self/fd")
            return {os.readlink("/proc/self/fd/" + name) for name in names if os.path.lexists("/proc/self/fd/" + name)}

        self.assertTrue(self.server.stop())
        mirror = self.mirror()
        before = descriptors()
        self.start_server()
        sock = self.connect()
        self.exchange(sock, {"id": 1, "method": "HEAD", "url": mirror.url + "/5"})
        pid = os.fork()
        if pid == 0:
            # Besides the mirror's socket, that of the test and the directory that is listed
            left = descriptors() - before - {os.readlink("/proc/self/fd/%s" % sock.fileno())}
            os._exit(0 if len([link for link in left if not link.startswith("/")]) == 1 else 1)
        self.assertEqual(os.waitpid(pid, 0)[1], 0)
        self.assertEqual(self.exchange(sock, {"id": 2, "method": "HEAD", "url": mirror.url + "/6"})["size"], 6)
        self.assertEqual(mirror.connections, 1)


class ClientTest(ConnectionsTest):
    def setUp(self):
        super().setUp()
        self.start_server()
        self.client = Client(self.server.address)
        self.addCleanup(self.client.close)

    def test_answers(self):
        url = self.mirror().url
        self.assertEqual(self.client.ask({"method": "HEAD", "url": url + "/6"}), (200, 6, 1420070400))
        fd = self.open()
        self.assertEqual(self.client.ask({"method": "GET", "url": url + "/300000"}, fd), (200, 300000, 1420070400))
        self.assertEqual(self.read(fd), content(300000))
        self.assertEqual(self.client.ask({"method": "HEAD", "url": url + "/status/404"}), (404, None, None))

    def test_errors_of_one_request(self):
        mirror = self.mirror()
        for url in ("ftp://mirror/x", "http://", "http://mirror/a b", "http://mirror:port/x",
                    "http://mirror/" + "x" * protocol.MAX_MESSAGE):
            with self.subTest(url=url[:40]), self.assertRaises((ConnectionCacheError, ValueError)) as raised:
                self.client.ask({"method": "HEAD", "url": url})
            self.assertNotIsInstance(raised.exception, ServerError)
        self.assertEqual(self.client.ask({"method": "HEAD", "url": mirror.url + "/6"}).status, 200)

    def test_stopped_server(self):
        message = {"method": "HEAD", "url": self.mirror().url + "/6"}
        self.client.ask(message)
        self.server.stop()
        for client in (self.client, self.client, Client("%s:bitbake-none" % os.geteuid()), Client("nonsense")):
            with self.assertRaises(ServerError):
                client.ask(message)

    def test_server_of_another_user(self):
        client = Client("%s:%s" % (os.geteuid() + 1, self.server.address.partition(":")[2]))
        with self.assertRaises(ServerError):
            client.ask({"method": "HEAD", "url": self.mirror().url + "/6"})


class SettingsTest(ConnectionsTest):
    def test_valid(self):
        self.assertEqual(settings(self.d), (True, 4, 4, ["mirror"], 64))
        self.d.setVar("BB_NUMBER_THREADS", "12")
        self.assertEqual(settings(self.d), (True, 4, 12, ["mirror"], 64))
        for name, value in (("BB_CONNECTION_CACHE", "0"), ("BB_CONNECTION_CACHE_MAX", "8"),
                            ("BB_SETSCENE_PRESENCE", "hashserv  mirror"), ("BB_SETSCENE_PREFETCH", "0")):
            self.d.setVar(name, value)
        self.assertEqual(settings(self.d), (False, 8, 8, ["hashserv", "mirror"], 0))

    def test_invalid(self):
        for name, value in (("BB_CONNECTION_CACHE", "yes?"), ("BB_CONNECTION_CACHE_MAX", "0"),
                            ("BB_CONNECTION_CACHE_MAX", "-1"), ("BB_CONNECTION_CACHE_MAX", "65"),
                            ("BB_SETSCENE_PREFETCH", "four"), ("BB_SETSCENE_PRESENCE", "hashserv")):
            with self.subTest(name=name, value=value):
                d = self.d.createCopy()
                d.setVar(name, value)
                with self.assertRaises(ValueError) as raised:
                    settings(d)
                self.assertTrue(str(raised.exception).startswith('Invalid value "%s" for %s, must be ' % (value, name)))


class SharedConnectionsTest(ConnectionsTest):
    def setUp(self):
        super().setUp()
        self.cooker = types.SimpleNamespace(extraconfigdata={})
        self.connections = SharedConnections(self.cooker, self.d)
        self.addCleanup(self.connections.stop)

    def test_address(self):
        self.connections.start()
        self.assertEqual(self.cooker.extraconfigdata, {ADDRESS: self.connections.server.address})
        self.assertEqual(self.d.getVar(ADDRESS), self.connections.server.address)
        self.connections.stop()
        self.assertEqual((self.cooker.extraconfigdata, self.d.getVar(ADDRESS)), ({}, None))
        self.assertEqual(own_threads(), [])

    def test_off(self):
        self.d.setVar("BB_CONNECTION_CACHE", "0")
        self.connections.start()
        self.assertIsNone(self.connections.server)
        self.assertEqual((self.cooker.extraconfigdata, own_threads()), ({}, []))

    def test_invalid(self):
        self.d.setVar("BB_CONNECTION_CACHE_MAX", "many")
        with self.assertLogs("BitBake", "CRITICAL") as logs, self.assertRaises(bb.BBHandledException):
            self.connections.start()
        self.assertIn("BB_CONNECTION_CACHE_MAX", logs.output[0])

    def test_report(self):
        mirror = self.mirror()
        self.connections.start()
        client = Client(self.connections.server.address)
        client.ask({"method": "GET", "url": mirror.url + "/5"}, self.open())
        client.close()
        with unittest.mock.patch.object(bb, "note") as note:
            self.connections.stop()
        note.assert_called_once()
        self.assertRegex(note.call_args[0][0], r"^Sstate network: 1 object, 0\.0 MiB in [0-9.]+ s, 1 request over 1 connection "
                                               r"\(0 retries, 0 refusals\)$")


class FetchTest(ConnectionsTest):
    """The fetchers with the datastore of a setscene task, and with a function in place of wget"""

    def setUp(self):
        super().setUp()
        self.start_server()
        for name in ("DL_DIR", "FILESPATH"):
            self.d.setVar(name, os.path.join(self.tempdir, "downloads"))
        self.d.setVar("BB_WORKERCONTEXT", "1")
        self.d.setVar("BB_CURRENTTASK", "populate_sysroot_setscene")
        self.d.setVar(ADDRESS, self.server.address)
        patch = unittest.mock.patch("bb.fetch2.wget.runfetchcmd", side_effect=self.runfetchcmd)
        self.wget = patch.start()
        self.addCleanup(patch.stop)

    def runfetchcmd(self, command, d, quiet, **kwargs):
        """Replaces wget, which would resume a partial download"""
        words = shlex.split(command) if isinstance(command, str) else command
        path, = [word.partition("=")[2] or word for word in words if word.endswith("/5.tmp")]
        self.assertEqual(self.files(), ["5.lock"])
        with open(path, "wb") as f:
            f.write(content(5))

    def files(self):
        return sorted(os.listdir(self.d.getVar("DL_DIR")))

    def fetch(self, url):
        """Fetch a file of the same name from the mirror that url names"""
        self.d.setVar("PREMIRRORS", "file://.* " + url)
        name = url.rpartition("/")[2]
        local = "file://%s;downloadfilename=%s" % (name, name)
        fetcher = bb.fetch2.Fetch([local], self.d, cache=False)
        fetcher.download()
        with open(fetcher.localpath(local), "rb") as f:
            return f.read()

    def found(self, url, d=None):
        return shared.checkstatus(bb.fetch2.Fetch([url], self.d, cache=False).ud[url], d or self.d)

    def test_checkstatus(self):
        mirror = self.mirror()
        self.assertIs(self.found(mirror.url + "/5"), True)
        self.assertIs(self.found(mirror.url + "/status/404"), False)
        self.assertIs(self.found(mirror.url + "/status/400"), None)
        self.assertEqual(mirror.connections, 1)

    def test_not_used(self):
        mirror = self.mirror()
        for name, value in (("BB_CURRENTTASK", "fetch"), ("BB_CONNECTION_CACHE", "0"), (ADDRESS, None),
                            ("FETCHCMD_wget", "wget --tries=5")):
            with self.subTest(name=name):
                d = self.d.createCopy()
                d.setVar(name, value)
                self.assertIsNone(self.found(mirror.url + "/5", d))
        self.assertEqual(mirror.requests, [])

    def test_invalid_setting_of_a_recipe(self):
        self.d.setVar("BB_CONNECTION_CACHE", "perhaps")
        with self.assertRaises(bb.BBHandledException), self.assertLogs("BitBake", "CRITICAL") as logs:
            self.found("http://localhost/5")
        self.assertIn('Invalid value "perhaps" for BB_CONNECTION_CACHE', logs.output[0])

    def test_download(self):
        mirror = self.mirror()
        os.mkdir(self.d.getVar("DL_DIR"))
        with open(os.path.join(self.d.getVar("DL_DIR"), "70000.tmp"), "wb") as f:
            f.write(b"\0" * 70000)
        self.assertEqual(self.fetch(mirror.url + "/70000"), content(70000))
        self.wget.assert_not_called()
        self.assertEqual(self.files(), ["70000"])
        self.assertEqual(os.stat(os.path.join(self.d.getVar("DL_DIR"), "70000")).st_mtime, 1420070400)

    def test_download_of_an_absent_file(self):
        with self.assertRaises(bb.fetch2.FetchError):
            self.fetch(self.mirror().url + "/status/404")
        self.wget.assert_not_called()
        self.assertEqual(self.files(), [])

    def test_host_that_refuses(self):
        """The task does not open a connection of its own"""
        mirror = self.mirror(answer("503 Busy; Retry-After: 3600; Content-Length: 0"))
        with self.assertRaises(bb.fetch2.FetchError):
            self.fetch(mirror.url + "/5")
        self.assertIs(self.found(mirror.url + "/6"), False)
        self.wget.assert_not_called()
        self.assertEqual((mirror.connections, len(mirror.requests), self.files()), (1, 1, []))

    def test_page_in_place_of_an_object(self):
        mirror = self.mirror()
        with unittest.mock.patch.object(bb, "warnonce") as warn, self.assertRaises(bb.fetch2.FetchError):
            self.fetch(mirror.url + "/5.tar.zst")
        warn.assert_called_once()
        self.wget.assert_not_called()
        self.assertEqual(self.files(), [])
        mirror.answers = [answer("200 OK; Content-Length: 5", b"\x28\xb5\x2f\xfd.")]
        self.assertEqual(len(self.fetch(mirror.url + "/5.tar.zst")), 5)

    def test_partial_download_is_not_resumed(self):
        mirror = self.mirror(*[answer("200 OK; Content-Length: 100", b"x" * 50)] * 4)
        self.assertEqual(self.fetch(mirror.url + "/5"), content(5))
        self.wget.assert_called_once()
        self.assertEqual(self.files(), ["5"])

    def test_stopped_server(self):
        mirror = self.mirror()
        self.server.stop()
        with unittest.mock.patch.object(bb, "warnonce") as warn:
            self.assertEqual(self.fetch(mirror.url + "/5"), content(5))
        self.wget.assert_called_once()
        warn.assert_called_once_with("Cannot use the BitBake server's shared connections, fetching directly instead")

    def test_no_network(self):
        mirror = self.mirror()
        self.d.setVar("BB_NO_NETWORK", "1")
        with self.assertRaises(bb.fetch2.NetworkAccess):
            self.fetch(mirror.url + "/5")
        self.assertEqual(mirror.requests, [])
