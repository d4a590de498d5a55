# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""What is left on the terminal of scripts/bench terminal"""

import xml.etree.ElementTree

from netqueue.bench.frame.screen import Screen, draw


def shown(*texts):
    screen = Screen()
    for text in texts:
        screen.feed(text)
    return screen.lines


def test_lines():
    assert shown("one\r\ntwo\r\n", "three") == ["one", "two", "three"]
    assert shown("one\rtwo!") == ["two!"]


def test_footer_is_written_anew():
    """As bitbake does: up by the lines of the footer, erase, a message, the footer"""
    footer = "Currently 2 tasks\r\n0: a\r\n1: b\r\n"
    assert shown("NOTE: x\r\n", footer, "\x1b[3A\x1b[J", "NOTE: y\r\n", "Currently 1 task\r\n0: a\r\n") == [
        "NOTE: x", "NOTE: y", "Currently 1 task", "0: a", ""]


def test_colours_are_dropped():
    assert shown("\x1b[38;5;32mNOTE\x1b[0m: x\x1b(B") == ["NOTE: x"]


def test_picture():
    root = xml.etree.ElementTree.fromstring(draw(["$ bitbake x", "a < b"], "A & B"))
    assert [element.text for element in root] == ["A & B", None, "$ bitbake x", "a < b"]
