# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""What bb.cooker calls of the PR service: start it, stop it.

Without PRSERV_HOST there is nothing to do. With it the build stops with one
line, because a build that asked for a PR service and got none would write
wrong versions.
"""

import bb


class PRServiceConfigError(Exception):
    """Caught by bb.cooker; never raised here, because it hides the reason."""


def auto_start(d):
    if (d.getVar("PRSERV_HOST") or "").strip(": "):
        bb.fatal("PRSERV_HOST: the PR service is not offered in this tree, which was made from the "
                 "PyPI package: unset it or use a checkout of bitbake")
    return None


def auto_shutdown():
    return None
