# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""The situations of `scripts/bench faults`: mirrors, healthy and not.

Used by bench/faults.py. Most names are those of the project's list of cases
(CASES.md). nginx, sshd and Python's own server are used where they show the
situation, else faultyserver.py. Each mirror is new for each build.

    for situation in SITUATIONS:
        with situation.open(Objects(files, names, work)) as mirror:
            build = Build(..., mirror=mirror.server)
            ... mirror.there, mirror.connections()
"""

import contextlib
import dataclasses
import functools
import http.server
import os
import shlex
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Callable

from netqueue import Problem
from netqueue.lab import behaviours
from netqueue.lab import sshd
from netqueue.lab.build import BuildMirror
from netqueue.lab.faultyserver import Behaviour, FaultyServer
from netqueue.lab.mirror import serve

ODD_SFTP_SERVER = Path(__file__).with_name("oddsftpserver.py")
# A name that cannot exist (RFC 6761), and the seconds in which a resolver that knows that says so
NO_NAME = "mirror.invalid"
RESOLVER_SECONDS = 1
# Some situations need more requests than others
MANY = 4


@dataclasses.dataclass
class Objects:
    """What a mirror serves: files, with the objects of the recipes names. work: a folder for what is made of them."""
    files: Path
    names: list
    work: Path

    def without(self, absent):
        """A folder with links to all but the objects of absent"""
        folder = Path(tempfile.mkdtemp(prefix="some-", dir=self.work))
        for path in self.files.rglob("sstate:*"):
            if path.name.split(":")[1] not in absent:
                link = folder / path.relative_to(self.files)
                link.parent.mkdir(parents=True, exist_ok=True)
                os.link(path, link)
        return folder


@dataclasses.dataclass
class Mirror:
    """
    server is what a Build takes, there how many objects it gives, urls are those of all mirrors if there are more than
    one. watch is called with the build's output now and then. faults returns how often the mirror did something wrong, or
    None if it always does, or that is not known.
    """
    server: object
    there: int
    connections: Callable
    urls: tuple = ()
    watch: Callable = None
    faults: Callable = lambda: None

    def conf(self):
        """What local.conf needs for more than one mirror"""
        lines = " \\n ".join("file://.* %s/PATH;downloadfilename=PATH" % url for url in self.urls)
        return 'SSTATE_MIRRORS = "%s"' % lines if lines else ""


@dataclasses.dataclass
class Situation:
    """
    open is called with Objects, and is a context manager that yields a Mirror. many: the build has MANY times as many
    objects as others, all of one size.
    """
    name: str
    text: str
    open: Callable
    many: bool = False


# Mirrors

@contextlib.contextmanager
def nginx(objects, **options):
    with serve(objects.files, server="nginx", **options) as server:
        limited = "http_extra" in options
        yield Mirror(server, len(objects.names), lambda: server.counters().connections,
                     faults=lambda: server.counters().statuses.get(503, 0) if limited else None)


@contextlib.contextmanager
def faulty(objects, make):
    """make is called with the names, and returns a Behaviour"""
    behaviour = make(objects.names)
    with FaultyServer(objects.files, behaviour) as server:
        yield Mirror(server, behaviour.there, lambda: server.connections, faults=lambda: behaviour.faults)


@contextlib.contextmanager
def second_decides(objects):
    """The first one refuses, the second one has half"""
    with faulty(objects, lambda names: behaviours.Refuses(names, 503)) as first, \
            faulty(objects, lambda names: Behaviour(names, names[::2])) as second:
        yield Mirror(first.server, second.there, lambda: first.connections() + second.connections(),
                     (first.server.url, second.server.url))


@contextlib.contextmanager
def unreachable(objects):
    """A port that nobody listens on"""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield Mirror(BuildMirror("http://127.0.0.1:%d" % taken.getsockname()[1]), 0, lambda: 0)


@contextlib.contextmanager
def unknown_name(objects):
    started = time.monotonic()
    with contextlib.suppress(socket.gaierror):
        socket.getaddrinfo(NO_NAME, 80)
    if time.monotonic() - started > RESOLVER_SECONDS:
        raise Problem("the resolver takes long to say that %s is unknown" % NO_NAME)
    yield Mirror(BuildMirror("http://%s" % NO_NAME), 0, lambda: 0)


class PythonsHandler(http.server.SimpleHTTPRequestHandler):
    """As it is, but silent"""

    def setup(self):
        self.protocol_version = self.server.protocol
        super().setup()

    def log_message(self, *args):
        pass


class PythonsServer(http.server.ThreadingHTTPServer):
    daemon_threads = True
    connections = 0

    def process_request(self, request, client_address):
        self.connections += 1
        super().process_request(request, client_address)

    def handle_error(self, request, client_address):
        # Clients that close
        pass


@contextlib.contextmanager
def pythons(objects, protocol):
    """Python's own server, and half of the objects"""
    absent = objects.names[::2]
    handler = functools.partial(PythonsHandler, directory=str(objects.without(absent)))
    with PythonsServer(("127.0.0.1", 0), handler) as server:
        server.protocol = protocol
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield Mirror(BuildMirror("http://127.0.0.1:%d" % server.server_address[1]), len(objects.names) - len(absent),
                         lambda: server.connections)
        finally:
            server.shutdown()
            thread.join()


@contextlib.contextmanager
def ssh(objects, **options):
    with sshd.serve(objects.files, log=False, **options) as server:
        yield Mirror(server, len(objects.names), lambda: server.counters().connections)


