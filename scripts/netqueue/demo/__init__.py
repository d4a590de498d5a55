# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""scripts/demo: a stock and a patched build beside each other (commandline.py), and the table of both (table.py).
"""
