# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""A project of kas takes up the series as README.md says: with the real kas, on clones of upstream's checkouts."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from netqueue import ROOT, environment
from netqueue.lab.oecore import MACHINE, OEBuild
from netqueue.lab.trees import Tree
from netqueue.series.git import git
from netqueue.series.patches import PARTS, load_bases, load_series
from series.synthetic import run
from series.test_checkouts import POKY, clone_at, clone_of
from system.observe import problems, summary

pytestmark = [pytest.mark.system, pytest.mark.checkout, pytest.mark.timeout(1500)]

BASES = load_bases()
RECIPES = 8
SECONDS = 600
PROJECT = """
header:
  version: 14
machine: %s
distro: nodistro
target: demo-all
env:
  BB_SERVER_TIMEOUT: "0"
repos:
  project:
    layers:
      layer:
"""
REPOSITORY = """
  %s:
    url: %s
    commit: %s
    layers: %s
"""


class Project:
    """
    A repository with project.yml and a layer, in the folder of kas. repositories: {name: checkout}; bitbake and oecore are
    where kas lays them out.
    """

    def __init__(self, folder, repositories, bitbake, oecore):
        self.folder = folder
        self.home = folder / "home"
        self.repository = folder / "project"
        for path in (self.home, self.repository):
            path.mkdir(parents=True)
        git(self.repository, "init", "--quiet")
        # A path and no URL: git borrows its objects
        text = PROJECT % MACHINE + "".join(
            REPOSITORY % (name, path, git(path, "rev-parse", "HEAD").strip(), "{}" if name == "bitbake" else "{meta: }")
            for name, path in repositories.items())
        (self.repository / "project.yml").write_text(text)
        self.kas("checkout", "project.yml")
        self.build = OEBuild(folder / "own", Tree(folder / bitbake, oecore=folder / oecore), objects=RECIPES)
        self.build.layer.rename(self.repository / "layer")

    def kas(self, command, *files):
        """Run kas to its end, and return what it said"""
        variables = {"PATH": os.environ["PATH"], "HOME": str(self.home), "TMPDIR": str(self.home), "LC_ALL": "en_US.UTF-8",
                     "KAS_WORK_DIR": str(self.folder)}
        done = subprocess.run([sys.executable, "-m", "kas", command, ":".join(str(self.repository / name) for name in files)],
                              cwd=self.folder, env=variables, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True, timeout=SECONDS)
        assert done.returncode == 0, done.stdout[-6000:]
        # What it runs says is logged, too
        return re.sub(r"^\S+ \S+ - INFO +- ", "", done.stdout, flags=re.MULTILINE)

    def make(self, *files, mirror=None):
        """Build from nothing, with what kas lays out; returns the names of what there is then, and what was said."""
        for name in ("tmp", "sstate"):
            shutil.rmtree(self.folder / "build" / name, ignore_errors=True)
        self.build.mirror = mirror
        # kas names layers by ${TOPDIR}/.., so that the paths in there do not match
        conf = self.build._local_conf() + 'BBMASK = "/meta/recipes-"\n'
        (self.repository / "local.yml").write_text(
            "header:\n  version: 14\nlocal_conf_header:\n  test: |\n" + "".join("    %s\n" % line for line in conf.splitlines()))
        output = self.kas("build", *files, "local.yml")
        deployed = self.folder / "build" / "tmp" / "deploy" / "images" / MACHINE
        return sorted(path.stem for path in deployed.glob("demo-*.blob")), output


@pytest.fixture(scope="module", autouse=True)
def needs_kas_and_locale():
    pytest.importorskip("kas", reason="no kas")
    if not environment.has_locale():
        pytest.skip("the locale %s is missing" % environment.LOCALE)


@pytest.fixture(params=[*((base, "apart") for base in BASES), *((base, "poky") for base in POKY)], ids="-".join)
def project(request, tmp_path):
    """Of each base, laid out as two repositories or as poky"""
    base, layout = request.param
    if layout == "poky":
        repositories = {"poky": clone_at(request.getfixturevalue("poky_checkout"), tmp_path / "upstream", POKY[base])}
        paths = "poky/bitbake", "poky"
    else:
        repositories = {part: clone_of(request.getfixturevalue(fixture), tmp_path / ("upstream-" + part), part, base)
                        for part, fixture in zip(PARTS, ("bitbake_checkout", "oecore_checkout"))}
        paths = PARTS
    made = Project(tmp_path / "kas", repositories, *paths)
    made.count = sum(len(load_series(base, part)) for part in PARTS)
    made.arguments = (base, made.repository / "netqueue", *(["--poky"] if layout == "poky" else []))
    return made


def test_build(project, serve_nginx, tmp_path):
    """Without the series, with it, and without it again, which is what leaving out the fragment does."""
    made, before = project.make("project.yml")
    assert len(made) == RECIPES
    files = (project.folder / "build" / "sstate").rename(tmp_path / "files")
    server = serve_nginx(files)

    assert run("format-patch", *project.arguments, project=ROOT).returncode == 0
    restored, output = project.make("project.yml", "netqueue/kas.yml", mirror=server)
    assert output.count("Patch applied") == project.count
    # That no recipe of openembedded-core is in use
    assert (restored, problems(output)) == (made, problems(before))
    assert summary(output).objects == RECIPES
    assert summary(output).connections == server.counters().connections <= 8

    server.reset()
    restored, output = project.make("project.yml", mirror=server)
    assert (restored, summary(output)) == (made, None)
    assert server.counters().connections > 3 * RECIPES
