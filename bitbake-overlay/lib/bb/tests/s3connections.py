#
# BitBake tests for the shared connections: S3 and Azure
#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

import calendar
import email.utils
import http.server
import json
import os
import threading
import time
import unittest
import unittest.mock

import bb.data
import bb.fetch2
from bb.connections import ConnectError, Unusable, awsconfig, sigv4
from bb.connections.pool import PROTOCOLS
from bb.connections.request import Request, quote_key
from bb.connections.s3 import S3
from bb.connections.sigv4 import Keys, Signer
from bb.fetch2 import shared
from bb.tests.connections import SECONDS, ConnectionsTest, content

KEYS = Keys("AKIA1", "secret1", "", None)
ERROR = "<?xml version='1.0'?><Error><Code>%s</Code><Message>no</Message><Region>%s</Region></Error>"


class Handler(http.server.BaseHTTPRequestHandler):
    """The object /bucket/<n> has n bytes. Errors to HEAD have no body, as those of S3."""
    protocol_version = "HTTP/1.1"
    timeout = SECONDS

    def do_HEAD(self):
        bucket = self.server
        headers = {name.lower(): value for name, value in self.headers.items()}
        bucket.requests.append((self.command, self.path, headers))
        status, code, headers = bucket.check(self)
        body = content(int(self.path.rpartition("/")[2])) if code is None else (ERROR % (code, bucket.region)).encode()
        if status == 200 and self.headers["Range"] == "bytes=0-0":
            status, headers = 206, {**headers, "Content-Range": "bytes 0-0/%s" % len(body)}
            body = body[:1]
        self.send_response_only(status)
        for name, value in {"Date": email.utils.formatdate(bucket.now(), usegmt=True), "x-amz-request-id": "1",
                            "Content-Length": len(body), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_OPTIONS = do_HEAD

    def log_message(self, *args):
        pass


class Bucket(http.server.ThreadingHTTPServer):
    """
    A server that checks signatures.

    keys        {access key: Keys} that are valid, or None if requests may be unsigned
    expired     access keys that were valid
    absent      names of objects for which AccessDenied is the answer
    missing     names of objects that may be known not to exist
    slow        number of requests that are answered with SlowDown
    redirect    {path: Location}
    """
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, region="us-east-1"):
        super().__init__(("127.0.0.1", 0), Handler)
        self.region = region
        self.keys = {KEYS.access: KEYS}
        self.expired, self.absent, self.missing = set(), set(), set()
        self.slow = self.ahead = 0
        self.redirect = {}
        self.requests = []
        self.url = "http://127.0.0.1:%s" % self.server_port
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05})
        self.thread.start()

    def stop(self):
        self.shutdown()
        self.thread.join()
        self.server_close()

    def now(self):
        return time.time() + self.ahead

    def check(self, handler):
        """Returns status, the code of an error or None, and headers"""
        if self.slow:
            self.slow -= 1
            return 503, "SlowDown", {}
        if handler.path in self.redirect:
            return 302, "Found", {"Location": self.redirect[handler.path]}
        if self.keys is not None:
            error = self.check_signature(handler)
            if error:
                return (*error, {"x-amz-bucket-region": self.region} if error[1] == "AuthorizationHeaderMalformed" else {})
        if handler.command == "OPTIONS":
            return 403, "AccessForbidden", {}
        if handler.path.rpartition("/")[2] in self.absent:
            return 403, "AccessDenied", {}
        if handler.path.rpartition("/")[2] in self.missing:
            return 404, "NoSuchKey", {}
        return 200, None, {}

    def check_signature(self, handler):
        value = handler.headers.get("Authorization")
        if not value:
            return 403, "AccessDenied"
        access, day, region = value.partition("Credential=")[2].split("/")[:3]
        if access in self.expired:
            return 400, "ExpiredToken"
        if access not in self.keys:
            return 403, "InvalidAccessKeyId"
        seconds = calendar.timegm(time.strptime(handler.headers["x-amz-date"], "%Y%m%dT%H%M%SZ"))
        if abs(seconds - self.now()) > 900:
            return 403, "RequestTimeTooSkewed"
        if region != self.region:
            return 400, "AuthorizationHeaderMalformed"
        signed = Signer(region, "s3").sign(self.keys[access], handler.command, handler.path, {"host": handler.headers["Host"]},
                                           seconds)
        return None if signed["authorization"] == value else (403, "SignatureDoesNotMatch")


