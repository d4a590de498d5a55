#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
What is asked of a mirror: a URL, on behalf of an environment.

Made by client.py and server.py, worked off by pool.py and http.py. Knows what
a URL, a redirect and a proxy mean, and does no input or output.

    def done(request, response, error):
        ...
    pool.submit(Request("HEAD", "https://mirror.example/sstate/x", environment, done=done))
"""

import base64
import collections
import urllib.parse
import urllib.request

REDIRECTS = (301, 302, 303, 307, 308)
MAX_REDIRECTS = 10

DEFAULT_PORTS = {"http": 80, "https": 443}

# What of the fetcher's environment decides how a host is reached
ENVIRONMENT = ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "no_proxy", "NO_PROXY",
               "SSL_CERT_FILE", "SSL_CERT_DIR")

# scheme, host in lower case, port number, user ("" if none)
Origin = collections.namedtuple("Origin", "scheme host port user")

# proxy is None or (host, port, value of Proxy-Authorization or None)
Route = collections.namedtuple("Route", "proxy cafile capath verify")


class Request:
    """
    A HEAD or GET of url on behalf of an environment (see ENVIRONMENT).

    fd is where the body of a GET goes, from offset 0 on; it stays the caller's
    and must stay open until done is called. done(request, response, error) is
    called once, from a thread of the pool, and must not block. Raises
    ValueError if url is not one that can be asked for here.
    """
    def __init__(self, method, url, environment, verify=True, authorization=None, fd=None, done=None):
        self.method = method
        self.environment = environment
        self.verify = verify
        self.authorization = authorization
        self.fd = fd
        self.done = done
        self.cancelled = False
        self.attempts = 0
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
        if parts.scheme not in DEFAULT_PORTS or not parts.hostname:
            raise ValueError("Not a http or https URL: %s" % redact(url))
        if any(c <= " " or c > "~" for c in url):
            raise ValueError("Character that a URL cannot have in: %s" % redact(url))
        try:
            port = parts.port or DEFAULT_PORTS[parts.scheme]
        except ValueError:
            # Its own message would have what stands there, which may be half a password
            raise ValueError("Invalid port in: %s" % redact(url)) from None
        self.url = url
        self.origin = Origin(parts.scheme, parts.hostname.lower(), port, parts.username or "")
        self.target = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
        self.route = route(self.origin, self.environment, self.verify)

    def redirect(self, location):
        """Go on at location. Raises ValueError if that is not possible here."""
        before = self.origin
        url = urllib.parse.urljoin(self.url, location.replace(" ", "%20"))
        parts = urllib.parse.urlsplit(url)
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

def route(origin, environment, verify):
    """How to reach origin from environment. Raises ValueError for a proxy of another kind than http."""
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
