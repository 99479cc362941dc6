"""Addresses and host names."""

from __future__ import annotations

import errno
import socket

import pytest
import trio

import trisock
from trisock import Address
from trisock._address import (
    address_from_sockaddr,
    check_port,
    to_ascii_host,
    to_tls_name,
    with_message,
)


@pytest.mark.parametrize(
    ("family", "sockaddr", "expected"),
    [
        (socket.AF_INET, ("192.0.2.1", 80), ("192.0.2.1", 80)),
        (socket.AF_INET6, ("2001:db8::1", 80, 0, 0), ("2001:db8::1", 80)),
        (socket.AF_INET6, ("2001:db8::1", 80), ("2001:db8::1", 80)),
        (socket.AF_INET6, ("::ffff:192.0.2.1", 80, 0, 0), ("192.0.2.1", 80)),
        (socket.AF_INET6, ("fe80::1", 80, 0, 1), ("fe80::1%lo", 80)),
        (socket.AF_INET6, ("fe80::1%lo", 80, 0, 1), ("fe80::1%lo", 80)),
        (socket.AF_INET6, ("fe80::1", 80, 0, 2**30), (f"fe80::1%{2**30}", 80)),
        (socket.AF_UNIX, "/run/x", ("/run/x", 0)),
        (socket.AF_UNIX, b"\0name", ("\0name", 0)),
        (socket.AF_UNIX, "", ("", 0)),
    ],
)
def test_addresses_are_shown_as_users_write_them(
    family: int, sockaddr: object, expected: tuple[str, int]
) -> None:
    assert address_from_sockaddr(family, sockaddr) == Address(*expected)


def test_a_sockaddr_that_is_not_an_address_is_refused() -> None:
    with pytest.raises(ValueError, match="not an address"):
        address_from_sockaddr(socket.AF_INET, None)


@pytest.mark.parametrize(
    ("address", "text"),
    [
        (Address("192.0.2.1", 80), "192.0.2.1:80"),
        (Address("::1", 80), "[::1]:80"),
        (Address("::1", 0), "[::1]:0"),
        (Address("/run/x", 0), "/run/x"),
        (Address("", 0), "an unnamed Unix socket"),
    ],
)
def test_str_of_an_address_is_readable(address: Address, text: str) -> None:
    assert str(address) == text


@pytest.mark.parametrize(
    ("host", "ascii_host", "tls_name"),
    [
        ("example.org", "example.org", "example.org"),
        ("example.org.", "example.org.", "example.org"),
        ("my_service", "my_service", "my_service"),
        ("192.0.2.1", "192.0.2.1", "192.0.2.1"),
        ("fe80::1%eth0", "fe80::1%eth0", "fe80::1"),
        # IDNA 2003 maps "faß.de" to "fass.de", which is a different host (UTS 46, section 6).
        ("faß.de", "xn--fa-hia.de", "xn--fa-hia.de"),
        ("Bücher.example", "xn--bcher-kva.example", "xn--bcher-kva.example"),
        ("bücher。example", "xn--bcher-kva.example", "xn--bcher-kva.example"),
        ("ｅxample.org", "example.org", "example.org"),
        ("bücher.my_zone", "xn--bcher-kva.my_zone", "xn--bcher-kva.my_zone"),
    ],
)
def test_host_names_are_converted_to_ascii_for_dns_and_tls(
    host: str, ascii_host: str, tls_name: str
) -> None:
    assert to_ascii_host(host) == ascii_host
    assert to_tls_name(host) == tls_name


@pytest.mark.parametrize(
    "host",
    [
        "",
        ".",
        "a..b",
        "a b",
        "a\0b",
        "x" * 64,
        ".".join(["x" * 60] * 5),
        "\N{COMBINING GRAVE ACCENT}a",
    ],
)
def test_an_invalid_host_name_raises_value_error(host: str) -> None:
    with pytest.raises(ValueError, match="is not a host name"):
        to_ascii_host(host)


def test_a_non_str_host_raises_type_error() -> None:
    with pytest.raises(TypeError, match="a host must be a str"):
        to_ascii_host(b"example.org")  # type: ignore[arg-type]


@pytest.mark.parametrize("port", ["80", None, 1.5, True])
def test_a_non_int_port_raises_type_error(port: object) -> None:
    with pytest.raises(TypeError, match=r"a port must be an int.*example\.org"):
        check_port(port, "example.org")


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_port_out_of_range_raises_value_error(port: int) -> None:
    with pytest.raises(ValueError, match=r"0-65535.*example\.org"):
        check_port(port, "example.org")
    check_port(0, None)


def test_an_oserror_with_a_new_message_keeps_its_class() -> None:
    refused = with_message(ConnectionRefusedError(errno.ECONNREFUSED, "refused"), "no way")
    assert isinstance(refused, ConnectionRefusedError)
    assert "no way" in str(refused)
    unknown = with_message(socket.gaierror(socket.EAI_NONAME, "unknown"), "no way")
    assert isinstance(unknown, socket.gaierror)
    assert unknown.errno == socket.EAI_NONAME
    assert with_message(OSError("odd"), "no way").errno is None


def test_errors_describe_what_was_received_and_expected() -> None:
    import pickle

    count = trisock.IncompleteReadError(b"abc", 5)
    assert (count.partial, count.expected) == (b"abc", 5)
    assert str(count) == "the stream ended after 3 bytes, before 5 bytes arrived"
    assert isinstance(count, EOFError)
    tls = trisock.TLSError("no", reason="WHY", verify_code=62)
    assert isinstance(tls, trio.BrokenResourceError)
    assert pickle.loads(pickle.dumps(tls)).__dict__ == {"reason": "WHY", "verify_code": 62}
    line = trisock.IncompleteReadError(b"abc", None)
    assert str(line) == "the stream ended after 3 bytes, before the delimiter arrived"
    limit = trisock.LimitExceededError(9)
    assert limit.limit == 9
    assert str(limit) == "no delimiter within 9 bytes"
    for error in (count, line, limit):
        assert str(pickle.loads(pickle.dumps(error))) == str(error)
