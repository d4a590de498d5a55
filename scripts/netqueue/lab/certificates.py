# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""A private CA and a server certificate for localhost, for mirrors on loopback.

Called by mirror.py and by tests. The program openssl makes them; where it is
missing, the Python module trustme, if installed. Clients are told of the CA
by trust(): SSL_CERT_FILE for Python, ~/.wgetrc for wget, which may be built
with GnuTLS and then ignores SSL_CERT_FILE.

    certificates = make_certificates(folder)
    environment.update(trust(certificates.ca_file, home))
"""

import dataclasses
import os
import shutil
import ssl
import subprocess
from pathlib import Path

from netqueue import Problem

# Everything a strict verifier (Python 3.13) asks for, and no default of the machine's openssl.cnf.
CONFIG = """
[req]
distinguished_name = name
prompt = no
[name]
CN = bitbake-netqueue test
[ca]
basicConstraints = critical, CA:TRUE
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
[server]
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
subjectAltName = DNS:localhost, IP:127.0.0.1, IP:::1
"""

OPENSSL_STEPS = (
    ["ecparam", "-genkey", "-name", "prime256v1", "-noout", "-out", "ca.key"],
    ["req", "-x509", "-new", "-key", "ca.key", "-sha256", "-days", "3650", "-config", "openssl.cnf",
     "-extensions", "ca", "-out", "ca.pem"],
    ["ecparam", "-genkey", "-name", "prime256v1", "-noout", "-out", "server.key"],
    ["req", "-new", "-key", "server.key", "-subj", "/CN=localhost", "-config", "openssl.cnf",
     "-out", "server.csr"],
    ["x509", "-req", "-in", "server.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-set_serial", "2",
     "-sha256", "-days", "3650", "-extfile", "openssl.cnf", "-extensions", "server",
     "-out", "server.pem"],
)


@dataclasses.dataclass
class Certificates:
    ca_file: Path
    server_file: Path
    key_file: Path


def make_certificates(folder) -> Certificates:
    """Make them in the folder, which is created. Raises Problem without openssl and trustme."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    made = Certificates(folder / "ca.pem", folder / "server.pem", folder / "server.key")
    if shutil.which("openssl"):
        _by_openssl(folder)
    else:
        _by_trustme(made)
    made.key_file.chmod(0o600)
    return made


def _by_openssl(folder):
    (folder / "openssl.cnf").write_text(CONFIG)
    for step in OPENSSL_STEPS:
        done = subprocess.run(["openssl"] + step, cwd=folder, stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60)
        if done.returncode:
            raise Problem("openssl %s failed: %s" % (step[0], done.stdout.strip().replace("\n", "; ")))


def _by_trustme(made):
    try:
        import trustme
    except ImportError as error:
        raise Problem("https needs the program openssl (or the Python module trustme)") from error
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost", "127.0.0.1", "::1")
    authority.cert_pem.write_to_path(str(made.ca_file))
    certificate.cert_chain_pems[0].write_to_path(str(made.server_file))
    certificate.private_key_pem.write_to_path(str(made.key_file))


def trust(ca_file, home):
    """Write home/.wgetrc and return the environment that makes clients trust the CA.

    Python gets it together with the machine's own certificates, as on a
    machine where somebody installed a company's CA: reading that bundle is a
    good part of what a connection costs, so a short one would flatter.
    """
    home = Path(home)
    (home / ".wgetrc").write_text("ca_certificate = %s\n" % ca_file)
    system = ssl.get_default_verify_paths().cafile
    bundle = home / "ca-bundle.pem"
    texts = [Path(path).read_bytes() for path in (system, ca_file) if path and os.path.isfile(path)]
    bundle.write_bytes(b"\n".join(texts))
    return {"SSL_CERT_FILE": str(bundle)}
