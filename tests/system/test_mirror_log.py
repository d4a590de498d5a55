# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""What the log of scripts/mirror/nginx.conf shows of a build, by the commands of the page there. With -s it is printed."""

import re
import subprocess

import pytest

from netqueue import ROOT
from system.conftest import MANY
from system.observe import restore

pytestmark = [pytest.mark.system, pytest.mark.timeout(400)]

MIRROR = ROOT / "scripts" / "mirror"
COMMANDS = re.findall(r"^    (awk .+)$", (MIRROR / "README.md").read_text(), re.MULTILINE)


def test_log_of_builds(mirror, make_build, stock_tree, patched_tree, tmp_path):
    """A number of connections for each object with stock bitbake, and for all of them with the series"""
    log_format = re.search(r"^log_format .*;$", (MIRROR / "nginx.conf").read_text(), re.MULTILINE).group()
    shown = {}
    for tree in (stock_tree, patched_tree):
        log = tmp_path / (tree.name + ".log")
        server = mirror(http_extra=log_format, server_extra="access_log %s sstate;" % log)
        build = make_build(tree, server, objects=MANY, levels=4)
        assert restore(build).returncode == 0 and len(build.restored()) == MANY
        server.stop()
        commands = [command.replace("/var/log/nginx/sstate.log", str(log)) for command in COMMANDS]
        connections, statuses = (subprocess.run(command, shell=True, check=True, stdout=subprocess.PIPE, text=True, timeout=30).stdout
                                 for command in commands)
        shown[tree.name] = int(connections)
        print("\n%s: %s connections, statuses %s" % (tree.name, connections.strip(), " ".join(statuses.split())))
        assert "200" in statuses.split()
    assert shown["patched"] <= 8 and shown["stock"] >= 3 * MANY
