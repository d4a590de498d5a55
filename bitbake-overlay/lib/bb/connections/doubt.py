#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
Find out whether answers such as 403 and 503 are about one file or the host.

Used by host.py, in the thread of the event loop. A mirror answers 403 for a file
that does not exist (S3, if listing is not allowed), or because it has been
asked too often; it answers 500 or 503 for one file, or for all. Such answers are
held. One of the files is requested again, and before and after it a file that
was answered before. If that one is not answered, the host fails. If the first
is not either, the answers are about their files. A run of such answers takes up
to three further requests, however long it is.

    doubt = Doubt(pool, settle)
    doubt.hold(request, response, error)
    doubt.proceed(idle, answers)        # calls settle(verdict, held, outcome) in the end
"""

from bb.connections import RefusedError
from bb.connections.health import PAUSE
from bb.connections.request import ABSENT, FORBIDDEN, Request

# Verdicts: the answers are about the files, or about the host, or about the number of requests: the file has another answer now
FILES = "files"
HOST = "host"
ANSWERED = "answered"
# Number of held answers at which the host is probed at once, or considered to fail if it has not answered anything
ENOUGH = 16
# Seconds for which answers are held at most if the host answers others, but nothing that can be asked for again
HELD = 1
# Seconds between probes, so that these do not exceed the server's limit
SPACING = 0.1
# Consecutive verdicts about files after which other requests do not wait for the next verdict
CERTAIN = 3


class Doubt:
    """
    settle is called with a verdict, what it applies to, and the response or the error that led to it, or None.

    held        [(request, response, error)]; either response or error, a RefusedError, is None
    holds_up    only probes may be sent, since the answers might be due to the number of requests
    """

    def __init__(self, pool, settle):
        self.held = []
        self.holds_up = False
        self._pool = pool
        self._settle = settle
        # The request that is asked for again
        self._sample = None
        # (request, status) of a file, preferably one that exists, whose answer was not in doubt
        self._known = None
        self._probing = False
        self._timer = None
        # Verdicts in a row that refusals (True), or statuses (False), are about files
        self._about_files = {True: 0, False: 0}

    @property
    def can_probe(self):
        """Whether there is a file to ask for"""
        return self._known is not None

    def learn(self, answers):
        """Some requests have been answered beyond doubt: [(request, response, error)]"""
        if not self._known or self._known[1] != 200:
            for request, response, error in answers:
                if not error and request.asked == "HEAD" and not request.redirects and not request.probe:
                    if response.status == 200 or not self._known and response.status == 404:
                        self._known = request, response.status

    def is_certain(self, refusals=True):
        """Whether refusals, or statuses, have turned out to be about files again and again"""
        return self._about_files[refusals] >= CERTAIN

    def reset(self, refusals):
        """Discard the verdicts about refusals, or about statuses"""
        self._about_files[refusals] = 0

    def hold(self, request, response, error, holds_up):
        """holds_up: send nothing else until there is a verdict, unless the last ones were all about files"""
        self.held.append((request, response, error))
        self.holds_up = self.holds_up or holds_up and self._known is not None and not self.is_certain(error is not None)

    def clear(self):
        """Returns the requests whose answers were held"""
        requests = [request for request, _, _ in self.held]
        self.held.clear()
        self.holds_up = False
        return requests

    def proceed(self, idle, answers):
        """
        Start a probe if one is due. idle: nothing else is queued or in flight. answers: the host has given
        some that were beyond doubt.
        """
        if not self.held or self._probing:
            return
        if self._known:
            if self.holds_up or idle or len(self.held) >= ENOUGH:
                self._begin()
            elif not self._timer:
                # Together with others
                self._timer = self._pool.loop.call_later(PAUSE, self._begin)
            return
        _, response, error = self.held[0]
        if error:
            self._end(HOST)
        elif idle or len(self.held) >= ENOUGH and not answers and response.status != FORBIDDEN or \
                answers and self._pool.loop.time() - self.held[0][0].sent > HELD:
            self._end(FILES if answers or response.status == FORBIDDEN else HOST)

    def _begin(self):
        if self._timer:
            self._timer.cancel()
            self._timer = None
        if self.held and not self._probing:
            self._probing = True
            if self.holds_up and not self._about_files[self.held[0][2] is not None]:
                self._later(SPACING, self._probe, self._known[0], self._probed)
            else:
                self._ask_later()

    def probe_host(self):
        """Ask for the file that is known"""
        if self._known and not self._probing:
            self._probe(self._known[0], self._probed)

    def _probe(self, request, done):
        self._probing = True
        # By a GET of the first byte if HEAD is refused, or if it is a GET that is in doubt
        probe = Request(request.method, request.url, request.environment, request.verify, request.authorization)
        probe.probe = True
        probe.done = done
        self._pool.submit([probe])

    def _probed(self, request, response, error):
        if not self._is_answered(response):
            self._end(HOST, error)
        elif self.held:
            self._ask_later()
        else:
            self._end(FILES)

    def _is_answered(self, response):
        """Whether the file that is known was answered. It need not be the same answer: it may have been removed meanwhile."""
        if not response or response.status >= 400 and response.status not in ABSENT:
            return False
        self._known = self._known[0], response.status
        return True

    def _later(self, seconds, function, *args):
        self._pool.loop.call_later(seconds if self.holds_up else 0, function, *args)

    def _ask_later(self):
        self._later(PAUSE, self._ask_again)

    def _ask_again(self):
        self._sample = request = self.held[0][0] if self.held else None
        if not request:
            self._end(FILES)
        elif request.fd is not None and request.origin.scheme == "sftp":
            # There is no GET without a file
            self._probe(self._known[0], self._confirmed)
        else:
            self._probe(request, self._sampled)

    def _is_held(self):
        """Whether the verdict still applies; what was held may have failed with the host meanwhile"""
        return bool(self.held) and self.held[0][0] is self._sample

    def _sampled(self, request, response, error):
        if not self._is_held():
            self._ask_later()
        elif isinstance(error, RefusedError) or response and is_doubtful(response):
            # The host may have begun to refuse just now
            self._later(SPACING, self._probe, self._known[0], self._confirmed)
        else:
            self._end(ANSWERED if response else HOST, response or error)

    def _confirmed(self, request, response, error):
        if not self._is_answered(response):
            self._end(HOST, error)
        elif not self._is_held():
            self._ask_later()
        else:
            self._about_files[self.held[0][2] is not None] += 1
            self._end(FILES)

    def _end(self, verdict, outcome=None):
        if verdict == HOST:
            self._about_files = {True: 0, False: 0}
        elif verdict == ANSWERED and self.held:
            self.reset(self.held[0][2] is not None)
        self._probing = self.holds_up = False
        held, self.held = self.held, []
        if not self._pool.stopped:
            self._settle(verdict, held, outcome)


def is_doubtful(response):
    return response.status >= 500 or response.status == FORBIDDEN
