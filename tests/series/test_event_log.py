# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""The event log of a patched bitbake, read by its own and by the stock one's EventPlayer, which toaster-eventreplay uses."""

import json
import subprocess
import sys

import pytest

from netqueue.lab.trees import shared_tree

WRITER = """
import sys, types
import bb.cooker, bb.event
cooker = types.SimpleNamespace(getAllKeysWithFlags=lambda flags: {})
log = bb.cooker.EventWriter(cooker, sys.argv[1])
log.write_variables()
log.send(bb.event.SstateFetchProgress(1, 2, 3, 4, 5.0))
log.send(bb.event.HeartbeatEvent(1.0))
log.send(bb.event.SstateNetworkSummary(1, 2, 3.0, 4, 5, 6, 7))
log.send(bb.event.HeartbeatEvent(2.0))
"""

# As the loop of toasterui does, which logs an exception and goes on
READER = """
import json, sys
import bb.event
from bb.ui.eventreplay import EventPlayer
seen = []
with open(sys.argv[1]) as log:
    player = EventPlayer(log, {})
    player.runCommand(["setEventMask", 0, 0, {}, ["bb.event.HeartbeatEvent"]])
    for _ in range(6):
        try:
            event = player.waitEvent(0)
            seen.append(event and event.time)
        except Exception as error:
            seen.append(str(error))
print(json.dumps(seen))
"""


def run(tree, program, *arguments):
    done = subprocess.run([sys.executable, "-c", program, *map(str, arguments)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True, timeout=60,
                          env={"PYTHONPATH": str(tree.path / "lib"), "LC_ALL": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("patched", [True, False])
def test_readers(patched, tmp_path):
    """One that does not know an event, as of each new kind, misses that event only."""
    run(shared_tree(patched=True), WRITER, tmp_path / "log")
    seen = json.loads(run(shared_tree(patched), READER, tmp_path / "log"))
    assert [event for event in seen if isinstance(event, float)] == [1.0, 2.0]
    unknown = [event for event in seen if isinstance(event, str)]
    assert len(unknown) == (0 if patched else 2)
    assert all("Can't get attribute 'Sstate" in text for text in unknown)
