"""The recipe many_writers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from helpers.blocked import cancel_when_blocked
from helpers.examples import command, load, running
from helpers.pairs import closing, read_all, unix_pair
from helpers.programs import run
from helpers.raw_tls import upgrade
from trisock import ClientTLS, ServerTLS, Socket

recipe = load("many_writers")

LONG = b"x" * 1_000_000 + b"\n"  # more than the kernel's buffers hold


@pytest.fixture(params=["plain", "tls"])
async def ends(
    request: pytest.FixtureRequest, client_tls: ClientTLS, server_tls: ServerTLS
) -> AsyncIterator[tuple[Socket, Socket]]:
    a, b = unix_pair()
    async with closing(a, b):
        if request.param == "tls":
            await upgrade(a, client_tls, b, server_tls)
        yield a, b


@asynccontextmanager
async def sending(sock: Socket) -> AsyncIterator[trio.MemorySendChannel[bytes]]:
    """Run ``send_from``. When the block ends, close the channel and then the socket."""
    send_channel, receive_channel = trio.open_memory_channel[bytes](2)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(recipe.send_from, receive_channel, sock)
        async with send_channel:
            yield send_channel
    await sock.close()


async def test_a_second_writer_without_a_lock_is_refused(a: Socket) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(a.send, LONG)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError):
            await a.send(b"another message\n")
        nursery.cancel_scope.cancel()


async def send_from_many_tasks(sock: Socket, way: str) -> None:
    """Send ten long lines from each of five tasks, then close."""
    if way == "channel":
        async with sending(sock) as channel, trio.open_nursery() as nursery:
            for each in b"abcde":
                nursery.start_soon(write_lines, channel.send, each)
    else:
        sender = recipe.LockedSender(sock)
        async with trio.open_nursery() as nursery:
            for each in b"abcde":
                nursery.start_soon(write_lines, sender.send, each)
        await sock.close()


async def write_lines(send: Callable[[bytes], Awaitable[None]], letter: int) -> None:
    for number in range(10):
        await send(bytes([letter]) * 20_000 + b"%d\n" % number)


@pytest.mark.parametrize("way", ["channel", "lock"])
async def test_messages_of_many_tasks_arrive_whole_and_in_order(
    a: Socket, b: Socket, way: str
) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send_from_many_tasks, a, way)
        lines = (await read_all(b)).splitlines()
    assert len(lines) == 50
    for each in b"abcde":
        own = [line for line in lines if line[0] == each]
        assert own == [bytes([each]) * 20_000 + b"%d" % number for number in range(10)]


async def test_a_writer_cancelled_in_mid_send_sends_a_whole_message(a: Socket, b: Socket) -> None:
    async with trio.open_nursery() as nursery:

        async def write() -> None:
            async with sending(a) as channel:
                # send_from already has the message, and is not cancelled.
                await cancel_when_blocked(channel.send, LONG)
                await channel.send(b"after\n")

        nursery.start_soon(write)
        await trio.testing.wait_all_tasks_blocked()
        assert await read_all(b) == LONG + b"after\n"


async def test_a_writer_cancelled_while_it_waits_sends_nothing(a: Socket, b: Socket) -> None:
    async with trio.open_nursery() as nursery:

        async def write() -> None:
            async with sending(a) as channel:
                for number in range(3):  # one is being sent, two wait in the channel
                    await channel.send(b"%d" % number + LONG)
                    await trio.testing.wait_all_tasks_blocked()
                await cancel_when_blocked(channel.send, b"cancelled\n")
                full.set()
                await channel.send(b"after\n")

        full = trio.Event()
        nursery.start_soon(write)
        await full.wait()
        assert await read_all(b) == b"0" + LONG + b"1" + LONG + b"2" + LONG + b"after\n"


async def test_writers_learn_that_the_connection_broke(a: Socket, b: Socket) -> None:
    send_channel, receive_channel = trio.open_memory_channel[bytes](1)
    async with send_channel, trio.open_nursery() as nursery:

        async def send() -> None:
            with pytest.raises(trio.BrokenResourceError):
                await recipe.send_from(receive_channel, a)

        nursery.start_soon(send)
        await send_channel.send(LONG)
        await trio.testing.wait_all_tasks_blocked()
        await send_channel.send(b"waits in the channel")

        async def write() -> None:
            with pytest.raises(trio.BrokenResourceError):
                await send_channel.send(b"waits for the channel")

        nursery.start_soon(write)
        await trio.testing.wait_all_tasks_blocked()
        b.abort()


async def test_with_a_lock_a_cancelled_send_makes_other_sends_fail(a: Socket, b: Socket) -> None:
    sender = recipe.LockedSender(a)
    async with trio.open_nursery() as nursery:

        async def wait_for_the_lock() -> None:
            with pytest.raises(trio.BrokenResourceError, match="cut short"):
                await sender.send(b"after\n")

        sending = trio.CancelScope()

        async def be_cancelled() -> None:
            with sending:
                await sender.send(LONG)

        nursery.start_soon(be_cancelled)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(wait_for_the_lock)
        await trio.testing.wait_all_tasks_blocked()
        sending.cancel()


async def test_with_a_lock_a_cancelled_wait_changes_nothing(a: Socket, b: Socket) -> None:
    sender = recipe.LockedSender(a)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sender.send, LONG)
        await trio.testing.wait_all_tasks_blocked()
        await cancel_when_blocked(sender.send, b"never\n")
        nursery.start_soon(sender.send, b"after\n")
        await trio.testing.wait_all_tasks_blocked()
        assert await b.recv_exactly(len(LONG) + 6) == LONG + b"after\n"


@pytest.mark.parametrize("way", [[], ["--lock"]])
async def test_the_program_prints_every_line_of_every_writer(way: list[str]) -> None:
    async with running("echo_server") as server:
        options = ["--port", str(server.port), "--writers", "4", "--lines", "50", *way]
        result = await run(*command("many_writers", *options))
    assert (result.returncode, result.stderr) == (0, b"")
    lines = result.stdout.decode().splitlines()
    for writer in range(1, 5):
        own = [line for line in lines if line.startswith(f"writer {writer}:")]
        assert own == [f"writer {writer}: line {number}" for number in range(1, 51)]
    assert len(lines) == 200
