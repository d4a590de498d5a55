# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""An object store that obeys policies: Ceph's gateway from Debian, with a monitor and an OSD that keeps all in memory.

    with ObjectStore() as store:
        environment = store.user("owner")
        subprocess.run(["aws", "s3api", "create-bucket", "--bucket", "sstate"], env=environment)

A program that is not installed skips the test.
"""

import os
import shutil
import subprocess
import tempfile
import uuid
from pathlib import Path

import pytest

from netqueue.lab.s3server import find
from netqueue.lab.serverprocess import die_with_parent, end, free_port
from support.asking import wait_until
from support.realservers import Started

SECONDS = 60
CONF = """
[global]
fsid = %(fsid)s
mon_initial_members = a
mon_host = v1:127.0.0.1:%(monitor)d/0
public_addr = 127.0.0.1
ms_bind_msgr2 = false
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
osd_objectstore = memstore
# There is one OSD, which keeps each object once
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 1
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
# The monitor is alone: nobody else is waited for
paxos_propose_interval = 0.05
paxos_min_wait = 0.01
mon_data_avail_crit = 1
keyring = %(work)s/keyring
mon_data = %(work)s/mon
osd_data = %(work)s/osd
rgw_data = %(work)s/rgw
run_dir = %(work)s
log_file = %(work)s/$name.log
mon_cluster_log_file = %(work)s/cluster.log
pid_file =
admin_socket =
rgw_frontends = beast endpoint=127.0.0.1:%(port)d
rgw_thread_pool_size = 16
"""


class ObjectStore(Started):
    program = "the object store"

    def __init__(self):
        for program in ("ceph-mon", "ceph-osd", "radosgw"):
            if not shutil.which(program):
                pytest.skip("%s is not installed" % program)
        if not find("aws"):
            pytest.skip("aws is not installed")
        self.work = Path(tempfile.mkdtemp(prefix="netqueue-store-"))
        self.processes = []
        self.port = None

    @property
    def url(self):
        return "http://127.0.0.1:%d" % self.port

    def _start(self):
        for name in ("mon", "osd", "rgw"):
            shutil.rmtree(self.work / name, ignore_errors=True)
            (self.work / name).mkdir()
        self.port, monitor = free_port(), free_port()
        values = {"fsid": uuid.uuid4(), "monitor": monitor, "port": self.port, "work": self.work}
        (self.work / "conf").write_text(CONF % values)
        self._run("ceph-authtool", "--create-keyring", str(self.work / "keyring"), "--gen-key", "--name", "mon.",
                  "--cap", "mon", "allow *")
        address = "v1:127.0.0.1:%d" % monitor
        self._run("ceph-mon", "--mkfs", "--id", "a", "--public-addr", address)
        self._run("ceph-osd", "--mkfs", "--id", "0", "--osd-uuid", str(uuid.uuid4()), "--no-mon-config")
        self._serve("ceph-mon", "--id", "a", "--public-addr", address)
        self._run("ceph", "osd", "new", (self.work / "osd" / "fsid").read_text().strip(), "0")
        self._serve("ceph-osd", "--id", "0")
        self._serve("radosgw", "--name", "client.rgw.a")
        wait_until(lambda: any(process.poll() is not None for process in self.processes) or self.is_ready(),
                   "the gateway listens", SECONDS)
        return all(process.poll() is None for process in self.processes)

    def output(self):
        return (self.work / "output").read_text(errors="replace")

    def _run(self, program, *arguments):
        done = subprocess.run([program, "--conf", str(self.work / "conf"), *arguments], stdin=subprocess.DEVNULL, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=SECONDS)
        assert done.returncode == 0, "%s: %s" % (program, done.stdout[-2000:])

    def _serve(self, program, *arguments):
        with open(self.work / "output", "ab") as output:
            self.processes.append(subprocess.Popen(
                [program, "--conf", str(self.work / "conf"), *arguments, "--foreground"], stdin=subprocess.DEVNULL,
                stdout=output, stderr=output, start_new_session=True, preexec_fn=die_with_parent))

    def user(self, name):
        """Make a user. Returns the environment in which aws, and a build, are that user."""
        keys = "KEY-OF-" + name, "secret-of-" + name
        self._run("radosgw-admin", "user", "create", "--uid", name, "--display-name", name, "--access-key", keys[0],
                  "--secret-key", keys[1])
        return {"PATH": "%s:%s" % (Path(find("aws")).parent, os.environ["PATH"]), "HOME": str(self.work),
                "AWS_ENDPOINT_URL": self.url, "AWS_REGION": "us-east-1",
                "AWS_ACCESS_KEY_ID": keys[0], "AWS_SECRET_ACCESS_KEY": keys[1]}

    def stop(self):
        while self.processes:
            end(self.processes.pop())
