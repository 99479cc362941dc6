"""hs.socket's objects with hostile callbacks, arguments and names."""

from __future__ import annotations

import logging
import math
import os
import socket
import ssl
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

import trisock
from helpers.hammerspoon import LOCALHOST, Calls, Log, connect_to, connected, errors_in, until
from helpers.pairs import read_all
from trisock.hammerspoon import Socket, Sockets

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup, ExceptionGroup


async def test_a_key_given_as_a_path_is_not_logged(hs: Sockets, log: Log) -> None:
    log.set_level(logging.DEBUG, "trisock")
    client, other = hs.new(), hs.new()
    assert client.connect("-----BEGIN PRIVATE KEY-----\n" + "MIIE" * 400) is client
    assert "MIIEMIIE" not in repr(client)
    assert other.connect("MIIE" * 16, 80) is other
    await until(lambda: not client.connections() and not other.connections())
    await wait_all_tasks_blocked()
    assert "MIIEMIIE" not in log.text
    assert "no path" in log.text


# ---- callbacks ----


class Hostile(Exception):
    """An exception whose methods all fail."""

    def fail(self, *_: object) -> Any:
        raise ZeroDivisionError("a hostile method")

    __eq__ = __hash__ = __str__ = __repr__ = __bool__ = __reduce__ = __setstate__ = fail
    __notes__ = property(fail)


class HostileValueError(ValueError):
    """A ValueError whose ``str`` fails. (A ValueError is logged as one line, with its text.)"""

    __str__ = __repr__ = Hostile.fail


class HostileGroup(ExceptionGroup[Exception]):
    """A group whose methods all fail."""

    @property
    def exceptions(self) -> Any:
        raise ZeroDivisionError("a hostile group")

    split = subgroup = derive = Hostile.fail


