# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""What the packages of scripts/netqueue import of each other: nothing in a circle, and nothing more special than themselves."""

import ast

import pytest

from netqueue import ROOT

FOLDER = ROOT / "scripts" / "netqueue"
# Not part of the package: what becomes part of a bitbake tree
OTHERS = FOLDER / "lab" / "launchers"
# Package: those that it may import beside itself and the modules of netqueue/
ALLOWED = {"series": set(), "lab": {"series"}, "fuzz": set(), "bench": {"lab"}, "demo": {"lab"}}


def modules():
    """{name: path}"""
    found = {}
    for path in FOLDER.rglob("*.py"):
        if OTHERS not in path.parents:
            parts = path.relative_to(FOLDER.parent).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(path, names):
    """The modules of names that are imported, inside of functions, too"""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "%s: a relative import" % path
            for alias in node.names:
                # A module of a package, or a name of a module
                full = "%s.%s" % (node.module, alias.name)
                found.add(full if full in names else node.module)
    unknown = {name for name in found if name.split(".")[0] == "netqueue"} - set(names)
    assert not unknown, "%s imports %s" % (path, unknown)
    return found & set(names)


@pytest.fixture(scope="module")
def graph():
    """{module: modules that it imports}"""
    names = modules()
    return {name: imports_of(path, names) for name, path in names.items()}


def test_no_circle(graph):
    left = dict(graph)
    while left:
        # What imports nothing that is left cannot be part of a circle
        free = [name for name, imported in left.items() if not imported & set(left)]
        assert free, "a circle among %s" % ", ".join(sorted(left))
        for name in free:
            del left[name]


def test_what_packages_import(graph):
    for name, imported in graph.items():
        package = package_of(name)
        for other in filter(None, map(package_of, imported)):
            assert package, "%s, which all share, imports %s" % (name, other)
            assert other == package or other in ALLOWED[package], "%s imports %s" % (name, other)


def package_of(module):
    """Its package below netqueue, "" for a module in netqueue itself"""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ALLOWED else ""


def test_all_packages_are_known():
    assert {path.parent.name for path in FOLDER.glob("*/__init__.py")} == set(ALLOWED)


def test_each_package_and_module_says_what_it_is_for():
    assert [name for name, path in modules().items() if not ast.get_docstring(ast.parse(path.read_text()))] == []
