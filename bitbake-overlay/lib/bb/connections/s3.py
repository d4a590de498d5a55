#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
S3: an HTTP connection to the endpoint of a bucket, on which each request is signed.

Used by connectionset.py in the event loop's thread, through S3.connect(). A bucket
is a host of its own, s3://bucket; which endpoint, region and credentials belong to
it is found out when a connection is opened, so requests contain no secrets, and a
redirect to another host is followed without a signature. Follows "Error responses"
in the S3 API Reference. What cannot be done here raises Unusable: the fetcher, which
is the program aws, has to do it.

    s3 = S3(environment)                        # with the secrets, for all requests
    connection = await s3.connect(loop, host, origin, route, timeout)
    connection.send(requests)
    s3.close()
"""

import asyncio
import email.utils
import os
import re
import shlex
import time

from bb.connections import ConnectError, IdleClosed, Resubmit, Unusable
from bb.connections import awsconfig, http, sigv4
from bb.connections.awsconfig import ANY_REGION, KEYS_HASH, UNSIGNED, keys_hash
from bb.connections.request import FORBIDDEN, Request, Response, S3Route

# Header of all answers of S3, which those of a proxy lack
REQUEST_ID = "x-amz-request-id"
# Variables that come with each request if they are set; all others are those of the configuration
OF_REQUESTS = awsconfig.EXPORTED + awsconfig.OTHERS + ("FETCHCMD_s3",)
# Statuses of errors that may end if a request is signed anew
CORRECTABLE = (301, 307, 400, FORBIDDEN)
# Codes of errors for an object that does not exist, if the user must not list the bucket, or that cannot be read
ABSENT_CODES = ("AccessDenied", "InvalidObjectState")
# Codes of errors that concern the keys
KEY_CODES = ("ExpiredToken", "InvalidToken", "TokenRefreshRequired", "InvalidAccessKeyId", "SignatureDoesNotMatch")
# Code of an error if the clocks differ too much
TIME_CODE = "RequestTimeTooSkewed"
CODE = re.compile(rb"<Code>\s*([A-Za-z0-9.]{1,64})\s*</Code>")
REGION = re.compile(rb"<Region>\s*([a-z0-9-]{1,40})\s*</Region>")
# The region in a Location
LOCATION = re.compile(r"https?://[^/]*\bs3(?:-fips)?[.-](?:dualstack\.)?([a-z]+-[a-z0-9-]+)\.amazonaws\.com(\.cn)?(:443)?/")
# Bytes of an error that are kept: its code is at the beginning
MAX_ERROR = 4096
# Times that a bucket may turn out to be in another region
MAX_MOVES = 2
# Seconds by which the clocks must differ for a correction: a third of what S3 tolerates
SKEW = 300
# Corrections in a build: the second is needed if the clock of this machine is set meanwhile
MAX_CORRECTIONS = 2
# Seconds for which status 403 to HEAD means that an object does not exist, once the code of such an answer has said so
DENIED_SECONDS = 10
# Seconds before they expire that keys are renewed, if they are valid for long enough
RENEW_BEFORE = 300


class S3:
    """
    The buckets of a build. environment has the fetcher's variables, including the secrets.

    protocol    for PROTOCOLS of pool.py
    """

    def __init__(self, environment):
        self.protocol = self.connect, S3Connection
        # What does not come with each request
        self._environment = {name: value for name, value in environment.items() if name not in OF_REQUESTS}
        self._hash = keys_hash(environment)
        self._closed = False
        # {route: Account}
        self._accounts = {}

    async def connect(self, loop, owner, origin, route, timeout):
        """Returns an open S3Connection. Raises ConnectError or Unusable."""
        if route not in self._accounts:
            variables = dict(route.variables)
            if variables.pop(KEYS_HASH, None) != self._hash:
                raise Unusable("a task uses other AWS keys than the configuration")
            self._accounts[route] = Account({**self._environment, **variables})
            if self._closed:
                self._accounts[route].end()
        account = self._accounts[route]
        await account.load(loop)
        bucket = account.bucket(origin.host)
        environment = dict(route.variables)
        if account.configuration.ca_bundle:
            environment["SSL_CERT_FILE"] = account.configuration.ca_bundle
        try:
            scheme, authority, path = account.configuration.locate(bucket.name, bucket.region)
            target = Request("HEAD", "%s://%s%s/" % (scheme, authority, path), environment)
        except ValueError as e:
            # For example a character that no header may have
            raise Unusable("the S3 endpoint or the proxy is invalid: %s" % e) from e
        connection = S3Connection(loop, owner, target.origin, target.route, timeout, bucket, path)
        try:
            await http.connect(loop, owner, target.origin, target.route, timeout, connection)
        except ConnectError as e:
            if e.retryable:
                raise
            # For example a certificate that only aws trusts, which has its own list
            raise Unusable(str(e)) from e
        # Those of the requests
        connection.origin, connection.route = origin, S3Route(route.variables)
        if scheme == "http":
            connection.route.proxy = target.route.proxy
        return connection

    def close(self):
        """End a program that is running. May be called from any thread."""
        self._closed = True
        for account in list(self._accounts.values()):
            account.end()


class Account:
    """
    The user of an environment, and what has been learned about the clock. Fields are set by load().

    keys        sigv4.Keys; None: load() has not been called, or the server has refused them
    proven      whether the server has accepted these keys
    changes     number of corrections that make earlier signatures outdated
    """

    def __init__(self, environment):
        self.configuration = self.keys = None
        self.is_unsigned = UNSIGNED in shlex.split(environment.get("FETCHCMD_s3", ""))
        self.changes = 0
        self.proven = False
        self._environment = environment
        # Seconds to add to the time of this machine
        self._skew = self._corrections = 0
        self._buckets = {}
        # Keys that the server has refused, and why
        self._refused = self._reason = None
        self._renew_at = float("inf")
        self._loading = self._export = None
        self._ended = False

    def bucket(self, name):
        if name not in self._buckets:
            self._buckets[name] = Bucket(self, name)
        return self._buckets[name]

    @property
    def is_stale(self):
        return not self.is_unsigned and (self.keys is None or self.now() >= self._renew_at)

    async def load(self, loop):
        """Read the configuration and find keys, unless there are valid ones. Several calls share the work. Raises Unusable."""
        if self.configuration and not self.is_stale:
            return
        loading = self._loading = self._loading or loop.run_in_executor(None, self._find)
        try:
            found = await asyncio.shield(loading)
        except Exception:
            self._loading = None
            if not self.keys or self.keys.expires <= self.now():
                raise
            # They could not be renewed, but are still valid
            self._renew_at = self.keys.expires
            return
        # Others have waited for the same
        if self._loading is loading:
            self._loading = None
            self.configuration, keys = found
            if keys != self.keys:
                self.changes += 1
                self.proven = False
            self._use(keys)

    def _find(self):
        """Called in a thread of its own. Returns the Configuration and Keys."""
        configuration = awsconfig.Configuration(self._environment)
        if self.is_unsigned:
            return configuration, None
        keys = configuration.keys()
        if not keys:
            self._export = awsconfig.Export({**os.environ, **self._environment}, configuration.command)
            if self._ended:
                self._export.end()
            keys = self._export.run()
        if keys == self._refused:
            raise Unusable("S3 refuses signed requests (%s)" % self._reason)
        if keys.expires is not None and keys.expires <= self.now():
            raise Unusable("the AWS credentials have expired")
        return configuration, keys

    def _use(self, keys):
        self.keys = keys
        self._renew_at = float("inf")
        if keys and keys.expires is not None:
            # Not again and again if aws returns the same keys until they expire
            self._renew_at = max(keys.expires - RENEW_BEFORE, (self.now() + keys.expires) / 2)

    def refuse(self, code):
        """The server has refused the keys: find others for the next connection"""
        self._refused, self._reason = self.keys, code
        self.keys = None
        self.changes += 1

    def now(self):
        return time.time() + self._skew

    def correct_clock(self, headers):
        """Returns whether the clock of the server differs and the difference is taken into account from now on"""
        try:
            date = email.utils.parsedate_to_datetime(headers.get("date", "")).timestamp()
        except (IndexError, TypeError, ValueError, OverflowError):
            return False
        if self._corrections >= MAX_CORRECTIONS or abs(date - self.now()) < SKEW:
            return False
        self._corrections += 1
        self._skew = date - time.time()
        self.changes += 1
        return True

    def end(self):
        self._ended = True
        if self._export:
            self._export.end()


class Bucket:
    """
    denied_until    time of the event loop until which status 403 means that there is no such object
    """

    def __init__(self, account, name):
        self.account = account
        self.name = name
        self.denied_until = 0
        self._moves = 0
        self._signer = sigv4.Signer(account.configuration.region, "s3")

    @property
    def region(self):
        return self._signer.region

    @property
    def state(self):
        """What signatures depend on: if it has changed since, a request may be answered in another way now"""
        return self.account.changes, self._moves

    def sign(self, method, path, host):
        """Returns the headers to add to a request"""
        if self.account.is_unsigned:
            return {}
        return self._signer.sign(self.account.keys, method, path, {"host": host}, self.account.now())

    def correct(self, headers, region, code):
        """Learn from an error. Returns whether the request may succeed if it is sent again, on a new connection."""
        if region and ANY_REGION.fullmatch(region) and region != self.region and self._moves < MAX_MOVES:
            self._moves += 1
            self._signer = sigv4.Signer(region, "s3")
            return True
        if self.account.is_unsigned:
            return False
        if self.account.correct_clock(headers):
            return True
        if code in KEY_CODES and self.account.keys and self.account.proven:
            # They have expired or were replaced
            self.account.refuse(code)
            return True
        return False


class S3Connection(http.HTTPConnection):
    """origin and route are those of the endpoint at first. path precedes the keys of objects."""

    def __init__(self, loop, owner, origin, route, timeout, bucket, path):
        super().__init__(loop, owner, origin, route, timeout)
        self._bucket = bucket
        self._path = path
        self._prefix += path
        # {request: Bucket.state} of requests without an answer
        self._signed = {}
        # Body of the answer, unless it is the file
        self._body = bytearray()

    def send(self, requests):
        account = self._bucket.account
        if account.is_stale:
            # The next connection renews the keys
            self.retiring = True
            if account.keys is None:
                self.in_flight.extend(requests)
                self.close(IdleClosed("%s: the keys are not valid any more" % self.origin.host))
                return
        super().send(requests)

    def _head(self, request):
        self._signed[request] = self._bucket.state
        headers = self._bucket.sign(request.method, self._path + request.target, self.authority)
        return super()._head(request)[:-2] + "".join("%s: %s\r\n" % item for item in headers.items()) + "\r\n"

    def _check(self, request, response):
        # Status 400 of S3 is about the keys or the region, and not about where a request begins
        if response.status != 400 or REQUEST_ID not in response.headers:
            super()._check(request, response)

    def answer(self, request, response, error=None):
        if request.method == "OPTIONS" and response and response.status in (400, FORBIDDEN):
            # The probe of pipelining.py, which S3 takes for a question about CORS
            response = Response(405, response.headers, response.length)
        super().answer(request, response, error)

    def _read_body(self, request, response):
        self._body.clear()
        answer = yield from super()._read_body(request, response)
        if response.status >= 300:
            for pattern, name in ((CODE, "code"), (REGION, "region")):
                match = pattern.search(self._body)
                # Not a name that a header can have
                response.headers[":" + name] = match[1].decode("ascii") if match else ""
        return answer

    def _read_bytes(self, request, size, wanted):
        while not wanted and size and len(self._body) < MAX_ERROR:
            n = min(size, self.end - self.start)
            self._body += self.view[self.start:self.start + n]
            self.start += n
            size -= n
            if size and not n:
                yield
        yield from super()._read_bytes(request, size, wanted)

    def classify(self, request, response):
        status, headers, _ = response
        state = self._signed.pop(request, None)
        if status not in CORRECTABLE:
            if status < 500 and state == self._bucket.state:
                self._bucket.account.proven = True
            return super().classify(request, response)
        location = LOCATION.match(headers.get("location", ""))
        region = headers.get("x-amz-bucket-region") or headers.get(":region") or \
            (location[1] if location and awsconfig.REGION.fullmatch(location[1]) else None)
        code = headers.get(":code")
        if state != self._bucket.state or self._bucket.correct(headers, region, code):
            self.retiring = True
            return None, Resubmit()
        if code in KEY_CODES or code == TIME_CODE:
            return None, Unusable("S3 refuses signed requests (%s)" % code)
        if code in ABSENT_CODES:
            # The signature was accepted
            self._bucket.account.proven = True
            self._bucket.denied_until = self.loop.time() + DENIED_SECONDS
            return Response(404, headers, None), None
        if request.method == "HEAD":
            if status == FORBIDDEN and self.loop.time() < self._bucket.denied_until and REQUEST_ID in headers:
                return Response(404, headers, None), None
            if status == 400:
                # Only the answer to a GET contains the code
                request.method = "GET"
                request.refused_head = status
                return None, Resubmit()
        return super().classify(request, response)
