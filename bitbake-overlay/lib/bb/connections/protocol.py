#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
The messages between a setscene task (client.py) and the bitbake server (peers.py).

Transport: a Unix socket of type SOCK_SEQPACKET. Each packet is one message of at most MAX_MESSAGE bytes: a JSON object
in UTF-8. A file descriptor travels with the message that needs it (SCM_RIGHTS).

The address is "<uid>:<name>". The name is abstract, so it belongs to a network namespace: a task that bitbake has cut
off from the network cannot connect, and there is no file to protect or to leave behind. The server accepts only peers
with its own uid (SO_PEERCRED). The client compares the server's uid with that in the address, which pseudo cannot fake:
another user could take the name once the server is gone.

Server, on accepting:
    {"hello": VERSION, "schemes": ["http", "https", "sftp"]}
A client that does not know the version closes. It fetches without the server, as it does URLs of other schemes.

Client:
    {"id": n, "method": "HEAD" or "GET", "url": "...", "environment": {...}, "verify": true, "authorization": "..."}
id is a number that the client has not in use. environment holds variables, for http those of request.HTTP_ENVIRONMENT that are set. verify
(default true) tells whether to check certificates, authorization is the value of the header of that name, or null. A
GET comes with the descriptor of a regular file, open for writing, that receives the body; a HEAD without. At most
MAX_REQUESTS may be without an answer.

Server, for each request any number of
    {"id": n, "progress": bytes}
at least every PROGRESS_SECONDS, then one of
    {"id": n, "status": 200, "size": bytes or null, "modified": seconds since the epoch or null}
    {"id": n, "status": other}
    {"id": n, "error": "connect" | "protocol" | "timeout" | "refused" | ..., "message": "..."}
After status 200 of a GET the file holds exactly size bytes, after anything else it holds anything.

A client that receives nothing for SILENCE_SECONDS treats the server as gone. It cancels its requests by closing the
socket. A violation of the protocol is answered by
    {"id": null, "error": "protocol", "message": "..."}
and the end of the connection. Unknown members are ignored, so that they can be added; a change in the meaning of known
ones needs a new VERSION.
"""

import json
import os
import socket
import struct

from bb.connections import ProtocolError

VERSION = 1
MAX_MESSAGE = 64 * 1024
MAX_REQUESTS = 16
PROGRESS_SECONDS = 5
SILENCE_SECONDS = 30


def peer_uid(sock):
    """The user id of the process at the other end of a connection"""
    return struct.unpack("iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("iII")))[1]

def encode(message):
    """Raises ValueError if message is longer than MAX_MESSAGE"""
    data = json.dumps(message, separators=(",", ":")).encode("utf-8")
    if len(data) > MAX_MESSAGE:
        raise ValueError("message is longer than %s bytes" % MAX_MESSAGE)
    return data

def send(sock, data, fd=None):
    """Send what encode() returned. Blocks as the socket does; raises OSError."""
    # Not socket.send_fds(), which is of Python 3.9
    sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", fd))] if fd is not None else [])

def receive(sock, descriptors=1):
    """
    Receive one message. Returns it, and the descriptor that came with it or None. Raises ProtocolError for what is not
    a message, or has more descriptors, with none of them left open; OSError as the socket does, and at its end.
    """
    # Not socket.recv_fds(), which ignores the flags in some versions of Python
    size = socket.CMSG_LEN(descriptors * struct.calcsize("i"))
    data, ancillary, flags, _ = sock.recvmsg(MAX_MESSAGE, size, socket.MSG_CMSG_CLOEXEC)
    fd = struct.unpack("i", ancillary[0][2])[0] if ancillary else None
    message = None
    if not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        try:
            message = json.loads(data)
        except (ValueError, RecursionError):
            pass
    if isinstance(message, dict):
        return message, fd
    if fd is not None:
        os.close(fd)
    if not data:
        raise ConnectionResetError("closed by the other end")
    raise ProtocolError("not a JSON object of at most %s bytes with at most %s descriptors" % (MAX_MESSAGE, descriptors))
