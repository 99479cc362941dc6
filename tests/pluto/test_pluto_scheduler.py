"""Pluto's bind and scheduler: servers that run inside Trio."""

from __future__ import annotations

import errno
import gc
import logging
import socket as stdlib
from collections.abc import Awaitable
from typing import Any

import pytest
import trio
import trio.testing

import trisock
from helpers.deadline import DEADLINE
from helpers.pluto import both_sides, echo, got, in_thread
from trisock.pluto import async_socket, listener, scheduler, socket

pytestmark = pytest.mark.usefixtures("bounded")  # some of these calls block


def client_of(port: int, *sent: bytes) -> bytes:
    """Send, and return all that comes until the end."""
    with stdlib.create_connection(("127.0.0.1", port), timeout=DEADLINE) as raw:
        for each in sent:
            raw.sendall(each)
        raw.shutdown(stdlib.SHUT_WR)
        return b"".join(iter(lambda: raw.recv(65536), b""))


@both_sides
async def test_bind_serves_each_client_in_a_task_of_its_own() -> None:
    sched = scheduler()
    entered = []

    async def handler(s: async_socket) -> None:
        entered.append(s)
        while len(entered) % 2:  # the first goes on when the second is there
            await trio.lowlevel.checkpoint()
        await s.send("together")

    bound = socket.bind(sched, 0, handler)
    assert isinstance(bound, listener)

    async def clients() -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(2):
                nursery.start_soon(talk)
        await bound.close()

    async def talk() -> None:
        assert await in_thread(lambda: client_of(bound.port)) == b"together"

    sched.add(clients)
    await got(sched.run())
    assert len(entered) == 2


@both_sides
async def test_bind_listens_at_once() -> None:
    sched = scheduler()
    bound = socket.bind(sched, 0, echo)
    with stdlib.create_connection(("127.0.0.1", bound.port), timeout=DEADLINE) as raw:
        raw.sendall(b"early")

        async def talk() -> None:
            assert await in_thread(lambda: raw.recv(100)) == b"early"
            raw.close()
            await bound.close()

        sched.add(talk)
        await got(sched.run())


@both_sides
async def test_bind_raises_oserror_where_the_port_is_taken() -> None:
    sched = scheduler()
    bound = socket.bind(sched, 0, echo)
    with pytest.raises(OSError, match=rf"cannot listen on \*:{bound.port}") as caught:
        socket.bind(sched, bound.port, echo)
    assert caught.value.errno == errno.EADDRINUSE
    await got(bound.close())


@both_sides
async def test_the_listener_of_bind_ends_the_server_after_its_handlers() -> None:
    sched = scheduler()
    order = []

    async def handler(s: async_socket) -> None:
        await bound.close()
        with pytest.raises(OSError, match="connect"):
            await trio.open_tcp_stream("127.0.0.1", bound.port)
        order.append("handler")
        await s.send("goodbye")

    bound = socket.bind(sched, 0, handler)

    async def talk() -> None:
        assert await in_thread(lambda: client_of(bound.port)) == b"goodbye"

    sched.add(talk)
    await got(sched.run())
    assert order == ["handler"]
    await got(bound.close())  # changes nothing
    assert not bound.hasconnection()


@both_sides
async def test_the_listener_of_bind_closed_before_run_serves_nobody() -> None:
    sched = scheduler()
    bound = socket.bind(sched, 0, echo)
    await got(bound.close())
    with pytest.raises(ConnectionRefusedError):
        stdlib.create_connection(("127.0.0.1", bound.port))
    await got(sched.run())


@both_sides
async def test_a_listener_of_bind_closed_during_the_start_serves_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sched = scheduler()
    bound = socket.bind(sched, 0, echo)
    begin = trisock.bind

    async def close_and_begin(*args: Any) -> trisock.Server:
        await bound.close()
        return await begin(*args)

    monkeypatch.setattr(trisock, "bind", close_and_begin)
    await got(sched.run())
    with pytest.raises(ConnectionRefusedError):
        stdlib.create_connection(("127.0.0.1", bound.port))


