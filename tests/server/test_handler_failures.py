"""The server logs a handler's failure, and closes only that handler's connection.

A handler can fail with an exception of any class, or by leaving a cancel scope open.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import sys
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

import trisock
from helpers.pairs import all_served
from helpers.server import bound, connect, connected, echo, logged
from trisock import Socket

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup, ExceptionGroup

Handler = Callable[[Socket], Awaitable[object]]


class Records(logging.Handler):
    """Keeps log records and their formatted text."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.all: list[logging.LogRecord] = []
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text += self.format(record) + "\n"  # exceptions propagate to the caller
        self.all.append(record)

    @property
    def errors(self) -> list[logging.LogRecord]:
        return [each for each in self.all if each.levelno >= logging.ERROR]


@contextlib.contextmanager
def logging_to(handler: logging.Handler) -> Iterator[None]:
    logger = logging.getLogger("trisock.server")
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.level, logger.propagate = before
        logging.getLogger("trisock").manager._clear_cache()  # type: ignore[attr-defined]


@pytest.fixture
def records() -> Iterator[Records]:
    handler = Records()
    with logging_to(handler):
        yield handler


async def serve_with_bystanders(handler: Handler) -> trisock.ServerStats:
    """Run the handler on one connection. Check that an earlier and a later connection work."""

    async def fail_or_echo(sock: Socket) -> None:
        if await sock.recv_until(b"\n") == b"fail\n":
            await handler(sock)
        else:
            await echo(sock)

    async with bound(fail_or_echo, host="127.0.0.1") as server:
        async with await connect(server) as bystander:
            await bystander.send(b"echo\n1")
            assert await bystander.recv() == b"1"
            async with await connect(server) as client:
                await client.send(b"fail\n")
                assert await client.recv() == b""
            await bystander.send(b"2")
            assert await bystander.recv() == b"2"
            async with await connect(server) as later:
                await later.send(b"echo\n3")
                assert await later.recv() == b"3"
        await all_served(server, 3)
    return server.stats()


# ---- exceptions of any class ----


def refuse(*_: object, **__: object) -> Any:
    raise RuntimeError("this class is hostile")


@dataclasses.dataclass
class Unhashable(Exception):
    code: int = 500


class HostileGetattribute(Exception):
    __getattribute__ = refuse


def overriding(
    *names: str, how: Any = refuse, base: type[Exception] = Exception
) -> type[Exception]:
    return type("Overriding", (base,), dict.fromkeys(names, how))


METHODS = ["__eq__", "__hash__", "__bool__", "__len__", "__str__", "__repr__", "__reduce__"]
PROPERTIES = [
    *("__class__", "__traceback__", "__cause__", "__context__", "__notes__"),
    *("__suppress_context__", "__dict__", "args", "with_traceback", "name", "exceptions"),
]

CLASSES: dict[str, type[Exception]] = {
    "unhashable": Unhashable,
    "__getattribute__": HostileGetattribute,
    **{name: overriding(name) for name in METHODS},
    **{f"property {name}": overriding(name, how=property(refuse)) for name in PROPERTIES},
    **{f"{name} is 5": overriding(name, how=5) for name in PROPERTIES},
    "all methods": overriding(*METHODS),
    "not weakly referenced": type("Slots", (Exception,), {"__slots__": ()}),
    "SyntaxError": overriding("__str__", "lineno", how=property(refuse), base=SyntaxError),
    "OSError": overriding("errno", "strerror", how=property(refuse), base=OSError),
    "ClosedResourceError": overriding("__str__", base=trio.ClosedResourceError),
    "BrokenResourceError": overriding("__str__", "__eq__", base=trio.BrokenResourceError),
}


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("way", ["alone", "group", "cause", "context"])
async def test_a_handler_may_raise_any_exception_class(
    name: str, way: str, records: Records
) -> None:
    async def failing(_: Socket) -> None:
        exc = CLASSES[name]()
        if way == "alone":
            raise exc
        if way == "group":
            raise ExceptionGroup("some", [ValueError("one"), ExceptionGroup("in it", [exc])])
        if way == "cause":
            raise ValueError("because") from exc
        try:
            raise exc
        finally:
            raise KeyError("context")

    stats = await serve_with_bystanders(failing)
    assert stats == trisock.ServerStats(accepted=3, handler_errors=1)
    (record,) = records.errors
    assert record.exc_info
    assert "the handler of 127.0.0.1:" in record.getMessage()
    assert "in failing" in records.text  # the traceback


