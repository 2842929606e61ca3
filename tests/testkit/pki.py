"""Certificates and kubeconfigs for clusters that live for minutes, made with the openssl program."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# Elliptic curves: a key takes milliseconds, an RSA key a noticeable part of a second.
_NEW_KEY = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
_DAYS = "365"  # some controllers replace what ends within a few months


class PkiError(RuntimeError):
    """openssl is missing or refused."""


@dataclass(frozen=True, kw_only=True)
class KeyPair:
    """A certificate and its private key, as files."""

    certificate: Path
    key: Path


class Authority:
    """A certificate authority in a folder of its own; made when the folder is empty, used again when it is not."""

    def __init__(self, folder: Path, *, names: Sequence[str] = (), rsa: bool = False) -> None:
        """`names` are its own, like `DNS:x`, and `rsa` is for those who can read no other key."""
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.root = KeyPair(certificate=folder / "ca.crt", key=folder / "ca.key")
        if not self.root.certificate.exists():
            named = ["-addext", f"subjectAltName={','.join(names)}"] if names else []
            new = ["-newkey", "rsa:2048", "-nodes"] if rsa else _NEW_KEY
            _openssl(
                *["req", "-x509", *new, "-days", _DAYS, "-subj", "/CN=testkit", *named],
                *["-keyout", str(self.root.key), "-out", str(self.root.certificate)],
            )
            if rsa:
                _openssl("rsa", "-traditional", "-in", str(self.root.key), "-out", str(self.root.key))

    def issue(self, name: str, *, subject: str, names: Sequence[str] = ()) -> KeyPair:
        """Issue a certificate. `subject` is like `/O=system:masters/CN=admin`; `names` like `IP:127.0.0.1`, `DNS:x`."""
        pair = KeyPair(certificate=self.folder / f"{name}.crt", key=self.folder / f"{name}.key")
        request, extensions = self.folder / f"{name}.csr", self.folder / f"{name}.ext"
        alternatives = f"subjectAltName={','.join(names)}\n" if names else ""
        extensions.write_text(f"basicConstraints=CA:FALSE\n{alternatives}")
        _openssl("req", *_NEW_KEY, "-subj", subject, "-keyout", str(pair.key), "-out", str(request))
        _openssl(
            *["x509", "-req", "-in", str(request), "-days", _DAYS, "-extfile", str(extensions)],
            *["-CA", str(self.root.certificate), "-CAkey", str(self.root.key), "-CAcreateserial"],
            *["-out", str(pair.certificate)],
        )
        return pair

    def signing_key(self, name: str) -> Path:
        """Return a bare private key, for service account tokens."""
        key = self.folder / f"{name}.key"
        if not key.exists():
            _openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", str(key))
        return key


def write_kubeconfig(
    path: Path, *, server: str, authority: Path, pair: KeyPair | None = None, token: str | None = None
) -> Path:
    """Write a kubeconfig that holds everything it needs; JSON, which is YAML."""
    user: dict[str, str] = {}
    if pair is not None:
        user = {"client-certificate-data": _encoded(pair.certificate), "client-key-data": _encoded(pair.key)}
    if token is not None:
        user = {"token": token}
    document = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [
            {"name": "testkit", "cluster": {"server": server, "certificate-authority-data": _encoded(authority)}}
        ],
        "users": [{"name": "testkit", "user": user}],
        "contexts": [{"name": "testkit", "context": {"cluster": "testkit", "user": "testkit"}}],
        "current-context": "testkit",
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600)
    path.write_text(json.dumps(document, indent=1))
    return path


def _encoded(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def _openssl(*args: str) -> None:
    if shutil.which("openssl") is None:
        raise PkiError("certificates are made with openssl, which is not on PATH: run `apt-get install -y openssl`")
    done = subprocess.run(["openssl", *args], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise PkiError(f"openssl {' '.join(args)}: {done.stderr.strip()[-500:]}")
