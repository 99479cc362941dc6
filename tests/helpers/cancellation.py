"""Cancellation of each public async method, at each of its cancel points.

A test calls one method. The test runs repeatedly, each time on fresh connections. In run number n,
the call is cancelled at its n-th cancel point. The runs end when every point has been tried.
The call has a cancel point whenever one of its tasks:

- is about to resume (the cancellation then coincides with the awaited event);
- has blocked or yielded;
- checks for cancellation (``checkpoint_if_cancelled``).

Each run ends with checks: the state must be as the docs promise, and the call must have left no
open descriptor and no running task.
The peer is not a task: the peer takes its next step when every task is blocked.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import io
import itertools
import os
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

import trisock
from helpers.pairs import clog, closing, raw_pair, raw_unix_pair
from helpers.peers import Peer, Script, alongside
from helpers.reads import READS
from trisock import ClientTLS, ServerTLS, Socket, pluto
from trisock.pluto.blocking import current_run
from trisock.pluto.tcp import TCPTransport

Call = Callable[[], Awaitable[Any]]


class Attempt(trio.abc.Instrument):
    """Makes a call, and cancels it at cancel point number ``point``, if the call gets that far.

    Attributes:
      reached: how many cancel points the call has passed.
      cancelled: whether the cancellation ended the call.
      value: the call's return value.
      error: the exception that the call raised, unless it was the cancellation.
    """

    def __init__(self, point: int) -> None:
        self.point = point
        self.reached = 0
        self.cancelled = False
        self.value: Any = None
        self.error: BaseException | None = None
        self._scope = trio.CancelScope()
        self._nursery: trio.Nursery | None = None
        self._tasks: set[trio.lowlevel.Task] = set()

    async def __call__(self, call: Call, script: Script | None = None) -> None:
        """Run the script's first step, then make the call. The other steps run during the call."""
        trio.lowlevel.add_instrument(self)
        try:
            async with alongside(script or iter(())):
                with self._watching_checkpoints():
                    async with trio.open_nursery() as self._nursery:
                        self._nursery.start_soon(self._run, call)
        finally:
            trio.lowlevel.remove_instrument(self)
        self.cancelled = self._scope.cancelled_caught

    async def _run(self, call: Call) -> None:
        with self._scope:
            try:
                self.value = await call()
            except Exception as exc:
                self.error = exc
        self._tasks.clear()

    @contextlib.contextmanager
    def _watching_checkpoints(self) -> Iterator[None]:
        real = trio.lowlevel.checkpoint_if_cancelled

        async def checkpoint_if_cancelled() -> None:
            self._pass_point(trio.lowlevel.current_task())
            await real()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trio.lowlevel, "checkpoint_if_cancelled", checkpoint_if_cancelled)
            yield

    def _pass_point(self, task: trio.lowlevel.Task) -> None:
        if task in self._tasks:
            self.reached += 1
            if self.reached == self.point:
                self._scope.cancel()

    def task_spawned(self, task: trio.lowlevel.Task) -> None:
        nursery = task.parent_nursery
        if nursery is not None and (nursery is self._nursery or nursery.parent_task in self._tasks):
            self._tasks.add(task)

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self._pass_point(task)

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        self._pass_point(task)


def at_every_cancel_point(test: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    """Run a test once for each cancel point. The test makes its call with ``attempt``."""

    @functools.wraps(test)
    async def repeated(**fixtures: object) -> None:
        for point in itertools.count(1):
            descriptors, tasks = os.listdir("/proc/self/fd"), _living_tasks()
            attempt = Attempt(point)
            await test(attempt=attempt, **fixtures)
            assert os.listdir("/proc/self/fd") == descriptors, (
                f"descriptors left open at point {point}"
            )
            assert _living_tasks() == tasks
            assert attempt.cancelled or point > 1, "the call did not check for cancellation first"
            if attempt.reached < point:
                return

    signature = inspect.signature(test)
    parameters = [each for name, each in signature.parameters.items() if name != "attempt"]
    repeated.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return repeated


def _living_tasks() -> int:
    return trio.lowlevel.current_statistics().tasks_living


def covers(*names: str) -> Callable[[Any], Any]:
    """Declare the public names that a test covers.

    Each argument is a string, ``*D`` or ``*D.values()``. D is a dict in the test's module.
    """
    return lambda test: test


def covered(file: Path) -> set[str]:
    """Return all names that the tests of a file cover. Parse the file, but do not import it."""
    tree = ast.parse(file.read_text())
    dicts: dict[str, ast.Dict] = {}
    for node in tree.body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, ast.Dict):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            dicts[ast.unparse(target)] = node.value
    names: set[str] = set()
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "covers":
            for argument in call.args:
                names |= _names_of(argument, dicts)
    return names


