"""Certificates for tests, made by openssl when they are asked for: an authority, what it signed, and what it did not."""

from __future__ import annotations

import subprocess
from pathlib import Path

KEY = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]


class Certificates:
    """In `folder`: ca.pem, other.pem (another authority), and NAME.pem with NAME.key for each one made."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for authority in ("ca", "other"):
            files = ["-keyout", f"{authority}.key", "-out", f"{authority}.pem"]
            self._run("req", "-x509", *KEY, *files, "-days", "2", "-subj", f"/CN={authority}")

    def make(self, name: str, hosts: str = "DNS:localhost,IP:127.0.0.1", days: int = 2, by: str = "ca") -> None:
        """Signed by the authority `by`; with `days` -1 it has expired."""
        self._run("req", *KEY, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        (self.folder / f"{name}.ext").write_text(f"subjectAltName={hosts}")
        signed_by = ["-CA", f"{by}.pem", "-CAkey", f"{by}.key", "-CAcreateserial", "-extfile", f"{name}.ext"]
        self._run("x509", "-req", "-in", f"{name}.csr", "-out", f"{name}.pem", "-days", str(days), *signed_by)

    def settings(self, name: str = "", ca: str = "") -> dict[str, str]:
        """`bridge` settings with the certificate `name` and the authority `ca`."""
        own = (
            {"tls_cert": str(self.folder / f"{name}.pem"), "tls_key": str(self.folder / f"{name}.key")} if name else {}
        )
        return own | ({"tls_ca": str(self.folder / f"{ca}.pem")} if ca else {})

    def _run(self, *arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=self.folder, check=True, capture_output=True)
