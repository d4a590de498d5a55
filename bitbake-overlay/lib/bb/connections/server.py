#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
The connections of the bitbake server: the pool, and the socket by which
setscene tasks use it.

The runqueue makes one Connections object, starts it before it asks which sstate
objects exist and stops it when it ends, so that no thread and no connection
exists in between: a memory resident server parses, and forks, without any. The
presence query runs in this process and uses the pool directly (client.py finds
it by bb.connections.current()).

One thread owns the socket and the peers. The pool's threads hand it their
answers through a queue and a wake-up pipe. A child that the server forks closes
all of it at once, and takes none of its locks.

    connections = Connections(cooker, d)
    connections.start()                         # fatal error if a variable is invalid
    ...
    connections.stop()

protocol.py says what goes over the socket.
"""

import collections
import contextlib
import os
import secrets
import selectors
import socket
import stat
import struct
import threading
import time

import bb
from bb.connections import ADDRESS, Cancelled, ConnectionCacheError, protocol, set_current, settings
from bb.connections.memory import Memory
from bb.connections.pool import CLASSES, Pool
from bb.connections.request import ENVIRONMENT, Request, last_modified

# select() in server/process.py cannot deal with descriptors from 1024 on, so the
# server takes only so many. Further peers wait in the backlog, and do without the
# server if that takes longer than protocol.SILENCE_SECONDS.
MAX_PEERS = 192
MAX_DESCRIPTORS = 192
BACKLOG = 1024

# Characters of an error, so that it fits into a message whatever it quotes
MAX_TEXT = 1000

# Messages that wait for a peer to read
MAX_OUTPUT = 64

def stop():
    """Stop what runs in this process, for a server that ends in the middle of a build"""
    if bb.connections._current:
        bb.connections._current.stop()

def _forked():
    connections = bb.connections._current
    set_current(None)
    if connections:
        connections.close_descriptors()

os.register_at_fork(after_in_child=_forked)


def serverlog(message):
    # Importing it earlier would be circular: that imports all of bitbake
    import bb.server.process
    bb.server.process.serverlog("Shared connections: " + message)


def summary(what, done, seconds):
    return "%s, %.1f MiB in %.1f s, %s requests over %s connections (%s retries, %s refusals)" % (
        what, done.bytes / 1048576, seconds, done.requests, done.connections, done.retries, done.refusals)


class Peer:
    """A task at the other end of the socket. Owned by the server's thread."""

    def __init__(self, sock):
        self.sock = sock
        self.requests = {}
        self.output = collections.deque()
        self.files = 0


