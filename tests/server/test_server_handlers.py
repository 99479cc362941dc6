"""Handlers that fail, and peers that vanish from them: the server outlives both."""

from __future__ import annotations

import contextlib
import logging
import sys

import pytest
import trio
import trio.testing

import trisock
from helpers.pairs import all_served
from helpers.serving import connect
from trisock import Socket

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup, ExceptionGroup


async def test_what_a_handler_raises_is_logged_and_the_server_lives(
    log: pytest.LogCaptureFixture,
) -> None:
    async def handler(sock: Socket) -> None:
        if await sock.recv() == b"fail":
            await sock.send(b"an answer before the fault")
            raise ValueError("the fault")
        await sock.send(b"fine")

    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, handler)
        async with await connect(server) as client:
            await client.send(b"fail")
            assert await client.recv() == b"an answer before the fault"
            assert await client.recv() == b""
            where = str(client.getlocal())
        async with await connect(server) as client:
            await client.send(b"work")
            assert await client.recv() == b"fine"
        server.stop()
        await server.wait_closed()
        assert server.stats() == trisock.ServerStats(accepted=2, handler_errors=1)
    (record,) = [each for each in log.records if each.levelno >= logging.ERROR]
    assert record.name == "trisock.server"
    assert where in record.getMessage()
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], ValueError)


async def test_a_group_of_exceptions_is_logged_as_one(log: pytest.LogCaptureFixture) -> None:
    async def handler(sock: Socket) -> None:
        async def fail(error: Exception) -> None:
            raise error

        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail, ValueError("one"))
            nursery.start_soon(fail, KeyError("two"))

    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, handler)
        async with await connect(server) as client:
            assert await client.recv() == b""
        server.stop()
        await server.wait_closed()
        assert server.stats().handler_errors == 1
    (record,) = [each for each in log.records if each.levelno >= logging.ERROR]
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], ExceptionGroup)


async def test_a_handler_that_fails_while_cancelled_is_logged_and_cancelled(
    log: pytest.LogCaptureFixture,
) -> None:
    """It raises a group of both kinds, which ``except Exception`` does not see."""

    async def handler(sock: Socket) -> None:
        async def fail_in_the_end() -> None:
            try:
                await trio.sleep_forever()
            finally:
                raise ValueError("while being cancelled")

        async with trio.open_nursery() as inner:
            inner.start_soon(fail_in_the_end)
            inner.start_soon(trio.sleep_forever)

    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, handler)
        client = await connect(server)
        while not server.connections:
            await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    client.abort()
    assert nursery.cancel_scope.cancelled_caught
    assert server.stats().handler_errors == 1
    (record,) = [each for each in log.records if each.levelno >= logging.ERROR]
    assert "ValueError" in str(record.exc_info)
    assert "Cancelled" not in str(record.exc_info)


@pytest.mark.parametrize("wrapped", [False, True])
async def test_what_is_no_exception_of_a_handler_ends_the_server(wrapped: bool) -> None:
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
async def test_a_peer_that_vanished_is_not_worth_a_traceback(
    grouped: bool, log: pytest.LogCaptureFixture
) -> None:
    async def handler(sock: Socket) -> None:
        if grouped:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(sock.recv)
        else:
            await sock.recv()

    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, handler)
        client = await connect(server)
        while not server.connections:
            await trio.lowlevel.checkpoint()
        client.abort()
        while server.connections:
            await trio.lowlevel.checkpoint()
        server.stop()
        await server.wait_closed()
        assert server.stats() == trisock.ServerStats(accepted=1, peer_errors=1)
    assert not [each for each in log.records if each.levelno > logging.INFO]
    assert any("closed the connection with" in each.getMessage() for each in log.records)


async def test_somebody_elses_broken_connection_is_worth_one(
    log: pytest.LogCaptureFixture,
) -> None:
    async def handler(sock: Socket) -> None:
        raise trio.BrokenResourceError("the database has gone away")

    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, handler)
        async with await connect(server) as client:
            await client.recv()
        server.stop()
        await server.wait_closed()
        assert server.stats().handler_errors == 1
    assert [each for each in log.records if each.levelno == logging.ERROR]


async def test_a_socket_that_the_handler_has_closed_is_its_mistake(
    log: pytest.LogCaptureFixture,
) -> None:
    async def handler(sock: Socket) -> None:
        await sock.close()
        await sock.recv()

    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, handler)
        async with await connect(server) as client:
            await client.recv()
        await all_served(server, 1)
        assert server.stats().handler_errors == 1
        server.stop()
    assert [each for each in log.records if each.levelno == logging.ERROR]


async def test_a_handler_may_close_its_socket_itself() -> None:
    async def handler(sock: Socket) -> None:
        await sock.close()

    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, handler)
        async with await connect(server) as client:
            assert await client.recv() == b""
        server.stop()


async def test_a_client_that_leaves_within_a_line_makes_no_traceback(
    log: pytest.LogCaptureFixture,
) -> None:
    async def handler(sock: Socket) -> None:
        async for _ in sock.lines():
            raise AssertionError

    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, handler)
        async with await connect(server) as client:
            await client.send(b"QUI")
        await all_served(server, 1)
        assert server.stats() == trisock.ServerStats(accepted=1, peer_errors=1)
        server.stop()
    assert not [each for each in log.records if each.levelno > logging.INFO]


async def test_a_peer_that_vanishes_from_several_tasks_makes_no_traceback(
    log: pytest.LogCaptureFixture,
) -> None:
    async def handler(sock: Socket) -> None:
        async def write() -> None:
            while True:
                await sock.send(b"x" * 100_000)

        async with trio.open_nursery() as inner:
            inner.start_soon(sock.recv)
            inner.start_soon(write)

    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, handler)
        for _ in range(10):
            client = await connect(server)
            await client.recv()
            client.abort()
        await all_served(server, 10)
        server.stop()
        await server.wait_closed()
        assert server.stats() == trisock.ServerStats(accepted=10, peer_errors=10)


async def test_send_eof_to_a_vanished_peer_fails_only_that_connection() -> None:
    async def handler(sock: Socket) -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            while True:
                await sock.send(b"x" * 100_000)
        await sock.send_eof()

    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, handler)
        client = await connect(server)
        await client.recv()
        client.abort()
        await all_served(server, 1)
        server.stop()
        await server.wait_closed()
        assert server.stats() == trisock.ServerStats(accepted=1, peer_errors=1)
