"""The recipe connection_pool."""

from __future__ import annotations

import contextlib
import functools
import random
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

import trisock
from helpers.blocked import cancel_when_blocked
from helpers.cancellation import Attempt, at_every_cancel_point
from helpers.examples import command, load, running
from helpers.pairs import all_served
from helpers.programs import run
from helpers.server import bound
from trisock import ClientTLS, ServerTLS, Socket

Pool = load("connection_pool").Pool

# The TLS roles of the client and of the server, or None for plain text.
Roles = tuple[ClientTLS | None, ServerTLS | None]

PEER_ENDED = (trio.BrokenResourceError, trisock.IncompleteReadError)


@pytest.fixture(params=["plain", "tls"])
def roles(request: pytest.FixtureRequest, client_tls: ClientTLS, server_tls: ServerTLS) -> Roles:
    return (client_tls, server_tls) if request.param == "tls" else (None, None)


async def answer(sock: Socket) -> None:
    with contextlib.suppress(trio.ClosedResourceError, *PEER_ENDED):
        async for line in sock.lines():
            await sock.send(b"you said ", line, b"\n")


@asynccontextmanager
async def pooled(
    roles: Roles, size: int = 1, handler: trisock.Handler = answer
) -> AsyncIterator[tuple[Any, trisock.Server]]:
    client_tls, server_tls = roles
    async with bound(handler, host="127.0.0.1", tls=server_tls) as server:
        connect = functools.partial(trisock.connect, "127.0.0.1", server.port, tls=client_tls)
        async with Pool(connect, size) as pool:
            yield pool, server


async def ask(pool: Any, question: bytes = b"hello") -> int:
    """Ask a question, check the answer, and return the connection's local port."""
    async with pool.connection() as sock:
        await sock.send(question, b"\n")
        assert await sock.recv_line() == b"you said " + question
        port: int = sock.getlocal().port
        return port


async def test_an_idle_connection_is_used_again(roles: Roles) -> None:
    async with pooled(roles, size=3) as (pool, server):
        assert len({await ask(pool) for _ in range(5)}) == 1
        assert server.stats().accepted == 1


async def test_many_tasks_share_the_allowed_number_of_connections(roles: Roles) -> None:
    async with pooled(roles, size=3) as (pool, server):
        async with trio.open_nursery() as nursery:
            for number in range(50):
                nursery.start_soon(ask, pool, b"%d" % number)
        assert server.stats().accepted == 3


async def test_connections_are_lent_in_the_order_of_the_calls() -> None:
    async with pooled((None, None)) as (pool, _):
        order = []

        async def borrow(number: int) -> None:
            async with pool.connection():
                order.append(number)

        async with trio.open_nursery() as nursery, pool.connection():
            for number in range(5):
                nursery.start_soon(borrow, number)
                await trio.testing.wait_all_tasks_blocked()
            assert order == []
        assert order == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("what", ["close", "reset", "fin", "unasked bytes"])
async def test_an_idle_connection_that_became_unusable_is_replaced(roles: Roles, what: str) -> None:
    async with pooled(roles) as (pool, server):
        before = await ask(pool)
        await trio.testing.wait_all_tasks_blocked()  # the server's send has ended
        (peer,) = server.connections
        async with trio.open_nursery() as nursery:
            if what == "close":
                nursery.start_soon(peer.close)
            elif what == "reset":
                peer.abort()
            elif what == "fin":
                peer.socket.shutdown(socket.SHUT_WR)
            else:
                await peer.send(b"unasked\n")
            await trio.lowlevel.wait_readable(pool._idle[0].socket)
            assert await ask(pool) != before
        assert server.stats().accepted == 2


