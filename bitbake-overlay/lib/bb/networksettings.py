#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
The variables of the shared connections, network slots, presence query and
prefetch. Everything that uses them gets them from here.
"""

import collections

import bb.utils

# Variable in the datastore that holds the address of the connection server's socket, for tasks
ADDRESS = "BB_CONNECTION_CACHE_ADDRESS"
# Warning about a mirror (scheme, host): the same from tasks and from the server, so that it is shown once
STRANGE = "Sstate mirror %s://%s has returned something else than sstate objects, ignoring it"
# Valid values of BB_SETSCENE_PRESENCE
SOURCES = ("mirror", "hashserv mirror")

# Connections to a host, and if the variable is not set and that pays the largest number, but not more than threads
CONNECTIONS = 4
MOST_CONNECTIONS = 16

# connections is the number to begin with
Settings = collections.namedtuple("Settings", "enabled connections most_connections sources prefetch")

def settings(d):
    """
    Read the variables from the datastore d. Raises ValueError with one line
    that names the variable, its value and what is allowed.
    """
    value = d.getVar("BB_CONNECTION_CACHE")
    try:
        enabled = bb.utils.to_boolean(value.strip() if value else None, True)
    except ValueError:
        raise invalid("BB_CONNECTION_CACHE", value, '"0" or "1"') from None

    limit = number("BB_CONNECTION_CACHE_MAX", d.getVar("BB_CONNECTION_CACHE_MAX"), None, 1, 64)
    prefetch = number("BB_SETSCENE_PREFETCH", d.getVar("BB_SETSCENE_PREFETCH"), 64, 0, 1024)

    value = d.getVar("BB_SETSCENE_PRESENCE") or "mirror"
    sources = " ".join(value.split())
    if sources not in SOURCES:
        raise invalid("BB_SETSCENE_PRESENCE", value, '"mirror" or "hashserv mirror"')

    try:
        threads = int(d.getVar("BB_NUMBER_THREADS") or 1)
    except ValueError:
        # Reported elsewhere
        threads = 1

    most = limit or max(CONNECTIONS, min(threads, MOST_CONNECTIONS))
    return Settings(enabled, limit or CONNECTIONS, most, sources.split(), prefetch)

def number(name, value, default=None, smallest=1, largest=None):
    """The value of the setting name as a number, default if it is empty. Raises ValueError as settings() does."""
    text = (value or "").strip()
    if not text:
        return default
    # More than nine digits are never meant, and Python refuses to convert more than 4300
    valid = text.isascii() and text.isdigit() and len(text) < 10 and int(text) >= smallest
    if not valid or largest is not None and int(text) > largest:
        allowed = "a positive integer" if largest is None else "an integer from %s to %s" % (smallest, largest)
        raise invalid(name, value, allowed)
    return int(text)

def invalid(name, value, allowed):
    shown = value if len(value) <= 40 else value[:40] + "..."
    return ValueError('Invalid value "%s" for %s, must be %s' % (shown, name, allowed))
