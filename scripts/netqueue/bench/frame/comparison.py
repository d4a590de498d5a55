# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""Variants that take turns, and what their figures say.

A machine that becomes slower does so for all. So the ratio to count is that of
one turn, and the median of these.

    runs = take_turns(("stock", "patched"), 9, build)       # {"stock": [figures, ...], "patched": ...}
    median, low, high, sure = ratio([one["seconds"] for one in runs["patched"]], [one["seconds"] for one in runs["stock"]])
"""

import math
import statistics
from typing import NamedTuple

LEVEL = 0.95


class Ratio(NamedTuple):
    """The median of ratios, and its interval()"""
    median: float
    low: float
    high: float
    sure: float

    def interval_text(self, decimals):
        return "%.*f to %.*f, sure to %.1f %%" % (decimals, self.low, decimals, self.high, 100 * self.sure)


def take_turns(variants, count, run, warm_up=True, progress=None, title=""):
    """{variant: [what run(variant) returns in each turn]}, of so many turns, each begun by another variant.

    warm_up: one more turn before is not counted. progress, if given, has a step of that title for each turn.
    """
    results = {variant: [] for variant in variants}
    for turn in range(-1 if warm_up else 0, count):
        if progress:
            progress.step("%s, %s" % (title, "turn %d of %d" % (turn + 1, count) if turn >= 0 else "once before"))
        for variant in rotated(variants, turn):
            result = run(variant)
            if turn >= 0:
                results[variant].append(result)
        if progress:
            progress.done()
    return results


def rotated(variants, turn):
    """variants in the order of that turn: each is as often the first, the second ... and as often before as behind another"""
    count = len(variants)
    first = turn % count
    order = variants[first:] + variants[:first]
    return order[::-1] if turn // count % 2 else order


def medians(results):
    """Of each figure of the results, which are dictionaries, the median"""
    return {name: statistics.median(result[name] for result in results) for name in results[0]}


def summarise(runs, against):
    """What take_turns() has returned, by variant: {figure: median, figure + "_min", "ratios": {figure: Ratio}, "runs"}.

    The ratios are those to the variant against.
    """
    rows = {}
    for variant, results in runs.items():
        row = rows[variant] = {"runs": results, "ratios": {}}
        for name, median in medians(results).items():
            values = [result[name] for result in results]
            row[name], row[name + "_min"] = median, min(values)
            row["ratios"][name] = ratio(values, [result[name] for result in runs[against]])
    return rows


def ratio(values, others):
    """The Ratio of what the same turns gave"""
    ratios = [value / other for value, other in zip(values, others)]
    return Ratio(statistics.median(ratios), *interval(ratios))


def interval(values):
    """(low, high, sure): where the median is of what values are a sample of, with a probability of at least sure.

    That of the sign test, which supposes nothing of how they are distributed: the narrowest pair of
    values, equally far from both ends, which is sure to LEVEL. With less than six the outermost ones are less sure.
    """
    values = sorted(values)
    count = len(values)
    best = None
    outside = 0.0
    for place in range((count + 1) // 2):
        # Not so if at most place of them are on one side
        outside += 2 * math.comb(count, place) / 2 ** count
        if best is None or 1 - outside >= LEVEL:
            best = values[place], values[-1 - place], max(0.0, 1 - outside)
    return best
