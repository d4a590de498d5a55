# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""On checkouts of upstream: bitbake's own tests, and a build with openembedded-core's real classes.

The user's checkouts are cloned at the pinned commit and not written to. These
take minutes.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile

import pytest

from netqueue import Problem, environment
from netqueue.lab.oecore import MissingPrograms, OEBuild, TargetBuild, clones
from netqueue.lab.processes import stop_processes
from netqueue.lab.trees import checkout
from netqueue.series.checkout import change, find_targets
from netqueue.series.git import git, git_ok
from netqueue.series.overrides import MASTER
from netqueue.series.patches import load_bases
from series.test_pythons import interpreter
from system.observe import damaged, problems, snapshot, summary

pytestmark = [pytest.mark.system, pytest.mark.checkout, pytest.mark.timeout(1500)]

VARIANTS = ("stock", "patched")
OLDEST = [("scarthgap", "3.8"), ("wrynose", "3.9")]
# A poky that holds both, of the base scarthgap
POKY = {"poky": "1d54d1c4736a114e1cecbe85a0306e3814d5ce70"}
SELFTESTS = ["bb.tests.runqueue", "bb.tests.fetch"]
SELFTEST_SECONDS = 1200
# Those that the series brings for what a release does not have
WITHOUT_SUBJECT = {"wrynose": {"WgetCommandTest"}, "scarthgap": {"WgetCommandTest", "URLTest", "ChecksumNamesTest"}}
BUILD_SECONDS = 600
RECIPES = 30
# It needs native and cross recipes, libraries, and some hundred objects in all
TARGET = "zlib"
# What is fetched ahead of its task takes no slot
LIMITED = 'BB_NUMBER_NETWORK_THREADS = "2"\nBB_SETSCENE_PREFETCH = "0"\n'
SIGNED = 'SSTATE_VERIFY_SIG = "1"\nGPG_PATH = "%s"\nSSTATE_SIG_KEY = "%s"\nSSTATE_VALID_SIGS = "%s"\n'
# Some tests commit without saying who they are, and one forgets that BB_SKIP_NETTESTS is set
GITCONFIG = """
[user]
name = test
email = test@example.com
[protocol]
allow = never
[protocol "file"]
allow = always
"""


@pytest.fixture(scope="module", autouse=True)
def needs_locale():
    """Unlike the launchers of the tree from the package, upstream's programs do not run without it"""
    if not environment.has_locale():
        pytest.skip("the locale %s is missing" % environment.LOCALE)


@pytest.fixture(scope="module", params=load_bases())
def bitbakes(bitbake_checkout, tmp_path_factory, request):
    """{"stock": path, "patched": path} of a base; skips another base than master if the checkout does not have it"""
    folder = tmp_path_factory.mktemp("bitbakes")
    return {name: clones_or_skip(folder / name, {"bitbake": bitbake_checkout}, name, request.param).path for name in VARIANTS}


def clones_or_skip(folder, sources, name, base):
    try:
        return clones(folder, sources, name == "patched", base)
    except Problem as problem:
        if base == MASTER:
            raise
        pytest.skip(str(problem))


@pytest.fixture(scope="module", params=[*load_bases(), *POKY])
def trees(bitbake_checkout, oecore_checkout, tmp_path_factory, request):
    """{"stock": Tree, "patched": Tree} of a base; skips another base than master if the checkouts do not have it"""
    folder = tmp_path_factory.mktemp("trees")
    if request.param in POKY:
        source = request.getfixturevalue("poky_checkout")
        return {name: poky_tree(source, folder / name, POKY[request.param], name == "patched") for name in VARIANTS}
    sources = {"bitbake": bitbake_checkout, "openembedded-core": oecore_checkout}
    return {name: clones_or_skip(folder / name, sources, name, request.param) for name in VARIANTS}


def poky_tree(source, folder, commit, patched):
    if not git_ok(source, "cat-file", "-e", commit + "^{commit}"):
        pytest.skip("%s does not have the commit %s" % (source, commit[:12]))
    git(folder.parent, "clone", "--quiet", "--shared", "--no-checkout", str(source), str(folder))
    git(folder, "checkout", "--quiet", "-b", "base", commit)
    if patched:
        change(find_targets(folder), reverse=False, dry_run=False)
    tree = checkout(folder / "bitbake")
    tree.oecore = folder
    return tree


@pytest.fixture(scope="module")
def real_files(trees, tmp_path_factory):
    """The folder of a mirror with RECIPES objects that openembedded-core's classes have made"""
    with OEBuild(tmp_path_factory.mktemp("fill") / "build", trees["stock"], objects=RECIPES, threads=8) as build:
        restore(build, "demo-all")
        assert len(build.archives()) == RECIPES
    return build.sstate


def search_path(tree):
    return ":".join([str(tree / "bin"), os.path.dirname(sys.executable), os.environ["PATH"]])


# bitbake's own tests

