"""SNI: how a server reads the requested name, and which certificate it selects."""

from __future__ import annotations

import contextlib
import ssl
import subprocess
import sys
from pathlib import Path

import pytest
import trio
from cryptography import x509

from helpers.authority import rsa_certificate
from helpers.certificates import der
from helpers.client_hellos import hello_for, in_records, records_of
from helpers.flights import certificate_in, flight_for
from helpers.pairs import closing
from helpers.raw_tls import raw_client_context, visit
from helpers.sni import client_info, names_of, trusting
from trisock import Certificate, ServerTLS, TLSError, TLSInfo
from trisock._tls import roles
from trisock.testing import Authority, socket_pair


@pytest.fixture
def unraisable(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Collects unraisable exceptions, which ``sys.unraisablehook`` would otherwise print."""
    seen: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", seen.append)
    return seen


def padded(hello: bytes, size: int) -> bytes:
    """Return a ClientHello message with an additional extension of ``size`` bytes."""
    body = bytearray(hello[9:])
    at = 34
    at += 1 + body[at]
    at += 2 + int.from_bytes(body[at : at + 2], "big")
    at += 1 + body[at]
    extension = b"\xfa\xfa" + size.to_bytes(2, "big") + bytes(size)
    listed = int.from_bytes(body[at : at + 2], "big") + len(extension)
    body[at : at + 2] = listed.to_bytes(2, "big")
    body += extension
    return b"\x01" + len(body).to_bytes(3, "big") + body


def longest(hello: bytes) -> bytes:
    """Return a ClientHello message of the maximum size: its fields have 131,396 bytes in total."""
    body = hello[9:]
    at = 35 + body[34]
    ciphers_size = int.from_bytes(body[at : at + 2], "big")
    ciphers = body[at + 2 : at + 2 + ciphers_size]
    extensions = body[at + 2 + ciphers_size + 2 + 2 :]
    filler = 65535 - len(extensions) - 4
    longer = (
        body[:34]
        + bytes([32])
        + bytes(32)
        + (65534).to_bytes(2, "big")
        + ciphers.ljust(65534, b"\x0a")
        + bytes([255])
        + bytes(255)
        + (65535).to_bytes(2, "big")
        + extensions
        + b"\xfa\xfa"
        + filler.to_bytes(2, "big")
        + bytes(filler)
    )
    return b"\x01" + len(longer).to_bytes(3, "big") + longer


async def server_info(server_tls: object, name: str, context: ssl.SSLContext) -> TLSInfo:
    """Return the server's TLSInfo after a handshake with a client that requests ``name``."""
    a, b = await socket_pair()
    async with closing(a, b), trio.open_nursery() as nursery:
        nursery.start_soon(lambda: a.starttls(context, server_hostname=name))
        return await b.starttls(server_tls)  # type: ignore[arg-type]


@pytest.fixture
def two_certificates(authority: Authority) -> list[Certificate]:
    return [authority.certificate("first.example"), authority.certificate("second.example")]


# ---- the selected certificate ----


async def test_sni_selects_the_certificate(authority: Authority) -> None:
    certificates = [
        authority.certificate("first.example"),
        authority.certificate("second.example", "*.wild.example"),
        authority.certificate("third.example", "exact.wild.example"),
        authority.certificate("*.only-wild.example"),
    ]
    context = trusting(authority)
    for name, expected in [
        ("first.example", "first.example"),
        ("second.example", "second.example"),
        ("SECOND.example", "second.example"),
        ("any.wild.example", "second.example"),
        ("exact.wild.example", "third.example"),
        ("any.only-wild.example", "*.only-wild.example"),
        ("deep.any.wild.example", "first.example"),  # no certificate matches
        ("unknown.example", "first.example"),
        ("127.0.0.1", "first.example"),  # no SNI for an address
    ]:
        info = await client_info(certificates, name, context)
        assert names_of(info)[0] == expected


async def test_a_certificate_selected_by_a_wildcard_is_verified(authority: Authority) -> None:
    certificates = [
        authority.certificate("first.example"),
        authority.certificate("*.only-wild.example"),
    ]
    await client_info(certificates, "any.only-wild.example", raw_client_context(authority))


def tls_1_2_context(authority: Authority, key_kind: str) -> ssl.SSLContext:
    """Return the context of a TLS 1.2 client that accepts only keys of one kind."""
    context = trusting(authority)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(f"ECDHE-{key_kind}-AES128-GCM-SHA256")
    return context


@pytest.mark.parametrize(
    ("position", "requested"),
    [(0, "several.example"), (1, "several.example"), (0, "unknown.example")],
)
async def test_a_name_can_have_certificates_of_several_key_kinds(
    position: int, requested: str, authority: Authority
) -> None:
    name = "several.example"
    certificates = [
        rsa_certificate(authority, name),
        authority.certificate(name),
    ]
    if position:  # the default certificate has another name, so the server has to use SNI
        certificates.insert(0, authority.certificate("first.example"))
    for key_kind, key_class in [("RSA", "RSA"), ("ECDSA", "EC")]:
        info = await client_info(certificates, requested, tls_1_2_context(authority, key_kind))
        assert info.peer_certificate is not None
        key = x509.load_der_x509_certificate(info.peer_certificate).public_key()
        assert key_class in type(key).__name__
        assert names_of(info) == [name]


async def test_a_wildcard_certificate_supplies_a_missing_key_kind(
    authority: Authority,
) -> None:
    exact = authority.certificate("www.example.org")
    wild = rsa_certificate(authority, "*.example.org")
    first = authority.certificate("first.example")
    for key_kind, name in [("RSA", "*.example.org"), ("ECDSA", "www.example.org")]:
        context = tls_1_2_context(authority, key_kind)
        info = await client_info([first, exact, wild], "www.example.org", context)
        assert names_of(info) == [name]


@pytest.mark.needs("openssl")
async def test_one_name_can_have_rsa_and_rsa_pss_certificates(
    authority: Authority, tmp_path: Path
) -> None:
    key, chain = tmp_path / "key.pem", tmp_path / "chain.pem"
    command = ["openssl", "req", "-x509", "-nodes", "-subj", "/CN=example.org", "-days", "2"]
    command += ["-newkey", "rsa-pss", "-pkeyopt", "rsa_keygen_bits:2048"]
    subprocess.run([*command, "-keyout", key, "-out", chain], check=True, capture_output=True)
    certificates = [
        rsa_certificate(authority, "example.org"),
        Certificate.from_files(chain, key),
    ]
    assert [each.key_kind for each in certificates] == ["RSA", "RSA-PSS"]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    for order in (certificates, certificates[::-1]):
        info = await client_info(order, "example.org", context)
        assert info.peer_certificate is not None
        await client_info(order, "example.org", old)


def test_the_shared_context_is_used_if_descriptors_run_out(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    role = roles.resolve_role(
        authority.server_tls("localhost"),
        server_hostname=None,
        connected_host=None,
        side="server",
    )
    assert role.sni_contexts is not None

    def broken(chosen: object) -> ssl.SSLContext:
        raise OSError(24, "too many open files")

    monkeypatch.setattr(role.sni_contexts.contexts, "_build", broken)
    shared = role.sni_contexts.choose("localhost", supports_tickets=True)
    assert role.sni_contexts.choose("localhost", supports_tickets=False) is shared


# ---- the ClientHello ----


@pytest.mark.parametrize(
    "name", [b"\xff\xfe", "b\xfccher.example".encode(), b"x\ny\x1bz", b"127.0.0.1", b"a..b", b"::1"]
)
async def test_a_request_for_an_invalid_name_gets_the_first_certificate(
    name: bytes,
    two_certificates: list[Certificate],
    unraisable: list[object],
    capfd: pytest.CaptureFixture[str],
) -> None:
    flight, _ = await flight_for(ServerTLS(two_certificates), hello_for(name))
    assert certificate_in(flight) == der(two_certificates[0])
    assert not unraisable
    assert not any(capfd.readouterr())


async def test_the_longest_hello_gets_the_requested_certificate(
    two_certificates: list[Certificate],
) -> None:
    message = longest(hello_for(b"second.example"))
    assert len(message) == 4 + 131396
    flight, _ = await flight_for(ServerTLS(two_certificates), in_records(message, 16384))
    assert certificate_in(flight) == der(two_certificates[1])


@pytest.mark.parametrize("size", [1, 100, 16384])
async def test_a_hello_can_span_several_records(
    size: int, two_certificates: list[Certificate]
) -> None:
    message = padded(hello_for(b"second.example"), 20_000 if size > 1 else 1)
    flight, _ = await flight_for(ServerTLS(two_certificates), in_records(message, size))
    assert certificate_in(flight) == der(two_certificates[1])


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
@pytest.mark.parametrize("own_context", [True, False])
async def test_server_hostname_is_the_name_that_the_client_sent(
    own_context: bool, version: str, authority: Authority
) -> None:
    certificate = authority.certificate("example.org")
    role: object = ServerTLS([authority.certificate("first.example"), certificate])
    if own_context:
        role = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        certificate.load_into(role)
    context = trusting(authority)
    context.maximum_version = ssl.TLSVersion[version]
    for name, expected in [
        ("Example.ORG", "Example.ORG"),
        ("my_service.example", "my_service.example"),
        ("127.0.0.1", None),  # OpenSSL sends no SNI for an address
    ]:
        info = await server_info(role, name, context)
        assert info.server_hostname == expected


async def test_a_resumed_session_gets_the_newly_requested_server_hostname(
    authority: Authority,
) -> None:
    role = authority.server_tls("a.example", "b.example")
    context = raw_client_context(authority, "TLSv1_2")
    session = None
    for name in ("a.example", "b.example"):
        info, session = await visit(role, context, name, session)
        assert isinstance(info, TLSInfo)
        assert info.server_hostname == name
        assert info.session_reused == (name == "b.example")


async def test_an_sni_callback_of_the_callers_context_is_called(authority: Authority) -> None:
    requested = []
    first, second = (ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER) for _ in range(2))
    authority.certificate("first.example").load_into(first)
    authority.certificate("second.example").load_into(second)

    def choose(ssl_object: ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> None:
        requested.append(name)
        ssl_object.context = second

    first.sni_callback = choose
    info = await client_info(first, "second.example", trusting(authority))
    assert names_of(info) == ["second.example"]
    assert requested == ["second.example"]


@pytest.mark.parametrize(
    "wire",
    [
        in_records(b"\x01\xff\xff\xff" + bytes(100_000), 16384),  # A length of 16 MiB.
        b"\x16\x03\x01\0\0" * 100_000,  # Records without data.
        in_records(b"\x01\0\0\x05hello", 16384),
        hello_for(b"second.example\0"),
        hello_for(b"a" * 300),
        b"\x15\x03\x01\0\x02\x02\x28",  # an alert
        b"GET / HTTP/1.1\r\n\r\n",
    ],
    ids=["too long", "empty records", "malformed", "NUL in SNI", "long SNI", "alert", "HTTP"],
)
async def test_openssl_refuses_an_invalid_hello(wire: bytes, server_tls: ServerTLS) -> None:
    with contextlib.suppress(ConnectionError):  # the server may close before all bytes are sent
        flight, failure = await flight_for(server_tls, wire)
        assert isinstance(failure, TLSError)
        assert "closed the connection" not in str(failure)
        assert not flight or records_of(flight)[0][0] == 21
