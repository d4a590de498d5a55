#
# BitBake tests for the limit on tasks that use the network
#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

import pickle
import random
import types
import unittest
import unittest.mock

import bb
import bb.build
import bb.data
import bb.networkslots
import bb.parse
import bb.runqueue
import bb.ui.uihelper
from bb.networkslots import NetworkSlots, network_tasks
from bb.presence import Presence


class Slots(NetworkSlots):
    def __init__(self, limit, tasks=(), setscene=(), rqdata=None):
        super().__init__(Presence(rqdata, None))
        self.limit = limit
        self._tasks.update(tasks)
        self._setscene.update(setscene)


class LimitTest(unittest.TestCase):
    def test_limit(self):
        d = bb.data.init()
        slots = NetworkSlots(None)
        slots.prepare(d, None)
        self.assertIsNone(slots.limit)
        d.setVar("BB_NUMBER_NETWORK_THREADS", "4")
        slots.prepare(d, types.SimpleNamespace(runtaskentries={}))
        self.assertEqual(slots.limit, 4)
        d.setVar("BB_NUMBER_NETWORK_THREADS", "0")
        with self.assertRaises(bb.BBHandledException), self.assertLogs("BitBake", "ERROR") as logs:
            slots.prepare(d, None)
        self.assertEqual(len(logs.output), 1)
        self.assertIn('Invalid value "0" for BB_NUMBER_NETWORK_THREADS, must be a positive integer', logs.output[0])


class TasksTest(unittest.TestCase):
    def rqdata(self, flags, mc=""):
        """Return the data that network_tasks() uses, for one recipe with tasks {name: value of the flag, or None}"""
        prefix = "mc:%s:" % mc if mc else ""
        tids = [prefix + "/r.bb:" + name for name in flags]
        deps = {prefix + "/r.bb": {"network": {name: value for name, value in flags.items() if value is not None}}}
        return types.SimpleNamespace(
            runtaskentries=dict.fromkeys(tid for tid in tids if not tid.endswith("_setscene")),
            taskData={mc: types.SimpleNamespace(taskentries=dict.fromkeys(tids))},
            dataCaches={mc: types.SimpleNamespace(task_deps=deps, pkg_fn={prefix + "/r.bb": "r"})},
            setscene_ignore_tasks=None)

    def test_tasks_that_need_a_slot(self):
        flags = {"do_fetch": "1", "do_checkuri": "yes", "do_unpack": None, "do_patch": "0", "do_broken": "maybe",
                 # The normal task has the flag in openembedded-core as well
                 "do_package": "1", "do_package_setscene": "1",
                 "do_offline": "1", "do_offline_setscene": "0", "do_deploy": "1", "do_deploy_setscene": None}
        for mc, prefix in (("", ""), ("other", "mc:other:")):
            self.assertEqual(set(network_tasks(self.rqdata(flags, mc))), {
                (prefix + "/r.bb:do_fetch", False), (prefix + "/r.bb:do_checkuri", False),
                (prefix + "/r.bb:do_broken", False), (prefix + "/r.bb:do_package", True)})

    def test_tasks_that_never_run(self):
        rqdata = self.rqdata({"do_fetch": "1", "do_checkuri": "1", "do_listtasks": "1", "do_deploy": "1", "do_deploy_setscene": "1"})
        rqdata.dataCaches[""].task_deps["/r.bb"]["noexec"] = {"do_checkuri": "1", "do_deploy": "1"}
        rqdata.setscene_ignore_tasks = ["r:do_listtasks", "other:*"]
        self.assertEqual(set(network_tasks(rqdata)), {("/r.bb:do_listtasks", False), ("/r.bb:do_deploy", True)})

    def test_cache_without_the_flag(self):
        rqdata = self.rqdata({"do_fetch": "1"})
        del rqdata.dataCaches[""].task_deps["/r.bb"]["network"]
        self.assertEqual(list(network_tasks(rqdata)), [])

    def test_no_limit(self):
        slots = Slots(None)
        slots.prepare(bb.data.init(), None)
        for n in range(100):
            self.assertTrue(slots.acquire("r%s:do_fetch" % n))
        buildable = {"a:do_fetch"}
        slots.remove_waiting(buildable, self.fail)
        self.assertEqual((buildable, slots.used, slots.peak), ({"a:do_fetch"}, 0, 0))