GROUP_NAMES = ["split", "subgroup", "derive", "exceptions", "message", "__str__", "__class__"]


@pytest.mark.parametrize("name", [*GROUP_NAMES, "__getattribute__"])
@pytest.mark.parametrize("way", ["method", "property"])
async def test_a_handler_may_raise_any_exception_group(
    name: str, way: str, records: Records
) -> None:
    hostile = {name: refuse if way == "method" else property(refuse)}
    group = type("Group", (ExceptionGroup,), hostile)

    async def failing(_: Socket) -> None:
        raise group("some", [ValueError("one"), Unhashable()])

    stats = await serve_with_bystanders(failing)
    assert stats == trisock.ServerStats(accepted=3, handler_errors=1)
    assert len(records.errors) == 1
    assert "in failing" in records.text
    assert "ValueError: one" in records.text or way == "method"


async def test_a_mixed_exception_group_is_separated_despite_a_broken_split(
    records: Records,
) -> None:
    class Stop(BaseException):
        pass

    class Group(BaseExceptionGroup[BaseException]):
        def split(self, *_: object) -> Any:
            raise ZeroDivisionError

    async def handler(sock: Socket) -> None:
        raise Group("both", [Unhashable(), BaseExceptionGroup("in it", [Stop(), KeyError("k")])])

    with pytest.raises(BaseExceptionGroup) as caught:
        async with bound(handler, host="127.0.0.1") as server, await connect(server):
            await trio.sleep_forever()
    assert "Stop" in repr(caught.value)
    assert "Unhashable" not in repr(caught.value)
    (record,) = records.errors
    assert "Unhashable" in records.text
    assert "KeyError: 'k'" in records.text
    assert record.exc_info
    assert "Stop" not in repr(record.exc_info[1])


@pytest.mark.parametrize("result", [None, 5, "x", object(), [1]])
async def test_a_handler_that_returns_no_awaitable_is_logged(
    result: object, records: Records
) -> None:
    stats = await serve_with_bystanders(lambda _: result)  # type: ignore[arg-type,return-value]
    assert stats.handler_errors == 1
    assert "TypeError" in records.text


# ---- logging that fails ----


class Raising(logging.Handler):
    def __init__(self, exc: Exception) -> None:
        super().__init__(logging.INFO)
        self.exc = exc

    def emit(self, record: logging.LogRecord) -> None:
        raise self.exc


async def fail_once() -> None:
    async def handler(_: Socket) -> None:
        raise ValueError("the fault")

    assert (await serve_with_bystanders(handler)).handler_errors == 1


def assert_reported_on_stderr(error: type[Exception], capsys: pytest.CaptureFixture[str]) -> None:
    """Check that stderr shows the handler's failure and the logging error."""
    printed = capsys.readouterr().err
    assert "the handler of 127.0.0.1:" in printed
    assert "ValueError: the fault" in printed
    assert error.__name__ in printed


@pytest.mark.parametrize("error", [LookupError, RecursionError, HostileGetattribute])
async def test_a_failure_that_cannot_be_logged_goes_to_stderr(
    error: type[Exception], capsys: pytest.CaptureFixture[str]
) -> None:
    with logging_to(Raising(error("logging is broken"))):
        await fail_once()
    assert_reported_on_stderr(error, capsys)


