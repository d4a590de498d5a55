#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
AWS Signature Version 4, in the Authorization header.

Used by s3.py for each attempt of a request, since a signature contains the time.
Follows "AWS Signature Version 4 for API requests" in the IAM User Guide, and
"Authenticating Requests: Using the Authorization Header" in the S3 API
Reference. Bodies and query strings are not supported. Blocks nowhere.

    signer = Signer("us-east-1", "s3")
    headers = signer.sign(keys, "HEAD", "/key", {"host": "bucket.example"}, time.time())
"""

import collections
import hashlib
import hmac
import time

ALGORITHM = "AWS4-HMAC-SHA256"
# x-amz-content-sha256 of a request without a body
NO_BODY = hashlib.sha256(b"").hexdigest()


class Keys(collections.namedtuple("Keys", "access secret token expires")):
    """token may be "", expires (seconds since the epoch) None. Not printed, for example in a traceback."""
    __slots__ = ()

    def __repr__(self):
        return "Keys(...)"


class Signer:
    """Signs requests to a service in a region. Not for several threads."""

    def __init__(self, region, service):
        self.region = region
        self._service = service
        # What the signing key was made from, and the key, which is valid for a day
        self._made_from = self._key = None

    def sign(self, keys, method, path, headers, seconds, body=NO_BODY):
        """
        Returns the headers to add to a request, {name: value}. headers are those to sign, with lower case names, at least
        host. path is encoded as it is sent; seconds since the epoch are the time of signing, body is the SHA-256 of the
        body, or None to sign a request that has no header for it.
        """
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(seconds))
        added = {"x-amz-date": stamp}
        if body is not None:
            added["x-amz-content-sha256"] = body
        if keys.token:
            added["x-amz-security-token"] = keys.token
        fields = sorted({**headers, **added}.items())
        names = ";".join(name for name, _ in fields)
        canonical = "%s\n%s\n\n%s\n%s\n%s" % (
            method, path, "".join("%s:%s\n" % (name, " ".join(value.split())) for name, value in fields), names,
            body or NO_BODY)
        scope = "%s/%s/%s/aws4_request" % (stamp[:8], self.region, self._service)
        text = "%s\n%s\n%s\n%s" % (ALGORITHM, stamp, scope, hashlib.sha256(canonical.encode("utf-8")).hexdigest())
        signature = hmac.new(self._signing_key(keys.secret, stamp[:8]), text.encode("utf-8"), hashlib.sha256).hexdigest()
        added["authorization"] = "%s Credential=%s/%s, SignedHeaders=%s, Signature=%s" % (
            ALGORITHM, keys.access, scope, names, signature)
        return added

    def _signing_key(self, secret, day):
        if self._made_from != (secret, day):
            key = ("AWS4" + secret).encode("utf-8")
            for part in (day, self.region, self._service, "aws4_request"):
                key = hmac.new(key, part.encode("utf-8"), hashlib.sha256).digest()
            self._made_from, self._key = (secret, day), key
        return self._key
