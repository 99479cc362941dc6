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
from helpers.pluto import (
    both_sides,
    check_not_listening,
    echo,
    failing,
    got,
    in_thread,
    recv_all,
)
from helpers.pluto_udp import needs_ipv6
from trisock.pluto import async_socket, coroutine, scheduler, socket

pytestmark = pytest.mark.usefixtures("bounded")  # some tests make blocking calls


async def response(port: int, request: bytes = b"") -> bytes:
    """Connect from a thread, send a request, and return everything that the server sends."""

    def exchange() -> bytes:
        with stdlib.create_connection(("127.0.0.1", port), timeout=DEADLINE) as raw:
            raw.sendall(request)
            raw.shutdown(stdlib.SHUT_WR)
            return recv_all(raw)

    return bytes(await in_thread(exchange))


@both_sides
async def test_bind_serves_each_client_in_its_own_task() -> None:
    sched = scheduler()
    entered = []

    async def handler(s: async_socket) -> None:
        entered.append(s)
        while len(entered) % 2:  # the first handler waits for the second
            await trio.lowlevel.checkpoint()
        await s.send("together")

    bound = socket.bind(sched, 0, handler)
    assert isinstance(bound, coroutine)

    async def clients() -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(2):
                nursery.start_soon(talk)
        bound.close()

    async def talk() -> None:
        assert await response(bound.port) == b"together"

    sched.add(clients)
    await got(sched.run())
    assert len(entered) == 2


@both_sides
async def test_bind_listens_immediately() -> None:
    sched = scheduler()
    bound = socket.bind(sched, 0, echo)
    with stdlib.create_connection(("127.0.0.1", bound.port), timeout=DEADLINE) as raw:
        raw.sendall(b"early")

        async def talk() -> None:
            assert await in_thread(lambda: raw.recv(100)) == b"early"
            raw.close()
            bound.close()

        sched.add(talk)
        await got(sched.run())


@both_sides
async def test_bind_raises_oserror_if_the_port_is_in_use() -> None:
    sched = scheduler()
    bound = socket.bind(sched, 0, echo)
    with pytest.raises(OSError, match=rf"cannot listen on \*:{bound.port}") as caught:
        socket.bind(sched, bound.port, echo)
    assert caught.value.errno == errno.EADDRINUSE
    bound.close()


@both_sides
async def test_closing_a_bound_server_lets_handlers_finish() -> None:
    sched = scheduler()
    order = []

    async def handler(s: async_socket) -> None:
        bound.close()
        with pytest.raises(OSError, match="connect"):
            await trio.open_tcp_stream("127.0.0.1", bound.port)
        order.append("handler")
        await s.send("goodbye")

    bound = socket.bind(sched, 0, handler)

    async def talk() -> None:
        assert await response(bound.port) == b"goodbye"

    sched.add(talk)
    await got(sched.run())
    assert order == ["handler"]
    bound.close()  # a second close does nothing


@both_sides
async def test_a_server_that_is_closed_before_run_serves_no_client() -> None:
    sched = scheduler()
    bound = socket.bind(sched, 0, echo)
    bound.close()
    check_not_listening(bound.port)
    await got(sched.run())


