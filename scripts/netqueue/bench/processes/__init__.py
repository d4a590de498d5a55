# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""What benchmarks run in processes of their own, since two trees cannot both be imported as bb.

Each module is started by frame/process.py, and takes a JSON object as its argument.
"""