class SlotsTest(unittest.TestCase):
    def test_shared(self):
        slots = Slots(2, tasks=["a:do_fetch", "mc:x:b:do_fetch"], setscene=["c:do_package"])
        self.assertTrue(slots.acquire("a:do_fetch"))
        self.assertTrue(slots.acquire_setscene("c:do_package"))
        self.assertTrue(slots.acquire_setscene("c:do_package"))
        self.assertFalse(slots.acquire("mc:x:b:do_fetch"))
        # None of these needs a slot, the last one because of its setscene variant
        self.assertTrue(slots.acquire("d:do_unpack"))
        self.assertTrue(slots.acquire_setscene("d:do_package"))
        self.assertTrue(slots.acquire("c:do_package"))
        slots.release("d:do_unpack")
        self.assertFalse(slots.acquire("mc:x:b:do_fetch"))
        slots.release("a:do_fetch")
        slots.release("a:do_fetch")
        self.assertTrue(slots.acquire("mc:x:b:do_fetch"))
        self.assertFalse(slots.acquire("a:do_fetch"))
        self.assertEqual((slots.used, slots.peak), (2, 2))

    def test_local(self):
        tids = ["a:do_package", "b:do_package"]
        rqdata = types.SimpleNamespace(runtaskentries={tid: types.SimpleNamespace(unihash="1") for tid in tids})
        slots = Slots(1, setscene=tids, rqdata=rqdata)
        presence = slots._presence
        presence.local(tids[:1])
        self.assertTrue(slots.acquire_setscene(tids[0]))
        self.assertTrue(slots.acquire_setscene(tids[1]))
        self.assertEqual((slots.used, slots.peak), (1, 1))
        # Rehashed
        rqdata.runtaskentries[tids[0]].unihash = "2"
        self.assertFalse(slots.acquire_setscene(tids[0]))
        presence.local(tids)
        self.assertTrue(slots.acquire_setscene(tids[0]))
        # Vanished
        presence.forget(tids[:1])
        self.assertFalse(slots.acquire_setscene(tids[0]))
        self.assertTrue(presence.is_local(tids[1]))
        self.assertFalse(presence.is_local("c:do_package"))

    def test_remove_waiting(self):
        tasks = ["a:do_fetch", "b:do_fetch", "c:do_fetch"]
        slots = Slots(1, tasks=tasks)
        examined = []
        def runs(tid):
            examined.append(tid)
            return tid != "c:do_fetch"
        def left():
            buildable = set(tasks[1:]) | {"a:do_unpack"}
            slots.remove_waiting(buildable, runs)
            return buildable
        self.assertEqual(left(), {"b:do_fetch", "c:do_fetch", "a:do_unpack"})
        self.assertEqual(examined, [])
        slots.acquire("a:do_fetch")
        # c does not run, as if it were covered
        self.assertEqual(left(), {"c:do_fetch", "a:do_unpack"})
        self.assertEqual(left(), {"c:do_fetch", "a:do_unpack"})
        self.assertEqual(examined.count("b:do_fetch"), 1)
        self.assertEqual(slots.waiting(), {"b:do_fetch"})
        slots.release("a:do_fetch")
        self.assertEqual(slots.waiting(), set())
        self.assertIn("b:do_fetch", left())

    def test_setscene_variants_hide_no_tasks(self):
        slots = Slots(1, tasks=["a:do_fetch"], setscene=["p:do_package"])
        slots.acquire("a:do_fetch")
        self.assertFalse(slots.acquire_setscene("p:do_package"))
        # Its setscene variant waits or has been given up; the task itself needs no slot
        buildable = {"p:do_package"}
        slots.remove_waiting(buildable, lambda tid: True)
        self.assertEqual(buildable, {"p:do_package"})

    def test_report(self):
        slots = Slots(2, tasks=["a:do_fetch", "b:do_fetch", "c:do_fetch"], setscene=["p:do_package"])
        with unittest.mock.patch("time.monotonic") as monotonic, self.assertLogs("BitBake.RunQueue", "INFO") as logs:
            monotonic.return_value = 0
            slots.acquire("a:do_fetch")
            slots.acquire_setscene("p:do_package")
            # No task waits
            monotonic.return_value = 100
            slots.waiting()
            slots.release("p:do_package")
            slots.acquire("b:do_fetch")
            self.assertEqual(logs.output, [])
            slots.acquire("c:do_fetch")
            for now in (101, 120, 161, 200):
                monotonic.return_value = now
                slots.waiting()
            self.assertEqual([name for line in logs.output for name in ("a:do_fetch", "b:do_fetch", "p:do_package") if name in line],
                             ["a:do_fetch", "b:do_fetch"])

    def test_variant_that_is_not_needed_any_more(self):
        slots = Slots(1, tasks=["a:do_fetch", "b:do_fetch"], setscene=["p:do_package"])
        slots.acquire("a:do_fetch")
        slots.acquire_setscene("p:do_package")
        slots.acquire("b:do_fetch")
        slots.release("a:do_fetch")
        self.assertEqual(slots.waiting(), set())
        slots.acquire("b:do_fetch")
        self.assertEqual(slots.waiting(), set())

    def test_model(self):
        """Random sequences, compared with a plain list"""
        for seed in range(20):
            with self.subTest(seed=seed):
                self.run_model(random.Random(seed))

    def run_model(self, rand):
        limit = rand.randint(1, 6)
        normal = ["%s:do_fetch" % n for n in range(12)]
        setscene = ["mc:m%s:%s:do_package" % (n % 3, n) for n in range(12)]
        free = ["%s:do_compile" % n for n in range(6)]
        slots = Slots(limit, normal, setscene)
        holders = []
        running = []
        done = set(rand.sample(normal, rand.randint(0, 4)))
        peak = 0
        for _ in range(3000):
            tid = rand.choice(normal + setscene + free)
            what = rand.choice(("start", "start", "end", "again", "choose"))
            if what == "start" and tid not in running and tid not in done:
                as_setscene = tid in setscene and rand.random() < 0.7
                acquire = slots.acquire_setscene if as_setscene else slots.acquire
                needs = tid in normal or as_setscene
                may = not needs or len(holders) < limit
                self.assertEqual(acquire(tid), may)
                if may:
                    running.append(tid)
                    if needs:
                        holders.append(tid)
                else:
                    self.assertIn(tid, slots.waiting())
            elif what == "end" and running:
                tid = rand.choice(running)
                running.remove(tid)
                if tid in holders:
                    holders.remove(tid)
                slots.release(tid)
            elif what == "again" and tid not in running:
                # A task may be reported twice, for example if a worker dies
                slots.release(tid)
            elif what == "choose":
                buildable = set(rand.sample(normal + setscene + free, 8)).difference(running)
                expected = set(buildable)
                if len(holders) == limit:
                    expected -= set(normal) - done
                slots.remove_waiting(buildable, lambda tid: tid not in done)
                self.assertEqual(buildable, expected)
            peak = max(peak, len(holders))
            self.assertEqual(slots.used, len(holders))
            self.assertEqual(slots.peak, peak)
            self.assertLessEqual(slots.used, limit)
            if len(holders) < limit:
                self.assertFalse(slots.waiting())
            self.assertTrue(slots.waiting().isdisjoint(holders))


