"""open_udp, open_udp_nowait and the constructor: a socket's address, and its options."""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import trio

import trisock
from helpers.namespaces import new_namespace
from helpers.resolver import Resolver
from trisock import UDPSocket, open_udp, open_udp_nowait

Open = Callable[..., Awaitable[UDPSocket]]


async def opened_nowait(*args: Any, **kwargs: Any) -> UDPSocket:
    return open_udp_nowait(*args, **kwargs)


@pytest.fixture(params=[open_udp, opened_nowait], ids=["open_udp", "open_udp_nowait"])
def opener(request: pytest.FixtureRequest) -> Open:
    opener: Open = request.param
    return opener


@pytest.mark.parametrize(
    ("host", "local"),
    [
        (None, "::"),
        ("127.0.0.2", "127.0.0.2"),
        ("::1", "::1"),
        ("0.0.0.0", "0.0.0.0"),
        ("::", "::"),
    ],
)
async def test_the_local_address(opener: Open, host: str | None, local: str) -> None:
    async with await opener(host=host) as udp:
        port = udp.getlocal().port
        assert udp.getlocal() == (local, port)
        assert udp.isopen()
        where = f"[{local}]" if ":" in local else local
        assert repr(udp) == f"<trisock.UDPSocket {where}:{port} open>"
        assert udp.info() == trisock.UDPInfo(
            local=udp.getlocal(), peer=None, isopen=True, dropped=0
        )
    assert udp.getlocal() == (local, port)
    assert udp.info() == trisock.UDPInfo(udp.getlocal(), None, isopen=False, dropped=None)


async def test_the_port_can_be_chosen(opener: Open, udp: UDPSocket, port: int) -> None:
    with pytest.raises(OSError, match=rf"^\[Errno 98\] cannot open UDP on \*:{port}: Address al"):
        await opener(port)
    with pytest.raises(OSError, match=rf"cannot open UDP on 127\.0\.0\.1:{port}: Address already"):
        await opener(port, host="127.0.0.1")
    await udp.close()
    async with await opener(port) as again:
        assert again.getlocal().port == port


def test_a_socket_can_be_opened_before_trio_runs() -> None:
    udp = open_udp_nowait(host="127.0.0.1")

    async def main() -> None:
        await udp.send(b"x", udp.getlocal())
        assert (await udp.recv()).data == b"x"

    trio.run(main)
    udp.abort()
    assert not udp.isopen()


# ---- the address ----


async def test_the_address_of_another_machine_is_an_error(opener: Open) -> None:
    with pytest.raises(
        OSError, match=r"cannot open UDP on 192\.0\.2\.99:9: .* \(it is not an address of"
    ):
        await opener(9, host="192.0.2.99")


async def test_a_name_resolves_to_its_first_usable_address() -> None:
    resolver = Resolver(name=["2001:db8::1", "127.0.0.1", "127.0.0.2"], away=["192.0.2.99"])
    trio.socket.set_custom_hostname_resolver(resolver)
    async with await open_udp(host="name") as udp:
        assert udp.getlocal().host == "127.0.0.1"
        with pytest.raises(OSError, match=r"cannot open UDP on name:\d+: Address already in use"):
            await open_udp(udp.getlocal().port, host="name")
    with pytest.raises(OSError, match=r"cannot open UDP on away:0: Cannot assign"):
        await open_udp(host="away")


async def test_an_unknown_name_is_a_gaierror() -> None:
    with pytest.raises(socket.gaierror, match=r"cannot open UDP on no\.such\.invalid:9"):
        await open_udp(9, host="no.such.invalid")


def test_open_udp_nowait_takes_no_name() -> None:
    with pytest.raises(ValueError, match="open_udp_nowait needs an address, not a name: 'local"):
        open_udp_nowait(host="localhost")


@contextmanager
def no_ipv6(monkeypatch: pytest.MonkeyPatch, way: str) -> Iterator[None]:
    """Simulate a kernel, interfaces or a Python without IPv6."""
    real = socket.socket

    def init(self: Any, family: int = -1, *args: Any, **kwargs: Any) -> None:
        if family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))
        real.__init__(self, family, *args, **kwargs)

    def bind(self: Any, address: Any) -> None:
        if self.family == socket.AF_INET6:
            raise OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
        real.bind(self, address)

    with monkeypatch.context() as patch:
        if way == "kernel":
            patch.setattr(socket, "socket", type("Socket", (real,), {"__init__": init}))
        elif way == "interfaces":
            patch.setattr(socket, "socket", type("Socket", (real,), {"bind": bind}))
        else:
            patch.setattr(socket, "has_ipv6", False)
        yield


