#
# BitBake tests for fetching sstate objects ahead of their tasks
#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

import os
import random
import shutil
import stat
import tempfile
import types
import unittest
import unittest.mock

import bb
import bb.event
from bb import prefetch
from bb.connections import ConnectError, DestinationError
from bb.connections.request import Origin, Response
from bb.prefetch import Prefetch, order
from bb.runqueue import order_setscene_tids


class Files:
    """A stand-in for ObjectFiles"""

    def __init__(self, directory, tid, number=0):
        self.directory = directory
        name = "ab/%s-%s" % (tid, number)
        self.names = (name, name + ".siginfo")
        self.needed = 1
        self.mirror = Origin("http", "mirror.example", 80, ""), "route"
        self.size = 5
        self.umask = 0o002

    def describe(self, name):
        return {"method": "GET", "url": "http://%s/%s" % (self.mirror[0].host, name), "environment": {}}


class Connections:
    """
    A stand-in for SharedConnections, its server and pool. answer() answers one of the requests in the list requests, the
    first by default.
    """

    def __init__(self, window):
        self.settings = types.SimpleNamespace(prefetch=window)
        self.server = self.pool = self
        self.is_running = True
        self.healthy = True
        self.failed = set()
        self.rejected = []
        self.reject = self.rejected.append
        self.requests = []
        self.answers = []
        self.awake = False

    def submit(self, requests, answered, first=False):
        for request in requests:
            request.context = answered
        self.requests = requests + self.requests if first else self.requests + requests

    def prioritise(self, requests):
        self.requests.sort(key=lambda request: request not in requests)

    def is_healthy(self, origin, route):
        return self.healthy and origin not in self.failed

    def wake(self):
        self.awake = True

    def fileno(self):
        return 0

    def deliver(self):
        self.awake = False
        answers, self.answers = self.answers, []
        for request, response, error in answers:
            request.context(request, response, error)

    def answer(self, request=None, status=200, body=b"hello", error=None):
        request = request or self.requests[0]
        self.requests.remove(request)
        if status == 200 and not error:
            os.pwrite(request.fd, body, 0)
        self.answers.append((request, None if error else Response(status, {}, len(body)), error))
        self.wake()

    def tids(self):
        """Return the tasks of the requests, in their order"""
        return list(dict.fromkeys(os.path.basename(request.url).partition("-")[0]
                                  for request in self.requests if not request.cancelled))


class Queue:
    """A stand-in for RunQueueExecute. deps is {task: tasks that can be started after it}."""

    def __init__(self, deps, threads=2):
        self.cooker = types.SimpleNamespace(configuration=types.SimpleNamespace(dry_run=False))
        self.cfgData = None
        self.number_tasks = threads
        revdeps = {tid: {other for other in deps if tid in deps[other]} for tid in deps}
        self.sqdata = types.SimpleNamespace(sq_deps=deps, sq_revdeps=revdeps, sq_harddeps={}, sq_harddeps_rev={},
                                            places=order_setscene_tids(deps, revdeps))
        self.sq_buildable = {tid for tid in deps if not revdeps[tid]}
        self.sq_running = set()
        self.scenequeue_covered = set()
        self.scenequeue_notcovered = set()
        self.scenequeue_notneeded = set()
        self.sq_needed_harddeps = set()
        self.sq_deferred = {}
        self.runq_complete = set()
        self.outcomes = {}
        self.unneeded = set()

    def setscene_not_needed(self, task, covered, needed, notneeded):
        return task in self.unneeded and task not in needed and self.sqdata.sq_revdeps[task] <= covered

    def setscene_outcome(self, task):
        return self.outcomes.get(task)

    def finish(self, task, covered=True):
        (self.scenequeue_covered if covered else self.scenequeue_notcovered).add(task)
        done = self.scenequeue_covered | self.scenequeue_notcovered
        for dep in self.sqdata.sq_deps[task]:
            if self.sqdata.sq_revdeps[dep] <= done:
                self.sq_buildable.add(dep)


