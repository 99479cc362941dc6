"""faults: a relay that simulates a bad network."""

from __future__ import annotations

import contextlib
import random
import select
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio
import trio.testing

import trisock
from helpers.pairs import closing, read_all
from helpers.server import echo
from trisock import ClientTLS, ServerTLS, Socket
from trisock.testing import FaultyRelay, faults, serving
from trisock.testing._fault_plan import ConnectionPlan

OFF: dict[str, Any] = dict.fromkeys(("split", "delay", "truncate", "reset", "inject"), False)

INJECTED = FaultyRelay.injected

DATA = random.Random(1).randbytes(300_000)


@contextlib.asynccontextmanager
async def relayed(handler: trisock.Handler, **options: Any) -> AsyncIterator[FaultyRelay]:
    """Run a server behind a relay. All faults are off, except for those in ``options``."""
    async with serving(handler) as s, faults(s.server.port, **{**OFF, **options}) as relay:
        yield relay


async def join(relay: FaultyRelay) -> Socket:
    return await trisock.connect("127.0.0.1", relay.port)


async def exchange(sock: Socket, data: bytes) -> bytes:
    """Send data and EOF. Return all data that arrives before EOF or an error."""
    received = b""
    async with closing(sock), trio.open_nursery() as nursery:

        @nursery.start_soon
        async def send() -> None:
            with contextlib.suppress(trio.BrokenResourceError):
                await sock.send(data)
                await sock.send_eof()

        with contextlib.suppress(trio.BrokenResourceError):
            async for chunk in sock:
                received += chunk
    return received


# ---- the plan ----


def plan(number: int = 0, seed: int = 0, **options: Any) -> ConnectionPlan:
    return ConnectionPlan(seed, number, **{**OFF, **options})


def outcome(given: ConnectionPlan, data: bytes, largest: int) -> tuple[bytes, list[int], bool]:
    """Feed data in chunks. Return the output, the offsets of its pauses, and ``is_cut``."""
    rng = random.Random(largest)
    result, pauses = b"", []
    while data and not given.up.is_cut:
        size = rng.randint(1, largest)
        chunk, data = data[:size], data[size:]
        for piece in given.up.feed(chunk):
            if piece.passes:
                pauses.append(len(result))
            result += piece.data
    return result, pauses, given.up.is_cut


@pytest.mark.parametrize("number", range(20))
def test_faults_do_not_depend_on_how_the_data_arrives(number: int) -> None:
    data = b"EHLO me\r\nStartTLS\r\nNOOP\r\n" + DATA[:20_000]
    everything = dict.fromkeys(OFF, True)
    expected = outcome(plan(number, **everything), data, len(data))
    for largest in (1, 2, 10, 100, 3000):
        assert outcome(plan(number, **everything), data, largest) == expected


def test_pieces_end_at_the_same_offsets_however_the_data_arrives() -> None:
    def ends(chunks: list[bytes]) -> set[int]:
        direction, at, found = plan(split=True).up, 0, set()
        for chunk in chunks:
            for piece in direction.feed(chunk):
                at += len(piece.data)
                found.add(at)
        return found

    whole = ends([DATA])
    assert len(whole) > 200
    assert whole <= ends([DATA[:50], DATA[50:1000], DATA[1000:]])


def test_other_faults_do_not_change_where_a_connection_is_cut() -> None:
    for number in range(20):
        alone = outcome(plan(number, truncate=True), DATA, 5000)
        result, _, cut = outcome(plan(number, truncate=True, split=True, delay=True), DATA, 5000)
        assert (result, cut) == (alone[0], alone[2])


