#
# BitBake Tests for lib/bb/process.py
#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

import io
import os
import unittest

import bb.process

class ProcessTest(unittest.TestCase):
    def test_sigpipe_is_not_ignored(self):
        # Python ignores SIGPIPE, and children inherit that
        for options in ({}, {"log": io.StringIO()}):
            with self.assertRaises(bb.process.ExecutionError) as caught:
                bb.process.run(["sh", "-c", "kill -s PIPE $$; exit 3"], **options)
            self.assertEqual(caught.exception.exitcode, -13)

    def test_vfork(self):
        calls = []
        # Not called before vfork()
        os.register_at_fork(before=lambda: calls.append(True))
        bb.process.run(["true"])
        self.assertEqual(calls, [])

    def test_preexec_fn(self):
        self.assertEqual(bb.process.run(["sh", "-c", "umask"], preexec_fn=lambda: os.umask(0o027)), ("0027\n", ""))

    def test_output(self):
        self.assertEqual(bb.process.run("echo out; echo err >&2"), ("out\n", "err\n"))
        log = io.StringIO()
        self.assertEqual(bb.process.run(["sh", "-c", "cat; echo err >&2"], input=b"in", log=log), ("in", "err\n"))
        self.assertEqual(sorted(log.getvalue()), sorted("inerr\n"))
