# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""A setscene task's view of fetch2, with a DL_DIR of its own and a wget that only records.

    build = Build(folder, connections.address)
    build.fetch(mirror.url("/x"))
    assert build.read() == b"..." and build.wget_calls() == []
"""

import os
import shutil

import bb.data
import bb.fetch2
import pytest

from bb.fetch2.shared import ADDRESS

FAKE_WGET = """#!/bin/sh
echo "$*" >> {calls}
ls -A {downloads} > {listing}
for argument; do
    case "$argument" in --output-document=*) printf 'from wget' > "${{argument#*=}}";; esac
done
"""


class Build:
    """A datastore of a setscene task, its DL_DIR, and a wget that only records that it is called."""

    def __init__(self, folder, address):
        self.downloads = folder / "downloads"
        self.downloads.mkdir(parents=True)
        self.calls = folder / "calls"
        self.listing = folder / "listing"
        self.d = bb.data.init()
        self.d.setVar("DL_DIR", str(self.downloads))
        self.d.setVar("FILESPATH", str(self.downloads))
        self.d.setVar("PERSISTENT_DIR", str(folder))
        self.d.setVar("HOME", str(folder))
        self.d.setVar("BB_WORKERCONTEXT", "1")
        self.d.setVar("BB_CURRENTTASK", "populate_sysroot_setscene")
        self.d.setVar(ADDRESS, address)
        programs = folder / "bin"
        programs.mkdir()
        wget = programs / "wget"
        wget.write_text(FAKE_WGET.format(calls=self.calls, downloads=self.downloads, listing=self.listing))
        wget.chmod(0o755)
        self.d.setVar("PATH", "%s:%s" % (programs, os.environ["PATH"]))

    def use_real_wget(self):
        if not shutil.which("wget"):
            pytest.skip("no wget to compare with")
        self.d.setVar("PATH", os.environ["PATH"])
        self.d.setVar("BB_CONNECTION_CACHE", "0")

    def fetcher(self, uri):
        """Of a file of the same name that has the only mirror uri, as sstate.bbclass makes it"""
        uri, _, parameters = uri.partition(";")
        name = uri.partition("?")[0].rpartition("/")[2]
        self.d.setVar("PREMIRRORS", "file://.* %s" % uri)
        local = "file://%s;downloadfilename=%s" % (name, name)
        return bb.fetch2.Fetch([";".join(filter(None, (local, parameters)))], self.d, cache=False)

    def fetch(self, uri):
        self.fetcher(uri).download()

    def exists(self, uri):
        try:
            self.fetcher(uri).checkstatus()
            return True
        except bb.fetch2.FetchError:
            return False

    def wget_calls(self):
        return self.calls.read_text().splitlines() if self.calls.exists() else []

    def wget_saw(self):
        """Names that were in DL_DIR when wget was started"""
        return [name for name in self.listing.read_text().splitlines() if not name.endswith(".lock")]

    def left(self):
        """Names in DL_DIR but for the fetcher's own"""
        return sorted(name for name in os.listdir(self.downloads) if not name.endswith((".lock", ".done")))

    def read(self, name="x"):
        return (self.downloads / name).read_bytes()