class SchedulerTest(unittest.TestCase):
    """The order of the schedulers for the tasks that can start"""

    def scheduler(self, scheduler, slots, buildable, covered=()):
        entries = {}
        for weight, tid in enumerate(sorted(buildable)):
            entries[tid] = types.SimpleNamespace(weight=weight)
        rq = types.SimpleNamespace(
            network=slots, runq_buildable=set(buildable), runq_running=set(), runq_complete=set(), holdoff_tasks=set(),
            tasks_covered=set(covered), tasks_notcovered=set(buildable).difference(covered), build_stamps={},
            max_cpu_pressure=None, max_io_pressure=None, max_memory_pressure=None, max_loadfactor=None,
            stats=types.SimpleNamespace(active=1), cfgData=bb.data.init(), can_start_task=lambda: True,
            task_runs=lambda tid: tid not in covered)
        siggen = types.SimpleNamespace(stampfile_mcfn=lambda taskname, fn, extrainfo: fn + taskname)
        with unittest.mock.patch.object(bb.parse, "siggen", siggen, create=True):
            return scheduler(rq, types.SimpleNamespace(runtaskentries=entries))

    def order(self, scheduler, full, covered=()):
        tasks = ["r%02d.bb:%s" % (n, name) for n in range(10) for name in ("do_fetch", "do_compile")]
        slots = Slots(1, tasks=[tid for tid in tasks if tid.endswith("do_fetch")] + ["x.bb:do_fetch"])
        sched = self.scheduler(scheduler, slots, tasks, covered)
        if full:
            slots.acquire("x.bb:do_fetch")
        order = []
        while True:
            tid = sched.next()
            if tid is None:
                return order
            order.append(tid)
            sched.rq.runq_running.add(tid)
            sched.rq.runq_complete.add(tid)

    def test_priorities(self):
        for scheduler in (bb.runqueue.RunQueueScheduler, bb.runqueue.RunQueueSchedulerSpeed,
                          bb.runqueue.RunQueueSchedulerCompletion):
            with self.subTest(scheduler=scheduler.name):
                everything = self.order(scheduler, full=False)
                self.assertEqual(len(everything), 20)
                self.assertEqual(self.order(scheduler, full=True),
                                 [tid for tid in everything if tid.endswith("do_compile")])
                covered = ["r03.bb:do_fetch", "r07.bb:do_fetch"]
                self.assertEqual(self.order(scheduler, full=True, covered=covered),
                                 [tid for tid in everything if tid.endswith("do_compile") or tid in covered])