class NoTruthValue:
    """A callable object whose bool, len and repr all fail."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, *_: object) -> None:
        self.calls += 1

    def __bool__(self) -> bool:
        raise ZeroDivisionError("a hostile bool")

    __len__ = __repr__ = __eq__ = __hash__ = __bool__  # type: ignore[assignment]


class HostileResult:
    """A return value whose attributes all fail."""

    def __getattribute__(self, name: str) -> Any:
        raise ZeroDivisionError("a hostile attribute")


class BadAwaitable:
    def __await__(self) -> Any:
        raise ZeroDivisionError("a hostile awaitable")


class ForeignAwaitable:
    def __await__(self) -> Any:
        yield "not a message for Trio"


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
    lambda *_: HostileResult(),
    lambda *_: BadAwaitable(),
    lambda *_: ForeignAwaitable(),
    leaves_a_scope_open,
    leaves_a_cancelled_scope_open,
    raises_another_tasks_cancelled,
    lambda: None,  # does not accept the arguments
]


@pytest.mark.parametrize("callback", CALLBACKS)
async def test_a_hostile_callback_is_logged_and_later_callbacks_run(
    hs: Sockets, log: Log, calls: Calls, callback: Callable[..., object]
) -> None:
    async with connected(hs, fn=callback) as (client, peer):
        client.write("x", callback).read("\n")
        await peer.send(b"line\n")
        await until(lambda: len(errors_in(log)) >= 2)
        await trio.sleep(0.05)  # longer than the deadline of a scope that a callback left open
        client.setCallback(calls).read("\n")
        await peer.send(b"later\n")
        assert await calls.next() == (b"later\n", -1)


async def test_a_callback_is_never_tested_for_truth(hs: Sockets) -> None:
    fn = NoTruthValue()
    server = hs.server(0)
    client = connect_to(server, hs.new(fn), fn)
    client.write("x\n", 1, fn).write("y\n", fn)
    await until(lambda: fn.calls == 3)
    client.setCallback(fn).read("\n")
    server.write("line\n")
    await until(lambda: fn.calls == 4)


@pytest.mark.parametrize("error", [HostileValueError, KeyError])
async def test_a_hostile_error_from_a_tls_context_disconnects(
    client: Socket, peer: trisock.Socket, log: Log, error: type[Exception]
) -> None:
    class Failing(ssl.SSLContext):
        def wrap_bio(self, *_: object, **__: object) -> Any:
            raise error

    client.startTLS(Failing(ssl.PROTOCOL_TLS_CLIENT), "example.org").write("secret")
    assert await read_all(peer) == b""
    await until(lambda: client.info()["isDisconnected"])
    assert error.__name__ in log.text


@pytest.mark.parametrize("level", [logging.DEBUG, logging.ERROR])
async def test_reads_and_callbacks_work_despite_a_failing_log_filter(
    hs: Sockets, log: Log, monkeypatch: pytest.MonkeyPatch, calls: Calls, level: int
) -> None:
    class Failing(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            if record.levelno >= level:
                raise ZeroDivisionError("a hostile filter")
            return True

    monkeypatch.setattr(logging.getLogger("trisock.hammerspoon"), "filters", [Failing()])
    async with connected(hs, fn=raising(ValueError())) as (client, peer):
        client.write("x", raising(ValueError())).read("\n")
        await peer.send(b"one\ntwo\n")
        await wait_all_tasks_blocked(0.02)
        client.setCallback(calls).read("\n")
        assert await calls.next() == (b"two\n", -1)
        hs.new().write("nobody")


async def test_many_callbacks_let_other_tasks_run(client: Socket, peer: trisock.Socket) -> None:
    ran = longest = seen = 0

    def callback(data: bytes, tag: int) -> None:
        nonlocal ran, longest
        ran += 1
        longest = max(longest, ran - seen)

    hold = trio.Event()
    client.setCallback(callback).write("x", lambda tag: hold.wait())
    await peer.recv()
    for _ in range(500):
        client.read("\n")
    await peer.send(b"\n" * 500)
    await wait_all_tasks_blocked(0.02)
    hold.set()
    while ran < 500:
        seen = ran
        await trio.lowlevel.checkpoint()
    assert longest <= 64


# ---- arguments ----


SECRET = "PASS hunter2"

INVALID: list[tuple[type[Exception], str, Callable[[Sockets], object]]] = [
    (TypeError, "not bool", lambda hs: hs.new().setTimeout(True)),
    (TypeError, "not NaN", lambda hs: hs.new().setTimeout(math.nan)),
    (TypeError, "of seconds", lambda hs: hs.new().setTimeout(SECRET)),  # type: ignore[arg-type]
    (ValueError, "fits into a float", lambda hs: hs.new().setTimeout(10**400)),
    (TypeError, "a host and a port", lambda hs: hs.new().connect(LOCALHOST, True)),
    (TypeError, "a host and a port", lambda hs: hs.new().connect(LOCALHOST, SECRET)),  # type: ignore[arg-type]
    (TypeError, "a host and a port", lambda hs: hs.new().connect(SECRET.encode(), 80)),  # type: ignore[arg-type]
    (TypeError, "a host and a port", lambda hs: hs.new().connect({"host": SECRET, "port": 80})),  # type: ignore[arg-type]
    (TypeError, "a function", lambda hs: hs.new().connect(LOCALHOST, 80, SECRET)),  # type: ignore[arg-type]
    (TypeError, "a function", lambda hs: hs.new().write("x", 1, SECRET)),  # type: ignore[arg-type]
    (TypeError, "a function", lambda hs: hs.new(SECRET)),  # type: ignore[arg-type]
    (TypeError, "a function", lambda hs: hs.new().setCallback(SECRET)),  # type: ignore[arg-type]
    (TypeError, "an int", lambda hs: hs.new().listen(True)),
    (TypeError, "an int", lambda hs: hs.new().listen(1.5)),  # type: ignore[arg-type]
    (ValueError, "a log level", lambda hs: hs.setLogLevel(SECRET)),
    (ValueError, "a log level", lambda hs: hs.setLogLevel("")),
    (ValueError, "a log level", lambda hs: hs.setLogLevel(6)),
    (ValueError, "a log level", lambda hs: hs.setLogLevel(True)),
]


@pytest.mark.parametrize(("error", "words", "call"), INVALID)
async def test_errors_for_invalid_arguments_do_not_quote_them(
    hs: Sockets, error: type[Exception], words: str, call: Callable[[Sockets], object]
) -> None:
    with pytest.raises(error, match=words) as caught:
        call(hs)
    assert "hunter2" not in str(caught.value) + repr(caught.value)


@pytest.mark.parametrize(
    ("argument", "error", "words"),
    [
        *((each, TypeError, "not a bool") for each in (True, False)),
        *((each, TypeError, "data must be bytes or str") for each in (None, 1.5, [SECRET])),
        *((each, ValueError, "at least one byte") for each in (-1, -(10**30), "", b"")),
        (SECRET + "\ud800", ValueError, "cannot be sent"),
    ],
)
async def test_an_invalid_read_raises_and_later_reads_work(
    client: Socket,
    peer: trisock.Socket,
    calls: Calls,
    argument: Any,
    error: type[Exception],
    words: str,
) -> None:
    with pytest.raises(error, match=words) as caught:
        client.read(argument)
    assert "hunter2" not in str(caught.value) + repr(caught.value)
    client.read("\n")
    await peer.send(b"a\n")
    assert await calls.next() == (b"a\n", -1)


@pytest.mark.parametrize(
    "arguments",
    [
        *((LOCALHOST, 0), (LOCALHOST, -1), (LOCALHOST, 65536), (LOCALHOST, 10**30)),
        *(("", 80), ("a\0b", 80), ("a b", 80), ("no such host\n", 80)),
        *(("",), ("x\0y",), ("x" * 1000,)),
    ],
)
async def test_a_connect_to_an_invalid_address_is_logged(
    hs: Sockets, log: Log, arguments: tuple[Any, ...]
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
async def test_listen_on_an_invalid_address_returns_None_and_logs(  # noqa: N802
    hs: Sockets, log: Log, where: int | str
) -> None:
    created = hs.new()
    assert created.listen(where) is None
    assert created.info()["isDisconnected"]
    assert any("cannot listen" in each for each in log.messages)
    assert all(each.isprintable() for each in log.messages)


@pytest.mark.parametrize("timeout", [math.inf, -math.inf, 1e308, -1, -(10**30), 10**30])
async def test_infinite_huge_and_negative_timeouts_mean_no_timeout(
    client: Socket, peer: trisock.Socket, calls: Calls, timeout: float
) -> None:
    client.setTimeout(timeout).write("x", calls).read(1)
    await peer.send(b"y")
    assert {await calls.next(), await calls.next()} == {(-1,), (b"y", -1)}
    assert client.info()["timeout"] == timeout


async def test_a_read_of_a_huge_size_waits_for_data(
    client: Socket, peer: trisock.Socket, calls: Calls
) -> None:
    client.read(10**30)
    client.write("x", calls)
    assert await calls.next() == (-1,)
    await peer.send(b"some")
    assert await calls.none()
    assert client.connected()


async def test_a_peers_name_is_escaped_in_log_and_repr(
    hs: Sockets, log: Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = str(tmp_path / "a\nb\x1b[2K\u2028")
    server = hs.server(path, raising(ValueError()))
    names = (b"\0\n2025-01-01 INFO forged\x1b[2K", b"\0\xff\xfe", "c\u0085d")
    for number, name in enumerate(names, 1):
        with socket.socket(socket.AF_UNIX) as peer:
            peer.bind(name)
            peer.connect(path)
            await until(server.connected)
            server.read("\n").startTLS(False).startTLS(False)  # type: ignore[union-attr]
            peer.sendall(b"x\n")
            await until(lambda: len(errors_in(log)) == number)  # noqa: B023
        await until(lambda: not server.connected())
    client = hs.new()
    client.connect(path)
    server.listen("again")  # fails and is logged
    hs.new().connect("no\nwhere")
    await until(lambda: any("No such file" in each for each in log.messages))
    for each in (repr(server), repr(client), *log.messages):
        assert each.isprintable()
        each.encode()
    assert os.path.exists(path)
