#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
A request to a mirror, its answer, and how its host is reached.

Used by the whole package and its callers. A request consists of a URL and an
environment, since proxy, certificates and the start of ssh follow from the
variables of a task, not of this process. No network access; only the body is
written here, in the event loop's thread. URLs follow RFC 3986.

    request = Request("HEAD", "https://mirror.example/sstate/x", environment)
    request.done = lambda request, response, error: ...
"""

import base64
import collections
import email.utils
import functools
import os
import re
import shutil
import time
import urllib.parse
import urllib.request

from bb.connections import DestinationError

# Scheme, authority, path with query of a URL. urllib.parse.urlsplit() takes ten times as long.
URL = re.compile(r"(https?|sftp|s3)://([^/?#]*)([^#]*)", re.IGNORECASE)
# User, password, host and port of an authority
AUTHORITY = re.compile(r"(?:([^:]*)(?::(.*))?@)?(\[[^]]+\]|[^:@\[\]]+)(?::([0-9]{0,5}))?", re.DOTALL)
# Name of a bucket
BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")

# Statuses of a file that does not exist
ABSENT = (404, 410)
FORBIDDEN = 403
# Statuses to a HEAD of a file that does not exist or may not be read
MISSING = ABSENT + (401, FORBIDDEN, 405)
# Statuses with which some servers refuse a HEAD, but not a GET
HEAD_REFUSED = (FORBIDDEN, 405)
# Bytes that are assumed for a body of unknown size: most of those are siginfos, which are smaller
UNKNOWN_BODY = 64 * 1024
# Response.validators if there are none
NO_VALIDATORS = hash((None, None))
# Default ports; with 0 the configuration of ssh selects it
DEFAULT_PORTS = {"http": 80, "https": 443, "sftp": 0, "s3": 0}

# Variables that determine the route to a host. Requests that differ in them use different connections.
HTTP_ENVIRONMENT = ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "no_proxy", "NO_PROXY",
                    "SSL_CERT_FILE", "SSL_CERT_DIR")
# The same for ssh and a ProxyCommand. All other variables are passed to ssh as well, from the request that starts it.
ENVIRONMENT = HTTP_ENVIRONMENT + (
    "HOME", "PATH", "USER", "LOGNAME", "SSH_AUTH_SOCK", "SSH_AGENT_PID", "DBUS_SESSION_BUS_ADDRESS", "KRB5CCNAME",
    "ALL_PROXY", "all_proxy", "SOCKS5_USER", "SOCKS5_PASSWD",
    "AWS_PROFILE", "AWS_SHARED_CREDENTIALS_FILE", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ROLE_ARN",
    "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_DEFAULT_REGION", "AWS_SESSION_TOKEN")

# scheme, host (in lower case unless for sftp), port number, user (may be "")
Origin = collections.namedtuple("Origin", "scheme host port user")
# proxy is None or (host, port, value of Proxy-Authorization or None)
Route = collections.namedtuple("Route", "proxy cafile capath verify")


class SSHRoute(collections.namedtuple("SSHRoute", "program variables")):
    """
    The path of ssh, and (name, value) of each variable of ENVIRONMENT. The attribute environment, the complete
    environment of one request, is not compared.
    """


class S3Route(collections.namedtuple("S3Route", "variables")):
    """
    (name, value) of each variable of a request. proxy is as in Route, of a connection without TLS; it is not compared.
    """
    proxy = None


class Response(collections.namedtuple("Response", "status headers length")):
    """status is the HTTP status or its equivalent, headers a dictionary with lower case names, length may be None"""
    __slots__ = ()

    @property
    def validators(self):
        """A hash of the validators (RFC 9110 8.8), which distinguish the file from others of the same size"""
        return hash((self.headers.get("etag"), self.headers.get("last-modified")))


class Request:
    """
    A HEAD or GET of url with an environment, {name: value}. For sftp, HEAD means
    STAT. Raises ValueError if url is not supported.

    fd is the descriptor for the body of a GET; empty: its file is known to be
    empty. It belongs to the caller and must stay open until the request is
    answered. A GET without a descriptor requests the first byte only.

    done(request, response, error) is called exactly once, in the event loop's
    thread; either response or error is None.

    context     for the caller's use
    cancelled   may be set in any thread, to end the request soon
    first       send it before others
    fresh       send it even if the file is known to exist
    recheck     send it whatever is known
    probe       for diagnosis.py: the answer is not cached
    exclusive   send it only when nothing else is in flight on the connection
    """
    # A query has many thousands of requests: with dictionaries they would take three times the memory
    __slots__ = ("method", "environment", "verify", "authorization", "fd", "empty", "done", "context", "cancelled", "first",
                 "fresh", "recheck", "probe", "exclusive", "received", "sent", "url", "origin", "target", "route", "key",
                 "original_method", "size", "validators", "attempts", "refusals", "recoveries_before", "redirects",
                 "refused_head", "answers_before", "before_redirects", "dropped_authorization", "connection")

    def __init__(self, method, url, environment, verify=True, authorization=None, fd=None, empty=False):
        # method becomes GET if the server refuses a HEAD
        self.method = self.original_method = method
        self.environment = environment
        self.verify = verify
        self.authorization = authorization
        self.fd = fd
        self.empty = empty
        self.done = self.context = None
        self.cancelled = self.first = self.fresh = self.recheck = self.probe = self.exclusive = False
        # Number of bytes of the body so far, and the time and the connection at which the request was last sent
        self.received = self.sent = self.connection = 0
        # Size in bytes and validators from the HEAD of the same file
        self.size = self.validators = None
        self.attempts = self.refusals = self.redirects = 0
        # Number of other requests that had been answered after a refusal when this one was first refused (failures.py)
        self.recoveries_before = 0
        # Status with which a HEAD was refused that is a GET now
        self.refused_head = None
        # Number of answers of the host when this request last failed together with the host (failures.py)
        self.answers_before = None
        # URL and authorization before skip_redirects()
        self.before_redirects = None
        # Whether a redirect led to another origin, which is not sent the credentials
        self.dropped_authorization = False
        self._set_url(url)
        # Key of the answer in the pool's cache, which redirects do not change
        self.key = (authorization, self.route), url

    def _set_url(self, url):
        try:
            match = URL.match(url)
            if not match:
                raise ValueError("Not an http, https, sftp or s3 URL")
            scheme, authority, target = match.groups()
            self.origin, self.route = _origin_and_route(scheme.lower(), authority, tuple(self.environment.items()), self.verify)
            if self.origin.scheme == "sftp":
                self.target = _sftp_path(target)
            elif self.origin.scheme == "s3":
                self.target = quote_key(urllib.parse.unquote(target, errors="surrogateescape"))
            elif url.isascii() and url.isprintable() and " " not in url:
                self.target = target if target.startswith("/") else "/" + target
            else:
                raise ValueError("Invalid character in URL")
        except ValueError as e:
            # redact() does not find a password that contains a slash
            raise ValueError("%s: %s" % (e, redact(re.sub("(?s)//.*@", "//", url)))) from None
        self.url = url

    def redirect(self, location):
        """Change the URL to location. Raises ValueError if it is not supported."""
        before = self.origin
        url = urllib.parse.urljoin(self.url, location.replace(" ", "%20"))
        if url.lower().startswith(("sftp:", "s3:")):
            raise ValueError("redirect to sftp or s3")
        # Credentials in a Location do not come from the user
        self._set_url(re.sub("^([^/?#]*//)[^/?#]*@", r"\1", url))
        if before[:3] == self.origin[:3]:
            # With the same user, which is part of an origin
            self.origin = before
        elif self.authorization:
            self.authorization = None
            self.dropped_authorization = True
        self.redirects += 1

    def skip_redirects(self, target):
        """Change the URL to target, to which it is known to be redirected"""
        self.before_redirects = self.url, self.authorization
        self.redirect(target)

    def restore_url(self):
        """Undo skip_redirects()"""
        url, authorization = self.before_redirects
        self.before_redirects = None
        self._set_url(url)
        self.authorization = authorization
        self.dropped_authorization = False
        self.redirects = 0

    @property
    def identity(self):
        """Size and validators, by which the file's answer is recognized, or None if no HEAD was answered"""
        return None if self.size is None else (self.size, self.validators)

    def body_size(self):
        if self.fd is None:
            return 0
        return UNKNOWN_BODY if self.size is None else self.size

    def begin_body(self):
        """Truncate the destination to receive a body. Raises DestinationError."""
        try:
            # Only if needed: ext4 flushes a file on close after any truncation (auto_da_alloc in ext4(5))
            if (self.received or not self.empty) and os.fstat(self.fd).st_size:
                os.ftruncate(self.fd, 0)
        except OSError as e:
            raise unwritable(e) from e
        self.received = 0

    def write(self, data):
        """Write the next bytes of the body, a memoryview. Raises DestinationError."""
        try:
            while data:
                size = os.pwrite(self.fd, data, self.received)
                self.received += size
                data = data[size:]
        except OSError as e:
            raise unwritable(e) from e


