#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
The variables that configure the shared connections, the network slots, the
presence query and prefetch.

Called by the runqueue and by the modules of these parts. Keeps no state.

    values = settings(d)                    # ValueError if a variable is invalid
    limit = number(name, d.getVar(name))
"""

import collections

import bb.utils

# Variable in a task's datastore that holds the address of the connection server's socket
ADDRESS = "BB_CONNECTION_CACHE_ADDRESS"
# Valid values of BB_SETSCENE_PRESENCE
SOURCES = ("mirror", "hashserv mirror")

# Connections to a host if BB_CONNECTION_CACHE_MAX is not set: few enough for the limits of common servers
CONNECTIONS = 4
# Largest number for a host that answers more requests over more connections, if there are as many BB_NUMBER_THREADS
MOST_CONNECTIONS = 16

# enabled is a bool, connections and most_connections are per host, sources is a list, prefetch a number of objects
Settings = collections.namedtuple("Settings", "enabled connections most_connections sources prefetch")

def is_enabled(d):
    """Return whether BB_CONNECTION_CACHE permits shared connections. Raises ValueError, as settings()."""
    value = d.getVar("BB_CONNECTION_CACHE") or ""
    try:
        return bb.utils.to_boolean(value.strip() or None, True)
    except ValueError:
        raise invalid("BB_CONNECTION_CACHE", value, '"0" or "1"') from None

def settings(d):
    """
    Return the Settings from the datastore d. Raises ValueError with a message
    for the user, of one line.
    """
    enabled = is_enabled(d)
    limit = number("BB_CONNECTION_CACHE_MAX", d.getVar("BB_CONNECTION_CACHE_MAX"), None, 1, 64)
    prefetch = number("BB_SETSCENE_PREFETCH", d.getVar("BB_SETSCENE_PREFETCH"), 64, 0, 1024)

    value = d.getVar("BB_SETSCENE_PRESENCE") or "mirror"
    sources = " ".join(value.split())
    if sources not in SOURCES:
        raise invalid("BB_SETSCENE_PRESENCE", value, '"mirror" or "hashserv mirror"')

    try:
        threads = int(d.getVar("BB_NUMBER_THREADS") or 1)
    except ValueError:
        # The runqueue reports it
        threads = 1

    most = limit or max(CONNECTIONS, min(threads, MOST_CONNECTIONS))
    return Settings(enabled, limit or CONNECTIONS, most, sources.split(), prefetch)

def number(name, value, default=None, smallest=1, largest=None):
    """Return value as a number, or default if it is empty. name is used in the message of the ValueError only."""
    text = (value or "").strip()
    if not text:
        return default
    # int() raises an exception of its own for more than 4300 digits
    valid = text.isascii() and text.isdigit() and len(text) < 10 and int(text) >= smallest
    if not valid or largest is not None and int(text) > largest:
        allowed = "a positive integer" if largest is None else "an integer from %s to %s" % (smallest, largest)
        raise invalid(name, value, allowed)
    return int(text)

def number_threads(d, tasknames):
    """Return {taskname: limit} from do_x_setscene[number_threads]. An invalid value is a fatal error."""
    limits = {}
    for taskname in sorted(set(tasknames)):
        flag = taskname + "_setscene"
        try:
            limits[taskname] = number(flag + "[number_threads]", d.getVarFlag(flag, "number_threads"))
        except ValueError as e:
            bb.fatal(str(e))
    return limits

def invalid(name, value, allowed):
    shown = value if len(value) <= 40 else value[:40] + "..."
    return ValueError('Invalid value "%s" for %s, must be %s' % (shown, name, allowed))
