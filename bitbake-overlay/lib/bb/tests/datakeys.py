#
# BitBake tests for finding variables by their names and flags
#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

import io
import unittest

import bb
import bb.data


class KeysContainingTest(unittest.TestCase):
    def test_keyscontaining(self):
        base = bb.data.init()
        base.setVar("OVERRIDES", "o:p:q")
        base.setVar("PN", "pn")
        for key in ("RDEPENDS:${PN}", "FILES:${PN}-dev:o", "DELETED:${PN}", "DELETED:${PN}-x:o", "PLAIN:o"):
            base.setVar(key, "value")
        base.setVar("APPENDED:${PN}:append:o", "value")
        base.setVar("TWICE:${PN}:o:p", "value")
        base.setVar("INACTIVE:${PN}:other", "value")
        base.setVarFlag("FLAG:${PN}", "doc", "value")
        d = base.createCopy().createCopy()
        d.delVar("DELETED:${PN}")
        d.delVar("DELETED:${PN}-x:o")
        d.setVar("UPPER:${PN}", "value")
        for data in (base, d):
            self.assertEqual(data.keyscontaining("${"), set(key for key in data.keys() if "${" in key))
            self.assertEqual(data.keyscontaining(":o"), set(key for key in data.keys() if ":o" in key))
            self.assertEqual(data.keyscontaining(""), set(data.keys()))
        self.assertIn("DELETED:${PN}", base.keyscontaining("${"))
        self.assertIn("FILES:${PN}-dev", d.keyscontaining("${"))
        self.assertNotIn("DELETED:${PN}", d.keyscontaining("${"))


class TestFlaggedKeys(unittest.TestCase):
    def setUp(self):
        self.base = bb.data.init()
        self.base.setVar("OVERRIDES", "o")
        for name in ("KEPT", "DELETED", "UNFLAGGED", "OTHERFLAG", "SET", "EMPTYVALUE", "OVERRIDDEN", "RENAMED"):
            self.base.setVar(name, name.lower())
            self.base.setVarFlag(name, "export", "1")
        self.base.setVar("PLAIN", "plain")
        self.base.setVarFlag("PLAIN", "doc", "export")
        # [export] ??= "1"
        self.base.setVar("WEAK", "weak")
        self.base.setVarFlag("WEAK", "_defaultval_flag_export", "1")
        if self.base.getVarFlag("WEAK", "export") is None:
            # This version has no weak defaults of flags
            self.base.setVarFlag("WEAK", "export", "1")
        self.base.setVarFlag("WITHOUTVALUE", "export", "1")
        self.base.setVar("FUNCTION", "a b")
        self.base.setVarFlag("FUNCTION", "func", "1")
        self.base.setVarFlag("FUNCTION", "export", "1")
        self.base.setVar("__INTERNAL", "internal")
        self.base.setVarFlag("__INTERNAL", "export", "1")
        self.d = self.base.createCopy().createCopy()
        self.d.delVar("DELETED")
        self.d.delVarFlag("UNFLAGGED", "export")
        self.d.setVarFlag("OTHERFLAG", "export", "0")
        self.d.setVarFlag("OTHERFLAG", "unexport", "1")
        self.d.setVar("SET", "new")
        self.d.setVar("EMPTYVALUE", "")
        self.d.setVar("OVERRIDDEN:o", "from override")
        self.d.renameVar("RENAMED", "NEWNAME")
        self.d.setVarFlags("LATE", {"export": "1"})
        self.d.setVar("LATE", "late")

    def scan(self, d, *flags):
        return set(key for key in d.keys() if any(d.getVarFlag(key, flag, False) is not None for flag in flags))

    def test_same_as_scan(self):
        for d in (self.base, self.d, self.d.createCopy()):
            for flags in (("export",), ("unexport",), ("export", "unexport"), ("doc",), ("func",)):
                found = d.flaggedkeys(*flags)
                self.assertEqual(len(found), len(set(found)))
                self.assertEqual(set(found), self.scan(d, *flags))

    def test_exported_vars(self):
        expected = {"KEPT": "kept", "SET": "new", "EMPTYVALUE": "", "OVERRIDDEN": "from override", "WEAK": "weak",
                    "FUNCTION": "a b", "LATE": "late"}
        self.assertEqual(dict(bb.data.exported_vars(self.d)), expected)

    def test_emit_func(self):
        for d in (self.base, self.d):
            d.setVar("run", "echo $SET")
            d.setVarFlag("run", "func", "1")
            d.setVarFlag("run", "filename", "recipe.bb")
            d.setVarFlag("run", "lineno", "7")
        output = io.StringIO()
        bb.data.emit_func("run", output, self.d)
        self.assertEqual(output.getvalue(), '''export EMPTYVALUE=""
export KEPT="kept"
export LATE="late"
unset OTHERFLAG
export OVERRIDDEN="from override"
export SET="new"
export WEAK="weak"

# line: 7, file: recipe.bb
run() {
echo $SET
}

''')
