#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
What is asked of a mirror: a URL, on behalf of an environment; and the answer.

Made by client.py, server.py, presencequery.py and prefetch.py, worked off by
host.py, http.py and sftp.py. Knows what a URL, a redirect and a proxy mean, and
does no input or output, but for looking where ssh is.

    def done(request, response, error):
        ...
    pool.submit(Request("HEAD", "https://mirror.example/sstate/x", environment, done=done))
"""

import base64
import collections
import email.utils
import functools
import os
import shutil
import time
import urllib.parse
import urllib.request

REDIRECTS = (301, 302, 303, 307, 308)
MAX_REDIRECTS = 10
HEAD_REFUSED = (403, 405)

# Statuses which say that there is no such file, and those which say that there is none for us
ABSENT = (404, 410)
MISSING = ABSENT + (401, 403, 405)

# Of the size of a file
MAX_DIGITS = 18

# Without a port for sftp it is ssh's configuration that says which
DEFAULT_PORTS = {"http": 80, "https": 443, "sftp": 0}

# What of the fetcher's environment decides how a host is reached. Of all that the fetcher exports for sftp(1), ssh gets
# what its configuration may need, above all a ProxyCommand.
HTTP_ENVIRONMENT = ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "no_proxy", "NO_PROXY",
                    "SSL_CERT_FILE", "SSL_CERT_DIR")
ENVIRONMENT = HTTP_ENVIRONMENT + (
    "HOME", "PATH", "USER", "LOGNAME", "SSH_AUTH_SOCK", "SSH_AGENT_PID", "DBUS_SESSION_BUS_ADDRESS",
    "ALL_PROXY", "all_proxy", "SOCKS5_USER", "SOCKS5_PASSWD",
    "AWS_PROFILE", "AWS_SHARED_CREDENTIALS_FILE", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ROLE_ARN",
    "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_DEFAULT_REGION", "AWS_SESSION_TOKEN")

# scheme, host (in lower case, but for sftp), port number, user ("" if none)
Origin = collections.namedtuple("Origin", "scheme host port user")

# proxy is None or (host, port, value of Proxy-Authorization or None)
Route = collections.namedtuple("Route", "proxy cafile capath verify")

# status is HTTP's, or what is like it. headers have names in lower case. length
# is what the server announced, None if it did not.
Response = collections.namedtuple("Response", "status headers length")


class SSHRoute:
    """
    How ssh is started: its environment, a tuple of (name, value). PATH, which is another one for each recipe, has to
    find the same ssh for two to be equal. Then one connection serves both, with the PATH of the one that came first.
    """
    __slots__ = ("environment", "_compared")

    def __init__(self, environment):
        self.environment = environment
        others = dict(environment)
        self._compared = os.path.realpath(ssh_program(others.pop("PATH", ""))), tuple(others.items())

    def __eq__(self, other):
        return isinstance(other, SSHRoute) and self._compared == other._compared

    def __hash__(self):
        return hash(self._compared)


class Request:
    """
    A HEAD or GET of url on behalf of an environment (see ENVIRONMENT). For sftp
    HEAD means STAT.

    fd is where the body of a GET goes, from offset 0 on; it stays the caller's
    and must stay open until done is called. Without it a GET asks for a byte
    only, for servers that refuse HEAD. size is how many bytes a HEAD has
    announced before, None if there was none. done(request, response, error) is
    called once and must not block: from a thread of the pool, or at once from the
    one that submits. Raises ValueError if url is not one that can be asked for here.
    """
    __slots__ = ("method", "environment", "verify", "authorization", "fd", "size", "done", "cancelled", "attempts",
                 "refusals", "answers", "first", "redirects", "received", "sent", "url", "origin", "target", "route")

    def __init__(self, method, url, environment, verify=True, authorization=None, fd=None, size=None, done=None):
        self.method = method
        self.environment = environment
        self.verify = verify
        self.authorization = authorization
        self.fd = fd
        self.size = size
        self.done = done
        self.cancelled = False
        # The pool's: failures, how often it was refused, how many answers its host had given at the last failure,
        # when it was last sent, and whether it comes before others
        self.attempts = 0
        self.refusals = 0
        self.answers = 0
        self.sent = 0
        self.first = False
        self.redirects = 0
        # Bytes of the body so far, for whoever wants to show progress
        self.received = 0
        self._set_url(url)

    def _set_url(self, url):
        try:
            parts = urllib.parse.urlsplit(url)
        except ValueError:
            # Its message may quote the password
            raise ValueError("Not a valid URL") from None
        if parts.scheme not in DEFAULT_PORTS or not parts.netloc:
            raise ValueError("Not a http, https or sftp URL: %s" % redact(url))
        if parts.scheme != "sftp" and (not url.isascii() or not url.isprintable() or " " in url):
            raise ValueError("Character that a URL cannot have in: %s" % redact(url))
        try:
            self.origin = _origin(parts.scheme, parts.netloc)
        except ValueError as e:
            # With a slash or the like in it, a password is not where redact() looks for it
            raise ValueError("%s: %s" % (e, redact(parts.scheme + "://" + url.partition("://")[2].rpartition("@")[2]))) from None
        self.url = url
        if parts.scheme == "sftp":
            self._set_path(parts)
            self.route = _ssh_route(tuple((name, self.environment[name]) for name in ENVIRONMENT if name in self.environment))
        else:
            self.target = (parts.path or "/") + ("?" + parts.query if parts.query else "")
            self.route = route(self.origin, self.environment, self.verify)

    def _set_path(self, parts):
        """As fetch2/sftp.py: unquoted, and what follows /~/ is in the user's home directory"""
        path = urllib.parse.unquote(parts.path, errors="surrogateescape")
        self.target = path[3:] if path.startswith("/~/") else path
        try:
            self.target.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:
            self.target = None
        if not self.target or "\0" in self.target:
            raise ValueError("Not a path: %s" % redact(self.url))

    @property
    def key(self):
        """Requests with the same key have the same answer"""
        return self.url, self.authorization, self.route

    def redirect(self, location):
        """Go on at location. Raises ValueError if that is not possible here."""
        before = self.origin
        url = urllib.parse.urljoin(self.url, location.replace(" ", "%20"))
        parts = urllib.parse.urlsplit(url)
        if parts.scheme == "sftp":
            raise ValueError("a redirect to sftp")
        # Credentials in a Location are the server's idea, not the user's
        self._set_url(urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])))
        if before[:3] == self.origin[:3]:
            # The user counts among what a connection belongs to
            self.origin = before
        else:
            self.authorization = None
        self.redirects += 1


