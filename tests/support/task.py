# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""A task's end of the server's socket, for what client.py would never send.

    task = Task(connections.address)        # reads the greeting
    task.ask(1, "HEAD", url)
    assert task.receive()["status"] == 200
"""

import array
import json
import socket


class Task:
    def __init__(self, address, greeted=True):
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.settimeout(15)
        self.sock.connect("\0" + address.partition(":")[2])
        self.greeting = self.receive() if greeted else None

    def send(self, data, *fds):
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.sock.sendmsg([data], ancillary)

    def ask(self, number, method, url, *fds, **members):
        self.send(json.dumps(dict(members, id=number, method=method, url=url)).encode(), *fds)

    def receive(self):
        """The next message; None once the server has closed."""
        try:
            data = self.sock.recv(1 << 20)
        except ConnectionResetError:
            data = b""
        return json.loads(data) if data else None

    def answer(self):
        """The next message that is not progress."""
        while True:
            message = self.receive()
            if message is None or "progress" not in message:
                return message

    def close(self):
        self.sock.close()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()
