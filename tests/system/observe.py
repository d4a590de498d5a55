# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""What a build did, for asserting it: its messages, files, processes and sockets.

    result = restore(build)
    assert problems(result.output) == []
    assert summary(result.output).connections <= 4
"""

import collections
import hashlib
import os
import re
import stat
import threading
import urllib.parse

from netqueue.lab.sshd import Sshd

# A multiconfig whose objects have other names
SECOND = {"second": 'PR = "r1"\n'}
# Only bounds a test that fails
SECONDS = 120

Summary = collections.namedtuple("Summary", "objects mib seconds requests connections retries refusals")
Entry = collections.namedtuple("Entry", "mode mtime_ns digest")

_SUMMARY = re.compile(r"^NOTE: Sstate network: (\d+) objects?, ([\d.]+) MiB in ([\d.]+) s, (\d+) requests? over "
                      r"(\d+) connections? \((\d+) retr(?:y|ies), (\d+) refusals?\)$", re.MULTILINE)


def restore(build, *targets):
    """Restore all objects of build. Fails if bitbake left a process."""
    result = build.run(["--setscene-only", *(targets or ["demo-all"])], SECONDS)
    assert result.left == 0, "bitbake left processes:\n" + result.output
    return result


def add_class(build, name, text):
    """A class in the build's layer; its name belongs into INHERIT, in extra_conf."""
    (build.layer / "classes" / (name + ".bbclass")).write_text(text)


def make_absent(build, *numbers):
    """Give the objects of these recipes another size, and thus another hash, than those of the filled mirror."""
    for number in numbers:
        (build.layer / "recipes" / ("demo-%04d.bb" % number)).write_text('DEMO_SIZE = "77"\n')


def problems(output):
    """The lines that tell the user of a problem"""
    # Without a terminal a stage's title, which ends so, has no line of its own
    return re.findall(r"^(?:.*\.\.\.)?((?:WARNING:|ERROR:|FATAL:|Traceback).*)$", output, re.MULTILINE)


def summary(output):
    """The Summary of the line 'Sstate network', which there may be once, or None"""
    found = _SUMMARY.findall(output)
    assert len(found) == output.count("Sstate network") and len(found) < 2, output
    if not found:
        return None
    return Summary(*(float(value) if "." in value else int(value) for value in found[0]))


def snapshot(folder):
    """{path below folder: Entry}; of folders the mode only."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        if stat.S_ISREG(status.st_mode):
            entry = Entry(status.st_mode, status.st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        else:
            entry = Entry(status.st_mode, None, os.readlink(path) if path.is_symlink() else None)
        found[str(path.relative_to(folder))] = entry
    return found


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


def unfinished(sstate):
    """Names in SSTATE_DIR of what is neither an object nor its .siginfo"""
    return [name for name in names(sstate) if not name.endswith((".tar.zst", ".siginfo"))]


def damaged(sstate, mirror_files):
    """Names in SSTATE_DIR of objects and .siginfo files that differ from the mirror's"""
    return [name for name in names(sstate) if name.endswith((".tar.zst", ".siginfo"))
            and (sstate / name).read_bytes() != (mirror_files / name).read_bytes()]


def outcome(build, result):
    """What is compared: how it ended, what was said, what is there."""
    said = [re.sub(r"/\S*/|\b\d+(\.\d+)?\b", "_", line.replace(str(build.directory), ""))
            for line in problems(result.output)]
    return {"returncode": result.returncode, "said": sorted(said), "restored": build.restored(),
            "names": names(build.sstate)}


def not_ahead(output):
    """{recipe: why its object was not fetched ahead}, which bitbake tells with -D"""
    return dict(re.findall(r"^DEBUG: Not fetch(?:ed|ing) ahead for \S*/(demo-\d{4})\.bb:do_populate: (.*)$",
                           output, re.MULTILINE))


_SFTP = re.compile(r'^(l?stat name|open) "([^"]*)"')


def asked(server):
    """
    What a nginx or a sshd was asked for, a list of (method, name below its folder). Over sftp to ask whether there is
    a file is HEAD, to open it GET. OPTIONS is left out: it asks about the server (whether it can pipeline).
    """
    if not isinstance(server, Sshd):
        return [(request.method, urllib.parse.unquote(request.path).lstrip("/")) for request in server.requests()
                if request.method != "OPTIONS"]
    found = [_SFTP.match(line) for lines in server.requests() for line in lines]
    return [("GET" if match.group(1) == "open" else "HEAD", os.path.relpath(match.group(2), server.directory))
            for match in found if match]


def wait_until(condition, what, seconds=30):
    """For what can only be looked at. Returns what condition returned."""
    tick = threading.Event()
    for _ in range(seconds * 20):
        value = condition()
        if value:
            return value
        tick.wait(0.05)
    raise AssertionError("still not so: " + what)


def server_pid(build):
    """Of the bitbake server, which writes it into its lock file"""
    return int((build.directory / "bitbake.lock").read_text().split()[0])


def server_log(build):
    return (build.directory / "bitbake-cookerdaemon.log").read_text()


def thread_count(pid):
    return len(os.listdir("/proc/%d/task" % pid))


def open_sockets(pid):
    """The inodes of the sockets of a process"""
    found = set()
    for fd in os.listdir("/proc/%d/fd" % pid):
        try:
            target = os.readlink("/proc/%d/fd/%s" % (pid, fd))
        except FileNotFoundError:
            continue
        if target.startswith("socket:["):
            found.add(target[len("socket:["):-1])
    return found


def connections_to(port, pid):
    """How many TCP sockets of the process are connected to this port"""
    inodes = open_sockets(pid)
    count = 0
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        if os.path.exists(table):
            with open(table) as lines:
                for fields in map(str.split, list(lines)[1:]):
                    count += int(fields[2].rpartition(":")[2], 16) == port and fields[9] in inodes
    return count


def shared_sockets(pid):
    """Names of the process's abstract sockets that setscene tasks connect to"""
    inodes = open_sockets(pid)
    with open("/proc/net/unix") as lines:
        fields = [line.split() for line in lines]
    return [entry[7] for entry in fields if len(entry) > 7 and entry[7].startswith("@bitbake-") and entry[6] in inodes]
