#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
A request to a mirror, and its answer.

A request is a URL, asked for with a certain environment: proxy, certificates
and the way ssh is started follow from variables of the task, not of this
process. This module does no input or output, except that it looks up ssh in
PATH.

    Request("HEAD", "https://mirror.example/sstate/x", environment)
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

# Scheme, authority, path, query (RFC 3986 appendix B; urlsplit() takes five times as long)
URL = re.compile(r"([^:/?#]+)://([^/?#]*)([^?#]*)(\?[^#]*)?(?:#.*)?", re.DOTALL)

# No such file, and additionally: not for us. The latter are final for HEAD only.
ABSENT = (404, 410)
MISSING = ABSENT + (401, 403, 405)

# Longest decimal number that is accepted as the size of a file
MAX_DIGITS = 18

# Bytes that are assumed for a body of unknown size, most of which are siginfos
UNKNOWN_BODY = 64 * 1024

# 0: ssh's own configuration selects the port
DEFAULT_PORTS = {"http": 80, "https": 443, "sftp": 0}

# Variables of the fetcher which select the way to a host: for HTTP, and for ssh including what a ProxyCommand may use
HTTP_ENVIRONMENT = ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "no_proxy", "NO_PROXY",
                    "SSL_CERT_FILE", "SSL_CERT_DIR")
ENVIRONMENT = HTTP_ENVIRONMENT + (
    "HOME", "PATH", "USER", "LOGNAME", "SSH_AUTH_SOCK", "SSH_AGENT_PID", "DBUS_SESSION_BUS_ADDRESS",
    "ALL_PROXY", "all_proxy", "SOCKS5_USER", "SOCKS5_PASSWD",
    "AWS_PROFILE", "AWS_SHARED_CREDENTIALS_FILE", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ROLE_ARN",
    "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_DEFAULT_REGION", "AWS_SESSION_TOKEN")

# scheme, host (lower case unless sftp), port number, user (may be "")
Origin = collections.namedtuple("Origin", "scheme host port user")

# proxy is None or (host, port, value of Proxy-Authorization or None)
Route = collections.namedtuple("Route", "proxy cafile capath verify")


class Response(collections.namedtuple("Response", "status headers length")):
    """status is that of HTTP or its equivalent. headers.get() takes lower case names. length is None if unknown."""
    __slots__ = ()

    @property
    def validators(self):
        """A hash of what distinguishes the file from others of the same size (RFC 9110 8.8)"""
        return hash((self.headers.get("etag"), self.headers.get("last-modified")))


class SSHRoute:
    """
    How ssh is started: its environment, a tuple of (name, value). Two are equal if the ssh found in PATH and all
    other variables are the same, since each recipe has a PATH of its own.
    """
    __slots__ = ("environment", "_compared", "_hash")

    def __init__(self, environment):
        self.environment = environment
        others = dict(environment)
        self._compared = os.path.realpath(ssh_program(others.pop("PATH", ""))), tuple(others.items())
        self._hash = hash(self._compared)

    def __eq__(self, other):
        return isinstance(other, SSHRoute) and self._compared == other._compared

    def __hash__(self):
        return self._hash


class Request:
    """
    A HEAD or GET of url with an environment (see ENVIRONMENT). For sftp HEAD
    means STAT. Raises ValueError if url cannot be asked for here.

    fd is the descriptor that receives the body of a GET, from offset 0 on; empty
    tells that the file is known to be empty. It belongs to the caller and must
    stay open until the request is answered. A GET without it asks for the first
    byte only, for servers that refuse HEAD.

    done(request, response, error) is called exactly once, in the thread of the
    event loop; response or error is None. context is the caller's. Setting
    cancelled, from any thread, ends the request soon.
    """
    __slots__ = ("method", "environment", "verify", "authorization", "fd", "empty", "done", "context", "cancelled", "first",
                 "received", "sent", "url", "origin", "target", "route", "key", "asked", "size", "validators",
                 "attempts", "refusals", "answers", "redirects")

    def __init__(self, method, url, environment, verify=True, authorization=None, fd=None, empty=False):
        self.method = method
        self.environment = environment
        self.verify = verify
        self.authorization = authorization
        self.fd = fd
        self.empty = empty
        self.done = self.context = None
        self.cancelled = self.first = False
        # Bytes of the body so far, and the time when it was last sent
        self.received = self.sent = 0
        self._set_url(url)
        # Requests with the same key have the same answer, whatever redirects do to url
        self.key = (self.authorization, self.route), self.url
        self.asked = method
        # What a HEAD has announced: size in bytes, and what distinguishes this file from others
        self.size = self.validators = None
        # The host's: failures, refusals, the host's answers up to the last failure, redirects
        self.attempts = self.refusals = self.answers = self.redirects = 0

    def _set_url(self, url):
        match = URL.fullmatch(url)
        if not match or match[1].lower() not in DEFAULT_PORTS:
            raise ValueError("Not an http, https or sftp URL: %s" % redact(url))
        scheme, path = match[1].lower(), match[3]
        if scheme != "sftp" and (not url.isascii() or not url.isprintable() or " " in url):
            raise ValueError("Invalid character in URL: %s" % redact(url))
        try:
            self.origin = _origin(scheme, match[2])
        except ValueError as e:
            # A password with a slash is not where redact() looks for it
            raise ValueError("%s: %s" % (e, redact(scheme + "://" + url.partition("://")[2].rpartition("@")[2]))) from None
        self.url = url
        if scheme == "sftp":
            self._set_path(path)
            self.route = _ssh_route(tuple((name, self.environment[name]) for name in ENVIRONMENT if name in self.environment))
        else:
            self.target = (path or "/") + (match[4] or "")
            self.route = _route(self.origin, tuple(self.environment.items()), self.verify)

    def _set_path(self, path):
        """As in fetch2/sftp.py: unquoted; what follows /~/ is relative to the home directory"""
        path = urllib.parse.unquote(path, errors="surrogateescape")
        path = path[3:] if path.startswith("/~/") else path
        try:
            self.target = path.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:
            self.target = b""
        if not self.target or b"\0" in self.target:
            raise ValueError("Not a path: %s" % redact(self.url))

    def begin_body(self):
        """The body begins: remove what is in the file. Raises DestinationError."""
        if self.received or not self.empty:
            try:
                # ext4 flushes a file on close after any truncation, even of an empty file (auto_da_alloc in ext4(5))
                if os.fstat(self.fd).st_size:
                    os.ftruncate(self.fd, 0)
            except OSError as e:
                raise unwritable(e) from e
        self.received = 0

    @property
    def is_unknown(self):
        """Whether it is a GET of a file about which no HEAD has been answered"""
        return self.fd is not None and self.size is None

    def body_size(self):
        """Bytes of the body to expect"""
        if self.fd is None:
            return 0
        return UNKNOWN_BODY if self.size is None else self.size

    def redirect(self, location):
        """Continue at location. Raises ValueError if that is not possible here."""
        before = self.origin
        url = urllib.parse.urljoin(self.url, location.replace(" ", "%20"))
        parts = urllib.parse.urlsplit(url)
        if parts.scheme == "sftp":
            raise ValueError("redirect to sftp")
        # Credentials in a Location are the server's, not the user's
        self._set_url(urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])))
        if before[:3] == self.origin[:3]:
            # The user is part of an origin
            self.origin = before
        else:
            self.authorization = None
        self.redirects += 1