def redact(url):
    """url without user, password and query, which may hold a token: for messages"""
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError:
        return "(invalid URL)"
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))

def basic_auth(user, password):
    return "Basic " + base64.b64encode(("%s:%s" % (user, password)).encode("utf-8")).decode("ascii")

@functools.lru_cache(maxsize=256)
def _origin(scheme, netloc):
    """Raises ValueError if netloc is none"""
    parts = urllib.parse.SplitResult(scheme, netloc, "", "", "")
    if not parts.hostname:
        raise ValueError("Not a http, https or sftp URL")
    try:
        port = parts.port or DEFAULT_PORTS[scheme]
    except ValueError:
        # Its own message would have what stands there, which may be half a password
        raise ValueError("Invalid port in") from None
    if scheme == "sftp":
        return Origin(scheme, ssh_host(netloc), port, urllib.parse.unquote(parts.username or ""))
    return Origin(scheme, parts.hostname, port, parts.username or "")

def ssh_host(netloc):
    """The host as it was written, since an alias in ssh's configuration is what it is"""
    host = netloc.rpartition("@")[2]
    host = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    if host.startswith("-"):
        raise ValueError("Not a host name: %s" % host[:80])
    return host

def ssh_program(path):
    """The ssh that is found in path, a value of PATH"""
    return shutil.which("ssh", path=path) or "/usr/bin/ssh"

@functools.lru_cache(maxsize=256)
def _ssh_route(environment):
    return SSHRoute(environment)

def route(origin, environment, verify):
    """How to reach origin from environment. Raises ValueError for a proxy of another kind than http."""
    return _route(origin, tuple(sorted(environment.items())), verify)

@functools.lru_cache(maxsize=256)
def _route(origin, environment, verify):
    environment = dict(environment)
    proxies = {}
    # Lower case wins, as for urllib and wget
    for name in ("http", "https", "no"):
        value = environment.get(name + "_proxy") or environment.get(name.upper() + "_PROXY")
        if value:
            proxies[name] = value

    proxy = proxies.get(origin.scheme)
    if proxy and not urllib.request.proxy_bypass_environment("%s:%s" % (origin.host, origin.port), proxies):
        try:
            parts = urllib.parse.urlsplit(proxy if "://" in proxy else "http://" + proxy)
            port = parts.port or 80
        except ValueError:
            # Its message may quote half of a password
            raise ValueError("Not a valid URL of a proxy") from None
        if parts.scheme != "http" or not parts.hostname:
            raise ValueError("Not a http proxy: %s" % redact(proxy))
        auth = None
        if parts.username:
            auth = basic_auth(urllib.parse.unquote(parts.username), urllib.parse.unquote(parts.password or ""))
        proxy = (parts.hostname, port, auth)
    else:
        proxy = None

    if origin.scheme != "https":
        return Route(proxy, None, None, True)
    return Route(proxy, environment.get("SSL_CERT_FILE"), environment.get("SSL_CERT_DIR"), verify)

def of_whole_file(response):
    """response to a GET of the first byte as if it were one to a HEAD (RFC 9110 14.4)"""
    if response.status not in (206, 416):
        return response
    size = response.headers.get("content-range", "").rpartition("/")[2]
    size = int(size) if size.isascii() and size.isdigit() and len(size) <= MAX_DIGITS else None
    if response.status == 416 and size != 0:
        return response
    return Response(200, response.headers, size)

def discard(fd):
    """Empty the file fd of what an earlier attempt has left. Raises OSError."""
    # A file that was truncated, be it empty, ext4 writes to the disk when it is closed (auto_da_alloc in ext4(5))
    if os.fstat(fd).st_size:
        os.ftruncate(fd, 0)

def retry_after(headers):
    """Retry-After (RFC 9110 10.2.3) in seconds, or None"""
    value = headers.get("retry-after", "").strip()
    if value.isascii() and value.isdigit():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (IndexError, TypeError, ValueError, OverflowError):
        # The first only of older Pythons
        return None

def last_modified(headers):
    """Last-Modified (RFC 9110 8.8.2) in seconds since the epoch, or None"""
    try:
        return email.utils.parsedate_to_datetime(headers["last-modified"]).timestamp()
    except (KeyError, IndexError, TypeError, ValueError, OverflowError):
        return None
