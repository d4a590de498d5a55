# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""Mutated messages for the server's end of the Unix socket, of `scripts/bench fuzz`. runner.py calls this.

    talk = Socket()
    talk.run(random.Random(1))          # raises Fault
    talk.close()
"""

import json
import os
import socket
import struct
import tempfile

from bb.connections import ConnectionCacheError, protocol
from bb.connections.peers import Peers
from bb.connections.request import Response
from netqueue.fuzz.eventloop import Loop
from netqueue.fuzz.fault import must
from netqueue.fuzz.mutation import mutate


class Socket:
    """Tasks which send messages, with a Peers that has them"""
    VALUES = [None, True, False, 0, 1, -1, 1 << 70, 1.5, float("nan"), "", "x", "\ud800", "\0", "HEAD", "GET", [], {}, [[]], {"a": 1},
              "https://mirror.example/x", "http://", "https://[::1", "https://user:pass@h:99999/x", "sftp://-oProxyCommand=x/y",
              "sftp://h/%00", "sftp://h/\ud800", "file:///etc/passwd", "x" * 70000, {"http_proxy": "http://["}, {"PATH": "\0"},
              {"http_proxy": "ftp://p"}, {"no_proxy": "*", "http_proxy": "p:1"}, {"HOME": "\ud800"}]

    def __init__(self):
        self.loop = Loop()
        self.submitted = []
        self.messages = []
        self.peers = Peers(self.loop, self.submit, ["http", "https", "sftp"], self.messages.append)
        self.peers.tick()
        self.file = tempfile.TemporaryFile()
        self.folder = os.open("/", os.O_RDONLY | os.O_DIRECTORY)
        self.pipe = os.pipe()
        self.usual = len(os.listdir("/proc/self/fd"))

    def submit(self, requests):
        self.submitted += requests

    def run(self, rng):
        self.rng = rng
        self.submitted.clear()
        self.messages.clear()
        # Ids that a reply may have: of requests that have none yet
        self.expected = []
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as task:
            task.setblocking(False)
            task.connect("\0" + self.peers.address.partition(":")[2])
            self.call(list(self.loop.readers)[0])
            must(json.loads(task.recv(protocol.MAX_MESSAGE))["hello"] == protocol.VERSION, "no greeting")
            for number in range(rng.randint(1, 5)):
                self.send(task, number)
                self.read(task)
                if rng.randrange(3) == 0:
                    self.answer_some()
                    self.read(task)
                if rng.randrange(20) == 0:
                    self.peers.tick()
                    self.loop.timers.clear()
                    self.read(task)
        # The task has left
        for fd in list(self.loop.readers)[1:]:
            self.call(fd)
        must(len(self.loop.readers) == 1, "a peer is left")
        must(all(request.cancelled for request in self.submitted), "requests of a peer that has left are not cancelled")
        for request in self.submitted:
            request.done(request, None, ConnectionCacheError("the build has ended"))
        must(not self.peers.files, "a file is left")
        fds = len(os.listdir("/proc/self/fd"))
        must(fds <= self.usual, "%d descriptors, %d before" % (fds, self.usual))
        must(len(self.messages) <= 5, "%d lines in the log" % len(self.messages))

    def call(self, fd):
        if fd in self.loop.readers:
            self.loop.readers[fd]()

    def send(self, task, number):
        data, fds = self.message(number)
        try:
            task.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("%di" % len(fds), *fds))] if fds else [])
        except OSError:
            # Longer than the kernel takes, or the end is known
            return
        before = len(self.submitted)
        for fd in list(self.loop.readers)[1:]:
            self.call(fd)
        for request in self.submitted[before:]:
            must(request.method == ("HEAD" if request.fd is None else "GET"), "%s with file %s" % (request.method, request.fd))
            self.expected.append(request.context)

    def message(self, number):
        """Bytes and descriptors of a message"""
        rng = self.rng
        gets = rng.randrange(2)
        content = {"id": number, "method": "GET" if gets else "HEAD", "url": rng.choice(("https://mirror.example/x", "sftp://h/~/x")),
                   "environment": {"PATH": "/bin", "HOME": "/"}, "verify": True, "authorization": None}
        fds = [self.file.fileno()] if gets else []
        chance = rng.randrange(10)
        if chance < 5:
            for _ in range(rng.choice((1, 1, 2))):
                name = rng.choice(list(content))
                if rng.randrange(5):
                    content[name] = rng.choice(self.VALUES)
                else:
                    content.pop(name)
        if rng.randrange(8) == 0:
            fds = [rng.choice((self.file.fileno(), self.folder, *self.pipe)) for _ in range(rng.randrange(4))]
        data = json.dumps(content).encode("ascii", "surrogatepass")
        if chance in (5, 6):
            data = bytearray(data)
            for _ in range(rng.choice((1, 2, 5))):
                mutate(rng, data)
        elif chance == 7:
            data = rng.choice((b"[" * 60000, b"", b"{}", b"[]", b"null", b'{"id":' + b"1" * 5000 + b"}", "\ufeff{}".encode("utf-16"),
                               b'{"id": 1, "id": 2}', b'{"a":' * 5000, data + b"\0"))
        return bytes(data), fds

    def answer_some(self):
        """What a host would say"""
        rng = self.rng
        for request in self.submitted:
            if request.context in self.expected and not request.cancelled and rng.randrange(2):
                response = Response(rng.choice((200, 404, 503)), {"last-modified": rng.choice(("", "Tue, 07 Jul 2020 07:07:07 GMT"))},
                                    rng.choice((None, 0, 1 << 40)))
                error = ConnectionCacheError("x\ud800\U0001f600" * 1000) if rng.randrange(3) == 0 else None
                request.done(request, None if error else response, error)
                request.cancelled = True

    def read(self, task):
        """All that has been sent to the task"""
        while True:
            try:
                data = task.recv(2 * protocol.MAX_MESSAGE)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                return
            must(len(data) <= protocol.MAX_MESSAGE, "a message of %d bytes" % len(data))
            reply = json.loads(data)
            must("progress" in reply or "status" in reply or "error" in reply, "a reply %r" % reply)
            if "progress" in reply or reply["id"] is None or reply.get("error") == "url":
                continue
            must(self.expected.count(reply["id"]) == 1, "a reply to %r" % reply["id"])
            self.expected.remove(reply["id"])

    def close(self):
        self.peers.close()
        self.file.close()
        for fd in (self.folder, *self.pipe):
            os.close(fd)
