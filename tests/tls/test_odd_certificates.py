"""Certificates, keys and PEM that are odd: taken in every role, or refused as a ValueError."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import datetime
import gc
import ipaddress
import os
import pickle
import ssl
import subprocess
import sys
import traceback
import warnings
import weakref
from pathlib import Path

import pytest
import trio
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import dsa, ec

from helpers.authority import Authority
from helpers.certificates import CertificateAuthority, der
from helpers.client_hellos import hello_for, records_of
from helpers.flights import flight_for
from helpers.odd_certificates import BAD_CHAINS, KEY, NAME, SERIAL_0, self_signed
from helpers.pairs import closing, tcp_pair
from helpers.pem import encrypted, pems
from helpers.sni import names_of, shown, trusting
from trisock import Certificate, ClientTLS, ServerTLS, TLSInfo
from trisock._tls.info import new_tls_info

KEY_PEM = KEY.private_bytes(
    serialization.Encoding.PEM,
    serialization.PrivateFormat.PKCS8,
    serialization.NoEncryption(),
)


def pem_of(content: bytes) -> bytes:
    return ssl.DER_cert_to_PEM_cert(content).encode()


async def chain_shown(certificate: Certificate) -> list[bytes]:
    """Return the certificates (DER) that a server sends in a handshake of TLS 1.2."""
    flight, _ = await flight_for(ServerTLS(certificate), hello_for(b"example.org"))
    messages = b"".join(record[5:] for record in records_of(flight) if record[0] == 22)
    while messages[0] != 11:
        messages = messages[4 + int.from_bytes(messages[1:4], "big") :]
    rest = messages[7 : 7 + int.from_bytes(messages[4:7], "big")]
    ders = []
    while rest:
        size = int.from_bytes(rest[:3], "big")
        ders.append(rest[3 : 3 + size])
        rest = rest[3 + size :]
    return ders


# ---- PEM ----

AROUND = {
    "umlauts in UTF-8": "# Zürich\n".encode(),
    "umlauts in Latin-1": "# Zürich\n".encode("latin-1"),
    "a byte order mark": b"\xef\xbb\xbf",
    "stray bytes": b"\0\xff\xfe\n",
    "a commented-out block": b"# -----BEGIN CERTIFICATE-----\n# MII\n# -----END CERTIFICATE-----\n",
    "another block": b"-----BEGIN DH PARAMETERS-----\nAAAA\n-----END DH PARAMETERS-----\n",
}


@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
async def test_what_lies_outside_the_blocks_does_not_matter(
    around: bytes, authority: Authority
) -> None:
    chain, key = pems(authority, "example.org")
    ca = around + authority.pem + around + authority.pem + around
    odd = Certificate(around + chain + around, around + key + around)
    assert odd == Certificate(chain, key)
    info = await shown(ServerTLS(odd, client_ca=ca), "example.org", trusting(authority))
    assert names_of(info) == ["example.org"]
    client = ClientTLS("example.org", ca=ca, certificate=odd)
    assert client == ClientTLS("example.org", ca=authority.pem, certificate=odd)
    a, b = await tcp_pair()
    async with closing(a, b), trio.open_nursery() as nursery:
        nursery.start_soon(b.starttls, odd)
        await a.starttls(client)


@pytest.mark.parametrize("ends", [b"\r\n", b"\r", b"\n\n", b" \n"])
def test_line_ends_do_not_matter(ends: bytes, authority: Authority) -> None:
    chain, key = pems(authority, "example.org")
    plain = Certificate(chain, encrypted(key, b"secret"), "secret")
    odd = Certificate(
        chain.replace(b"\n", ends), encrypted(key, b"secret").replace(b"\n", ends), "secret"
    )
    assert odd.names == plain.names
    assert ServerTLS(odd)
    assert ClientTLS("example.org", ca=authority.pem.replace(b"\n", ends))


async def test_each_certificate_is_sent_once(tmp_path: Path) -> None:
    root = CertificateAuthority("root")
    good = CertificateAuthority("between", issuer=root).issue("example.org")
    both = tmp_path / "both.pem"
    for parts in (
        [good._private_key, good._chain],
        [good._chain, good._private_key],
        [good._chain, good._chain, good._private_key],
    ):
        both.write_bytes(b"".join(parts))
        sent = await chain_shown(Certificate.from_files(both))
        assert len(sent) == 2
        assert len(set(sent)) == 2


def test_a_traditional_encrypted_key_is_taken(authority: Authority) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    secret = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.TraditionalOpenSSL,
        serialization.BestAvailableEncryption(b"secret"),
    )
    assert b"DEK-Info" in secret
    now = datetime.datetime.now(datetime.timezone.utc)
    day = datetime.timedelta(1)
    builder = x509.CertificateBuilder(NAME, NAME, key.public_key(), 1, now, now + day)
    chain = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    for text in (secret, secret.replace(b"\n", b"\r\n"), b"\xef\xbb\xbf" + secret):
        assert ServerTLS(Certificate(chain, text, "secret"))


# ---- what cannot be used ----


@pytest.mark.parametrize("bad", BAD_CHAINS.values(), ids=BAD_CHAINS)
def test_a_bad_certificate_is_a_value_error(bad: bytes) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=r"^chain") as caught:
            Certificate(pem_of(bad), KEY_PEM)
    assert type(caught.value) is ValueError


def test_a_warning_of_cryptography_is_a_value_error_at_most() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with contextlib.suppress(ValueError):
            assert Certificate(pem_of(SERIAL_0), KEY_PEM).names


@pytest.mark.needs("openssl")
def test_a_key_that_cannot_be_used_is_a_value_error(tmp_path: Path) -> None:
    key, chain = tmp_path / "key.pem", tmp_path / "chain.pem"
    command = ["openssl", "req", "-x509", "-nodes", "-subj", "/CN=example.org", "-days", "2"]
    command += ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:SM2", "-sha256"]
    subprocess.run([*command, "-keyout", key, "-out", chain], check=True, capture_output=True)
    with pytest.raises(ValueError, match=r"^(chain|private_key)") as caught:
        Certificate.from_files(chain, key)
    assert type(caught.value) is ValueError


@pytest.mark.parametrize("bad", [*BAD_CHAINS.values(), SERIAL_0], ids=[*BAD_CHAINS, "serial 0"])
def test_a_binding_to_an_odd_certificate_is_bytes_or_a_value_error(bad: bytes) -> None:
    info = new_tls_info(
        TLSInfo("TLSv1.3", "x", None, None, bad, False), tls_unique=None, server_certificate=bad
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            binding = info.channel_binding("tls-server-end-point")
        except ValueError as exc:
            binding = b""
            text = f"{type(exc).__name__}: {exc}"
        else:
            text = ""
    assert len(binding) == 32 or text.startswith("ValueError: tls-server-end-point is not defined")


def test_no_error_shows_a_key_in_the_wrong_place(authority: Authority, tmp_path: Path) -> None:
    chain, key_pem = pems(authority, "example.org")
    key = key_pem.decode()
    good = Certificate(chain, key)
    for make in (
        lambda: Certificate.from_files(key),
        lambda: Certificate.from_files(tmp_path / "chain.pem", key),
        lambda: Certificate.from_files(key.replace("\n", "") * 20),
        lambda: ClientTLS("x", alpn_protocols=[key]),
        lambda: ClientTLS("x", alpn_protocols=[key.encode()]),  # type: ignore[list-item]
        lambda: ServerTLS(good, alpn_protocols=[key[:40] + "\n"]),
        lambda: ServerTLS({key: chain}),  # type: ignore[dict-item]
        lambda: ServerTLS({"chain": key, "private_key": key}),
        lambda: ServerTLS({"chain": chain + b"\xff", "private_key": key[:-40]}),
        lambda: ServerTLS(key),
        lambda: ClientTLS("x", ca=key + "\udcff"),
        lambda: ClientTLS("x", certificate=key),  # type: ignore[arg-type]
        lambda: Certificate(chain, key[:90] + "\ud800" + key[91:]),
        lambda: Certificate(chain, key, key + "\ud800"),
    ):
        (tmp_path / "chain.pem").write_bytes(chain)
        with pytest.raises((ValueError, TypeError, OSError)) as caught:
            make()
        told = "".join(traceback.format_exception(caught.value)) + repr(caught.value)
        told += repr(vars(caught.value)) + repr(getattr(caught.value, "filename", None))
        assert not any(line in told for line in key.splitlines()[1:-1])


@pytest.mark.parametrize("protocol", ["imap\n", "\x7f", "\0", "a\tb", "h2\r"])
def test_alpn_has_no_control_characters(protocol: str) -> None:
    with pytest.raises(ValueError, match="printable") as caught:
        ClientTLS("x", alpn_protocols=["imap", protocol])
    assert repr(protocol) not in str(caught.value)


# ---- which certificate ----


def test_the_common_name_counts_where_no_dns_name_is() -> None:
    addresses = [x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    chain = pem_of(self_signed(x509.SubjectAlternativeName(addresses)))
    assert Certificate(chain, KEY_PEM).names == ("example.org",)


@pytest.mark.needs("openssl")
async def test_rsa_and_rsa_pss_serve_one_name_together(tmp_path: Path) -> None:
    made = []
    for kind in ("rsa", "rsa-pss"):
        key, chain = tmp_path / f"{kind}.key", tmp_path / f"{kind}.pem"
        command = ["openssl", "req", "-x509", "-nodes", "-subj", "/CN=example.org", "-days", "2"]
        command += ["-newkey", kind, "-pkeyopt", "rsa_keygen_bits:2048"]
        subprocess.run([*command, "-keyout", key, "-out", chain], check=True, capture_output=True)
        made.append(Certificate.from_files(chain, key))
    assert [each.key_kind for each in made] == ["RSA", "RSA-PSS"]
    seen = set()
    for first, second in (made, made[::-1]):
        a, b = await tcp_pair()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        async with closing(a, b), trio.open_nursery() as nursery:
            nursery.start_soon(b.starttls, [first, second])
            seen.add((await a.starttls(context, server_hostname="example.org")).peer_certificate)
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        a, b = await tcp_pair()
        async with closing(a, b), trio.open_nursery() as nursery:
            nursery.start_soon(b.starttls, [first, second])
            await a.starttls(old, server_hostname="example.org")
    assert None not in seen


async def test_a_wildcard_serves_the_kinds_that_the_exact_name_lacks(authority: Authority) -> None:
    exact = authority.issue("www.example.org", key_type=trustme.KeyType.ECDSA)
    wild = authority.issue("*.example.org", key_type=trustme.KeyType.RSA)
    first = authority.issue("first.example")
    for cipher, names in [("RSA", "*.example.org"), ("ECDSA", "www.example.org")]:
        context = trusting(authority)
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.set_ciphers(f"ECDHE-{cipher}-AES128-GCM-SHA256")
        info = await shown([first, exact, wild], "www.example.org", context)
        assert names_of(info) == [names]


# ---- whom ca trusts ----


async def test_an_intermediate_or_a_leaf_may_be_the_anchor() -> None:
    root = CertificateAuthority("root")
    between = CertificateAuthority("between", issuer=root)
    good = between.issue("example.org")
    leaf = pem_of(der(good))
    for anchor in (root.pem, between.pem, leaf):
        a, b = await tcp_pair()
        async with closing(a, b), trio.open_nursery() as nursery:
            role = ServerTLS(good, client_ca=anchor, require_client_certificate=True)
            nursery.start_soon(b.starttls, role)
            await a.starttls(ClientTLS("example.org", ca=anchor, certificate=good))
            await a.send(b"x")


def test_the_flags_do_not_depend_on_the_version_of_python(authority: Authority) -> None:
    for context in (
        ClientTLS("x", ca=authority.pem)._context(),
        ServerTLS(authority.issue("example.org"), client_ca=authority.pem)._context(),
    ):
        assert context.verify_flags & ssl.VERIFY_X509_PARTIAL_CHAIN
        assert not context.verify_flags & ssl.VERIFY_X509_STRICT
    assert ClientTLS("x")._context().verify_flags == ssl.create_default_context().verify_flags


# ---- without /proc ----

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
    good = authority.issue("example.org")
    (tmp_path / "both.pem").write_bytes(good._chain + good._private_key)
    (tmp_path / "root" / "tmp").mkdir(parents=True)
    root = tmp_path / "root" if how == "chroot" else tmp_path / "root" / "tmp"
    command = [sys.executable, "-c", CHROOT, str(tmp_path / "both.pem"), how, str(root)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ran.stdout.splitlines() == ["True", "[]"], ran.stderr


def test_an_error_says_that_no_file_can_be_made(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(1, "refused")

    monkeypatch.setattr(os, "memfd_create", refused)
    monkeypatch.setattr("tempfile.mkstemp", refused)
    with pytest.raises(PermissionError, match=r"OpenSSL reads certificates from files .* refused"):
        authority.issue("example.org").load_into(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))


# ---- copies ----


def test_roles_can_be_copied_and_show_no_key_in_a_pickle(authority: Authority) -> None:
    good = authority.issue("example.org")
    client = ClientTLS("example.org", ca=authority.pem, alpn_protocols=["imap"])
    server = ServerTLS(good, client_ca=authority.pem)
    for role in (client, server, ClientTLS("example.org", certificate=good), good):
        for twin in (copy.copy(role), copy.deepcopy(role)):
            assert twin == role
            assert hash(twin) == hash(role)
    assert pickle.loads(pickle.dumps(client)) == client
    assert pickle.loads(pickle.dumps(client))._context() is client._context()
    for secret in (good, server, ClientTLS("example.org", certificate=good), [good]):
        with pytest.raises(TypeError, match="private key"):
            pickle.dumps(secret)
    assert dataclasses.asdict(client) == {
        "server_hostname": "example.org",
        "ca": client.ca,
        "alpn_protocols": ("imap",),
        "certificate": None,
        "verify": True,
    }
    assert dataclasses.asdict(server)["certificates"] == (good,)
    assert dataclasses.replace(client, verify=False).verify is False


async def test_what_was_agreed_on_can_be_copied_and_pickled(authority: Authority) -> None:
    info = await shown([authority.issue("example.org")], "example.org", trusting(authority))
    assert pickle.loads(pickle.dumps(info)) == copy.deepcopy(info) == info


# ---- the cache of sessions ----


async def test_ended_connections_leave_few_sessions(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients of TLS 1.2 that take no tickets. OpenSSL counts the sessions of each context."""
    contexts: weakref.WeakSet[ssl.SSLContext] = weakref.WeakSet()
    real = ssl.SSLContext.wrap_bio

    def noted(self: ssl.SSLContext, *args: object, **options: object) -> ssl.SSLObject:
        if options.get("server_side"):
            contexts.add(self)
        return real(self, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(ssl.SSLContext, "wrap_bio", noted)
    context = trusting(authority)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_TICKET
    role = ServerTLS([authority.issue("example.org"), authority.issue("second.example")])
    for number in range(100):
        a, b = await tcp_pair()
        name = ("example.org", "second.example")[number % 2]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(b.starttls, role)
            await a.starttls(context, server_hostname=name)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.close)
            nursery.start_soon(b.close)
    gc.collect()
    assert sum(each.session_stats()["number"] for each in contexts) <= 16


