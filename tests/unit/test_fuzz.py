# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""A short run of `scripts/bench fuzz`, which has more inputs and tells how to repeat one."""

import pytest

from netqueue.fuzz import runner as fuzz


@pytest.mark.parametrize("parser, inputs", [("http", 4000), ("plain", 1000), ("sftp", 4000), ("socket", 11000)])
def test_fuzz(parser, inputs):
    assert ["input %s: %s" % (fault.number, fault) for fault in fuzz.run(parser, first=0, inputs=inputs, seed=16)] == []
