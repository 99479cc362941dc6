"""A server survives handlers that fail and peers that vanish."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Awaitable, Callable

import pytest
import trio

import trisock
from helpers.server import bound, connect, connected, logged
from trisock import Socket
from trisock.testing import serving

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup, ExceptionGroup


async def test_a_handlers_exception_is_logged_and_the_server_continues(
    log: pytest.LogCaptureFixture,
) -> None:
    async def handler(sock: Socket) -> None:
        if await sock.recv() == b"fail":
            await sock.send(b"an answer before the fault")
            raise ValueError("the fault")
        await sock.send(b"fine")

    async with bound(handler) as server:
        async with await connect(server) as client:
            await client.send(b"fail")
            assert await client.recv() == b"an answer before the fault"
            assert await client.recv() == b""
            where = str(client.getlocal())
        async with await connect(server) as client:
            await client.send(b"work")
            assert await client.recv() == b"fine"
    assert server.stats() == trisock.ServerStats(accepted=2, handler_errors=1)
    (record,) = logged(log, logging.ERROR)
    assert record.name == "trisock.server"
    assert where in record.getMessage()
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], ValueError)


async def test_an_exception_group_is_logged_once(log: pytest.LogCaptureFixture) -> None:
    async def handler(sock: Socket) -> None:
        async def fail(error: Exception) -> None:
            raise error

        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail, ValueError("one"))
            nursery.start_soon(fail, KeyError("two"))

    async with bound(handler) as server, await connect(server) as client:
        assert await client.recv() == b""
    assert server.stats().handler_errors == 1
    (record,) = logged(log, logging.ERROR)
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], ExceptionGroup)


async def test_a_handlers_error_during_cancellation_is_logged(
    log: pytest.LogCaptureFixture,
) -> None:
    """The handler raises a group that contains a ``Cancelled``.

    ``except Exception`` does not catch such a group.
    """

    async def handler(sock: Socket) -> None:
        async def fail_when_cancelled() -> None:
            try:
                await trio.sleep_forever()
            finally:
                raise ValueError("while being cancelled")

        async with trio.open_nursery() as inner:
            inner.start_soon(fail_when_cancelled)
            inner.start_soon(trio.sleep_forever)

    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, handler)
        async with connected(server):
            nursery.cancel_scope.cancel()
    assert nursery.cancel_scope.cancelled_caught
    assert server.stats().handler_errors == 1
    (record,) = logged(log, logging.ERROR)
    assert "ValueError" in str(record.exc_info)
    assert "Cancelled" not in str(record.exc_info)


@pytest.mark.parametrize("wrapped", [False, True])
async def test_a_base_exception_from_a_handler_ends_the_server(wrapped: bool) -> None:
    class Stop(BaseException):
        pass

    async def handler(sock: Socket) -> None:
        if wrapped:
            raise BaseExceptionGroup("both", [ValueError("logged"), Stop()])
        raise Stop

    with pytest.RaisesGroup(Stop, flatten_subgroups=True):
        async with trio.open_nursery() as nursery:
            server = await trisock.bind(nursery, 0, handler)
            client = await connect(server)
            await trio.sleep_forever()
    client.abort()
    assert server.closing.is_set()
    await server.wait_closed()
    assert server.stats().handler_errors == (1 if wrapped else 0)


@pytest.mark.parametrize("grouped", [False, True])
async def test_a_vanished_peer_is_logged_without_a_traceback(
    grouped: bool, log: pytest.LogCaptureFixture
) -> None:
    async def handler(sock: Socket) -> None:
        if grouped:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(sock.recv)
        else:
            await sock.recv()

    async with serving(handler) as s:
        (await s.connect()).abort()
    assert s.server.stats() == trisock.ServerStats(accepted=1, peer_errors=1)
    assert not logged(log, logging.WARNING)
    assert any("closed the connection with" in each.getMessage() for each in log.records)


async def use_another_broken_connection(_: Socket) -> None:
    raise trio.BrokenResourceError("the connection to the database is broken")


async def use_the_socket_after_a_close(sock: Socket) -> None:
    await sock.close()
    await sock.recv()


async def set_a_deadline_of_its_own(sock: Socket) -> None:
    with trio.fail_after(0):
        await sock.recv()


@pytest.mark.parametrize(
    "handler",
    [use_another_broken_connection, use_the_socket_after_a_close, set_a_deadline_of_its_own],
)
async def test_an_error_not_caused_by_the_peer_is_logged(
    handler: Callable[[Socket], Awaitable[None]], log: pytest.LogCaptureFixture
) -> None:
    async with bound(handler) as server, await connect(server) as client:
        assert await client.recv() == b""
    assert server.stats() == trisock.ServerStats(accepted=1, handler_errors=1)
    assert logged(log, logging.ERROR)


async def test_a_handler_may_close_its_socket_itself() -> None:
    async def handler(sock: Socket) -> None:
        await sock.close()

    async with serving(handler) as s, await s.connect() as client:
        assert await client.recv() == b""
    assert s.server.stats() == trisock.ServerStats(accepted=1)


async def send_forever(sock: Socket) -> None:
    while True:
        await sock.send(b"x" * 100_000)


async def test_a_reset_seen_by_two_tasks_is_logged_without_traceback(
    log: pytest.LogCaptureFixture,
) -> None:
    async def handler(sock: Socket) -> None:
        async with trio.open_nursery() as inner:
            inner.start_soon(sock.recv)
            inner.start_soon(send_forever, sock)

    async with serving(handler) as s:
        for _ in range(10):
            client = await s.connect()
            await client.recv()
            client.abort()
    assert s.server.stats() == trisock.ServerStats(accepted=10, peer_errors=10)
    assert not logged(log, logging.WARNING)


async def test_send_eof_to_a_vanished_peer_fails_only_that_connection() -> None:
    async def handler(sock: Socket) -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            await send_forever(sock)
        await sock.send_eof()

    async with serving(handler) as s:
        client = await s.connect()
        await client.recv()
        client.abort()
    assert s.server.stats() == trisock.ServerStats(accepted=1, peer_errors=1)
