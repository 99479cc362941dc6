"""Certificates and keys in PEM, and a check that an error shows no part of a key."""

from __future__ import annotations

import base64
import datetime
import functools
import traceback
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from helpers.authority import issue
from trisock.testing import Authority


def pems(authority: Authority, *names: str) -> tuple[bytes, bytes]:
    certificate = issue(authority, *names)
    return certificate._chain, certificate._private_key


def encrypted(key: bytes, password: bytes) -> bytes:
    return serialization.load_pem_private_key(key, None).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(password),
    )


def encoded(key: Any, password: bytes | None = None) -> bytes:
    encryption: Any = serialization.NoEncryption()
    if password is not None:
        encryption = serialization.BestAvailableEncryption(password)
    pem: bytes = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption
    )
    return pem


@functools.lru_cache
def chains_and_keys() -> tuple[list[bytes], list[bytes]]:
    """Return a self-signed certificate for each key type, and each key, plain and encrypted."""
    keys: list[Any] = [
        rsa.generate_private_key(65537, 2048),
        ec.generate_private_key(ec.SECP256R1()),
        ec.generate_private_key(ec.SECP384R1()),
        ed25519.Ed25519PrivateKey.generate(),
    ]
    chains = []
    now = datetime.datetime.now(datetime.timezone.utc)
    for key in keys:
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "example.org")])
        builder = x509.CertificateBuilder(
            name, name, key.public_key(), 1, now, now + datetime.timedelta(1)
        )
        algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
        chains.append(builder.sign(key, algorithm).public_bytes(serialization.Encoding.PEM))
    return chains, [*map(encoded, keys), *(encoded(key, b"secret") for key in keys)]


def der_of(pem: bytes) -> bytes:
    return base64.b64decode(b"".join(pem.splitlines()[1:-1]))


def secrets_in(pem: bytes) -> set[str]:
    """Return every 40-character substring of a key's base64 text (without BEGIN and END lines)."""
    body = "".join(
        line for line in pem.decode("latin-1").splitlines() if not line.startswith("-----")
    )
    return {body[start : start + 40] for start in range(len(body) - 39)}


def assert_shows_no_key(exc: BaseException, key: bytes) -> None:
    text = "".join(traceback.format_exception(exc))
    shown: BaseException | None = exc
    while shown is not None:
        text += repr(shown) + str(shown)
        shown = shown.__cause__ or (None if shown.__suppress_context__ else shown.__context__)
    joined = "".join(text.split()).replace("\\n", "")
    assert not any(secret in joined for secret in secrets_in(key))
