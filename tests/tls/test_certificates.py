"""Certificate: the PEM that it accepts, the PEM that it refuses, and its protection of the key."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import ssl
import stat
import subprocess
import sys
import traceback
import warnings
from pathlib import Path

import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import dsa

from helpers.certificates import CertificateAuthority
from helpers.client_hellos import hello_for
from helpers.flights import certificates_in, flight_for
from helpers.odd_certificates import BAD_CHAINS, KEY, SERIAL_0, self_signed
from helpers.pairs import closing
from helpers.pem import chains_and_keys, encoded, encrypted, pems
from helpers.sni import client_info, names_of, trusting
from trisock import Certificate, ClientTLS, ServerTLS
from trisock._tls import certificate as loading
from trisock.testing import Authority, socket_pair

KEY_PEM = encoded(KEY)


def pem_of(content: bytes) -> bytes:
    return ssl.DER_cert_to_PEM_cert(content).encode()


# ---- accepted ----


def test_certificates_from_equal_str_and_bytes_are_equal(authority: Authority) -> None:
    chain, key = pems(authority, "example.org")
    certificate = Certificate(chain, key)
    assert certificate == Certificate(chain.decode(), key.decode())
    assert hash(certificate) == hash(Certificate(chain, key))
    assert certificate != Certificate(*pems(authority, "example.org"))
    assert certificate != "something else"
    assert certificate.names == ("example.org",)


async def test_a_mapping_with_the_fields_of_a_certificate_is_accepted(authority: Authority) -> None:
    chain, key = pems(authority, "example.org")
    secret = encrypted(key, b"secret")
    for certificates in (
        [{"chain": chain, "private_key": key}],
        {"chain": chain.decode(), "private_key": key.decode()},
        [{"chain": chain, "private_key": secret, "password": "secret"}],
    ):
        info = await client_info(certificates, "example.org", trusting(authority))
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


AROUND = {
    "umlauts in UTF-8": "# Zürich\n".encode(),
    "umlauts in Latin-1": "# Zürich\n".encode("latin-1"),
    "a byte order mark": b"\xef\xbb\xbf",
    "stray bytes": b"\0\xff\xfe\n",
    "a commented-out block": b"# -----BEGIN CERTIFICATE-----\n# MII\n# -----END CERTIFICATE-----\n",
    "another block": b"-----BEGIN DH PARAMETERS-----\nAAAA\n-----END DH PARAMETERS-----\n",
}


@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
async def test_text_outside_the_pem_blocks_is_ignored(around: bytes, authority: Authority) -> None:
    chain, key = pems(authority, "example.org")
    ca = around + authority.ca + around + authority.ca + around
    odd = Certificate(around + chain + around, around + key + around)
    assert odd == Certificate(chain, key)
    info = await client_info(ServerTLS(odd, client_ca=ca), "example.org", trusting(authority))
    assert names_of(info) == ["example.org"]
    client = ClientTLS("example.org", ca=ca, certificate=odd)
    assert client == ClientTLS("example.org", ca=authority.ca, certificate=odd)
    a, b = await socket_pair()
    async with closing(a, b), trio.open_nursery() as nursery:
        nursery.start_soon(b.starttls, odd)
        await a.starttls(client)


@pytest.mark.parametrize("ending", [b"\r\n", b"\r", b"\n\n", b" \n"])
def test_any_line_ending_is_accepted(ending: bytes, authority: Authority) -> None:
    chain, key = pems(authority, "example.org")
    secret = encrypted(key, b"secret")
    odd = Certificate(chain.replace(b"\n", ending), secret.replace(b"\n", ending), "secret")
    assert odd.names == ("example.org",)
    assert ServerTLS(odd)
    assert ClientTLS("example.org", ca=authority.ca.replace(b"\n", ending))


async def test_each_certificate_of_a_chain_is_sent_once(tmp_path: Path) -> None:
    root = CertificateAuthority("root")
    good = CertificateAuthority("between", issuer=root).issue("example.org")
    both = tmp_path / "both.pem"
    for parts in (
        [good._private_key, good._chain],
        [good._chain, good._private_key],
        [good._chain, good._chain, good._private_key],
    ):
        both.write_bytes(b"".join(parts))
        role = ServerTLS(Certificate.from_files(both))
        flight, _ = await flight_for(role, hello_for(b"example.org"))
        sent = certificates_in(flight)
        assert len(sent) == 2
        assert len(set(sent)) == 2


def test_a_key_encrypted_in_openssls_traditional_format_is_accepted() -> None:
    secret = KEY.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.TraditionalOpenSSL,
        serialization.BestAvailableEncryption(b"secret"),
    )
    assert b"DEK-Info" in secret
    for text in (secret, secret.replace(b"\n", b"\r\n"), b"\xef\xbb\xbf" + secret):
        assert ServerTLS(Certificate(pem_of(self_signed()), text, "secret"))


async def test_an_ed25519_key_is_accepted(authority: Authority) -> None:
    chains, keys = chains_and_keys()
    certificate = Certificate(chains[3], keys[3])
    assert certificate.names == ("example.org",)
    assert certificate.key_kind == "Ed25519"
    context = trusting(authority)
    context.verify_mode = ssl.CERT_NONE
    info = await client_info(
        [authority.certificate("first.example"), certificate], "example.org", context
    )
    assert info.peer_certificate == ssl.PEM_cert_to_DER_cert(chains[3].decode())
    with pytest.raises(ValueError, match="signature"):
        info.channel_binding("tls-server-end-point")


def test_a_certificate_without_dns_names_uses_its_common_name() -> None:
    addresses = [x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    chain = pem_of(self_signed(x509.SubjectAlternativeName(addresses)))
    assert Certificate(chain, KEY_PEM).names == ("example.org",)


def test_a_certificate_is_immutable(authority: Authority) -> None:
    certificate = authority.certificate("localhost")
    with pytest.raises(AttributeError, match="cannot be changed"):
        certificate.names = ("another.example",)
    with pytest.raises(AttributeError, match="cannot be changed"):
        del certificate.names
    with pytest.raises(TypeError, match=r"an ssl\.SSLContext"):
        certificate.load_into(None)  # type: ignore[arg-type]


# ---- refused ----


def test_an_error_names_the_unusable_argument(authority: Authority) -> None:
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
        ((None, key), TypeError, "chain must be str or bytes, not a NoneType"),
        ((chain, 1), TypeError, "private_key must be str or bytes, not a int"),
        ((chain, secret, 1), TypeError, "password must be str or bytes"),
    ]:
        with pytest.raises(error, match=words) as caught:
            Certificate(*arguments)  # type: ignore[arg-type]
        assert "PRIVATE KEY-----" not in str(caught.value)
    assert Certificate(chain, key, "a password that is not needed")


@pytest.mark.parametrize("bad", BAD_CHAINS.values(), ids=BAD_CHAINS)
def test_a_bad_certificate_raises_value_error(bad: bytes) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=r"^chain") as caught:
            Certificate(pem_of(bad), KEY_PEM)
    assert type(caught.value) is ValueError


def test_only_value_error_is_raised_if_warnings_are_errors() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with contextlib.suppress(ValueError):
            assert Certificate(pem_of(SERIAL_0), KEY_PEM).names


@pytest.mark.needs("openssl")
def test_a_key_that_tls_does_not_support_raises_value_error(tmp_path: Path) -> None:
    key, chain = tmp_path / "key.pem", tmp_path / "chain.pem"
    command = ["openssl", "req", "-x509", "-nodes", "-subj", "/CN=example.org", "-days", "2"]
    command += ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:SM2", "-sha256"]
    subprocess.run([*command, "-keyout", key, "-out", chain], check=True, capture_output=True)
    with pytest.raises(ValueError, match=r"^(chain|private_key)") as caught:
        Certificate.from_files(chain, key)
    assert type(caught.value) is ValueError


def test_a_dsa_key_is_refused() -> None:
    key = dsa.generate_private_key(1024)
    with pytest.raises(ValueError, match="private_key is of a type that TLS does not support"):
        Certificate(pem_of(self_signed(key=key)), encoded(key))


def test_a_path_that_is_too_long_is_not_quoted() -> None:
    path = "a/" * 3000
    with pytest.raises(OSError, match="characters") as caught:
        Certificate.from_files(path)
    assert path not in str(caught.value)


# ---- keys are secret ----


def test_no_repr_shows_a_key(authority: Authority) -> None:
    chain, key = pems(authority, "example.org", "example.net")
    certificate = Certificate(chain, key, "hunter2")
    role = ServerTLS(certificate, client_ca=authority.ca)
    client = ClientTLS("example.org", ca=authority.ca, certificate=certificate)
    secret_line = key.decode().splitlines()[1]
    for thing in (certificate, role, client, [certificate], str(certificate)):
        assert secret_line not in repr(thing)
        assert "BEGIN" not in repr(thing)
        assert "hunter2" not in repr(thing)
    assert repr(certificate) == "<trisock.Certificate example.org, example.net (EC)>"


def test_no_error_shows_a_damaged_or_misplaced_key(authority: Authority, tmp_path: Path) -> None:
    chain, key = (each.decode() for each in pems(authority, "example.org"))
    good = Certificate(chain, key)
    damaged = key.replace(" KEY-----", " KEY", 1)  # the label of the PEM block now includes the key
    (tmp_path / "chain.pem").write_text(chain)
    (tmp_path / "damaged.pem").write_text(damaged + chain)
    for make, words in [
        (lambda: Certificate.from_files(tmp_path / "damaged.pem"), "is not a PEM private key"),
        (lambda: Certificate(chain, damaged + chain), "is not a PEM private key"),
        (lambda: Certificate(chain, key[:90] + "\ud800" + key[91:]), "a block is damaged"),
        (lambda: Certificate(chain, key, key + "\ud800"), "password has characters"),
        (lambda: Certificate.from_files(key), "chain must be a path"),
        (lambda: Certificate.from_files(key.replace("\n", "") * 20), "chain must be a path"),
        (lambda: Certificate.from_files(tmp_path / "chain.pem", key), "private_key must be a path"),
        (lambda: ClientTLS("x", ca=key.encode() + b"\xff"), "ca holds no PEM certificate"),
        (lambda: ClientTLS("x", ca=key + "\udcff"), "ca holds no PEM certificate"),
        (lambda: ClientTLS("x", certificate=key), "not a str"),  # type: ignore[arg-type]
        (lambda: ClientTLS("x", alpn_protocols=[key]), "1 to 255 printable"),
        (lambda: ClientTLS("x", alpn_protocols=[key.encode()]), "not a bytes"),  # type: ignore[list-item]
        (lambda: ServerTLS(good, alpn_protocols=[key[:40] + "\n"]), "1 to 255 printable"),
        (lambda: ServerTLS({key: chain}), "it lacks .* and it has other fields"),  # type: ignore[dict-item]
        (lambda: ServerTLS({"chain": key, "private_key": key}), "chain is not a PEM certificate"),
        (
            lambda: ServerTLS({"chain": chain.encode() + b"\xff", "private_key": key[:-40]}),
            "a block is damaged",
        ),
        (lambda: ServerTLS(key), "not a str"),
    ]:
        with pytest.raises((ValueError, TypeError), match=words) as caught:
            make()
        shown = "".join(traceback.format_exception(caught.value))
        shown += repr(caught.value) + repr(caught.value.__cause__) + repr(vars(caught.value))
        assert not any(line in shown for line in key.splitlines()[1:-1])


@pytest.mark.parametrize("memory", [True, False])
def test_a_key_is_never_readable_by_other_users(
    memory: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
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
                assert set(modes) == {0o600}  # even while the file was being created
    finally:
        os.umask(old)
    assert not os.path.exists(path)
    assert not list(tmp_path.iterdir())


def test_openssl_does_not_prompt_for_a_missing_password(authority: Authority) -> None:
    """By default, OpenSSL prompts on the terminal for a missing password."""
    chain, key = pems(authority, "example.org")
    certificate = Certificate(chain, encrypted(key, b"secret"), "secret")
    object.__setattr__(certificate, "_password", None)
    with pytest.raises(ValueError, match="OpenSSL does not accept the certificate"):
        certificate.load_into(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))


# ---- without /proc and memfd ----

CHROOT = """
import os, sys
from trisock import Certificate, ServerTLS
certificate = Certificate.from_files(sys.argv[1])
if sys.argv[2] == "chroot":
    os.chroot(sys.argv[3])
    os.chdir("/")