def _names_of(argument: ast.expr, dicts: dict[str, ast.Dict]) -> set[str]:
    if not isinstance(argument, ast.Starred):
        return {ast.literal_eval(argument)}
    name, _, method = ast.unparse(argument.value).partition(".")
    found = dicts[name].values if method == "values()" else dicts[name].keys
    return {ast.literal_eval(each) for each in found if each is not None}


def grid(usual: Callable[..., bool], *axes: Iterable[object]) -> list[Any]:
    """Return all combinations for ``parametrize``.

    A normal run tries a combination only if ``usual`` returns True for it. If several combinations
    take the same path through the code, ``usual`` returns True for only one of them.
    """
    return [
        pytest.param(*each, marks=() if usual(*each) else pytest.mark.rare)
        for each in itertools.product(*axes)
    ]


# ---- connections ----

UNIX, TCP = "unix", "tcp"
TLS = ["TLSv1_2 client", "TLSv1_3 client", "TLSv1_3 server"]
LAYERS = [UNIX, TCP, *TLS]
PLAIN = "plain"
SERVERS = ["TLSv1_2 server", "TLSv1_3 server"]


@dataclass(frozen=True)
class Connections:
    """Makes connections of any layer, between a Socket and a peer that is not a task.

    In the layer "TLSv1_2 client", the Socket is the TLS client.
    """

    client_tls: ClientTLS
    server_tls: ServerTLS
    peer_contexts: dict[str, ssl.SSLContext]

    def role_of(self, layer: str) -> Any:
        """Return the Socket's TLS settings, or None if the layer is plain."""
        if layer == PLAIN:
            return None
        return self.client_tls if layer.endswith("client") else self.server_tls

    def start_tls(self, peer: Peer, layer: str, **options: int) -> None:
        """Make the peer start TLS, unless the layer is plain."""
        if layer == PLAIN:
            return
        server_side = layer.endswith("client")
        peer.start_tls(
            self.peer_contexts[layer],
            server_side=server_side,
            server_hostname=None if server_side else "example.org",
            **options,
        )

    @contextlib.asynccontextmanager
    async def pair(self, layer: str, greeting: bytes = b"") -> AsyncIterator[tuple[Socket, Peer]]:
        sock, raw = raw_pair() if layer == TCP else raw_unix_pair()
        async with closing(sock):
            with Peer(raw) as peer:
                peer.greeting = greeting
                if layer in TLS:
                    self.start_tls(peer, layer)
                    async with alongside(peer.acting()):
                        await sock.starttls(self.role_of(layer))
                    peer.act()
                    peer.greeting = b""
                yield sock, peer


def connect_to(listener: trisock.Listener) -> socket.socket:
    host, port = listener.addresses[-1]
    if not port:
        with contextlib.ExitStack() as on_error:
            client = on_error.enter_context(socket.socket(socket.AF_UNIX))
            client.connect(host)
            on_error.pop_all()
        return client
    return socket.create_connection(("::1" if ":" in host else "127.0.0.1", port))


# ---- shared by several tests ----

LARGE = bytes(range(256)) * 1200  # more than the kernel accepts in one call


def pluto_socket(sock: Socket) -> pluto.async_socket:
    run = current_run()
    assert run is not None
    return pluto.async_socket(TCPTransport(sock, owned=False), run)


async def assert_closed(sock: Socket, peer: Peer) -> None:
    """Check that every method raises ClosedResourceError, and that the peer sees the close."""
    assert sock.fileno() == -1
    assert not sock.isopen()
    for read in READS.values():
        with pytest.raises(trio.ClosedResourceError):
            await read(sock)
    for call in (
        sock.send_eof,
        sock.stoptls,
        sock.wait_send_all_might_not_block,
        lambda: sock.send(b"x"),
        lambda: sock.send_file(io.BytesIO(b"x")),
        lambda: sock.starttls("example.org"),
    ):
        with pytest.raises(trio.ClosedResourceError):
            await call()
    await sock.close()
    peer.act()
    assert peer.gone


async def peer_has_closed(sock: Socket, peer: Peer) -> None:
    peer.raw.close()


async def sending_is_clogged(sock: Socket, peer: Peer) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    await clog(sock)


def during(script: Script) -> Script:
    """Delay a script by one step, so that its first step happens during the call, not before."""
    yield
    yield from script


def advancing(clock: trio.testing.MockClock, script: Script) -> Script:
    """Advance the clock at each step of a script, and keep advancing it after the script."""
    for _ in itertools.chain(script, itertools.repeat(None)):
        clock.jump(0.1)
        yield