class SignatureTest(unittest.TestCase):
    def sign(self, secret, stamp, service, path, headers, body=sigv4.NO_BODY):
        keys = Keys("AKIDEXAMPLE" if service != "s3" else "AKIAIOSFODNN7EXAMPLE", secret, "", None)
        seconds = calendar.timegm(time.strptime(stamp, "%Y%m%dT%H%M%SZ"))
        return Signer("us-east-1", service).sign(keys, "GET", path, headers, seconds, body)["authorization"]

    def test_example_of_s3(self):
        """GET Object in "Authenticating Requests: Using the Authorization Header" """
        self.assertEqual(
            self.sign("wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", "20130524T000000Z", "s3", "/test.txt",
                      {"host": "examplebucket.s3.amazonaws.com", "range": "bytes=0-9"}),
            "AWS4-HMAC-SHA256 Credential=AKIAIOSFODNN7EXAMPLE/20130524/us-east-1/s3/aws4_request, "
            "SignedHeaders=host;range;x-amz-content-sha256;x-amz-date, "
            "Signature=f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41")

    def test_vectors(self):
        """get-vanilla and get-header-value-trim of the test suite"""
        for headers, names, signature in (
                ({}, "host;x-amz-date", "5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31"),
                ({"my-header1": " value1", "my-header2": ' "a   b   c"'}, "host;my-header1;my-header2;x-amz-date",
                 "acc3ed3afb60bb290fc8d2dd0098b9911fcaa05412b367055dee359757a9c736")):
            with self.subTest(names=names):
                self.assertEqual(
                    self.sign("wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY", "20150830T123600Z", "service", "/",
                              {"host": "example.amazonaws.com", **headers}, None),
                    "AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20150830/us-east-1/service/aws4_request, "
                    "SignedHeaders=%s, Signature=%s" % (names, signature))

    def test_keys_are_not_printed(self):
        self.assertNotIn("secret", "%r %s" % (KEYS, KEYS))


