"""Binary addresses in the layouts of Linux and BSD: parseAddress, and the addresses in info()."""

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
from trisock.hammerspoon import ParsedAddress, Sockets
from trisock.hammerspoon import sockaddr as _sockaddr
from trisock.hammerspoon.sockaddr import pack_sockaddr

parse = Sockets.parseAddress


def parsed(sockaddr: bytes) -> ParsedAddress:
    """Call parseAddress, check that the result is not None, and return the result."""
    found = parse(sockaddr)
    assert found is not None
    return found


def as_on(platform: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Import a second copy of trisock's sockaddr module, as if on another platform."""
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
def test_parseAddress_returns_host_port_and_addressFamily(
    sockaddr: bytes, host: str, family: int
) -> None:
    assert parse(sockaddr) == {"host": host, "port": 8080, "addressFamily": family}


@pytest.mark.parametrize("port", [0, 1, 80, 256, 65535])
@pytest.mark.parametrize("sockaddr", [LINUX4, BSD4, LINUX6, BSD6])
def test_parseAddress_reads_the_port(sockaddr: bytes, port: int) -> None:
    assert parsed(sockaddr[:2] + port.to_bytes(2, "big") + sockaddr[4:])["port"] == port


@pytest.mark.parametrize("sockaddr", [LINUX6, BSD6])
@pytest.mark.parametrize(
    ("index", "zone"),
    [
        (socket.if_nametoindex("lo"), "%lo"),
        (987654, "%987654"),
        (0xFFFFFFFF, "%4294967295"),
        (0, ""),
    ],
)
def test_parseAddress_appends_the_scope_as_a_name_or_number(
    sockaddr: bytes, index: int, zone: str
) -> None:
    scoped = sockaddr[:24] + index.to_bytes(4, sys.byteorder)
    assert parsed(scoped)["host"] == f"2001:db8::1{zone}"


def test_parseAddress_does_not_convert_a_mapped_ipv4_address() -> None:
    mapped = socket.inet_pton(socket.AF_INET6, "::ffff:192.0.2.1")
    expected = {"host": "::ffff:192.0.2.1", "port": 8080, "addressFamily": 10}
    assert parse(LINUX6[:8] + mapped + bytes(4)) == expected


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
        native(10) + LINUX4[2:],  # IPv6's family number, but IPv4's size.
        native(2) + LINUX6[2:],  # IPv4's family number, but IPv6's size.
        bytes([16, 30]) + BSD4[2:],
        bytes([28, 2]) + BSD6[2:],
        bytes([28, 10]) + BSD6[2:],  # Linux's family number in BSD's layout.
        native(30) + LINUX6[2:],  # BSD's family number in Linux's layout.
        bytes([28, 2]) + BSD4[2:],  # IPv6's length in an IPv4 address.
        bytes([16, 30]) + BSD6[2:],  # IPv4's length in an IPv6 address.
        native(1) + b"/run/socket\0\0\0",  # AF_UNIX.
        bytes([16, 1]) + b"/run/socket\0\0\0",
        native(1) + bytes(108),
        native(16) + LINUX4[2:],  # On BSD, 16 is a length, but on Linux, a family number.
        native(28) + LINUX6[2:],  # On BSD, 28 is a length, but on Linux, a family number.
    ],
)
def test_parseAddress_returns_None_for_anything_but_an_ip_sockaddr(sockaddr: object) -> None:
    assert parse(sockaddr) is None  # type: ignore[arg-type]


@given(st.binary(max_size=40) | st.binary(min_size=16, max_size=16) | st.binary(min_size=28))
def test_parseAddress_never_raises(sockaddr: bytes) -> None:
    parse(sockaddr)


@given(st.sampled_from([LINUX4[:2], BSD4[:2]]), st.binary(min_size=14, max_size=14))
def test_parseAddress_reads_every_ipv4_address(head: bytes, rest: bytes) -> None:
    address = parsed(head + rest)
    assert socket.inet_aton(address["host"]) == rest[2:6]
    assert address["port"] == int.from_bytes(rest[:2], "big")


