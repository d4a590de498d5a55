# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""The demo's table, and which mirrors it can have"""

import shutil
import subprocess
import sys

import pytest

from netqueue import ROOT, Problem, environment
from netqueue.demo import commandline as demo
from netqueue.demo.table import table


def run(tree, protocol, requests, asked=True):
    row = {"tree": tree, "protocol": protocol, "restored": 3, "lost": 0, "connections": 12 if tree == "stock" else 4,
           "requests": requests, "presence_seconds": 1.0, "seconds": 2.0}
    return row, {"software": "a server", "presence_cpu_seconds": 0.5, "asked": asked, "problem": ""}


def lines(*runs):
    """The table's, by title"""
    text = table([row for row, _ in runs], [detail for _, detail in runs])
    return {line[9:37].strip(): line[37:].split() for line in text.splitlines()[1:]}


def test_table():
    shown = lines(run("stock", "http", 15), run("patched", "http", 12))
    assert shown["connections accepted"] == ["12", "4", "0.333"]
    assert shown["requests"] == ["15", "12", "0.800"]
    assert shown["presence query, seconds"] == ["1.00", "1.00", "1.000"]
    assert shown["objects lost"] == ["0", "0", "-"]


def test_table_without_what_was_not_measured():
    """Stock bitbake does not ask over sftp, and sshd's own sftp server does not log requests"""
    shown = lines(run("stock", "sftp", None, asked=False), run("patched", "sftp", None))
    assert "requests" not in shown
    assert shown["presence query, seconds"] == ["-", "1.00", "-"]


def test_table_of_s3():
    shown = lines(*((row, dict(detail, aws=number)) for (row, detail), number in
                    ((run("stock", "s3", 15), 15), (run("patched", "s3", 9), 0))))
    assert shown["processes of aws"] == ["15", "0", "0.000"]
    assert "processes of aws" not in lines(run("stock", "http", 15), run("patched", "http", 12))


def test_no_s3_server(monkeypatch, capsys):
    monkeypatch.setattr("netqueue.lab.s3server.missing", lambda: "aws")
    assert demo._runnable(("http", "s3")) == ["http"]
    assert capsys.readouterr().out == "s3 is left out: aws is not installed\n"
    with pytest.raises(Problem, match="s3: aws is not installed"):
        demo._runnable(("s3",))


def test_no_sshd(monkeypatch, capsys):
    monkeypatch.setattr("netqueue.lab.sshd.missing", lambda: "sshd")
    assert demo._runnable(("http", "https", "sftp")) == ["http", "https"]
    assert capsys.readouterr().out == "sftp is left out: sshd is not installed\n"
    assert demo._runnable(("http",)) == ["http"]
    with pytest.raises(Problem, match="sshd is not installed"):
        demo._runnable(("sftp",))


# One line for what is missing

def test_no_wget(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "SYSTEM_PATH", "")
    monkeypatch.setattr(environment, "can_install", lambda: False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Problem, match="wget, which is not installed"):
        demo._prepare(("http",))


def test_no_registry(tmp_path, monkeypatch):
    """pip says at last that there is no such package"""
    for name, value in {"PIP_CONFIG_FILE": "/dev/null", "PIP_INDEX_URL": "https://127.0.0.1:1/simple", "PIP_RETRIES": "1"}.items():
        monkeypatch.setenv(name, value)
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(Problem, match="^pip cannot reach the package registry: [^<>]*Connection refused$"):
        environment.pip_install(sys.executable, ["no-such-package-of-netqueue"])


def test_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Problem, match="file cannot be written to$"):
        environment.ensure_venv(tmp_path / "file" / "venv", say=lambda line: None)


def test_no_loopback():
    """In a network namespace, where it is down"""
    apart = ["unshare", "--map-root-user", "--net"]
    if not shutil.which("unshare") or subprocess.run([*apart, "true"], stderr=subprocess.DEVNULL).returncode:
        pytest.skip("no network namespace can be made")
    done = subprocess.run([*apart, sys.executable, str(ROOT / "scripts" / "demo")], stdin=subprocess.DEVNULL, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "demo: a mirror cannot be run on 127.0.0.1: Network is unreachable\n"
