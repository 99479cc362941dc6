"""Certificates, keys and options: what cannot be used is found before a byte is sent."""

from __future__ import annotations

import os
import ssl
import stat
import subprocess
import traceback
from pathlib import Path

import pytest
import trio
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519

from helpers.authority import Authority
from helpers.pairs import closing, tcp_pair
from helpers.pem import encrypted, pems
from helpers.sni import names_of, shown, trusting
from trisock import Certificate, ClientTLS, ServerTLS, TLSInfo
from trisock._tls import certificate as loading
from trisock._tls import roles
from trisock._tls.info import new_tls_info

# ---- PEM ----


def test_pem_is_taken_as_str_and_as_bytes_and_certificates_are_equal_by_value(
    authority: Authority,
) -> None:
    chain, key = pems(authority, "example.org")
    certificate = Certificate(chain, key)
    assert certificate == Certificate(chain.decode(), key.decode())
    assert hash(certificate) == hash(Certificate(chain, key))
    assert certificate != Certificate(*pems(authority, "example.org"))
    assert certificate != "something else"
    assert certificate.names == ("example.org",)


async def test_a_mapping_with_the_same_fields_works_too(authority: Authority) -> None:
    chain, key = pems(authority, "example.org")
    secret = encrypted(key, b"secret")
    for certificates in (
        [{"chain": chain, "private_key": key}],
        {"chain": chain.decode(), "private_key": key.decode()},
        [{"chain": chain, "private_key": secret, "password": "secret"}],
    ):
        info = await shown(certificates, "example.org", trusting(authority))
        assert names_of(info) == ["example.org"]


def test_certificates_are_read_from_files(authority: Authority, tmp_path: Path) -> None:
    chain, key = pems(authority, "example.org")
    (tmp_path / "chain.pem").write_bytes(chain)
    (tmp_path / "key.pem").write_bytes(encrypted(key, b"secret"))
    (tmp_path / "both.pem").write_bytes(key + chain)
    assert Certificate.from_files(
        tmp_path / "chain.pem", str(tmp_path / "key.pem"), "secret"
    ).names == ("example.org",)
    assert Certificate.from_files(tmp_path / "both.pem").names == ("example.org",)
    with pytest.raises(FileNotFoundError, match="nothing"):
        Certificate.from_files(tmp_path / "nothing.pem")


def test_what_cannot_be_used_is_an_error_that_says_which(authority: Authority) -> None:
    chain, key = pems(authority, "example.org")
    _, other_key = pems(authority, "example.net")
    secret = encrypted(key, b"secret")
    broken = b"-----BEGIN CERTIFICATE-----\nbroken\n-----END CERTIFICATE-----\n"
    for arguments, error, words in [
        (("no pem", key), ValueError, "chain is not PEM"),
        ((chain, "no pem"), ValueError, "private_key is not PEM"),
        ((broken, key), ValueError, "chain is not a PEM certificate"),
        ((key, key), ValueError, "chain is not a PEM certificate"),
        ((chain, chain), ValueError, "private_key is not a PEM private key"),
        ((chain, other_key), ValueError, r"private_key does not match .* for example\.org"),
        ((chain, secret), ValueError, "private_key is encrypted, and no password was given"),
        ((chain, secret, "wrong"), ValueError, "or the password is wrong"),
        ((None, key), TypeError, "chain is str or bytes, not a NoneType"),
        ((chain, 1), TypeError, "private_key is str or bytes, not a int"),
        ((chain, secret, 1), TypeError, "password is str or bytes"),
    ]:
        with pytest.raises(error, match=words) as caught:
            Certificate(*arguments)  # type: ignore[arg-type]
        assert "PRIVATE KEY-----" not in str(caught.value)
    # A password that is not needed does no harm.
    assert Certificate(chain, key, "secret")


