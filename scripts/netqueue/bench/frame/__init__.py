# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""What the benchmarks share: arguments, work folders, turns and ratios, CPU seconds, pictures.
"""
