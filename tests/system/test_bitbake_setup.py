# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""What bitbake-setup lays out takes up the series as README.md says: with the real bitbake-setup, and upstream's checkouts."""

import json
import os
import shutil
import subprocess

import pytest

from netqueue import ROOT, environment
from netqueue.lab.oecore import MACHINE, OEBuild
from netqueue.lab.trees import Tree
from netqueue.series.git import git, git_ok
from netqueue.series.patches import PARTS, load_bases, load_series
from series.synthetic import run
from system.observe import problems, summary

pytestmark = [pytest.mark.system, pytest.mark.checkout, pytest.mark.timeout(1500)]

BASES = load_bases()
RECIPES = 8
SECONDS = 600
BRANCH = "release"
# Not scarthgap's bitbake
WITH_BITBAKE_SETUP = [base for base in BASES if base != "scarthgap"]


def publish(checkout, folder, commit):
    """A repository whose branch has what that commit of the checkout has, without its history. It borrows the objects."""
    if not git_ok(checkout, "cat-file", "-e", commit + "^{commit}"):
        pytest.skip("%s does not have the commit %s" % (checkout, commit[:12]))
    folder.mkdir(parents=True)
    git(folder, "init", "--quiet")
    objects = git(checkout, "rev-parse", "--path-format=absolute", "--git-path", "objects").strip()
    (folder / ".git" / "objects" / "info" / "alternates").write_text(objects + "\n")
    tree = git(checkout, "rev-parse", commit + "^{tree}").strip()
    git(folder, "branch", BRANCH, git(folder, "commit-tree", "-m", "Release", tree).strip())
    git(folder, "checkout", "--quiet", BRANCH)
    return folder


class Setup:
    """The folder that bitbake-setup makes of the repositories, {part: one of publish()}."""

    def __init__(self, folder, repositories):
        self.repositories = repositories
        self.home = folder / "home"
        self.home.mkdir()
        (self.home / ".gitconfig").write_text("[user]\n\tname = Some User\n\temail = user@example.com\n")
        configuration = {"description": "one", "version": "1.0", "sources": {
            part: {"git-remote": {"uri": "file://%s" % path, "branch": BRANCH, "rev": BRANCH}}
            for part, path in repositories.items()},
            "bitbake-setup": {"configurations": [{"name": "one", "description": "one", "setup-dir-name": "setup",
                                                  "bb-layers": ["openembedded-core/meta"]}]}}
        (folder / "one.conf.json").write_text(json.dumps(configuration))
        self.bitbake_setup("init", "--non-interactive", str(folder / "one.conf.json"), folder=folder)
        self.folder = folder / "bitbake-builds" / "setup"
        self.build = OEBuild(folder / "own", Tree(self.layer("bitbake"), oecore=self.layer("openembedded-core")), objects=RECIPES)
        conf = self.folder / "build" / "conf"
        self.local_conf = (conf / "local.conf").read_text()
        with open(conf / "bblayers.conf", "a") as text:
            text.write('BBLAYERS += "%s"\n' % self.build.layer)

    def layer(self, part):
        return self.folder / "layers" / part

    def shell(self, command, folder):
        variables = {"PATH": os.environ["PATH"], "HOME": str(self.home), "LC_ALL": "en_US.UTF-8", "BB_SERVER_TIMEOUT": "0"}
        done = subprocess.run(["bash", "-c", command], cwd=folder, env=variables, stdin=subprocess.DEVNULL, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=SECONDS)
        assert done.returncode == 0, done.stdout[-6000:]
        return done.stdout

    def bitbake_setup(self, *arguments, folder):
        self.shell(" ".join([str(self.repositories["bitbake"] / "bin" / "bitbake-setup"), *arguments]), folder)

    def make(self, mirror=None):
        """Build from nothing; returns the names of what there is then, and what was said."""
        build = self.folder / "build"
        for name in ("tmp", "sstate"):
            shutil.rmtree(build / name, ignore_errors=True)
        self.build.mirror = mirror
        (build / "conf" / "local.conf").write_text(self.local_conf + self.build._local_conf())
        output = self.shell(". ./init-build-env && bitbake demo-all", build)
        return sorted(path.stem for path in (build / "tmp" / "deploy" / "images" / MACHINE).glob("demo-*.blob")), output


@pytest.fixture(params=WITH_BITBAKE_SETUP)
def setup(request, tmp_path):
    if not environment.has_locale():
        pytest.skip("the locale %s is missing" % environment.LOCALE)
    checkouts = [request.getfixturevalue(fixture) for fixture in ("bitbake_checkout", "oecore_checkout")]
    made = Setup(tmp_path, {part: publish(checkout, tmp_path / "upstream" / part, BASES[request.param][part]["commit"])
                            for part, checkout in zip(PARTS, checkouts)})
    made.base = request.param
    return made


def test_build(setup, serve_nginx, tmp_path):
    """Without the series, with it, and after an update of what it is on."""
    made, before = setup.make()
    assert len(made) == RECIPES
    server = serve_nginx((setup.folder / "build" / "sstate").rename(tmp_path / "files"))
    assert run("apply", setup.folder, project=ROOT).returncode == 0
    for updated in (False, True):
        if updated:
            for path in setup.repositories.values():
                git(path, "commit", "--quiet", "--allow-empty", "--message", "Later")
            setup.bitbake_setup("update", "--update-bb-conf", "no", "--setup-dir", str(setup.folder), folder=tmp_path)
        for part in PARTS:
            count = len(load_series(setup.base, part))
            log = git(setup.layer(part), "log", "--format=%s").splitlines()
            assert log[count:] == ["Later", "Release"][not updated:]
        server.reset()
        restored, output = setup.make(server)
        assert (restored, problems(output)) == (made, problems(before))
        assert summary(output).objects == RECIPES
        assert summary(output).connections == server.counters().connections <= 8
