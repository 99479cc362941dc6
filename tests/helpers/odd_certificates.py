"""Invalid and unusual certificates."""

from __future__ import annotations

import datetime
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

KEY = ec.generate_private_key(ec.SECP256R1())
NAME = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "example.org")])


def self_signed(*extensions: x509.ExtensionType, key: Any = KEY) -> bytes:
    """Return a self-signed certificate, in DER."""
    now = datetime.datetime.now(datetime.timezone.utc)
    day = datetime.timedelta(1)
    builder = x509.CertificateBuilder(NAME, NAME, key.public_key(), 1, now - day, now + day)
    for each in extensions:
        builder = builder.add_extension(each, critical=False)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


UNKNOWN = (
    x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\5\0"),
    x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.5"), b"\5\0"),
)
X400 = x509.UnrecognizedExtension(x509.ObjectIdentifier("2.5.29.17"), b"\x30\x04\xa3\x02\x30\x00")
BAD_CHAINS = {
    "version": self_signed(UNKNOWN[0]).replace(b"\xa0\x03\2\1\2", b"\xa0\x03\2\1\5", 1),
    "an extension twice": self_signed(*UNKNOWN).replace(b"\x2a\3\5", b"\x2a\3\4", 1),
    "an X.400 name": self_signed(X400),
    "cut short": self_signed()[:-20],
    "no certificate": b"\x30\x03\x02\x01\x05",
}

# Later versions of cryptography warn about serial number 0.
SERIAL_0 = self_signed().replace(b"\xa0\x03\2\1\2\2\1\1", b"\xa0\x03\2\1\2\2\1\0", 1)