async def test_a_connection_with_an_unread_answer_is_never_lent_again(roles: Roles) -> None:
    async with pooled(roles) as (pool, server):
        async with pool.connection() as sock:
            await sock.send(b"one\ntwo\n")
            assert await sock.recv_line() == b"you said one"
            assert await sock.peek(wait=True) == b"you said two\n"
        await ask(pool)
        assert server.stats().accepted == 2


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
async def test_an_exception_in_the_block_drops_the_connection(
    roles: Roles, error: type[BaseException]
) -> None:
    async with pooled(roles) as (pool, server):
        with pytest.raises(error):
            async with pool.connection():
                raise error
        await all_served(server, 1)
        await ask(pool)
        assert server.stats().accepted == 2


async def test_a_timeout_around_the_block_drops_the_connection(roles: Roles) -> None:
    async def read_until_silence(pool: Any) -> None:
        async with pool.connection() as sock:
            await sock.recv()

    async with pooled(roles) as (pool, server):
        await ask(pool)
        await cancel_when_blocked(read_until_silence, pool)
        await all_served(server, 1)
        await ask(pool)
        assert server.stats().accepted == 2


async def never_read(sock: Socket) -> None:
    with contextlib.suppress(trio.ClosedResourceError):
        await trio.sleep_forever()


async def test_a_send_that_was_cut_short_drops_the_connection(roles: Roles) -> None:
    async with pooled(roles, handler=never_read) as (pool, server):
        async with pool.connection() as sock:
            await cancel_when_blocked(sock.send, b"x" * 30_000_000)
        async with pool.connection() as sock:
            await sock.send(b"another connection")
        assert server.stats().accepted == 2
        server.stop(grace=0)


async def test_a_connection_that_the_block_closed_is_replaced(roles: Roles) -> None:
    async with pooled(roles) as (pool, server):
        async with pool.connection() as sock:
            await sock.close()
        await ask(pool)
        assert server.stats().accepted == 2


async def test_a_wait_that_is_cancelled_takes_no_slot() -> None:
    async with pooled((None, None)) as (pool, server):
        async with pool.connection():
            await cancel_when_blocked(ask, pool)
        await ask(pool)
        assert server.stats().accepted == 1


async def test_a_failed_connect_takes_no_slot(free_port: int) -> None:
    async with Pool(functools.partial(trisock.connect, "127.0.0.1", free_port), 1) as pool:
        for _ in range(3):
            with pytest.raises(ConnectionRefusedError):
                async with pool.connection():
                    pass


@at_every_cancel_point
async def test_a_cancelled_request_frees_its_slot(roles: Roles, attempt: Attempt) -> None:
    async with pooled(roles, size=2) as (pool, server):
        await ask(pool)
        (peer,) = server.connections
        peer.abort()  # the call finds this connection broken, and connects again
        await trio.lowlevel.wait_readable(pool._idle[0].socket)
        await attempt(lambda: ask(pool))
        async with trio.open_nursery() as nursery:  # both slots are free
            for _ in range(2):
                await nursery.start(hold, pool)
            nursery.cancel_scope.cancel()


async def hold(pool: Any, task_status: trio.TaskStatus[None]) -> None:
    async with pool.connection():
        task_status.started()
        await trio.sleep_forever()


async def test_leaving_the_pool_closes_idle_connections_cleanly(roles: Roles) -> None:
    ends = []

    async def note_the_end(sock: Socket) -> None:
        await answer(sock)
        ends.append(await sock.recv())  # with TLS, this returns b"" only after close_notify

    client_tls, server_tls = roles
    async with bound(note_the_end, host="127.0.0.1", tls=server_tls) as server:
        connect = functools.partial(trisock.connect, "127.0.0.1", server.port, tls=client_tls)
        async with Pool(connect, 2) as pool:
            async with pool.connection():
                await ask(pool)
    assert ends == [b"", b""]


async def test_leaving_the_pool_when_cancelled_closes_all_connections(roles: Roles) -> None:
    async with pooled(roles, size=2) as (_, server):
        with trio.CancelScope() as scope:
            connect = functools.partial(trisock.connect, "127.0.0.1", server.port, tls=roles[0])
            async with Pool(connect, 2) as pool:
                async with pool.connection():
                    await ask(pool)
                assert len(pool._idle) == 2
                scope.cancel()
        await all_served(server, 2)