def test_roles_check_their_options(authority: Authority) -> None:
    good = authority.issue("example.org")
    for make, error, words in [
        (lambda: ServerTLS([]), ValueError, "at least one certificate"),
        (lambda: ServerTLS("pem"), TypeError, "not as a str"),
        (lambda: ServerTLS([1]), TypeError, "not a int"),  # type: ignore[list-item]
        (lambda: ServerTLS(good, require_alpn=True), ValueError, "needs alpn_protocols"),
        (lambda: ServerTLS(good, alpn_protocols="h2"), TypeError, "sequence of str"),
        (lambda: ServerTLS(good, alpn_protocols=[b"h2"]), TypeError, "is a str"),  # type: ignore[list-item]
        (lambda: ServerTLS(good, alpn_protocols=[""]), ValueError, "1 to 255"),
        (lambda: ServerTLS(good, alpn_protocols=["x" * 256]), ValueError, "1 to 255"),
        (lambda: ServerTLS(good, client_ca="x"), ValueError, "client_ca is not PEM"),
        (
            lambda: ServerTLS(good, client_ca="-----BEGIN CERTIFICATE-----\n"),
            ValueError,
            "client_ca holds no PEM certificate",
        ),
        (
            lambda: ServerTLS(good, require_client_certificate=True),
            ValueError,
            "needs client_ca",
        ),
        (lambda: ClientTLS("a b"), ValueError, "not a host name"),
        (lambda: ClientTLS(1), TypeError, "a host is a str"),  # type: ignore[arg-type]
        (lambda: ClientTLS("x", ca="x"), ValueError, "ca is not PEM"),
        (
            lambda: ClientTLS("x", ca=b"-----BEGIN \xff"),
            ValueError,
            "ca holds no PEM certificate",
        ),
        (lambda: ClientTLS("x", certificate="pem"), TypeError, "a certificate is"),  # type: ignore[arg-type]
        (lambda: ClientTLS("x", alpn_protocols=1), TypeError, "sequence of str"),  # type: ignore[arg-type]
    ]:
        with pytest.raises(error, match=words):
            make()


# ---- keys ----


def test_a_key_is_never_shown(authority: Authority) -> None:
    chain, key = pems(authority, "example.org", "example.net")
    certificate = Certificate(chain, key, "hunter2")
    role = ServerTLS(certificate, client_ca=authority.pem)
    client = ClientTLS("example.org", ca=authority.pem, certificate=certificate)
    secret_line = key.decode().splitlines()[1]
    for thing in (certificate, role, client, [certificate], str(certificate)):
        assert secret_line not in repr(thing)
        assert "BEGIN" not in repr(thing)
        assert "hunter2" not in repr(thing)
    assert repr(certificate) == "<trisock.Certificate example.org, example.net (EC)>"


def test_an_error_shows_nothing_of_a_key_that_is_damaged_or_in_the_wrong_place(
    authority: Authority, tmp_path: Path
) -> None:
    chain, key = pems(authority, "example.org")
    damaged = key.replace(b" KEY-----", b" KEY", 1)  # now it is all the name of a PEM block
    one_file = tmp_path / "key_and_chain.pem"
    one_file.write_bytes(damaged + chain)
    for make in (
        lambda: Certificate.from_files(one_file),
        lambda: Certificate(chain, damaged + chain),
        lambda: ClientTLS("example.org", ca=key + b"\xff"),
    ):
        with pytest.raises(ValueError, match="PEM") as caught:
            make()
        told = "".join(traceback.format_exception(caught.value))
        told += repr(caught.value) + repr(caught.value.__cause__)
        assert key.decode().splitlines()[1] not in told


