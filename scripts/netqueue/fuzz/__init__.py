# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""Mutated input for the parsers of the shared connections. Called by `scripts/bench fuzz` and by tests/unit/test_fuzz.py.

    runner.py           a number of inputs for one parser
    mutation.py         changes of bytes, and what the conversations share
    conversation.py     HTTP and SFTP without a network
    plainhttp.py        HTTP over a socket
    unixsocket.py       the socket between tasks and server

It imports bb, so it runs with the lib folder of a patched tree in the path.
"""