def test_selftests(bitbakes, tmp_path, request):
    """Each test has the same outcome on both trees, and those that the series brings pass, but for WITHOUT_SUBJECT."""
    own = sorted("bb.tests." + path.stem for path in (bitbakes["patched"] / "lib" / "bb" / "tests").glob("*.py")
                 if not (bitbakes["stock"] / "lib" / "bb" / "tests" / path.name).exists())
    running = {name: selftest(tree, tmp_path / name, SELFTESTS + (own if name == "patched" else []))
               for name, tree in bitbakes.items()}
    try:
        outcomes = {name: ended(process, tmp_path / name) for name, process in running.items()}
    finally:
        for name in bitbakes:
            stop_processes(tmp_path / name / "home")
    for module in SELFTESTS:
        assert [test for test, outcome in outcomes["stock"].items() if module in test and outcome == "ok"]
    new = {test: outcome for test, outcome in outcomes["patched"].items() if test not in outcomes["stock"]}
    assert not own or new
    skipped = {test for test, outcome in new.items() if outcome == "skipped"}
    assert set(new.values()) <= {"ok", "skipped"}
    assert {test.split(".")[-2] for test in skipped} == WITHOUT_SUBJECT.get(request.node.callspec.params["bitbakes"], set())
    assert {test: outcomes["patched"].get(test) for test in outcomes["stock"]} == outcomes["stock"]


def selftest(tree, folder, modules):
    folder.mkdir()
    (folder / "home").mkdir()
    (folder / "tmp").mkdir()
    environment = {"PATH": search_path(tree), "HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp"),
                   "LC_ALL": "en_US.UTF-8", "BB_SKIP_NETTESTS": "yes", "PYTHONDONTWRITEBYTECODE": "1"}
    (folder / "home" / ".gitconfig").write_text(GITCONFIG)
    with open(folder / "output", "wb") as output:
        return subprocess.Popen([sys.executable, str(tree / "bin" / "bitbake-selftest"), "-v", *modules],
                                cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=output,
                                stderr=subprocess.STDOUT, start_new_session=True)


def ended(process, folder):
    """{test: outcome}, as unittest -v tells"""
    process.wait(SELFTEST_SECONDS)
    text = (folder / "output").read_text(errors="replace")
    # The first line of a test's description may stand before the dots
    outcomes = dict(re.findall(r"^(test\w+ \([\w.]+\))(?:\n.*)? \.\.\. (ok|FAIL|ERROR|skipped|expected failure)",
                               text, re.MULTILINE))
    ran = re.search(r"^Ran (\d+) tests", text, re.MULTILINE)
    assert ran and len(outcomes) == int(ran.group(1)), text[-5000:]
    return outcomes


# A build with openembedded-core's classes

def restore(build, *arguments):
    try:
        result = build.run(arguments, timeout=BUILD_SECONDS)
    except MissingPrograms as problem:
        pytest.skip(str(problem))
    assert (result.returncode, result.left) == (0, 0), result.output
    return result


@pytest.mark.parametrize("protocol", ["http", "https", "sftp"])
def test_real_classes(protocol, trees, real_files, any_mirror, tmp_path):
    server = any_mirror(protocol, real_files)
    outputs, summaries, left, counters = {}, {}, {}, {}
    for name in ("stock", "patched", "limited"):
        server.reset()
        with OEBuild(tmp_path / name, trees["stock" if name == "stock" else "patched"], objects=RECIPES, threads=8,
                     mirror=server, extra_conf=LIMITED if name == "limited" else "") as build:
            result = restore(build, "--setscene-only", "demo-all")
        assert len(build.restored()) == RECIPES
        outputs[name] = result.output
        counters[name] = server.counters()
        summaries[name] = re.findall(r"^(?:.*\.\.\.)?(Sstate summary: .*)$", result.output, re.MULTILINE)
        # The class touches what it unpacks. Stock's query makes folders, with another mode than its tasks.
        left[name] = {path: (entry.mode, entry.digest) for path, entry in snapshot(build.sstate).items()
                      if entry.digest}
    assert len(summaries["stock"]) == 1 and "Missed 0" in summaries["stock"][0]
    assert len(left["stock"]) == 2 * RECIPES
    # Over sftp stock asks for nothing before, and logs in for each file
    if protocol == "sftp":
        assert counters["stock"].logins == 2 * RECIPES
    else:
        assert counters["stock"].connections > 3 * RECIPES
    for name in ("patched", "limited"):
        assert summaries[name] == summaries["stock"]
        assert left[name] == left["stock"]
        assert damaged(tmp_path / name / "sstate", real_files) == []
        # They name the folder of the layer
        assert len(problems(outputs[name])) == len(problems(outputs["stock"]))
        # There are eight threads: under load a machine's server looks slow, and is asked over more than four
        assert summary(outputs[name]).connections == counters[name].connections <= 8
        assert summary(outputs[name]).requests == counters[name].requests
    assert "Network tasks" not in outputs["patched"]
    assert "NOTE: Network tasks: peak of 2 (limit 2)" in outputs["limited"]


