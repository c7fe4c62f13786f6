# SPDX-License-Identifier: MIT
"""Certificates for the tests, made by the command line of openssl."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

#: Names of this machine, which a certificate of a broker here must be for.
HERE = "DNS:localhost,IP:127.0.0.1"

#: Fast to make, and taken by every TLS.
NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256")


class Certificates:
    """A folder of certificates: ``name.pem``, and the key beside it in ``name.key``.

    Args:
        folder: an empty folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def pem(self, name: str) -> str:
        """Return the file of a certificate."""
        return str(self.folder / f"{name}.pem")

    def key(self, name: str) -> str:
        """Return the file of a key."""
        return str(self.folder / f"{name}.key")

    def make_ca(self, name: str) -> None:
        """Make a CA, valid for two days."""
        openssl(
            *("req", "-x509", "-noenc", *NEW_KEY, "-days", "2", "-subj", f"/CN={name}"),
            *("-addext", "keyUsage=critical,keyCertSign,cRLSign"),
            *("-keyout", self.key(name), "-out", self.pem(name)),
        )

    def make(self, name: str, ca: str = "ca", names: str = "", days: int = 2) -> None:
        """Make a certificate, of a broker if it is for names, else of a client.

        Args:
            name: What it is called.
            ca: Who signs it.
            names: What it is for, such as `HERE`.
            days: How long it is valid; it has expired if that is negative.
        """
        request, extensions = self.folder / f"{name}.csr", self.folder / f"{name}.ext"
        openssl(
            *("req", "-new", "-noenc", *NEW_KEY, "-subj", f"/CN={name}"),
            *("-keyout", self.key(name), "-out", str(request)),
        )
        lines = [
            "basicConstraints = CA:false",
            "subjectKeyIdentifier = hash",
            "authorityKeyIdentifier = keyid",
            f"extendedKeyUsage = {'serverAuth' if names else 'clientAuth'}",
            *([f"subjectAltName = {names}"] if names else []),
        ]
        extensions.write_text("\n".join(lines) + "\n")
        openssl(
            *("x509", "-req", "-in", str(request), "-extfile", str(extensions)),
            *("-CA", self.pem(ca), "-CAkey", self.key(ca), "-days", str(days)),
            *("-out", self.pem(name)),
        )

    def encrypt_key(self, name: str, password: str) -> str:
        """Write a key anew under a password, and return the file."""
        path = str(self.folder / f"{name}-encrypted.key")
        openssl(
            *("pkcs8", "-topk8", "-in", self.key(name), "-out", path),
            *("-passout", f"pass:{password}"),
        )
        return path


def openssl(*arguments: str, folder: Path | None = None) -> None:
    """Run openssl, in a folder. Skips the test if it is not installed.

    Raises:
        RuntimeError: It failed; with what it says.
    """
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    result = subprocess.run(
        ["openssl", *arguments], capture_output=True, text=True, timeout=60, cwd=folder
    )
    if result.returncode != 0:
        raise RuntimeError(f"openssl {' '.join(arguments)} failed:\n{result.stderr}")
