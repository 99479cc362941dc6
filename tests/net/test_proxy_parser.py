"""The parser of PROXY headers: strict in each field, at every split."""

from __future__ import annotations

import struct

import pytest

from helpers.proxy_headers import (
    IPV4,
    LINE4,
    LINE6,
    LOCAL,
    PROXY,
    SIGNATURE,
    TCP6,
    UDP4,
    UDP6,
    UNIX,
    UNIX_DATAGRAM,
    UNIX_STREAM,
    VALID,
    binary,
    crc32c,
    package_errs,
    refused_by_package,
    tlv,
    with_crc,
)
from trisock import Address, ProxyHeader
from trisock._net.proxy_parser import parse_proxy_header

CLIENT, SERVER = Address("192.0.2.1", 50000), Address("198.51.100.2", 443)
CLIENT6, SERVER6 = Address("2001:db8::1", 50000), Address("2001:db8::2", 443)


def parsed(data: bytes) -> ProxyHeader:
    result = parse_proxy_header(data)
    assert result is not None
    header, size = result
    assert size == len(data)
    return header


def refusal(data: bytes) -> str:
    with pytest.raises(ValueError, match=r"header|TLV|unique ID") as caught:
        parse_proxy_header(data)
    return str(caught.value)


@pytest.mark.parametrize("data", VALID, ids=range(len(VALID)))
def test_a_header_is_complete_at_its_last_byte(data: bytes) -> None:
    for end in range(len(data)):
        assert parse_proxy_header(data[:end]) is None
    header = parsed(data)
    for rest in (b"\n", b"\x16\x03\x01", data, bytes(5000)):
        assert parse_proxy_header(data + rest) == (header, len(data))


@pytest.mark.parametrize("data", VALID, ids=range(len(VALID)))
def test_the_proxy_protocol_package_accepts_the_same_headers(data: bytes) -> None:
    assert refused_by_package(data) is False or package_errs(data)


# ---- version 1 ----


def test_a_line_has_the_addresses_of_the_client_and_the_proxy() -> None:
    assert parsed(LINE4) == ProxyHeader(version=1, source=CLIENT, destination=SERVER)
    assert parsed(LINE6) == ProxyHeader(version=1, source=CLIENT6, destination=SERVER6)


def test_ipv6_addresses_are_shown_as_the_system_shows_them() -> None:
    long = b"PROXY TCP6 2001:0DB8:0:0:0:0:0:1 2001:0db8:0000:0000::2 50000 443\r\n"
    assert parsed(long) == parsed(LINE6)
    mapped = parsed(b"PROXY TCP6 ::ffff:192.0.2.1 ::FFFF:c633:6402 50000 443\r\n")
    assert (mapped.source, mapped.destination) == (CLIENT, SERVER)


@pytest.mark.parametrize("rest", [b"", b" ", b" a b", b" \0\xff\r ", b" \r", b" TCP4 1.2.3.4"])
def test_bytes_after_unknown_are_ignored(rest: bytes) -> None:
    assert parsed(b"PROXY UNKNOWN" + rest + b"\r\n") == ProxyHeader(version=1)


def test_a_line_has_at_most_107_bytes() -> None:
    line = b"PROXY UNKNOWN " + b"x" * 91 + b"\r\n"
    assert len(line) == 107
    parsed(line)
    longer = b"PROXY UNKNOWN " + b"x" * 92 + b"\r\n"
    assert parse_proxy_header(longer[:106]) is None
    for end in (107, 108, 5000):
        assert "longer than 107 bytes" in refusal((longer * 50)[:end])


