# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""What scripts/apply, scripts/export and scripts/test have in common as commands.

Everything that a user can put right ends in one line on standard error and
the exit code 1, never in a traceback.

    parser = Parser("apply", __doc__)
    sys.exit(run("apply", main))
"""

import argparse
import os
import sys

from netqueue import Problem


class Parser(argparse.ArgumentParser):
    """Help from a script's docstring; a wrong argument is one line and exit code 1."""

    def __init__(self, name, doc, **kwargs):
        super().__init__(prog="scripts/" + name, description=doc,
                         formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **kwargs)

    def error(self, message):
        raise Problem("%s (see --help)" % message)


def run(name, main):
    """Call main with the command line; return the exit code."""
    try:
        return main(sys.argv[1:]) or 0
    except Problem as error:
        message = " ".join(str(error).split())
    except BrokenPipeError:
        # The reader of our output has gone, as `head` does. Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except KeyboardInterrupt:
        message = "interrupted"
    except OSError as error:
        message = "%s: %s" % (error.filename or "system error", error.strerror or error)
    print("%s: %s" % (name, message), file=sys.stderr)
    return 1