@given(st.sampled_from([LINUX6[:2], BSD6[:2]]), st.binary(min_size=26, max_size=26))
def test_parseAddress_reads_every_ipv6_address(head: bytes, rest: bytes) -> None:
    host, _, zone = parsed(head + rest)["host"].partition("%")
    assert socket.inet_pton(socket.AF_INET6, host) == rest[6:22]
    assert bool(zone) == bool(int.from_bytes(rest[22:], sys.byteorder))


# ---- addresses from the kernel and in info() ----


def kernel_sockaddr(sock: socket.socket) -> bytes:
    """Return a socket's own address, as getsockname(2) writes it."""
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(128)
    size = ctypes.c_uint32(len(buffer))
    assert libc.getsockname(sock.fileno(), buffer, ctypes.byref(size)) == 0
    return buffer.raw[: size.value]


@pytest.mark.parametrize(
    ("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")]
)
def test_parseAddress_reads_the_kernels_addresses(family: int, host: str) -> None:
    with socket.create_server((host, 0), family=family) as sock:
        sockaddr = kernel_sockaddr(sock)
        port = sock.getsockname()[1]
    assert parse(sockaddr) == {"host": host, "port": port, "addressFamily": family}
    assert pack_sockaddr(Address(host, port)) == sockaddr


def test_parseAddress_returns_None_for_a_unix_sockaddr() -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        assert parse(kernel_sockaddr(sock)) is None


@given(st.ip_addresses(), st.integers(0, 65535))
def test_an_address_survives_packing_and_parsing(host: object, port: int) -> None:
    address = parsed(pack_sockaddr(Address(str(host), port)))
    assert address["port"] == port
    if ":" in str(host):
        assert address["addressFamily"] == socket.AF_INET6
        assert socket.inet_pton(socket.AF_INET6, address["host"]) == host.packed  # type: ignore[attr-defined]
    else:
        assert (address["host"], address["addressFamily"]) == (str(host), socket.AF_INET)


@pytest.mark.parametrize("host", ["fe80::1%lo", "fe80::1%987654", "fe80::1"])
def test_a_scope_survives_packing_and_parsing(host: str) -> None:
    assert parsed(pack_sockaddr(Address(host, 1)))["host"] == host


def test_the_scope_of_a_missing_interface_is_omitted() -> None:
    assert parsed(pack_sockaddr(Address("fe80::1%missing", 1)))["host"] == "fe80::1"


@pytest.mark.parametrize("host", ["", "/run/socket", "localhost", "1.2.3", "1.2.3.4.5"])
def test_pack_sockaddr_returns_no_bytes_without_an_ip_address(host: str) -> None:
    assert pack_sockaddr(Address(host, 80)) == b""


# ---- on other systems ----


def test_linux_uses_its_own_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    there = as_on("linux", monkeypatch)
    assert there.pack_sockaddr(Address("192.0.2.1", 8080)) == LINUX4
    assert there.pack_sockaddr(Address("2001:db8::1", 8080)) == LINUX6
    expected = {"host": "2001:db8::1", "port": 8080, "addressFamily": 30}
    assert there.parse_sockaddr(BSD6) == expected


@pytest.mark.parametrize(("platform", "family"), [("darwin", 30), ("freebsd14", 28)])
def test_the_bsd_layout_starts_with_the_length(
    platform: str, family: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = as_on(platform, monkeypatch)
    assert there.pack_sockaddr(Address("192.0.2.1", 8080)) == BSD4
    expected = {"host": "2001:db8::1", "port": 8080, "addressFamily": family}
    assert there.parse_sockaddr(bytes([28, family]) + BSD6[2:]) == expected
    assert there.parse_sockaddr(BSD4) == parse(BSD4)
    # On BSD, parse_sockaddr also accepts Linux's layout, if the family number is Linux's.
    assert there.parse_sockaddr(LINUX4) == parse(LINUX4)
    assert there.parse_sockaddr(LINUX6) == parse(LINUX6)
    assert there.parse_sockaddr(native(family) + LINUX6[2:]) is None


def test_a_simulated_platform_leaves_the_imported_module_unchanged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    as_on("darwin", monkeypatch)
    assert sys.modules["trisock.hammerspoon.sockaddr"] is _sockaddr
    assert sys.platform == "linux"
    assert pack_sockaddr(Address("192.0.2.1", 8080)) == LINUX4