class ConfigurationTest(ConnectionsTest):
    def setUp(self):
        super().setUp()
        self.environment = {"HOME": self.tempdir, "PATH": self.tempdir}
        os.mkdir(os.path.join(self.tempdir, ".aws"))

    def write(self, name, text):
        with open(os.path.join(self.tempdir, ".aws", name), "w") as f:
            f.write(text)

    def configuration(self, **variables):
        return awsconfig.Configuration({**self.environment, **variables})

    def test_keys(self):
        self.assertIsNone(self.configuration().keys())
        self.write("credentials", "[default]\naws_access_key_id = A\naws_secret_access_key = B%x\n"
                                  "[p]\naws_access_key_id=C\naws_secret_access_key=D\naws_session_token=E=\n")
        self.write("config", "[profile q]\naws_access_key_id = F\naws_secret_access_key = G\n"
                             "[profile r]\nrole_arn = arn\nsource_profile = default\naws_access_key_id = F\n"
                             "[profile s]\ncredential_process = tool 'a b'\naws_access_key_id = F\n")
        self.assertEqual(tuple(self.configuration().keys()), ("A", "B%x", "", None))
        self.assertEqual(tuple(self.configuration(AWS_PROFILE="p").keys()), ("C", "D", "E=", None))
        self.assertEqual(tuple(self.configuration(AWS_PROFILE="q").keys()), ("F", "G", "", None))
        self.assertIsNone(self.configuration(AWS_PROFILE="r").keys())
        self.assertEqual(self.configuration(AWS_PROFILE="r").command, awsconfig.EXPORT)
        self.assertIsNone(self.configuration(AWS_PROFILE="s").keys())
        self.assertEqual(self.configuration(AWS_PROFILE="s").command, ["tool", "a b"])
        self.assertIsNone(self.configuration(AWS_ROLE_ARN="arn", AWS_WEB_IDENTITY_TOKEN_FILE="/f").keys())
        variables = dict(zip(awsconfig.SECRETS, "HIJ"))
        self.assertEqual(tuple(self.configuration(AWS_PROFILE="r", **variables).keys()), ("H", "I", "J", None))

    def test_other_files(self):
        path = os.path.join(self.tempdir, "other")
        with open(path, "w") as f:
            f.write("[default]\nregion = eu-west-1\naws_access_key_id = A\naws_secret_access_key = B\n")
        self.assertEqual(self.configuration(AWS_CONFIG_FILE=path).region, "eu-west-1")
        self.assertEqual(self.configuration(AWS_SHARED_CREDENTIALS_FILE="~/other").keys().access, "A")

    def test_unusable(self):
        self.write("config", "[default]\ns3 =\n    use_accelerate_endpoint = true\n[profile q]\naws_access_key_id = A\n"
                             "[profile s]\nendpoint_url = ftp://x\n"
                             "[profile r]\nregion = us-iso-east-1\naws_access_key_id = A\naws_secret_access_key = B\n")
        for variables in ({}, {"AWS_PROFILE": "no"}, {"AWS_PROFILE": "q"}, {"AWS_PROFILE": "s"},
                          {"AWS_ACCESS_KEY_ID": "A", "AWS_PROFILE": "q"},
                          {"AWS_PROFILE": "r"}, {"AWS_PROFILE": "r", "AWS_REGION": "x\n"}):
            with self.subTest(variables=variables), self.assertRaises(Unusable):
                configuration = self.configuration(**variables)
                configuration.locate("bucket", configuration.region)
                configuration.keys()
        self.write("config", "[default\naws_secret_access_key = hidden\n")
        with self.assertRaises(Unusable) as caught:
            self.configuration()
        self.assertNotIn("hidden", str(caught.exception))

    def test_location(self):
        self.write("config", "[default]\nregion = eu-west-1\n"
                             "[profile dual]\nuse_dualstack_endpoint = true\nregion = us-west-2\n"
                             "[profile path]\ns3 =\n  addressing_style = path\n"
                             "[profile own]\nendpoint_url = https://own.example:9000/s3/\n"
                             "[profile virtual]\nendpoint_url = http://own.example\ns3 =\n  addressing_style = virtual\n"
                             "[profile service]\nservices = one\nendpoint_url = http://wrong.example\n"
                             "[services one]\ns3 =\n  endpoint_url = http://right.example\n")
        for bucket, variables, location in (
                ("b-1", {}, ("https", "b-1.s3.eu-west-1.amazonaws.com", "")),
                ("b.1", {}, ("https", "s3.eu-west-1.amazonaws.com", "/b.1")),
                ("b-1", {"AWS_DEFAULT_REGION": "cn-north-1"}, ("https", "b-1.s3.cn-north-1.amazonaws.com.cn", "")),
                ("b-1", {"AWS_PROFILE": "dual"}, ("https", "b-1.s3.dualstack.us-west-2.amazonaws.com", "")),
                ("b-1", {"AWS_USE_FIPS_ENDPOINT": "true"}, ("https", "b-1.s3-fips.eu-west-1.amazonaws.com", "")),
                ("b-1", {"AWS_PROFILE": "path"}, ("https", "s3.us-east-1.amazonaws.com", "/b-1")),
                ("b-1", {"AWS_PROFILE": "own"}, ("https", "own.example:9000", "/s3/b-1")),
                ("b-1", {"AWS_PROFILE": "virtual"}, ("http", "b-1.own.example", "")),
                ("b-1", {"AWS_PROFILE": "service"}, ("http", "right.example", "/b-1")),
                ("b-1", {"AWS_PROFILE": "own", "AWS_ENDPOINT_URL": "http://x", "AWS_ENDPOINT_URL_S3": "http://y"},
                 ("http", "y", "/b-1")),
                ("b-1", {"AWS_PROFILE": "own", "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "true"},
                 ("https", "b-1.s3.us-east-1.amazonaws.com", ""))):
            with self.subTest(bucket=bucket, variables=variables):
                configuration = self.configuration(**variables)
                self.assertEqual(configuration.locate(bucket, configuration.region), location)

    def export(self, script, name="aws"):
        path = os.path.join(self.tempdir, name)
        with open(path, "w") as f:
            f.write("#!/bin/sh\n" + script)
        os.chmod(path, 0o755)
        return awsconfig.Export(self.environment, [name]).run()

    def test_export(self):
        values = {"Version": 1, "AccessKeyId": "A", "SecretAccessKey": "B", "SessionToken": "C",
                  "Expiration": "2026-01-02T03:04:05Z"}
        self.assertEqual(tuple(self.export("echo '%s'" % json.dumps(values))), ("A", "B", "C", 1767323045))
        for script in ("echo hidden", "echo hidden; exit 2", """echo '{"AccessKeyId": "hidden"}'""", "echo '[]'"):
            with self.subTest(script=script), self.assertRaises(Unusable) as caught:
                self.export(script)
            self.assertNotIn("hidden", str(caught.exception))
        with self.assertRaises(Unusable):
            awsconfig.Export({"PATH": "/nowhere"}, awsconfig.EXPORT).run()
        with unittest.mock.patch("bb.connections.awsconfig.EXPORT_TIMEOUT", 0.1), self.assertRaises(Unusable):
            self.export("sleep %s\n:" % SECONDS)

    def test_default_command(self):
        for command, is_default in (("", True), (None, True), ("aws s3", True), ("aws s3 --no-sign-request", True),
                                    ("aws --no-sign-request s3", True), ("/usr/bin/env aws s3", True),
                                    ("/usr/bin/aws s3", False), ("aws s3 --debug", False), ("s3cmd", False), ("'", False)):
            self.assertIs(awsconfig.is_default(command), is_default, command)


class S3Test(ConnectionsTest):
    """Requests to buckets that check signatures. The environment is that of a user with ~/.aws."""

    def setUp(self):
        super().setUp()
        self.environment = {"HOME": self.tempdir, "PATH": "%s:%s" % (self.tempdir, os.environ["PATH"])}
        os.mkdir(os.path.join(self.tempdir, ".aws"))
        self.credentials("aws_access_key_id = %s\naws_secret_access_key = %s" % KEYS[:2])

    def credentials(self, text):
        with open(os.path.join(self.tempdir, ".aws", "credentials"), "w") as f:
            f.write("[default]\n%s\n" % text)

    def set_keys(self, keys, expiration=None):
        """Let a credential_process print keys"""
        self.credentials("credential_process = keys")
        output = os.path.join(self.tempdir, "output")
        with open(output, "w") as f:
            json.dump({"AccessKeyId": keys.access, "SecretAccessKey": keys.secret, "SessionToken": keys.token,
                       "Expiration": expiration}, f)
        path = os.path.join(self.tempdir, "keys")
        with open(path, "w") as f:
            f.write("#!/bin/sh\necho >> %s/calls\ncat %s\n" % (self.tempdir, output))
        os.chmod(path, 0o755)

    def calls(self):
        """Returns how often that was called"""
        with open(os.path.join(self.tempdir, "calls")) as f:
            return len(f.readlines())

    def bucket(self, **options):
        bucket = Bucket(**options)
        self.addCleanup(bucket.stop)
        self.environment["AWS_ENDPOINT_URL"] = bucket.url
        return bucket

    def start(self, **variables):
        self.environment.update(variables)
        self.s3 = S3(self.environment)
        self.start_server(protocols={**PROTOCOLS, "s3": self.s3.protocol})
        self.addCleanup(self.s3.close)

    def request(self, method, name, **members):
        environment = {name: value for name, value in self.environment.items() if name not in awsconfig.SECRETS}
        environment[awsconfig.KEYS_HASH] = awsconfig.keys_hash(self.environment)
        return super().request(method, "s3://bucket/" + quote_key(str(name)), environment, **members)

    def objects(self, numbers, method="HEAD"):
        return self.ask(*[self.request(method, number) for number in numbers])

    def test_signed_requests(self):
        bucket = self.bucket()
        self.start()
        numbers = list(range(100, 140))
        self.assertEqual(self.objects(numbers), [(200, n) for n in numbers])
        request = self.request("GET", "a:b+c~d e/77")
        self.assertEqual(self.ask(request), [(200, 77)])
        self.assertEqual(self.read(request.fd), content(77))
        self.assertEqual(bucket.requests[-1][1], "/bucket/a%3Ab%2Bc~d%20e/77")
        self.assertLessEqual(self.count("connections"), 4)
        self.assertEqual(self.count("refusals"), 0)

    def test_pipelining(self):
        """It is tried out, also if no object exists"""
        for missing in ((), map(str, range(2000))):
            with self.subTest(missing=missing):
                bucket = self.bucket()
                bucket.missing.update(missing)
                self.start()
                self.objects(range(1000, 1200))
                self.assertTrue(self.server.pool.has_pipelined(self.request("HEAD", 1).origin))

    def test_date_of_each_attempt(self):
        """SlowDown is retried later, with another date"""
        bucket = self.bucket()
        bucket.slow = 1
        self.start()
        with unittest.mock.patch("bb.connections.s3.time") as fake:
            fake.time.side_effect = lambda: time.time() + 10 * len(bucket.requests)
            self.assertEqual(self.objects([5]), [(200, 5)])
        dates = [headers["x-amz-date"] for _, _, headers in bucket.requests]
        self.assertEqual(len(set(dates)), 2)
        self.assertEqual(self.count("refusals"), 1)

    def test_absent_without_permission_to_list(self):
        """Status 403 means absent, and that is found out without asking twice for each object"""
        bucket = self.bucket()
        self.start()
        numbers = list(range(1000, 1300))
        bucket.absent.update(map(str, numbers[::2]))
        outcomes = self.objects(numbers)
        self.assertEqual([status for status, _ in outcomes], [404, 200] * 150)
        self.assertLess(len(bucket.requests), 1.5 * len(numbers))
        self.assertEqual(self.count("refusals"), 0)

    def test_expired_keys(self):
        """They are renewed by the command that has printed them, called once"""
        bucket = self.bucket()
        second = Keys("AKIA2", "secret2", "token2", None)
        bucket.keys["AKIA2"] = second
        self.set_keys(KEYS)
        self.start()
        self.assertEqual(self.objects(range(100, 164)), [(200, n) for n in range(100, 164)])
        bucket.expired.add("AKIA1")
        self.set_keys(second)
        self.assertEqual(self.objects(range(200, 264)), [(200, n) for n in range(200, 264)])
        self.assertEqual(self.objects([99], "GET"), [(200, 99)])
        self.assertEqual(self.calls(), 2)
        # The command has no others
        bucket.expired.add("AKIA2")
        outcome, = self.objects([98])
        self.assertIsInstance(outcome, Unusable)

    def test_keys_that_expire_soon(self):
        """They are renewed before that"""
        bucket = self.bucket()
        with unittest.mock.patch("bb.connections.s3.time") as fake:
            now = time.time()
            fake.time.side_effect = lambda: now
            # The connection on which that is noticed is closed, and the keys are renewed for the next one
            for seconds, calls in ((0, 1), (3200, 1), (150, 1), (1, 2), (1, 2)):
                now += seconds
                self.set_keys(KEYS, time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now + 3600)))
                bucket.ahead = now - time.time()
                if not seconds:
                    self.start()
                self.assertEqual(self.objects([int(now) % 1000]), [(200, int(now) % 1000)])
                self.assertEqual(self.calls(), calls)
        self.assertEqual(self.count("refusals"), 0)

    def test_refused_keys(self):
        """The host is given up; no request is sent after that"""
        bucket = self.bucket()
        self.set_keys(KEYS._replace(secret="wrong"))
        self.start()
        outcome, = self.objects([1])
        self.assertIsInstance(outcome, Unusable)
        self.assertIn("SignatureDoesNotMatch", str(outcome))
        requests = len(bucket.requests)
        outcome, = self.objects([2])
        self.assertIsInstance(outcome, Unusable)
        self.assertEqual(len(bucket.requests), requests)
        self.assertEqual(self.calls(), 1)

    def test_command_that_hangs(self):
        """It is ended with the build"""
        self.bucket()
        self.set_keys(KEYS)
        with open(os.path.join(self.tempdir, "keys"), "a") as f:
            f.write("sleep %s\n:\n" % SECONDS)
        self.start()
        request = self.request("HEAD", 1)
        self.server.submit([request], self.answered)
        self.until(lambda: os.path.exists(os.path.join(self.tempdir, "calls")))
        self.s3.close()
        outcome, = self.wait([request])
        self.assertIsInstance(outcome, Unusable)

    def test_no_keys(self):
        bucket = self.bucket()
        self.credentials("")
        self.start(PATH="/nowhere")
        outcome, = self.objects([1])
        self.assertIsInstance(outcome, Unusable)
        self.assertIn("aws", str(outcome))
        self.assertEqual(bucket.requests, [])

    def test_untrusted_certificate(self):
        """aws may trust others"""
        self.bucket()
        self.set_keys(KEYS)
        self.start()
        error = ConnectError("certificate verify failed", retryable=False)
        with unittest.mock.patch("bb.connections.http.connect", side_effect=error):
            outcome, = self.objects([1])
        self.assertIsInstance(outcome, Unusable)

    def test_variable_that_a_request_lacks(self):
        """It does not come from the configuration"""
        connections = S3({"AWS_ENDPOINT_URL": "http://x", "FETCHCMD_s3": "aws s3 --no-sign-request", "AWS_ACCESS_KEY_ID": "A"})
        self.assertEqual(connections._environment, {"AWS_ACCESS_KEY_ID": "A"})

    def test_invalid_endpoint(self):
        """Nothing of the signed request is in the message"""
        self.bucket()
        self.environment["AWS_ENDPOINT_URL"] += "/\xfc x"
        self.start()
        outcome, = self.objects([1])
        self.assertIsInstance(outcome, Unusable)

    def test_other_keys_than_the_server(self):
        bucket = self.bucket()
        self.start()
        self.environment["AWS_ACCESS_KEY_ID"] = "AKIA2"
        outcome, = self.objects([1])
        self.assertIsInstance(outcome, Unusable)
        self.assertEqual(bucket.requests, [])

    def test_unsigned(self):
        bucket = self.bucket()
        bucket.keys = None
        self.credentials("")
        self.start(PATH="/nowhere", FETCHCMD_s3="aws s3 --no-sign-request")
        self.assertEqual(self.objects([1]), [(200, 1)])
        self.assertNotIn("authorization", bucket.requests[0][2])

    def test_other_region(self):
        bucket = self.bucket(region="eu-west-1")
        self.start()
        self.assertEqual(self.objects(range(100, 120)), [(200, n) for n in range(100, 120)])
        self.assertIn("/eu-west-1/", bucket.requests[-1][2]["authorization"])

    def test_clock(self):
        bucket = self.bucket()
        self.start()
        for first, bucket.ahead in ((100, 3600), (200, -3600)):
            self.assertEqual(self.objects(range(first, first + 20)), [(200, n) for n in range(first, first + 20)])
        # Not again and again
        bucket.ahead = 9000
        outcome, = self.objects([5])
        self.assertIsInstance(outcome, Unusable)

    def test_redirect(self):
        """Nothing is signed for another host"""
        other = self.mirror()
        bucket = self.bucket()
        bucket.redirect["/bucket/5"] = other.url + "/5"
        self.start()
        self.assertEqual(self.objects([5], "GET"), [(200, 5)])
        headers = {name.lower() for name in other.requests[0][2]}
        self.assertFalse(headers & {"authorization", "x-amz-date", "x-amz-security-token"})


