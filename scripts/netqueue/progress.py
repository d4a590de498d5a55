# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""How far a demo or a benchmark is: one line that is rewritten on a terminal, elsewhere a line now and then.

Called by demo/ and bench/, from their only thread.

    progress = Progress(sys.stderr)
    progress.step("stock, http")
    build.run(["demo-all"], progress=progress.follow)
    progress.done()
"""

import re
import sys
import time

QUIET_SECONDS = 10      # between two lines of progress in a log

_TASK = re.compile(r"Running (?:setscene |noexec )?task (\d+) of (\d+)")


class Progress:
    def __init__(self, stream=None):
        self.stream = stream or sys.stdout
        self.terminal = self.stream.isatty()
        self.title = ""
        self.started = self.printed = 0.0

    def step(self, title):
        self.title = title
        self.started = self.printed = time.monotonic()
        print(title, file=self.stream, end="" if self.terminal else "\n", flush=True)
        if self.terminal:
            self._rewrite("")

    def follow(self, output):
        """Show how far bitbake is, by its console output."""
        tasks = _TASK.findall(output)
        state = "task %s of %s" % tasks[-1] if tasks else "starting"
        if self.terminal:
            self._rewrite(": %s, %d s" % (state, time.monotonic() - self.started))
        elif time.monotonic() - self.printed >= QUIET_SECONDS:
            self.printed = time.monotonic()
            print("  %s, %d s" % (state, self.printed - self.started), file=self.stream, flush=True)

    def done(self):
        text = ": done in %.1f s" % (time.monotonic() - self.started)
        if self.terminal:
            self._rewrite(text)
            print(file=self.stream)
        else:
            print("  " + text[2:], file=self.stream, flush=True)

    def _rewrite(self, text):
        print("\r\033[K" + self.title + text, end="", file=self.stream, flush=True)
