#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
What a setscene task (client.py) and the bitbake server (server.py) say to each
other.

Transport: a Unix socket of type SOCK_SEQPACKET with an abstract name, so each
packet is one message, at most MAX_MESSAGE bytes: a JSON object in UTF-8. A file
descriptor travels with the message that needs it (SCM_RIGHTS).

The address is "<uid>:<name>". The name is abstract, which means that it
belongs to a network namespace: a task that bitbake has cut off from the network
cannot connect, and there is no file to protect or to leave behind. The server
lets in only peers with its own uid (SO_PEERCRED). The client does likewise
with the uid in the address, which is not one that pseudo can fake: another
user could take the name once the server is gone.

Server, on accepting:
    {"hello": VERSION, "schemes": ["http", "https", "sftp"]}
A client that does not know the version closes, and fetches without the server,
as it does URLs of other schemes.

Client:
    {"id": n, "method": "HEAD" or "GET", "url": "...", "environment": {...},
     "verify": true, "authorization": "..."}
id is a number that the client has not in use. environment holds what of
request.ENVIRONMENT is set. verify (default true) tells whether to check
certificates, authorization is a value for the header of that name. With GET
comes the descriptor of a regular file, open for writing, which the body goes
to. HEAD comes without one. At most MAX_REQUESTS may be open at once.

Server, for each request any number of
    {"id": n, "progress": bytes}
at least each PROGRESS_SECONDS, then one of
    {"id": n, "status": 200, "size": bytes or null, "modified": seconds since the epoch or null}
    {"id": n, "status": other}
    {"id": n, "error": "connect" | "protocol" | "timeout" | "refused" | ..., "message": "..."}
With status 200 of a GET the file holds exactly size bytes. After anything else
it holds anything.

A client that hears nothing for SILENCE_SECONDS takes the server as gone. To
cancel its requests it closes the socket. What is not as above is answered by
    {"id": null, "error": "protocol", "message": "..."}
and the end of the connection. Unknown members are ignored, so that they can be
added; whatever changes the meaning of the known ones needs a new VERSION.
"""

import array
import json
import os
import socket

VERSION = 1
MAX_MESSAGE = 64 * 1024
MAX_REQUESTS = 16
PROGRESS_SECONDS = 5
SILENCE_SECONDS = 30


def encode(message):
    """Raises ValueError if message is longer than what may be sent"""
    data = json.dumps(message, separators=(",", ":")).encode("utf-8")
    if len(data) > MAX_MESSAGE:
        raise ValueError("message is longer than %s bytes" % MAX_MESSAGE)
    return data

def send(sock, data, fd=None):
    """Send what encode() returned. Blocks as the socket does; raises OSError."""
    # Not socket.send_fds(), which is of Python 3.9
    sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))] if fd is not None else [])

def receive(sock):
    """
    Receive one message. Returns it and the descriptor that came with it or
    None; the message is None at the end. Raises ValueError for what is not a
    message (no descriptor is left open then), OSError as the socket does.
    """
    # Not socket.recv_fds(), which ignores the flags in some versions of Python
    fds = array.array("i")
    data, ancillary, flags, _ = sock.recvmsg(MAX_MESSAGE, socket.CMSG_LEN(fds.itemsize), socket.MSG_CMSG_CLOEXEC)
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(content[:len(content) - len(content) % fds.itemsize])
    try:
        if not data:
            return None, None
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise ValueError("message is too long or has too many descriptors")
        try:
            message = json.loads(data)
        except (ValueError, RecursionError):
            raise ValueError("message is not JSON") from None
        if not isinstance(message, dict):
            raise ValueError("message is not an object")
        fd = fds.pop() if fds else None
        return message, fd
    finally:
        for fd in fds:
            os.close(fd)