@both_sides
async def test_a_server_that_is_closed_during_startup_serves_no_client(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sched = scheduler()
    bound = socket.bind(sched, 0, echo)
    begin = trisock.bind

    async def close_and_begin(*args: Any) -> trisock.Server:
        bound.close()
        return await begin(*args)

    monkeypatch.setattr(trisock, "bind", close_and_begin)
    await got(sched.run())
    check_not_listening(bound.port)


def test_a_scheduler_cancelled_at_startup_leaves_no_port_open() -> None:
    sched = scheduler()
    bound = socket.bind(sched, 0, echo)

    async def run_cancelled() -> None:
        with trio.CancelScope() as scope:
            scope.cancel()
            await sched.run()

    trio.run(run_cancelled)
    check_not_listening(bound.port)
    bound.close()


@both_sides
async def test_bind_accepts_plain_functions_that_return_an_awaitable() -> None:
    sched = scheduler()
    listening = socket.bind(sched, 0, lambda s: s.send("hello"))

    async def talk() -> None:
        assert await response(listening.port) == b"hello"
        listening.close()

    sched.add(talk)
    await got(sched.run())


@both_sides
async def test_a_handler_error_is_logged_and_the_server_continues(
    caplog: pytest.LogCaptureFixture,
) -> None:
    sched = scheduler()

    async def handler(s: async_socket) -> None:
        if await s.recv() == b"fail":
            raise ValueError("a mistake")
        await s.send("fine")

    bound = socket.bind(sched, 0, handler)

    async def talk() -> None:
        assert await response(bound.port, b"fail") == b""
        assert await response(bound.port, b"go on") == b"fine"
        bound.close()

    sched.add(talk)
    await got(sched.run())
    (record,) = [each for each in caplog.records if each.name == "trisock.server"]
    assert record.levelno == logging.ERROR
    assert isinstance(record.exc_info[1], ValueError)


@both_sides
async def test_errorfunc_also_gets_a_handler_error(caplog: pytest.LogCaptureFixture) -> None:
    sched = scheduler()
    errors: list[object] = []
    sched.errorfunc = errors.append

    async def handler(s: async_socket) -> None:
        if await s.recv() == b"fail":
            raise ValueError("a mistake")
        trio.CancelScope(deadline=-1).__enter__()
        await trio.lowlevel.checkpoint()

    bound = socket.bind(sched, 0, handler)

    async def talk() -> None:
        assert await response(bound.port, b"fail") == b""
        assert await response(bound.port, b"leave a scope open") == b""
        bound.close()

    sched.add(talk)
    await got(sched.run())
    assert [type(each) for each in errors] == [ValueError, RuntimeError]
    assert len([each for each in caplog.records if each.name == "trisock.server"]) == 2


@both_sides
async def test_an_error_in_errorfunc_for_a_handler_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    sched = scheduler()
    sched.errorfunc = failing(KeyError("in errorfunc"))

    async def handler(s: async_socket) -> None:
        raise ValueError("a mistake")

    bound = socket.bind(sched, 0, handler)

    async def talk() -> None:
        for _ in range(2):
            assert await response(bound.port) == b""
        bound.close()

    sched.add(talk)
    await got(sched.run())
    records = [each for each in caplog.records if each.name == "trisock.server"]
    assert len(records) == 2
    assert "in errorfunc" in caplog.text
    assert "a mistake" in caplog.text


@both_sides
async def test_a_failed_coroutine_ends_the_servers_of_its_scheduler() -> None:
    sched = scheduler()
    bound = socket.bind(sched, 0, echo)

    async def fail() -> None:
        await trio.testing.wait_all_tasks_blocked()
        raise ValueError("a mistake")

    sched.add(fail)
    with pytest.raises(ValueError, match="a mistake"):
        await got(sched.run())
    check_not_listening(bound.port)
    bound.close()


def test_closing_a_bound_server_in_another_thread_ends_it() -> None:
    sched = scheduler()
    bound = socket.bind(sched, 0, echo)

    async def close_elsewhere() -> None:
        assert await response(bound.port, b"hello") == b"hello"
        await in_thread(bound.close)

    sched.add(close_elsewhere)
    sched.run()
    check_not_listening(bound.port)


# ---- where ----


@both_sides
@pytest.mark.parametrize("host", ["127.0.0.1", pytest.param("[::1]", marks=needs_ipv6)])
async def test_bind_serves_one_address(host: str) -> None:
    sched = scheduler()
    bound = socket.bind(sched, f"{host}:0", echo)
    assert repr(bound) == f"<trisock.pluto.server <trisock.Listener {host}:{bound.port} open>>"

    async def talk() -> None:
        s = await socket.connect(host.strip("[]"), bound.port)
        assert s is not None
        await s.send("hello")
        assert await s.recv() == b"hello"
        await s.close()
        bound.close()

    sched.add(talk)
    await got(sched.run())


@both_sides
async def test_bind_raises_for_an_occupied_or_invalid_place() -> None:
    sched = scheduler()
    bound = socket.bind(sched, "127.0.0.1:0", echo)
    with pytest.raises(OSError, match=rf"cannot listen on 127.0.0.1:{bound.port}") as caught:
        socket.bind(sched, f"127.0.0.1:{bound.port}", echo)
    assert caught.value.errno == errno.EADDRINUSE
    for where in ("127.0.0.1", "localhost:0", "127.0.0.1:65536", 65536, "a secret"):
        with pytest.raises(ValueError, match="port") as invalid:
            socket.bind(sched, where, echo)
        assert "secret" not in str(invalid.value)
    for mistake in (None, True, 1.5, b":0"):
        with pytest.raises(TypeError, match="where to listen must be an int or a str"):
            socket.bind(sched, mistake, echo)  # type: ignore[arg-type]
    bound.close()
    check_not_listening(bound.port)
    await got(sched.run())  # the failed calls have added no task


@both_sides
async def test_a_running_handler_can_call_bind() -> None:
    sched = scheduler()
    second = []

    async def handler(s: async_socket) -> None:
        second.append(socket.bind(sched, 0, echo))
        await s.send(str(second[0].port))

    first = socket.bind(sched, 0, handler)

    async def talk() -> None:
        port = int(await response(first.port))
        assert await response(port, b"hello") == b"hello"
        first.close()
        second[0].close()

    sched.add(talk)
    await got(sched.run())


@both_sides
async def test_scheduler_runs_functions_added_before_and_during_run() -> None:
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
    await got(sched.run())  # there is nothing left to run
    assert order == ["first", "second"]
    sched.add(second)
    await got(sched.run())
    assert order == ["first", "second", "second"]


@both_sides
async def test_scheduler_run_propagates_errors_from_added_functions() -> None:
    sched = scheduler()

    async def fail() -> None:
        raise ValueError("a mistake")

    sched.add(fail)
    with pytest.raises(ValueError, match="a mistake"):
        await got(sched.run())
    await got(sched.run())  # the scheduler can run again


@both_sides
async def test_a_running_scheduler_cannot_be_run_again() -> None:
    sched = scheduler()
    errors = []

    async def again() -> None:
        with pytest.raises(RuntimeError, match="already running") as caught:
            await sched.run()
        errors.append(caught.value)

    sched.add(again)
    await got(sched.run())
    assert len(errors) == 1


def test_a_server_continues_when_a_handler_drops_its_socket() -> None:
    """The server still uses the connection, so garbage collection must not close it."""
    sched = scheduler()
    dropped = []

    def handler(s: async_socket) -> Awaitable[object]:
        sock = s._transport.sock

        async def rest() -> None:
            gc.collect()
            assert sock.fileno() >= 0
            dropped.append(sock)
            await sock.send(b"still here")
            await trio.lowlevel.wait_readable(sock.fileno())

        return rest()

    bound = socket.bind(sched, 0, handler)

    async def talk() -> None:
        for _ in range(3):
            assert await response(bound.port) == b"still here"
        bound.close()

    sched.add(talk)
    sched.run()
    assert len(dropped) == 3
