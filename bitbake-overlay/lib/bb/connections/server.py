#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
The thread with the event loop that owns all shared connections.

A ConnectionServer lives as long as there is something to be done; in between there is no thread and no connection. The
thread that starts it, which is the runqueue's, submits batches of requests, and delivers their answers itself when a
descriptor becomes readable. Other processes use a socket (peers.py). What is known of hosts is in pool.py.

    server = ConnectionServer(connections=4)
    server.start()
    server.submit(requests, answered)
    while ...:
        server.deliver(1)       # waits for a second, and calls answered(request, response, error)
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

# Seconds until stop() gives up, mostly for an ssh that is still logging in
STOP_TIMEOUT = 10
# Longest delay of answers that are not urgent, in seconds; not delayed once this many are waiting
DELAY = 0.05
ENOUGH = 24
# Seconds between switches of threads, and while bodies are awaited
USUAL_SWITCH_INTERVAL = sys.getswitchinterval()
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
    # Without any lock; and once only, since a child of this child may have other files with these numbers
    while _running:
        server = _running.pop()
        _inherited.append(server)
        server.close_descriptors()

os.register_at_fork(after_in_child=_forked)


class Loop(asyncio.SelectorEventLoop):
    """Resolves names in daemon threads: those of the default executor would be joined when the process ends"""

    def run_in_executor(self, executor, function, *args):
        outcome = concurrent.futures.Future()

        def run():
            try:
                outcome.set_result(function(*args))
            except Exception as e:
                outcome.set_exception(e)

        # From now on it cannot be cancelled, which run() does not expect
        outcome.set_running_or_notify_cancel()
        try:
            threading.Thread(target=run, name="connection lookup", daemon=True).start()
        except RuntimeError as e:
            raise OSError(str(e)) from e
        return asyncio.wrap_future(outcome, loop=self)

    def descriptors(self):
        """What a forked child has to close"""
        return [self._selector.fileno(), self._csock.fileno(), *self._selector.get_map()]


class ConnectionServer:
    """
    connections and most are the limits for each host, the latter if it pays, timeout how many seconds without any data
    end a connection, log a function for messages to bitbake's developers, protocols as of Pool. All but wake() is for the
    thread that delivers the answers.

    address     for other processes, while it runs
    is_running  whether requests may be answered; if not, they fail
    pool, peers Pool and Peers, which belong to the loop's thread
    """

    def __init__(self, connections=4, most=None, timeout=100, log=lambda message: None, protocols=PROTOCOLS):
        self.address = None
        self.is_running = False
        self._settings = connections, most or connections, timeout, protocols
        self._log = log
        self._thread = None
        # For requests that are left when the thread ends
        self._error = Cancelled("the build has ended")
        # {request: answered} of those without an answer, and [(request, answered, response, error)] to be delivered
        self._open = {}
        self._answers = collections.deque()
        # How many of both have a body
        self._bodies = 0
        # Whether the descriptor is readable, and the timer that delays that
        self._awake = False
        self._delay = None

    def start(self):
        """Start the thread, and accept other processes. Raises OSError or RuntimeError if that is not possible."""
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
            # The process must not stay because of it if the main thread dies of an exception
            thread = threading.Thread(target=self._run, name="connection server", daemon=True)
            thread.start()
            undo.pop_all()
        self._thread = thread

    def stop(self):
        """
        Fail what has not been answered with Cancelled, close everything and wait for the thread, for STOP_TIMEOUT
        seconds and what one ssh may take. Returns False if it has not ended. Answers can still be delivered.
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
        """In a forked child"""
        own = {self._wakeup.fileno(), self._waker.fileno(), *self._loop.descriptors(), *self.peers.descriptors()}
        files = {request.fd for request in self._open if request.fd is not None}
        for fd in own | files | splice.descriptors:
            with contextlib.suppress(OSError):
                # The parent was about to close it
                os.close(fd)

    def submit(self, requests, answered, first=False):
        """
        Queue requests, if first before all that are not. answered(request, response, error) is called by deliver(),
        once for each. Does not block.
        """
        for request in requests:
            request.first = first
            request.done = self._answered
        self._open.update(dict.fromkeys(requests, answered))
        self._count_bodies(sum(request.fd is not None for request in requests))
        self._call(self.pool.submit, requests)

    def hurry(self, requests):
        """Send those of requests that are still queued before others. Does not block."""
        self._call(self.pool.hurry, requests)

    def reject(self, request):
        """request was answered with another file than it should: count that as absent. Does not block."""
        self._call(self.pool.reject, request)

    def distrust(self, origin):
        """Answers of that host were mixed up: do not pipeline requests to it any more. Does not block."""
        self._call(self.pool.distrust, origin)

    def _call(self, function, *args):
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            # The loop is closed, so deliver() has something to do
            self.wake()

    def fileno(self):
        """A descriptor that is readable if there are answers to deliver"""
        return self._wakeup.fileno()

    def wake(self):
        """Let fileno() become readable, and deliver() return. From any thread."""
        if not self._awake:
            self._awake = True
            with contextlib.suppress(OSError):
                # Closed: nobody waits
                self._waker.send(b"x")

    def deliver(self, seconds=0):
        """
        Call answered() for each answer that has arrived; if there is none, wait for so many seconds, or until wake() is
        called. Once the server has ended, what is left is answered with an error.
        """
        with contextlib.suppress(OSError):
            self._wakeup.settimeout(seconds)
            self._wakeup.recv(16)
        # What is appended to the queue from now on wakes this thread again
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
        While bodies are awaited, let threads take turns more often: each write to a file releases the interpreter's
        lock, and with a thread that only computes the loop has to wait for a switch interval to get it back.
        """
        self._bodies += change
        sys.setswitchinterval(min(SWITCH_INTERVAL, USUAL_SWITCH_INTERVAL) if self._bodies else USUAL_SWITCH_INTERVAL)

    # In the thread

    def _run(self):
        try:
            self.peers.tick()
            self._loop.run_forever()
            self._loop.run_until_complete(self._end())
        except Exception as e:
            self._fail("The thread ends", e)
        finally:
            self.peers.close()
            # A child that is forked from now on has nothing to close but the pair of sockets
            _running.discard(self)
            self._loop.close()
            # For what has no answer, or one that is delayed
            self.wake()

    def _handle(self, loop, context):
        """Of asyncio. An exception in here is a fault of ours: others go on without this thread."""
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
            # One that is cancelled while it connects leaves another one, which waits for its ssh
            others = asyncio.all_tasks() - {asyncio.current_task()}
        # Transports are closed by callbacks
        await asyncio.sleep(0)

    def _answered(self, request, response, error):
        """Of Request"""
        self._answers.append((request, self._open.pop(request), response, error))
        # Not at once: other answers of the same read follow
        due = self._loop.time() + (0 if request.first or len(self._answers) >= ENOUGH else DELAY)
        if not self._delay or due < self._delay.when():
            if self._delay:
                self._delay.cancel()
            self._delay = self._loop.call_at(due, self._end_delay)

    def _end_delay(self):
        self._delay = None
        self.wake()
