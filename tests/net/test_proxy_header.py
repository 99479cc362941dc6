"""ProxyHeader: its arguments, its properties and its encoding."""

from __future__ import annotations

import dataclasses
import socket
from pathlib import Path
from typing import Any

import pytest
import trio
from proxyprotocol.v2 import ProxyProtocolV2

import trisock
from helpers.pairs import reset
from helpers.proxy_headers import SSL, VALID, binary, refused_by_package, tlv, with_crc
from trisock import Address, ClientTLS, ProxyHeader, ProxySSL, Socket
from trisock._net.proxy_parser import parse_proxy_header

CLIENT, SERVER = Address("192.0.2.1", 50000), Address("198.51.100.2", 443)
CLIENT6, SERVER6 = Address("2001:db8::1", 50000), Address("fe80::2%lo", 443)
PATHS = Address("/run/client", 0), Address("\0abstract", 0)


def parsed(data: bytes) -> ProxyHeader:
    result = parse_proxy_header(data)
    assert result is not None
    assert result[1] == len(data)
    return result[0]


# ---- encoding ----


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    "ends", [(CLIENT, SERVER), (CLIENT6, Address("::", 0)), (CLIENT, Address("::1", 65535))]
)
def test_a_header_has_the_same_fields_after_a_round_trip(
    version: Any, ends: tuple[Address, Address]
) -> None:
    header = ProxyHeader(version=version, source=ends[0], destination=ends[1])
    assert parsed(header.to_bytes()) == header
    assert refused_by_package(header.to_bytes()) is False


def test_version_2_carries_unix_addresses_and_tlvs() -> None:
    header = ProxyHeader(source=PATHS[0], destination=PATHS[1], tlvs=((0xE0, b"own"), (4, b"")))
    assert parsed(header.to_bytes()) == header
    unnamed = ProxyHeader(source=Address("", 0), destination=Address("/" + "x" * 107, 0))
    assert parsed(unnamed.to_bytes()) == unnamed


def test_missing_addresses_are_encoded_as_unknown_or_unspecified() -> None:
    assert ProxyHeader(version=1).to_bytes() == b"PROXY UNKNOWN\r\n"
    assert ProxyHeader().to_bytes() == with_crc(binary(family=0))
    assert ProxyHeader(command="LOCAL").to_bytes() == with_crc(binary(command=0x20, family=0))


def test_version_1_is_a_line_in_the_canonical_form() -> None:
    line = ProxyHeader(version=1, source=CLIENT, destination=SERVER).to_bytes()
    assert line == b"PROXY TCP4 192.0.2.1 198.51.100.2 50000 443\r\n"
    line6 = ProxyHeader(version=1, source=CLIENT6, destination=SERVER6).to_bytes()
    hosts = b"2001:0db8:0000:0000:0000:0000:0000:0001 fe80:0000:0000:0000:0000:0000:0000:0002"
    assert line6 == b"PROXY TCP6 " + hosts + b" 50000 443\r\n"


def test_version_2_ends_with_a_checksum() -> None:
    header = ProxyHeader(source=CLIENT, destination=SERVER, tlvs=((2, b"example.org"),))
    assert header.to_bytes() == with_crc(binary(tlv(2, b"example.org")))
    result = ProxyProtocolV2().unpack(header.to_bytes())
    assert result.tlv.authority == "example.org"
    assert result.tlv.crc32c is not None


def test_the_largest_header_has_4096_bytes() -> None:
    def of_size(size: int) -> ProxyHeader:
        tlvs = ((0xE0, bytes(size - 16 - 12 - 3)),)
        return ProxyHeader(source=CLIENT, destination=SERVER, tlvs=tlvs)

    for size, sent in ((4089, 4096), (4090, 4090), (4096, 4096)):  # a checksum has 7 bytes
        data = of_size(size).to_bytes()
        assert len(data) == sent
        assert parsed(data) == of_size(size)
    with pytest.raises(ValueError, match="at most 4096 bytes, not 4097"):
        of_size(4097)
    with pytest.raises(ValueError, match="at most 4096"):
        ProxyHeader(tlvs=((0xE0, bytes(65535)),) * 2)


