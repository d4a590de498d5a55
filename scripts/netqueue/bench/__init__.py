# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""The benchmarks of scripts/bench: one module each, with the names that commandline.py lists.

frame/ has what they share, processes/ what they run in processes of their own.
"""
