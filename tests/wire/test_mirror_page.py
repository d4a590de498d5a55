# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""The configurations in scripts/mirror/ with the real servers: they take them, and a restore does what README.md there says."""

import json
import os
import re
import shutil
import socket
import subprocess
import tempfile
from contextlib import ExitStack
from pathlib import Path

import pytest

from bb.connections import awsconfig
from bb.connections.pool import PROTOCOLS
from bb.connections.s3 import S3
from netqueue import ROOT
from netqueue.lab import sshd
from support.asking import wait_until
from support.objectstore import ObjectStore
from support.realservers import APACHE_MODULES, APACHE_PROCESS, RealServer
from wire.test_real_servers import ABSENT, PRESENT, REQUESTS, files, get_all, nginx, restore  # noqa: F401

MIRROR = ROOT / "scripts" / "mirror"
README = (MIRROR / "README.md").read_text()


def configured(name, around, by):
    """
    A configuration for RealServer: the file of scripts/mirror/ in what is around it, with by, {old: new}, replaced, where new may
    have RealServer's values. All that is replaced has to be there.
    """
    text = (MIRROR / name).read_text().replace("%", "%%")
    for old, new in by.items():
        assert old in text, "%s does not have %s" % (name, old)
        text = text.replace(old, new)
    return around.replace("SNIPPET", text)


class Mirror(RealServer):
    LOG = "sstate.log"

    def connections(self, requests):
        """As RealServer's. In their logs the second word of a line is of the connection."""
        self.stop()
        log = self.log()
        assert len(log) >= requests
        return len({line[1] for line in log})


class MirrorNginx(Mirror):
    program = "nginx"
    arguments = ("-p", "%(work)s", "-c", "%(work)s/conf", "-g", "daemon off;")
    AROUND = """
user %(user)s %(group)s;
worker_processes 1;
pid %(work)s/pid;
error_log %(work)s/error.log;
events { }
http {
    client_body_temp_path %(work)s/body; proxy_temp_path %(work)s/proxy; fastcgi_temp_path %(work)s/fastcgi;
    uwsgi_temp_path %(work)s/uwsgi; scgi_temp_path %(work)s/scgi;
    access_log %(work)s/access.log;
    SNIPPET
}
"""
    CONFIG = configured("nginx.conf", AROUND, by={"listen 80;": "listen 127.0.0.1:%(port)d;", "/srv/sstate": "%(root)s",
                                                  "/var/log/nginx": "%(work)s"})


class CacheNginx(MirrorNginx):
    CONFIG = configured("nginx-cache.conf", MirrorNginx.AROUND, by={
        "listen 80;": "listen 127.0.0.1:%(port)d;", "/var/cache/nginx": "%(work)s",
        "mirror.example.com:80": "127.0.0.1:%(behind)d", "mirror.example.com": "localhost"})


class MirrorApache(Mirror):
    program = "apache2"
    arguments = ("-d", "%(work)s", "-f", "%(work)s/conf", "-D", "FOREGROUND")
    CONFIG = configured("apache.conf", APACHE_PROCESS + """
LoadModule mpm_event_module MODULES/mod_mpm_event.so
LoadModule authz_core_module MODULES/mod_authz_core.so
SNIPPET
""".replace("MODULES", APACHE_MODULES), by={"*:80": "127.0.0.1:%(port)d", "/srv/sstate": "%(root)s", "/var/log/apache2": "%(work)s"})


class MirrorCaddy(Mirror):
    program = "caddy"
    arguments = ("run", "--adapter", "caddyfile", "--config", "%(work)s/conf")
    # The interface for its administration has a fixed port
    CONFIG = configured("Caddyfile", "SNIPPET", by={
        "{\n\tservers": "{\n\tadmin off\n\tservers", "http://:80": "http://127.0.0.1:%(port)d",
        "/srv/sstate": "%(root)s", "/var/log/caddy": "%(work)s"})

    def connections(self, requests):
        """As RealServer's. Its log is JSON, and has the client's port."""
        self.stop()
        ports = re.findall(r'"remote_port":"(\d+)"', (self.work / self.LOG).read_text())
        assert len(ports) >= requests
        return len(set(ports))


