#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
A request to a mirror, and its answer.

A request is a URL, asked for with a certain environment: proxy, certificates
and the way ssh is started follow from variables of the task, not of this
process. The only file that is used here is that of a body.

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

# RFC 3986: scheme, authority, path with query; and user, password, host and port (urlsplit() takes ten times as long)
URL = re.compile(r"(https?|sftp)://([^/?#]*)([^#]*)", re.IGNORECASE)
AUTHORITY = re.compile(r"(?:([^:]*)(?::(.*))?@)?(\[[^]]+\]|[^:@\[\]]+)(?::([0-9]{0,5}))?", re.DOTALL)

# No such file, and additionally: not for us. The latter are final for HEAD only.
ABSENT = (404, 410)
FORBIDDEN = 403
MISSING = ABSENT + (401, FORBIDDEN, 405)
# Of a server that may do so for HEAD only
HEAD_REFUSED = (FORBIDDEN, 405)
# Bytes that are assumed for a body of unknown size, most of which are siginfos
UNKNOWN_BODY = 64 * 1024
# Response.validators if there are none
NO_VALIDATORS = hash((None, None))
# 0: ssh's own configuration selects the port
DEFAULT_PORTS = {"http": 80, "https": 443, "sftp": 0}

# Variables which select the way to a host: for HTTP, and for ssh including what a ProxyCommand may use. ssh gets all others,
# too, but those of whoever comes first.
HTTP_ENVIRONMENT = ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "no_proxy", "NO_PROXY",
                    "SSL_CERT_FILE", "SSL_CERT_DIR")
ENVIRONMENT = HTTP_ENVIRONMENT + (
    "HOME", "PATH", "USER", "LOGNAME", "SSH_AUTH_SOCK", "SSH_AGENT_PID", "DBUS_SESSION_BUS_ADDRESS", "KRB5CCNAME",
    "ALL_PROXY", "all_proxy", "SOCKS5_USER", "SOCKS5_PASSWD",
    "AWS_PROFILE", "AWS_SHARED_CREDENTIALS_FILE", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ROLE_ARN",
    "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_DEFAULT_REGION", "AWS_SESSION_TOKEN")

# scheme, host (lower case unless sftp), port number, user (may be "")
Origin = collections.namedtuple("Origin", "scheme host port user")
# proxy is None or (host, port, value of Proxy-Authorization or None)
Route = collections.namedtuple("Route", "proxy cafile capath verify")


class SSHRoute(collections.namedtuple("SSHRoute", "program variables")):
    """
    The ssh that is found in PATH, and (name, value) of each other variable that counts. The attribute environment, all
    variables of one recipe, is not compared.
    """


class Response(collections.namedtuple("Response", "status headers length")):
    """status is that of HTTP or its equivalent. headers.get() takes lower case names. length is None if unknown."""
    __slots__ = ()

    @property
    def validators(self):
        """A hash of what distinguishes the file from others of the same size (RFC 9110 8.8)"""
        return hash((self.headers.get("etag"), self.headers.get("last-modified")))


