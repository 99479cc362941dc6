"""Splitting a ClientHello does not change what ClientHelloReader finds. Its memory is bounded."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.client_hellos import hello_for, hello_with, in_records, name_extension
from trisock._tls.client_hello import (
    NOT_A_CLIENT_HELLO,
    ClientHello,
    ClientHelloReader,
    TooLongError,
)

WHOLE = hello_for(b"Example.org")


def test_every_split_into_three_parts_gives_the_same_hello() -> None:
    for cuts in itertools.combinations(range(len(WHOLE) + 1), 2):
        reader = ClientHelloReader()
        parts = [WHOLE[: cuts[0]], WHOLE[cuts[0] : cuts[1]], WHOLE[cuts[1] :]]
        found = [reader.feed(part) for part in parts]
        hello = next(each for each in found if each is not None)
        assert (hello.server_name, hello.host_name) == (b"Example.org", "Example.org")
        assert hello.supports_tickets
        assert reader.wire() == WHOLE


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    size=st.integers(1, 300),
    cuts=st.lists(st.integers(0, 2000), max_size=20),
    name=st.sampled_from([b"example.org", b"\xff", b"10.0.0.1", b"a.b.c"]),
    rest=st.binary(max_size=50),
)
def test_every_split_into_records_and_segments_gives_the_same_hello(
    size: int, cuts: list[int], name: bytes, rest: bytes
) -> None:
    hello = hello_for(name)
    wire = in_records(hello[5:], size)
    reader = ClientHelloReader()
    found: ClientHello | None = None
    edges = [0, *sorted(min(cut, len(wire)) for cut in cuts), len(wire)]
    for start, end in itertools.pairwise(edges):
        assert found is None or start == len(wire)
        found = reader.feed(wire[start:end]) or found
    assert found is not None
    assert found.server_name == name
    assert reader.wire() == wire
    assert ClientHelloReader().feed(wire + rest) == found  # later bytes are ignored


@settings(max_examples=500, deadline=None, derandomize=True)
@given(data=st.data())
def test_feeding_a_mutated_hello_byte_by_byte_changes_nothing(data: st.DataObject) -> None:
    wire = bytearray(WHOLE)
    for _ in range(data.draw(st.integers(1, 4))):
        wire[data.draw(st.integers(0, len(wire) - 1))] = data.draw(st.integers(0, 255))
    reader = ClientHelloReader()
    hello = None
    for at in range(len(wire)):
        hello = reader.feed(bytes(wire[at : at + 1]))
        if hello is not None:
            break
    assert ClientHelloReader().feed(bytes(wire)) == hello


def test_another_handshake_message_is_refused_at_its_first_byte() -> None:
    server_hello = in_records(b"\x02", 1)
    assert ClientHelloReader().feed(server_hello) == NOT_A_CLIENT_HELLO


def test_a_reader_refuses_more_than_256_kib() -> None:
    reader = ClientHelloReader()
    for _ in range(256 * 1024 // 5):
        assert reader.feed(b"\x16\x03\x01\0\0") is None
    with pytest.raises(TooLongError):
        reader.feed(b"\x16\x03\x01\0\0")


def test_the_length_limit_is_the_same_as_openssls() -> None:
    longest = (131396).to_bytes(3, "big")
    assert ClientHelloReader().feed(in_records(b"\x01" + longest, 4)) is None
    longer = (131397).to_bytes(3, "big")
    assert ClientHelloReader().feed(in_records(b"\x01" + longer, 4)) == NOT_A_CLIENT_HELLO


def test_a_hello_in_tiny_records_is_refused_after_256_kib() -> None:
    wire = in_records(b"\x01\x01\xff\xfc" + bytes(60_000), 1)
    reader = ClientHelloReader()
    assert reader.feed(wire[: 256 * 1024]) is None
    with pytest.raises(TooLongError, match="more than 256 KiB"):
        reader.feed(wire[256 * 1024 :])


@pytest.mark.parametrize(
    ("requested", "host_name"),
    [
        (b"x\ny\x1bz", None),
        ("b\xfccher.example".encode(), None),
        (b"\xff\xfe", None),
        (b"a b.example", None),
        (b"a..b", None),
        (b".", None),
        (b"a" * 64, None),
        (b"127.0.0.1", None),
        (b"127.0.0.1.", None),
        (b"::1", None),
        (b"*.example", None),
        (b"Example.org.", "Example.org."),
        (b"xn--bcher-kva.example", "xn--bcher-kva.example"),
        (b"a" * 63, "a" * 63),
        (b"1.2.3", "1.2.3"),
    ],
)
def test_only_a_valid_name_becomes_a_host_name(requested: bytes, host_name: str | None) -> None:
    hello = ClientHelloReader().feed(hello_for(requested))
    assert hello is not None
    assert (hello.server_name, hello.host_name) == (requested, host_name)


def hello_with_extensions(extensions: bytes | None) -> bytes:
    """Return a ClientHello in one record. ``None`` leaves out the extensions field."""
    return in_records(hello_with(extensions), 16384)


def test_a_tls_1_2_hello_does_not_need_extensions() -> None:
    assert ClientHelloReader().feed(hello_with_extensions(None)) == ClientHello(
        None, supports_tickets=False
    )


def test_an_extension_that_occurs_twice_is_refused() -> None:
    ticket = b"\0\x23\0\0"
    assert ClientHelloReader().feed(hello_with_extensions(ticket)) == ClientHello(
        None, supports_tickets=True
    )
    assert ClientHelloReader().feed(hello_with_extensions(ticket * 2)) is NOT_A_CLIENT_HELLO


def test_bytes_after_the_extensions_are_refused() -> None:
    hello = hello_with(b"") + b"\0"
    longer = hello[:1] + (len(hello) - 4).to_bytes(3, "big") + hello[4:]
    assert ClientHelloReader().feed(in_records(longer, 16384)) is NOT_A_CLIENT_HELLO


@pytest.mark.parametrize("cut", [b"\0", b"\0\x0a", b"\0\x0a\0", b"\0\x0a\0\x05ab"])
def test_an_extension_that_is_cut_short_is_refused(cut: bytes) -> None:
    assert ClientHelloReader().feed(hello_with_extensions(cut)) == NOT_A_CLIENT_HELLO


@pytest.mark.parametrize(
    "extension",
    [
        name_extension(),
        name_extension(b""),
        name_extension(b"a.example", b"b.example"),
        name_extension(b"a.example").replace(b"\0\0\x09a", b"\1\0\x09a"),  # Another name type.
        b"\0\0\0\x05\0\x02\0\0\0",  # Bytes after the list.
    ],
    ids=["no name", "empty name", "two names", "another type", "trailing bytes"],
)
def test_an_sni_extension_without_exactly_one_host_name_is_refused(extension: bytes) -> None:
    one = ClientHelloReader().feed(hello_with_extensions(name_extension(b"a.example")))
    assert one is not None
    assert one.server_name == b"a.example"
    assert ClientHelloReader().feed(hello_with_extensions(extension)) == NOT_A_CLIENT_HELLO
