#
# BitBake tests for functions that the fetcher calls for each URL
#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

import http.server
import os
import ssl
import threading
import unittest
import unittest.mock
import urllib.parse

import bb
import bb.fetch2
from bb.tests.fetch import FetcherTest
from bb.utils import tls_context


class CheckstatusTest(FetcherTest):
    def setUp(self):
        super().setUp()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self):
                self.server.paths.append(self.path)
                self.send_response(int(self.path[1:]))
                self.end_headers()

            def log_message(self, *args):
                pass

        self.server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
        self.server.paths = []
        thread = threading.Thread(target=self.server.serve_forever)
        thread.start()
        self.addCleanup(self.server.server_close)
        self.addCleanup(thread.join)
        self.addCleanup(self.server.shutdown)

    def checkstatus(self, status):
        fetcher = bb.fetch2.Fetch(["http://127.0.0.1:%s/%s" % (self.server.server_port, status)], self.d)
        ud = next(iter(fetcher.ud.values()))
        return ud.method.checkstatus(fetcher, ud, self.d)

    def test_no_tls_context_for_http(self):
        with unittest.mock.patch.object(ssl, "create_default_context") as create:
            self.assertTrue(self.checkstatus(200))
        create.assert_not_called()

    def test_tls_context_is_shared(self):
        self.assertIs(tls_context(False), tls_context(False))
        self.assertIs(tls_context(True, None, self.tempdir), tls_context(True, None, self.tempdir))
        self.assertIsNot(tls_context(True, None, self.tempdir), tls_context(False, None, self.tempdir))
        self.assertIsNot(tls_context(True, None, self.tempdir), tls_context(True, None, self.dldir))
        before = tls_context(True, None, self.tempdir)
        os.utime(self.tempdir, ns=(1, 1))
        self.assertIsNot(tls_context(True, None, self.tempdir), before)
        with self.assertRaises(OSError):
            tls_context(True, "/nonexistent", "/nonexistent")

    def test_one_request_for_absent_files(self):
        for status, requests in ((404, 1), (410, 1), (500, 2)):
            with self.subTest(status=status):
                self.server.paths.clear()
                self.assertFalse(self.checkstatus(status))
                self.assertEqual(len(self.server.paths), requests)


class WgetCommandTest(FetcherTest):
    def test_basecmd(self):
        for fetchcmd, expected in ((None, ["wget", "--tries=2", "--timeout=100"]),
                                   ("", ["wget", "--tries=2", "--timeout=100"]),
                                   ("  ", ["wget", "--tries=2", "--timeout=100"]),
                                   ("my 'wget -x' --y", ["my", "wget -x", "--y"])):
            self.d.setVar("FETCHCMD_wget", fetchcmd)
            ud = bb.fetch2.FetchData("http://host/x", self.d)
            if isinstance(ud.method.basecmd, str):
                self.skipTest("this wget fetcher's commands are strings")
            self.assertEqual(ud.method.basecmd, expected)
        self.d.setVar("BB_CHECK_SSL_CERTS", "0")
        ud = bb.fetch2.FetchData("ftp://host/x", self.d)
        self.assertEqual(ud.method.basecmd, expected + ["--passive-ftp", "--no-check-certificate"])


class FetcherEnvironmentTest(FetcherTest):
    def test_origenv_fallback(self):
        origenv = bb.data.init()
        origenv.setVar("HOME", "/orig/home")
        origenv.setVar("SSL_CERT_FILE", "/orig/ca.crt")
        self.d.setVar("BB_ORIGENV", origenv)
        self.d.setVar("HOME", "/home")
        env = bb.fetch2.get_fetcher_environment(self.d)
        self.assertEqual(env["HOME"], "/home")
        self.assertEqual(env["SSL_CERT_FILE"], "/orig/ca.crt")

    def test_origenv_keys_are_not_counted(self):
        counts = []

        class Environment(bb.data_smart.DataSmart):
            def __len__(self):
                counts.append(self)
                return super().__len__()

        origenv = Environment()
        origenv.setVar("HOME", "/orig/home")
        self.d.setVar("BB_ORIGENV", origenv)
        self.d.delVar("HOME")
        self.assertEqual(bb.fetch2.get_fetcher_environment(self.d)["HOME"], "/orig/home")
        self.assertLess(len(counts), 8)


# As long as decodeurl() does not use the class URI, it is for mirrors as well
decodemirrorurl = getattr(bb.fetch2, "decodemirrorurl", bb.fetch2.decodeurl)


class DecodeMirrorURLTest(unittest.TestCase):
    def test_decodemirrorurl(self):
        url = "http://user:pw@host:80/a%20b/PATH;p=1;q=2"
        for i in range(2):
            decoded = decodemirrorurl(url)
            self.assertEqual(decoded, ('http', 'host:80', '/a b/PATH', 'user', 'pw', {'p': '1', 'q': '2'}))
            # uri_replace() changes the result
            decoded[5]['p'] = decoded[5]['r'] = 'x'
        for i in range(2):
            with self.assertRaises(bb.fetch2.MalformedUrl):
                decodemirrorurl("http://host/;p")


