# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""The table that scripts/demo prints at its end. Called by commandline.py.

    print(table(rows, details))
"""

# Title, key, decimals.
MEASURES = (("objects restored", "restored", 0),
            ("objects lost", "lost", 0),
            ("connections accepted", "connections", 0),
            ("requests", "requests", 0),
            ("presence query, seconds", "presence_seconds", 2),
            ("presence query, CPU seconds", "presence_cpu_seconds", 2),
            ("seconds in all", "seconds", 1),
            ("processes of aws", "aws", 0))

NOTES = {"sftp": ("connections are sessions logged in, requests are STAT and OPEN as sftp-server logs them",
                  "stock bitbake cannot ask a sftp mirror what it has: it takes each object to be there")}


def table(rows, details):
    """Stock beside patched, for each protocol; rows and details in the order of the runs."""
    lines = ["%-8s %-28s %10s %10s %10s" % ("", "", "stock", "patched", "ratio")]
    values = [dict(detail, **row) for row, detail in zip(rows, details)]
    for protocol in dict.fromkeys(row["protocol"] for row in rows):
        stock, patched = (next(value for value in values
                               if value["protocol"] == protocol and value["tree"] == tree)
                          for tree in ("stock", "patched"))
        label = protocol
        for title, key, decimals in MEASURES:
            pair = [_shown(value, key) for value in (stock, patched)]
            if pair == [None, None]:
                continue
            lines.append("%-8s %-28s %10s %10s %10s" % (label, title, *(_text(value, decimals) for value in pair),
                                                        _ratio(*pair)))
            label = ""
        lines.append("%-8s served by %s" % ("", stock["software"]))
        lines += ["%-8s %s" % ("", note) for note in NOTES.get(protocol, ())]
    return "\n".join(lines)


def _shown(value, key):
    """None if it was not measured, or is not what the row is about."""
    return None if key.startswith("presence") and not value["asked"] else value.get(key)


def _text(value, decimals):
    return "-" if value is None else "%.*f" % (decimals, value)


def _ratio(stock, patched):
    return "%.3f" % (patched / stock) if stock and patched is not None else "-"
