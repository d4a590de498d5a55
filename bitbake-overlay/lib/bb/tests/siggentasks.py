#
# BitBake tests for the tasks for which signature data is generated
#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

import logging
import os
import tempfile
import unittest

import bb
import bb.build
import bb.data
import bb.parse
import bb.siggen


class SiggenTasklistTest(unittest.TestCase):
    """The tasks for which signature data is generated"""

    tasks = ["do_compile", "do_package", "do_package_setscene", "do_package_write"]

    def setUp(self):
        self.d = bb.data.init()
        self.d.setVar("BB_SIGNATURE_HANDLER", "basichash")
        self.d.setVar("BB_BASEHASH_IGNORE_VARS", "BB_WORKERCONTEXT BB_CURRENTTASK")
        self.d.setVar("__exportlist", set())
        self.d.setVar("STAMP", "/stamps/test")
        for task in self.tasks:
            bb.build.addtask(task, None, None, self.d)
            self.d.setVarFlag(task, "func", 1)
            self.d.setVarFlag(task, "python", 1)
            self.d.setVarFlag(task, "filename", "test.bb")
            self.d.setVarFlag(task, "lineno", 1)
            self.d.setVarFlag(task, "_content", "    d.getVar('A')\n    d.getVar('%s')\n" % task.upper())
            self.d.setVar(task.upper(), "value of " + task)
        self.d.setVar("A", "${B}")
        self.d.setVar("B", "1")

    def finalised(self, context=None, current=None):
        d = self.d.createCopy()
        d.setVar("BB_WORKERCONTEXT", context)
        d.setVar("BB_CURRENTTASK", current)
        siggen = bb.siggen.init(d)
        siggen.finalise("test.bb", d, None)
        siggen.setup_datacache_from_datastore("test.bb", d)
        return siggen, d

    def check(self, expected, context=None, current=None):
        reference, _ = self.finalised()
        siggen, d = self.finalised(context, current)
        self.assertEqual(set(siggen.basehash), set("test.bb:" + task for task in expected))
        self.assertEqual(set(d.getVar("__siggen_basehashes")), set(expected))
        wanted, found = reference.datacaches[""], siggen.datacaches[""]
        for task in expected:
            self.assertEqual(siggen.basehash["test.bb:" + task], reference.basehash["test.bb:" + task])
            self.assertEqual(found.siggen_taskdeps["test.bb"][task], wanted.siggen_taskdeps["test.bb"][task])
            for name in (task, *found.siggen_taskdeps["test.bb"][task]):
                self.assertEqual(found.siggen_gendeps["test.bb"][name], wanted.siggen_gendeps["test.bb"][name])
                self.assertEqual(found.siggen_varvals["test.bb"][name], wanted.siggen_varvals["test.bb"][name])

    def test_server(self):
        self.check(self.tasks)
        # A class may have set BB_CURRENTTASK
        self.check(self.tasks, None, "package_setscene")

    def test_worker_normal_task(self):
        self.check(self.tasks, "1", "package")

    def test_worker_setscene_task(self):
        self.check(["do_package_setscene"], "1", "package_setscene")

    def test_worker_unknown_task(self):
        self.check(self.tasks, "1", "other_setscene")
        self.check(self.tasks, "1", None)


class SiggenVariantTest(unittest.TestCase):
    """The variants of a recipe for which signature data is generated"""

    def test_onlyfinalise(self):
        class Siggen(bb.siggen.SignatureGenerator):
            def finalise(self, fn, d, variant):
                finalised.append(variant)

        self.addCleanup(setattr, bb.parse, "siggen", getattr(bb.parse, "siggen", None))
        with tempfile.TemporaryDirectory(prefix="siggentest") as tempdir:
            self.addCleanup(os.chdir, os.getcwd())
            os.chdir(tempdir)
            os.mkdir("classes")
            for name in ("native", "nativesdk"):
                with open("classes/%s.bbclass" % name, "w") as f:
                    f.write('FOO = "2"\n')
            with open("test.bb", "w") as f:
                f.write('PN = "test"\nBBCLASSEXTEND = "native nativesdk"\nFOO = "1"\n'
                        'python () {\n    d.appendVar("SEEN", " anonymous")\n}\n')
            for only, expected in ((None, [None, "native", "nativesdk"]), ("default", [None]), ("native", ["native"]), ("nativesdk", ["nativesdk"])):
                finalised = []
                d = bb.data.init()
                bb.parse.siggen = Siggen(d)
                d.setVar("__bbclasstype", "recipe")
                d.setVar("BBPATH", tempdir)
                if only:
                    d.setVar("__ONLYFINALISE", only)
                alldata = bb.parse.handle(tempdir + "/test.bb", d)
                self.assertEqual(finalised, expected)
                # Nothing else changes
                self.assertEqual(alldata[""].getVar("SEEN"), " anonymous")
                self.assertEqual(alldata[""].getVar("FOO"), "1")
                for name in filter(None, expected):
                    self.assertEqual(alldata[name].getVar("FOO"), "2")
                    self.assertEqual(alldata[name].getVar("PN"), "test-" + name)
