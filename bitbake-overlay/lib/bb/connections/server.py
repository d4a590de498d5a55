#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
The thread with the event loop that owns all shared connections.

Used by bb.sharedconnections, bb.presencequery and bb.prefetch in the runqueue's thread, which submits batches of
requests and calls deliver() when a descriptor becomes readable. Other processes use the socket (peers.py). The thread
exists from start() to stop(), so that a resident server parses and forks without it, and owns everything that it uses.
Requests are not handled in here but in pool.py.

    server = ConnectionServer(connections=4)
    server.start()
    server.submit(requests, answered)
    while ...:
        server.deliver(1)       # waits for at most a second and calls answered(request, response, error)
    server.stop()
"""

import asyncio
import collections
import concurrent.futures
import contextlib
import os
import socket
import sys
import threading

from bb.connections import Cancelled, ConnectionCacheError, splice
from bb.connections.peers import Peers
from bb.connections.pool import PROTOCOLS, Pool

# Seconds that stop() waits for the connections to end: longer than ssh.LOGIN_GRACE + 2 * ssh.GRACE
STOP_TIMEOUT = 10
# Seconds by which answers that are not urgent are delayed, so that more of them are delivered together
MAX_DELAY = 0.05
# Number of undelivered answers from which on they are not delayed
MAX_DELAYED = 24
# Seconds between switches of threads while nothing is fetched for this process: the interpreter's default
USUAL_SWITCH_INTERVAL = sys.getswitchinterval()
# The same in seconds while files are fetched for it; see _count_bodies()
SWITCH_INTERVAL = 0.001

# Servers that run in this process
_running = set()
# In a forked child, servers of the parent: they must not be finalized, which would close descriptors again
_inherited = []


def stop_all():
    for server in list(_running):
        server.stop()

def _forked():
    # Takes no lock. Only once: in a child of this child the numbers may belong to other files.
    while _running:
        server = _running.pop()
        _inherited.append(server)
        server.close_descriptors()

os.register_at_fork(after_in_child=_forked)


class Loop(asyncio.SelectorEventLoop):
    """Resolves names in daemon threads, since threads of the default executor are joined when the process ends"""

    def run_in_executor(self, executor, function, *args):
        outcome = concurrent.futures.Future()

        def run():
            try:
                outcome.set_result(function(*args))
            except Exception as e:
                outcome.set_exception(e)

        # From now on the future cannot be cancelled, which run() does not handle
        outcome.set_running_or_notify_cancel()
        try:
            threading.Thread(target=run, name="connection lookup", daemon=True).start()
        except RuntimeError as e:
            raise OSError(str(e)) from e
        return asyncio.wrap_future(outcome, loop=self)

    def descriptors(self):
        return [self._selector.fileno(), self._csock.fileno(), *self._selector.get_map()]


class ConnectionServer:
    """
    connections, most, timeout (seconds) and protocols are as for Pool; log is called with messages for BitBake's
    developers. The methods, except for wake(), are for the thread that delivers the answers.

    address         address for other processes, or None while the server does not run
    is_running      whether requests are handled; if not, they fail
    pool, peers     Pool and Peers, which belong to the event loop's thread
    """

    def __init__(self, connections=4, most=None, timeout=100, log=lambda message: None, protocols=PROTOCOLS):
        self.address = None
        self.is_running = False
        self._settings = connections, most or connections, timeout, protocols
        self._log = log
        self._thread = None
        # The error of requests that are unanswered when the thread ends
        self._error = Cancelled("the build has ended")
        # Both threads change these; each operation is atomic in CPython. {request: answered} without an answer.
        self._open = {}
        # [(request, answered, response, error)] to be delivered
        self._answers = collections.deque()
        # Number of requests in both that have a body
        self._bodies = 0
        # Whether the descriptor has been made readable since the last delivery, and the timer that will do so
        self._awake = False
        self._delay = None

    def start(self):
        """Start the thread and accept other processes. Raises OSError or RuntimeError."""
        with contextlib.ExitStack() as undo:
            self._wakeup, self._waker = (undo.enter_context(sock) for sock in socket.socketpair())
            self._loop = Loop()
            undo.callback(self._loop.close)
            self._loop.set_exception_handler(self._handle)
            self.pool = Pool(self._loop, *self._settings)
            self.peers = Peers(self._loop, self.pool.submit, self._settings[-1], self._log)
            undo.callback(self.peers.close)
            undo.callback(_running.discard, self)
            _running.add(self)
            self.address = self.peers.address
            self.is_running = True
            # A daemon thread, so that the process ends if an exception ends its main thread
            thread = threading.Thread(target=self._run, name="connection server", daemon=True)
            thread.start()
            undo.pop_all()
        self._thread = thread

    def stop(self):
        """
        Fail unanswered requests with Cancelled, close everything and wait for the thread, at most 2 * STOP_TIMEOUT
        seconds. Returns False if it has not ended. Answers can still be delivered.
        """
        thread, self._thread = self._thread, None
        if not thread:
            return True
        self.address = None
        self.is_running = False
        self._call(self._loop.stop)
        thread.join(2 * STOP_TIMEOUT)
        if thread.is_alive():
            return False
        self._wakeup.close()
        self._waker.close()
        return True

    def close_descriptors(self):
        """Called in a forked child"""
        own = {self._wakeup.fileno(), self._waker.fileno(), *self._loop.descriptors(), *self.peers.descriptors()}
        files = {request.fd for request in self._open if request.fd is not None}
        for fd in own | files | splice.descriptors:
            with contextlib.suppress(OSError):
                # The parent may have closed it just before the fork
                os.close(fd)

    def submit(self, requests, answered, first=False):
        """
        Queue requests; first: in front of all that are not. deliver() will call answered(request, response, error) once
        for each. Does not block.
        """
        for request in requests:
            request.first = first
            request.done = self._answered
        self._open.update(dict.fromkeys(requests, answered))
        self._count_bodies(sum(request.fd is not None for request in requests))
        self._call(self.pool.submit, requests)

    def prioritise(self, requests):
        """Move requests, where they are still queued, to the front. Does not block."""
        self._call(self.pool.prioritise, requests)

    def reject(self, request):
        """Treat the file of request as absent, since its content is not what it should be. Does not block."""
        self._call(self.pool.reject, request)

    def disable_pipelining(self, origin):
        """Send requests to a host one by one from now on, since its answers were mixed up. Does not block."""
        self._call(self.pool.disable_pipelining, origin)

    def _call(self, function, *args):
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            # The loop is closed: deliver() will fail the requests
            self.wake()

    def fileno(self):
        """Returns a descriptor that is readable while there are answers to deliver"""
        return self._wakeup.fileno()

    def wake(self):
        """Make fileno() readable and deliver() return. May be called from any thread."""
        if not self._awake:
            self._awake = True
            with contextlib.suppress(OSError):
                # Closed after stop(): no thread waits
                self._waker.send(b"x")

    def deliver(self, seconds=0):
        """
        Call answered() for each answer that has arrived, after waiting for one, or wake(), for at most that many seconds.
        If the server has ended, all remaining requests fail.
        """
        with contextlib.suppress(OSError):
            self._wakeup.settimeout(seconds)
            self._wakeup.recv(16)
        # Answers appended from now on wake this thread again
        self._awake = False
        if self._loop.is_closed():
            while self._open:
                self._answers.append((*self._open.popitem(), None, self._error))
        while self._answers:
            request, answered, response, error = self._answers.popleft()
            if request.fd is not None:
                self._count_bodies(-1)
            answered(request, response, error)

    def _count_bodies(self, change):
        """
        While files are fetched for this process (not for tasks), switch between threads more often: each write to a file releases the interpreter's
        lock, and if another thread computes, the event loop waits for a switch interval to get it back.
        """
        self._bodies += change
        sys.setswitchinterval(min(SWITCH_INTERVAL, USUAL_SWITCH_INTERVAL) if self._bodies else USUAL_SWITCH_INTERVAL)

    # In the event loop's thread

    def _run(self):
        try:
            self.peers.tick()
            self._loop.run_forever()
            self._loop.run_until_complete(self._end())
        except Exception as e:
            self._fail("stopping because of an exception", e)
        finally:
            self.peers.close()
            # A child forked from now on only inherits the pair of sockets
            _running.discard(self)
            self._loop.close()
            # To deliver delayed answers and fail the other requests
            self.wake()

    def _handle(self, loop, context):
        """asyncio's exception handler. An exception in this package ends the thread; its users continue without it."""
        error = context.get("exception")
        if error and not isinstance(error, (OSError, ConnectionCacheError)):
            self._fail(context["message"], error)
            loop.stop()

    def _fail(self, message, error):
        self._log("%s: %r" % (message, error))
        self._error = ConnectionCacheError("internal error: %r" % error)
        self.is_running = False

    async def _end(self):
        self.pool.stop()
        deadline = self._loop.time() + STOP_TIMEOUT
        others = asyncio.all_tasks() - {asyncio.current_task()}
        while others and self._loop.time() < deadline:
            await asyncio.wait(others, timeout=deadline - self._loop.time())
            # A connecting task that is cancelled may start another one, which waits for its ssh to end
            others = asyncio.all_tasks() - {asyncio.current_task()}
        # Transports are closed in callbacks
        await asyncio.sleep(0)

    def _answered(self, request, response, error):
        self._answers.append((request, self._open.pop(request), response, error))
        # Wake the other thread later: further answers of the same read follow
        due = self._loop.time() + (0 if request.first or len(self._answers) >= MAX_DELAYED else MAX_DELAY)
        if not self._delay or due < self._delay.when():
            if self._delay:
                self._delay.cancel()
            self._delay = self._loop.call_at(due, self._end_delay)

    def _end_delay(self):
        self._delay = None
        self.wake()
