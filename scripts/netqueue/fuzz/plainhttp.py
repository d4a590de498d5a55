# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""Mutated answers of HTTP without TLS, whose long bodies go by splice(2), of `scripts/bench fuzz`. runner.py calls this.

As HTTP in http.py, but that a connection has a real socket.
"""

import select
import socket

from bb.connections import splice
from bb.connections.http import MIN_SPLICE
from netqueue.fuzz.conversation import Transport
from netqueue.fuzz.fault import must
from netqueue.fuzz.http import HTTP


class SocketTransport(Transport):
    def __init__(self, sock):
        super().__init__(lambda data: None)
        self.sock = sock
        self.paused = False

    def get_extra_info(self, name):
        return self.sock

    def pause_reading(self):
        self.paused = True

    def resume_reading(self):
        self.paused = False


class Plain(HTTP):
    host = "http://mirror.example"
    longs, usual = (MIN_SPLICE - 1, MIN_SPLICE + 1, 600000, 900000), 3

    def run(self, rng):
        self.ours, self.theirs = socket.socketpair()
        with self.ours, self.theirs:
            self.theirs.setblocking(False)
            super().run(rng)
        must(not splice.descriptors, "descriptors are left")
        must(not self.loop.readers, "a reader is left")

    def transport(self):
        return SocketTransport(self.ours)

    def feed(self, data):
        while data and self.connection.is_open:
            try:
                sent = self.theirs.send(data)
                data = data[sent:]
                self.received += sent
            except BlockingIOError:
                pass
            self.arrive()

    def finish(self):
        # What the transport tells of it, or splice(2)
        self.theirs.close()
        self.arrive()
        super().finish()

    def arrive(self):
        """What an event loop does until there is nothing to read"""
        connection = self.connection
        while connection.is_open and select.select([self.ours], [], [], 0)[0]:
            if connection.transport.paused:
                reader, = self.loop.readers.values()
                reader()
            else:
                buffer = connection.get_buffer(-1)
                must(len(buffer) > 0, "a buffer of 0 bytes")
                size = self.ours.recv_into(buffer)
                if size:
                    connection.buffer_updated(size)
                else:
                    connection.eof_received()
            must(connection.fault is None, connection.fault)
