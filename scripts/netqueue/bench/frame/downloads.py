# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""What users do today: programs that download the files of a mirror. Called by build.py.

place is what build.py measures at: mirror, url, files and folder of it.

    for name, download in tools("sftp"):
        download(place, folder)             # raises Problem
"""

import os
import shutil
import subprocess
import urllib.parse
from pathlib import Path

from netqueue import Problem

CONNECTIONS = 4
SECONDS = 3600


def listing(folder):
    """{path below folder: size} of the objects' files"""
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("sstate:*")}


def tools(protocol):
    """(name, function) of the programs that can download a list of files; function(place, folder) does."""
    if protocol == "s3":
        return [("aws", by_aws)]
    if protocol != "sftp":
        if not shutil.which("curl"):
            raise Problem("curl is not installed")
        return [("curl", by_curl)]
    return [("sftp", by_sftp)] + ([("lftp", by_lftp)] if shutil.which("lftp") else [])


def by_curl(place, folder):
    lines = []
    for name in listing(place.files):
        lines.append('url = "%s/%s"\noutput = "%s/%s"\n' % (place.url, urllib.parse.quote(name), folder, name))
    config = place.folder / "curl.conf"
    config.write_text("".join(lines))
    command = ["curl", "--silent", "--show-error", "--fail", "--globoff", "--create-dirs", "--parallel",
               "--parallel-max", str(CONNECTIONS), "--config", str(config)]
    if place.mirror.served.ca_file:
        command += ["--cacert", str(place.mirror.served.ca_file)]
    call(command, place)


def by_sftp(place, folder):
    """On one connection, one file after the other: it has nothing else"""
    names = listing(place.files)
    for parent in {(folder / name).parent for name in names}:
        parent.mkdir(parents=True)
    batch = place.folder / "sftp.batch"
    parts = urllib.parse.urlsplit(place.url)
    batch.write_text("".join('get "%s/%s" "%s/%s"\n' % (parts.path, name, folder, name) for name in names))
    call([str(place.mirror.served.tools / "sftp"), "-q", "-b", str(batch), "-P", str(parts.port), parts.hostname], place)


def by_lftp(place, folder):
    parts = urllib.parse.urlsplit(place.url)
    script = ('set sftp:connect-program "%s -a -x"; set net:connection-limit %d; set cmd:fail-exit yes; '
              'open -u %s, sftp://%s:%d; mirror --parallel=%d %s %s' %
              (place.mirror.served.tools / "ssh", CONNECTIONS, place.mirror.served.user, parts.hostname, parts.port,
               CONNECTIONS, parts.path, folder))
    call(["lftp", "-c", script], place)


def by_aws(place, folder):
    call([str(place.mirror.served.tools / "aws"), "s3", "cp", "--only-show-errors", "--recursive", place.url, str(folder)], place)


def call(command, place):
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                              timeout=SECONDS, env=dict(os.environ, **place.mirror.variables))
    except subprocess.TimeoutExpired as error:
        raise Problem("%s did not end within %d s" % (Path(command[0]).name, SECONDS)) from error
    if done.returncode:
        lines = done.stdout.strip().splitlines() or ["it said nothing"]
        raise Problem("%s ended with %d: %s" % (Path(command[0]).name, done.returncode, lines[-1]))
