# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""Makes the patched tree's bb importable.

Called by the conftest.py of unit/ and wire/, before anything imports bb.
NETQUEUE_PATCHED_LIB names the lib folder of another tree, for development.

    patched.use()
    import bb.connections
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def use():
    """Put the patched tree's lib first on sys.path, and scripts/ for the package netqueue."""
    if str(ROOT / "scripts") not in sys.path:
        sys.path.insert(0, str(ROOT / "scripts"))
    lib = os.environ.get("NETQUEUE_PATCHED_LIB")
    if not lib:
        from netqueue.lab.trees import shared_tree
        lib = shared_tree(patched=True).path / "lib"
    if str(lib) not in sys.path:
        sys.path.insert(0, str(lib))
    # In the bitbake server somebody has
    import bb.server.process
