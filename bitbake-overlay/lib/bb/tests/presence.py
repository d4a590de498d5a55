#
# BitBake tests for the query for sstate objects
#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

import os
import types
import unittest.mock

import bb
import bb.event
import bb.fetch2
import bb.parse
from bb.connections.server import ConnectionServer
from bb.networksettings import settings
from bb.presence import ObjectFiles, Presence
from bb.presencequery import Locations
from bb.tests.connections import ConnectionsTest, answer


class PresenceTest(ConnectionsTest):
    def setUp(self):
        super().setUp()
        self.server = self.serve()
        self.sstatedir = os.path.join(self.tempdir, "sstate")
        for name in ("DL_DIR", "FILESPATH"):
            self.d.setVar(name, self.sstatedir)
        self.d.setVar("TOPDIR", self.tempdir)
        self.d.setVar("FILE", "x.bb")
        self.d.setVar("BB_NUMBER_THREADS", "4")
        self.hashes = {}
        self.presence = self.make()

    def serve(self, **kwargs):
        server = ConnectionServer(2, timeout=10, **kwargs)
        server.start()
        self.addCleanup(server.stop)
        return server

    def make(self):
        self.mcdata = {"": self.d}
        rqdata = types.SimpleNamespace(runtaskentries=self.hashes)
        rqdata.cooker = types.SimpleNamespace(databuilder=types.SimpleNamespace(mcdata=self.mcdata))
        self.connections = types.SimpleNamespace(server=self.server, reported=set(), settings=settings(self.d),
                                                 report_hosts=lambda: None)
        return Presence(rqdata, self.connections)

    def mirrors(self, *lines):
        self.d.setVar("PREMIRRORS", " ".join(lines))

    def query(self, names, **kwargs):
        """Return {name: size} of the objects that exist"""
        for name in names:
            self.hashes[name] = types.SimpleNamespace(unihash="hash of " + name)
        return self.presence.query([(name, "file://" + name) for name in names], self.d, **kwargs)

    def paths(self, mirror):
        return sorted(path for _, path, _ in mirror.requests)


