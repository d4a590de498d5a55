# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
if str(TESTS) not in sys.path:
    sys.path.insert(0, str(TESTS))

from support import patched

patched.use()
