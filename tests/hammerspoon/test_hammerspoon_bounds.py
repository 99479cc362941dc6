"""Bounds on the memory of hs.socket's objects, measured with hostile peers and slow callbacks."""

from __future__ import annotations

import contextlib
import socket

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

import trisock
from helpers.hammerspoon import Calls, connect_to, measured, raw_client, unix_server, until
from trisock import hammerspoon
from trisock.hammerspoon import Socket, Sockets, callbacks, queues

MIB = 1024 * 1024


@unix_server
async def test_a_client_that_reads_no_responses_is_disconnected(
    monkeypatch: pytest.MonkeyPatch, server: Socket
) -> None:
    """The client sends empty lines, and the callback responds to each line."""
    monkeypatch.setattr(queues, "MAX_UNSENT", MIB // 2)
    responses = 0

    def respond(data: bytes, tag: int) -> None:
        nonlocal responses
        responses += 1
        server.write(b"> " + data)
        server.read("\n")

    with raw_client(server) as raw:
        raw.setblocking(False)
        await until(server.connected)
        server.setCallback(respond).write(bytes(MIB // 2))  # more than the kernel's buffers hold
        server.read("\n")
        await wait_all_tasks_blocked()
        with measured() as grown:
            while server.connected() and responses < 10_000:
                with contextlib.suppress(BlockingIOError, BrokenPipeError):
                    raw.send(b"\n" * 50)
                await trio.sleep(0.001)
    assert not server.connected()
    assert grown[0] < MIB


async def test_silent_clients_cost_little_memory_while_one_client_sends() -> None:
    async def growth(silent: int) -> int:
        lines = 0

        def count(data: bytes, tag: int) -> None:
            nonlocal lines
            lines += 1
            server.read("\n")

        async with hammerspoon.open_sockets() as hs:
            server = hs.server(0, count)
            with contextlib.ExitStack() as stack:
                for _ in range(silent):
                    stack.enter_context(raw_client(server))
                talker = stack.enter_context(raw_client(server))
                await until(lambda: server.connections() == silent + 1)
                server.read("\n")
                await wait_all_tasks_blocked()
                with measured() as grown:
                    talker.sendall(b"\n" * 1100)
                    await until(lambda: lines == 1100)
                return grown[0]

    each = (await growth(20)) / 20
    assert each < 64 * 1024, f"{each:.0f} bytes per silent client"


async def test_the_queued_reads_of_all_clients_are_bounded(
    monkeypatch: pytest.MonkeyPatch, server: Socket
) -> None:
    """The bound includes the delimiters, and still allows one queued read for each client."""
    monkeypatch.setattr(queues, "MAX_READ_COST", MIB)
    with contextlib.ExitStack() as stack, measured() as grown:
        for number in range(20):
            stack.enter_context(raw_client(server))
            await until(lambda: server.connections() == number + 1)  # noqa: B023
            for each in range(20):
                server.read(b"%d" % each + bytes(50_000))
    assert grown[0] < 4 * MIB


@pytest.mark.parametrize("kind", ["server", "client"])
async def test_reads_wait_while_a_slow_callback_holds_data(
    monkeypatch: pytest.MonkeyPatch, hs: Sockets, kind: str
) -> None:
    monkeypatch.setattr(callbacks, "MAX_HELD", MIB)
    line = b"x" * (MIB // 4 - 1) + b"\n"
    lines = 0
    resume = trio.Event()

    async def slow(data: bytes, tag: int) -> None:
        nonlocal lines
        assert data == line
        await resume.wait()
        lines += 1

    server = hs.server(0, slow)
    client = connect_to(server, hs.new(slow))
    await until(lambda: client.connected() and server.connected())
    reader, writer = (server, client) if kind == "server" else (client, server)
    with measured() as grown:
        for _ in range(60):
            reader.read("\n")
            writer.write(line)
        await wait_all_tasks_blocked(0.05)
    assert grown[0] < 4 * MIB  # memory holds only some of the 15 MiB of lines
    resume.set()
    await until(lambda: lines == 60)


async def test_a_disconnect_drops_reads_that_wait_for_a_slow_callback(
    monkeypatch: pytest.MonkeyPatch, hs: Sockets, client: Socket, peer: trisock.Socket
) -> None:
    monkeypatch.setattr(callbacks, "MAX_HELD", 1000)
    client.setCallback(lambda data, tag: trio.sleep_forever())
    for _ in range(10):
        client.read(2000)
    await peer.send(bytes(20_000))
    await wait_all_tasks_blocked(0.01)
    connect_to(hs.server(0), client.disconnect())
    await until(client.connected)


async def test_reads_wait_until_enough_callbacks_have_returned(
    monkeypatch: pytest.MonkeyPatch, client: Socket, peer: trisock.Socket, calls: Calls
) -> None:
    monkeypatch.setattr(callbacks, "MAX_HELD", 700)
    resume = trio.Event()
    client.write("x", lambda tag: resume.wait())
    for tag in range(3):
        client.write("x", tag, calls)
    await peer.recv_exactly(4)
    await wait_all_tasks_blocked(0.01)
    await peer.send(b"line\n")
    client.read("\n")
    assert await calls.none()
    resume.set()
    assert await calls.take(4) == [(0,), (1,), (2,), (b"line\n", -1)]


async def test_repeated_startTLS_uses_no_memory_for_silent_clients(  # noqa: N802
    server: Socket, raw: socket.socket
) -> None:
    server.read("\n").startTLS(False)  # the first one imports modules
    with measured() as grown:
        for _ in range(2000):
            server.startTLS(False)
    assert grown[0] < MIB