class OrderTest(unittest.TestCase):
    deps = {"a": {"c"}, "b": {"c", "d"}, "c": {"e"}, "d": set(), "e": set()}

    def test_buildable_first(self):
        self.assertEqual(list(order(Queue(self.deps))), ["a", "b", "c", "d", "e"])

    def test_longest_chains_first(self):
        deps = {"a": set(), "b": {"y"}, "c": set(), "x": {"b"}, "y": {"z"}, "z": set()}
        self.assertEqual(list(order(Queue(deps))), ["x", "b", "y", "a", "c", "z"])

    def test_not_needed(self):
        queue = Queue(self.deps)
        queue.unneeded = {"c"}
        self.assertEqual(list(order(queue)), ["a", "b", "d", "e"])

    def test_outcomes(self):
        queue = Queue(self.deps)
        queue.outcomes = {"a": "fail", "d": "skip"}
        queue.unneeded = {"c"}
        # Not all tasks that would use c are covered
        self.assertEqual(list(order(queue)), ["b", "c", "e"])

    def test_running_and_done(self):
        queue = Queue(self.deps)
        queue.sq_running = {"a", "b"}
        queue.finish("a")
        queue.finish("b", covered=False)
        queue.sq_running.add("c")
        self.assertEqual(list(order(queue)), ["d", "e"])

    def test_deferred(self):
        queue = Queue(self.deps)
        queue.sq_deferred = {"b": "x"}
        self.assertEqual(list(order(queue)), ["a"])
        queue.runq_complete = {"x"}
        self.assertEqual(list(order(queue)), ["a", "b", "c", "d", "e"])

    def test_hard_dependency_that_fails(self):
        queue = Queue(self.deps)
        queue.sqdata.sq_harddeps = {"e": {"a"}}
        queue.sqdata.sq_harddeps_rev = {"a": {"e"}}
        queue.outcomes = {"e": "fail"}
        self.assertEqual(list(order(queue)), ["b", "d", "c"])

    def test_hard_dependencies(self):
        queue = Queue(self.deps)
        queue.sqdata.sq_harddeps_rev = {"a": {"e"}}
        queue.unneeded = {"e"}
        # The hard dependency makes it needed
        self.assertEqual(list(order(queue)), ["b", "d", "e", "a", "c"])


