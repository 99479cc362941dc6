"""A server that stops, at any step of any task, answers a request or leaves it unread.

Each request gets a complete answer, unless no handler has read it. Then the client sees a clean
end, and can send the request again.
"""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable

import pytest
import trio

import trisock
from helpers.cancellation import PLAIN, SERVERS, Connections, connect_to, grid
from helpers.peers import Peer, Script, alongside
from trisock import Socket

# The client sends these in steps: one request, two requests, the two halves of a request, and one
# more request. ``in_parts`` splits the last request's TLS record in two.
STEPS = [b"one\n", b"two\nthree\n", b"fo", b"ur\n", b"five\n"]

Handler = Callable[[Socket, list[bytes]], Awaitable[None]]


async def by_lines(sock: Socket, requests: list[bytes]) -> None:
    async for line in sock.lines(idle=True):
        requests.append(line)
        await trio.lowlevel.checkpoint()
        await sock.send(line, b"!\n")


async def by_blocks(sock: Socket, requests: list[bytes]) -> None:
    while True:
        try:
            with sock.idle(timeout=100):
                line = await sock.recv_line()
        except trisock.IncompleteReadError:
            return
        requests.append(line)
        await sock.send(line, b"!\n")


async def by_batches(sock: Socket, requests: list[bytes]) -> None:
    async for lines in sock.lines(idle=True).batches():
        requests += lines
        await sock.send(*(line + b"!\n" for line in lines))


def in_parts(wire: bytes, step: bytes) -> list[bytes]:
    return [wire[:-1], wire[-1:]] if step == STEPS[-1] else [wire]


class StopAt(trio.abc.Instrument):
    """Stops a server before step number ``moment``, counted over all its tasks."""

    def __init__(self, moment: int) -> None:
        self.moment = moment
        self.passed = 0
        self.server: trisock.Server | None = None

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if self.server is not None and "run_steps" not in task.name:  # the client's script
            self.passed += 1
            if self.passed == self.moment:
                self.server.stop()


@pytest.mark.parametrize(
    ("handler", "layer"),
    grid(
        lambda handler, layer: layer == PLAIN or (handler, layer) == (by_lines, SERVERS[1]),
        [by_lines, by_blocks, by_batches],
        [PLAIN, *SERVERS],
    ),
)
async def test_a_stop_at_any_moment_loses_no_request(
    handler: Handler, layer: str, connections: Connections
) -> None:
    for moment in itertools.count(1):
        stop = StopAt(moment)
        trio.lowlevel.add_instrument(stop)
        try:
            await converse(stop, handler, layer, connections)
        finally:
            trio.lowlevel.remove_instrument(stop)
        if stop.passed < moment:
            assert moment > 20
            return


async def converse(stop: StopAt, handler: Handler, layer: str, connections: Connections) -> None:
    requests: list[bytes] = []
    listener = trisock.listen_nowait(0, host="127.0.0.1")
    with Peer(connect_to(listener)) as peer:
        connections.start_tls(peer, layer)

        def script() -> Script:
            """Send each step when the server waits, then close. Stop a server that still runs."""
            assert stop.server is not None
            yield from until(lambda: peer.gone or layer == PLAIN or peer.secured)
            for step in STEPS:
                parts = [] if peer.gone else in_parts(peer.encrypt(step), step)
                for part in parts:
                    peer.send(part)
                    yield
                    peer.act()
                yield
                peer.act()
            peer.end()
            yield from until(lambda: peer.gone)
            peer.end()  # FIN, after the end of TLS
            stop.server.stop()

        def until(condition: Callable[[], bool]) -> Script:
            while not condition():
                yield
                peer.act()

        async with trio.open_nursery() as nursery:
            stop.server = await trisock.bind(
                nursery,
                listener,
                lambda sock: handler(sock, requests),
                tls=connections.role_of(layer),
            )
            async with alongside(script()):
                await stop.server.wait_closed()
        peer.act()
        where = f"at moment {stop.moment}"
        assert peer.heard == b"".join(each + b"!\n" for each in requests), where
        assert peer.finished, where
        assert stop.server.stats().handler_errors == 0
