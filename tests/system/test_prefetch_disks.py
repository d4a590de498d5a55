# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""What is fetched ahead onto a disk that does not take it: the build ends as without, and nothing half is left."""

import errno
import os
import subprocess

import pytest

from system.observe import add_class, damaged, names, not_ahead, restore, unfinished
from system.test_prefetch import ALL, copy_objects
from system.test_prefetch_faults import LARGE, SMALL, lost

pytestmark = pytest.mark.system


def folder_of(mirror_files, wanted):
    """The first of the two folders that a recipe's object is in"""
    path, = (path for path in mirror_files.glob("??/??/sstate:%s:*.tar.zst" % wanted)
             if ":r0:" in path.name)
    return path.relative_to(mirror_files).parts[0]


@pytest.mark.parametrize("protocol", ["http", "sftp"])
def test_folder_that_is_a_file(protocol, any_mirror, mirror_files, off_and_on):
    """One object cannot be put anywhere."""
    name = folder_of(mirror_files, SMALL)

    def prepare(build):
        build.sstate.mkdir(parents=True)
        (build.sstate / name).write_text("in the way")

    off, on, build, _, result = off_and_on(lambda: any_mirror(protocol), prepare)
    assert on == off
    assert on["restored"] == lost(SMALL) and list(not_ahead(result.output)) == [SMALL]
    assert damaged(build.sstate, mirror_files) == [] and unfinished(build.sstate) == [name]


@pytest.fixture
def mount():
    """Called with a folder and what mount takes before it, mounts that there until the end of the test."""
    mounted = []

    def make(folder, *arguments):
        done = subprocess.run(["mount", *arguments, str(folder)], stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            pytest.skip("nothing can be mounted: %s" % done.stdout.strip())
        mounted.append(folder)

    if os.geteuid() != 0:
        pytest.skip("only root can mount")
    yield make
    for folder in mounted:
        subprocess.run(["umount", str(folder)], stdin=subprocess.DEVNULL, check=True)


def run_by(build, *prefix):
    """Have a program run bitbake that takes something from it."""
    try:
        subprocess.run([*prefix, "true"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                       text=True, check=True)
    except OSError as error:
        pytest.skip(str(error))
    except subprocess.CalledProcessError as error:
        pytest.skip(error.stdout.strip())
    build.prefix = list(prefix)


@pytest.fixture
def read_only(request):
    """Called with a build and a number: to write to SSTATE_DIR, and to what is in it, is that error, for root too."""
    folders = []

    def make(build, number):
        if number == errno.EROFS:
            request.getfixturevalue("mount")(build.sstate, "--bind", "-o", "ro", str(build.sstate))
            return
        if os.geteuid() == 0:
            # The capability by which root writes where nobody may
            run_by(build, "setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override")
        for path in [build.sstate, *build.sstate.rglob("*")]:
            if path.is_dir():
                path.chmod(0o555)
                folders.append(path)
        # setpriv does not tell when it may not take that capability
        if subprocess.run([*build.prefix, "test", "-w", str(build.sstate)], stdin=subprocess.DEVNULL).returncode == 0:
            pytest.skip("root's capability to write where nobody may cannot be taken from it")

    yield make
    for path in folders:
        path.chmod(0o755)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS], ids=["modes", "mounted"])
def test_read_only_sstate_dir(number, any_mirror, mirror_files, off_and_on, make_build, stock_tree, read_only):
    """What is there is restored, and nothing else. Stock says other things: its query fails already."""
    local, there = ALL[::2], []

    def prepare(build):
        copy_objects(mirror_files, build, local)
        there.append(names(build.sstate))
        read_only(build, number)

    off, on, build, _, result = off_and_on(lambda: any_mirror("http"), prepare)
    assert on == off
    assert (on["restored"], on["names"]) == (local, there[-1]) and damaged(build.sstate, mirror_files) == []
    reasons = not_ahead(result.output)
    assert sorted(reasons) == lost(*local) and all(os.strerror(number) in why for why in reasons.values())
    stock = make_build(stock_tree, any_mirror("http"))
    prepare(stock)
    assert (restore(stock).returncode, stock.restored()) == (on["returncode"], on["restored"])


# The large one comes last: what wget leaves of it fills the disk
LAST = """
do_populate_setscene[depends] = "${@'%s' if d.getVar('PN') == '%s' else ''}"
""" % (" ".join("%s:do_populate_setscene" % name for name in lost(LARGE)), LARGE)


def test_full_disk(any_mirror, mirror_files, off_and_on, mount):
    """There is room for all but the large one."""
    def prepare(build):
        build.sstate.mkdir(parents=True)
        mount(build.sstate, "-t", "tmpfs", "-o", "size=512k,mode=755", "tmpfs")
        add_class(build, "last", LAST)

    off, on, build, _, result = off_and_on(
        lambda: any_mirror("http"), prepare, threads=1,
        extra_conf='BB_CONNECTION_CACHE_MAX = "1"\nINHERIT += "last"')
    assert on == off
    assert on["restored"] == lost(LARGE) and os.strerror(errno.ENOSPC) in not_ahead(result.output)[LARGE]
    assert damaged(build.sstate, mirror_files) == []
    assert [name for name in unfinished(build.sstate) if not name.endswith(".tmp")] == []


@pytest.mark.parametrize("protocol", ["http", "sftp"])
def test_no_room_for_one(protocol, any_mirror, mirror_files, off_and_on):
    """No file may have more than a MiB, so there is no room for all of the large one."""
    off, on, build, _, result = off_and_on(lambda: any_mirror(protocol),
                                           lambda build: run_by(build, "prlimit", "--fsize=%d" % 2**20))
    assert on == off
    assert on["restored"] == lost(LARGE) and list(not_ahead(result.output)) == [LARGE]
    assert os.strerror(errno.EFBIG) in not_ahead(result.output)[LARGE]
    assert damaged(build.sstate, mirror_files) == []
    assert [name for name in unfinished(build.sstate) if not name.endswith(".tmp")] == []
