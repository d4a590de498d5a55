#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
The thread with the event loop that owns all shared connections.

A ConnectionServer lives as long as there is something to be done; in between
there is no thread and no connection. Other processes use it over its socket.
The thread that started it hands over batches of requests; their answers wait in
a queue, together with a descriptor that becomes readable. That thread calls everything in here except _run() and what that calls.

A forked child closes the descriptors and takes no lock.

    server = ConnectionServer(connections=4)
    server.start()
    server.submit(requests, answered)
    while ...:
        server.wait(1)
        server.deliver()        # calls answered(request, response, error)
    server.stop()
"""

import asyncio
import collections
import os
import selectors
import select
import socket
import sys
import threading

from bb.connections import Cancelled, ConnectionCacheError, protocol, splice
from bb.connections.peers import Peers
from bb.connections.pool import PROTOCOLS, Pool

# Seconds until stop() gives up, mostly for an ssh that is still logging in
STOP_TIMEOUT = 10
# Longest delay of answers that are not urgent, in seconds; not delayed once this many are waiting
DELAY = 0.05
ENOUGH = 24
# Seconds between switches of threads while bodies are awaited; Python's default is 5 ms
SWITCH_INTERVAL = 0.001

# Servers that run in this process
_running = set()
# Of the parent, in a forked child: nothing in there may be finalised, since that would close descriptors again
_inherited = []


def stop_all():
    """Stop the servers of this process"""
    for server in list(_running):
        server.stop()

def _forked():
    servers = list(_running)
    _running.clear()
    # Once only: a child of this child may have other files with these numbers
    _inherited.extend(servers)
    for server in servers:
        server.close_descriptors()

os.register_at_fork(after_in_child=_forked)


class Loop(asyncio.SelectorEventLoop):
    """Resolves names in threads of their own: those of the default executor would be joined when the process ends"""

    def __init__(self):
        self.selector = selectors.DefaultSelector()
        super().__init__(self.selector)

    async def getaddrinfo(self, host, port, *, family=0, type=0, proto=0, flags=0):
        answer = self.create_future()

        def finish(outcome):
            if not answer.done():
                answer.set_result(outcome)

        def resolve():
            try:
                outcome = socket.getaddrinfo(host, port, family, type, proto, flags)
            except (OSError, UnicodeError) as e:
                outcome = e if isinstance(e, OSError) else OSError("invalid name")
            try:
                self.call_soon_threadsafe(finish, outcome)
            except RuntimeError:
                # The loop was closed meanwhile
                pass

        try:
            threading.Thread(target=resolve, name="connection lookup", daemon=True).start()
        except RuntimeError as e:
            raise OSError(str(e)) from e
        outcome = await answer
        if isinstance(outcome, OSError):
            raise outcome
        return outcome

    def descriptors(self):
        """What a forked child has to close"""
        return [self.selector.fileno(), self._csock.fileno(), *self.selector.get_map()]


class ConnectionServer:
    """
    connections is the limit for each host, peers how many other processes are
    served at the same time, timeout how many seconds without any data end a
    connection, log a function for messages to bitbake's developers.

    address     for other processes, while it runs
    """

    def __init__(self, connections=4, peers=64, timeout=100, log=lambda message: None, protocols=PROTOCOLS):
        self.address = None
        self._settings = connections, timeout, protocols
        self._most_peers = peers
        self._log = log
        self._thread = None
        # [(requests, answered)] to be taken by the loop, and (request, response, error) to be delivered
        self._incoming = collections.deque()
        self._answers = collections.deque()
        self._delayed = None
        # Whether the descriptor is readable
        self._awake = False
        # Bodies that are awaited by submit(), and the interpreter's switch interval without any
        self._bodies = 0
        self._switch_interval = None
        self._fault = None

    def start(self):
        """Start the thread, and accept other processes. Raises OSError or RuntimeError if that is not possible."""
        self._wakeup, self._waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._loop = self._peers = None
        try:
            self._loop = Loop()
            self._loop.set_exception_handler(self._handle)
            self._pool = Pool(self._loop, *self._settings)
            self._peers = Peers(self._loop, self._pool.submit, self._settings[2], self._log, self._most_peers)
            # The process must not stay because of it if the main thread dies of an exception
            thread = threading.Thread(target=self._run, name="connection server", daemon=True)
            thread.start()
        except (OSError, RuntimeError):
            if self._peers:
                self._peers.close()
            if self._loop:
                self._loop.close()
            self._close_pipe()
            raise
        self._thread = thread
        self.address = self._peers.address
        _running.add(self)

    def stop(self):
        """
        Fail what has not been answered with Cancelled, close everything and wait for the thread, for STOP_TIMEOUT
        seconds and what one ssh may take. Returns False if it has not ended. Answers can still be delivered.
        """
        thread, self._thread = self._thread, None
        if not thread:
            return True
        self.address = None
        try:
            self._loop.call_soon_threadsafe(self._loop.stop)
        except RuntimeError:
            # It has ended because of a fault
            pass
        thread.join(2 * STOP_TIMEOUT)
        if thread.is_alive():
            return False
        self._close_pipe()
        return True

    def _close_pipe(self):
        wakeup, waker, self._wakeup, self._waker = self._wakeup, self._waker, None, None
        os.close(wakeup)
        os.close(waker)

    def close_descriptors(self):
        """In a forked child"""
        shared = {self._wakeup, self._waker, *self._loop.descriptors(), *self._peers.descriptors(), *splice.descriptors}
        for host in list(self._pool.hosts.values()):
            shared.update(request.fd for request in host.unanswered())
        for fd in shared:
            if isinstance(fd, int) and fd >= 0:
                try:
                    os.close(fd)
                except OSError:
                    # The parent was about to close it
                    pass

    # The two doors

    @property
    def is_running(self):
        """Whether requests may be answered. If not, they fail."""
        return self._thread is not None and self._fault is None

    def submit(self, requests, answered, first=False):
        """
        Queue requests, if first before all that are not. answered(request, response, error) is called by deliver().
        Does not block.
        """
        for request in requests:
            request.first = first
            request.context = answered
            request.done = self._answered
            self._count_bodies(request, 1)
        self._incoming.append(requests)
        self._call(self._take)

    def hurry(self, requests):
        """Send those of requests that are still queued before others. Does not block."""
        self._call(self._pool.hurry, requests)

    def _call(self, function, *args):
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            # The loop is closed
            self._refuse()

    def wake(self):
        """Let wait() return, and the descriptor become readable. From any thread."""
        if not self._awake:
            self._awake = True
            try:
                os.write(self._waker, b"x")
            except (OSError, TypeError):
                # It is closed, nobody waits
                pass

    def fileno(self):
        """A descriptor that is readable if there are answers to deliver"""
        return self._wakeup

    def wait(self, seconds):
        """Block until there are answers, wake() is called, or for so many seconds"""
        if self._wakeup is not None:
            poll = select.poll()
            poll.register(self._wakeup, select.POLLIN)
            poll.poll(seconds * 1000)

    def deliver(self):
        """Call answered() for each answer that has arrived"""
        if self._wakeup is not None:
            try:
                os.read(self._wakeup, 16)
            except BlockingIOError:
                pass
        # What is appended to the queue from now on wakes this thread again
        self._awake = False
        while self._answers:
            request, response, error = self._answers.popleft()
            self._count_bodies(request, -1)
            request.context(request, response, error)

    def _count_bodies(self, request, number):
        """
        While bodies are awaited, let threads take turns more often: each write to a file releases the interpreter's
        lock, and with a thread that only computes the loop has to wait for a switch interval to get it back.
        """
        if request.fd is not None:
            self._bodies += number
            if self._switch_interval is None:
                self._switch_interval = sys.getswitchinterval()
                sys.setswitchinterval(min(SWITCH_INTERVAL, self._switch_interval))
            elif not self._bodies:
                sys.setswitchinterval(self._switch_interval)
                self._switch_interval = None

    def is_healthy(self, origin, route):
        """As Pool.is_healthy()"""
        return self._pool.is_healthy(origin, route)

    def has_answered(self, origin):
        """Whether a host has given any answer so far"""
        host = self._pool.hosts.get(origin)
        return host is not None and host.health.answers > 0

    def statistics(self):
        """{Origin: Statistics}"""
        return {host.origin: host.statistics for host in list(self._pool.hosts.values())}

    def troubles(self):
        """[(name of a host, reason)] of those that have been suspended"""
        return [(host.origin.host, host.health.trouble) for host in list(self._pool.hosts.values()) if host.health.trouble]

    def busy_seconds(self):
        """As Pool.busy_seconds()"""
        return self._pool.busy_seconds()

    def peers_served(self):
        """How many other processes have got a file"""
        return self._peers.served

    # In the thread

    def _run(self):
        try:
            self._peers.listen()
            self._tick()
            self._loop.run_forever()
            self._loop.run_until_complete(self._end())
        except Exception as e:
            self._log("ends because of %r" % e)
            self._fault = self._fault or e
        finally:
            # A child that is forked from now on has nothing to close but the pipe
            _running.discard(self)
            self._loop.close()
            self._refuse()
            # For answers whose wake-up has been delayed
            self.wake()

    def _tick(self):
        self._peers.send_progress()
        self._loop.call_later(protocol.PROGRESS_SECONDS, self._tick)

    def _handle(self, loop, context):
        """Of asyncio. An exception in here is a fault of ours: others go on without this thread."""
        error = context.get("exception")
        if error and not isinstance(error, (OSError, ConnectionCacheError)):
            self._log("%s: %r" % (context["message"], error))
            self._fault = self._fault or error
            loop.stop()

    async def _end(self):
        self._peers.close_listener()
        self._pool.stop()
        deadline = self._loop.time() + STOP_TIMEOUT
        others = asyncio.all_tasks() - {asyncio.current_task()}
        while others and self._loop.time() < deadline:
            await asyncio.wait(others, timeout=deadline - self._loop.time())
            # One that is cancelled while it connects leaves another one, which waits for its ssh
            others = asyncio.all_tasks() - {asyncio.current_task()}
        # Transports are closed by callbacks
        await asyncio.sleep(0)
        self._peers.close()

    def _take(self):
        try:
            requests = self._incoming.popleft()
        except IndexError:
            return
        self._pool.submit(requests)

    def _refuse(self):
        """The loop does not run any more. Also called by other threads."""
        while self._incoming:
            try:
                requests = self._incoming.popleft()
            except IndexError:
                return
            error = ConnectionCacheError("internal error: %r" % self._fault) if self._fault else Cancelled("the build has ended")
            self._answers.extend((request, None, error) for request in requests)
            self.wake()

    def _answered(self, request, response, error):
        """Of Request"""
        self._answers.append((request, response, error))
        if request.first or len(self._answers) >= ENOUGH:
            self._wake()
        elif not self._delayed:
            self._delayed = self._loop.call_later(DELAY, self._wake)

    def _wake(self):
        if self._delayed:
            self._delayed.cancel()
            self._delayed = None
        self.wake()
