# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""Stand-in for bitbake's hash equivalence package, which PyPI does not have.

bb.siggen and bb.cooker import it at start, whether hash equivalence is used
or not. So it must import, validate unihashes, and say clearly that there is
neither server nor client. A test of hash equivalence needs a checkout.
"""

import re

import bb

_UNIHASH = re.compile(r"[0-9a-f]{64}\Z")

_NOT_OFFERED = ("Hash equivalence (BB_HASHSERVE, BB_SIGNATURE_HANDLER) is not offered in this tree, "
                "which was made from the PyPI package: use a checkout of bitbake")


def is_valid_unihash(value):
    return isinstance(value, str) and bool(_UNIHASH.match(value))


def create_server(*args, **kwargs):
    bb.fatal(_NOT_OFFERED)


def create_client(*args, **kwargs):
    bb.fatal(_NOT_OFFERED)


async def create_async_client(*args, **kwargs):
    bb.fatal(_NOT_OFFERED)
