"""What peers of hs.socket's objects can make them hold, measured."""

from __future__ import annotations

import contextlib
import gc
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from helpers.hammerspoon_kit import Calls, connected, raw_client, until
from trisock import hammerspoon
from trisock.hammerspoon import callbacks as _callbacks
from trisock.hammerspoon import queues as _queued

MIB = 1024 * 1024


@contextlib.contextmanager
def measured() -> Iterator[list[int]]:
    """Give a list that holds, when the block ends, by how much the traced memory has peaked."""
    grown: list[int] = []
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        yield grown
        grown.append(tracemalloc.get_traced_memory()[1] - before)
    finally:
        tracemalloc.stop()


async def test_a_client_that_takes_no_answers_is_disconnected(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A callback answers each line; the client sends empty lines and reads nothing."""
    monkeypatch.setattr(_queued, "MAX_UNSENT", 2 * MIB)

    answered = 0

    def answer(data: bytes, tag: int) -> None:
        nonlocal answered
        answered += 1
        server.write(b"> " + data)
        server.read("\n")

    async with hammerspoon.open_sockets() as hs:
        server = hs.server(str(tmp_path / "socket"), answer)
        with raw_client(server) as client:
            client.setblocking(False)
            await until(server.connected)
            server.write(bytes(MIB))  # more than the kernel takes
            server.read("\n")
            await trio.testing.wait_all_tasks_blocked()
            with measured() as grown:
                while server.connected() and answered < 20_000:
                    with contextlib.suppress(BlockingIOError, BrokenPipeError):
                        client.send(b"\n" * 50)
                    await trio.sleep(0.001)
            assert not server.connected()
            assert grown[0] < 2 * 2 * MIB


async def test_reads_of_one_client_cost_silent_ones_next_to_nothing() -> None:
    async def lines_read(silent: int) -> int:
        heard = 0

        def answer(data: bytes, tag: int) -> None:
            nonlocal heard
            heard += 1
            server.read("\n")

        async with hammerspoon.open_sockets() as hs:
            server = hs.server(0, answer)
            with contextlib.ExitStack() as stack:
                for _ in range(silent):
                    stack.enter_context(raw_client(server))
                talker = stack.enter_context(raw_client(server))
                await until(lambda: server.connections() == silent + 1)
                server.read("\n")
                await trio.testing.wait_all_tasks_blocked()
                with measured() as grown:
                    talker.sendall(b"\n" * 1100)
                    await until(lambda: heard == 1100)
                return grown[0]

    each = (await lines_read(50)) / 50
    assert each < 64 * 1024, f"{each:.0f} bytes for each silent client"


async def test_reads_of_all_clients_together_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The delimiters are the peers' here; each client has one read at least."""
    monkeypatch.setattr(_queued, "MAX_READS_HELD", MIB, raising=False)
    async with hammerspoon.open_sockets() as hs:
        server = hs.server(0, Calls())
        with contextlib.ExitStack() as stack, measured() as grown:
            for number in range(20):
                stack.enter_context(raw_client(server))
                await until(lambda: server.connections() == number + 1)  # noqa: B023
                for each in range(20):
                    server.read(b"%d" % each + bytes(50_000))
        assert grown[0] < 4 * MIB


@pytest.mark.parametrize("kind", ["server", "client"])
async def test_reads_wait_while_a_slow_callback_holds_data(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(_callbacks, "MAX_HELD", MIB, raising=False)
    line = b"x" * (MIB // 4 - 1) + b"\n"
    heard = 0
    go_on = trio.Event()

    async def slow(data: bytes, tag: int) -> None:
        nonlocal heard
        assert data == line
        await go_on.wait()
        heard += 1

    async def send(sock: trio.abc.SendStream) -> None:
        for _ in range(60):
            await sock.send_all(line)

    async def flood(reader: hammerspoon.Socket, peer: trio.abc.SendStream) -> None:
        async with trio.open_nursery() as nursery:
            with measured() as grown:
                for _ in range(60):
                    reader.read("\n")
                nursery.start_soon(send, peer)
                await trio.testing.wait_all_tasks_blocked(0.3)
            assert grown[0] < 4 * MIB  # of 15: what is held, and one that is read
            go_on.set()
            await until(lambda: heard == 60)

    async with hammerspoon.open_sockets() as hs:
        if kind == "client":
            async with connected(hs, fn=slow) as (client, peer):
                await flood(client, peer)
        else:
            server = hs.server(0, slow)
            async with await trio.open_tcp_stream("127.0.0.1", server.info()["localPort"]) as sent:
                await until(server.connected)
                await flood(server, sent)


async def test_a_disconnect_frees_what_waits_for_a_slow_callback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_callbacks, "MAX_HELD", 1000, raising=False)
    calls = Calls()
    async with hammerspoon.open_sockets() as hs, connected(hs) as (client, peer):
        client.setCallback(lambda data, tag: trio.sleep_forever())
        for _ in range(10):
            client.read(2000)
        await peer.send(bytes(20_000))
        await trio.testing.wait_all_tasks_blocked(0.01)
        client.disconnect()
        server = hs.server(0)
        client.setCallback(calls).connect("127.0.0.1", server.info()["localPort"])
        await until(client.connected)
        assert client.info()["isConnected"]


async def test_reads_wait_until_enough_callbacks_are_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_callbacks, "MAX_HELD", 700, raising=False)
    calls, go_on = Calls(), trio.Event()
    async with hammerspoon.open_sockets() as hs, connected(hs, fn=calls) as (client, peer):
        client.write("x", lambda tag: go_on.wait())
        for tag in range(3):
            client.write("x", tag, calls)
        await peer.recv_exactly(4)
        await trio.testing.wait_all_tasks_blocked(0.01)
        await peer.send(b"line\n")
        client.read("\n")
        assert await calls.none()
        go_on.set()
        assert [await calls.next() for _ in range(4)] == [(0,), (1,), (2,), (b"line\n", -1)]


async def test_startTLS_asked_for_often_costs_silent_clients_nothing() -> None:  # noqa: N802
    async with hammerspoon.open_sockets() as hs:
        server = hs.server(0, Calls())
        with raw_client(server):
            await until(server.connected)
            server.read("\n")
            with measured() as grown:
                for _ in range(2000):
                    server.startTLS(False)
            assert grown[0] < MIB