class Request:
    """
    A HEAD or GET of url with an environment, {name: value}. For sftp HEAD
    means STAT. Raises ValueError if url cannot be asked for here.

    fd is the descriptor that receives the body of a GET, from offset 0 on; empty
    tells that the file is known to be empty. It belongs to the caller and must
    stay open until the request is answered. A GET without it asks for the first
    byte only, for servers that refuse HEAD.

    done(request, response, error) is called exactly once, in the thread of the
    event loop; response or error is None. context is the caller's. Setting
    cancelled, from any thread, ends the request soon. first requests are sent
    before all others, fresh ones although it is known from before that there is
    a file, doubted ones whatever is known; alone and probe are the host's:
    nothing else is in flight on the connection, and the answer is used to find
    out about the host.
    """
    # A query has many thousands: a dictionary for each takes three times the memory
    __slots__ = ("method", "environment", "verify", "authorization", "fd", "empty", "done", "context", "cancelled", "first",
                 "fresh", "doubted", "probe", "alone", "received", "sent", "url", "origin", "target", "route", "key", "asked", "size",
                 "validators", "attempts", "refusals", "recovered", "redirects", "refused_head", "heard")

    def __init__(self, method, url, environment, verify=True, authorization=None, fd=None, empty=False):
        # What is sent may become a GET if the server refuses a HEAD
        self.method = self.asked = method
        self.environment = environment
        self.verify = verify
        self.authorization = authorization
        self.fd = fd
        self.empty = empty
        self.done = self.context = None
        self.cancelled = self.first = self.fresh = self.doubted = self.probe = self.alone = False
        # Bytes of the body so far, and the time when it was last sent
        self.received = self.sent = 0
        # What a HEAD has announced: size in bytes, and what distinguishes this file from others
        self.size = self.validators = None
        # The host's: failures, refusals, redirects, and how many other requests had recovered from refusals at the first one
        self.attempts = self.refusals = self.redirects = self.recovered = 0
        # The status with which a HEAD was refused, if that is why it is a GET now
        self.refused_head = None
        # How many answers the host had given when this one failed to come, and no other came meanwhile
        self.heard = None
        self._set_url(url)
        # Requests with the same key have the same answer, whatever redirects do to url
        self.key = (authorization, self.route), url

    def _set_url(self, url):
        try:
            match = URL.match(url)
            if not match:
                raise ValueError("Not an http, https or sftp URL")
            scheme, authority, target = match.groups()
            self.origin, self.route = _way(scheme.lower(), authority, tuple(self.environment.items()), self.verify)
            if self.origin.scheme == "sftp":
                self.target = _sftp_path(target)
            elif url.isascii() and url.isprintable() and " " not in url:
                self.target = target if target.startswith("/") else "/" + target
            else:
                raise ValueError("Invalid character in URL")
        except ValueError as e:
            # A password with a slash is not where redact() looks for it
            raise ValueError("%s: %s" % (e, redact(re.sub("(?s)//.*@", "//", url)))) from None
        self.url = url

    def redirect(self, location):
        """Continue at location. Raises ValueError if that is not possible here."""
        before = self.origin
        url = urllib.parse.urljoin(self.url, location.replace(" ", "%20"))
        if url.lower().startswith("sftp:"):
            raise ValueError("redirect to sftp")
        # Credentials in a Location are the server's, not the user's
        self._set_url(re.sub("^([^/?#]*//)[^/?#]*@", r"\1", url))
        if before[:3] == self.origin[:3]:
            # The user is part of an origin
            self.origin = before
        else:
            self.authorization = None
        self.redirects += 1

    @property
    def identity(self):
        """What tells the file from others, None if no HEAD has been answered"""
        return None if self.size is None else (self.size, self.validators)

    def body_size(self):
        """Bytes of the body to expect"""
        if self.fd is None:
            return 0
        return UNKNOWN_BODY if self.size is None else self.size

    def begin_body(self):
        """The body begins: remove what is in the file. Raises DestinationError."""
        try:
            # ext4 flushes a file on close after any truncation, even of an empty file (auto_da_alloc in ext4(5))
            if (self.received or not self.empty) and os.fstat(self.fd).st_size:
                os.ftruncate(self.fd, 0)
        except OSError as e:
            raise unwritable(e) from e
        self.received = 0

    def write(self, data):
        """The next bytes of the body, a memoryview. Raises DestinationError."""
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
    """url without user, password and query, which may contain a token: for messages"""
    return re.sub("^([^/]*//)[^/]*@", r"\1", url).partition("#")[0].partition("?")[0]

def basic_auth(user, password):
    return "Basic " + base64.b64encode(("%s:%s" % (user, password)).encode("utf-8")).decode("ascii")

def ssh_program(path):
    """The ssh that is found in path, a value of PATH"""
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
        # IndexError: Python before 3.10
        return None

def _sftp_path(target):
    """As in fetch2/sftp.py: unquoted; what follows /~/ is relative to the home directory"""
    path = urllib.parse.unquote(target.partition("?")[0], errors="surrogateescape")
    path = (path[3:] if path.startswith("/~/") else path).encode("utf-8", "surrogateescape")
    if not path or b"\0" in path:
        raise ValueError("Not a path")
    return path

def _split(authority):
    """Returns user, password, host and port, "" or 0 if there is none. Raises ValueError without quoting any of them."""
    match = AUTHORITY.fullmatch(authority)
    if not match or int(match[4] or 0) > 65535:
        raise ValueError("Invalid host or port")
    return match[1] or "", match[2] or "", match[3].strip("[]"), int(match[4] or 0)

@functools.lru_cache(maxsize=256)
def _way(scheme, authority, environment, verify):
    """Origin and route of all URLs that begin with scheme://authority"""
    user, _, host, port = _split(authority)
    environment = dict(environment)
    if scheme == "sftp":
        if host.startswith("-"):
            raise ValueError("Not a host name: %s" % host[:80])
        # As written: it may be an alias in ssh's configuration
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
