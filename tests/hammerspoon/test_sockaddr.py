"""parseAddress, and the binary addresses that info() gives: two layouts, nothing else."""

# ruff: noqa: N802 (tests are named after hs.socket's names)

from __future__ import annotations

import ctypes
import importlib.util
import socket
import sys
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.sockaddrs import BSD4, BSD6, LINUX4, LINUX6, native
from trisock import Address
from trisock.hammerspoon import Sockets
from trisock.hammerspoon import sockaddr as _sockaddr
from trisock.hammerspoon.sockaddr import pack_sockaddr, parse_sockaddr

parse = Sockets.parseAddress

LOOPBACK_INDEX = socket.if_nametoindex("lo")


def scope(index: int) -> bytes:
    return index.to_bytes(4, sys.byteorder)


def as_on(platform: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return another copy of the module, as it is on another platform."""
    spec = importlib.util.find_spec("trisock.hammerspoon.sockaddr")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", platform)
        if platform != "linux":
            patch.setattr(socket, "AF_INET6", 30 if platform == "darwin" else 28)
        spec.loader.exec_module(module)
    return module


# ---- parseAddress ----


@pytest.mark.parametrize(
    ("sockaddr", "host", "family"),
    [
        (LINUX4, "192.0.2.1", 2),
        (BSD4, "192.0.2.1", 2),
        (LINUX6, "2001:db8::1", 10),
        (BSD6, "2001:db8::1", 30),
    ],
)
def test_parseAddress_host_port_and_addressFamily(sockaddr: bytes, host: str, family: int) -> None:
    assert parse(sockaddr) == {"host": host, "port": 8080, "addressFamily": family}


@pytest.mark.parametrize("port", [0, 1, 80, 256, 65535])
@pytest.mark.parametrize("sockaddr", [LINUX4, BSD4, LINUX6, BSD6])
def test_parseAddress_port(sockaddr: bytes, port: int) -> None:
    parsed = parse(sockaddr[:2] + port.to_bytes(2, "big") + sockaddr[4:])
    assert parsed is not None
    assert parsed["port"] == port


@pytest.mark.parametrize("sockaddr", [LINUX6, BSD6])
def test_parseAddress_shows_the_scope_by_its_name_or_number(sockaddr: bytes) -> None:
    for index, zone in [
        (LOOPBACK_INDEX, "%lo"),
        (987654, "%987654"),
        (0xFFFFFFFF, "%4294967295"),
        (0, ""),
    ]:
        parsed = parse(sockaddr[:24] + scope(index))
        assert parsed is not None
        assert parsed["host"] == f"2001:db8::1{zone}"


def test_parseAddress_of_a_mapped_address_is_as_it_stands() -> None:
    mapped = socket.inet_pton(socket.AF_INET6, "::ffff:192.0.2.1")
    parsed = parse(LINUX6[:8] + mapped + bytes(4))
    assert parsed == {"host": "::ffff:192.0.2.1", "port": 8080, "addressFamily": 10}


@pytest.mark.parametrize(
    "sockaddr",
    [
        None,
        "",
        "192.0.2.1",
        LINUX4.decode("latin-1"),
        1,
        b"",
        b"\x10",
        b"\x10\x02",
        LINUX4[:-1],
        LINUX4 + b"\0",
        LINUX6[:-1],
        LINUX6 + b"\0",
        bytes(16),
        bytes(28),
        native(10) + LINUX4[2:],  # IPv6 in the size of IPv4, and the other way round
        native(2) + LINUX6[2:],
        bytes([16, 30]) + BSD4[2:],
        bytes([28, 2]) + BSD6[2:],
        bytes([28, 10]) + BSD6[2:],  # the other system's number
        native(30) + LINUX6[2:],
        bytes([28, 2]) + BSD4[2:],  # the other's length
        bytes([16, 30]) + BSD6[2:],
        native(1) + b"/run/socket\0\0\0",  # AF_UNIX
        bytes([16, 1]) + b"/run/socket\0\0\0",
        native(1) + bytes(108),
        native(16) + LINUX4[2:],  # 16 and 28 are families of Linux, too
        native(28) + LINUX6[2:],
    ],
)
def test_parseAddress_of_anything_else_is_None(sockaddr: object) -> None:
    assert parse(sockaddr) is None  # type: ignore[arg-type]


@given(st.binary(max_size=40) | st.binary(min_size=16, max_size=16) | st.binary(min_size=28))
def test_parseAddress_never_raises(sockaddr: bytes) -> None:
    parse(sockaddr)


@given(st.sampled_from([LINUX4[:2], BSD4[:2]]), st.binary(min_size=14, max_size=14))
def test_parseAddress_reads_every_address_of_ipv4(head: bytes, rest: bytes) -> None:
    parsed = parse(head + rest)
    assert parsed is not None
    assert socket.inet_aton(parsed["host"]) == rest[2:6]
    assert parsed["port"] == int.from_bytes(rest[:2], "big")


@given(st.sampled_from([LINUX6[:2], BSD6[:2]]), st.binary(min_size=26, max_size=26))
def test_parseAddress_reads_every_address_of_ipv6(head: bytes, rest: bytes) -> None:
    parsed = parse(head + rest)
    assert parsed is not None
    host, _, zone = parsed["host"].partition("%")
    assert socket.inet_pton(socket.AF_INET6, host) == rest[6:22]
    assert bool(zone) == bool(int.from_bytes(rest[22:], sys.byteorder))


# ---- there and back ----


def kernel_sockaddr(sock: socket.socket) -> bytes:
    """Return what the kernel itself says of a socket's address."""
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(128)
    size = ctypes.c_uint32(len(buffer))
    assert libc.getsockname(sock.fileno(), buffer, ctypes.byref(size)) == 0
    return buffer.raw[: size.value]


@pytest.mark.parametrize(
    ("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")]
)
def test_parseAddress_reads_what_the_kernel_gives(family: int, host: str) -> None:
    with socket.create_server((host, 0), family=family) as sock:
        sockaddr = kernel_sockaddr(sock)
        port = sock.getsockname()[1]
    assert parse(sockaddr) == {"host": host, "port": port, "addressFamily": family}
    assert pack_sockaddr(Address(host, port)) == sockaddr


