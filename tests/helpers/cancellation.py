"""Cancellation at every moment: each public async method, cancelled wherever it can be.

A call is made again and again, on fresh connections; the n-th time it is cancelled at its n-th
moment, until there is none that has not been tried. A moment is whatever lets a cancellation in:

- a task of the call is about to go on (what it has waited for has come, and now the cancel too);
- it has stopped, to wait or to let others run;
- it asks whether it is cancelled (``checkpoint_if_cancelled``).

After each attempt what the docs say about the state is checked, and that no descriptor and no task
is left. The peer is no task: it does its next step when every task is blocked.
"""

from __future__ import annotations

import ast
import contextlib
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
from trisock import ClientTLS, ServerTLS, Socket, pluto
from trisock.pluto.blocking import current_run

Call = Callable[[], Awaitable[Any]]


class Attempt(trio.abc.Instrument):
    """One call, cancelled at its n-th moment if it has so many.

    Attributes:
      reached: how many moments there were.
      cancelled: whether the call has ended by its cancellation.
      value: what it has returned, if it has.
      error: what it has raised, if that was anything else.
    """

    def __init__(self, moment: int) -> None:
        self.moment = moment
        self.reached = 0
        self.cancelled = False
        self.value: Any = None
        self.error: BaseException | None = None
        self._scope = trio.CancelScope()
        self._nursery: trio.Nursery | None = None
        self._tasks: set[trio.lowlevel.Task] = set()

    async def __call__(self, call: Call, script: Script | None = None) -> None:
        """Make the call, alongside what the peer does; the first step of that comes before."""
        trio.lowlevel.add_instrument(self)
        try:
            async with alongside(script or iter(())):
                with self._asked():
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
    def _asked(self) -> Iterator[None]:
        ask = trio.lowlevel.checkpoint_if_cancelled

        async def checkpoint_if_cancelled() -> None:
            self._pass_moment(trio.lowlevel.current_task())
            await ask()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trio.lowlevel, "checkpoint_if_cancelled", checkpoint_if_cancelled)
            yield

    def _pass_moment(self, task: trio.lowlevel.Task) -> None:
        if task in self._tasks:
            self.reached += 1
            if self.reached == self.moment:
                self._scope.cancel()

    def task_spawned(self, task: trio.lowlevel.Task) -> None:
        nursery = task.parent_nursery
        if nursery is not None and (nursery is self._nursery or nursery.parent_task in self._tasks):
            self._tasks.add(task)

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self._pass_moment(task)

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        self._pass_moment(task)


async def at_every_moment(scenario: Callable[[Attempt], Awaitable[None]]) -> None:
    """Run a scenario, which makes one attempt, until the call has no moment more."""
    for moment in itertools.count(1):
        descriptors, tasks = os.listdir("/proc/self/fd"), _living_tasks()
        attempt = Attempt(moment)
        await scenario(attempt)
        assert os.listdir("/proc/self/fd") == descriptors, f"left open at moment {moment}"
        assert _living_tasks() == tasks
        assert attempt.cancelled or moment > 1, "cancelled from the start, it did not look"
        if attempt.reached < moment:
            return


def _living_tasks() -> int:
    return trio.lowlevel.current_statistics().tasks_living


def covers(*names: str) -> Callable[[Any], Any]:
    """Say which public names a test is about: names, or keys or values of a dict of the module."""
    return lambda test: test


def covered(file: Path) -> set[str]:
    """Return all names that the tests of a file cover, as its text has them."""
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
    """Return all combinations, for ``parametrize``; those that are not ``usual`` in long runs only.

    Of cases that go the same way through the core, the usual run tries one.
    """
    return [
        pytest.param(*each, marks=() if usual(*each) else pytest.mark.interop)
        for each in itertools.product(*axes)
    ]


# ---- connections ----

UNIX, TCP = "unix", "tcp"
TLS = ["TLSv1_2 client", "TLSv1_3 client", "TLSv1_3 server"]
LAYERS = [UNIX, TCP, *TLS]
CLEAR = "clear"
SERVERS = ["TLSv1_2 server", "TLSv1_3 server"]


@dataclass(frozen=True)
class Kit:
    """What connections are made of."""

    client_tls: ClientTLS
    server_tls: ServerTLS
    peer_contexts: dict[str, ssl.SSLContext]

    def role_of(self, layer: str) -> ClientTLS | ServerTLS:
        return self.client_tls if layer.endswith("client") else self.server_tls

    def turn_to_tls(self, peer: Peer, layer: str, **options: int) -> None:
        """Let the peer of a layer's client, or server, speak TLS."""
        server_side = layer.endswith("client")
        peer.turn_to_tls(
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
                    self.turn_to_tls(peer, layer)
                    async with alongside(peer.acting()):
                        await sock.starttls(self.role_of(layer))
                    peer.act()
                    peer.greeting = b""
                yield sock, peer


# ---- what several of the tests use ----


def pluto_socket(sock: Socket) -> pluto.async_socket:
    return pluto.async_socket(sock, current_run(), owned=False)


LARGE = bytes(range(256)) * 1200  # more than the kernel takes at once


async def assert_closed(sock: Socket, peer: Peer) -> None:
    """Check that a socket is closed here, for every method, and over for the peer."""
    assert sock.fileno() == -1
    assert not sock.isopen()
    for call in (
        sock.recv,
        sock.peek,
        sock.receive_some,
        sock.send_eof,
        sock.stoptls,
        sock.wait_send_all_might_not_block,
        sock.lines().__anext__,
        lambda: sock.send(b"x"),
        lambda: sock.send_file(io.BytesIO(b"x")),
        lambda: sock.recv_exactly(1),
        lambda: sock.recv_until(b"\n"),
        lambda: sock.starttls("example.org"),
    ):
        with pytest.raises(trio.ClosedResourceError):
            await call()
    await sock.close()
    peer.act()
    assert peer.gone


async def the_peer_has_left(sock: Socket, peer: Peer) -> None:
    peer.raw.close()


async def sending_is_clogged(sock: Socket, peer: Peer) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    await clog(sock)


def jumping(clock: trio.testing.MockClock, script: Script) -> Script:
    """Let a script's time go on, too: what waits for nothing else has waited for that."""
    for _ in script:
        clock.jump(0.1)
        yield
    while True:
        clock.jump(0.1)
        yield


def connect_to(listener: trisock.Listener) -> socket.socket:
    host, port = listener.addresses[-1]
    if not port:
        with contextlib.ExitStack() as on_error:
            client = on_error.enter_context(socket.socket(socket.AF_UNIX))
            client.connect(host)
            on_error.pop_all()
        return client
    return socket.create_connection(("::1" if ":" in host else "127.0.0.1", port))