async def test_a_failure_goes_to_stderr_if_the_log_filter_fails(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(_: logging.LogRecord) -> bool:
        raise LookupError("logging is broken")

    logger = logging.getLogger("trisock.server")
    logger.addFilter(fail)
    try:
        with logging_to(logging.NullHandler()):
            await fail_once()
    finally:
        logger.removeFilter(fail)
    assert_reported_on_stderr(LookupError, capsys)


async def test_the_server_survives_a_peer_error_it_cannot_log(
    capsys: pytest.CaptureFixture[str],
) -> None:
    async def handler(sock: Socket) -> None:
        await sock.recv_exactly(10)

    with logging_to(Raising(LookupError("logging is broken"))):
        async with bound(handler, host="127.0.0.1") as server:
            for number in (1, 2):
                async with await connect(server) as client:
                    await client.send(b"half")
                await all_served(server, number)
    assert server.stats() == trisock.ServerStats(accepted=2, peer_errors=2)
    assert "LookupError" in capsys.readouterr().err


async def test_a_server_without_stderr_survives_broken_logging(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    with logging_to(Raising(LookupError("logging is broken"))):
        await fail_once()
    assert capsys.readouterr().out == ""


async def test_the_server_survives_a_log_file_it_cannot_open(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A directory has the log file's path. Opening the file fails, as it does when the process has
    # run out of descriptors.
    handler = logging.FileHandler(tmp_path / "log", delay=True)
    os.mkdir(tmp_path / "log")
    with logging_to(handler):
        await fail_once()
    # From Python 3.14 on, logging reports its own failure, but not the record's traceback.
    expected = "Logging error" if sys.version_info >= (3, 14) else "ValueError: the fault"
    assert expected in capsys.readouterr().err
    handler.close()


@dataclasses.dataclass
class ProtocolError(Exception):
    """An exception that is not hashable, because this dataclass compares by value."""

    code: int


async def test_an_unhashable_error_caused_by_a_socket_error_is_logged(records: Records) -> None:
    async def handler(sock: Socket) -> None:
        try:
            await sock.recv_until(b"\n")
        except trisock.IncompleteReadError as exc:
            raise ProtocolError(500) from exc

    async with bound(handler, host="127.0.0.1") as server, await connect(server) as bystander:
        async with await connect(server) as client:
            await client.send(b"no en")
            await client.send_eof()
            assert await client.recv() == b""
        while server.stats().active > 1:
            await trio.lowlevel.checkpoint()
        assert bystander.isopen()
        (record,) = records.errors
    assert record.exc_info
    assert type(record.exc_info[1]) is ProtocolError


# ---- cancel scopes left open ----

KEPT: list[object] = []


async def generator_left(_: Socket) -> None:
    async for _each in ticks():
        break
    await trio.sleep(5)


async def ticks() -> AsyncIterator[int]:
    while True:
        with trio.fail_after(0.05):
            yield 1


async def generator_kept(_: Socket) -> None:
    generator = ticks()
    KEPT.append(generator)
    await generator.__anext__()
    await trio.sleep(5)


async def entered(_: Socket) -> None:
    trio.CancelScope(deadline=trio.current_time() + 0.05).__enter__()
    await trio.sleep(5)


async def entered_and_cancelled(_: Socket) -> None:
    scope = trio.CancelScope()
    scope.__enter__()
    scope.cancel()
    await trio.sleep(5)


async def entered_before_an_error(_: Socket) -> None:
    trio.CancelScope(deadline=trio.current_time() + 0.05).__enter__()
    raise Unhashable


async def entered_before_a_return(_: Socket) -> None:
    trio.CancelScope(deadline=trio.current_time() + 0.0001).__enter__()


async def cancelled_that_was_kept(_: Socket) -> None:
    kept: list[BaseException] = []
    with trio.move_on_after(0):
        try:
            await trio.sleep(1)
        except trio.Cancelled as exc:
            kept.append(exc)
            raise
    raise kept[0]


async def cancelled_in_a_group(sock: Socket) -> None:
    try:
        await cancelled_that_was_kept(sock)
    except trio.Cancelled as exc:
        raise BaseExceptionGroup("both", [ValueError("x"), exc]) from None


OPEN_SCOPES = [
    *(generator_left, generator_kept, entered, entered_and_cancelled, entered_before_an_error),
    *(entered_before_a_return, cancelled_that_was_kept, cancelled_in_a_group),
]


@pytest.mark.filterwarnings("ignore:Async generator")
@pytest.mark.parametrize("handler", OPEN_SCOPES, ids=lambda each: each.__name__)
async def test_a_scope_left_open_ends_only_that_handlers_connection(
    handler: Handler, records: Records
) -> None:
    stats = await serve_with_bystanders(handler)
    KEPT.clear()
    assert stats == trisock.ServerStats(accepted=3, handler_errors=1)
    (record,) = records.errors
    assert record.exc_info
    failure = record.exc_info[1]
    if handler is entered_before_an_error:
        assert isinstance(failure, Unhashable)
    else:
        assert isinstance(failure, RuntimeError)
        assert "cancel scope" in str(failure)


async def entered_with_a_shield(_: Socket) -> None:
    trio.CancelScope(shield=True).__enter__()


async def entered_without_a_deadline(_: Socket) -> None:
    trio.CancelScope().__enter__()


@pytest.mark.parametrize("handler", [entered_with_a_shield, entered_without_a_deadline])
async def test_a_scope_left_open_that_cancels_nothing_is_ignored(
    handler: Handler, records: Records
) -> None:
    stats = await serve_with_bystanders(handler)
    assert stats == trisock.ServerStats(accepted=3)
    assert not records.errors


async def test_a_scope_left_open_does_not_cancel_the_close(records: Records) -> None:
    scope = trio.CancelScope()

    async def handler(sock: Socket) -> None:
        scope.__enter__()
        await sock.send(bytes(4_000_000))

    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, handler, host="127.0.0.1")
        async with await connect(server) as client:
            await client.send(b"unread: the close has to wait")
            while not server.connections:
                await trio.lowlevel.checkpoint()
            received = 0
            while chunk := await client.recv():
                received += len(chunk)
                if not server.connections:
                    scope.cancel()
        assert received == 4_000_000
        assert server.stats() == trisock.ServerStats(accepted=1, active=server.stats().active)
        nursery.cancel_scope.cancel()


async def test_a_server_with_a_scope_left_open_can_be_cancelled(records: Records) -> None:
    async def handler(_: Socket) -> None:
        trio.CancelScope().__enter__()
        await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, handler, host="127.0.0.1")
        async with connected(server):
            nursery.cancel_scope.cancel()
    assert nursery.cancel_scope.cancelled_caught
    await server.wait_closed()
    assert not records.errors


async def test_an_interrupt_passes_through_a_scope_left_open(records: Records) -> None:
    async def handler(_: Socket) -> None:
        trio.CancelScope().__enter__()
        raise KeyboardInterrupt

    with pytest.raises(BaseExceptionGroup) as caught:
        async with bound(handler, host="127.0.0.1") as server, await connect(server):
            await trio.sleep_forever()
    assert "KeyboardInterrupt" in "".join(traceback.format_exception(caught.value))


async def test_a_handlers_system_exit_survives_the_servers_cancellation() -> None:
    async def handler(sock: Socket) -> None:
        try:
            await sock.recv()
        finally:
            raise SystemExit(7)

    with pytest.raises(BaseExceptionGroup) as caught:
        async with trio.open_nursery() as nursery:
            server = await trisock.bind(nursery, 0, handler, host="127.0.0.1")
            async with connected(server):
                nursery.cancel_scope.cancel()
    assert caught.value.split(SystemExit)[1] is None


async def test_server_closing_beside_a_system_exit_is_no_error() -> None:
    async def handler(sock: Socket) -> None:
        await sock.recv()
        server.stop()
        try:
            with sock.idle():
                await sock.recv()
        except trisock.ServerClosing as exc:
            raise BaseExceptionGroup("both", [exc, SystemExit(7)]) from None

    with pytest.raises(BaseExceptionGroup):
        async with trio.open_nursery() as nursery:
            server = await trisock.bind(nursery, 0, handler, host="127.0.0.1")
            async with connected(server) as client:
                await client.send(b"x")
                await server.wait_closed()
    assert server.stats() == trisock.ServerStats(accepted=1)


async def test_server_closing_of_another_servers_socket_is_an_error(
    log: pytest.LogCaptureFixture,
) -> None:
    others: list[Socket] = []

    async def keep(sock: Socket) -> None:
        others.append(sock)
        await sock.recv()
        await trio.sleep_forever()

    async def handler(sock: Socket) -> None:
        with others[0].idle():
            await others[0].recv()

    async with bound(keep, host="127.0.0.1") as other, connected(other) as first:
        await first.send(b"x")
        async with bound(handler, host="127.0.0.1") as server, connected(server):
            await trio.testing.wait_all_tasks_blocked()
            other.stop(grace=1000)
            await trio.testing.wait_all_tasks_blocked()
            other.stop(grace=0)
    assert server.stats() == trisock.ServerStats(accepted=1, handler_errors=1)
    assert logged(log, logging.ERROR)