@pytest.mark.parametrize(
    "fields",
    [
        "TCP4 192.0.2.1 198.51.100.2 50000",
        "TCP4 192.0.2.1 198.51.100.2 50000 443 1",
        "TCP4 192.0.2.1 198.51.100.2 50000 443 ",
        "TCP4  192.0.2.1 198.51.100.2 50000 443",
        "TCP4\t192.0.2.1 198.51.100.2 50000 443",
        " TCP4 192.0.2.1 198.51.100.2 50000 443",
        "tcp4 192.0.2.1 198.51.100.2 50000 443",
        "TCP5 192.0.2.1 198.51.100.2 50000 443",
        "UDP4 192.0.2.1 198.51.100.2 50000 443",
        "TCP 192.0.2.1 198.51.100.2 50000 443",
        "TCP46 192.0.2.1 198.51.100.2 50000 443",
        "UNKNOWNX",
        "unknown",
        "UNKNOWN\t",
        "",
        "TCP4 192.0.2.256 198.51.100.2 50000 443",
        "TCP4 192.0.2.01 198.51.100.2 50000 443",
        "TCP4 192.0.2 198.51.100.2 50000 443",
        "TCP4 192.0.2.1.1 198.51.100.2 50000 443",
        "TCP4 192.0.2. 198.51.100.2 50000 443",
        "TCP4 0xc0.0.2.1 198.51.100.2 50000 443",
        "TCP4 3221225985 198.51.100.2 50000 443",
        "TCP4 192.0.2.1 2001:db8::2 50000 443",
        "TCP4 2001:db8::1 2001:db8::2 50000 443",
        "TCP4 ::ffff:192.0.2.1 198.51.100.2 50000 443",
        "TCP4 localhost 198.51.100.2 50000 443",
        "TCP6 192.0.2.1 198.51.100.2 50000 443",
        "TCP6 2001:db8::1::1 2001:db8::2 50000 443",
        "TCP6 2001:db8:1 2001:db8::2 50000 443",
        "TCP6 1:2:3:4:5:6:7:8:9 2001:db8::2 50000 443",
        "TCP6 2001:db8::12345 2001:db8::2 50000 443",
        "TCP6 2001:db8::g 2001:db8::2 50000 443",
        "TCP6 fe80::1%eth0 2001:db8::2 50000 443",
        "TCP6 [2001:db8::1] 2001:db8::2 50000 443",
        "TCP6 : 2001:db8::2 50000 443",
        "TCP4 192.0.2.1 198.51.100.2 65536 443",
        "TCP4 192.0.2.1 198.51.100.2 50000 65536",
        "TCP4 192.0.2.1 198.51.100.2 050000 443",
        "TCP4 192.0.2.1 198.51.100.2 50000 0443",
        "TCP4 192.0.2.1 198.51.100.2 00 443",
        "TCP4 192.0.2.1 198.51.100.2 +5 443",
        "TCP4 192.0.2.1 198.51.100.2 -5 443",
        "TCP4 192.0.2.1 198.51.100.2 5_0 443",
        "TCP4 192.0.2.1 198.51.100.2 1e3 443",
        "TCP4 192.0.2.1 198.51.100.2 50000 443\0",
        "TCP4 192.0.2.1 198.51.100.2 50000 443\r",
        "TCP4 192.0.2.1\0 198.51.100.2 50000 443",
        "TCP4 192.0.2.\u0661 198.51.100.2 50000 443",
        "TCP4 192.0.2.1 198.51.100.2 50000 44\u0663",
    ],
)
def test_a_malformed_line_is_refused(fields: str) -> None:
    line = b"PROXY " + fields.encode() + b"\r\n"
    assert "PROXY header" in refusal(line)
    assert parse_proxy_header(line[:-1]) is None


@pytest.mark.parametrize("line", [LINE4[:-2], b"PROXY UNKNOWN", b"PROXY UNKNOWN a"])
def test_a_line_must_end_with_cr_lf(line: bytes) -> None:
    assert "malformed" in refusal(line + b"\n")
    assert "malformed" in refusal(line + b"\n" + LINE4)
    assert parse_proxy_header(line + b"\r") is None


# ---- version 2 ----


def test_version_2_has_the_addresses_of_the_client_and_the_proxy() -> None:
    assert parsed(binary()) == ProxyHeader(source=CLIENT, destination=SERVER)
    assert parsed(binary(family=TCP6)) == ProxyHeader(source=CLIENT6, destination=SERVER6)
    unix = parsed(binary(family=UNIX_STREAM))
    assert unix.source == Address("/run/client", 0)
    assert unix.destination == Address("/run/server", 0)
    assert unix == parsed(binary(family=UNIX_DATAGRAM))
    assert parsed(binary()) == parsed(binary(family=UDP4))
    assert parsed(binary(family=TCP6)) == parsed(binary(family=UDP6))


