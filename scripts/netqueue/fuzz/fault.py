# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""What a conversation raises when something does not hold.

    must(size == announced, "a file of %d bytes" % size)
"""


class Fault(Exception):
    """What does not hold. number is that of the input."""
    number = None


def must(condition, text):
    if not condition:
        raise Fault(text)
