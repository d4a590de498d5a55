# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""What a terminal shows of a program's output, and a picture of it as a SVG.

    screen = Screen()
    screen.feed("...")
    FILE.write_text(draw(["bitbake demo-all", *screen.lines]))

It understands what bitbake's user interface uses: the cursor goes up, and what is behind it is erased.
"""

import re
from xml.sax.saxutils import escape

# Letters, and parameters of the control sequences that are acted on; others are dropped
_TOKEN = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])|\x1b[()][A-Z0-9]|\x1b[=>78]|[\r\n]|[^\x1b\r\n]+|\x1b")

WIDTH = 8
LINE = 17
MARGIN = 14
HEAD = """<svg xmlns="http://www.w3.org/2000/svg" width="%(width)d" height="%(height)d" viewBox="0 0 %(width)d %(height)d"
 font-family="monospace" font-size="13" role="img">
<title>%(title)s</title>
<rect width="%(width)d" height="%(height)d" rx="6" fill="#202124"/>
"""


class Screen:
    """lines is all that has been shown and not been erased, as if no line had ever been scrolled out."""

    def __init__(self):
        self.lines = [""]
        self._row = self._column = 0

    def feed(self, text):
        """Process output; control sequences must not be cut."""
        for match in _TOKEN.finditer(text):
            number, letter = match.groups()
            if letter == "A":
                self._row = max(0, self._row - int(number or 1))
            elif letter in ("J", "K"):
                self.lines[self._row] = self.lines[self._row][:self._column]
                if letter == "J":
                    del self.lines[self._row + 1:]
            elif match.group() == "\r":
                self._column = 0
            elif match.group() == "\n":
                self._row += 1
                if self._row == len(self.lines):
                    self.lines.append("")
            elif not match.group().startswith("\x1b"):
                self._write(match.group())

    def _write(self, text):
        line = self.lines[self._row].ljust(self._column)
        self.lines[self._row] = line[:self._column] + text + line[self._column + len(text):]
        self._column += len(text)


def draw(lines, title):
    """A picture of a terminal with these lines."""
    width = max(map(len, lines)) * WIDTH + 2 * MARGIN
    height = len(lines) * LINE + 2 * MARGIN
    parts = [HEAD % {"width": width, "height": height, "title": escape(title)}]
    for number, line in enumerate(lines):
        parts.append('<text x="%d" y="%d" fill="#e8eaed" xml:space="preserve">%s</text>\n'
                     % (MARGIN, MARGIN + LINE * number + 13, escape(line)))
    return "".join(parts) + "</svg>\n"