async def test_a_closed_pool_lends_nothing_and_keeps_nothing() -> None:
    async with pooled((None, None), size=2) as (outer, server):
        connect = functools.partial(trisock.connect, "127.0.0.1", server.port)
        async with trio.open_nursery() as nursery:
            async with Pool(connect, 1) as pool:
                lent = pool.connection()
                await lent.__aenter__()
                nursery.start_soon(expect_closed, pool)  # waits for the slot
                await trio.testing.wait_all_tasks_blocked()
            await lent.__aexit__(None, None, None)
            await expect_closed(pool)
        await all_served(server, 1)
        assert not outer._idle


async def expect_closed(pool: Any) -> None:
    with pytest.raises(trio.ClosedResourceError):
        async with pool.connection():
            pass


async def whimsical(sock: Socket) -> None:
    """Answer lines. Sometimes close, reset, truncate an answer, or send too much."""
    with contextlib.suppress(trio.ClosedResourceError, *PEER_ENDED):
        async for line in sock.lines():
            match random.randrange(8):
                case 0:
                    await sock.send(b"you said ", line, b"\n")
                    return
                case 1:
                    await sock.send(b"you said ", line, b"\n")
                    sock.abort()
                case 2:
                    await sock.send(b"you s")
                    return
                case 3:
                    await sock.send(b"you said ", line, b"\nyou said too much\n")
                case _:
                    await sock.send(b"you said ", line, b"\n")


async def ask_impatiently(pool: Any, question: bytes, answers: list[bytes]) -> None:
    async def lose_patience() -> None:
        for _ in range(random.randrange(200)):
            await trio.lowlevel.checkpoint()
        if random.random() < 0.3:
            nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(lose_patience)
        with contextlib.suppress(*PEER_ENDED):
            await ask(pool, question)
            answers.append(question)


@pytest.mark.chance
async def test_no_task_reads_the_answer_of_another(roles: Roles, times: int) -> None:
    for _ in range(3 * times):
        answers: list[bytes] = []
        async with pooled(roles, size=4, handler=whimsical) as (pool, server):
            async with trio.open_nursery() as nursery:
                for number in range(100):
                    nursery.start_soon(ask_impatiently, pool, b"%d" % number, answers)
            assert len(pool._idle) <= 4
        assert answers
        assert server.stats().active == 0


async def test_a_busy_connection_is_not_lent() -> None:
    async with pooled((None, None)) as (pool, server):
        async with trio.open_nursery() as nursery:
            async with pool.connection() as sock:
                nursery.start_soon(read_to_the_end, sock)  # a mistake: the task outlives the block
                await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(trio.BusyResourceError):
                await ask(pool)
        await ask(pool)
        assert server.stats().accepted == 2


async def read_to_the_end(sock: Socket) -> None:
    with pytest.raises(trio.ClosedResourceError):
        await sock.recv()


async def test_the_program_sends_lines_over_few_connections() -> None:
    lines = [f"line {number}" for number in range(20)]
    async with running("echo_server") as server:
        result = await run(
            *command("connection_pool", "--port", str(server.port), "--size", "3", *lines)
        )
    assert (result.returncode, result.stderr) == (0, b"")
    printed = [line.split(": ") for line in result.stdout.decode().splitlines()]
    assert sorted(answered for _, answered in printed) == sorted(lines)
    assert len({port for port, _ in printed}) <= 3


async def test_the_program_reports_a_server_that_hangs_up() -> None:
    async def hang_up(sock: Socket) -> None:
        await sock.recv_line()

    async with bound(hang_up, host="127.0.0.1") as server:
        result = await run(*command("connection_pool", "--port", str(server.port), "one", "two"))
    assert (result.returncode, result.stdout) == (1, b"")
    assert sorted(line[:4] for line in result.stderr.decode().splitlines()) == ["one:", "two:"]