@pytest.mark.parametrize("memory", [True, False])
def test_a_key_never_lies_where_others_can_read_it(
    memory: bool, authority: Authority, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    real, modes = os.open, []

    def watched(*args: object, **options: object) -> int:
        descriptor = real(*args, **options)  # type: ignore[arg-type]
        modes.append(stat.S_IMODE(os.fstat(descriptor).st_mode))
        return descriptor

    monkeypatch.setattr(os, "open", watched)
    if not memory:
        monkeypatch.delattr(os, "memfd_create")
    old = os.umask(0)
    try:
        with loading._private_file(b"the key") as path:
            with open(path, "rb") as file:
                assert file.read() == b"the key"
            if memory:
                assert os.readlink(path).startswith("/memfd:")
                assert not list(tmp_path.iterdir())
            else:
                assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
                assert set(modes) == {0o600}  # from its first moment on
    finally:
        os.umask(old)
    assert not os.path.exists(path)
    assert not list(tmp_path.iterdir())


def test_a_missing_password_is_never_asked_for(authority: Authority) -> None:
    """OpenSSL would ask on the terminal. Here it cannot: stdin is not even looked at."""
    chain, key = pems(authority, "example.org")
    certificate = Certificate(chain, encrypted(key, b"secret"), "secret")
    object.__setattr__(certificate, "_password", None)
    with pytest.raises(ValueError, match="OpenSSL does not accept the certificate"):
        certificate.load_into(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))


# ---- which certificate ----


async def test_sni_chooses_the_certificate(authority: Authority) -> None:
    first = authority.issue("first.example")
    second = authority.issue("second.example", "*.wild.example")
    third = authority.issue("third.example", "exact.wild.example")
    context = trusting(authority)
    for name, expected in [
        ("first.example", "first.example"),
        ("second.example", "second.example"),
        ("SECOND.example", "second.example"),
        ("any.wild.example", "second.example"),
        ("exact.wild.example", "third.example"),
        ("deep.any.wild.example", "first.example"),  # not found: the first
        ("unknown.example", "first.example"),
        ("127.0.0.1", "first.example"),  # no SNI for an address
    ]:
        info = await shown([first, second, third], name, context)
        assert names_of(info)[0] == expected


@pytest.mark.parametrize(
    ("position", "asked"),
    [(0, "several.example"), (1, "several.example"), (0, "unknown.example")],
)
async def test_a_name_may_have_a_certificate_of_each_key_kind(
    position: int, asked: str, authority: Authority
) -> None:
    name = "several.example"
    certificates = [
        authority.issue(name, key_type=trustme.KeyType.RSA),
        authority.issue(name, key_type=trustme.KeyType.ECDSA),
    ]
    if position:  # not the first name, so it is the SNI callback that finds them
        certificates.insert(0, authority.issue("first.example"))
    for cipher, kind in [
        ("ECDHE-RSA-AES128-GCM-SHA256", "RSA"),
        ("ECDHE-ECDSA-AES128-GCM-SHA256", "EC"),
    ]:
        context = trusting(authority)
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.set_ciphers(cipher)
        info = await shown(certificates, asked, context)
        assert info.peer_certificate is not None
        key = x509.load_der_x509_certificate(info.peer_certificate).public_key()
        assert kind in type(key).__name__
        assert names_of(info) == [name]


async def test_an_ed25519_key_works(authority: Authority) -> None:
    """trustme makes none, so this one is signed by itself."""
    import datetime

    key = ed25519.Ed25519PrivateKey.generate()
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "ed.example")])
    now = datetime.datetime.now(datetime.timezone.utc)
    pem = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .sign(key, None)
        .public_bytes(serialization.Encoding.PEM)
    )
    certificate = Certificate(
        pem,
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ),
    )
    assert certificate.names == ("ed.example",)  # the common name, as it has no others
    assert certificate.key_kind == "Ed25519"
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    info = await shown([authority.issue("first.example"), certificate], "ed.example", context)
    with pytest.raises(ValueError, match="signature"):
        info.channel_binding("tls-server-end-point")


async def test_tls_server_end_point_replaces_weak_hashes_as_rfc_5929_says() -> None:
    import hashlib
    from unittest import mock

    info = new_tls_info(
        TLSInfo("TLSv1.3", "x", None, None, b"der", False),
        tls_unique=None,
        server_certificate=b"der",
    )
    certificate = mock.Mock()
    certificate.signature_hash_algorithm.name = "sha1"
    certificate.fingerprint = lambda algorithm: hashlib.new(algorithm.name, b"der").digest()
    with mock.patch("cryptography.x509.load_der_x509_certificate", return_value=certificate):
        binding = info.channel_binding("tls-server-end-point")
    assert binding == hashlib.sha256(b"der").digest()


