# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""Imported by bb.siggen; hashserv/__init__.py says why there is nothing here."""
