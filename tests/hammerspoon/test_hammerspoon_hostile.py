"""Hostile callbacks, arguments and names, given to hs.socket's objects."""

from __future__ import annotations

import logging
import math
import os
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from helpers.hammerspoon_kit import LOCALHOST, Calls, connected, until
from trisock import hammerspoon
from trisock.hammerspoon import Sockets

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup, ExceptionGroup


@pytest.fixture
async def hs() -> AsyncIterator[Sockets]:
    async with hammerspoon.open_sockets() as hs:
        yield hs


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.DEBUG, "trisock.hammerspoon")
    return caplog


# ---- keys ----


async def test_a_key_in_the_place_of_a_path_is_not_logged(
    hs: Sockets, caplog: pytest.LogCaptureFixture
) -> None:
    key = "-----BEGIN PRIVATE KEY-----\n" + "MIIE" * 400
    with caplog.at_level(logging.DEBUG, "trisock"):
        client = hs.new()
        assert client.connect(key) is client
        assert "MIIEMIIE" not in repr(client)
        other = hs.new()
        assert other.connect("MIIE" * 16, 80) is other
        while client.connections() or other.connections():
            await trio.lowlevel.checkpoint()
        await trio.testing.wait_all_tasks_blocked()
    assert "MIIEMIIE" not in caplog.text
    assert "no path" in caplog.text


async def test_startTLS_takes_one_name(hs: Sockets) -> None:  # noqa: N802
    async with connected(hs) as (client, _):
        with pytest.raises(TypeError, match="two were given"):
            client.startTLS("localhost", "other.example")


# ---- callbacks ----


class Hostile(Exception):
    """An exception each of whose methods fails."""

    def fail(self, *_: object) -> Any:
        raise ZeroDivisionError("a hostile method")

    __eq__ = __hash__ = __str__ = __repr__ = __bool__ = __reduce__ = __setstate__ = fail
    __notes__ = property(fail)


class HostileValueError(ValueError):
    """An error that would be worth a line in the log, if it had a text."""

    __str__ = __repr__ = Hostile.fail


class HostileGroup(ExceptionGroup[Exception]):
    """A group that lies about itself."""

    @property
    def exceptions(self) -> Any:
        raise ZeroDivisionError("a hostile group")

    split = subgroup = derive = Hostile.fail