else:
    def refused(*_):
        raise PermissionError(1, "seccomp")
    os.memfd_create = refused
    os.environ["TMPDIR"] = sys.argv[3]
print(ServerTLS([certificate]).certificates == (certificate,))
print(os.listdir("/tmp" if sys.argv[2] == "chroot" else sys.argv[3]))
"""


@pytest.mark.parametrize("how", ["chroot", "seccomp"])
@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="chroot needs root")
def test_certificates_work_without_proc_and_memfd(
    how: str, authority: Authority, tmp_path: Path
) -> None:
    good = authority.certificate("example.org")
    (tmp_path / "both.pem").write_bytes(good._chain + good._private_key)
    (tmp_path / "root" / "tmp").mkdir(parents=True)
    root = tmp_path / "root" if how == "chroot" else tmp_path / "root" / "tmp"
    command = [sys.executable, "-c", CHROOT, str(tmp_path / "both.pem"), how, str(root)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ran.stdout.splitlines() == ["True", "[]"], ran.stderr


def test_certificates_work_if_proc_cannot_be_opened(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def without_proc(path: str, flags: int, *args: int) -> int:
        if str(path).startswith("/proc"):
            raise FileNotFoundError(path)
        return real(path, flags, *args)

    monkeypatch.setattr(loading.os, "open", without_proc)
    # We create no ServerTLS: an earlier test may have cached the context of an equal role.
    certificate = authority.certificate("localhost")
    certificate.load_into(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))


def test_an_error_says_that_no_file_can_be_created(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(1, "refused")

    monkeypatch.setattr(os, "memfd_create", refused)
    monkeypatch.setattr("tempfile.mkstemp", refused)
    with pytest.raises(PermissionError, match=r"OpenSSL reads certificates from files .* refused"):
        authority.certificate("example.org").load_into(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
