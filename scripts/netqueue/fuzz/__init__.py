# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""Mutated input for the parsers of the shared connections. Called by `scripts/bench fuzz` and by tests/unit/test_fuzz.py.

    runner.py           a number of inputs for one parser
    conversation.py     what the conversations with an HTTP and an SFTP connection share
    http.py, sftp.py    these two, without a network
    plainhttp.py        HTTP over a socket
    unixsocket.py       the socket between tasks and server
    mutation.py         changes of bytes
    eventloop.py        an event loop whose time the caller advances
    fault.py            what is raised when something does not hold

It imports bb, so it runs with the lib folder of a patched tree in the path.
"""
