# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""The patches of the series: reading, applying and exporting them. Called by the scripts and lab/.

    git.py          runs git so that nothing outside of the repository changes what it does
    patches.py      the files of patches/, and applying them to plain files
    overrides.py    what a base other than master has of its own
    checkout.py     the series on the checkouts of a user (scripts/apply)
    folders.py      the series as folders for git am (scripts/format-patch)
    export.py       patches/ and bitbake-overlay/ from a branch (scripts/export)
    pin.py          the series on a later commit of a base (scripts/rebase)

No module in here imports another package of netqueue.
"""