def test_a_scheduler_that_fails_at_once_leaves_no_port_open() -> None:
    sched = scheduler()
    bound = socket.bind(sched, 0, echo)

    async def cancelled_at_once() -> None:
        with trio.CancelScope() as scope:
            scope.cancel()
            await sched.run()

    trio.run(cancelled_at_once)
    with pytest.raises(ConnectionRefusedError):
        stdlib.create_connection(("127.0.0.1", bound.port))
    bound.close()


@both_sides
async def test_bind_takes_plain_functions_that_return_an_awaitable() -> None:
    sched = scheduler()
    listening = socket.bind(sched, 0, lambda s: s.send("hello"))

    async def talk() -> None:
        assert await in_thread(lambda: client_of(listening.port)) == b"hello"
        await listening.close()

    sched.add(talk)
    await got(sched.run())


@both_sides
async def test_what_a_handler_raises_is_logged_and_harms_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    sched = scheduler()

    async def handler(s: async_socket) -> None:
        if await s.recv() == b"fail":
            raise ValueError("a mistake")
        await s.send("fine")

    bound = socket.bind(sched, 0, handler)

    async def talk() -> None:
        assert await in_thread(lambda: client_of(bound.port, b"fail")) == b""
        assert await in_thread(lambda: client_of(bound.port, b"go on")) == b"fine"
        await bound.close()

    sched.add(talk)
    await got(sched.run())
    (record,) = [each for each in caplog.records if each.name == "trisock.server"]
    assert record.levelno == logging.ERROR
    assert isinstance(record.exc_info[1], ValueError)


@both_sides
async def test_bind_can_be_called_by_a_running_handler() -> None:
    sched = scheduler()
    second = []

    async def handler(s: async_socket) -> None:
        second.append(socket.bind(sched, 0, echo))
        await s.send(str(second[0].port))

    first = socket.bind(sched, 0, handler)

    async def talk() -> None:
        port = int(await in_thread(lambda: client_of(first.port)))
        assert await in_thread(lambda: client_of(port, b"hello")) == b"hello"
        await first.close()
        await second[0].close()

    sched.add(talk)
    await got(sched.run())


@both_sides
async def test_scheduler_runs_what_was_added_before_and_while_it_runs() -> None:
    sched = scheduler()
    order = []

    async def first() -> None:
        order.append("first")
        sched.add(second)

    async def second() -> None:
        order.append("second")

    sched.add(first)
    assert order == []
    await got(sched.run())
    assert order == ["first", "second"]
    await got(sched.run())  # there is nothing left
    assert order == ["first", "second"]
    sched.add(second)
    await got(sched.run())
    assert order == ["first", "second", "second"]


@both_sides
async def test_scheduler_lets_out_what_an_added_function_raises() -> None:
    sched = scheduler()

    async def fail() -> None:
        raise ValueError("a mistake")

    sched.add(fail)
    with pytest.RaisesGroup(pytest.RaisesExc(ValueError, match="a mistake")):
        await got(sched.run())
    await got(sched.run())  # and can be run again


@both_sides
async def test_scheduler_refuses_to_run_twice_at_once() -> None:
    sched = scheduler()
    complaints = []

    async def again() -> None:
        with pytest.raises(RuntimeError, match="running already") as caught:
            await sched.run()
        complaints.append(caught.value)

    sched.add(again)
    await got(sched.run())
    assert len(complaints) == 1


def test_a_server_goes_on_when_a_handler_drops_its_socket() -> None:
    """To close the descriptor of a connection under its server would crash that."""
    sched = scheduler()
    dropped = []

    def handler(s: async_socket) -> Awaitable[object]:
        stays = s._sock

        async def rest() -> None:
            gc.collect()
            assert stays.fileno() >= 0
            dropped.append(stays)
            await stays.send(b"still here")
            await trio.lowlevel.wait_readable(stays.fileno())

        return rest()

    bound = socket.bind(sched, 0, handler)

    async def talk() -> None:
        for _ in range(3):
            assert await in_thread(lambda: client_of(bound.port)) == b"still here"
        await bound.close()

    sched.add(talk)
    sched.run()
    assert len(dropped) == 3
