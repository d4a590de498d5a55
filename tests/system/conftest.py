# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""Fixtures for tests with a real bitbake: trees, a filled mirror, nginx, builds.

The trees are in build/trees, as those of the demo; the mirror is filled once
in a run of the tests, whatever the number of workers.
"""

import contextlib
import dataclasses
import fcntl
import functools
import os
import shutil
import time

import pytest

from netqueue import ROOT
from netqueue.lab import sshd, trees
from netqueue.lab.build import Build
from netqueue.lab.certificates import make_certificates
from netqueue.lab.mirror import serve
from netqueue.lab.nginx import find_nginx
from netqueue.lab.oecore import clones
from system.observe import SECOND, outcome, restore
from system.peer import FaultyMirror

# So many objects have each kind and size: one of 10 MiB, four of 1 MiB
MANY = 50
FEW = 8
# Tasks fetch their objects themselves
OFF = 'BB_SETSCENE_PREFETCH = "0"'


@pytest.fixture(scope="session")
def make_tree(pytestconfig, request, tmp_path_factory):
    """Called with a name, whether it is patched, and with which topics, returns a Tree: of what --base says."""
    base = pytestconfig.getoption("base")

    def make(name, patched, topics=None):
        if not base and topics is None:
            return trees.shared_tree(patched)
        folder = tmp_path_factory.mktemp("trees") / name
        if not base:
            return trees.make_tree(folder, patched, ROOT / "build" / "cache", topics=topics)
        source = request.getfixturevalue("bitbake_checkout")
        return dataclasses.replace(clones(folder, {"bitbake": source}, patched, base, topics), name=name)
    return make


@pytest.fixture(scope="session")
def stock_tree(make_tree):
    return make_tree("stock", patched=False)


@pytest.fixture(scope="session")
def patched_tree(make_tree):
    return make_tree("patched", patched=True)


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory, worker_id):
    """One folder for all workers of a run"""
    base = tmp_path_factory.getbasetemp()
    return base if worker_id == "master" else base.parent


@pytest.fixture(scope="session")
def mirror_files(shared_folder, stock_tree):
    """What a mirror serves: MANY objects in waves, FEW without dependencies, and FEW of the multiconfig second"""
    files = shared_folder / "mirror-files"
    with open(shared_folder / "mirror.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not files.exists():
            fill(files, shared_folder / "fill", stock_tree)
    return files


def fill(files, folder, stock):
    with Build(folder, stock, objects=MANY) as build:
        result = build.run(["demo-all"], timeout=120)
        assert result.returncode == 0, result.output
    with Build(folder, stock, objects=FEW, levels=1, multiconfigs=SECOND) as build:
        result = build.run(["demo-all", "mc:second:demo-all"], timeout=120)
        assert result.returncode == 0, result.output
        # Those of the lowest level have no dependencies the first time either
        assert len(build.archives()) == MANY + FEW
    # As those of a mirror, they are of different times: what looks alike is not fetched together
    now = int(time.time())
    for age, path in enumerate(sorted(build.sstate.rglob("sstate:*"))):
        os.utime(path, (now - 60 * age,) * 2)
    build.sstate.rename(files)


@pytest.fixture(scope="session")
def certificates(tmp_path_factory):
    """Of the CA that builds are set to trust"""
    if not shutil.which("openssl"):
        pytest.skip("openssl is not installed")
    return make_certificates(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def serve_nginx():
    """Called with a folder and what serve() takes, returns nginx that serves it."""
    if not find_nginx():
        pytest.skip("nginx is not installed")
    with contextlib.ExitStack() as stack:
        yield lambda *args, **options: stack.enter_context(serve(*args, server="nginx", **options))


@pytest.fixture
def mirror(mirror_files, serve_nginx):
    """Called with what serve() takes beside the folder, returns nginx with the filled mirror's files."""
    return functools.partial(serve_nginx, mirror_files)


@pytest.fixture
def serve_sshd():
    """Called with a folder and what sshd.serve() takes, returns a sshd that serves it."""
    if sshd.missing():
        pytest.skip("%s is not installed" % sshd.missing())
    with contextlib.ExitStack() as stack:
        yield lambda *args, **options: stack.enter_context(sshd.serve(*args, **options))


@pytest.fixture
def any_mirror(mirror_files, request):
    """Called with a protocol, a folder (the filled mirror's, if none is given) and what its serve() takes, returns
    a nginx or a sshd."""
    def make(protocol, folder=mirror_files, **options):
        if protocol == "sftp":
            return request.getfixturevalue("serve_sshd")(folder, **options)
        if protocol == "https":
            options["certificates"] = request.getfixturevalue("certificates")
        return request.getfixturevalue("serve_nginx")(folder, protocol, **options)
    return make


@pytest.fixture
def links(mirror_files, tmp_path):
    """Called with a name and recipes, makes a folder with links to all that the filled mirror has but theirs."""
    def make(name, absent):
        for path in mirror_files.rglob("sstate:*"):
            if path.name.split(":")[1] not in absent:
                link = tmp_path / name / path.relative_to(mirror_files)
                link.parent.mkdir(parents=True, exist_ok=True)
                os.link(path, link)
        return tmp_path / name
    return make


@pytest.fixture
def faulty_mirror(mirror_files):
    """Called with a fault (see FaultyMirror), returns a mirror that has it."""
    with contextlib.ExitStack() as stack:
        yield lambda fault, **options: stack.enter_context(FaultyMirror(mirror_files, fault, **options))


@pytest.fixture
def make_build(tmp_path):
    """Called with a tree, a mirror and what Build takes, returns a Build of FEW objects."""
    with contextlib.ExitStack() as stack:
        def make(tree, mirror, name=None, **options):
            build = Build(tmp_path / (name or tree.name), tree, mirror=mirror,
                          **{"objects": FEW, "levels": 1, **options})
            stack.callback(build.clean)
            return stack.enter_context(build)
        yield make


@pytest.fixture
def off_and_on(make_build, patched_tree):
    """
    Called with a function that returns a mirror, and what to do to a build before it runs: runs one without and
    one with prefetch. Returns their outcomes, and the second build, mirror and result.
    """
    def make(make_mirror, prepare=lambda build: None, extra_conf="", **options):
        outcomes = []
        for name, conf in (("off", OFF), ("on", "")):
            server = make_mirror()
            build = make_build(patched_tree, server, name, extra_conf=conf + "\n" + extra_conf, **options)
            prepare(build)
            result = restore(build, "-D", "demo-all")
            outcomes.append(outcome(build, result))
        return (*outcomes, build, server, result)
    return make