class Falsy:
    """A callable object that is false, has no length, and cannot be printed."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, *_: object) -> None:
        self.calls += 1

    def __bool__(self) -> bool:
        raise ZeroDivisionError("a hostile bool")

    __len__ = __repr__ = __eq__ = __hash__ = __bool__  # type: ignore[assignment]


class LyingResult:
    """What a callback returns, and what nothing can be asked of."""

    def __getattribute__(self, name: str) -> Any:
        raise ZeroDivisionError("a hostile attribute")


class BadAwaitable:
    def __await__(self) -> Any:
        raise ZeroDivisionError("a hostile awaitable")


class ForeignAwaitable:
    def __await__(self) -> Any:
        yield "not a message of Trio's"


def raising(error: BaseException) -> Callable[..., object]:
    def callback(*_: object) -> object:
        raise error

    return callback


async def leaves_a_scope_open(*_: object) -> None:
    trio.CancelScope(deadline=trio.current_time() + 0.01).__enter__()
    await trio.lowlevel.checkpoint()


def leaves_a_cancelled_scope_open(*_: object) -> None:
    scope = trio.CancelScope()
    scope.__enter__()
    scope.cancel()


async def raises_another_tasks_cancelled(*_: object) -> None:
    kept: list[BaseException] = []

    async def be_cancelled() -> None:
        try:
            await trio.sleep_forever()
        except trio.Cancelled as exc:
            kept.append(exc)
            raise

    async with trio.open_nursery() as nursery:
        nursery.start_soon(be_cancelled)
        await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    raise kept[0]


CALLBACKS: list[Callable[..., object]] = [
    raising(Hostile()),
    raising(ExceptionGroup("group", [Hostile(), ValueError()])),
    raising(HostileGroup("group", [ValueError()])),
    raising(BaseExceptionGroup("group", [ValueError()])),
    lambda *_: LyingResult(),
    lambda *_: BadAwaitable(),
    lambda *_: ForeignAwaitable(),
    leaves_a_scope_open,
    leaves_a_cancelled_scope_open,
    raises_another_tasks_cancelled,
    lambda: None,  # takes no arguments where some are given
]


@pytest.mark.parametrize("number", range(len(CALLBACKS)))
async def test_a_hostile_callback_is_logged_and_ends_nothing(
    hs: Sockets, log: pytest.LogCaptureFixture, number: int
) -> None:
    calls = Calls()
    async with connected(hs, fn=CALLBACKS[number]) as (client, peer):
        client.write("x", CALLBACKS[number]).read("\n")
        await peer.send(b"line\n")
        await until(lambda: sum(each.levelno == logging.ERROR for each in log.records) >= 2)
        await trio.sleep(0.05)  # what a scope left open would cancel
        client.setCallback(calls).read("\n")
        await peer.send(b"goes on\n")
        assert await calls.next() == (b"goes on\n", -1)


async def test_a_callable_object_is_a_callback_whatever_its_truth(hs: Sockets) -> None:
    fn = Falsy()
    server = hs.server(0)
    client = hs.new(fn).connect(LOCALHOST, server.info()["localPort"], fn)
    assert client is not None
    client.write("x\n", 1, fn).write("y\n", fn)
    await until(lambda: fn.calls == 3)
    client.setCallback(fn).read("\n")
    server.write("line\n")
    await until(lambda: fn.calls == 4)


async def test_a_hostile_error_of_a_tls_context_is_logged_and_disconnects(
    hs: Sockets, log: pytest.LogCaptureFixture
) -> None:
    class Failing(ssl.SSLContext):
        def wrap_bio(self, *_: object, **__: object) -> Any:
            raise HostileValueError

    async with connected(hs) as (client, peer):
        client.startTLS(Failing(ssl.PROTOCOL_TLS_CLIENT), "example.org").write("secret")
        assert b"".join([chunk async for chunk in peer]) == b""
        await until(lambda: client.info()["isDisconnected"])
    assert any("HostileValueError" in each for each in log.messages)


@pytest.mark.parametrize("level", [logging.DEBUG, logging.ERROR])
async def test_logging_that_fails_ends_nothing(hs: Sockets, level: int) -> None:
    class Failing(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            if record.levelno >= level:
                raise ZeroDivisionError("a hostile filter")
            return True

    logger = logging.getLogger("trisock.hammerspoon")
    before, hostile, calls = logger.level, Failing(), Calls()
    logger.setLevel(logging.DEBUG)
    logger.addFilter(hostile)
    try:
        async with connected(hs, fn=raising(ValueError())) as (client, peer):
            client.write("x", raising(ValueError())).read("\n")
            await peer.send(b"one\ntwo\n")
            await trio.testing.wait_all_tasks_blocked(0.02)
            client.setCallback(calls).read("\n")
            assert await calls.next() == (b"two\n", -1)
            hs.new().write("nobody")
    finally:
        logger.removeFilter(hostile)
        logger.setLevel(before)


async def test_many_callbacks_let_other_tasks_run(hs: Sockets) -> None:
    ran = 0
    longest = 0

    def callback(data: bytes, tag: int) -> None:
        nonlocal ran, longest
        ran += 1
        longest = max(longest, ran - seen)

    seen = 0
    async with connected(hs, fn=callback) as (client, peer):
        hold = trio.Event()
        client.write("x", lambda tag: hold.wait())
        await peer.recv()
        for _ in range(500):
            client.read("\n")
        await peer.send(b"\n" * 500)
        await trio.testing.wait_all_tasks_blocked(0.02)
        hold.set()
        while ran < 500:
            seen = ran
            await trio.lowlevel.checkpoint()
    assert longest <= 64


# ---- arguments ----


async def test_read_of_0_bytes_is_ignored(hs: Sockets) -> None:
    calls = Calls()
    async with connected(hs, fn=calls) as (client, peer):
        assert client.read(0, 5) is client
        await peer.send(b"a\n")
        assert client.read("\n", 6) is client
        assert await calls.next() == (b"a\n", 6)
        assert await calls.none()


SECRET = "PASS hunter2"

WRONG: list[tuple[type[Exception], Callable[[Sockets], object]]] = [
    (TypeError, lambda hs: hs.new(print).read(True)),
    (TypeError, lambda hs: hs.new(print).read(False)),
    (TypeError, lambda hs: hs.new(print).read(None)),  # type: ignore[arg-type]
    (TypeError, lambda hs: hs.new(print).read([SECRET])),  # type: ignore[arg-type]
    (ValueError, lambda hs: hs.new(print).read(-1)),
    (ValueError, lambda hs: hs.new(print).read(-(10**30))),
    (ValueError, lambda hs: hs.new(print).read("")),
    (ValueError, lambda hs: hs.new(print).read(b"")),
    (ValueError, lambda hs: hs.new(print).read(SECRET + "\ud800")),
    (TypeError, lambda hs: hs.new().setTimeout(True)),
    (TypeError, lambda hs: hs.new().setTimeout(math.nan)),
    (TypeError, lambda hs: hs.new().setTimeout(SECRET)),  # type: ignore[arg-type]
    (ValueError, lambda hs: hs.new().setTimeout(10**400)),
    (TypeError, lambda hs: hs.new().connect(LOCALHOST, True)),
    (TypeError, lambda hs: hs.new().connect(LOCALHOST, SECRET)),  # type: ignore[arg-type]
    (TypeError, lambda hs: hs.new().connect(SECRET.encode(), 80)),  # type: ignore[arg-type]
    (TypeError, lambda hs: hs.new().connect(LOCALHOST, 80, SECRET)),  # type: ignore[arg-type]
    (TypeError, lambda hs: hs.new(SECRET)),  # type: ignore[arg-type]
    (TypeError, lambda hs: hs.new().setCallback(SECRET)),  # type: ignore[arg-type]
    (TypeError, lambda hs: hs.new().listen(True)),
    (TypeError, lambda hs: hs.new().listen(1.5)),  # type: ignore[arg-type]
    (ValueError, lambda hs: hs.setLogLevel(SECRET)),
    (ValueError, lambda hs: hs.setLogLevel(True)),
]


@pytest.mark.parametrize("number", range(len(WRONG)))
async def test_wrong_arguments_raise_at_once_and_are_not_quoted(hs: Sockets, number: int) -> None:
    error, call = WRONG[number]
    with pytest.raises(error) as caught:
        call(hs)
    assert "hunter2" not in str(caught.value) + repr(caught.value)


@pytest.mark.parametrize(
    "arguments",
    [
        *((LOCALHOST, 0), (LOCALHOST, -1), (LOCALHOST, 65536), (LOCALHOST, 10**30)),
        *(("", 80), ("a\0b", 80), ("a b", 80), ("no such host\n", 80)),
        *(("",), ("x\0y",), ("x" * 1000,)),
    ],
)
async def test_where_nobody_can_be_reached_is_logged_later(
    hs: Sockets, log: pytest.LogCaptureFixture, arguments: tuple[Any, ...]
) -> None:
    client = hs.new()
    assert client.connect(*arguments) is client
    assert not client.connected()
    with trio.fail_after(5):
        await until(lambda: client.info()["isDisconnected"])
    [record] = [each for each in log.records if each.levelno >= logging.WARNING]
    assert record.levelno == logging.WARNING
    assert record.getMessage().isprintable()


@pytest.mark.parametrize("where", [-1, 65536, 10**30, "", "x\0y", "~a\0b", "x" * 1000, "/no/where"])
async def test_listening_where_it_cannot_be_is_None_and_logged(  # noqa: N802
    hs: Sockets, log: pytest.LogCaptureFixture, where: int | str
) -> None:
    created = hs.new()
    assert created.listen(where) is None
    assert created.info()["isDisconnected"]
    assert any("cannot listen" in each for each in log.messages)
    assert all(each.isprintable() for each in log.messages)


async def test_infinite_and_huge_timeouts_are_none(hs: Sockets) -> None:
    calls = Calls()
    for timeout in (math.inf, -math.inf, 1e308, -1, -(10**30), 10**30):
        async with connected(hs, fn=calls) as (client, peer):
            client.setTimeout(timeout).write("x", calls).read(1)
            await peer.send(b"y")
            assert {await calls.next(), await calls.next()} == {(-1,), (b"y", -1)}
            assert client.info()["timeout"] == timeout


async def test_a_read_of_a_huge_number_waits_and_harms_nothing(hs: Sockets) -> None:
    calls = Calls()
    async with connected(hs, fn=calls) as (client, peer):
        client.read(10**30)
        client.write("x", calls)
        assert await calls.next() == (-1,)
        await peer.send(b"some")
        assert await calls.none()
        assert client.connected()


# ---- text from outside ----


async def test_a_peers_name_reaches_the_log_and_repr_escaped(
    hs: Sockets, log: pytest.LogCaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = str(tmp_path / "a\nb\x1b[2K\u2028")
    server = hs.server(path, raising(ValueError()))
    names: list[str | bytes] = [b"\0\n2025-01-01 INFO forged\x1b[2K", b"\0\xff\xfe", "c\u0085d"]
    for name in names:
        with socket.socket(socket.AF_UNIX) as peer:
            peer.bind(name)
            peer.connect(path)
            await until(server.connected)
            server.read("\n").startTLS(False).startTLS(False)  # type: ignore[union-attr]
            peer.sendall(b"x\n")
            await until(lambda: any("a callback" in each for each in log.messages))
        await until(lambda: not server.connected())
    client = hs.new().connect(path)
    assert client is not None
    server.listen("again")  # which is refused
    hs.new().connect("no\nwhere")
    await until(lambda: any("No such file" in each for each in log.messages))
    assert repr(server).isprintable()
    assert repr(client).isprintable()
    assert all(each.isprintable() for each in log.messages)
    for each in log.messages:
        each.encode()
    assert os.path.exists(path)