@unittest.skipIf(decodemirrorurl is bb.fetch2.decodeurl, "decodeurl() does not use the class URI")
class URLTest(unittest.TestCase):
    # {unusual URL: result of decodeurl()}
    odddata = {
       "HTTP://Host.Example:80/Path?q=1&r;p=a=b;;q": ('http', 'host.example:80', '/Path', '', '', {'p': 'a=b', 'q': None}),
       "http://user:pa:ss@host:8080/a%20b//c": ('http', 'host:8080', '/a b//c', 'user', 'pa:ss', {}),
       "http://user:@host/p": ('http', 'host', '/p', 'user', '', {}),
       "http://:pass@host/p": ('http', 'host', '/p', '', 'pass', {}),
       "http://us%40er:p%2Fw@[::1]:8080/x#y": ('http', '::1:8080', '/x', 'us%40er', 'p%2Fw', {}),
       "http:///path": ('http', '', '/path', '', '', {}),
       "http:path": ('http', '', 'path', '', '', {}),
       "http://host/a:b%3Ac%E2%82%AC": ('http', 'host', '/a:b:c\u20ac', '', '', {}),
       "https://host:/x": ('https', 'host', '/x', '', '', {}),
       "sftp://user@host/~/file": ('sftp', 'host', '/~/file', 'user', '', {}),
       "s3://bucket/key%20one;x=1": ('s3', 'bucket', '/key one', '', '', {'x': '1'}),
       "gitsm://user@host:22/x": ('gitsm', 'host:22', '/x', 'user', '', {}),
       "git:relative.git": ('git', '', 'relative.git', '', '', {}),
       "git:/abs.git": ('git', '', '/abs.git', '', '', {}),
       "unknown:path": ('unknown', '', 'path', '', '', {}),
       "file:a": ('file', '', 'a', '', '', {}),
       "file:/a": ('file', '', '/a', '', '', {}),
       "file:////a//b": ('file', '', '//a//b', '', '', {}),
       "FILE://A/b": ('file', '', 'A/b', '', '', {}),
       "file://user:pw@host:80/a?b=c#d": ('file', '', 'user:pw@host:80/a', '', '', {}),
       "file://a%2Fb/http://c": ('file', '', 'a/b/http://c', '', '', {}),
       "file:///a/http://b": ('file', '', '/a/http:b', '', '', {}),
       "file://": ('file', '', '/', '', '', {}),
       "path/only": ('', '', 'path/only', '', '', {}),
       "": ('', '', '/', '', '', {}),
    }

    def test_decodeurl_odd(self):
        uses_params = list(urllib.parse.uses_params)
        for k, v in self.odddata.items():
            with self.subTest(url=k):
                self.assertEqual(bb.fetch2.decodeurl(k), v)
        self.assertEqual(urllib.parse.uses_params, uses_params)


@unittest.skipUnless(hasattr(bb.fetch2, "CHECKSUM_NAMES"), "checksums are configured one by one")
class ChecksumNamesTest(FetcherTest):
    def checksums(self, url):
        ud = bb.fetch2.FetchData(url, self.d)
        self.assertEqual([name for name in sorted(vars(ud)) if name.endswith("_expected")],
                         ["goh1_expected", "md5_expected", "sha1_expected", "sha256_expected", "sha384_expected",
                          "sha512_expected"])
        return ud.md5_name, ud.md5_expected, ud.sha256_name, ud.sha256_expected, ud.goh1_name, ud.goh1_expected

    def test_names(self):
        self.d.setVar("VALUE", "flag")
        self.d.setVarFlag("SRC_URI", "md5sum", "md5 ${VALUE}")
        self.d.setVarFlag("SRC_URI", "sha256sum", "sha256 flag")
        self.d.setVarFlag("SRC_URI", "foo.sha256sum", "foo sha256 flag")
        for url, expected in (
                ("http://host/x",
                 ("md5sum", "md5 flag", "sha256sum", "sha256 flag", "goh1sum", None)),
                ("http://host/x;name=foo",
                 ("foo.md5sum", None, "foo.sha256sum", "foo sha256 flag", "foo.goh1sum", None)),
                ("http://host/x;name=foo;md5sum=a;sha256sum=b;foo.sha256sum=c",
                 ("md5sum", "a", "foo.sha256sum", "c", "foo.goh1sum", None)),
                ("https://host/x;md5sum=;foo.sha256sum=c",
                 ("md5sum", "", "sha256sum", "sha256 flag", "goh1sum", None)),
                ("file://x;name=foo;sha256sum=b",
                 ("foo.md5sum", None, "sha256sum", "b", "foo.goh1sum", None)),
                ("file://x",
                 ("md5sum", None, "sha256sum", None, "goh1sum", None)),
                ("sftp://host/x;name=",
                 (".md5sum", None, ".sha256sum", None, ".goh1sum", None))):
            with self.subTest(url=url):
                self.assertEqual(self.checksums(url), expected)


class LocalTest(FetcherTest):
    def test_local_searchpaths(self):
        directories = [os.path.join(self.tempdir, name) for name in ("first", "second", "third")]
        for directory in directories:
            os.mkdir(directory)
        self.d.setVar("FILESPATH", ":".join(directories))
        ud = bb.fetch2.FetchData("file://dir/x", self.d)
        paths = [os.path.join(directory, "dir/x") for directory in directories]
        for existing, expected in (((), 3), ((2,), 3), ((1, 2), 2), ((0,), 1)):
            for i in existing:
                bb.utils.mkdirhier(os.path.dirname(paths[i]))
                open(paths[i], "w").close()
            self.assertEqual(ud.method.localfile_searchpaths(ud, self.d), paths[:expected])
            self.assertEqual(ud.method.localpath(ud, self.d), paths[expected - 1])
        for filespath, expected in (("relative", ["relative/dir/x"]), (":a", ["dir/x", "a/dir/x"]), ("", []), (None, [])):
            self.d.setVar("FILESPATH", filespath)
            self.assertEqual(ud.method.localfile_searchpaths(ud, self.d), expected)
        ud = bb.fetch2.FetchData("file:///abs/x", self.d)
        self.assertEqual(ud.method.localfile_searchpaths(ud, self.d), ["/abs/x"])