def test_half_of_the_connections_are_cut_at_various_offsets() -> None:
    plans = [plan(number, truncate=True, reset=True) for number in range(400)]
    offsets = []
    for each in plans:
        for direction in (each.up, each.down):
            sent = (
                sum(len(piece.data) for piece in direction.feed(DATA)) if not each.is_cut() else 0
            )
            if direction.is_cut:
                offsets.append(sent)
                break
    assert 150 < len(offsets) < 250
    assert offsets.count(0) > 5
    assert max(offsets) < 4096
    assert 32 < sorted(offsets)[len(offsets) // 2] < 128
    assert {each.cut for each in plans} == {"truncate", "reset"}


def test_sleeps_are_short_and_few() -> None:
    direction = plan(delay=True).up
    sleeps = [piece.seconds for piece in direction.feed(DATA * 10) if piece.seconds]
    assert len(sleeps) == 16
    assert all(0.001 <= each <= 0.01 for each in sleeps)


@pytest.mark.parametrize(
    "command", [b"STARTTLS\r\n", b"a1 starttls\n", b"STLS\r\n", b"AUTH TLS\r\n"]
)
def test_injected_line_follows_the_command_that_starts_tls(command: bytes) -> None:
    attacked = set()
    for number in range(20):
        given = plan(number, inject=True, split=True)
        result = b"".join(
            piece.data for piece in given.up.feed(b"CAPA\r\n" + command + b"more\r\n")
        )
        reply = b"".join(piece.data for piece in given.down.feed(b"+OK\r\n+OK\r\n"))
        where = (result.find(INJECTED), reply.find(INJECTED))
        assert where in [(6 + len(command), -1), (-1, 5)]
        attacked.add(where)
    assert len(attacked) == 2


def test_injected_line_is_in_the_same_piece_as_the_command() -> None:
    given = next(each for each in (plan(n, inject=True) for n in range(9)) if each.up.reply is None)
    pieces = [piece.data for piece in given.up.feed(b"EHLO me\r\nSTARTTLS\r\n")]
    assert pieces == [b"EHLO me\r\n", b"STARTTLS\r\n" + INJECTED]


def test_nothing_is_injected_where_no_line_starts_tls() -> None:
    for data in (b"EHLO me\r\nQUIT\r\n", b"\x16\x03\x01 TLS\n", b"x" * 5000 + b"TLS\n"):
        for number in range(5):
            assert outcome(plan(number, inject=True), data, 7)[0] == data


# ---- the relay ----


async def test_data_passes_unchanged_in_both_directions() -> None:
    async with relayed(echo, split=True, delay=True) as relay:
        assert await exchange(await join(relay), DATA) == DATA


async def test_split_and_delay_are_on_by_default() -> None:
    chunks = []

    async def count(sock: Socket) -> None:
        async for chunk in sock:
            chunks.append(chunk)

    async with serving(count) as s, faults(s.server.port) as relay:
        await exchange(await join(relay), DATA[:20_000])
    assert b"".join(chunks) == DATA[:20_000]
    assert len(chunks) > 4  # the kernel coalesces some pieces
    assert min(map(len, chunks)) <= 4


async def test_delays_take_no_time_with_autojump_clock(autojump_clock: object) -> None:
    async with relayed(echo, delay=True) as relay:
        before = trio.current_time()
        assert await exchange(await join(relay), DATA) == DATA
        assert 0 < trio.current_time() - before < 1


async def test_data_before_and_after_a_pause_arrives_separately(autojump_clock: object) -> None:
    chunks = []

    async def count(sock: Socket) -> None:
        async for chunk in sock:
            chunks.append(chunk)

    async with relayed(count, delay=True) as relay:
        await exchange(await join(relay), DATA)
    pauses = sum(piece.passes > 0 for piece in plan(delay=True).up.feed(DATA))
    assert len(chunks) > 0.9 * pauses > 100  # without pauses, sends arrive 16 at a time


async def test_same_seed_cuts_the_same_connections_again() -> None:
    async def arrivals(seed: int) -> list[bytes]:
        received: list[bytes] = []

        async def keep(sock: Socket) -> None:
            data = b""
            with contextlib.suppress(trio.BrokenResourceError):
                async for chunk in sock:
                    data += chunk
            received.append(data)

        async with relayed(keep, seed=seed, truncate=True, split=True) as relay:
            for _ in range(20):
                async with closing(sock := await join(relay)):
                    await exchange(sock, DATA[:5000])
        return received

    first = await arrivals(1)
    assert len(first) == 20
    assert first == await arrivals(1)
    assert first != await arrivals(2)
    assert all(DATA.startswith(each) for each in first)
    assert {len(each) < 5000 for each in first} == {True, False}


def first_cut(kind: str, where: str) -> int:
    """Return a seed whose first connection is cut in this direction, after at least one byte."""
    for seed in range(1000):
        given = plan(seed=seed, **{kind: True})
        direction = getattr(given, where)
        if not given.is_cut() and sum(len(each.data) for each in direction.feed(DATA)) < len(DATA):
            return seed
    raise AssertionError


@pytest.mark.parametrize("where", ["up", "down"])
async def test_truncation_ends_both_sides_cleanly(where: str) -> None:
    ended: list[bool] = []

    async def serve(sock: Socket) -> None:
        await sock.send(DATA[:5000])
        async for _ in sock:
            pass
        ended.append(True)

    async with relayed(serve, truncate=True, seed=first_cut("truncate", where)) as relay:
        async with closing(sock := await join(relay)):
            await sock.send(DATA[:5000])
            received = await read_all(sock)
    assert DATA[:5000].startswith(received)
    assert (len(received) < 5000) == (where == "down")
    assert ended == [True]


@pytest.mark.parametrize("where", ["up", "down"])
async def test_reset_breaks_both_sides(where: str) -> None:
    broken: list[bool] = []

    async def serve(sock: Socket) -> None:
        try:
            await sock.send(DATA[:5000])
            await read_all(sock)
        except trio.BrokenResourceError:
            broken.append(True)

    async with relayed(serve, reset=True, seed=first_cut("reset", where)) as relay:
        async with closing(sock := await join(relay)):
            with pytest.raises(trio.BrokenResourceError):
                await sock.send(DATA[:5000])
                await read_all(sock)
    assert broken == [True]


async def test_truncated_tls_lacks_close_notify(
    client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    async def serve(sock: Socket) -> None:
        await sock.starttls(server_tls)
        await sock.send(DATA[:5000])

    failures = 0
    async with relayed(serve, truncate=True) as relay:
        for _ in range(20):
            async with closing(sock := await join(relay)):
                try:
                    await sock.starttls(client_tls)
                    await read_all(sock)
                except trisock.TLSError:
                    failures += 1
    assert 3 < failures < 17


async def upgrade(sock: Socket, tls: ServerTLS) -> None:
    """Upgrade as a server that is safe: STARTTLS must be the last line in plain text."""
    async for line in sock.lines():
        await sock.send(b"ok " + line + b"\n")
        if line.strip() == b"STARTTLS":
            await sock.starttls(tls)


async def test_injection_makes_the_handshake_fail(
    client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    async with relayed(lambda sock: upgrade(sock, server_tls), inject=True) as relay:
        for _ in range(8):  # in about half of the connections, the line follows the server's reply
            async with closing(sock := await join(relay)):
                await sock.send(b"STARTTLS\r\n")
                assert await sock.recv_until(b"\n") == b"ok STARTTLS\r\n"
                with pytest.raises(trisock.TLSError):
                    await sock.starttls(client_tls)


async def test_half_close_passes_through() -> None:
    async def answer(sock: Socket) -> None:
        await sock.send(b"you sent " + await read_all(sock))

    async with relayed(answer) as relay:
        assert await exchange(await join(relay), b"hi") == b"you sent hi"


@pytest.mark.parametrize("side", ["client", "server"])
async def test_reset_of_one_side_reaches_the_other(side: str) -> None:
    socks: list[Socket] = []
    both = trio.Event()
    broken = trio.Event()

    async def use(sock: Socket) -> None:
        try:
            await sock.recv()
        except trio.BrokenResourceError:
            broken.set()
        except trio.ClosedResourceError:
            pass

    async def serve(sock: Socket) -> None:
        socks.append(sock)
        both.set()
        await use(sock)

    async with relayed(serve) as relay, closing(client := await join(relay)):
        async with trio.open_nursery() as nursery:
            await both.wait()
            nursery.start_soon(use, client)
            await trio.testing.wait_all_tasks_blocked()
            (client if side == "client" else socks[0]).abort()
            await broken.wait()


async def test_failed_send_resets_the_sender() -> None:
    leave, left = trio.Event(), trio.Event()

    async def end_and_reset(sock: Socket) -> None:
        await sock.send_eof()
        await leave.wait()
        sock.abort()
        left.set()

    async with relayed(end_and_reset) as relay, closing(sock := await join(relay)):
        assert await sock.recv() == b""  # after this EOF, the relay no longer reads from the server
        leave.set()
        await left.wait()
        await sock.send(b"x")
        poll = select.poll()
        poll.register(sock.fileno(), 0)  # POLLERR is always reported: here, a reset
        while not poll.poll(0):
            await trio.lowlevel.checkpoint()


async def test_receiver_that_does_not_read_stops_the_sender() -> None:
    done = trio.Event()
    async with relayed(lambda sock: done.wait()) as relay:
        async with closing(sock := await join(relay)), trio.open_nursery() as nursery:
            sent = 0

            @nursery.start_soon
            async def send() -> None:
                nonlocal sent
                while True:
                    await sock.send(bytes(65536))
                    sent += 65536

            await trio.testing.wait_all_tasks_blocked(0.05)
            assert sent < 64 * 1024 * 1024
            nursery.cancel_scope.cancel()
        done.set()


async def test_leaving_the_block_ends_all_connections() -> None:
    async with serving(echo) as s:
        async with faults(s.server.port) as relay:
            sock = await join(relay)
            await sock.send(b"x")
            assert await sock.recv() == b"x"
        async with closing(sock):
            with contextlib.suppress(trio.BrokenResourceError):
                assert await sock.recv() == b""
            with pytest.raises(OSError, match="cannot connect"):
                await join(relay)
    assert s.server.stats().active == 0


async def test_error_in_the_block_is_raised_unchanged() -> None:
    async with serving(echo) as s:
        with pytest.raises(ValueError, match="mine"):
            async with faults(s.server.port) as relay, closing(await join(relay)):
                raise ValueError("mine")


async def test_cancelled_block_closes_everything() -> None:
    async with serving(echo) as s:
        with trio.CancelScope() as scope:
            async with faults(s.server.port) as relay, closing(await join(relay)):
                scope.cancel()
                await trio.lowlevel.checkpoint()
        assert scope.cancelled_caught


async def test_refused_connection_is_reset() -> None:
    listener = trisock.listen_nowait(0, host="127.0.0.1")
    listener.abort()
    async with faults(listener.port) as relay, closing(sock := await join(relay)):
        with pytest.raises(trio.BrokenResourceError):
            await sock.recv()


async def test_wrong_arguments_start_nothing() -> None:
    for arguments in (
        {"port": "80"},
        {"port": 80, "seed": 1.5},
        {"port": 80, "split": 1},
        {"port": True},
    ):
        with pytest.raises(TypeError, match=r"must be an? (int|bool), not"):
            async with faults(**arguments):
                pass
