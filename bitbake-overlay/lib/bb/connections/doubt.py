#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
Answers which are about a file or about the host, and nothing tells which.

Used by host.py, in the thread of the event loop. A mirror says 403 for a file
that does not exist (S3, if listing is not allowed), or because it has been
asked too often; it says 500 for one file, or for all. Such answers are held.
One of the files is asked for again, and if the answer is the same, so is a file
that had another one before: if it still has, the answers are about their files.
A run of such answers takes two further requests, however long it is.

    doubt = Doubt(pool, settle)
    doubt.hold(request, response)
    doubt.proceed(idle)         # settle(verdict, [(request, response), ...]) is called in the end
"""

from bb.connections.request import ABSENT, FORBIDDEN, Request

# Verdicts: the answers are about the files, or about the host, or the host answers now that it is asked for one file only
FILES = "files"
HOST = "host"
ANSWERED = "answered"
# Answers of a host which has not answered anything else that are enough to believe that it cannot
ENOUGH = 16


class Doubt:
    """
    settle is called with a verdict and what it applies to.

    held        [(request, response)]
    """

    def __init__(self, pool, settle):
        self.held = []
        self._pool = pool
        self._settle = settle
        # (request, status) of a file, best of one that exists, whose answer was beyond doubt
        self._known = None
        # (request, status) of the one that is asked for again
        self._sample = None
        self._probing = False

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

    def hold(self, request, response):
        self.held.append((request, response))

    def proceed(self, idle, answers):
        """
        Find out what is to be found out. idle: there is nothing else to be sent or answered. answers: the host has given
        any that were beyond doubt.
        """
        if not self.held or self._probing:
            return
        # The answer to a GET is not that to a HEAD
        sample = next(((request, response.status) for request, response in self.held if request.fd is None), None)
        if self._known and sample:
            self._sample = sample
            self._probe(sample[0], self._sampled)
        elif self._known:
            self._probe(self._known[0], self._probed)
        elif idle or len(self.held) >= ENOUGH and not answers and self.held[0][1].status != FORBIDDEN:
            self._end(FILES if answers or self.held[0][1].status == FORBIDDEN else HOST)

    def probe_host(self):
        """Ask for the file that is known"""
        if self._known and not self._probing:
            self._probe(self._known[0], self._probed)

    def _probe(self, known, done):
        self._probing = True
        # By a GET of the first byte if HEAD is refused
        probe = Request(known.method, known.url, known.environment, known.verify, known.authorization)
        probe.first = probe.probe = True
        probe.done = done
        self._pool.submit([probe])

    def _sampled(self, request, response, error):
        if response and response.status == self._sample[1]:
            self._probe(self._known[0], self._probed)
        else:
            self._end(ANSWERED if response else HOST)

    def _probed(self, request, response, error):
        if response and (response.status < 400 or response.status in ABSENT):
            # It need not be the same answer: the file may have been removed meanwhile
            self._known = self._known[0], response.status
            self._end(FILES)
        else:
            self._end(HOST)

    def _end(self, verdict):
        self._probing = False
        held, self.held = self.held, []
        if held:
            self._settle(verdict, held)
