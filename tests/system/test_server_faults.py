# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""The bitbake server's part hangs or dies: tasks fetch without it, and the user hears of it once."""

import os
import signal

import pytest

from system.conftest import FEW, OFF
from system.observe import (add_class, damaged, problems, restore, server_pid, summary, unfinished,
                            wait_until)
from system.peer import is_object, send_part

pytestmark = pytest.mark.system

LARGE = "demo-0007"

# Replaces a method of the server's end of the socket, before the build has made one. Tasks are made less patient than they are.
REPLACE = """
python () {
    import bb.connections.protocol
    bb.connections.protocol.SILENCE_SECONDS = 1
}
addhandler replace_method
replace_method[eventmask] = "bb.event.BuildStarted"
python replace_method() {
    import time
    import bb.connections.peers, bb.connections.server
    def hangs(*args):
        # Until the build ends
        while any(server.address for server in bb.connections.server._running):
            time.sleep(0.05)
    def dies(*args):
        raise RuntimeError("the test wants that")
    bb.connections.peers.%s = %s
}
"""


@pytest.mark.parametrize("method, replacement", [
    ("Peers._accept", "hangs"), ("Peer._receive", "hangs"), ("Peer._answered", "hangs"),
    ("Peers._accept", "dies"), ("Peer._receive", "dies"), ("Peer._answered", "dies"),
])
def test_thread(method, replacement, mirror, mirror_files, make_build, patched_tree):
    """The server's thread, when the first task connects, asks, or is answered: tasks connect that fetch themselves."""
    server = mirror()
    build = make_build(patched_tree, server, threads=8, extra_conf=OFF + '\nINHERIT += "replace"')
    add_class(build, "replace", REPLACE % (method, replacement))
    result = restore(build)
    assert result.returncode == 0
    assert len(build.restored()) == FEW
    assert damaged(build.sstate, mirror_files) == []
    assert unfinished(build.sstate) == []
    told = problems(result.output)
    assert len(told) == 1 and "Cannot use the BitBake server's shared connections" in told[0]
    # The query has used them, but nothing has been fetched
    assert summary(result.output) is None


def test_killed_in_the_middle(faulty_mirror, mirror, mirror_files, make_build, patched_tree):
    """SIGKILL for the bitbake server; the next build is not troubled by what is left."""
    def fault(talk, request, body):
        if request.method == "GET" and is_object(request, LARGE):
            send_part(talk, body, len(body) // 2)
            talk.wait_closed()

    slow = faulty_mirror(fault)
    build = make_build(patched_tree, slow)
    running = build.start(["--setscene-only", "demo-all"])
    try:
        wait_until(lambda: slow.asked("GET", LARGE), "the large object is being fetched")
        wait_until(lambda: [name for name in unfinished(build.sstate)
                            if LARGE in name and (build.sstate / name).stat().st_size], "a part of it has arrived")
        os.kill(server_pid(build), signal.SIGKILL)
        # The client, which takes a minute to notice
        wait_until(lambda: build.processes() == [running.process.pid], "workers and tasks have ended")
    finally:
        running.kill()
    assert damaged(build.sstate, mirror_files) == []
    assert LARGE not in build.restored()

    build.mirror = mirror()
    build.write()
    result = restore(build)
    assert (result.returncode, len(build.restored())) == (0, FEW)
    assert problems(result.output) == []
    assert damaged(build.sstate, mirror_files) == []
    assert not [name for name in unfinished(build.sstate) if LARGE in name]