class RecipeTest(unittest.TestCase):
    def test_flag_is_recorded(self):
        d = bb.data.init()
        d.setVar("OFFLINE", "0")
        for task, flag in (("do_fetch", "1"), ("do_unpack", None), ("do_offline", "${OFFLINE}")):
            bb.build.addtask(task, None, None, d)
            if flag:
                d.setVarFlag(task, "network", flag)
        bb.build.add_tasks(d.getVar("__BBTASKS", False), d)
        self.assertEqual(d.getVar("_task_deps", False)["network"], {"do_fetch": "1", "do_offline": "0"})


class UIHelperTest(unittest.TestCase):
    def event(self, stats):
        event = object.__new__(bb.runqueue.runQueueTaskStarted)
        event.stats = pickle.loads(pickle.dumps(stats.copy()))
        return event

    def test_network(self):
        slots = Slots(2, tasks=["a:do_fetch"])
        stats = bb.runqueue.RunQueueStats(1, 0)
        helper = bb.ui.uihelper.BBUIHelper()
        slots.acquire("a:do_fetch")
        for used in (1, 0):
            slots.update(stats)
            helper.eventHandler(self.event(stats))
            self.assertEqual((helper.network_used, helper.network_limit), (used, 2))
            slots.release("a:do_fetch")

    def test_older_event_log(self):
        # Pickled by a version whose RunQueueStats have no such attributes
        stats = bb.runqueue.RunQueueStats(1, 0)
        del stats.network_used, stats.network_limit
        helper = bb.ui.uihelper.BBUIHelper()
        helper.eventHandler(self.event(stats))
        self.assertIsNone(helper.network_limit)
