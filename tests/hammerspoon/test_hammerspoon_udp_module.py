"""hs.socket.udp's documented names; timeout, parseAddress, new and server; the end of the block."""

# ruff: noqa: N802 (tests are named after hs.socket.udp's names)

from __future__ import annotations

import logging
import socket
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from helpers.hammerspoon import LOCALHOST, Calls, Log, errors_in
from helpers.hammerspoon_udp import (
    BROADCAST,
    CLOSED,
    WaitingResolver,
    free_port,
    port_of,
    raw_udp,
    sender,
)
from trisock import hammerspoon
from trisock.hammerspoon import Sockets, UDPSocket, UDPSockets

# ---- hs.socket.udp's page ----


def test_every_name_on_the_page_of_hs_socket_udp_exists() -> None:
    for name in [
        "broadcast", "close", "closed", "connect", "connected", "enableIPv", "info", "listen",
        "pause", "preferIPv", "read", "readOne", "receive", "receiveOne", "reusePort", "send",
        "setBufferSize", "setCallback", "setTimeout", "write",
    ]:  # fmt: skip
        assert callable(getattr(UDPSocket, name))
    for name in ["new", "server", "parseAddress"]:
        assert callable(getattr(UDPSockets, name))


def test_read_readOne_and_write_are_aliases() -> None:
    assert UDPSocket.read is UDPSocket.receive
    assert UDPSocket.readOne is UDPSocket.receiveOne
    assert UDPSocket.write is UDPSocket.send


async def test_the_ping_pong_on_the_page_of_hs_socket_udp_works(hs: Sockets) -> None:
    printed = Calls()

    def ping(data: bytes, addr: bytes) -> None:
        printed(data)
        parsed = hs.parseAddress(addr)
        assert parsed is not None
        client.send("ping", parsed["host"], parsed["port"])

    def pong(data: bytes, addr: bytes) -> None:
        printed(data)
        parsed = hs.parseAddress(addr)
        assert parsed is not None
        server.send("pong", parsed["host"], parsed["port"])

    server = hs.udp.server(0, pong).receive()
    assert server is not None
    client = hs.udp.new(ping).send("ping", "localhost", port_of(server)).receive()
    assert client is not None
    assert await printed.take(6) == [(b"ping",), (b"pong",)] * 3


async def test_the_broadcast_on_the_page_of_hs_socket_udp_works(
    udp: UDPSockets, calls: Calls
) -> None:
    port = free_port()
    listeners = []
    for number in range(3):
        listener = udp.new(lambda data, addr, number=number: calls(number, data)).reusePort()
        assert listener is not None
        listeners.append(listener.listen(port).receive())  # type: ignore[union-attr]
    broadcaster = udp.new().broadcast()
    assert broadcaster is not None
    broadcaster.send("hello!", BROADCAST, port)
    assert sorted(await calls.take(3)) == [(0, b"hello!"), (1, b"hello!"), (2, b"hello!")]


# ---- timeout, parseAddress, new, server ----


async def test_timeout_applies_to_new_udp_objects_only(hs: Sockets, udp: UDPSockets) -> None:
    assert udp.timeout == -1  # hs.socket.udp's default
    before = udp.new()
    udp.timeout = 5
    assert before.info()["timeout"] == -1
    assert udp.new().info()["timeout"] == 5
    assert udp.server(0).info()["timeout"] == 5
    assert hs.timeout == -1  # hs.socket has its own timeout


async def test_a_new_udp_object_sends_with_the_modules_timeout(
    autojump_clock: MockClock, udp: UDPSockets, log: Log, calls: Calls
) -> None:
    trio.socket.set_custom_hostname_resolver(WaitingResolver())
    udp.timeout = 5
    client = udp.new()
    udp.timeout = -1
    client.send("lost", "name", 9).send("next", LOCALHOST, 9, calls)
    await calls.next()
    assert "a send took more than 5 s" in log.text
    assert 5 <= trio.current_time() < 6


@pytest.mark.parametrize("timeout", ["5", None, float("nan"), True])
async def test_new_raises_TypeError_if_the_modules_timeout_is_invalid(
    udp: UDPSockets, timeout: Any
) -> None:
    udp.timeout = timeout
    with pytest.raises(TypeError, match="timeout"):
        udp.new()


async def test_parseAddress_returns_the_sender_of_a_datagram(
    udp: UDPSockets, listening: UDPSocket, there: Any, host: str, calls: Calls
) -> None:
    listening.receive()
    await there.sendto(b"hello", (host, port_of(listening)))
    _, sockaddr = await calls.next()
    assert udp.parseAddress(sockaddr) == {  # type: ignore[arg-type]
        "host": host,
        "port": there.getsockname()[1],
        "addressFamily": socket.AF_INET6 if ":" in host else socket.AF_INET,
    }
    for wrong in (b"", b"x" * 16, "text", None):
        assert udp.parseAddress(wrong) is None  # type: ignore[arg-type]


async def test_new_returns_a_closed_udp_object(udp: UDPSockets) -> None:
    created = udp.new()
    assert isinstance(created, UDPSocket)
    assert created.closed()
    assert not created.connected()


