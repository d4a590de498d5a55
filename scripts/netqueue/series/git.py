# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""Git, with nothing of the user's configuration in it.

patches.py, checkout.py and export.py call this. What a patch or a commit
looks like must depend on the repository and the arguments only: the user's
and the system's configuration, hooks, signing, the time zone, the locale and
the GIT_ variables of the environment are kept out. The one thing taken over is
safe.directory, without which git refuses checkouts of another user.
It keeps no state but that list, and starts no thread.

    head = git(repo, "rev-parse", "HEAD").strip()
    if git_ok(repo, "apply", "--check", patch): ...
"""

import functools
import os
import subprocess

from netqueue import Problem

# The neutral identity of every commit and patch of the series.
NAME = "BitBake Contributors"
EMAIL = "bitbake-devel@lists.openembedded.org"

# Also the repository's own configuration must not change what we do.
SETTINGS = {
    "advice.detachedHead": "false",
    "apply.ignoreWhitespace": "no",
    "apply.whitespace": "nowarn",
    "commit.gpgSign": "false",
    "core.fsmonitor": "false",
    "core.hooksPath": os.devnull,
    "core.quotePath": "false",
    "diff.context": "3",
    "diff.indentHeuristic": "true",
    "diff.interHunkContext": "0",
    "diff.mnemonicPrefix": "false",
    "diff.noprefix": "false",
    "diff.orderFile": os.devnull,
    "diff.suppressBlankEmpty": "false",
    "gc.auto": "0",
    "i18n.commitEncoding": "UTF-8",
    "i18n.logOutputEncoding": "UTF-8",
    "log.showSignature": "false",
    "maintenance.auto": "false",
    "rerere.enabled": "false",
    "submodule.recurse": "false",
}


class GitError(Problem):
    """A git command failed. `stderr` holds all it said; the text is one line of it."""

    def __init__(self, args, stderr):
        self.stderr = stderr
        super().__init__("git %s: %s" % (args[0], first_error(stderr)))


def first_error(stderr):
    """The line of git's messages that names the cause."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    for line in lines:
        for start in ("error: ", "fatal: "):
            if line.startswith(start):
                return line[len(start):]
    return lines[0] if lines else "failed without a message"


def git(folder, *args, data=None, ceiling=None):
    """Run git in folder and return what it printed, as text. Raises GitError.

    data: text for its standard input. ceiling: a folder above which git looks for no repository.
    """
    return git_bytes(folder, *args, data=data, ceiling=ceiling).decode("utf-8", "surrogateescape")


def git_bytes(folder, *args, data=None, ceiling=None):
    """As git(), but the output as bytes."""
    done = _run(folder, args, data, ceiling)
    if done.returncode:
        raise GitError(args, done.stderr.decode("utf-8", "replace"))
    return done.stdout


def git_ok(folder, *args):
    """Whether the command succeeds. For questions, not for actions."""
    return _run(folder, args, None, None).returncode == 0


def _run(folder, args, data, ceiling):
    command = ["git"]
    for key, value in SETTINGS.items():
        command += ["-c", "%s=%s" % (key, value)]
    for path in _safe_directories():
        command += ["-c", "safe.directory=%s" % path]
    env = _environment()
    if ceiling:
        env["GIT_CEILING_DIRECTORIES"] = os.path.realpath(ceiling)
    if data is not None:
        data = data.encode("utf-8", "surrogateescape")
    stdin = {"input": data} if data is not None else {"stdin": subprocess.DEVNULL}
    try:
        return subprocess.run(command + list(args), cwd=folder, env=env, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, **stdin)
    except FileNotFoundError as error:
        raise Problem("git is not installed (or %s has gone)" % folder) from error
    except OSError as error:
        raise Problem("git cannot be run in %s: %s" % (folder, error.strerror)) from error


def _environment():
    env = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    env.pop("LANGUAGE", None)
    env.update({
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_NOSYSTEM": "1",
        # For git before 2.32, which does not know GIT_CONFIG_GLOBAL, and for ~/.config/git/attributes.
        "HOME": os.devnull,
        "XDG_CONFIG_HOME": os.devnull,
        "GIT_ATTR_NOSYSTEM": "1",
        "GIT_AUTHOR_NAME": NAME, "GIT_AUTHOR_EMAIL": EMAIL,
        "GIT_COMMITTER_NAME": NAME, "GIT_COMMITTER_EMAIL": EMAIL,
        # Asking for the state of a tree must not write to it.
        "GIT_OPTIONAL_LOCKS": "0",
        "GIT_TERMINAL_PROMPT": "0",
        "GIT_EDITOR": "true",
        "GIT_PAGER": "cat",
        "LC_ALL": "C",
        "TZ": "UTC",
    })
    return env


@functools.lru_cache(maxsize=None)
def _safe_directories():
    try:
        done = subprocess.run(["git", "config", "--get-all", "safe.directory"], cwd="/",
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL, text=True)
    except OSError:
        return ()
    return tuple(done.stdout.splitlines())