def test_a_mapped_address_is_shown_as_ipv4() -> None:
    mapped = b"".join(bytes(10) + b"\xff\xff" + IPV4[at : at + 4] for at in (0, 4)) + IPV4[8:]
    assert parsed(binary(family=TCP6, ends=mapped)) == parsed(binary())


@pytest.mark.parametrize(
    ("field", "path", "text"),
    [
        (b"", "", "an unnamed Unix socket"),
        (b"\0name", "\0name", r"unix:'\x00name'"),
        (b"127.0.0.1:80", "127.0.0.1:80", "unix:'127.0.0.1:80'"),
        (b"/a\nb", "/a\nb", r"unix:'/a\nb'"),
        (b"/\xff", "/\udcff", r"unix:'/\udcff'"),
        (b"/" + b"x" * 107, "/" + "x" * 107, "/" + "x" * 107),
        (b"/a\0rest of the struct", "/a", "/a"),
    ],
)
def test_unix_paths_are_padded_and_safe_to_log(field: bytes, path: str, text: str) -> None:
    source = parsed(binary(family=UNIX_STREAM, ends=field.ljust(108, b"\0") + UNIX[108:])).source
    assert source == Address(path, 0)
    assert str(source) == text


def test_an_unspecified_connection_has_no_addresses() -> None:
    assert parsed(binary(family=0)) == ProxyHeader()
    assert parsed(binary(tlv(2, b"x"), family=0)) == ProxyHeader(tlvs=((2, b"x"),))


@pytest.mark.parametrize("family", [0, 0x11, 0x21, 0x31])
def test_only_the_checksum_of_a_local_header_matters(family: int) -> None:
    data = with_crc(binary(tlv(5, b"check"), command=LOCAL, family=family))
    assert parsed(data) == ProxyHeader(command="LOCAL")
    broken = data[:-1] + bytes([data[-1] ^ 1])
    assert "wrong checksum" in refusal(broken)


@pytest.mark.parametrize(("family", "rest"), [(0x47, b"??"), (0xFF, b"\3\0\4xxxx"), (0x11, b"x")])
def test_a_local_header_may_have_any_family(family: int, rest: bytes) -> None:
    data = binary(command=LOCAL, family=family, ends=rest)
    assert parsed(data) == ProxyHeader(command="LOCAL")
    assert parse_proxy_header(data[:-1]) is None


@pytest.mark.parametrize("at", range(12))
def test_each_byte_of_the_signature_is_checked(at: int) -> None:
    data = bytearray(binary())
    data[at] ^= 0x20
    assert refusal(bytes(data)) == "it does not begin with a PROXY header"
    refusal(bytes(data[: at + 1]))
    assert parse_proxy_header(bytes(data[:at])) is None


@pytest.mark.parametrize("command", sorted({*range(256)} - {LOCAL, PROXY}))
def test_other_versions_and_commands_are_refused(command: int) -> None:
    assert "version or command" in refusal(SIGNATURE + bytes([command]))


@pytest.mark.parametrize("family", sorted({*range(256)} - {0, 0x11, 0x12, 0x21, 0x22, 0x31, 0x32}))
def test_other_families_and_protocols_are_refused(family: int) -> None:
    assert "family or protocol" in refusal(SIGNATURE + bytes([PROXY, family]))
    assert parse_proxy_header(SIGNATURE + bytes([LOCAL, family])) is None


@pytest.mark.parametrize("family", [0x11, 0x12, 0x21, 0x22, 0x31, 0x32])
def test_a_header_too_short_for_its_addresses_is_refused(family: int) -> None:
    data = binary(family=family)
    for size in range(len(data) - 16):
        head = data[:14] + struct.pack("!H", size)
        assert "too short for its addresses" in refusal(head)


