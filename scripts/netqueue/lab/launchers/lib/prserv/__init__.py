# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""Stand-in for bitbake's PR service package, which PyPI does not have."""
