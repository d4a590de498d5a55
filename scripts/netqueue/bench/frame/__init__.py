# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""What the benchmarks share.

    options.py      arguments, and the JSON file
    workfolder.py   the folder that a benchmark works in
    trees.py        the trees that are compared
    comparison.py   variants that take turns, medians, ratios and their intervals
    process.py      a process with the bb of one tree
    mirrors.py      a mirror of any protocol
    downloads.py    programs that download the files of a mirror
    cpuseconds.py   CPU seconds of builds and servers
    screen.py       what a terminal shows, and a picture of it
    picture.py      stock beside patched as a SVG
"""
