# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""An event loop whose time the caller advances, for what has timers and readers. The conversations call this.

    loop = Loop()
    loop.advance(31)
"""

from netqueue.fuzz.fault import must


class Timer:
    def __init__(self, loop, when, function, arguments):
        self.loop, self.when, self.function, self.arguments = loop, when, function, arguments

    def cancel(self):
        self.loop.timers.discard(self)


class Future:
    """greeted of an SFTPConnection"""
    error = None
    is_done = False

    def done(self):
        return self.is_done

    def set_result(self, result):
        must(not self.is_done, "greeted twice")
        self.is_done = True

    def set_exception(self, error):
        self.set_result(None)
        self.error = error


def number_of(file):
    return file if isinstance(file, int) else file.fileno()


class Loop:
    """In the place of an event loop. readers is {descriptor: function}."""
    create_future = Future

    def __init__(self):
        self.now = 0.0
        self.timers = set()
        self.readers = {}

    def time(self):
        return self.now

    def call_at(self, when, function, *arguments):
        timer = Timer(self, when, function, arguments)
        self.timers.add(timer)
        return timer

    def call_soon(self, function, *arguments):
        """At once: used only with a Python before 3.11"""
        function(*arguments)

    def call_later(self, seconds, function, *arguments):
        return self.call_at(self.now + seconds, function, *arguments)

    def advance(self, seconds):
        self.now += seconds
        for timer in [timer for timer in self.timers if timer.when <= self.now]:
            timer.cancel()
            timer.function(*timer.arguments)

    def add_reader(self, file, function):
        self.readers[number_of(file)] = function

    def remove_reader(self, file):
        return self.readers.pop(number_of(file), None) is not None