@pytest.mark.parametrize("way", ["kernel", "interfaces", "python"])
async def test_without_ipv6_the_socket_uses_ipv4(
    opener: Open, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    with no_ipv6(monkeypatch, way):
        udp = await opener()
    async with udp:
        assert udp.getlocal().host == "0.0.0.0"
        await udp.send(b"x", ("127.0.0.2", udp.getlocal().port))
        assert (await udp.recv()).destination == ("127.0.0.2", udp.getlocal().port)


@pytest.mark.needs("ip")
async def test_ipv4_works_if_ipv6_is_disabled() -> None:
    with new_namespace() as namespace, namespace.entered():
        with open("/proc/sys/net/ipv6/conf/all/disable_ipv6", "w") as switch:
            switch.write("1")
        udp = open_udp_nowait()
    async with udp:
        port = udp.getlocal().port
        await udp.send(b"x", ("127.0.0.1", port))
        assert await udp.recv() == (b"x", ("127.0.0.1", port), ("127.0.0.1", port), False)


# ---- the options ----


async def test_reuse_port_distributes_the_senders(opener: Open) -> None:
    async with await opener(host="127.0.0.1", reuse_port=True) as first:
        port = first.getlocal().port
        async with await opener(port, host="127.0.0.1", reuse_port=True) as second:
            got: dict[UDPSocket, int] = {first: 0, second: 0}
            for _ in range(100):
                async with await trisock.connect_udp("127.0.0.1", port) as client:
                    await client.send(b"x")

            for udp in got:
                udp.stop_receiving()
                async for _ in udp:
                    got[udp] += 1
            assert sum(got.values()) == 100
            assert all(got.values())


async def test_reuse_address_gives_each_socket_the_group(opener: Open) -> None:
    async with await opener(reuse_address=True) as first:
        port = first.getlocal().port
        async with await opener(port, reuse_address=True) as second:
            for udp in (first, second):
                udp.join_group("239.1.2.3", "lo")
            async with await open_udp(host="127.0.0.1") as sender:
                await sender.send(b"to all", ("239.1.2.3", port))
            for udp in (first, second):
                assert (await udp.recv()).data == b"to all"


async def test_broadcast_allows_broadcasts(opener: Open, udp: UDPSocket, port: int) -> None:
    async with await opener(host="127.0.0.1", broadcast=True) as sender:
        await sender.send(b"to all", ("127.255.255.255", port))
        got = await udp.recv()
        assert got == (b"to all", sender.getlocal(), ("127.255.255.255", port), False)
        with pytest.raises(OSError, match="cannot send to"):
            await udp.send(b"answer", got.address, source=got.destination)
        await udp.send(b"answer", got.address)
        assert (await sender.recv()).data == b"answer"


async def test_options_can_be_set_and_read(udp: UDPSocket) -> None:
    udp.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
    assert udp.getsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST) == 1
    assert udp.getsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 4) == b"\1\0\0\0"
    udp.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, bytes(4))
    assert udp.getsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST) == 0
    udp.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, None, 0)  # a null pointer
    for arguments in ((None,), (1, 4)):
        with pytest.raises(TypeError, match="setsockopt takes a value, or None and a length"):
            udp.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, *arguments)  # type: ignore[call-overload]


async def test_wrong_arguments(opener: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    for option in ("reuse_port", "reuse_address", "broadcast"):
        with pytest.raises(TypeError, match=f"{option} must be True or False, not a NoneType"):
            await opener(**{option: None})
    for port in ("9", None, True, 1.5):
        with pytest.raises(TypeError, match="a port must be an int"):
            await opener(port)
    for port in (-1, 65536):
        with pytest.raises(ValueError, match="a port must be in 0-65535"):
            await opener(port)
    with pytest.raises(TypeError, match="a host must be a str or None"):
        await opener(host=b"127.0.0.1")
    for host in ("", "a b", "127.0.0.1:9", "[::1]", "::1%a\nb"):
        with pytest.raises(ValueError, match="is not a host name"):
            await opener(host=host)
    monkeypatch.delattr(socket, "SO_REUSEPORT")
    with pytest.raises(OSError, match="there is no SO_REUSEPORT on this platform"):
        await opener(reuse_port=True)


# ---- the constructor ----


@pytest.mark.parametrize("of", ["socket", "trio.socket"])
async def test_a_bound_socket_can_be_adopted(of: str) -> None:
    raw = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    raw.bind(("0.0.0.0", 0))
    async with UDPSocket(trio.socket.from_stdlib_socket(raw) if of != "socket" else raw) as udp:
        port = udp.getlocal().port
        await udp.send(b"x", ("127.0.0.2", port))
        got = await udp.recv()
        assert got == (b"x", ("127.0.0.1", port), ("127.0.0.2", port), False)
    assert raw.fileno() == -1


def test_other_sockets_are_refused() -> None:
    with pytest.raises(TypeError, match="a UDPSocket needs a socket, not 5"):
        UDPSocket(5)  # type: ignore[arg-type]
    kinds = [(socket.AF_INET, socket.SOCK_STREAM), (socket.AF_UNIX, socket.SOCK_DGRAM)]
    for family, kind in kinds:
        with socket.socket(family, kind) as raw:
            with pytest.raises(ValueError, match="not a UDP socket: <socket"):
                UDPSocket(raw)
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as raw:
        with pytest.raises(ValueError, match="not a bound socket: <socket"):
            UDPSocket(raw)


def test_an_unbound_socket_of_windows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def getsockname(sock: socket.socket) -> object:
        raise OSError(errno.EINVAL, "WSAEINVAL")

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as raw:
        monkeypatch.setattr(socket.socket, "getsockname", getsockname)
        with pytest.raises(ValueError, match="not a bound socket: <socket"):
            UDPSocket(raw)


async def test_a_failed_open_leaves_no_descriptor_open(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(sock: object) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(sys.modules["trisock._udp.opening"], "UDPSocket", fail)
    for call in (lambda: open_udp(), lambda: trisock.connect_udp("127.0.0.1", 9)):
        before = os.listdir("/proc/self/fd")
        with pytest.raises(RuntimeError):
            await call()
        assert os.listdir("/proc/self/fd") == before