class PrefetchTest(unittest.TestCase):
    def setUp(self):
        self.tempdir = tempfile.mkdtemp(prefix="bitbake-prefetch-")
        self.addCleanup(shutil.rmtree, self.tempdir)
        patch = unittest.mock.patch("bb.event.fire")
        self.fire = patch.start()
        self.addCleanup(patch.stop)

    def make(self, deps, window=2, threads=2):
        self.queue = Queue(deps, threads)
        self.connections = Connections(window)
        self.files = {tid: Files(self.tempdir, tid) for tid in deps}
        self.local = []
        self.presence = types.SimpleNamespace(files=self.files, files_of=self.files.get, local=self.local.extend, is_local=self.local.__contains__)
        self.prefetch = Prefetch(self.queue, self.connections, self.presence)
        self.addCleanup(self.close)

    def close(self):
        self.prefetch.stop()
        while self.connections.requests:
            self.connections.answer(error=ConnectError("the end"))
        self.connections.deliver()
        self.prefetch.close()
        self.assertEqual(self.open_files(), [])
        self.assertEqual([name for name in self.names() if name.endswith(".new")], [])

    def open_files(self):
        """Return the descriptors of this process for files in tempdir"""
        paths = [os.path.join("/proc/self/fd", fd) for fd in os.listdir("/proc/self/fd")]
        return [path for path in paths if os.path.islink(path) and os.readlink(path).startswith(self.tempdir)]

    def names(self):
        return sorted(os.path.relpath(os.path.join(where, name), self.tempdir)
                      for where, _, names in os.walk(self.tempdir) for name in names)

    chain = {"a": {"b"}, "b": {"c"}, "c": {"d"}, "d": {"e"}, "e": set()}

    def test_window(self):
        self.make(self.chain)
        self.prefetch.process()
        self.assertEqual(self.connections.tids(), ["a", "b"])
        while self.connections.requests:
            self.connections.answer()
        self.prefetch.process()
        # Their tasks have not been started yet
        self.assertEqual((self.connections.tids(), self.local), ([], ["a", "b"]))
        self.queue.sq_running.add("a")
        self.prefetch.process()
        self.assertEqual(self.connections.tids(), ["c"])

    def test_room_for_many(self):
        """Objects that no task waits for are requested in groups"""
        self.make({"t%02d" % n: set() for n in range(40)}, window=24)
        for _ in range(3):
            self.prefetch.process()
        self.assertEqual(len(self.connections.tids()), 24)
        while self.connections.requests:
            self.connections.answer()
        for _ in range(6):
            self.prefetch.process()
        self.assertEqual(len(self.local), 24)
        self.queue.sq_running.update(("t00", "t01"))
        self.prefetch.process()
        self.assertEqual(self.connections.tids(), [])
        self.queue.sq_running.add("t02")
        self.prefetch.process()
        self.assertEqual(self.connections.tids(), ["t24", "t25", "t26"])
        self.queue.sq_running.add("t03")
        self.prefetch.process()
        self.assertEqual(len(self.connections.tids()), 3)

    def test_wakes_the_runqueue_for_many(self):
        """Not all answers are processed in one turn"""
        self.make({tid: set() for tid in "abcdefg"}, window=7)
        self.prefetch.process()
        while self.connections.requests:
            self.connections.answer()
        self.prefetch.process()
        self.assertTrue(self.connections.awake)
        self.prefetch.process()
        self.assertFalse(self.connections.awake)
        self.assertEqual(len(self.local), 7)

    def test_wakes_the_runqueue_for_a_waiting_task(self):
        self.make({tid: set() for tid in "abcdefg"}, window=7)
        self.assertFalse(self.prefetch.request_or_ready("g"))
        self.assertTrue(self.connections.awake)
        self.prefetch.process()
        self.assertFalse(self.connections.awake)

    def test_room_for_a_waiting_task(self):
        """Objects that no task waits for leave room for others"""
        self.make({tid: set() for tid in "abcdefghij"}, window=10)
        with unittest.mock.patch.multiple(prefetch, MAX_UNDER_WAY=8, RESERVED=2):
            self.prefetch.process()
            self.prefetch.process()
            self.assertEqual(self.connections.tids(), ["a", "b", "c", "d", "e", "f"])
            self.prefetch.request_or_ready("j")
            self.prefetch.process()
            self.assertEqual(self.connections.tids()[0], "j")
            self.assertEqual(len(self.connections.tids()), 7)

    def test_object_of_a_waiting_task_is_prioritised(self):
        self.make({tid: set() for tid in "abcd"}, window=4)
        self.prefetch.process()
        self.assertEqual(self.connections.tids(), ["a", "b", "c", "d"])
        self.assertFalse(self.prefetch.request_or_ready("c"))
        self.prefetch.process()
        self.assertEqual(self.connections.tids(), ["c", "a", "b", "d"])

    def test_install(self):
        """The .siginfo is installed before the object, and the modes are those of the umask"""
        self.make({"a": set()})
        self.prefetch.process()
        self.assertFalse(self.prefetch.request_or_ready("a"))
        self.connections.answer()
        self.prefetch.process()
        self.assertEqual([name.endswith(".new") for name in self.names()], [True, True])
        self.assertFalse(self.prefetch.request_or_ready("a"))
        self.connections.answer()
        with unittest.mock.patch("os.link", wraps=os.link) as link:
            self.prefetch.process()
        self.assertEqual([os.path.basename(call[0][1]) for call in link.call_args_list], ["a-0.siginfo", "a-0"])
        self.assertEqual(self.names(), ["ab/a-0", "ab/a-0.siginfo"])
        self.assertEqual({stat.S_IMODE(os.stat(os.path.join(self.tempdir, name)).st_mode) for name in self.names()}, {0o664})
        self.assertEqual(stat.S_IMODE(os.stat(self.tempdir + "/ab").st_mode), 0o775)
        self.assertTrue(self.prefetch.request_or_ready("a"))
        self.assertEqual((self.local, self.prefetch.objects, self.prefetch.waiting), (["a"], 1, set()))

    def test_without_a_siginfo(self):
        self.make({"a": set()})
        self.prefetch.process()
        self.connections.answer()
        self.connections.answer(status=404)
        self.prefetch.process()
        self.assertEqual((self.names(), self.local), (["ab/a-0"], ["a"]))

    def test_without_a_needed_file(self):
        """The task looks for it on the network, as for a signature that has to be verified"""
        self.make({"a": set()})
        self.files["a"].needed = 2
        self.prefetch.process()
        self.connections.answer()
        self.connections.answer(status=404)
        self.prefetch.process()
        self.assertEqual((self.names(), self.local, self.prefetch.objects), (["ab/a-0"], [], 1))

    def test_two_builds_with_one_directory(self):
        """They do not use each other's temporary files"""
        self.make({"a": set()})
        self.prefetch.process()
        self.connections.answer()
        other = PrefetchTest()
        other.tempdir = self.tempdir
        other.make({"a": set()})
        other.prefetch.process()
        os.pwrite(other.connections.requests[0].fd, b"he", 0)
        self.connections.answer()
        self.prefetch.process()
        with open(self.tempdir + "/ab/a-0", "rb") as f:
            self.assertEqual(f.read(), b"hello")
        other.close()
        self.assertEqual(self.names(), ["ab/a-0", "ab/a-0.siginfo"])

    def test_connections_that_have_ended(self):
        self.make(self.chain)
        self.prefetch.process()
        self.assertFalse(self.prefetch.request_or_ready("a"))
        self.connections.server = None
        self.prefetch.process()
        self.assertTrue(self.prefetch.request_or_ready("a"))

    def test_mirror_that_recovers(self):
        """Nothing is requested until then, and each object is requested again once"""
        self.make(self.chain)
        self.prefetch.process()
        self.connections.healthy = False
        while self.connections.requests:
            self.connections.answer(error=ConnectError("failed"))
        self.prefetch.process()
        self.assertEqual(self.connections.requests, [])
        self.connections.healthy = True
        self.prefetch._reorder_at = 0
        self.prefetch.process()
        self.assertEqual(self.connections.tids(), ["a", "b"])
        while self.connections.requests:
            self.connections.answer(error=ConnectError("failed"))
        self.prefetch._reorder_at = 0
        self.prefetch.process()
        self.assertEqual(self.connections.tids(), ["c", "d"])

    def test_siginfo_on_another_mirror(self):
        """The task fetches such an object"""
        self.make({"a": set()})
        describe = self.files["a"].describe
        self.files["a"].describe = lambda name: dict(describe(name), url="http://%s.example/%s" % (
            "other" if name.endswith(".siginfo") else "mirror", name))
        self.prefetch.process()
        self.assertEqual(self.connections.tids(), [])
        self.assertTrue(self.prefetch.request_or_ready("a"))

    def test_one_of_two_mirrors_fails(self):
        self.make(self.chain, window=4)
        other = Origin("http", "other.example", 80, "")
        self.files["a"].mirror = self.files["c"].mirror = other, "route"
        self.connections.failed.add(other)
        self.prefetch.process()
        self.assertEqual(self.connections.tids(), ["b", "d", "e"])
        self.connections.failed.clear()
        self.prefetch.process()
        self.assertEqual(self.connections.tids(), ["b", "d", "e", "a"])

    def test_descriptors(self):
        """Those of requests that were given up count until the requests are answered"""
        self.make({"t%s" % n: set() for n in range(100)}, window=100)
        for number in range(20):
            self.prefetch.process()
            self.files.update({tid: Files(self.tempdir, tid, number + 1) for tid in self.files})
        self.assertLessEqual(len(self.open_files()), prefetch.MAX_UNDER_WAY * prefetch.FILES)

    def test_local_files(self):
        self.make({"a": set(), "b": set()})
        os.makedirs(self.tempdir + "/ab")
        with open(self.tempdir + "/ab/a-0", "w"):
            pass
        self.local.append("b")
        self.prefetch.process()
        self.assertEqual(self.connections.requests, [])
        self.assertTrue(self.prefetch.request_or_ready("a") and self.prefetch.request_or_ready("b"))

    def test_task_skipped_while_under_way(self):
        self.make({"a": set()})
        self.prefetch.process()
        self.prefetch.request_or_ready("a")
        self.queue.sq_running.add("a")
        self.prefetch.process()
        self.assertTrue(all(request.cancelled for request in self.connections.requests))
        self.assertEqual((self.names(), self.prefetch.waiting), ([], set()))

    def test_stalled(self):
        self.make({"a": set(), "b": set()})
        self.prefetch.process()
        with unittest.mock.patch.multiple(prefetch, STALLED=-1, INTERVAL=0):
            # A request of the other object
            self.connections.requests[2].received = 3
            self.prefetch.process()
            self.assertFalse(self.prefetch.request_or_ready("a"))
            self.prefetch.process()
        self.assertTrue(self.prefetch.request_or_ready("a"))

    def test_internal_error(self):
        """There is one warning, and the tasks fetch their objects"""
        self.make(self.chain)
        self.prefetch.process()
        self.connections.answer()
        with unittest.mock.patch.object(self.prefetch, "_drop_obsolete", side_effect=AttributeError), \
                self.assertLogs("BitBake", "WARNING") as logs:
            self.prefetch.process()
            self.prefetch.process()
        self.assertEqual(len(logs.output), 1)
        self.assertTrue(self.prefetch.request_or_ready("a"))

    def test_failures(self):
        """No file is left, and the task is started"""
        for answer in ({"status": 404}, {"status": 500}, {"error": ConnectError("failed")}, {"error": DestinationError("full")}):
            for other in (False, True):
                with self.subTest(answer=answer, other=other):
                    self.make({"a": set()})
                    self.prefetch.process()
                    self.assertFalse(self.prefetch.request_or_ready("a"))
                    self.connections.answer(self.connections.requests[other], **answer)
                    self.connections.answer()
                    self.prefetch.process()
                    # The .siginfo is optional
                    self.assertEqual((self.names(), self.local), (["ab/a-0"], ["a"]) if other else ([], []))
                    self.assertTrue(self.prefetch.request_or_ready("a"))
                    self.close()
                    shutil.rmtree(self.tempdir + "/ab")

    def test_size_that_differs_from_the_announced_one(self):
        self.make({"a": set()})
        self.prefetch.process()
        request = self.connections.requests[0]
        os.pwrite(request.fd, b"more than that", 0)
        self.connections.answer(request)
        self.connections.answer()
        self.prefetch.process()
        self.assertEqual(self.names(), [])

    def test_unexpected_content(self):
        """An empty file, and an HTML page"""
        for name, body in (("ab/a", b""), ("ab/a.zst", b"<html>")):
            with self.subTest(name=name):
                self.make({"a": set()})
                self.files["a"].names = name, name + ".siginfo"
                self.prefetch.process()
                self.connections.answer(body=body)
                self.connections.answer(body=body)
                with unittest.mock.patch.object(bb, "warnonce") as warnonce:
                    self.prefetch.process()
                self.assertEqual(len({call[0] for call in warnonce.call_args_list}), 1 if body else 0)
                self.assertEqual((self.names(), self.local), ([], []))
                self.assertTrue(self.prefetch.request_or_ready("a"))
        self.assertEqual(len(self.connections.rejected), 2)

    def test_temporary_file_of_a_killed_server(self):
        """It is removed, those of this server are kept"""
        self.make({"a": set(), "b": set()}, window=1)
        self.prefetch.process()
        left = os.path.join(self.tempdir, self.names()[0].replace("-%s-" % os.getpid(), "-%s-" % (1 << 30)))
        with open(left, "w"):
            pass
        self.prefetch.request_or_ready("b")
        self.prefetch.process()
        self.assertFalse(os.path.exists(left))
        self.assertEqual(len(self.names()), 4)

    def test_directory_that_cannot_be_written(self):
        self.make({"a": set(), "b": set()})
        with unittest.mock.patch("os.open", side_effect=PermissionError):
            self.prefetch.process()
            self.assertTrue(self.prefetch.request_or_ready("a"))
        self.assertEqual(self.connections.requests, [])

    def test_file_that_cannot_be_described(self):
        self.make({"a": set(), "b": set()})
        error = bb.data_smart.ExpansionError("X", "${X}", KeyError("X"))
        with unittest.mock.patch.object(self.files["a"], "describe", side_effect=[self.files["a"].describe("ab/a-0"), error]):
            self.prefetch.process()
        self.assertTrue(self.prefetch.request_or_ready("a"))
        self.assertEqual(self.connections.tids(), ["b"])

    def test_internal_error_while_files_are_opened(self):
        """Objects that were requested before are given up, too"""
        self.make({"a": set(), "b": set()})
        with unittest.mock.patch.object(self.files["b"], "describe", side_effect=KeyError), \
                self.assertLogs("BitBake", "WARNING") as logs:
            self.prefetch.process()
            self.prefetch.process()
        self.assertEqual(len(logs.output), 1)
        self.assertTrue(self.prefetch.request_or_ready("a"))
        self.assertEqual([request.cancelled for request in self.connections.requests], [True, True])

    def test_long_names(self):
        """The longest names that openembedded-core uses"""
        self.make({"a" * 244: set()})
        self.prefetch.process()
        self.connections.answer()
        self.connections.answer()
        self.prefetch.process()
        self.assertEqual([len(name) for name in self.names()], [249, 257])

    def test_buildable_beyond_the_window(self):
        """Objects whose tasks cannot be started yet do not block others whose tasks can"""
        self.make({"a": {"c"}, "b": {"c"}, "c": set(), "d": set(), "e": set()}, window=1, threads=2)
        self.queue.sq_buildable = {"a"}
        self.prefetch.process()
        self.assertEqual(self.connections.tids(), ["a"])
        for tid in ("b", "d", "e"):
            self.assertFalse(self.prefetch.request_or_ready(tid))
        self.prefetch.process()
        # One for each thread, before the others
        self.assertEqual(set(self.connections.tids()), {"a", "b", "d"})
        self.assertEqual(self.connections.tids(), ["b", "d", "a"])

    def test_another_hash(self):
        self.make({"a": set()})
        self.prefetch.process()
        old = list(self.connections.requests)
        self.files["a"] = Files(self.tempdir, "a", 1)
        self.prefetch.changed()
        self.prefetch._reorder_at = 0
        self.prefetch.process()
        self.assertTrue(all(request.cancelled for request in old))
        new = [request for request in self.connections.requests if request not in old]
        self.assertEqual(len(new), 2)
        for request in old + new:
            self.connections.answer(request)
        self.prefetch.process()
        self.assertEqual(self.names(), ["ab/a-1", "ab/a-1.siginfo"])

    def test_stop(self):
        self.make(self.chain)
        self.prefetch.process()
        self.prefetch.request_or_ready("a")
        self.prefetch.stop()
        self.assertEqual((self.names(), self.prefetch.waiting, self.prefetch.fds()), ([], set(), []))
        self.assertTrue(all(request.cancelled for request in self.connections.requests))
        self.assertTrue(self.prefetch.request_or_ready("b"))

    def test_off(self):
        self.make(self.chain, window=0)
        self.prefetch.process()
        self.assertTrue(self.prefetch.request_or_ready("a"))
        self.assertEqual(self.connections.requests, [])

    def test_progress(self):
        self.make({"a": set()})
        self.prefetch.process()
        self.fire.assert_not_called()
        self.connections.answer()
        self.connections.answer()
        self.prefetch.process()
        event = self.fire.call_args[0][0]
        self.assertIsInstance(event, bb.event.SstateFetchProgress)
        self.assertEqual((event.objects, event.total, event.size, event.total_size), (1, 1, 5, 5))

    def test_progress_ends_with_the_tasks(self):
        """Also if their objects were not fetched because the mirror failed"""
        self.make({tid: set() for tid in "abcd"}, window=1)
        self.prefetch.process()
        self.connections.answer()
        self.connections.answer()
        self.connections.healthy = False
        self.prefetch.process()
        self.queue.sq_running.update("abcd")
        with unittest.mock.patch.object(prefetch, "INTERVAL", -1):
            self.prefetch.process()
        events = [call[0][0] for call in self.fire.call_args_list]
        self.assertEqual([(event.objects, event.total) for event in events], [(1, 4), (1, 1)])

    def test_another_hash_before_the_answer_is_processed(self):
        self.make({"a": set()})
        self.prefetch.process()
        self.connections.answer()
        self.files["a"] = Files(self.tempdir, "a", 2)
        self.prefetch.process()
        self.assertEqual(self.local, [])

    def random_graph(self, rand):
        tids = ["t%02d" % n for n in range(rand.randint(1, 25))]
        return {tid: set(rand.sample(tids[n + 1:], min(len(tids) - n - 1, rand.randint(0, 3)))) for n, tid in enumerate(tids)}

    def test_model(self):
        """
        Random graphs, with tasks that are skipped, fail or get another hash, and objects that cannot be fetched. Each
        task is started in the end, but not while its object is being fetched, and no object of a skipped task is fetched.
        """
        for seed in range(200):
            rand = random.Random(seed)
            with self.subTest(seed=seed), unittest.mock.patch.multiple(
                    prefetch, MAX_UNDER_WAY=rand.randint(1, 6), RESERVED=rand.randint(0, 3),
                    PER_TURN=rand.randint(1, 8)):
                self.play(rand)
                self.close()
                shutil.rmtree(self.tempdir + "/ab", ignore_errors=True)

    def play(self, rand):
        window, threads = rand.choice((rand.randint(1, 5), rand.randint(6, 40))), rand.randint(1, 3)
        self.make(self.random_graph(rand), window, threads)
        queue, connections = self.queue, self.connections
        tids = list(self.files)
        queue.outcomes = {tid: rand.choice(("skip", "fail")) for tid in tids if rand.random() < 0.2}
        for tid in tids:
            if rand.random() < 0.2:
                del self.files[tid]
        skipped, fetched, running = set(queue.outcomes), set(), []
        event = True
        for step in range(2000):
            # The runqueue has a turn after it has started a task, when a task has ended, or when it is woken up
            turn = event or self.connections.awake
            ready = []
            if turn:
                self.prefetch.process()
                fetched.update(connections.tids())
                self.assertFalse(fetched & skipped)
                self.assertEqual(self.prefetch.waiting & queue.sq_running, set())
            under_way = connections.tids()
            buildable = [tid for tid in tids if tid in queue.sq_buildable and tid not in queue.sq_running]
            for tid in buildable if turn else ():
                if tid in queue.outcomes:
                    ready.append(("outcome", tid))
                elif len(running) < threads and tid not in self.prefetch.waiting and self.prefetch.request_or_ready(tid):
                    ready.append(("start", tid))
            choices = ready + [("answer", request) for request in connections.requests[:3]] + [("end", tid) for tid in running]
            event = bool(ready)
            if not choices:
                if self.connections.awake:
                    continue
                # These would never be started
                self.assertEqual(buildable, [])
                break
            what, subject = rand.choice(choices)
            if what == "outcome":
                queue.sq_running.add(subject)
                queue.finish(subject, queue.outcomes[subject] == "skip")
            elif what == "start":
                self.assertNotIn(subject, under_way)
                queue.sq_running.add(subject)
                running.append(subject)
            elif what == "answer":
                connections.answer(subject, **rand.choice([{}, {}, {}, {"status": 404}, {"error": ConnectError("failed")}]))
            else:
                event = True
                running.remove(subject)
                covered = rand.random() < 0.8
                queue.finish(subject, covered)
                if not covered:
                    self.prefetch.changed()
            if rand.random() < 0.05 and self.files:
                tid = rand.choice(sorted(self.files))
                if tid not in queue.sq_running:
                    self.files[tid] = Files(self.tempdir, tid, step + 1)
                    self.prefetch.changed()
                    event = True
        self.assertEqual(queue.sq_running, set(tids))
        self.assertEqual(running, [])
