# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""The variables: what is off is stock, what is invalid stops the build, and nothing changes a hash."""

import pytest

from system.conftest import FEW
from system.observe import add_class, names, problems, restore, summary

pytestmark = pytest.mark.system

# Tells what a setscene task finds in its datastore
KEYS = """
do_populate_setscene[prefuncs] += "tell_keys"
python tell_keys() {
    with open(d.expand("${TOPDIR}/keys-${PN}"), "w") as f:
        f.write("\\n".join(sorted(d.keys())))
}
"""

CONFIGURATIONS = {"stock": "",
                  "off": 'BB_CONNECTION_CACHE = "0"',
                  "on": 'BB_CONNECTION_CACHE = "1"\nBB_CONNECTION_CACHE_MAX = "7"'}


def test_off_is_stock(mirror, make_build, stock_tree, patched_tree):
    server = mirror()
    counters, keys, stamps, files = {}, {}, {}, {}
    for name, conf in CONFIGURATIONS.items():
        server.reset()
        build = make_build(stock_tree if name == "stock" else patched_tree, server, name,
                           extra_conf=conf + '\nINHERIT += "keys"')
        add_class(build, "keys", KEYS)
        result = restore(build)
        assert result.returncode == 0 and problems(result.output) == []
        assert (summary(result.output) is not None) == (name == "on")
        counters[name] = server.counters()
        keys[name] = set((build.directory / "keys-demo-0001").read_text().splitlines())
        # Their names, as those of objects, have the hashes in
        stamps[name] = names(build.tmp / "default" / "stamps")
        files[name] = names(build.sstate)
    assert counters["off"] == counters["stock"]
    # Stock's tasks ask for both files again. Whether there is a test of pipelining, which is one more, depends on how many
    # connections had been opened when the first answer came
    assert counters["on"].requests - (counters["stock"].requests - 2 * FEW) in (0, 1)
    assert keys["off"] - {"BB_CONNECTION_CACHE"} == keys["stock"]
    assert keys["on"] - keys["off"] == {"BB_CONNECTION_CACHE_ADDRESS", "BB_CONNECTION_CACHE_MAX"}
    assert len(stamps["stock"]) > 5 and stamps["off"] == stamps["on"] == stamps["stock"]
    assert len(files["stock"]) > 5 and files["off"] == files["on"] == files["stock"]


def test_signatures_stay(make_build, stock_tree, patched_tree):
    """Hashes of all tasks, those that have no object included"""
    found = {}
    for name, conf in CONFIGURATIONS.items():
        build = make_build(stock_tree if name == "stock" else patched_tree, None, name, extra_conf=conf)
        result = build.run(["-S", "none", "demo-all"], timeout=60)
        assert (result.returncode, result.left, problems(result.output)) == (0, 0, [])
        found[name] = [path for path in names(build.tmp / "default" / "stamps") if ".sigdata." in path]
    assert len(found["stock"]) > 5 and found["off"] == found["on"] == found["stock"]


@pytest.mark.parametrize("variable, value, allowed", [
    ("BB_CONNECTION_CACHE", "maybe", '"0" or "1"'),
    ("BB_CONNECTION_CACHE", "2", '"0" or "1"'),
    ("BB_CONNECTION_CACHE_MAX", "abc", "1 to 64"),
    ("BB_CONNECTION_CACHE_MAX", "0", "1 to 64"),
    ("BB_CONNECTION_CACHE_MAX", "65", "1 to 64"),
    ("BB_SETSCENE_PREFETCH", "-1", "0 to 1024"),
    ("BB_NUMBER_NETWORK_THREADS", "0", "a positive integer"),
    ("BB_SETSCENE_PRESENCE", "hashserv", '"mirror" or "hashserv mirror"'),
])
def test_invalid_value(variable, value, allowed, mirror, make_build, patched_tree):
    server = mirror()
    build = make_build(patched_tree, server, objects=1, extra_conf='%s = "%s"' % (variable, value))
    result = restore(build)
    assert result.returncode != 0
    told = problems(result.output)
    assert len(told) == 1 and told[0].startswith("ERROR: ")
    assert 'Invalid value "%s" for %s, must be ' % (value, variable) in told[0] and allowed in told[0]
    assert "Traceback" not in result.output
    assert "Running" not in result.output and build.restored() == []
    assert server.requests() == []