@pytest.fixture
def signing(tmp_path_factory):
    """Settings with which objects are signed and verified, by a key of their own"""
    if not shutil.which("gpg"):
        pytest.skip("gpg is missing")
    # The path of the agent's socket has to be short
    with tempfile.TemporaryDirectory() as folder:
        gpg = ["gpg", "--homedir", folder, "--batch", "--quiet", "--passphrase", "", "--pinentry-mode", "loopback"]
        subprocess.run([*gpg, "--quick-generate-key", "test@example.com", "ed25519", "sign"], check=True, stderr=subprocess.PIPE)
        listing = subprocess.run([*gpg, "--list-keys", "--with-colons"], check=True, stdout=subprocess.PIPE, text=True).stdout
        key = re.search("^fpr:+([0-9A-F]+):", listing, re.MULTILINE)[1]
        try:
            yield SIGNED % (folder, key, key[-16:])
        finally:
            subprocess.run(["gpgconf", "--homedir", folder, "--kill", "all"], check=True)


def test_signed_objects(trees, signing, any_mirror, tmp_path):
    """Signatures are fetched ahead as well; an object with another's signature, or with none, is not installed."""
    with OEBuild(tmp_path / "fill", trees["stock"], objects=RECIPES, threads=8, extra_conf=signing) as build:
        restore(build, "demo-all")
    signatures = sorted(build.sstate.rglob("*.tar.zst.sig"))
    assert len(signatures) == RECIPES
    shutil.copyfile(signatures[0], signatures[1])
    signatures[2].unlink()
    server = any_mirror("http", build.sstate)
    results, restored, wgets = {}, {}, {}
    for name in VARIANTS:
        with OEBuild(tmp_path / name, trees[name], objects=RECIPES, threads=8, mirror=server, extra_conf=signing) as build:
            result = build.run(["-DD", "--setscene-only", "demo-all"], timeout=BUILD_SECONDS)
        results[name] = result.returncode, result.output.count("skipping acceleration...\n")
        restored[name] = build.restored()
        wgets[name] = result.output.count("Fetcher accessed the network with the command")
    assert restored["patched"] == restored["stock"] and len(restored["stock"]) == RECIPES - 2
    assert results["patched"] == results["stock"]
    assert wgets["stock"] > 2 * RECIPES
    assert wgets["patched"] <= 2, "what is missing may be looked for by other means"


@pytest.mark.parametrize("protocol", ["http", "https", "sftp"])
@pytest.mark.parametrize("base, version", OLDEST)
def test_oldest_python(base, version, protocol, bitbake_checkout, oecore_checkout, any_mirror, tmp_path):
    """A restore by the oldest Python that a base supports"""
    python = interpreter(version)
    if python is None:
        pytest.skip("Python %s is not installed, or not complete" % version)
    sources = {"bitbake": bitbake_checkout, "openembedded-core": oecore_checkout}
    tree = clones_or_skip(tmp_path / "tree", sources, "patched", base)
    with OEBuild(tmp_path / "fill", tree, objects=RECIPES, threads=8, python=python) as build:
        restore(build, "demo-all")
    server = any_mirror(protocol, build.sstate)
    with OEBuild(tmp_path / "patched", tree, objects=RECIPES, threads=8, mirror=server, python=python) as build:
        result = restore(build, "--setscene-only", "demo-all")
    assert len(build.restored()) == RECIPES
    assert damaged(build.sstate, tmp_path / "fill/sstate") == []
    assert (summary(result.output).objects, summary(result.output).connections <= 8) == (RECIPES, True)


@pytest.fixture(scope="module")
def target_files(trees, tmp_path_factory):
    """The folder of a mirror with made-up objects of all that TARGET needs"""
    with TargetBuild(tmp_path_factory.mktemp("fill") / "build", trees["stock"], TARGET, threads=8) as build:
        try:
            build.make_objects()
        except MissingPrograms as problem:
            pytest.skip(str(problem))
    return build.sstate


@pytest.mark.parametrize("protocol", ["http", "sftp"])
def test_target(protocol, trees, target_files, any_mirror, tmp_path):
    """What openembedded-core's own recipes set lets their objects be fetched ahead, and their tasks share connections."""
    number = len(list(target_files.rglob("sstate:*.tar.zst")))
    server = any_mirror(protocol, target_files)
    for name, conf in (("patched", ""), ("limited", LIMITED)):
        server.reset()
        with TargetBuild(tmp_path / name, trees["patched"], TARGET, threads=8, mirror=server, extra_conf=conf) as build:
            result = restore(build, "-DD", "--setscene-only", TARGET)
        assert len(build.restored()) == number
        assert damaged(build.sstate, target_files) == []
        # What is told of each host comes before
        told = summary("\n".join(line for line in result.output.splitlines() if not line.startswith("DEBUG:")))
        assert (told.objects, told.connections <= 8) == (number, True)
        assert told.connections == server.counters().connections
        assert result.output.count("Fetched ahead for") == (0 if conf else number)
