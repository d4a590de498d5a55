#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
Determine whether answers such as 403 and 503 concern one file or the whole host.

Used by host.py and failures.py in the event loop's thread. A mirror answers 403
if a file does not exist (S3 without the permission to list) or if a client sends
too many requests; it answers 500 or 503 for one file or for all. Such answers
are held back while probes are sent: the first of the requests again, and before
and after it a request for a reference file, which was answered earlier. If the
reference fails, the host fails. If only the other one fails again, the answers
concern their files. A run of such answers costs at most three probes, however
long it is. What follows from the verdict is decided in failures.py.

    diagnosis = Diagnosis(pool, report)
    diagnosis.hold(request, response, error, probes_only)
    diagnosis.proceed(idle, answers)        # calls report(verdict, held, outcome) in the end
"""

from bb.connections import RefusedError
from bb.connections.health import PAUSE
from bb.connections.request import ABSENT, FORBIDDEN, Request

# Verdict: the held answers concern their files
FILES = "files"
# Verdict: the host fails
HOST = "host"
# Verdict: the repeated request was answered, so the held ones were refused because of the request rate
ANSWERED = "answered"
# Number of held answers at which probing starts at once, or without a reference the host fails; enough to be no accident
MAX_HELD = 16
# Seconds for which answers are held if the host answers other requests, but there is no reference to probe
HOLD_SECONDS = 1
# Seconds between probes, so that they do not exceed common rate limits of servers
PROBE_SPACING = 0.1
# Consecutive verdicts about files after which other requests do not wait for the next verdict
CERTAIN_AFTER = 3


class Diagnosis:
    """
    report is called with a verdict, the held answers, and the response or error of the deciding probe, or None.

    held            [(request, response, error)]; either response or error, a RefusedError, is None
    probes_only     other requests must wait, since the held answers might be due to the request rate
    """

    def __init__(self, pool, report):
        self.held = []
        self.probes_only = False
        self._pool = pool
        self._report = report
        # The held request that is repeated
        self._sample = None
        # (request, status) of a file, preferably an existing one, whose answer was unambiguous
        self._reference = None
        self._probing = False
        self._timer = None
        # Consecutive verdicts that refusals (True) or statuses (False) concern files
        self._file_verdicts = {True: 0, False: 0}

    @property
    def has_reference(self):
        return self._reference is not None

    @property
    def _are_refusals(self):
        """Whether the sample, which stands for all held answers, was refused; if not it has an ambiguous status"""
        return self.held[0][2] is not None

    def note_answers(self, answers):
        """Choose the reference from unambiguous answers, [(request, response, error)]"""
        if not self._reference or self._reference[1] != 200:
            for request, response, error in answers:
                if not error and request.original_method == "HEAD" and not request.redirects and not request.probe:
                    if response.status == 200 or not self._reference and response.status == 404:
                        self._reference = request, response.status

    def is_certain(self, refusals=True):
        """Whether the last verdicts were all that refusals, or statuses, concern files"""
        return self._file_verdicts[refusals] >= CERTAIN_AFTER

    def reset(self, refusals):
        """Forget the verdicts about refusals, or about statuses"""
        self._file_verdicts[refusals] = 0

    def hold(self, request, response, error, probes_only):
        """Hold an answer until the next verdict. probes_only: other requests must wait for that, unless is_certain()."""
        self.held.append((request, response, error))
        self.probes_only = self.probes_only or probes_only and self.has_reference and not self.is_certain(error is not None)

    def clear(self):
        """Drop the held answers and return their requests"""
        requests = [request for request, _, _ in self.held]
        self.held.clear()
        self.probes_only = False
        return requests

    def proceed(self, idle, answers):
        """
        Start probing, or reach a verdict, if that is due. idle: no other request is queued or in flight. answers: the
        number of unambiguous answers of the host so far.
        """
        if not self.held or self._probing:
            return
        if self._reference:
            if self.probes_only or idle or len(self.held) >= MAX_HELD:
                self._begin()
            elif not self._timer:
                # Wait for further answers that can share the probes
                self._timer = self._pool.loop.call_later(PAUSE, self._begin)
            return
        _, response, error = self.held[0]
        if error:
            self._end(HOST)
        elif idle or len(self.held) >= MAX_HELD and not answers and response.status != FORBIDDEN or \
                answers and self._pool.loop.time() - self.held[0][0].sent > HOLD_SECONDS:
            self._end(FILES if answers or response.status == FORBIDDEN else HOST)

    def _begin(self):
        if self._timer:
            self._timer.cancel()
            self._timer = None
        if self.held and not self._probing:
            self._probing = True
            if self.probes_only and not self._file_verdicts[self._are_refusals]:
                self._later(PROBE_SPACING, self._probe, self._reference[0], self._probed)
            else:
                self._sample_later()

    def probe_host(self):
        """Probe the reference, although no answer is held"""
        if self._reference and not self._probing:
            self._probe(self._reference[0], self._probed)

    def _probe(self, request, done):
        self._probing = True
        # A GET without a destination requests the first byte only
        probe = Request(request.method, request.url, request.environment, request.verify, request.authorization)
        probe.probe = True
        probe.done = done
        self._pool.submit([probe])

    def _probed(self, request, response, error):
        if not self._is_answered(response):
            self._end(HOST, error)
        elif self.held:
            self._sample_later()
        else:
            self._end(FILES)

    def _is_answered(self, response):
        """Whether the reference was answered, though not necessarily as before: it may have been removed"""
        if not response or response.status >= 400 and response.status not in ABSENT:
            return False
        self._reference = self._reference[0], response.status
        return True

    def _later(self, seconds, function, *args):
        self._pool.loop.call_later(seconds if self.probes_only else 0, function, *args)

    def _sample_later(self):
        self._later(PAUSE, self._send_sample)

    def _send_sample(self):
        self._sample = request = self.held[0][0] if self.held else None
        if not request:
            self._end(FILES)
        elif request.fd is not None and request.origin.scheme == "sftp":
            # Over SFTP there is no GET without a destination
            self._probe(self._reference[0], self._confirmed)
        else:
            self._probe(request, self._sampled)

    def _is_current(self):
        """Whether the sample is still held; it may have failed with the host meanwhile"""
        return bool(self.held) and self.held[0][0] is self._sample

    def _sampled(self, request, response, error):
        if not self._is_current():
            self._sample_later()
        elif isinstance(error, RefusedError) or response and is_ambiguous(response):
            # The host may have started to refuse after the previous probe
            self._later(PROBE_SPACING, self._probe, self._reference[0], self._confirmed)
        else:
            self._end(ANSWERED if response else HOST, response or error)

    def _confirmed(self, request, response, error):
        if not self._is_answered(response):
            self._end(HOST, error)
        elif not self._is_current():
            self._sample_later()
        else:
            self._file_verdicts[self._are_refusals] += 1
            self._end(FILES)

    def _end(self, verdict, outcome=None):
        if verdict == HOST:
            self._file_verdicts = {True: 0, False: 0}
        elif verdict == ANSWERED and self.held:
            self.reset(self._are_refusals)
        self._probing = self.probes_only = False
        held, self.held = self.held, []
        if not self._pool.stopped:
            self._report(verdict, held, outcome)


def is_ambiguous(response):
    return response.status >= 500 or response.status == FORBIDDEN
