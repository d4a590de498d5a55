# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""The picture of `scripts/bench build`: stock beside patched, as a SVG.

Three columns of bars, for connections, requests and seconds, and a pair of bars
for each cell, of which the longer one has the full length.

    FILE.write_text(draw(rows, ("stock", "patched")))
"""

from xml.sax.saxutils import escape

COLUMNS = (("connections", "%d"), ("requests", "%d"), ("seconds", "%.1f"))
COLOURS = ("#9aa0a6", "#1a73e8")
LABEL = 190
COLUMN = 215
BAR = 150
ROW = 46
TOP = 64
HEAD = """<svg xmlns="http://www.w3.org/2000/svg" width="%(width)d" height="%(height)d" viewBox="0 0 %(width)d %(height)d"
 font-family="sans-serif" font-size="12" role="img">
<title>%(title)s</title>
<rect width="%(width)d" height="%(height)d" fill="#ffffff"/>
"""


def draw(rows, variants):
    """rows are those of bench/build.py, variants the names of the two that are shown."""
    width, height = LABEL + len(COLUMNS) * COLUMN, TOP + len(rows) * ROW + 8
    parts = [HEAD % {"width": width, "height": height, "title": "Restoring sstate objects: %s and %s" % variants}]
    for place, (name, colour) in enumerate(zip(variants, COLOURS)):
        left = 12 + 90 * place
        parts.append('<rect x="%d" y="12" width="12" height="12" fill="%s"/>\n' % (left, colour))
        parts.append(_text(left + 18, 22, name))
    for place, (name, _) in enumerate(COLUMNS):
        parts.append(_text(LABEL + place * COLUMN, TOP - 12, name, 'font-weight="bold"'))
    for number, row in enumerate(rows):
        top = TOP + number * ROW
        parts.append(_text(12, top + 14, row["cell"], 'font-weight="bold"'))
        parts.append(_text(12, top + 30, "%d objects, %.0f MiB" % (row["objects"], row["mib"]), 'fill="#5f6368"'))
        for place, (name, form) in enumerate(COLUMNS):
            largest = max(row["variants"][variant][name] for variant in variants)
            for line, (variant, colour) in enumerate(zip(variants, COLOURS)):
                value = row["variants"][variant][name]
                # What is very little still is something
                length = max(1.0, BAR * value / largest) if largest else 1.0
                x, y = LABEL + place * COLUMN, top + 2 + 17 * line
                parts.append('<rect x="%d" y="%d" width="%.1f" height="14" fill="%s"/>\n' % (x, y, length, colour))
                parts.append(_text(x + length + 5, y + 11, form % value))
    return "".join(parts) + "</svg>\n"


def _text(x, y, text, attributes=""):
    return '<text x="%.1f" y="%d"%s>%s</text>\n' % (x, y, attributes and " " + attributes, escape(text))
