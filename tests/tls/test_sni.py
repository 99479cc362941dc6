"""What a client asks for by SNI, and what its server makes of it."""

from __future__ import annotations

import contextlib
import ssl
import sys

import pytest
import trio

from helpers.authority import Authority
from helpers.client_hellos import hello_for, in_records, records_of
from helpers.flights import certificate_in, flight_for
from helpers.pairs import closing, tcp_pair
from helpers.raw_tls import visit
from helpers.sni import names_of, trusting
from trisock import ServerTLS, TLSError, TLSInfo


@pytest.fixture
def unraisable(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What Python could not raise anywhere, and has printed."""
    seen: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", seen.append)
    return seen


def padded(hello: bytes, size: int) -> bytes:
    """Return the message of a hello with an extension more, of so many bytes."""
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
    """Return the message of a hello with as much in every field as fits: 131,396 bytes."""
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


async def asked_for(server_tls: object, name: str, context: ssl.SSLContext) -> TLSInfo:
    """Return what a server knows of a client that asks for a name."""
    a, b = await tcp_pair()
    async with closing(a, b), trio.open_nursery() as nursery:
        nursery.start_soon(lambda: a.starttls(context, server_hostname=name))
        return await b.starttls(server_tls)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name", [b"\xff\xfe", "b\xfccher.example".encode(), b"x\ny\x1bz", b"127.0.0.1", b"a..b", b"::1"]
)
async def test_what_is_no_name_gets_the_first_certificate(
    name: bytes, authority: Authority, unraisable: list[object], capfd: pytest.CaptureFixture[str]
) -> None:
    certificates = [authority.issue("first.example"), authority.issue("second.example")]
    flight, _ = await flight_for(ServerTLS(certificates), hello_for(name))
    first = ssl.PEM_cert_to_DER_cert(certificates[0]._chain.decode())
    assert certificate_in(flight) == first
    assert not unraisable
    assert not any(capfd.readouterr())


async def test_the_longest_hello_gets_the_certificate_it_asks_for(authority: Authority) -> None:
    certificates = [authority.issue("first.example"), authority.issue("second.example")]
    message = longest(hello_for(b"second.example"))
    assert len(message) == 4 + 131396
    flight, _ = await flight_for(ServerTLS(certificates), in_records(message, 16384))
    second = ssl.PEM_cert_to_DER_cert(certificates[1]._chain.decode())
    assert certificate_in(flight) == second


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
@pytest.mark.parametrize("own_context", [True, False])
async def test_server_hostname_is_what_was_on_the_wire(
    own_context: bool, version: str, authority: Authority
) -> None:
    certificate = authority.issue("example.org")
    role: object = ServerTLS([authority.issue("first.example"), certificate])
    if own_context:
        role = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        certificate.load_into(role)
    context = trusting(authority)
    context.maximum_version = ssl.TLSVersion[version]
    for name, shown in [
        ("Example.ORG", "Example.ORG"),
        ("my_service.example", "my_service.example"),
        ("127.0.0.1", None),  # OpenSSL sends no address
    ]:
        info = await asked_for(role, name, context)
        assert info.server_hostname == shown


async def test_a_resumed_session_says_what_this_connection_asked_for(authority: Authority) -> None:
    role = ServerTLS(authority.issue("a.example", "b.example"))
    context = trusting(authority)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    session = None
    for name in ("a.example", "b.example"):
        info, session = await visit(role, context, name, session)
        assert isinstance(info, TLSInfo)
        assert info.server_hostname == name
        assert info.session_reused == (name == "b.example")


async def test_an_sni_callback_of_the_users_goes_on_working(authority: Authority) -> None:
    asked = []
    first, second = (ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER) for _ in range(2))
    authority.issue("first.example").load_into(first)
    authority.issue("second.example").load_into(second)

    def choose(ssl_object: ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> None:
        asked.append(name)
        ssl_object.context = second

    first.sni_callback = choose
    a, b = await tcp_pair()
    async with closing(a, b), trio.open_nursery() as nursery:
        nursery.start_soon(b.starttls, first)
        info = await a.starttls(trusting(authority), server_hostname="second.example")
    assert names_of(info) == ["second.example"]
    assert asked == ["second.example"]


@pytest.mark.parametrize("size", [1, 100, 16384])
async def test_a_hello_may_span_several_records(size: int, authority: Authority) -> None:
    certificates = [authority.issue("first.example"), authority.issue("second.example")]
    message = padded(hello_for(b"second.example"), 20_000 if size > 1 else 1)
    flight, _ = await flight_for(ServerTLS(certificates), in_records(message, size))
    assert certificate_in(flight) == ssl.PEM_cert_to_DER_cert(certificates[1]._chain.decode())


@pytest.mark.parametrize(
    "wire",
    [
        in_records(b"\x01\xff\xff\xff" + bytes(100_000), 16384),  # 16 MiB are announced
        b"\x16\x03\x01\0\0" * 100_000,  # records without data
        in_records(b"\x01\0\0\x05hello", 16384),
        hello_for(b"second.example\0"),
        hello_for(b"a" * 300),
        b"\x15\x03\x01\0\x02\x02\x28",  # an alert
        b"GET / HTTP/1.1\r\n\r\n",
    ],
)
async def test_openssl_refuses_a_hello_that_is_none(wire: bytes, server_tls: ServerTLS) -> None:
    with contextlib.suppress(ConnectionError):  # it may be gone before all was sent
        flight, failure = await flight_for(server_tls, wire)
        assert isinstance(failure, TLSError)
        assert "closed the connection" not in str(failure)
        assert not flight or records_of(flight)[0][0] == 21