def test_a_header_has_at_most_4096_bytes() -> None:
    def of_size(size: int) -> bytes:
        return binary(tlv(0xE0, bytes(size - 16 - 12 - 3)))

    assert len(of_size(4096)) == 4096
    parsed(of_size(4096))
    assert "longer than 4096 bytes" in refusal(of_size(4097)[:16])
    for command in (PROXY, LOCAL):
        assert "longer" in refusal(SIGNATURE + struct.pack("!BBH", command, 0, 0xFFFF))


# ---- TLVs ----


def test_every_tlv_is_kept_except_the_checksum() -> None:
    tlvs = ((4, b""), (0xE0, b"own"), (0xE0, b""), (0, b"\xff" * 300), (2, b"example.org"))
    data = b"".join(tlv(*each) for each in tlvs)
    assert parsed(binary(data)).tlvs == tlvs
    assert parsed(with_crc(binary(data))).tlvs == tlvs


@pytest.mark.parametrize("rest", [b"\4", b"\4\0", b"\4\0\1", b"\4\0\2x", b"\4\xff\xffx"])
@pytest.mark.parametrize("before", [b"", tlv(0xE0, b"own")])
@pytest.mark.parametrize("family", [0, 0x11, 0x21])
def test_tlvs_end_where_the_header_ends(rest: bytes, before: bytes, family: int) -> None:
    assert "TLV" in refusal(binary(before + rest, family=family))
    assert parsed(binary(before + rest, family=family, command=LOCAL)).command == "LOCAL"


def test_a_wrong_checksum_is_refused_whatever_byte_was_changed() -> None:
    data = with_crc(binary(tlv(0xE0, b"own"), family=TCP6))
    for at in range(len(data)):
        changed = data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]
        try:
            result = parse_proxy_header(changed)
        except ValueError:
            continue
        # The length has grown, or the checksum has become a TLV of another type.
        assert result is None or at == len(data) - 7


@pytest.mark.parametrize("place", ["first", "last"])
def test_a_checksum_may_be_anywhere_among_the_tlvs(place: str) -> None:
    other = tlv(0xE0, b"own")
    zeros = tlv(3, bytes(4))
    data = binary(zeros + other if place == "first" else other + zeros)
    value = struct.pack("!I", crc32c(data))
    at = data.index(zeros) + 3
    data = data[:at] + value + data[at + 4 :]
    assert parsed(data).tlvs == ((0xE0, b"own"),)


@pytest.mark.parametrize("value", [b"", b"abc", b"abcde"])
def test_a_checksum_has_4_bytes(value: bytes) -> None:
    assert "not 4 bytes" in refusal(binary(tlv(3, value)))


def test_two_checksums_are_refused() -> None:
    assert "two checksums" in refusal(with_crc(with_crc(binary())))


@pytest.mark.parametrize(
    "bad",
    [
        tlv(2, b"\xff.example"),
        tlv(5, bytes(129)),
        tlv(0x30, b"\xc3\xbc"),
        tlv(0x20, b""),
        tlv(0x20, bytes(4)),
        tlv(0x20, bytes(5) + b"\x21"),
        tlv(0x20, bytes(5) + b"\x21\0\5TLS"),
        tlv(0x20, bytes(5) + tlv(0x21, b"\xff")),
        tlv(0x20, bytes(5) + tlv(0x22, b"\xff")),
        tlv(0x20, bytes(5) + tlv(0x23, b"\xff")),
        tlv(0x20, bytes(5) + tlv(0x24, b"\xff")),
        tlv(0x20, bytes(5) + tlv(0x25, b"\xff")),
    ],
)
def test_a_known_tlv_with_a_wrong_value_is_refused(bad: bytes) -> None:
    refusal(binary(bad))
    refusal(binary(tlv(0xE0, b"own") + bad))


def test_a_refusal_quotes_nothing_that_was_received() -> None:
    for data in (
        b"PROXY TCP4 secret secret 1 2\r\n",
        b"PROXY TCP4 1.2.3.333 1.2.3.4 1 2\r\n",
        binary(tlv(2, b"secret\xff")),
        b"secret",
    ):
        text = refusal(data)
        assert "secret" not in text
        assert "333" not in text
