"""Read certificates and keys with the cryptography package.

Importing that package takes 35 ms, a sixth of ``import trisock``. So other modules import this one
only when a program makes its first certificate or TLS role.
"""

from __future__ import annotations

import contextlib

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes, PublicKeyTypes

_TLS_KEYS = (
    rsa.RSAPrivateKey,
    ec.EllipticCurvePrivateKey,
    ed25519.Ed25519PrivateKey,
    ed448.Ed448PrivateKey,
)

load_certificate = x509.load_der_x509_certificate
load_key = serialization.load_pem_private_key


def names_of(leaf: x509.Certificate) -> tuple[str, ...]:
    """Return the names that a certificate is valid for, in the form of ``Certificate.names``."""
    found: list[str] = []
    with contextlib.suppress(x509.ExtensionNotFound):
        extension = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        found = extension.value.get_values_for_type(x509.DNSName)
    if not found:
        common = leaf.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
        found = [str(attribute.value) for attribute in common]
    return tuple(name.lower().removesuffix(".") for name in found)


def public_bytes(key: PublicKeyTypes) -> bytes:
    return key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def kind_of(key: PrivateKeyTypes, leaf: x509.Certificate, public_key: bytes) -> str | None:
    """Return the type of a key, such as ``"RSA"``, or ``None`` if TLS does not support the type.

    Args:
      leaf: the certificate of this key.
      public_key: the key's public half, as ``public_bytes`` returns it.
    """
    if not isinstance(key, _TLS_KEYS):
        return None
    kind = type(key).__name__.removeprefix("_").removesuffix("PrivateKey")
    if kind == "RSA" and public_key not in leaf.tbs_certificate_bytes:
        # The cryptography package treats an RSA-PSS key as RSA, and encodes it with the identifier
        # of RSA. The certificate contains the identifier of RSA-PSS, so the encodings differ.
        return "RSA-PSS"
    return kind


def end_point(certificate: bytes) -> bytes | None:
    """Return the hash for ``tls-server-end-point``, or ``None`` if the signature uses no hash."""
    leaf = load_certificate(certificate)
    algorithm = leaf.signature_hash_algorithm
    if algorithm is None:  # Ed25519, Ed448
        return None
    if algorithm.name in ("md5", "sha1"):
        algorithm = hashes.SHA256()
    return leaf.fingerprint(algorithm)