class Connections:
    """What a build's runqueue starts and stops. All methods are for its thread, but for stop()."""

    def __init__(self, cooker, d):
        self.cooker = cooker
        self.d = d
        self.settings = None
        self.pool = None
        self.memory = None
        self.address = None
        # Tasks that fetched something over the pool
        self.objects = 0
        # Who fetches objects ahead over the pool and has to end with it (prefetch.py), or None
        self.prefetch = None
        # Hosts whose trouble the user knows of
        self.told = set()
        self._peers = {}
        self._answers = collections.deque()
        # Of the requests under way, of peers that have left too. A number is taken out before it is
        # closed: a child that closed it again might hit what has the number by then.
        self._files = set()
        # Somebody else's that children close too
        self._kept = set()
        self._stopping = False

    def start(self, needed=True):
        """
        Open the socket, make its address known to the tasks and accept. Does
        not block. If that is not possible the build goes on without it. Fatal
        error if a variable is invalid, also if there is nothing to start.
        """
        try:
            self.settings = settings(self.d)
        except ValueError as e:
            bb.fatal(str(e))
        if not needed or not self.settings.enabled or self.pool:
            return
        self._started = time.monotonic()
        self._stopping = False
        name = "bitbake-" + secrets.token_hex(16)
        self._max_peers = min(self.settings.threads + 16, MAX_PEERS)
        try:
            with contextlib.ExitStack() as opened:
                self._listener = opened.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK))
                self._listener.bind("\0" + name)
                self._listener.listen(BACKLOG)
                self._wakeup, self._waker = map(opened.enter_context, socket.socketpair(
                    socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK))
                self._selector = opened.enter_context(selectors.DefaultSelector())
                self._listening = False
                self._listen()
                self._selector.register(self._wakeup, selectors.EVENT_READ, self._woken)
                self._thread = threading.Thread(target=self._serve, name="connection server")
                self._thread.start()
                opened.pop_all()
        except (OSError, RuntimeError) as e:
            bb.warn("Fetching without shared connections, their socket and thread cannot be made: %s" % e)
            return
        self.pool = Pool(self.settings.connections, self.settings.depth)
        self.memory = Memory(self.pool)
        self.address = "%s:%s" % (os.geteuid(), name)
        self.cooker.extraconfigdata[ADDRESS] = self.address
        set_current(self)

    def stop(self):
        """
        Cancel what is under way, close everything and wait for the threads,
        at most about 20 seconds; a look-up of a name that takes longer goes on.
        Says what was done. May be called more than once.
        """
        pool, self.pool, self.memory = self.pool, None, None
        if not pool:
            return
        self.cooker.extraconfigdata.pop(ADDRESS, None)
        if bb.connections._current is self:
            set_current(None)
        if self.prefetch:
            self.prefetch.stop()
        left = not pool.stop()
        self._stopping = True
        self._wake()
        self._thread.join(10)
        if left or self._thread.is_alive():
            serverlog("a thread does not end")
        if self.prefetch:
            self.prefetch.close()
        self._report(pool)

    def _report(self, pool):
        for host, trouble in pool.troubles():
            if host not in self.told:
                bb.warn("Shared connections to %s were given up for a time: %s" % (host, trouble))
        seconds = time.monotonic() - self._started
        for origin, done in pool.hosts():
            bb.debug(1, "Sstate network, %s://%s: %s" % (origin.scheme, origin.host, summary("%s files" % done.files, done, seconds)))
        done = pool.statistics
        objects = self.objects + (self.prefetch.objects if self.prefetch else 0)
        if done.requests:
            bb.note("Sstate network: %s" % summary("%s objects" % objects, done, seconds))
            bb.event.fire(bb.event.SstateNetworkSummary(objects, done.bytes, seconds, done.requests, done.connections,
                                                        done.retries, done.refusals), self.d)

    def keep_from_children(self, *fds):
        """Let forked children close fds, which are somebody else's"""
        self._kept.update(fds)

    def close_kept(self, *fds):
        """Close what was given to keep_from_children()"""
        for fd in fds:
            self._kept.discard(fd)
            os.close(fd)

    def close_descriptors(self):
        """In a forked child: close what it shares with the server, touching no lock"""
        shared = [self._listener, self._wakeup, self._waker, self._selector]
        if self.pool:
            shared += self.pool.connections()
        shared += [peer.sock for peer in list(self._peers.values())]
        for one in shared:
            one.close()
        for fd in list(self._files) + list(self._kept):
            os.close(fd)

    # In the threads of the pool

    def _done(self, peer, number, request, response, error):
        self._answers.append((peer, number, request, response, error))
        self._wake()

    def _wake(self):
        try:
            self._waker.send(b"x")
        except OSError:
            # Full: it is awake. Closed: it has ended.
            pass

    # In the server's thread

    def _serve(self):
        try:
            due = time.monotonic() + protocol.PROGRESS_SECONDS
            # The main thread is gone if the server died of an exception: do not keep its process
            while not self._stopping and threading.main_thread().is_alive():
                for key, mask in self._selector.select(max(due - time.monotonic(), 0)):
                    key.data(key.fileobj, mask)
                if time.monotonic() >= due:
                    due = time.monotonic() + protocol.PROGRESS_SECONDS
                    self._send_progress()
                    self._listen()
        except Exception as e:
            serverlog("end because of %r" % e)
        finally:
            # If that is not the end of the build, all goes on without
            pool, self.memory = self.pool, None
            if pool:
                pool.stop()
            for peer in list(self._peers.values()):
                self._leave(peer)
            self._collect()
            for sock in (self._listener, self._wakeup, self._waker, self._selector):
                sock.close()

    def _accept(self, listener, mask):
        try:
            sock, _ = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as e:
            # No more descriptors, for example: it is tried again later
            serverlog("cannot accept: %s" % e)
            self._selector.unregister(listener)
            self._listening = False
            return
        sock.setblocking(False)
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        if struct.unpack("3i", credentials)[1] != os.geteuid():
            sock.close()
            return
        peer = self._peers[sock] = Peer(sock)
        self._selector.register(sock, selectors.EVENT_READ, self._ready)
        self._send(peer, {"hello": protocol.VERSION, "schemes": sorted(CLASSES)})
        self._listen()

    def _listen(self):
        """Look at the backlog only while there is room for another peer"""
        room = len(self._peers) < self._max_peers
        if room and not self._listening:
            self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        elif self._listening and not room:
            self._selector.unregister(self._listener)
        self._listening = room

    def _leave(self, peer):
        """Forget peer; its requests end without an answer"""
        if self._peers.pop(peer.sock, None) is None:
            return
        self._selector.unregister(peer.sock)
        peer.sock.close()
        self.objects += bool(peer.files)
        for request in peer.requests.values():
            request.cancelled = True
        self._listen()

    def _ready(self, sock, mask):
        peer = self._peers.get(sock)
        if peer is None:
            # It has left since select()
            return
        if mask & selectors.EVENT_WRITE:
            self._flush(peer)
        if not mask & selectors.EVENT_READ or sock not in self._peers:
            return
        try:
            message, fd = protocol.receive(sock)
        except BlockingIOError:
            return
        except ValueError as e:
            self._reject(peer, e)
            return
        except OSError:
            self._leave(peer)
            return
        if message is None:
            self._leave(peer)
            return
        self._request(peer, message, fd)

    def _reject(self, peer, error):
        serverlog("a peer does not follow the protocol: %s" % error)
        self._send(peer, {"id": None, "error": "protocol", "message": str(error)[:MAX_TEXT]})
        self._leave(peer)

    def _request(self, peer, message, fd):
        """Check message and hand it to the pool. Takes fd."""
        number = message.get("id")
        if fd is not None:
            self._files.add(fd)
        try:
            if not isinstance(number, int) or number in peer.requests:
                raise ValueError("id is not a number, or in use")
            if len(peer.requests) >= protocol.MAX_REQUESTS:
                raise ValueError("more than %s requests at once" % protocol.MAX_REQUESTS)
            method, url = message.get("method"), message.get("url")
            environment = message.get("environment", {})
            verify, authorization = message.get("verify", True), message.get("authorization")
            if method not in ("HEAD", "GET") or (method == "GET") != (fd is not None):
                raise ValueError("not a HEAD, or not a GET with a descriptor")
            if fd is not None and not stat.S_ISREG(os.fstat(fd).st_mode):
                raise ValueError("the descriptor is not of a regular file")
            if not isinstance(url, str) or not isinstance(verify, bool) or not isinstance(environment, dict):
                raise ValueError("a member has the wrong type")
            if any(not isinstance(v, str) for v in environment.values()):
                raise ValueError("a member of environment is not a string")
            if authorization is not None and not (isinstance(authorization, str) and authorization.isascii()
                                                  and authorization.isprintable()):
                raise ValueError("authorization is not a header's value")
        except ValueError as e:
            self._close(fd)
            self._reject(peer, e)
            return
        try:
            if len(self._files) > MAX_DESCRIPTORS:
                raise ValueError("too many files at once")
            environment = {name: environment[name] for name in ENVIRONMENT if name in environment}
            request = Request(method, url, environment, verify, authorization, fd,
                              done=lambda *args: self._done(peer, number, *args))
        except ValueError as e:
            self._close(fd)
            self._send(peer, {"id": number, "error": "url", "message": str(e)[:MAX_TEXT]})
            return
        peer.requests[number] = request
        self._submit(request)

    def _submit(self, request):
        memory = self.memory
        if memory:
            # What is fetched ahead can wait
            memory.submit(request, first=True)
        else:
            request.done(request, None, Cancelled("the build has ended"))

    def _close(self, fd):
        if fd is not None:
            self._files.discard(fd)
            os.close(fd)

    def _woken(self, wakeup, mask):
        try:
            wakeup.recv(4096)
        except BlockingIOError:
            pass
        self._collect()

    def _collect(self):
        """Pass on what the pool has answered"""
        while self._answers:
            peer, number, request, response, error = self._answers.popleft()
            self._close(request.fd)
            if peer.requests.pop(number, None) is None or peer.sock not in self._peers:
                continue
            if error:
                kind = error.kind if isinstance(error, ConnectionCacheError) else "error"
                message = {"id": number, "error": kind, "message": str(error)[:MAX_TEXT]}
            else:
                message = {"id": number, "status": response.status}
                if response.status == 200:
                    message.update(size=response.length, modified=last_modified(response.headers))
                    peer.files += request.method == "GET"
            self._send(peer, message)

    def _send_progress(self):
        for peer in list(self._peers.values()):
            # A peer that does not read gets no more of it
            if not peer.output:
                for number, request in list(peer.requests.items()):
                    self._send(peer, {"id": number, "progress": request.received})

    def _send(self, peer, message):
        peer.output.append(protocol.encode(message))
        if len(peer.output) > MAX_OUTPUT:
            # It asks and does not read
            self._leave(peer)
        else:
            self._flush(peer)

    def _flush(self, peer):
        try:
            while peer.output:
                protocol.send(peer.sock, peer.output[0])
                peer.output.popleft()
        except BlockingIOError:
            pass
        except OSError:
            self._leave(peer)
            return
        if peer.sock in self._peers:
            mask = selectors.EVENT_READ | (selectors.EVENT_WRITE if peer.output else 0)
            self._selector.modify(peer.sock, mask, self._ready)
