"""Certificates that trustme cannot issue: any key type, dates, chain or purpose."""

from __future__ import annotations

import contextlib
import datetime
import functools
import ipaddress

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID

from trisock import Certificate

Key = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey
Dates = tuple[datetime.datetime, datetime.datetime]

#: The key types that servers use.
KINDS = ("RSA 2048", "P-256", "P-384", "Ed25519")

_now = datetime.datetime.now(datetime.timezone.utc).replace(
    microsecond=0
)  # certificates store whole seconds
_day = datetime.timedelta(days=1)
VALID: Dates = (_now - _day, _now + 90 * _day)
EXPIRED: Dates = (_now - 3 * _day, _now - _day)
NOT_YET_VALID: Dates = (_now + _day, _now + 3 * _day)

SERVERS_ONLY = ExtendedKeyUsageOID.SERVER_AUTH
CLIENTS_ONLY = ExtendedKeyUsageOID.CLIENT_AUTH


@functools.cache
def key_of(kind: str) -> Key:
    """Return a key of this type. It is cached, because generating an RSA key is slow."""
    if kind.startswith("RSA "):
        return rsa.generate_private_key(65537, int(kind.removeprefix("RSA ")))
    if kind == "Ed25519":
        return ed25519.Ed25519PrivateKey.generate()
    return ec.generate_private_key({"P-256": ec.SECP256R1(), "P-384": ec.SECP384R1()}[kind])


class CertificateAuthority:
    """A root or intermediate authority.

    By default, an issued certificate comes with the certificate of each intermediate authority.

    Attributes:
      pem: the authority's own certificate.
    """

    def __init__(
        self, name: str, *, issuer: CertificateAuthority | None = None, dates: Dates = VALID
    ) -> None:
        self._name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        self._key = ec.generate_private_key(
            ec.SECP256R1()
        )  # not cached: each authority needs its own key
        builder = (
            _builder(self._name, self._key, dates)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(_usage(certificates=True), critical=True)
        )
        self.pem = _pem((issuer or self)._sign(builder))
        self._chain: bytes = b"" if issuer is None else self.pem + issuer._chain

    def own_certificate(self) -> Certificate:
        """Return the authority's own certificate, for a server that identifies itself with it."""
        return Certificate(self.pem, _key_pem(self._key))

    def issue(
        self,
        *names: str,
        common_name: str | None = None,
        kind: str = "P-256",
        dates: Dates = VALID,
        purpose: x509.ObjectIdentifier | None = None,
        revocation_list: str | None = None,
        with_chain: bool = True,
    ) -> Certificate:
        """Issue a certificate for DNS names and addresses, with an optional common name.

        Without names, there is no subjectAltName. Without ``purpose``, both servers and clients can
        use the certificate.
        """
        key = key_of(kind)
        subject = [] if common_name is None else [(x509.NameOID.COMMON_NAME, common_name)]
        builder = (
            _builder(x509.Name(x509.NameAttribute(*each) for each in subject), key, dates)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(certificates=False), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage([purpose] if purpose else [SERVERS_ONLY, CLIENTS_ONLY]),
                critical=False,
            )
        )
        if names:
            # Critical if the subject is empty (RFC 5280, section 4.2.1.6).
            alternative = x509.SubjectAlternativeName(list(map(_general, names)))
            builder = builder.add_extension(alternative, critical=not subject)
        if revocation_list is not None:
            where = [x509.UniformResourceIdentifier(revocation_list)]
            points = x509.CRLDistributionPoints([x509.DistributionPoint(where, None, None, None)])
            builder = builder.add_extension(points, critical=False)
        chain = _pem(self._sign(builder)) + (self._chain if with_chain else b"")
        return Certificate(chain, _key_pem(key))

    def _sign(self, builder: x509.CertificateBuilder) -> x509.Certificate:
        identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        return (
            builder.issuer_name(self._name)
            .add_extension(identifier, critical=False)
            .sign(self._key, hashes.SHA256())
        )


def der(certificate: Certificate) -> bytes:
    """Return the leaf certificate in DER, as the peer receives it."""
    return x509.load_pem_x509_certificate(certificate._chain).public_bytes(
        serialization.Encoding.DER
    )


def _builder(name: x509.Name, key: Key, dates: Dates) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(dates[0])
        .not_valid_after(dates[1])
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _usage(*, certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=certificates,
        crl_sign=certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _key_pem(key: Key) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _general(name: str) -> x509.GeneralName:
    with contextlib.suppress(ValueError):
        return x509.IPAddress(ipaddress.ip_address(name))
    return x509.DNSName(name)