class MirrorRulesTest(PresenceTest):
    """The URLs that fetch2 derives from SSTATE_MIRRORS, which the metadata puts into PREMIRRORS"""

    def test_path(self):
        mirror = self.mirror()
        self.mirrors("file://.* %s/PATH;downloadfilename=PATH" % mirror.url)
        self.assertEqual(self.query(["ab/5", "cd/70000"]), {"ab/5": 5, "cd/70000": 70000})
        self.assertEqual(self.paths(mirror), ["/ab/5", "/cd/70000"])
        self.assertEqual({command for command, _, _ in mirror.requests}, {"HEAD"})

    def test_second_mirror_is_queried_for_missing_objects(self):
        first, second = self.mirror(), self.mirror()
        self.mirrors("file://.* %s/PATH" % first.url, "file://.* %s/PATH" % second.url)
        found = self.query(["ab/%s" % n for n in range(20)] + ["status/404"])
        self.assertEqual(found, {"ab/%s" % n: n for n in range(20)})
        self.assertEqual(set(self.paths(first)), {"/ab/%s" % n for n in range(20)} | {"/status/404"})
        self.assertEqual(self.paths(second), ["/status/404"])

    def test_regular_expression_and_replacements(self):
        mirror = self.mirror()
        self.mirrors("file://(.*)/(.*) %s/x/\\2" % mirror.url)
        self.assertEqual(self.query(["ab/7"]), {"ab/7": 7})
        self.mirrors("file://none/.* %s/none/PATH" % mirror.url, "file://ab/.* %s/BASENAME" % mirror.url)
        self.assertEqual(self.query(["ab/8"]), {"ab/8": 8})
        self.mirrors("file://.* %s/MIRRORNAME/9" % mirror.url)
        self.assertEqual(self.query(["ab/9"]), {"ab/9": 9})
        self.assertEqual(self.paths(mirror), ["/8", "/ab.9/9", "/x/7"])

    def test_host_of_a_mirror_of_a_mirror(self):
        mirror = self.mirror()
        self.mirrors("file://.* http://other.example/PATH", "http://.*/.* %s/HOST/5" % mirror.url)
        with unittest.mock.patch("socket.getaddrinfo", wraps=self.only_localhost):
            self.query(["ab/5"])
        self.assertEqual(len(mirror.requests), 1)

    def only_localhost(self, name, *args, **kwargs):
        if name != "127.0.0.1":
            raise OSError("no such host")
        return [(2, 1, 6, "", (name, args[0]))]

    def test_user_and_password(self):
        mirror = self.mirror()
        self.mirrors("file://.* %s/PATH" % mirror.url.replace("//", "//user:word@"))
        self.assertEqual(self.query(["ab/5"]), {"ab/5": 5})
        self.assertEqual(mirror.requests[0][2]["Authorization"], "Basic dXNlcjp3b3Jk")

    def test_allowed_networks(self):
        mirror = self.mirror()
        self.mirrors("file://.* %s/PATH" % mirror.url)
        self.d.setVar("BB_ALLOWED_NETWORKS", "*.example")
        self.assertEqual(self.query(["ab/5"]), {})
        self.d.setVar("BB_ALLOWED_NETWORKS", "*.example 127.0.0.1")
        self.assertEqual(self.query(["ab/5"]), {"ab/5": 5})
        self.assertEqual(len(mirror.requests), 1)

    def test_no_network(self):
        mirror = self.mirror()
        os.makedirs(self.tempdir + "/local/ab")
        with open(self.tempdir + "/local/ab/5", "w"):
            pass
        self.mirrors("file://.* %s/PATH" % mirror.url, "file://.* file://%s/local/PATH" % self.tempdir)
        self.d.setVar("BB_NO_NETWORK", "1")
        self.assertEqual(self.query(["ab/5", "ab/6"]), {"ab/5": None})
        self.assertEqual(mirror.requests, [])

    def test_file_mirror_before_another(self):
        mirror = self.mirror()
        os.makedirs(self.tempdir + "/local/ab")
        with open(self.tempdir + "/local/ab/5", "w"):
            pass
        self.mirrors("file://.* file://%s/local/PATH" % self.tempdir, "file://.* %s/PATH" % mirror.url)
        self.assertEqual(self.query(["ab/5", "ab/6", "status/404"]), {"ab/5": None, "ab/6": 6})
        self.assertEqual(self.paths(mirror), ["/ab/6", "/status/404"])

    def test_fetchcmd(self):
        """The fetcher's own checkstatus() is used then"""
        mirror = self.mirror()
        self.mirrors("file://.* %s/PATH" % mirror.url)
        self.d.setVar("FETCHCMD_wget", "mywget")
        with unittest.mock.patch("bb.fetch2.wget.Wget.checkstatus", side_effect=lambda fetch, ud, d: ud.path == "/ab/5"):
            self.assertEqual(self.query(["ab/5", "ab/6"]), {"ab/5": None})
        self.assertEqual(mirror.requests, [])


class MulticonfigTest(PresenceTest):
    def test_settings_that_differ(self):
        """Objects of multiconfigs with other settings are not fetched ahead"""
        self.mirrors("file://.* %s/PATH;downloadfilename=PATH" % self.mirror().url)
        tids = ["ab.bb:do_x"]
        for name, value in (("STORE", "/other"), ("https_proxy", "http://proxy.invalid"), ("PATH", "/bin")):
            self.mcdata[name] = self.d.createCopy()
            self.mcdata[name].setVar(name, value)
            tids.append("mc:%s:ab.bb:do_x" % name)
        self.hashes.update((tid, types.SimpleNamespace(unihash="hash")) for tid in tids)
        self.assertEqual(set(self.presence.query([(tid, "file://ab/5") for tid in tids], self.d)), set(tids))
        self.presence.fetchable({tid: ["ab/5"] for tid in tids}, 0o022, settings=["STORE"])
        self.assertEqual(set(self.presence.files), {tids[0], tids[-1]})


