#
# Copyright BitBake Contributors
#
# SPDX-License-Identifier: GPL-2.0-only
#

"""
Messages between tasks (client.py) and the connection server (peers.py): specification and functions for both ends.

Transport: a Unix socket of type SOCK_SEQPACKET. Each packet is one message, a JSON object in UTF-8 of at most
MAX_MESSAGE bytes. A file descriptor is passed with the message that refers to it (SCM_RIGHTS).

The address is "<uid>:<name>". The name is abstract, and so belongs to a network namespace: a task without network
access cannot connect, and there is no file to protect or to remove. The server accepts only peers with its own uid
(SO_PEERCRED). The client compares the server's uid with the one in the address, which pseudo does not change, since
another user could use the name after the server has ended.

On accepting a connection, the server sends
    {"hello": VERSION, "schemes": ["http", "https", "s3", "sftp"]}
A client that does not support the version disconnects, and fetches without the server, as it does for other schemes.

The client sends requests:
    {"id": n, "method": "HEAD" or "GET", "url": "...", "environment": {...}, "verify": true, "authorization": "..."}
id is a number that no unanswered request of the client has. environment contains variables, for http those of
request.HTTP_ENVIRONMENT that are set, for s3 no keys but their hash (awsconfig.py): the server signs. verify (default
true) determines whether certificates are verified, authorization is the value of the Authorization header or null. A
GET is accompanied by the descriptor of a regular file, open for writing, for the body; a HEAD by none. A client may
have at most MAX_REQUESTS unanswered requests.

For each request the server sends, at least every PROGRESS_SECONDS,
    {"id": n, "progress": bytes}
and then one of
    {"id": n, "status": 200, "size": bytes or null, "modified": seconds since the epoch or null}
    {"id": n, "status": other}
    {"id": n, "error": "connect" | "protocol" | "timeout" | "refused" | ..., "message": "..."}
The kinds of errors are connect, refused and timeout, which are the mirror's and final; and protocol, status, destination,
cancelled, url and error, after which the client may fetch without the server.
After status 200 to a GET the file contains exactly size bytes; in all other cases its content is undefined.

A client that receives nothing for SILENCE_SECONDS treats the server as failed. Closing the socket cancels the client's
requests. After a violation of the protocol the server sends
    {"id": null, "error": "protocol", "message": "..."}
and disconnects. Unknown members are ignored, so that further ones can be added; if the meaning of a known one changes,
VERSION has to be increased.
"""

import json
import os
import socket
import struct

from bb.connections import ProtocolError

VERSION = 1
# Bytes of a message; long environments and URLs fit
MAX_MESSAGE = 64 * 1024
# Unanswered requests of a client; a task has one
MAX_REQUESTS = 16
# Seconds between progress messages
PROGRESS_SECONDS = 5
# Seconds without a message after which a server has failed: several progress messages are overdue
SILENCE_SECONDS = 30


def peer_uid(sock):
    """Returns the user id of the process at the other end"""
    return struct.unpack("iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("iII")))[1]

def encode(message):
    """Raises ValueError if message is longer than MAX_MESSAGE"""
    data = json.dumps(message, separators=(",", ":")).encode("utf-8")
    if len(data) > MAX_MESSAGE:
        raise ValueError("message is longer than %s bytes" % MAX_MESSAGE)
    return data

def send(sock, data, fd=None):
    """Send data, which encode() has returned. Blocks as the socket does; raises OSError."""
    sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", fd))] if fd is not None else [])

def receive(sock, descriptors=1):
    """
    Receive a message. Returns it, and the descriptor that was passed with it or None. Raises ProtocolError if it is
    invalid or has more descriptors, all of which are closed then; OSError as the socket does, and at its end.
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
