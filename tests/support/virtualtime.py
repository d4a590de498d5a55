# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""An asyncio event loop whose time passes only while it waits for a timer, and takes no real time then.

    loop = VirtualLoop()
    loop.run_until_complete(asyncio.sleep(3600))
    assert loop.time() >= 3600
    loop.close()
"""

import asyncio
import selectors

# Seconds by which a timer is missed, so that none is due a rounding error after the time it was set for
LATE = 1e-6


class NothingLeft(Exception):
    """The loop would wait for ever: no timer is set, and no descriptor is ready"""


class VirtualSelector(selectors.DefaultSelector):
    """now is the virtual time in seconds. Goes to the next timer instead of waiting for it."""

    def __init__(self):
        super().__init__()
        self.now = 0.0

    def select(self, timeout=None):
        ready = super().select(0)
        if not ready:
            if timeout is None:
                raise NothingLeft()
            if timeout > 0:
                self.now += timeout + LATE
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self):
        self._clock = VirtualSelector()
        super().__init__(self._clock)
        # With Python 3.9, an asyncio.Event belongs to the loop that is set when it is made
        asyncio.set_event_loop(self)

    def time(self):
        return self._clock.now