def test_what_the_kernel_gives_for_a_unix_socket_is_None() -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        assert parse(kernel_sockaddr(sock)) is None


@given(st.ip_addresses(), st.integers(0, 65535))
def test_an_address_comes_back_as_it_was(host: object, port: int) -> None:
    parsed = parse(pack_sockaddr(Address(str(host), port)))
    assert parsed is not None
    assert parsed["port"] == port
    if ":" in str(host):
        assert parsed["addressFamily"] == socket.AF_INET6
        assert socket.inet_pton(socket.AF_INET6, parsed["host"]) == host.packed  # type: ignore[attr-defined]
    else:
        assert (parsed["host"], parsed["addressFamily"]) == (str(host), socket.AF_INET)


@pytest.mark.parametrize("host", ["fe80::1%lo", "fe80::1%987654", "fe80::1"])
def test_a_scope_comes_back_as_it_was(host: str) -> None:
    parsed = parse_sockaddr(pack_sockaddr(Address(host, 1)))
    assert parsed is not None
    assert parsed["host"] == host


def test_the_scope_of_an_interface_that_has_gone_away_is_left_out() -> None:
    parsed = parse_sockaddr(pack_sockaddr(Address("fe80::1%gone-away", 1)))
    assert parsed is not None
    assert parsed["host"] == "fe80::1"


@pytest.mark.parametrize("host", ["", "/run/socket", "localhost", "1.2.3", "1.2.3.4.5"])
def test_what_is_no_ip_address_has_no_sockaddr(host: str) -> None:
    assert pack_sockaddr(Address(host, 80)) == b""


# ---- on other systems ----


def test_on_linux_the_layout_is_linuxs(monkeypatch: pytest.MonkeyPatch) -> None:
    there = as_on("linux", monkeypatch)
    assert there.pack_sockaddr(Address("192.0.2.1", 8080)) == LINUX4
    assert there.pack_sockaddr(Address("2001:db8::1", 8080)) == LINUX6
    assert there.parse_sockaddr(BSD6) == {
        "host": "2001:db8::1", "port": 8080, "addressFamily": 30
    }  # fmt: skip


@pytest.mark.parametrize(("platform", "family"), [("darwin", 30), ("freebsd14", 28)])
def test_on_bsd_the_layout_begins_with_the_length(
    platform: str, family: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = as_on(platform, monkeypatch)
    assert there.pack_sockaddr(Address("192.0.2.1", 8080)) == BSD4
    parsed = {"host": "2001:db8::1", "port": 8080, "addressFamily": family}
    assert there.parse_sockaddr(bytes([28, family]) + BSD6[2:]) == parsed
    assert there.parse_sockaddr(BSD4) == parse(BSD4)
    assert there.parse_sockaddr(LINUX4) == parse(LINUX4)
    assert there.parse_sockaddr(LINUX6) == parse(LINUX6)  # another system's, by its number
    assert there.parse_sockaddr(native(family) + LINUX6[2:]) is None


def test_other_copies_of_the_module_leave_the_one_in_use_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    as_on("darwin", monkeypatch)
    assert sys.modules["trisock.hammerspoon.sockaddr"] is _sockaddr
    assert sys.platform == "linux"
    assert pack_sockaddr(Address("192.0.2.1", 8080)) == LINUX4