# ---- contexts ----


def test_contexts_are_built_once_for_equal_values(
    authority: Authority, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    chain, key = pems(authority, "example.org")

    def server() -> ssl.SSLContext:
        mapping = {"chain": chain, "private_key": key}
        return roles.resolve_role(
            [mapping], server_hostname=None, connected_host=None, side="server"
        ).context

    def client(name: str) -> ssl.SSLContext:
        role = roles.resolve_role(name, server_hostname=None, connected_host=None, side="client")
        return role.context

    assert server() is server()
    mapping = {"chain": chain, "private_key": key}
    assert loading.to_certificate(mapping) is loading.to_certificate(dict(mapping))
    with pytest.raises(ValueError, match="has the fields"):
        loading.to_certificate({**mapping, "privat_key": key})
    # The system's trust store is loaded once, whatever the names are.
    assert client("one.example") is client("two.example")
    before = client("one.example")
    (tmp_path / "ca.pem").write_bytes(authority.pem)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    assert client("one.example") is not before
    assert client("one.example").get_ca_certs()[0]["subject"]


async def test_ssl_cert_file_is_part_of_the_systems_trust(
    authority: Authority, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "ca.pem").write_bytes(authority.pem)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    a, b = await tcp_pair()
    async with closing(a, b), trio.open_nursery() as nursery:
        nursery.start_soon(b.starttls, [authority.issue("example.org")])
        await a.starttls("example.org")


@pytest.mark.needs("openssl")
async def test_ssl_cert_dir_is_part_of_the_systems_trust(
    authority: Authority, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "ca.pem").write_bytes(authority.pem)
    # OpenSSL looks for a file by the hash of the certificate's name.
    subprocess.run(["openssl", "rehash", tmp_path], check=True)
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path))
    a, b = await tcp_pair()
    async with closing(a, b), trio.open_nursery() as nursery:
        nursery.start_soon(b.starttls, [authority.issue("example.org")])
        await a.starttls("example.org")


def test_roles_are_immutable_and_can_be_keys(authority: Authority) -> None:
    role = ClientTLS("example.org", ca=authority.pem, alpn_protocols=["imap"])
    with pytest.raises(AttributeError):
        role.verify = False  # type: ignore[misc]
    assert {role: 1}[ClientTLS("example.org", ca=authority.pem.decode(), alpn_protocols=("imap",))]
    server = ServerTLS([authority.issue("example.org")])
    with pytest.raises(AttributeError):
        server.certificates = ()  # type: ignore[misc]
    assert server == ServerTLS(authority.issue("example.org"))


def test_verification_is_on_unless_it_is_switched_off(authority: Authority) -> None:
    verified = ClientTLS("example.org", ca=authority.pem)._context()
    assert verified.check_hostname
    assert verified.verify_mode == ssl.CERT_REQUIRED
    # Only the authority that was given is trusted.
    assert len(verified.get_ca_certs()) == 1
    unverified = ClientTLS("example.org", verify=False)._context()
    assert not unverified.check_hostname
    assert unverified.verify_mode == ssl.CERT_NONE


async def test_sni_wildcard_of_a_certificate_that_is_not_the_first(authority: Authority) -> None:
    certs = [authority.issue("first.example"), authority.issue("*.wild.example")]
    context = ssl.create_default_context(cadata=authority.pem.decode())
    a, b = await tcp_pair()
    async with closing(a, b), trio.open_nursery() as nursery:
        nursery.start_soon(b.starttls, certs)
        await a.starttls(context, server_hostname="any.wild.example")


def test_ssl_cert_dir_is_part_of_the_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    role = ClientTLS("example.org")
    before = role._context()
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path))
    assert role._context() is not before
