"""The certificate authority of most tests."""

from __future__ import annotations

import trustme

from trisock import Certificate


class Authority:
    """A certificate authority. It caches its certificates, because generating keys is slow."""

    def __init__(self) -> None:
        self.ca = trustme.CA()
        self.pem = self.ca.cert_pem.bytes()
        self._issued: dict[object, Certificate] = {}

    def issue(self, *names: str, key_type: trustme.KeyType = trustme.KeyType.ECDSA) -> Certificate:
        key = (names, key_type)
        if key not in self._issued:
            self._issued[key] = certificate(self.ca.issue_cert(*names, key_type=key_type))
        return self._issued[key]


def certificate(leaf: trustme.LeafCert) -> Certificate:
    return Certificate(
        b"".join(blob.bytes() for blob in leaf.cert_chain_pems), leaf.private_key_pem.bytes()
    )