async def test_new_accepts_the_read_callback_of_a_udp_object(
    udp: UDPSockets, there: Any, host: str, calls: Calls
) -> None:
    client = udp.new(calls).send("ping", host, there.getsockname()[1])
    client.receive()
    _, address = await there.recvfrom(100)
    await there.sendto(b"pong", address)
    data, sockaddr = await calls.next()
    assert (data, sender(sockaddr)) == (b"pong", there.getsockname()[:2])


@pytest.mark.parametrize("wrong", ["print", 5, b""])
async def test_a_callback_that_cannot_be_called_is_a_TypeError(udp: UDPSockets, wrong: Any) -> None:
    created = udp.new()
    for call in (
        udp.new,
        lambda fn: udp.server(0, fn),
        lambda fn: created.connect(LOCALHOST, 9, fn),
        created.receive,
        created.receiveOne,
        created.setCallback,
        lambda fn: created.send("x", LOCALHOST, 9, 1, fn),
    ):
        with pytest.raises(TypeError, match="a callback must be a function"):
            call(wrong)
    assert created.info() == CLOSED


async def test_server_listens_and_has_the_read_callback(
    udp: UDPSockets, there: Any, host: str, calls: Calls
) -> None:
    port = free_port()
    server = udp.server(port, calls)
    assert server.info()["userData"] == "SERVER"
    await there.sendto(b"hello", (host, port))
    assert await calls.none()  # nothing is read before ``receive`` is called
    server.receive()
    assert (await calls.next())[0] == b"hello"


async def test_server_on_port_0_listens_on_any_free_udp_port(udp: UDPSockets) -> None:
    ports = {port_of(udp.server(0)) for _ in range(3)}
    assert len(ports) == 3
    assert 0 not in ports


async def test_server_returns_a_closed_object_if_the_port_is_taken(
    udp: UDPSockets, log: Log
) -> None:
    port = port_of(udp.server(0))
    server = udp.server(port)
    assert server.closed()
    assert server.info()["userData"] == ""
    assert f"cannot open UDP on *:{port}: Address already in use" in log.text
    assert server.listen(0) is server


async def test_the_events_of_a_udp_object_are_logged_at_DEBUG(
    udp: UDPSockets, calls: Calls, log: Log
) -> None:
    server: Any = udp.server(0, calls)
    server.receive()
    client: Any = udp.new().connect(LOCALHOST, port_of(server))
    names = [repr(client), repr(server)]
    client.send("x")
    await calls.next()
    client.close()
    server.close()
    await wait_all_tasks_blocked()
    ends = [line.partition("hs.socket.udp: ")[2] for line in log.text.splitlines()]
    assert {f"hs.socket.udp: {end}" for end in ends} == {
        f"{names[0]}: connected",
        f"{names[0]}: data written",
        f"{names[1]}: data read",
        f"{names[0]}: closed",
        f"{names[1]}: closed",
    }
    assert len(ends) == 5
    assert {each.levelno for each in log.records} == {logging.DEBUG}


# ---- the end of open_sockets ----


async def test_no_udp_socket_or_task_is_left_after_open_sockets_exits(calls: Calls) -> None:
    before = trio.lowlevel.current_statistics().tasks_living
    trio.socket.set_custom_hostname_resolver(WaitingResolver())
    with raw_udp() as there:
        port = there.getsockname()[1]
        async with hammerspoon.open_sockets() as hs:
            server, client, waiting = hs.udp.server(0, calls), hs.udp.new(), hs.udp.new(calls)
            server.receive()
            client.connect(LOCALHOST, port).receive(calls)  # type: ignore[union-attr]
            waiting.connect("name", port, calls)
            waiting.send("lost", calls)
            slow = hs.udp.new(lambda data, addr: trio.sleep_forever())
            slow.send("hello", LOCALHOST, port).receive()
            await there.sendto(b"data", (await there.recvfrom(100))[1])
            objects, server_port = [server, client, waiting, slow], port_of(server)
            await wait_all_tasks_blocked(0.01)
            client.send("never sent", calls)
            hs.udp.new().send("never sent", LOCALHOST, port, calls)
        assert trio.lowlevel.current_statistics().tasks_living == before
        assert [each.info() for each in objects] == [CLOSED] * 4
        with raw_udp(port=server_port):
            assert await calls.none()


async def test_a_udp_call_after_open_sockets_has_exited_is_logged(log: Log, calls: Calls) -> None:
    async with hammerspoon.open_sockets() as hs:
        used, new = hs.udp.server(0, calls), hs.udp.new(calls)
    for each in (used, new, hs.udp.new(calls), hs.udp.server(0, calls)):
        for returned, method, *arguments in [
            (None, each.connect, LOCALHOST, 1, calls),
            (None, each.listen, 0),
            (None, each.receive),
            (None, each.receiveOne),
            (each, each.send, "lost", LOCALHOST, 1, calls),
        ]:
            log.clear()
            assert method(*arguments) is returned
            assert len(errors_in(log)) == 1
        assert each.setCallback().setTimeout(1).setBufferSize(5).preferIPv(4).pause() is each
        assert each.broadcast() is each.reusePort() is each.enableIPv(6, False) is each.close()
        assert each.closed()
    assert await calls.none()
