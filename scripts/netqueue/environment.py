# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""What a fresh machine lacks: a venv with the needed modules, and programs.

scripts/demo and scripts/test call this before anything else; so it is
standard library only. Programs are installed by apt-get when we are root
and it is there; nothing is ever installed otherwise, and what is missing
then is said in one line.

    python = ensure_venv(ROOT / "build/venv", [REQUIREMENTS])
    failure = install_optional(ROOT / "build/venv", MORE_REQUIREMENTS)
    if not ensure_program("wget", "wget"): ...
"""

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from netqueue import Problem

REQUIREMENTS = Path(__file__).resolve().parent / "requirements.txt"
S3_REQUIREMENTS = REQUIREMENTS.with_name("requirements-s3.txt")
INSTALL_SECONDS = 900
SYSTEM_PATH = ":/usr/local/sbin:/usr/sbin:/sbin"
POLICY = Path("/usr/sbin/policy-rc.d")
UNITS = (Path("/usr/lib/systemd/system"), Path("/lib/systemd/system"))
LOCALE = "en_US.UTF-8"


def ensure_venv(venv, requirements=(REQUIREMENTS,), say=print):
    """The venv's python, with all requirement files installed. Raises Problem.

    Made anew when the interpreter or a requirement file has changed.
    """
    venv = Path(venv)
    python = venv / "bin" / "python"
    wanted = hashlib.sha256(sys.version.encode())
    for path in requirements:
        wanted.update(Path(path).read_bytes())
    stamp = venv / ".netqueue-stamp"
    if stamp.is_file() and stamp.read_text() == wanted.hexdigest() and python.exists():
        return python
    say("Making a Python venv in %s" % venv)
    with contextlib.suppress(OSError):
        venv.parent.mkdir(parents=True, exist_ok=True)
    if not (venv.parent.is_dir() and os.access(venv.parent, os.W_OK)):
        raise Problem("%s cannot be written to" % venv.parent)
    _make_venv(venv)
    for path in requirements:
        pip_install(python, ["--require-hashes", "--requirement", str(path)])
    stamp.write_text(wanted.hexdigest())
    return python


def install_optional(venv, requirements, say=print):
    """Install a requirement file into a venv that ensure_venv() has made. Returns "", or why it cannot be had.

    Tried once: again only when the file has changed, or the venv was made anew.
    """
    wanted = hashlib.sha256(Path(requirements).read_bytes()).hexdigest()
    stamp = Path(venv) / (".netqueue-" + Path(requirements).stem)
    if stamp.is_file():
        digest, _, failure = stamp.read_text().partition(" ")
        if digest == wanted:
            return failure
    say("Installing %s into %s" % (Path(requirements).name, venv))
    failure = ""
    try:
        # The files name all that is needed, and of some packages not all that these ask for
        pip_install(Path(venv) / "bin" / "python", ["--require-hashes", "--no-deps", "--requirement", str(requirements)])
    except Problem as problem:
        failure = str(problem)
    stamp.write_text("%s %s" % (wanted, failure))
    return failure


def _make_venv(venv):
    command = [sys.executable, "-m", "venv", "--clear", str(venv)]
    output = []
    if _run(command, output) == 0:
        return
    # Debian has ensurepip in a package of its own, named after the version.
    packages = ["python3-venv"]
    if sys.executable.startswith("/usr/bin/"):
        packages.append("python%d.%d-venv" % sys.version_info[:2])
    if apt_install(*packages) and _run(command, output) == 0:
        return
    why = "install the package python3-venv" if "ensurepip is not" in "".join(output) else last_line(output)
    raise Problem("%s cannot make a venv: %s" % (sys.executable, why))


def pip_install(python, arguments):
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    output = []
    if _run(command + arguments, output):
        raise Problem(unreachable_registry(output) or "pip install failed: %s" % last_line(output))


def unreachable_registry(output):
    """That pip could not reach the registry, and why; None if it could. At last it says that there is no such package."""
    found = re.search(r"connection broken by '(.*)': /", "\n".join(output))
    if not found:
        return None
    return "pip cannot reach the package registry: %s" % re.sub(r"^\w+\(.*>: |['\"]?\)$", "", found.group(1))


def ensure_program(name, package, say=print):
    """True if the program is there, now or after apt-get. Never raises."""
    if _which(name):
        return True
    if not can_install():
        return False
    say("Installing %s by apt-get" % package)
    apt_install(package)
    return _which(name) is not None


def ensure_locale(say=print):
    """True if there is the locale that bitbake demands, now or after apt-get and localedef. Never raises."""
    if has_locale():
        return True
    if not can_install():
        return False
    say("Making the locale %s" % LOCALE)
    apt_install("locales")
    return _run(["localedef", "-i", "en_US", "-f", "UTF-8", LOCALE]) == 0 and has_locale()


def has_locale():
    """As bitbake looks for it. In another process, since what a process has looked up stays as it was."""
    code = "import locale; locale.setlocale(locale.LC_CTYPE, %r)" % LOCALE
    return _run([sys.executable, "-c", code]) == 0


def _which(name):
    return shutil.which(name, path=os.environ.get("PATH", os.defpath) + SYSTEM_PATH)


def can_install():
    return os.geteuid() == 0 and _which("apt-get") is not None


def apt_install(*packages):
    """True if apt-get could install them. Asks for new package lists if the first try fails."""
    if not can_install():
        return False
    install = ["apt-get", "install", "--yes", "--no-install-recommends"] + list(packages)
    with _services_stay_off():
        if _run(install) == 0:
            return True
        return _run(["apt-get", "update"]) == 0 and _run(install) == 0


@contextlib.contextmanager
def _services_stay_off():
    """Debian starts a server when it installs it, and at each boot; we run our own, on a port of our own."""
    before = _services()
    written = not POLICY.exists()
    if written:
        POLICY.write_text("#!/bin/sh\nexit 101\n")
        POLICY.chmod(0o755)
    try:
        yield
    finally:
        if written:
            POLICY.unlink()
        new = sorted(_services() - before)
        if new:
            _run(["systemctl", "disable", *new])


def _services():
    """Names of those that systemd could start at boot"""
    return {path.name for folder in UNITS for path in folder.glob("*.service") if not path.name.endswith("@.service")}


def _run(command, output=None):
    """The exit code; 1 if it cannot be run or takes too long. Its output is added to the list."""
    environment = dict(os.environ, DEBIAN_FRONTEND="noninteractive")
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
                              stderr=subprocess.STDOUT, env=environment, timeout=INSTALL_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        if output is not None:
            output.append(str(error))
        return 1
    if output is not None:
        output.append(done.stdout)
    return done.returncode


def last_line(output):
    lines = "\n".join(output).strip().splitlines()
    return lines[-1] if lines else "it said nothing"
