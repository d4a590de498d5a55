# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""An sftp-server that says FAILURE where it should say NO_SUCH_FILE: `python3 oddsftpserver.py PROGRAM`.

faultymirrors.py has sshd run it. It passes on what PROGRAM reads and writes, but
changes that code of SSH_FXP_STATUS (draft-ietf-secsh-filexfer-02, 7).
"""

import struct
import subprocess
import sys

STATUS = 101
NO_SUCH_FILE = 2
FAILURE = 4


def main():
    # It reads our standard input itself
    process = subprocess.Popen([sys.argv[1]], stdout=subprocess.PIPE)
    while True:
        prefix = process.stdout.read(4)
        if len(prefix) < 4:
            break
        packet = bytearray(process.stdout.read(struct.unpack(">I", prefix)[0]))
        # Type, request id, code
        if packet[0] == STATUS and struct.unpack_from(">I", packet, 5)[0] == NO_SUCH_FILE:
            struct.pack_into(">I", packet, 5, FAILURE)
        sys.stdout.buffer.write(prefix + packet)
        sys.stdout.buffer.flush()
    return process.wait()


sys.exit(main())
