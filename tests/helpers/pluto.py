"""Helpers for the tests of ``trisock.pluto``.

The decorator ``both_sides`` runs an async test twice, inside and outside Trio. Inside Trio, the
test runs as a task. Outside Trio, the test must finish without waiting for Trio.
``got`` awaits a result only if the result is awaitable, so that one test works on both sides.
"""

from __future__ import annotations

import errno
import functools
import inspect
import os
import select
import signal
import socket as stdlib
import subprocess
import sys
import textwrap
import threading
import traceback
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn

import pytest
import trio

from helpers.deadline import DEADLINE
from trisock import Certificate
from trisock.pluto import async_socket, socket
from trisock.pluto.blocking import background

# ---- tests inside and outside Trio ----


def run_outside(coroutine: Any) -> Any:
    """Run a coroutine outside Trio. The coroutine must not wait for Trio."""
    try:
        coroutine.send(None)
    except StopIteration as exc:
        return exc.value
    raise AssertionError("the coroutine waits for Trio")


def both_sides(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Run a test twice: inside Trio and outside Trio."""

    @functools.wraps(test)
    def on(side: str, **kwargs: object) -> None:
        async def bounded_test() -> None:
            with trio.fail_after(DEADLINE):
                await test(**kwargs)

        if side == "inside":
            trio.run(bounded_test)
        else:
            run_outside(test(**kwargs))

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


def inside() -> bool:
    return trio.lowlevel.in_trio_run()


def checkpoint() -> Awaitable[None] | None:
    """Let other tasks run. Outside Trio, these are the tasks of the background thread."""
    return trio.lowlevel.checkpoint() if inside() else background.call(trio.lowlevel.checkpoint)


async def run_both(
    first: Callable[[], Awaitable[Any]], second: Callable[[], Awaitable[Any]]
) -> tuple[Any, Any]:
    """Run two functions concurrently, in tasks or threads. Return both results."""
    if not inside():
        thread = Thread(lambda: run_outside(second()))
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


async def tls_pair(certs: object) -> tuple[Any, Any]:
    """Return the two ends (client, server) of a TLS connection."""
    client, server = await pair()
    assert await starttls_on_both(client, server, "localhost", certs) == (True, True)
    return client, server


async def raw_peer() -> tuple[Any, stdlib.socket]:
    """Return a Pluto client and its peer. The peer is a blocking stdlib socket."""
    with stdlib.create_server(("127.0.0.1", 0)) as listening:
        client = await got(socket.connect("127.0.0.1", listening.getsockname()[1]))
        raw, _ = listening.accept()
    raw.setsockopt(stdlib.IPPROTO_TCP, stdlib.TCP_NODELAY, 1)
    raw.settimeout(DEADLINE)
    return client, raw


def recv_all(raw: stdlib.socket) -> bytes:
    """Receive until the peer ends the connection."""
    return b"".join(iter(lambda: raw.recv(65536), b""))


def reset(raw: stdlib.socket) -> None:
    """Close a socket so that its peer sees a reset."""
    raw.setsockopt(stdlib.SOL_SOCKET, stdlib.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    raw.close()


def check_not_listening(port: int) -> None:
    """Check that nothing listens on a port."""
    with pytest.raises(ConnectionRefusedError):
        stdlib.create_connection(("127.0.0.1", port))


async def wait_readable(sock: Any) -> None:
    """Wait until data or EOF has arrived."""
    if inside():
        await trio.lowlevel.wait_readable(sock._transport.sock.fileno())
    else:
        select.select([sock._transport.sock.fileno()], [], [], DEADLINE)


async def wait_for_client(listening: Any) -> None:
    """Wait until ``hasconnection`` finds a client."""
    while not listening.hasconnection():
        await got(checkpoint())


async def starttls_on_both(
    client: Any, server: Any, for_client: object, for_server: object
) -> tuple[object, object]:
    return await run_both(
        lambda: got(client.starttls(for_client)), lambda: got(server.starttls(for_server))
    )


def pluto_certificate(certificate: Certificate) -> dict[str, str | bytes]:
    """Return a certificate in the form that Pluto's page documents."""
    return {"chain": certificate._chain.decode(), "private_key": certificate._private_key}


def serve_once(response: bytes = b"HTTP/1.1 200 OK\r\n\r\n") -> tuple[int, Thread]:
    """Serve one request. Return the port, and a Thread whose ``result`` returns the request."""
    listening = stdlib.create_server(("127.0.0.1", 0))

    def serve() -> bytes:
        with listening, listening.accept()[0] as raw:
            request = raw.recv(65536)
            raw.sendall(response)
            return request

    return int(listening.getsockname()[1]), Thread(serve)


async def echo(s: async_socket) -> None:
    while data := await s.recv():
        await s.send(data)


# ---- threads ----


class Thread:
    """Runs a function in a thread. ``result`` returns the value or raises the exception."""

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


async def in_thread(function: Callable[[], Any]) -> Any:
    return await trio.to_thread.run_sync(function)


def recv_in_thread(sock: Any) -> Thread:
    """Start a read in a thread outside Trio, and wait until the read is in progress."""
    thread = Thread(sock.recv)
    while not sock._transport.sock._connection.reading.in_use:
        checkpoint()
    return thread


def background_threads() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name == "trisock"]


def signal_main_thread(signum: signal.Signals = signal.SIGINT) -> None:
    ident = threading.main_thread().ident
    assert ident is not None
    signal.pthread_kill(ident, signum)


# ---- processes ----

FORK_WARNS = ("-W", "ignore::DeprecationWarning")  # Python 3.12 warns about a fork with threads
STRICT = ("-X", "dev", "-W", "error")


def run_program(
    text: str,
    *options: str,
    prelude: str = "from trisock.pluto import scheduler, socket\n",
    timeout: float = DEADLINE,
) -> str:
    """Run a program and return its output. It must succeed and write nothing to stderr."""
    done = subprocess.run(
        [sys.executable, *options, "-c", prelude + textwrap.dedent(text)],
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def in_child(function: Callable[[], object]) -> None:
    """Run a function in a forked child. The function must not fail or hang."""
    number = os.fork()
    if not number:
        status = 1
        try:
            signal.alarm(DEADLINE)
            function()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]) == 0


# ---- failures of the system ----


def failing(error: BaseException) -> Callable[..., None]:
    """Return a function that raises an exception."""

    def fail(*_: object) -> None:
        raise error

    return fail


def refuse_thread(*_: object, **__: object) -> NoReturn:
    """Fail as ``Thread.start`` does when the system cannot start a thread."""
    raise RuntimeError("can't start new thread")


def raise_emfile(*_: object) -> NoReturn:
    raise OSError(errno.EMFILE, "Too many open files")
