"""The reader of a ClientHello: no split of the bytes matters, and it holds a bounded number."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.client_hellos import hello_for, in_records
from trisock._tls.client_hello import (
    NOT_A_CLIENT_HELLO,
    ClientHello,
    ClientHelloReader,
    TooLongError,
)

WHOLE = hello_for(b"Example.org")


def test_every_split_in_three_gives_the_same() -> None:
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
def test_no_split_into_records_or_segments_matters(
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
    assert ClientHelloReader().feed(wire + rest) == found  # what follows does not matter


@settings(max_examples=500, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_change_gives_a_hello_or_none(data: st.DataObject) -> None:
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


def test_a_reader_takes_256_kib_at_most() -> None:
    reader = ClientHelloReader()
    for _ in range(256 * 1024 // 5):
        assert reader.feed(b"\x16\x03\x01\0\0") is None
    with pytest.raises(TooLongError):
        reader.feed(b"\x16\x03\x01\0\0")


def test_a_hello_may_be_as_long_as_openssl_takes() -> None:
    longest = (131396).to_bytes(3, "big")
    assert ClientHelloReader().feed(in_records(b"\x01" + longest, 4)) is None
    longer = (131397).to_bytes(3, "big")
    assert ClientHelloReader().feed(in_records(b"\x01" + longer, 4)) == NOT_A_CLIENT_HELLO


def test_a_hello_in_tiny_records_is_refused_once_it_takes_256_kib() -> None:
    wire = in_records(b"\x01\x01\xff\xfc" + bytes(60_000), 1)
    reader = ClientHelloReader()
    assert reader.feed(wire[: 256 * 1024]) is None
    with pytest.raises(TooLongError, match="more than 256 KiB"):
        reader.feed(wire[256 * 1024 :])


@pytest.mark.parametrize(
    ("asked", "shown"),
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
def test_only_host_names_are_shown(asked: bytes, shown: str | None) -> None:
    hello = ClientHelloReader().feed(hello_for(asked))
    assert hello is not None
    assert (hello.server_name, hello.host_name) == (asked, shown)


def hello_with(extensions: bytes | None) -> bytes:
    """Return a ClientHello of TLS 1.2 in one record, with (or without) a list of extensions."""
    body = b"\x03\x03" + bytes(32) + b"\0" + b"\0\x02\x00\x9c" + b"\x01\0"
    if extensions is not None:
        body += len(extensions).to_bytes(2, "big") + extensions
    message = b"\x01" + len(body).to_bytes(3, "big") + body
    return b"\x16\x03\x01" + len(message).to_bytes(2, "big") + message


def test_a_client_of_tls_1_2_need_not_have_extensions() -> None:
    assert ClientHelloReader().feed(hello_with(None)) == ClientHello(None, supports_tickets=False)


def test_an_extension_that_comes_twice_is_not_well_formed() -> None:
    ticket = b"\0\x23\0\0"
    assert ClientHelloReader().feed(hello_with(ticket)) == ClientHello(None, supports_tickets=True)
    assert ClientHelloReader().feed(hello_with(ticket * 2)) is NOT_A_CLIENT_HELLO


@pytest.mark.parametrize("cut", [b"\0", b"\0\x0a", b"\0\x0a\0", b"\0\x0a\0\x05ab"])
def test_an_extension_that_is_cut_short_is_not_well_formed(cut: bytes) -> None:
    assert ClientHelloReader().feed(hello_with(cut)) == NOT_A_CLIENT_HELLO
