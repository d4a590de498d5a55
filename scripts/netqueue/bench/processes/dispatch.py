# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""One variant of `scripts/bench dispatch`: bench/dispatch.py starts it as a process.

bitbake's own RunQueueExecute and its scheduler choose and start tasks of which
all can be started at once: one waits for nothing, and half of them, say, have
[network]. There is no parsing and no worker: a task ends when the queue next
reads from the workers, the oldest first. What is measured is execute() alone,
without its first call: that sorts all tasks in a way that the series does not
touch, which takes as long as some thousand of the other calls.

Argument: a JSON object, see bench/dispatch.py. For each line of its input that many
tasks are started, and a JSON object is written: {"seconds": 0.25, "calls": 26,
"peak": 4}. One without seconds comes before, when all is prepared.
"""

import collections
import io
import json
import random
import sys
import time
import types


def main(lib, limit, tasks, setscene, share, threads):
    bb, d = load(lib, limit, threads)
    queue = make_queue(bb, d, make_data(tasks, setscene, share))
    print(json.dumps({"peak": queue.peak}), flush=True)
    starts = 0
    for line in sys.stdin:
        starts += int(line)
        started = time.process_time()
        calls = 0
        while queue.ended < starts:
            queue.rqexe.execute()
            calls += 1
        print(json.dumps({"seconds": time.process_time() - started, "calls": calls, "peak": queue.peak}), flush=True)


def load(lib, limit, threads):
    """The bb of the tree, and the configuration. limit: BB_NUMBER_NETWORK_THREADS."""
    sys.path.insert(0, lib)
    import bb.server.process
    import bb.cooker
    import bb.data
    import bb.parse
    import bb.runqueue

    d = bb.data.init()
    d.setVar("BB_NUMBER_THREADS", str(threads))
    d.setVar("BB_NUMBER_NETWORK_THREADS", limit)
    d.setVar("BB_HASHCHECK_FUNCTION", "all_are_there")
    bb.parse.siggen = Siggen()
    return bb, d


class Siggen:
    """No stamp exists"""

    def stampfile_mcfn(self, taskname, fn, extrainfo=True):
        return "/nonexistent/stamps/%s.%s" % (fn, taskname)

    stampcleanmask_mcfn = stampfile_mcfn

    def save_unitaskhashes(self):
        pass


class Nothing:
    """Takes any call"""

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


def make_data(count, setscene, share):
    """What RunQueueData has after prepare(), for tasks that depend on nothing"""
    rand = random.Random(1)
    names = ("do_package", "do_deploy") if setscene else ("do_fetch", "do_compile")
    entries, alltasks, flags, network = {}, {}, {}, set()
    for number in range(count):
        fn = "/layers/some-layer/recipes-some/recipe-%05d/recipe-%05d_1.0.bb" % (number, number)
        uses = rand.random() < share
        name = names[0] if uses else names[1]
        tid = fn + ":" + name
        entries[tid] = types.SimpleNamespace(depends=set(), revdeps=set(), hash="0" * 64, unihash="%064x" % number,
                                             weight=rand.randint(1, 1000), taskhash_deps=[], task=None)
        alltasks[tid] = types.SimpleNamespace(idepends=[])
        flags[fn] = {"tasks": [name], "network": {}}
        if setscene:
            alltasks[tid + "_setscene"] = types.SimpleNamespace(idepends=[])
        if uses:
            flags[fn]["network"][name + ("_setscene" if setscene else "")] = "1"
            network.add(tid)
    everything = collections.defaultdict(str)
    return types.SimpleNamespace(
        runtaskentries=entries, runq_setscene_tids=set(entries) if setscene else set(), target_tids=[], targets=[],
        init_progress_reporter=Nothing(), setscene_enforce=False, setscene_ignore_tasks=None, network=network,
        taskData={"": types.SimpleNamespace(taskentries=alltasks, build_targets={}, halt=True)},
        dataCaches={"": types.SimpleNamespace(
            task_deps=flags, pkg_fn=everything, fn_provides=collections.defaultdict(list), hashfn=everything,
            fakerootenv=everything, fakerootdirs=everything, fakerootnoenv=everything)},
        get_task_hash=lambda tid: entries[tid].hash, get_task_unihash=lambda tid: entries[tid].unihash)


def make_queue(bb, d, rqdata):
    """
    A RunQueue whose rqexe has been called once. ended is how many tasks have ended, peak how many that use the
    network ran at a time.
    """
    class Queue(bb.runqueue.RunQueue):
        """The real one, but for the workers and the preparation"""

        def __init__(self, cooker, cfgData):
            super().__init__(cooker, cfgData, rqdata.dataCaches, rqdata.taskData, [])
            self.rqdata = rqdata
            self.ended = self.peak = 0

        def validate_hash(self, sq_data, *args):
            return set(sq_data["hash"])

        def read_workers(self):
            """The oldest task has ended, once all threads are busy or nothing else can be started"""
            active = list(self.rqexe.build_stamps)
            self.peak = max(self.peak, sum(tid in rqdata.network for tid in active))
            if active and (not self.rqexe.can_start_task() or self.idle == len(active)):
                self.rqexe.runqueue_process_waitpid(active[0], 0)
                self.ended += 1
                self.idle = -1
            else:
                self.idle = len(active)

        def active_fds(self):
            return []

    collection = types.SimpleNamespace(get_file_appends=lambda fn: [], calc_bbfile_priority=lambda fn: (0, 0, ""))
    cooker = types.SimpleNamespace(
        data=d, collections={"": collection}, extraconfigdata={},
        configuration=types.SimpleNamespace(force=False, dry_run=False, skipsetscene=False, setsceneonly=False, profile=False))
    queue = Queue(cooker, d)
    queue.idle = -1
    stdin = io.BytesIO()
    stdin.flush = lambda: (stdin.seek(0), stdin.truncate())
    queue.worker[""] = types.SimpleNamespace(process=types.SimpleNamespace(stdin=stdin))
    queue.rqexe = bb.runqueue.RunQueueExecute(queue)
    if not rqdata.runq_setscene_tids:
        for tid in rqdata.runtaskentries:
            queue.rqexe.setbuildable(tid)
            queue.rqexe.tasks_notcovered.add(tid)
        queue.rqexe.sqdone = True
    queue.state = bb.runqueue.RunQueueState.RUNNING
    queue.rqexe.execute()
    return queue


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