class ObjectFilesTest(PresenceTest):
    """Files that are fetched ahead"""

    def files(self, mirror_index):
        return ObjectFiles(["a.tar.zst", "a.tar.zst.siginfo"], 1, 1, "hash", 0o022, Locations(self.d), mirror_index, None)

    def test_mirror_with_the_object_only(self):
        self.mirrors(r"file://.*\.tar\.zst$ http://one.invalid/PATH;downloadfilename=PATH")
        files = self.files(0)
        self.assertEqual(files.describe("a.tar.zst")["url"], "http://one.invalid/a.tar.zst")
        with self.assertRaises(ValueError):
            files.describe("a.tar.zst.siginfo")

    def test_second_mirror_with_the_object_only(self):
        self.mirrors("file://.* http://one.invalid/PATH;downloadfilename=PATH",
                     "file://.*zst$ http://two.invalid/PATH;downloadfilename=PATH")
        files = self.files(1)
        self.assertEqual(files.describe("a.tar.zst")["url"], "http://two.invalid/a.tar.zst")
        with self.assertRaises(ValueError):
            files.describe("a.tar.zst.siginfo")

    def test_file_with_another_path(self):
        self.mirrors("file://.* http://one.invalid/PATH;downloadfilename=other")
        with self.assertRaises(ValueError):
            self.files(0).describe("a.tar.zst")


class OneMirrorTest(PresenceTest):
    def setUp(self):
        super().setUp()
        self.requested = self.mirror()
        self.mirrors("file://.* %s/PATH" % self.requested.url)
        patch = unittest.mock.patch("bb.presence.logger.warning")
        self.warning = patch.start()
        self.addCleanup(patch.stop)


class QueryTest(OneMirrorTest):
    def test_many_over_few_connections(self):
        names = ["ab/%s" % n for n in range(2500)] + ["status/404"]
        self.assertEqual(self.query(names), {name: n for n, name in enumerate(names[:-1])})
        self.assertLessEqual(self.requested.connections, 2)
        # Some requests are repeated to determine whether the server supports pipelining
        self.assertLess(len(self.requested.requests), 2520)
        self.warning.assert_not_called()

    def test_no_second_request_for_an_object(self):
        names = ["ab/%s" % n for n in range(10)] + ["status/404"]
        found = self.query(names)
        count = len(self.requested.requests)
        self.assertEqual(self.query(names), found)
        # The missing object may have reached the mirror since
        self.assertEqual([path for _, path, _ in self.requested.requests[count:]], ["/status/404"])

    def test_without_connections(self):
        self.connections.server = None
        self.assertIsNone(self.query(["ab/5"]))

    def test_mirror_that_refuses(self):
        """The next one is queried"""
        mirror = self.mirror(*[answer("503 Busy; Retry-After: 3600; Content-Length: 0")] * 50)
        self.mirrors("file://.* %s/PATH" % mirror.url, "file://.* %s/PATH" % self.requested.url)
        self.assertEqual(self.query(["ab/%s" % n for n in range(20)] + ["status/404"]), {"ab/%s" % n: n for n in range(20)})
        self.warning.assert_called_once()
        self.assertRegex(self.warning.call_args[0][0], "^Sstate mirror http://127.0.0.1 did not answer for 21 of 21 objects, "
                                                       "treating them as missing there: .*status 503")
        self.assertLess(len(mirror.requests), 10)

    def test_redirect_to_another_host(self):
        other = self.mirror()
        url = other.url.replace("127.0.0.1", "localhost")
        mirror = self.mirror(answer("302 Found; Location: %s/cd/5; Content-Length: 0" % url))
        self.mirrors("file://.* %s/PATH" % mirror.url)
        self.assertEqual(self.query(["ab/5"]), {"ab/5": 5})
        self.assertEqual((self.paths(mirror), self.paths(other)), (["/ab/5"], ["/cd/5"]))

    def test_connections_that_have_ended(self):
        """The result is no information about the mirror"""
        self.server.stop()
        self.assertIsNone(self.query(["ab/5"]))

    def test_status_without_an_answer(self):
        self.assertEqual(self.query(["ab/5", "status/500", "status/403", "status/400"]), {"ab/5": 5})
        self.assertRegex(self.warning.call_args[0][0], "did not answer for 1 of 4 objects, treating them as missing there: status 500$")

    def test_malformed_url(self):
        self.assertEqual(self.query(["ab/5", ";nonsense"]), {"ab/5": 5})

    def test_interrupt(self):
        bb.event._should_exit.set()
        self.addCleanup(bb.event._should_exit.clear)
        with self.assertRaises(bb.BBHandledException):
            self.query(["ab/%s" % n for n in range(1000)])

    def test_internal_error(self):
        """The metadata queries by other means then, and there is one warning"""
        for _ in range(2):
            with unittest.mock.patch("bb.presencequery.Query._begin", side_effect=ZeroDivisionError):
                self.assertIsNone(self.query(["ab/5"]))
        self.warning.assert_called_once()

    def test_progress(self):
        with unittest.mock.patch("bb.event.fire") as fire:
            self.query(["ab/%s" % n for n in range(99)], title="Checking")
            fire.assert_not_called()
            self.query(["cd/%s" % n for n in range(100)], title="Checking")
        events = [call[0][0] for call in fire.call_args_list]
        self.assertIsInstance(events[0], bb.event.ProcessStarted)
        self.assertEqual((events[0].processname, events[0].total), ("Checking", 100))
        self.assertIsInstance(events[-1], bb.event.ProcessFinished)

    def test_invalid_sources(self):
        for value in ("hashserv", "mirror hashserv", "mirrors"):
            self.d.setVar("BB_SETSCENE_PRESENCE", value)
            with self.assertRaisesRegex(ValueError, '^Invalid value "%s" for BB_SETSCENE_PRESENCE, must be' % value):
                settings(self.d)