class CacheSquid(Mirror):
    program = "squid"
    arguments = ("-N", "-f", "%(work)s/conf")
    CONFIG = configured("squid.conf", """
pid_filename %(work)s/pid
cache_effective_user %(user)s
cache_log %(work)s/cache.log
coredump_dir %(work)s
visible_hostname localhost
shutdown_lifetime 0 seconds
pinger_enable off
SNIPPET
""", by={"http_port 3128": "http_port 127.0.0.1:%(port)d", "mirror.example.com parent 80": "127.0.0.1 parent %(behind)d",
         "mirror.example.com": "localhost", "/var/spool/squid": "%(work)s/spool", "/var/log/squid": "%(work)s",
         "sstate 200000": "sstate 100"})

    def _start(self):
        (self.work / "spool").mkdir(exist_ok=True)
        shutil.chown(self.work / "spool", self.values["user"])
        (self.work / "conf").write_text(self.CONFIG % dict(self.values, port=1))
        subprocess.run([self.path, "-N", "-z", "-f", str(self.work / "conf")], check=True, timeout=30, stdin=subprocess.DEVNULL,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return super()._start()


def restored(make_asking, server, files):
    """What a build asks for, without a refusal. Returns the Asking."""
    asking = restore(make_asking, server.url, files)
    assert (asking.count("refusals"), asking.count("files")) == (0, PRESENT)
    return asking


@pytest.mark.parametrize("make", [MirrorNginx, MirrorApache, MirrorCaddy])
def test_mirror(files, make_asking, make, tmp_path, monkeypatch):
    # Caddy keeps a copy of its configuration there
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    with make(files.folder) as server:
        asking = restored(make_asking, server, files)
        opened = asking.count("connections")
        assert server.connections(REQUESTS) == opened <= 8


@pytest.mark.parametrize("make", [CacheNginx, CacheSquid])
def test_cache(files, nginx, make_asking, make):
    """The first builder has its objects from the mirror, the second from the cache, and neither misses one."""
    origin = nginx()
    with make(behind=origin.port) as server:
        for _ in range(2):
            assert restored(make_asking, server, files).count("connections") <= 8
        # squid does not keep what comes while its disk is behind
        assert PRESENT <= origin.counters().methods["GET"] <= 1.05 * PRESENT
        # The cache has connections that it keeps, too
        assert origin.counters().connections <= 100


def test_what_is_uploaded_is_seen(files, nginx, make_asking):
    """A cache does not remember what was absent."""
    origin = nginx()
    for make in (CacheNginx, CacheSquid):
        with make(behind=origin.port) as server:
            late = files.folder / ("late-" + make.__name__)
            statuses = []
            for _ in range(2):
                asking = make_asking()
                statuses += [asking.ask(method, ["%s/%s" % (server.url, late.name)])[0].status() for method in ("HEAD", "GET")]
                late.write_bytes(b"uploaded")
                late.chmod(0o644)
            late.unlink()
            assert statuses == [404, 404, 200, 200]


def section(title):
    """The commands of README.md's section, as a text for the shell"""
    found = re.search(r"^## %s\n(.*?)(?=^## |\Z)" % re.escape(title), README, re.MULTILINE | re.DOTALL)
    return re.findall(r"^    (.+)\n", found.group(1), re.MULTILINE)


def test_what_the_log_shows(files, make_asking):
    """README.md's commands on a log of nginx: connections, requests of each, and what was refused"""
    with MirrorNginx(files.folder) as server:
        opened = restored(make_asking, server, files).count("connections")
        server.stop()
        outputs = []
        for command in section("What the log shows"):
            if command.startswith("awk"):
                command = command.replace("/var/log/nginx", str(server.work))
                outputs.append(subprocess.run(command, shell=True, stdout=subprocess.PIPE, text=True, check=True, timeout=30).stdout)
    assert len(outputs) == 2
    assert int(outputs[0].split()[0]) == opened
    counted = dict(reversed(line.split()) for line in outputs[1].splitlines())
    assert int(counted["200"]) >= 2 * PRESENT and set(counted) == {"200", "404"}


# sftp

@pytest.fixture
def chroot(files):
    """A folder that only root may write to, as all above it, with the files in it. /tmp is not such a place."""
    if sshd.missing() or os.getuid() != 0:
        pytest.skip("%s is not installed" % sshd.missing() if sshd.missing() else "a chroot has to be made by root")
    folder = Path(tempfile.mkdtemp(prefix="netqueue-chroot-", dir="/run"))
    folder.chmod(0o755)
    shutil.copytree(files.folder, folder / "sstate")
    yield folder
    shutil.rmtree(folder)


def sshd_config(folder):
    text = (MIRROR / "sshd_config").read_text()
    for old, new in (("Match User sstate", "Match User root"), ("ChrootDirectory /srv/sftp", "ChrootDirectory %s" % folder)):
        assert old in text
        text = text.replace(old, new)
    return text


def test_sftp(files, chroot, make_asking):
    with sshd.serve(chroot, extra=sshd_config(chroot)) as server:
        environment = {"PATH": "%s:%s" % (server.tools, os.environ["PATH"]), "HOME": os.environ.get("HOME", "/")}
        url = server.url.replace(str(chroot), "/sstate")
        asking = restore(make_asking, url, files, environment)
        assert (asking.count("refusals"), asking.count("files")) == (0, PRESENT)
        assert asking.count("connections") <= 4
        # Nothing can be written, and nothing else be run
        done = subprocess.run([server.tools / "sftp", "-q", "-P", str(server.port), "-b", "-", "127.0.0.1"], text=True, timeout=30,
                              input="mkdir /sstate/new\n", stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert done.returncode == 1 and "Permission denied" in done.stdout
        assert not (chroot / "sstate" / "new").exists()
        wait_until(lambda: server.counters().dropped == 0, "no login was dropped")


@pytest.mark.parametrize("named", [True, False], ids=["named", "not-named"])
def test_sftp_without_penalties(files, chroot, make_asking, named):
    """OpenSSH before 9.8 does not know them. A network that is not named is banned."""
    version = re.match(r"OpenSSH (\d+)\.(\d+)", sshd._version())
    if tuple(map(int, version.groups())) < (9, 8):
        pytest.skip("this is %s, which has no penalties" % sshd._version())
    text = (MIRROR / "sshd_config-penalties").read_text()
    assert "192.0.2.0/24" in text
    if named:
        text = text.replace("192.0.2.0/24", "127.0.0.0/8")
    with sshd.serve(chroot, extra=text + sshd_config(chroot)) as server:
        sshd.make_key(server.work / "other_key")
        bad = sshd.make_tools(server.work / "bad", server.work / "other_key", server.work / "known_hosts")
        for _ in range(8):
            assert subprocess.run([bad / "ssh", "-p", str(server.port), "-o", "BatchMode=yes", "127.0.0.1", "true"],
                                  stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=30).returncode == 255
        if not named:
            with socket.create_connection(("127.0.0.1", server.port), timeout=30) as sock:
                assert not sock.recv(99).startswith(b"SSH-")
            wait_until(lambda: told_as("PerSourcePenalties") in server._log(), "it is logged")
            return
        environment = {"PATH": "%s:%s" % (server.tools, os.environ["PATH"]), "HOME": os.environ.get("HOME", "/")}
        restore(make_asking, server.url.replace(str(chroot), "/sstate"), files, environment)


# An object store

class Bucket:
    """The bucket sstate in an object store with the files, and who owns it"""

    def __init__(self, store, files):
        self.url = "%s/sstate" % store.url
        self.files = files
        self.owner = store.user("owner")
        self.shell("aws s3api create-bucket --bucket sstate")
        self.shell("aws s3 cp --quiet --recursive %s s3://sstate" % files.folder)

    def shell(self, command, returncode=0):
        """A command of the owner, in the folder with the policy. Returns what it said."""
        done = subprocess.run(command, shell=True, cwd=MIRROR, env=self.owner, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True, timeout=120)
        assert done.returncode == returncode, done.stdout
        return done.stdout

    def put_policy(self, folder, change):
        """That of scripts/mirror/, with each statement changed by a function that returns whether it stays."""
        policy = json.loads((MIRROR / "s3-policy.json").read_text())
        policy["Statement"] = [statement for statement in policy["Statement"] if change(statement)]
        (folder / "policy.json").write_text(json.dumps(policy))
        self.shell("aws s3api put-bucket-policy --bucket sstate --policy file://%s/policy.json" % folder)

    def statuses(self, asking, url=None, environment=None):
        """Of HEADs of a file that there is, and of one that there is not"""
        return [one.status() for one in asking.one_by_one(
            "HEAD", ["%s/%s" % (url or self.url, name) for name in (next(iter(self.files.contents)), "absent")], environment)]


@pytest.fixture
def store():
    with ObjectStore() as store:
        yield store


def test_object_store(files, store, make_asking, tmp_path):
    """README.md's commands on a bucket that is as AWS makes it"""
    bucket = Bucket(store, files)
    bucket.shell("aws s3api put-public-access-block --bucket sstate --public-access-block-configuration BlockPublicPolicy=true")
    unblock, policy, lifecycle = section("An object store")
    bucket.shell(policy, returncode=255)
    assert bucket.statuses(make_asking()) == [403, 403]
    for command in (unblock, policy, lifecycle):
        bucket.shell(command)
    assert "old objects" in bucket.shell("aws s3api head-object --bucket sstate --key %s --query Expiration" % largest(files))
    # What is absent is answered with 404
    assert restored(make_asking, bucket, files).count("connections") <= 16

    bucket.put_policy(tmp_path, lambda statement: statement["Action"] != "s3:ListBucket")
    asking = make_asking()
    assert bucket.statuses(asking) == [200, 403]
    names = [*files.contents, *("absent%d" % number for number in range(ABSENT))]
    asked = asking.ask("HEAD", ["%s/%s" % (bucket.url, name) for name in names])
    assert [one.status() for one in asked] == [200 if name in files.contents else 403 for name in names]
    assert asking.count("requests") > len(names) + 2


def test_object_store_of_a_user(files, store, make_asking, tmp_path):
    """As README.md says, with a Principal in place of everybody"""
    bucket = Bucket(store, files)
    builder = store.user("builder")
    builder[awsconfig.KEYS_HASH] = awsconfig.keys_hash(builder)
    bucket.put_policy(tmp_path, lambda statement: statement.update(Principal={"AWS": "arn:aws:iam:::user/builder"}) is None)
    asking = make_asking(protocols={**PROTOCOLS, "s3": S3(builder).protocol})
    assert bucket.statuses(asking) == [403, 403]
    assert bucket.statuses(asking, "s3://sstate", builder) == [200, 404]
    get_all(asking, "s3://sstate", files, builder)


# What their logs tell of limits

def told_as(limit):
    """What README.md says is in the log"""
    return re.search(r"^\|[^|]*\| `([^`|]+)` \| `%s` \|$" % limit, README, re.MULTILINE).group(1)


@pytest.mark.parametrize("limit, conf", [
    ("limit_req", "limit_req_zone $binary_remote_addr zone=some:1m rate=1r/s; limit_req zone=some;"),
    ("limit_conn", "limit_conn_zone $binary_remote_addr zone=some:1m; limit_conn some 1;")])
def test_limit_of_nginx(files, limit, conf):
    with MirrorNginx(files.folder) as server:
        server.stop()
        (server.work / "conf").write_text((server.work / "conf").read_text().replace("log_format", conf + "log_format", 1)
                                          .replace("limit_conn sstate_clients 64;", "sendfile_max_chunk 1k; limit_rate 1k;"))
        process = subprocess.Popen([server.path, *(argument % server.values for argument in server.arguments)])
        try:
            wait_until(server.is_ready, "nginx listens")
            with ExitStack() as stack:
                for _ in range(3):
                    sock = stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
                    sock.sendall(b"GET /%s HTTP/1.1\r\nHost: x\r\n\r\n" % largest(files).encode())
                    assert sock.recv(12).startswith(b"HTTP/1.1")
            assert told_as(limit) in (server.work / "error.log").read_text()
        finally:
            process.terminate()
            process.wait(30)


def largest(files):
    return max(files.contents, key=lambda name: len(files.contents[name]))


def test_limit_of_apache(files):
    with MirrorApache(files.folder) as server:
        server.stop()
        with open(server.work / "conf", "a") as conf:
            conf.write("\nServerLimit 1\nThreadLimit 2\nThreadsPerChild 2\nStartServers 1\nMinSpareThreads 1\nMaxSpareThreads 2\n"
                       "MaxRequestWorkers 2\n")
        process = subprocess.Popen([server.path, *(argument % server.values for argument in server.arguments)])
        try:
            wait_until(server.is_ready, "Apache listens")
            with ExitStack() as stack:
                for _ in range(2):
                    # A request that has not ended keeps a thread
                    stack.enter_context(socket.create_connection(("127.0.0.1", server.port))).sendall(b"GET / HTTP/1.1\r\n")
                wait_until(lambda: told_as("MaxRequestWorkers") in (server.work / "error.log").read_text(), "it is logged")
        finally:
            process.terminate()
            process.wait(30)


def test_limit_of_sshd(files):
    if sshd.missing():
        pytest.skip("%s is not installed" % sshd.missing())
    with sshd.serve(files.folder, extra="MaxStartups 1") as server, ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
        wait_until(lambda: told_as("MaxStartups") in server._log(), "it is logged")
        assert told_as("PerSourcePenalties") not in server._log()
