# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""One task of the worker: from the message that asks for it to its exit code.

bitbake-worker makes a Task for every runtask message and calls fork() once;
the rest runs in the child. What a task sees is decided here: its session,
signals, umask, environment, datastore, and whether it has the network. That
is what bitbake's own worker gives a task; profiling is left out.

    pid, reader = Task(worker, runtask).fork()
    # reader: four bytes of length, then an <event> message, again and again
"""

import logging
import os
import pickle
import shlex
import signal
import subprocess
import sys
import traceback

import bb
import bb.build
import bb.cache
import bb.event
import bb.fetch2  # noqa: F401  (here, so that no child has to import it)
import bb.utils

logger = logging.getLogger("BitBake")


END_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


def write_all(fd, data):
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view):]


class Task:
    """One runtask: begins in the worker, ends in the child."""

    def __init__(self, worker, runtask):
        self.worker = worker
        self.runtask = runtask
        self.fn = runtask["fn"]
        self.name = runtask["taskname"]
        self.quiet = runtask["quieterrors"]
        self.dry_run = worker.config.dry_run or runtask["dry_run"]
        # Without the files of an earlier build fakeroot may not exist yet, so a dry run goes without.
        self.fakeroot = self.name in runtask["taskdep"].get("fakeroot", {}) and not self.dry_run
        self.uid, self.gid = os.getuid(), os.getgid()

    def umask(self):
        value = (self.runtask["taskdep"].get("umask", {}).get(self.name)
                 or self.worker.data["umask"])
        return bb.utils.to_filemode(value) if value else None

    def fakeroot_environment(self):
        source = self.runtask["fakerootenv" if self.fakeroot else "fakerootnoenv"] or ""
        return dict(entry.split("=", 1) for entry in source.split())

    def fork(self):
        """Start the child. Returns its pid and the descriptor to read its reports from."""
        if self.fakeroot:
            for directory in (self.runtask["fakerootdirs"] or "").split():
                bb.utils.mkdirhier(directory)
        # pseudo's library looks at these variables in fork(), so they are set around it.
        extra = self.fakeroot_environment()
        before = {key: os.environ.get(key) for key in extra}
        os.environ.update(extra)
        reader, writer = os.pipe()
        sys.stderr.flush()
        parent = os.getpid()
        # Until the child has its own handlers a signal would run the worker's there.
        signal.pthread_sigmask(signal.SIG_BLOCK, END_SIGNALS)
        pid = os.fork()
        if pid == 0:
            self.child(parent, writer, extra)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, END_SIGNALS)
        os.close(writer)
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value
        return pid, reader

    def child(self, parent, writer, extra):
        """Never returns."""
        status = 1
        try:
            self.detach(parent, writer)
            d = self.prepare(extra)
            status = self.run(d)
        except Exception:
            if not self.quiet:
                logger.critical(traceback.format_exc())
        except BaseException:
            pass    # SystemExit of the signal handler below: nothing to add
        finally:
            os._exit(status)

    def detach(self, parent, writer):
        """Own session, own signals, own reports, nothing of the worker's descriptors."""
        # A terminal's Ctrl-C must reach the user interface only, and killpg() only this task.
        os.setsid()
        for number in END_SIGNALS:
            signal.signal(number, end_of_task)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.set_wakeup_fd(-1)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, END_SIGNALS)
        bb.utils.signal_on_parent_exit("SIGTERM")
        if os.getppid() != parent:
            # The worker died before the line above took effect.
            os._exit(1)
        self.worker.close_in_child()
        nothing = os.open(os.devnull, os.O_RDWR)
        os.dup2(nothing, 0)
        os.dup2(nothing, 1)

        lock = bb.multiprocessing.Lock()    # a task may start processes that report, too

        def report(event, d):
            message = b"<event>" + pickle.dumps(event) + b"</event>"
            try:
                with bb.utils.lock_timeout(lock):
                    write_all(writer, len(message).to_bytes(4, "big") + message)
            except OSError:
                end_of_task(None, None)

        bb.event.worker_pid = os.getpid()
        bb.event.worker_fire = report
        umask = self.umask()
        if umask is not None:
            os.umask(umask)

    def prepare(self, extra):
        """The recipe's datastore and the task's environment."""
        worker, runtask = self.worker, self.runtask
        _, _, mc = bb.cache.virtualfn2realfn(self.fn)
        base = worker.databuilder.mcdata[mc]
        values = {"BB_WORKERCONTEXT": "1",
                  "BB_TASKDEPDATA": runtask["taskdepdata"],
                  "BB_CURRENTTASK": self.name.replace("do_", ""),
                  "BUILDNAME": worker.data["buildname"],
                  "DATE": worker.data["date"],
                  "TIME": worker.data["time"]}
        if worker.config.limited_deps:
            values["BB_LIMITEDDEPS"] = "1"
        values.update(worker.extraconfig)
        for name, value in values.items():
            base.setVar(name, value)

        bb.parse.siggen.set_taskdata(worker.data["sigdata"])
        if worker.newhashes is not None:
            bb.parse.siggen.set_taskhashes(worker.newhashes)
        d = worker.databuilder.parseRecipe(self.fn, runtask["appends"], runtask["layername"])
        d.setVar("BB_TASKHASH", runtask["taskhash"])
        d.setVar("BB_UNIHASH", runtask["unihash"])
        bb.parse.siggen.setup_datacache_from_datastore(self.fn, d)
        bb.utils.set_process_name("%s:%s" % (d.getVar("PN"), self.name.replace("do_", "")))

        self.limit_network(d)
        self.set_environment(d, extra)
        if self.quiet:
            d.setVarFlag(self.name, "quieterrors", "1")
        return d

    def limit_network(self, d):
        if bb.utils.to_boolean(d.getVarFlag(self.name, "network")):
            return
        if bb.utils.is_local_uid(self.uid):
            bb.utils.disable_network(self.uid, self.gid)
        else:
            # A user from a directory service may be unknown without the network.
            logger.debug("%s keeps the network: %s is no local user" % (self.name, self.uid))

    def set_environment(self, d, extra):
        """Only what the metadata exports, then the fakeroot variables, then [exports]."""
        exported = list(bb.data.exported_vars(d))
        bb.utils.empty_environment()
        os.environ.update(exported)
        for name, value in extra.items():
            os.environ[name] = value
            d.setVar(name, value)
            d.setVarFlag(name, "export", "1")
        for name in (d.getVarFlag(self.name, "exports") or "").split():
            d.setVarFlag(name, "export", "1")
            value = d.getVar(name)
            if value is not None:
                os.environ[name] = value

    def run(self, d):
        if self.dry_run:
            return 0
        try:
            return bb.build.exec_task(self.fn, self.name, d, self.worker.config.profile)
        finally:
            if self.fakeroot:
                # Let pseudo's daemon write its database and end.
                subprocess.run(shlex.split(d.getVar("FAKEROOTCMD")) + ["-S"],
                               check=True, stdout=subprocess.DEVNULL)


def end_of_task(signum, frame):
    """SIGTERM or SIGHUP in a task: everything it has started goes with it."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.killpg(0, signal.SIGTERM)
    sys.exit()
