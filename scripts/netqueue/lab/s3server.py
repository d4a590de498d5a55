# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""An S3 mirror on loopback that checks signatures and counts: rclone behind nginx.

The demo, the benchmarks and the tests serve a folder with it as a bucket.
rclone (from requirements-s3.txt; Debian's is too old) checks signatures, nginx counts
and does TLS. A mirror has what a build needs to use it: the files of aws for
HOME, and a folder for PATH whose aws counts how often it is started.

    if not missing():
        with serve(folder) as mirror:
            build.run(...)      # SSTATE_MIRRORS from mirror.url, HOME with mirror.home_files
            print(mirror.counters().connections, mirror.aws_calls())
"""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from netqueue import Problem
from netqueue.lab.mirror import serve as serve_http
from netqueue.lab.nginx import find_nginx
from netqueue.lab.serverprocess import PORT_ATTEMPTS, die_with_parent, end, free_port, listens

BUCKET = "sstate"
KEYS = ("AKIANETQUEUE00000001", "netqueue/secret+of+the+demo")
# nginx passes on what it was asked for as it is, with the name of the host that is signed
PROXY = """
location ~ ^/ {
    proxy_pass http://127.0.0.1:%d;
    proxy_http_version 1.1;
    proxy_set_header Host $http_host;
    proxy_set_header Connection "";
    proxy_buffering off;
}
"""
AWS = """#!/bin/sh
echo "$*" >> %s
exec %s "$@"
"""


def missing():
    """The name of a program that is not installed, or None."""
    for name, program in (("nginx", find_nginx()), ("rclone with serve s3", find_rclone()), ("aws", find("aws"))):
        if not program:
            return name
    return None


def find(name):
    """In the venv, or else in PATH."""
    return shutil.which(name, path="%s:%s" % (Path(sys.executable).parent, os.environ.get("PATH", os.defpath)))


def find_rclone():
    program = find("rclone")
    if not program:
        return None
    done = subprocess.run([program, "serve", "s3", "--help"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL, timeout=30)
    return program if b"--auth-key" in done.stdout else None


class Rclone:
    """
    rclone serve s3, as a process. buckets is {name: folder}, keys a list of (access key, secret): with none requests need
    no signature. work is a folder of its own.
    """

    def __init__(self, work, buckets, keys, port=None):
        self.root = work / "buckets"
        self.root.mkdir(exist_ok=True)
        for name, folder in buckets.items():
            (self.root / name).symlink_to(Path(folder).resolve())
        self.log = work / "rclone.log"
        self.process = None
        self.port = port
        self.restart(keys)

    def restart(self, keys):
        """With other keys, at the same port if it had one."""
        self.stop()
        for _ in range(PORT_ATTEMPTS):
            port = self.port or free_port()
            command = [find_rclone(), "serve", "s3", "--addr", "127.0.0.1:%d" % port, "--copy-links",
                       "--log-file", str(self.log), "--config", os.devnull, str(self.root)]
            for pair in keys:
                command += ["--auth-key", ",".join(pair)]
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                            stderr=subprocess.DEVNULL, preexec_fn=die_with_parent)
            if listens(self.process, port):
                self.port = port
                return
            self.stop()
        raise Problem("rclone does not start: %s" % (self.log.read_text().strip().splitlines() or ["no message"])[-1])

    def stop(self):
        if self.process is not None:
            end(self.process)
            self.process = None


class S3Mirror:
    """
    nginx is one of nginx.py, in front of rclone. url is that of a bucket; home_files, {path below HOME: text}, the
    configuration of aws; tools a folder for PATH. counters(), requests() and reset() are those of nginx. aws: the
    program, unless it is the installed one.
    """
    # That of nginx is in the configuration of aws
    ca_file = None

    def __init__(self, nginx, rclone, work, bucket, keys, aws=None):
        self.nginx = nginx
        self.rclone = rclone
        self.url = "s3://" + bucket
        self.software = "rclone behind " + nginx.software
        self.counters, self.requests = nginx.counters, nginx.requests
        self._calls = work / "aws.log"
        self.tools = work / "tools"
        self.tools.mkdir()
        program = self.tools / "aws"
        program.write_text(AWS % (self._calls, aws or find("aws")))
        program.chmod(0o755)
        self.home_files = {}
        self.configure(keys)
        self.reset()

    @property
    def port(self):
        return self.nginx.port

    @property
    def process(self):
        return self.nginx.process

    def configure(self, keys, port=None, more=""):
        """Set home_files: keys may be None, port another one at which nginx is reached, more further lines."""
        url = "%s://localhost:%d" % (self.nginx.url.partition(":")[0], port or self.port)
        config = "[default]\nregion = us-east-1\nendpoint_url = %s\n%s" % (url, more)
        if self.nginx.ca_file:
            config += "ca_bundle = %s\n" % self.nginx.ca_file
        self.home_files = {".aws/config": config}
        if keys:
            self.home_files[".aws/credentials"] = "[default]\naws_access_key_id = %s\naws_secret_access_key = %s\n" % keys

    def reset(self):
        self.nginx.reset()
        self._calls.write_text("")

    def aws_calls(self):
        """The arguments of each aws that was started."""
        return self._calls.read_text().splitlines()


@contextlib.contextmanager
def serve(folder, certificates=None, keys=KEYS, buckets=None, server_extra="", http_extra=""):
    """
    Serve folder as BUCKET, and buckets, {name: folder}, until the block ends. Yields an S3Mirror, over https with
    certificates. keys: None if requests need no signature. The others are nginx configuration.
    """
    absent = missing()
    if absent:
        raise Problem("%s is not installed" % absent)
    work = Path(tempfile.mkdtemp(prefix="netqueue-s3-"))
    rclone = None
    try:
        rclone = Rclone(work, {BUCKET: folder, **(buckets or {})}, [keys] if keys else [])
        with serve_http(folder, "https" if certificates else "http", server="nginx", certificates=certificates,
                        server_extra=PROXY % rclone.port + server_extra, http_extra=http_extra) as nginx:
            yield S3Mirror(nginx, rclone, work, BUCKET, keys)
    finally:
        if rclone is not None:
            rclone.stop()
        shutil.rmtree(work, ignore_errors=True)
