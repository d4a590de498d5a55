# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""What a build and a mirror need on one machine. Called by the demo, the benchmarks and the tests.

    trees.py            bitbake trees, stock and patched; launchers/ has the programs that the package lacks
    build.py            build directories of recipes that need nothing but metadata/
    oecore.py           build directories that use the classes of openembedded-core
    objects.py          the content of the objects
    bitbakerun.py       one run of bitbake
    processes.py        the processes of a build, and their end
    mirror.py           an HTTP mirror that counts: nginx.py, or ownserver.py where nginx is missing
    counters.py         what it counts
    sshd.py             an SFTP mirror that counts
    s3server.py         an S3 mirror that counts
    serverprocess.py    what nginx.py, sshd.py and s3server.py share
    certificates.py     the certificates of HTTPS mirrors
    delay.py            a proxy that adds a round trip time, and limits the bandwidth
    faultymirrors.py    mirrors with faults, by faultyserver.py, behaviours.py and oddsftpserver.py

Of netqueue it imports series/ only.
"""