# ---- properties ----


def test_the_properties_return_the_values_of_known_tlvs() -> None:
    tlvs = tlv(1, b"h2\xff") + tlv(2, "b\u00fccher".encode()) + tlv(5, bytes(128)) + SSL
    header = parsed(with_crc(binary(tlvs + tlv(0x30, b"blue") + tlv(2, b"second"))))
    assert header.alpn == b"h2\xff"
    assert header.authority == "b\u00fccher"
    assert header.unique_id == bytes(128)
    assert header.netns == "blue"
    ssl = header.ssl
    assert ssl is not None
    assert (ssl.client, ssl.verify, ssl.verified) == (3, 0, True)
    assert (ssl.version, ssl.cn, ssl.cipher) == ("TLSv1.3", "J\u00fcrgen", "TLS_AES_256_GCM_SHA384")
    assert (ssl.sig_alg, ssl.key_alg) == ("ecdsa-with-SHA256", "EC256")
    assert tlv(0x20, ssl.to_bytes()) == SSL


def test_the_properties_are_none_without_tlvs() -> None:
    header = ProxyHeader()
    assert header.alpn is header.authority is header.unique_id is header.netns is None
    assert header.ssl is None
    ssl = ProxySSL(client=1, verify=0)
    assert ssl.version is ssl.cn is ssl.cipher is ssl.sig_alg is ssl.key_alg is None


@pytest.mark.parametrize(
    ("client", "verify", "verified"),
    [(1, 0, False), (1, 1, False), (3, 0, True), (5, 0, True), (7, 0, True), (3, 1, False)],
)
def test_verified_needs_a_certificate(client: int, verify: int, verified: bool) -> None:
    # HAProxy reports success even for a client that has sent no certificate.
    ssl = ProxySSL(client=client, verify=verify)
    assert ssl.verified is verified
    assert ProxyHeader(tlvs=((0x20, ssl.to_bytes()),)).ssl == ssl


def test_headers_are_frozen_hashable_and_take_keywords() -> None:
    header = ProxyHeader(source=CLIENT, destination=SERVER, tlvs=[(4, b"")])  # type: ignore[arg-type]
    assert header.tlvs == ((4, b""),)
    assert len({header, dataclasses.replace(header)}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        header.version = 1  # type: ignore[misc]
    with pytest.raises(TypeError):
        ProxyHeader(2)  # type: ignore[misc]
    assert dataclasses.replace(header, source=SERVER).source == SERVER


# ---- arguments ----


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"version": 3}, "version must be 1 or 2, not 3"),
        ({"version": True}, "version"),
        ({"version": "2"}, "version"),
        ({"command": "local"}, "command must be 'PROXY' or 'LOCAL', not 'local'"),
        ({"command": None}, "command"),
        ({"source": CLIENT}, "go together"),
        ({"destination": CLIENT}, "go together"),
        ({"source": CLIENT, "destination": SERVER, "command": "LOCAL"}, "has no addresses"),
        ({"version": 1, "command": "LOCAL"}, "use version 2"),
        ({"version": 1, "tlvs": ((4, b""),)}, "version 1 has no TLVs"),
        ({"version": 1, "source": PATHS[0], "destination": PATHS[1]}, "no Unix addresses"),
        ({"source": PATHS[0], "destination": SERVER}, "both be Unix addresses"),
        ({"source": Address("localhost", 1), "destination": SERVER}, "IP address, not 'localhost'"),
        ({"source": CLIENT, "destination": Address("1.2.3.4", 65536)}, "0-65535"),
        ({"source": Address("/" + "x" * 108, 0), "destination": PATHS[0]}, "Unix socket"),
        ({"source": Address("/a\0b", 0), "destination": PATHS[0]}, "Unix socket"),
        ({"tlvs": ((3, bytes(4)),)}, "which to_bytes computes"),
        ({"tlvs": ((256, b""),)}, "in 0-255, not 256"),
        ({"tlvs": ((-1, b""),)}, "in 0-255"),
        ({"tlvs": ((0xE0, bytes(65536)),)}, "at most 65535 bytes"),
        ({"tlvs": ((2, b"\xff"),)}, "not utf-8"),
        ({"tlvs": ((5, bytes(129)),)}, "at most 128 bytes"),
        ({"tlvs": ((0x20, b""),)}, "too short"),
        ({"tlvs": ((0x30, b"\xff"),)}, "not ascii"),
    ],
)
def test_a_header_that_cannot_be_sent_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProxyHeader(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"source": ("192.0.2.1", 5), "destination": SERVER},
        {"source": "192.0.2.1", "destination": SERVER},
        {"source": CLIENT, "destination": Address("192.0.2.1", "5")},  # type: ignore[arg-type]
        {"source": CLIENT, "destination": Address(5, 5)},  # type: ignore[arg-type]
        {"tlvs": b"\4\0\0"},
        {"tlvs": {4: b""}},
        {"tlvs": (4,)},
        {"tlvs": ((4, "text"),)},
        {"tlvs": ((4, bytearray()),)},
        {"tlvs": ((True, b""),)},
        {"tlvs": ((4, b"", b""),)},
        {"tlvs": ([4, b""],)},
    ],
)
def test_fields_of_a_wrong_type_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        ProxyHeader(**fields)


