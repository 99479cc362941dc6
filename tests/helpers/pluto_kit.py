"""What the tests of ``trisock.pluto`` share.

A test that says what holds on both sides is written once, as a coroutine function marked with
``both_sides``. Inside, it is run by Trio; outside, it must come to its end without ever waiting
for Trio. ``got`` awaits a result where there is something to await.
"""

from __future__ import annotations

import functools
import inspect
import select
import signal
import socket as stdlib
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
import trustme

from helpers.deadline import DEADLINE
from trisock.pluto import async_socket, socket
from trisock.pluto.blocking import background

# ---- both sides ----


def finish(coroutine: Any) -> Any:
    """Run a coroutine outside Trio: nothing in it may wait for Trio."""
    try:
        coroutine.send(None)
    except StopIteration as exc:
        return exc.value
    raise AssertionError("it waits for Trio")


def both_sides(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    @functools.wraps(test)
    def on(side: str, **kwargs: object) -> None:
        async def bounded_test() -> None:
            with trio.fail_after(DEADLINE):
                await test(**kwargs)

        if side == "inside":
            trio.run(bounded_test)
        else:
            finish(test(**kwargs))

    signature = inspect.signature(test)
    parameters = [
        *signature.parameters.values(),
        inspect.Parameter("side", inspect.Parameter.KEYWORD_ONLY),
    ]
    on.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    marked: Callable[..., None] = pytest.mark.parametrize("side", ["inside", "outside"])(on)
    return marked


async def got(result: Any) -> Any:
    return await result if inspect.isawaitable(result) else result


class Thread:
    """A thread whose result, or exception, is wanted."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._outcome: Any = None
        self._function = function
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._outcome = self._function(), None
        except BaseException as exc:
            self._outcome = None, exc

    def result(self) -> Any:
        self._thread.join()
        value, exc = self._outcome
        self._outcome = None
        if exc is not None:
            raise exc
        return value


def inside() -> bool:
    return trio.lowlevel.in_trio_run()


async def together(
    first: Callable[[], Awaitable[Any]], second: Callable[[], Awaitable[Any]]
) -> tuple[Any, Any]:
    """Run two functions at once, in tasks or in threads; return their results."""
    if not inside():
        thread = Thread(lambda: finish(second()))
        return await first(), thread.result()
    results: dict[int, Any] = {}

    async def run(index: int, function: Callable[[], Awaitable[Any]]) -> None:
        results[index] = await function()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run, 1, second)
        await run(0, first)
    return results[0], results[1]


# ---- peers ----


async def pair() -> tuple[Any, Any]:
    """Return the two ends (client, server) of a connection."""
    listening = socket.listen(0)
    assert listening is not None
    client = await got(socket.connect("127.0.0.1", listening.port))
    server = await got(listening.accept())
    await got(listening.close())
    return client, server


async def raw_peer() -> tuple[Any, stdlib.socket]:
    """Return a client and the plain, blocking socket at its other end."""
    with stdlib.create_server(("127.0.0.1", 0)) as listening:
        client = await got(socket.connect("127.0.0.1", listening.getsockname()[1]))
        raw, _ = listening.accept()
    raw.setsockopt(stdlib.IPPROTO_TCP, stdlib.TCP_NODELAY, 1)
    raw.settimeout(DEADLINE)
    return client, raw


async def arrived(sock: Any) -> None:
    """Wait until there is something to read."""
    if inside():
        await trio.lowlevel.wait_readable(sock._sock.fileno())
    else:
        select.select([sock._sock.fileno()], [], [], DEADLINE)


async def starttls_on_both(
    client: Any, server: Any, for_client: object, for_server: object
) -> tuple[object, object]:
    return await together(
        lambda: got(client.starttls(for_client)), lambda: got(server.starttls(for_server))
    )


def mapping(leaf: trustme.LeafCert) -> dict[str, str | bytes]:
    """Return what Pluto's page calls a certificate."""
    return {
        "chain": b"".join(each.bytes() for each in leaf.cert_chain_pems).decode(),
        "private_key": leaf.private_key_pem.bytes(),
    }


def serve_once(answer: bytes = b"HTTP/1.1 200 OK\r\n\r\n") -> tuple[int, Thread]:
    """Return a port, and the thread that answers there one request and returns it."""
    listening = stdlib.create_server(("127.0.0.1", 0))

    def serve() -> bytes:
        with listening, listening.accept()[0] as raw:
            request = raw.recv(65536)
            raw.sendall(answer)
            return request

    return int(listening.getsockname()[1]), Thread(serve)


async def echo(s: async_socket) -> None:
    while data := await s.recv():
        await s.send(data)


# ---- threads ----


async def in_thread(function: Callable[[], Any]) -> Any:
    return await trio.to_thread.run_sync(function)


def wait_a_pass() -> Awaitable[None] | None:
    """Let others run: a checkpoint inside, a call of nothing outside."""
    return trio.lowlevel.checkpoint() if inside() else background.call(trio.lowlevel.checkpoint)


def raise_in_main(signum: signal.Signals = signal.SIGINT) -> None:
    ident = threading.main_thread().ident
    assert ident is not None
    signal.pthread_kill(ident, signum)