class FetcherTest(ConnectionsTest):
    """What the fetchers send to the server"""

    def describe(self, url, **variables):
        d = self.d.createCopy()
        for name, value in variables.items():
            d.setVar(name, value)
            d.setVarFlag(name, "export", "1")
        ud = bb.fetch2.FetchData(url, d)
        return dict(shared.describe_mirror(ud, d), url=shared.request_url(ud, d)) if shared.supports(ud, d) else None

    def setUp(self):
        super().setUp()
        self.d.setVar("DL_DIR", self.tempdir)
        self.d.setVar("HOME", self.tempdir)

    def test_no_secrets(self):
        keys = {"AWS_ACCESS_KEY_ID": "AKIA1", "AWS_SECRET_ACCESS_KEY": "secret1", "AWS_SESSION_TOKEN": "token1"}
        described = self.describe("s3://bucket/a/b%3Ac+d", AWS_PROFILE="p", AWS_ENDPOINT_URL="http://x", **keys)
        self.assertEqual(described["url"], "s3://bucket/a/b%3Ac%2Bd")
        environment = described["environment"]
        self.assertEqual((environment["AWS_PROFILE"], environment["AWS_ENDPOINT_URL"]), ("p", "http://x"))
        for value in keys.values():
            self.assertNotIn(value, str(described))
        # aws would not see a variable that is not exported
        self.d.setVar("AWS_ENDPOINT_URL", "http://x")
        self.assertNotIn("AWS_ENDPOINT_URL", self.describe("s3://bucket/a", **keys)["environment"])
        other = self.describe("s3://bucket/a", **dict(keys, AWS_SESSION_TOKEN="token2"))["environment"]
        self.assertNotEqual(environment[awsconfig.KEYS_HASH], other[awsconfig.KEYS_HASH])

    def test_own_command(self):
        self.assertIsNotNone(self.describe("s3://bucket/a", FETCHCMD_s3="aws s3 --no-sign-request"))
        self.assertIsNone(self.describe("s3://bucket/a", FETCHCMD_s3="s5cmd"))
        self.assertIsNone(self.describe("gs://bucket/a"))

    def test_invalid_bucket(self):
        with self.assertRaises(ValueError):
            Request("HEAD", "s3://arn:aws:s3/x", {})

    def test_azure(self):
        sas = "?sv=2018&sig=a%2Bb"
        described = self.describe("az://account.blob.example/c/x;downloadfilename=x", AZ_SAS=sas)
        self.assertEqual(described["url"], "https://account.blob.example/c/x" + sas)
        request = Request("HEAD", **described)
        self.assertEqual((request.origin.scheme, request.target), ("https", "/c/x" + sas))
        self.assertEqual(self.describe("az://account.blob.example/c/x")["url"], "https://account.blob.example/c/x")
        self.assertIsNone(self.describe("az://account.blob.example/c/x", AZ_SAS="sig=1"))
        self.assertIsNone(self.describe("az://account.blob.example/c/x", FETCHCMD_wget="curl"))
        # The fetcher changes the URL
        self.d.setVar("AZ_SAS", sas)
        ud = bb.fetch2.FetchData("az://account.blob.example/c/x", self.d)
        ud.url = "https://account.blob.example/c/x" + sas
        self.assertEqual(shared.request_url(ud, self.d), ud.url)