@pytest.mark.parametrize("fields", [{"client": 256}, {"verify": -1}, {"verify": 1 << 32}])
def test_proxy_ssl_checks_its_numbers(fields: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be in 0-"):
        ProxySSL(**{"client": 1, "verify": 0, **fields})


# ---- connect ----


async def sent_first(listening: socket.socket, client: Socket) -> bytes:
    accepted, _ = listening.accept()
    with accepted:
        await client.send(b"then")
        await client.send_eof()
        received = b""
        while chunk := accepted.recv(4096):
            received += chunk
        return received


HEADER = ProxyHeader(source=CLIENT, destination=SERVER)


async def test_connect_sends_the_header_first(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        async with await trisock.connect("127.0.0.1", port, proxy_header=HEADER) as client:
            assert await sent_first(listening, client) == HEADER.to_bytes() + b"then"
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        async with await trisock.connect_unix(path, proxy_header=HEADER) as client:
            assert await sent_first(listening, client) == HEADER.to_bytes() + b"then"


async def test_connect_sends_the_header_before_tls(client_tls: ClientTLS) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connect_until_refused, port, client_tls)
            await trio.lowlevel.wait_readable(listening)
            accepted, _ = listening.accept()
            with accepted:
                await trio.lowlevel.wait_readable(accepted)
                size = len(HEADER.to_bytes())
                assert accepted.recv(size) == HEADER.to_bytes()
                await trio.lowlevel.wait_readable(accepted)
                assert accepted.recv(3) == b"\x16\x03\x01"


async def connect_until_refused(port: int, tls: ClientTLS) -> None:
    with pytest.raises(trisock.TLSError):
        await trisock.connect("127.0.0.1", port, proxy_header=HEADER, tls=tls)


async def test_connect_leaves_nothing_open_if_the_header_cannot_be_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        header = ProxyHeader()

        def to_bytes(self: ProxyHeader) -> bytes:
            reset(listening.accept()[0])  # just before the send
            return b"PROXY"

        monkeypatch.setattr(ProxyHeader, "to_bytes", to_bytes)
        with pytest.raises(trio.BrokenResourceError, match=f"with 127.0.0.1:{port} is broken"):
            await trisock.connect("127.0.0.1", port, proxy_header=header)


@pytest.mark.parametrize("header", [b"PROXY UNKNOWN\r\n", True, VALID[0], "PROXY"])
async def test_connect_takes_only_a_proxy_header(header: Any, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        with pytest.raises(TypeError, match="proxy_header must be a ProxyHeader or None"):
            await trisock.connect("127.0.0.1", port, proxy_header=header)
        listening.setblocking(False)
        with pytest.raises(BlockingIOError):
            listening.accept()
    with pytest.raises(TypeError, match="proxy_header"):
        await trisock.connect_unix(str(tmp_path / "none"), proxy_header=header)
