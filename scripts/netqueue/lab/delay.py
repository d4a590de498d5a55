# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""A round trip time on loopback: a TCP proxy that holds back what passes through it.

The benchmarks and tests put it before a mirror. Half of the time is added in
each direction; connecting costs a round trip, too, which the first bytes of
the client wait for since the kernel accepts at once. Everything is stamped
when it arrives and passed on when it is due, whatever else is under way: what
is sent at once arrives at once, and a pipeline stays one. Order, half-close and
reset are kept; a receiver that does not read holds its sender back.

With rate it is a link of so many bytes a second towards the client, which all
connections share. There is no loss and no slow start, unlike on a real one.

The proxy is a process of its own, so that a busy Python thread of the caller
does not disturb it. It ends with stop() or with its parent.

    with delayed(mirror.port, seconds=0.02) as link:
        ask("http://localhost:%d/" % link.port)
        print(link.connections)
"""

import collections
import contextlib
import errno
import functools
import heapq
import json
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import time

BACKLOG = 1024
CHUNK = 64 * 1024
# Bytes under way in one direction of a connection before its sender has to wait, as TCP's window: 400 MB/s at 20 ms
WINDOW = 4 * 1024 * 1024
# Seconds of data that may wait for a link with a rate, and the least that is read for it at a time
LINK_QUEUE = 0.05
LINK_CHUNK = 2048
STOP_SECONDS = 5

# What may be in a queue beside bytes
END = object()
RESET = object()


@contextlib.contextmanager
def delayed(port, seconds=0.02, rate=None):
    """Pass on to 127.0.0.1:port until the block ends. Yields a Delayed.

    seconds: the round trip time. rate: bytes a second towards the client, all connections together.
    """
    link = Delayed(port, seconds, rate)
    try:
        yield link
    finally:
        link.stop()


class Delayed:
    """A running proxy. port: where it listens on 127.0.0.1. pid: its process."""

    def __init__(self, target, seconds, rate):
        self._count = 0
        with contextlib.ExitStack() as stack:
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=BACKLOG))
            self.port = listener.getsockname()[1]
            self._control, control = socket.socketpair()
            stack.enter_context(control)
            options = {"listener": listener.fileno(), "control": control.fileno(), "target": target,
                       "seconds": seconds, "rate": rate}
            try:
                self._process = subprocess.Popen([sys.executable, "-I", "-S", __file__, json.dumps(options)],
                                                 stdin=subprocess.DEVNULL, pass_fds=(listener.fileno(), control.fileno()))
            except BaseException:
                self._control.close()
                raise
            self.pid = self._process.pid

    @property
    def connections(self):
        """How many were accepted, up to those that have just connected. After stop() those until then."""
        if self._process:
            try:
                self._control.sendall(b"?")
                self._count, = struct.unpack("Q", self._control.recv(8, socket.MSG_WAITALL))
            except (OSError, struct.error) as error:
                raise RuntimeError("the proxy has ended with %s" % self._process.wait(STOP_SECONDS)) from error
        return self._count

    def stop(self):
        """End it and all connections. Idempotent."""
        if not self._process:
            return
        with contextlib.suppress(RuntimeError):
            self._count = self.connections
        self._control.close()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None


# In the process of its own

class End:
    """The socket to the client or to the server. inward: the Flow of what it sends, outward: of what it gets."""

    def __init__(self, sock):
        self.sock = sock
        self.inward = self.outward = None
        self.mask = 0


class Flow:
    """One direction of a connection. queue: (when it is due, bytes or END or RESET)."""

    def __init__(self, source, sink, linked, floor):
        self.source, self.sink = source, sink
        source.inward = sink.outward = self
        self.linked = linked        # passes over the link with the rate
        self.last = floor           # nothing is due before what precedes it
        self.queue = collections.deque()
        self.size = 0
        self.reading = True
        self.paused = False         # the link is full
        self.blocked = False        # the sink takes no more
        self.done = False           # END or RESET was passed on


class Proxy:
    def __init__(self, listener, control, target, seconds, rate):
        self.listener = socket.socket(fileno=listener)
        self.control = socket.socket(fileno=control)
        self.target = ("127.0.0.1", target)
        self.half = seconds / 2
        self.rate = rate
        self.link_free = 0
        self.chunk = CHUNK if rate is None else min(CHUNK, max(LINK_CHUNK, int(rate * LINK_QUEUE / 4)))
        self.accepted = 0
        self.timers = []        # (when, a number to keep their order, function)
        self.numbers = 0
        self.ends = {}
        self.epoll = select.epoll()

    def run(self):
        for sock in (self.listener, self.control):
            sock.setblocking(False)
            self.epoll.register(sock, select.EPOLLIN)
        while True:
            timeout = max(0, self.timers[0][0] - time.monotonic()) if self.timers else None
            # epoll's own time-out is in milliseconds, rounded up
            select.select([self.epoll], [], [], timeout)
            for fd, events in self.epoll.poll(0):
                if fd == self.control.fileno():
                    if not self.tell():
                        return
                elif fd == self.listener.fileno():
                    self.accept()
                elif fd in self.ends:
                    self.handle(self.ends[fd], events)
            now = time.monotonic()
            while self.timers and self.timers[0][0] <= now:
                heapq.heappop(self.timers)[2]()

    def at(self, when, function):
        self.numbers += 1
        heapq.heappush(self.timers, (when, self.numbers, function))

    def tell(self):
        """Answer how many connections there were. Returns False if nobody asks any more."""
        questions = self.control.recv(64)
        self.accept()
        for _ in questions:
            self.control.sendall(struct.pack("Q", self.accepted))
        return bool(questions)

    def accept(self):
        while True:
            try:
                sock = self.listener.accept()[0]
            except BlockingIOError:
                return
            except ConnectionAbortedError:
                continue
            self.accepted += 1
            now = time.monotonic()
            client, server = End(sock), End(socket.socket())
            for end in (client, server):
                end.sock.setblocking(False)
                end.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self.ends[end.sock.fileno()] = end
            # The client may send after a round trip, it arrives half of one later
            Flow(client, server, False, now + 3 * self.half)
            Flow(server, client, self.rate is not None, now)
            self.watch(client)
            self.at(now + self.half, functools.partial(self.connect, server))

    def connect(self, server):
        if server.sock.fileno() < 0:
            return
        if server.sock.connect_ex(self.target) in (0, errno.EINPROGRESS):
            self.watch(server)
        else:
            self.reset_from(server)

    def watch(self, end):
        """Ask for the events that end's flows can use. Without any it is not watched: a hang-up cannot be masked."""
        inward, outward = end.inward, end.outward
        mask = 0
        if inward.reading and not inward.paused and inward.size < WINDOW:
            mask |= select.EPOLLIN
        if outward.blocked:
            mask |= select.EPOLLOUT
        if mask == end.mask:
            return
        if not end.mask:
            self.epoll.register(end.sock, mask)
        elif mask:
            self.epoll.modify(end.sock, mask)
        else:
            self.epoll.unregister(end.sock)
        end.mask = mask

    def handle(self, end, events):
        if events & ~select.EPOLLOUT and end.mask & select.EPOLLIN:
            self.read(end.inward)
        if events & ~select.EPOLLIN and end.mask & select.EPOLLOUT:
            end.outward.blocked = False
            self.release(end.outward)

    def read(self, flow):
        try:
            data = flow.source.sock.recv(self.chunk)
        except BlockingIOError:
            return
        except OSError:
            data = RESET
        if not data:
            data = END
        self.put(flow, data)

    def put(self, flow, data):
        """Queue data for the sink of flow"""
        now = leaves = time.monotonic()
        if data is END or data is RESET:
            flow.reading = False
        else:
            flow.size += len(data)
            if flow.linked:
                self.link_free = leaves = max(self.link_free, now) + len(data) / self.rate
                if leaves > now + LINK_QUEUE:
                    flow.paused = True
                    self.at(leaves - LINK_QUEUE, functools.partial(self.resume, flow))
        flow.last = max(flow.last, leaves + self.half)
        flow.queue.append((flow.last, data))
        if len(flow.queue) == 1 and not flow.blocked:
            self.at(flow.last, functools.partial(self.release, flow))
        self.watch(flow.source)

    def resume(self, flow):
        flow.paused = False
        if flow.source.sock.fileno() >= 0:
            self.watch(flow.source)

    def release(self, flow):
        """Pass on what is due; see to it that the rest is, in time or when there is room"""
        now = time.monotonic()
        try:
            while flow.queue and flow.queue[0][0] <= now and not flow.done:
                self.pass_on(flow)
        except BlockingIOError:
            flow.blocked = True
        except OSError:
            self.drop(flow)
            self.reset_from(flow.sink)
        if flow.done and (flow.sink.inward.done or flow.sink.sock.fileno() < 0):
            self.close(flow)
            return
        if flow.queue and not flow.blocked:
            self.at(flow.queue[0][0], functools.partial(self.release, flow))
        self.watch(flow.source)
        self.watch(flow.sink)

    def pass_on(self, flow):
        due, data = flow.queue[0]
        sock = flow.sink.sock
        if data is RESET:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            # The other direction has nobody to talk to either
            self.drop(flow)
            self.drop(flow.sink.inward)
            return
        if data is END:
            flow.done = True
            sock.shutdown(socket.SHUT_WR)
        else:
            sent = sock.send(data)
            flow.size -= sent
            if sent < len(data):
                flow.queue[0] = (due, memoryview(data)[sent:])
                return
        flow.queue.popleft()

    def drop(self, flow):
        """Nobody gets what is under way in flow"""
        flow.queue.clear()
        flow.size = 0
        flow.done = True
        flow.reading = flow.blocked = False

    def reset_from(self, end):
        """end is gone: let the other one know"""
        if end.inward.done:
            return
        self.put(end.inward, RESET)

    def close(self, flow):
        for end in (flow.source, flow.sink):
            if end.mask:
                self.epoll.unregister(end.sock)
                end.mask = 0
            self.ends.pop(end.sock.fileno(), None)
            end.sock.close()


def main(options):
    # Ctrl-C at a terminal is the parent's; it ends this process
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    Proxy(**options).run()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