@pytest.mark.parametrize("unset", [None, 0, "", "no", ()])
def test_a_security_option_is_a_bool_or_a_type_error(authority: Authority, unset: object) -> None:
    certificate = authority.issue("localhost")
    with pytest.raises(TypeError, match="verify is True or False"):
        ClientTLS("localhost", verify=unset)  # type: ignore[arg-type]
    for name in ("require_alpn", "require_client_certificate"):
        with pytest.raises(TypeError, match=f"{name} is True or False"):
            ServerTLS(certificate, **{name: unset})  # type: ignore[arg-type]


def test_a_certificate_cannot_be_changed(authority: Authority) -> None:
    certificate = authority.issue("localhost")
    with pytest.raises(AttributeError, match="cannot be changed"):
        certificate.names = ("another.example",)
    with pytest.raises(AttributeError, match="cannot be changed"):
        del certificate.names
    with pytest.raises(TypeError, match=r"an ssl\.SSLContext"):
        certificate.load_into(None)  # type: ignore[arg-type]


def test_a_key_of_a_kind_that_tls_does_not_have_is_refused() -> None:
    key = dsa.generate_private_key(2048)
    chain = pem_of(self_signed(key=key))
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    with pytest.raises(ValueError, match="private_key is of a type that TLS does not support"):
        Certificate(chain, pem)
