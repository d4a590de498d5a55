# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""The benchmarks of scripts/bench, a module each: commandline.py lists them.

    dispatch.py, throughput.py (pace), connectioncount.py (lanes), presence.py      parts of bitbake's server
    build.py, install.py, overhead.py                                               whole builds
    terminal.py                                                                     what a user sees
    faults.py, kills.py, fuzz.py                                                    what must not go wrong

frame/ has what they share, processes/ what they run in processes of their own.
"""