def unwritable(error):
    return DestinationError("cannot write the file: %s" % error.strerror)

def redact(url):
    """Returns url for use in a message: without user, password, and the query, which may contain a token"""
    return re.sub("^([^/]*//)[^/]*@", r"\1", url).partition("#")[0].partition("?")[0]

def basic_auth(user, password):
    return "Basic " + base64.b64encode(("%s:%s" % (user, password)).encode("utf-8")).decode("ascii")

def ssh_program(path):
    return shutil.which("ssh", path=path) or "/usr/bin/ssh"

def retry_after(headers):
    """Retry-After (RFC 9110 10.2.3) in seconds, or None"""
    value = headers.get("retry-after", "").strip()
    if value.isascii() and value.isdigit():
        return float(value)
    date = _seconds(value)
    return None if date is None else max(0.0, date - time.time())

def last_modified(headers):
    """Last-Modified (RFC 9110 8.8.2) in seconds since the epoch, or None"""
    return _seconds(headers.get("last-modified"))

def _seconds(date):
    try:
        return email.utils.parsedate_to_datetime(date).timestamp()
    except (IndexError, TypeError, ValueError, OverflowError):
        # IndexError before Python 3.10
        return None

def _sftp_path(target):
    """Returns the path as fetch2/sftp.py does: unquoted, and relative to the home directory if it begins with /~/"""
    path = urllib.parse.unquote(target.partition("?")[0], errors="surrogateescape")
    path = (path[3:] if path.startswith("/~/") else path).encode("utf-8", "surrogateescape")
    if not path or b"\0" in path:
        raise ValueError("Not a path")
    return path