def redact(url):
    """url without user, password and query, which may contain a token: for messages"""
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError:
        return "(invalid URL)"
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))

def basic_auth(user, password):
    return "Basic " + base64.b64encode(("%s:%s" % (user, password)).encode("utf-8")).decode("ascii")

@functools.lru_cache(maxsize=256)
def _origin(scheme, netloc):
    """Raises ValueError if netloc is invalid"""
    try:
        parts = urllib.parse.urlsplit(scheme + "://" + netloc)
    except ValueError:
        # Its message may quote the password
        raise ValueError("Not a valid URL") from None
    if not parts.hostname:
        raise ValueError("Not an http, https or sftp URL")
    try:
        port = parts.port or DEFAULT_PORTS[scheme]
    except ValueError:
        # Its message would quote what may be half a password
        raise ValueError("Invalid port in") from None
    if scheme != "sftp":
        return Origin(scheme, parts.hostname, port, parts.username or "")
    # As written: it may be an alias in ssh's configuration
    host = netloc.rpartition("@")[2]
    host = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    if host.startswith("-"):
        raise ValueError("Not a host name: %s" % host[:80])
    return Origin(scheme, host, port, urllib.parse.unquote(parts.username or ""))

def ssh_program(path):
    """The ssh that is found in path, a value of PATH"""
    return shutil.which("ssh", path=path) or "/usr/bin/ssh"

@functools.lru_cache(maxsize=256)
def _ssh_route(environment):
    return SSHRoute(environment)

@functools.lru_cache(maxsize=256)
def _route(origin, environment, verify):
    """How to reach origin with environment. Raises ValueError for a proxy of another kind than http."""
    environment = dict(environment)
    proxies = {}
    # Lower case takes precedence, as in urllib and wget
    for name in ("http", "https", "no"):
        value = environment.get(name + "_proxy") or environment.get(name.upper() + "_PROXY")
        if value:
            proxies[name] = value

    proxy = proxies.get(origin.scheme)
    if proxy and not urllib.request.proxy_bypass_environment("%s:%s" % (origin.host, origin.port), proxies):
        proxy = _proxy(proxy)
    else:
        proxy = None
    if origin.scheme != "https":
        return Route(proxy, None, None, True)
    return Route(proxy, environment.get("SSL_CERT_FILE"), environment.get("SSL_CERT_DIR"), verify)

def _proxy(value):
    try:
        parts = urllib.parse.urlsplit(value if "://" in value else "http://" + value)
        port = parts.port or 80
    except ValueError:
        # Its message may quote half of a password
        raise ValueError("Invalid URL of a proxy") from None
    if parts.scheme != "http" or not parts.hostname:
        raise ValueError("Not an http proxy: %s" % redact(value))
    auth = None
    if parts.username:
        auth = basic_auth(urllib.parse.unquote(parts.username), urllib.parse.unquote(parts.password or ""))
    return parts.hostname, port, auth

def unwritable(error):
    return DestinationError("cannot write the file: %s" % error.strerror)

def retry_after(headers):
    """Retry-After (RFC 9110 10.2.3) in seconds, or None"""
    value = headers.get("retry-after", "").strip()
    if value.isascii() and value.isdigit():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (IndexError, TypeError, ValueError, OverflowError):
        # IndexError: Python before 3.10
        return None

def last_modified(headers):
    """Last-Modified (RFC 9110 8.8.2) in seconds since the epoch, or None"""
    try:
        return email.utils.parsedate_to_datetime(headers.get("last-modified")).timestamp()
    except (IndexError, TypeError, ValueError, OverflowError):
        return None