@contextlib.contextmanager
def odd_status(objects):
    """STAT of what is absent says FAILURE, and half is absent"""
    servers = [server for server in sshd.SFTP_SERVERS if os.access(server, os.X_OK)]
    if not servers:
        raise Problem("the program sftp-server is not installed")
    absent = objects.names[::2]
    command = shlex.join([sys.executable, "-I", "-S", str(ODD_SFTP_SERVER), servers[0]])
    with ssh(Objects(objects.without(absent), objects.names, objects.work), extra="ForceCommand " + command) as mirror:
        mirror.there -= len(absent)
        yield mirror


class Absence:
    """sshd is away for so many seconds from the time on when bitbake has parsed the recipes"""

    def __init__(self, server, seconds):
        self.server = server
        self.seconds = seconds
        self.started = None
        server.stop()

    def watch(self, output):
        # It is called by the thread that may start sshd: sshd ends with that thread
        if self.started is None and "Initialising tasks" in output:
            self.started = time.monotonic()
        elif self.started is not None and self.server.process is None and \
                time.monotonic() - self.started > self.seconds:
            self.server.start_again()


@contextlib.contextmanager
def ssh_away(objects, seconds):
    with ssh(objects) as mirror:
        mirror.watch = Absence(mirror.server, seconds).watch
        yield mirror


# The list

def case(name, text, opener, many=False, **options):
    return Situation(name, text, functools.partial(opener, **options), many)


def fault(name, text, make, many=False):
    return Situation(name, text, functools.partial(faulty, make=make), many)


SITUATIONS = [
    case("healthy", "is healthy (nginx)", nginx),
    fault("A1", "swaps neighbouring answers now and then, all objects having one size", behaviours.Swaps, many=True),
    fault("A2", "answers everything with the same HTML page", behaviours.Page),
    fault("B1", "answers 403 for 10 s to a client that sends more than 50 requests a second", behaviours.Bans),
    fault("B3", "answers 204 to HEAD", behaviours.NoContent),
    fault("B5", "ends lines with LF only", behaviours.LineFeeds),
    fault("B6", "sends folded headers, `Transfer-Encoding: identity` and a blank before a colon", behaviours.OldHeaders),
    fault("B7", "answers 500 for what is absent, half of the objects",
          lambda names: behaviours.ErrorForAbsent(names, names[::2])),
    fault("B8", "answers 503 to everything", lambda names: behaviours.Refuses(names, 503)),
    case("B9", "answers 503 to everything, and a second one has half of the objects", second_decides),
    fault("B12", "is away for 25 s while objects are fetched", lambda names: behaviours.GoesAway(names, 25)),
    fault("B13", "answers HEAD of absent objects, half of them, with a body that looks like an answer",
          lambda names: behaviours.StrayBodies(names, names[::2])),
    fault("B14", "loses every tenth object between query and fetch", lambda names: behaviours.Evicts(names, names[4::10])),
    fault("B15", "answers 418 to more than 20 requests a second", behaviours.TooMany),
    fault("B16", "forgets what is behind the first 4 KiB that it reads at once", behaviours.Forgets, many=True),
    fault("C1", "answers for every 20th object after 20 s, if it is asked again at once",
          lambda names: behaviours.SlowFirst(names, names[2::20], 20)),
    fault("C2", "answers 503 with `Retry-After: 60` for three objects", lambda names: behaviours.RefusesSome(names, names[2:5])),
    fault("C3", "answers 503 with `Retry-After: 3600` to everything",
          lambda names: behaviours.Refuses(names, 503, "Retry-After: 3600")),
    fault("C4", "resets the connection for five objects", lambda names: behaviours.ResetsSome(names, names[2:7])),
    case("C5", "allows 100 requests a second, none more (nginx `limit_req`)", nginx,
         http_extra="limit_req_zone $binary_remote_addr zone=rate:1m rate=100r/s;",
         server_extra="limit_req zone=rate;"),
    fault("C6", "needs 0.2 s for each answer", lambda names: behaviours.TakesTime(names, 0.2)),
    case("C7", "sends at most 512 KiB a second over a connection (nginx `limit_rate`)", nginx,
         server_extra="limit_rate 512k;"),
    case("C9", "closes the connection with each 404, half of the objects (Python's server, HTTP/1.1)", pythons,
         protocol="HTTP/1.1"),
    case("python", "closes the connection with each answer, has half of the objects (Python's server)",
         pythons, protocol="HTTP/1.0"),
    fault("C11", "stops answering on all connections that there are, without closing them", behaviours.DiesSilently),
    case("refused", "refuses connections", unreachable),
    case("no-name", "has a name that does not resolve", unknown_name),
    fault("C13", "sends one object at a byte a second", lambda names: behaviours.TricklesSome(names, names[2:3])),
    case("limit_conn", "answers two connections at a time, each with at most 512 KiB a second (nginx `limit_conn`)", nginx,
         http_extra="limit_conn_zone $binary_remote_addr zone=clients:1m;",
         server_extra="limit_conn clients 2; limit_rate 512k;"),
    case("sftp", "is healthy (sshd)", ssh),
    case("sftp-1", "allows one login at a time (sshd's `MaxStartups 1`)", ssh, extra="MaxStartups 1"),
    case("sftp-3", "allows three logins at a time (sshd's `MaxStartups 3`)", ssh, extra="MaxStartups 3"),
    case("B10", "says FAILURE instead of NO_SUCH_FILE for what is absent, half of the objects (sftp)", odd_status),
    case("E3", "is away for the first 15 s (sshd)", ssh_away, seconds=15),
]