def quote_key(key):
    """Returns the key of an object as a path: S3 wants all but the unreserved characters of RFC 3986 and "/" encoded"""
    return urllib.parse.quote(key, safe="/-_.~", errors="surrogateescape")

def _split(authority):
    """Returns user, password, host ("" if missing) and port (0 if missing). Raises ValueError without quoting them."""
    match = AUTHORITY.fullmatch(authority)
    if not match or int(match[4] or 0) > 65535:
        raise ValueError("Invalid host or port")
    return match[1] or "", match[2] or "", match[3].strip("[]"), int(match[4] or 0)

@functools.lru_cache(maxsize=256)
def _origin_and_route(scheme, authority, environment, verify):
    """Returns the Origin of scheme://authority and the Route, SSHRoute or S3Route to it"""
    user, _, host, port = _split(authority)
    if scheme == "s3":
        if not BUCKET.fullmatch(authority):
            raise ValueError("Not the name of a bucket: %s" % authority[:80])
        return Origin(scheme, authority, 0, ""), S3Route(environment)
    environment = dict(environment)
    if scheme == "sftp":
        if host.startswith("-"):
            raise ValueError("Not a host name: %s" % host[:80])
        # Not in lower case: it may be an alias in the configuration of ssh
        return Origin(scheme, host, port, urllib.parse.unquote(user)), _ssh_route(environment)
    origin = Origin(scheme, host.lower(), port or DEFAULT_PORTS[scheme], user)
    proxy = _proxy(origin, environment)
    if scheme == "http":
        return origin, Route(proxy, None, None, True)
    return origin, Route(proxy, environment.get("SSL_CERT_FILE"), environment.get("SSL_CERT_DIR"), verify)

def _ssh_route(environment):
    program = os.path.realpath(ssh_program(environment.get("PATH", "")))
    route = SSHRoute(program, tuple((name, environment[name]) for name in ENVIRONMENT if name in environment and name != "PATH"))
    route.environment = tuple(environment.items())
    return route

def _proxy(origin, environment):
    # Lower case takes precedence, as in urllib and wget
    proxies = {name: environment.get(name + "_proxy") or environment.get(name.upper() + "_PROXY") or ""
               for name in ("http", "https", "no")}
    url = proxies[origin.scheme]
    if not url or urllib.request.proxy_bypass_environment("%s:%s" % (origin.host, origin.port), proxies):
        return None
    match = URL.match(url if "://" in url else "http://" + url)
    if not match or match[1].lower() != "http":
        raise ValueError("Not an http proxy")
    user, password, host, port = _split(match[2])
    login = basic_auth(urllib.parse.unquote(user), urllib.parse.unquote(password)) if user else None
    return host, port or 80, login
