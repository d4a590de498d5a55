# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""What the test modules share. The folder tests/ is on sys.path for them."""
