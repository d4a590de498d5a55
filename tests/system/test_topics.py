# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""The first topics of the series are of use without the others."""

import pytest

from system.conftest import MANY
from system.observe import problems, restore, summary

pytestmark = pytest.mark.system


@pytest.mark.parametrize("last", [3, 4, 5, 6])
def test_without_the_last_topics(last, any_mirror, make_build, make_tree):
    """Each is also a state that a distribution may ship."""
    tree = make_tree("patched", patched=True, topics=set(range(last + 1)))
    server = any_mirror("sftp" if last == 5 else "http")
    build = make_build(tree, server, objects=MANY, levels=4, threads=8)
    result = restore(build)
    assert result.returncode == 0 and problems(result.output) == []
    assert len(build.restored()) == MANY
    done = summary(result.output)
    assert done.objects == MANY and done.connections <= 4