class HashservTest(OneMirrorTest):
    def setUp(self):
        super().setUp()
        self.d.setVar("BB_SETSCENE_PRESENCE", "hashserv  mirror")
        self.presence = self.make()
        self.siggen = types.SimpleNamespace(unihashes_exist=lambda query: dict.fromkeys(query, True))
        patch = unittest.mock.patch.object(bb.parse, "siggen", self.siggen, create=True)
        patch.start()
        self.addCleanup(patch.stop)

    def test_mirror_is_queried_for_known_objects(self):
        queries = []

        def exist(query):
            queries.append(query)
            return {tid: tid != "ab/6" for tid in query}
        self.siggen.unihashes_exist = exist
        self.assertEqual(self.query(["ab/5", "ab/6", "ab/7"]), {"ab/5": 5, "ab/7": 7})
        self.assertEqual(queries, [{name: "hash of " + name for name in ("ab/5", "ab/6", "ab/7")}])
        self.assertEqual(self.paths(self.requested), ["/ab/5", "/ab/7"])

    def test_server_that_knows_too_few(self):
        names = ["ab/%d" % i for i in range(5, 65)]
        self.siggen.unihashes_exist = lambda query: {tid: tid in names[:5] for tid in query}
        self.assertEqual(set(self.query(names)), set(names))
        self.warning.assert_called_once()
        self.assertIn("knows 5 of 60 sstate objects", self.warning.call_args[0][0])

        # A tenth is enough
        self.siggen.unihashes_exist = lambda query: {tid: tid in names[:6] for tid in query}
        self.presence = self.make()
        self.assertEqual(set(self.query(names)), set(names[:6]))
        self.warning.assert_called_once()

    def test_not_for_signatures(self):
        self.siggen.unihashes_exist = None
        self.assertEqual(self.query(["ab/5"], siginfo=True), {"ab/5": 5})
        self.warning.assert_not_called()

    def test_server_that_fails(self):
        self.siggen.unihashes_exist = unittest.mock.Mock(side_effect=ConnectionError("gone"))
        self.assertEqual(self.query(["ab/5"]), {"ab/5": 5})
        self.assertEqual(self.query(["ab/6"]), {"ab/6": 6})
        self.warning.assert_called_once()
        self.siggen.unihashes_exist.assert_called_once()

    def test_no_server(self):
        del self.siggen.unihashes_exist
        self.assertEqual(self.query(["ab/5"]), {"ab/5": 5})
        self.warning.assert_called_once()
