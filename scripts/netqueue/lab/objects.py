# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""What is in an sstate object of the demo: a function of its name and size, nothing else.

build.py uses it to choose sizes and to check what was restored; the metadata
uses its own copy in the layer (addpylib in layer.conf) to make objects and
to check them. So a corrupt or swapped object is noticed on both sides.
Standard library only; owns no state.
"""

import random
import zlib

KIB = 1024
MIB = 1024 * KIB


def object_size(number):
    """Bytes for the recipe with this number (from 1): in a hundred 1 of 10 MiB, 8 of 1 MiB, else 1 to 8 KiB.

    Much as a real mirror: the median is a few KiB, and a few large ones hold
    most of the bytes.
    """
    place = number % 100
    if place == 50:
        return 10 * MIB
    if place % 12 == 7:
        return MIB
    return KIB + zlib.crc32(b"size %d" % number) % (7 * KIB)


def object_content(name, size):
    """The bytes of the object: they do not compress, like those of a real archive."""
    return random.Random("netqueue " + name).randbytes(size)
