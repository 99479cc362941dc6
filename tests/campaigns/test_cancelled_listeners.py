"""Cancel calls of listeners at every cancel point (see helpers/cancellation.py)."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio
import trio.testing

import trisock
from helpers.cancellation import (
    Attempt,
    Call,
    advancing,
    at_every_cancel_point,
    connect_to,
    core_of,
    covers,
    during,
)
from helpers.pairs import closing
from helpers.peers import Script
from trisock import pluto
from trisock.pluto.blocking import current_run


@covers("listen")
@pytest.mark.parametrize("host", [None, "127.0.0.1", "localhost"])
@at_every_cancel_point
async def test_a_cancelled_listen_leaves_the_port_free(attempt: Attempt, host: str | None) -> None:
    async with await trisock.listen(0, host=host) as listener:
        port = listener.port
    await attempt(lambda: trisock.listen(port, host=host))
    assert attempt.error is None
    if not attempt.cancelled:
        attempt.value.abort()
    async with await trisock.listen(port, host=host):
        pass


@covers("listen_unix")
@pytest.mark.parametrize("state", ["free", "stale", "locked"])
@at_every_cancel_point
async def test_a_cancelled_listen_unix_leaves_no_path_and_no_lock(
    attempt: Attempt, state: str, tmp_path: Path, mock_clock: trio.testing.MockClock
) -> None:
    path = tmp_path / "socket"
    if state == "stale":
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(path))
    lock = os.open(tmp_path, os.O_RDONLY)
    if state == "locked":
        fcntl.flock(lock, fcntl.LOCK_EX)

    def script() -> Script:
        yield
        yield
        fcntl.flock(lock, fcntl.LOCK_UN)

    await attempt(lambda: trisock.listen_unix(path), advancing(mock_clock, script()))
    os.close(lock)
    assert attempt.error is None
    if attempt.cancelled:
        assert os.listdir(tmp_path) == (["socket"] if state == "stale" else [])
    else:
        attempt.value.abort()
    trisock.listen_unix_nowait(path).abort()
    assert not os.listdir(tmp_path)


# These functions return bound methods, which keep the listener alive. Garbage collection would
# otherwise close a pluto listener.
ACCEPTS: dict[str, Callable[[trisock.Listener], Call]] = {
    "Listener.accept": lambda listener: listener.accept,
    "Listener.__anext__": lambda listener: listener.__anext__,
    "pluto.listener.accept": lambda listener: pluto.listener(listener, current_run()).accept,
}


async def listen_on(where: str, path: Path) -> trisock.Listener:
    if where == "unix":
        return await trisock.listen_unix(path)
    return await trisock.listen(0, host=None if where == "both" else "127.0.0.1")


@covers(*ACCEPTS)
@pytest.mark.parametrize("arrival", ["before", "during", "seen by hasconnection"])
@pytest.mark.parametrize("name", ACCEPTS)
@pytest.mark.parametrize("where", ["unix", "IPv4", "both"])
@at_every_cancel_point
async def test_a_cancelled_accept_loses_no_connection(
    attempt: Attempt, where: str, name: str, arrival: str, tmp_path: Path
) -> None:
    async with await listen_on(where, tmp_path / "socket") as listener:
        clients: list[socket.socket] = []

        def script() -> Script:
            clients.append(connect_to(listener))
            if arrival == "seen by hasconnection":
                assert listener.hasconnection()
            yield

        steps = during(script()) if arrival == "during" else script()
        accept = ACCEPTS[name](listener)
        await attempt(accept, steps)
        assert attempt.error is None
        for _ in steps:
            pass
        accepted = attempt.value or await listener.accept()
        assert not listener.hasconnection()
        with clients[0] as client:
            async with closing(core_of(accepted)):
                client.sendall(b"hello")
                assert await accepted.recv() == b"hello"


async def leave_listener(listener: trisock.Listener) -> None:
    async with listener:
        pass


async def pluto_close_listener(listener: trisock.Listener) -> None:
    await pluto.listener(listener, current_run()).close()


CLOSES = {
    trisock.Listener.close: "Listener.close",
    trisock.Listener.aclose: "Listener.aclose",
    leave_listener: "Listener.__aexit__",
    pluto_close_listener: "pluto.listener.close",
}


@covers(*CLOSES.values())
@pytest.mark.parametrize("close", CLOSES)
@pytest.mark.parametrize("where", ["unix", "both"])
@at_every_cancel_point
async def test_a_cancelled_close_closes_the_listener_and_wakes_accept(
    attempt: Attempt,
    where: str,
    close: Callable[[trisock.Listener], Awaitable[None]],
    tmp_path: Path,
) -> None:
    listener = await listen_on(where, tmp_path / "socket")
    async with trio.open_nursery() as nursery:

        async def accept() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await listener.accept()

        nursery.start_soon(accept)
        await trio.testing.wait_all_tasks_blocked()
        await attempt(lambda: close(listener))
    assert not list(tmp_path.iterdir())
    with pytest.raises(trio.ClosedResourceError):
        listener.hasconnection()
    with pytest.raises((ConnectionRefusedError, FileNotFoundError)):
        connect_to(listener)
