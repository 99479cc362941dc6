"""faults: a relay that behaves like a bad network."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable

import trio

from .. import Listener, Socket, connect, listen
from ._background_tasks import background_tasks
from ._fault_plan import INJECTED, ConnectionPlan, Direction

_HOST = "127.0.0.1"


class FaultyRelay:
    """A relay that ``faults`` has started.

    Attributes:
      port: the port on 127.0.0.1 to connect to instead of the server's.
      injected: the line that ``inject`` adds, which must never have an effect.
    """

    injected = INJECTED

    def __init__(self, listener: Listener) -> None:
        self.port = listener.addresses[0].port


@contextlib.asynccontextmanager
async def faults(
    port: int,
    *,
    seed: int = 0,
    split: bool = True,
    delay: bool = True,
    truncate: bool = False,
    reset: bool = False,
    inject: bool = False,
) -> AsyncIterator[FaultyRelay]:
    """Run a relay to the server at ``port``. The relay behaves like a bad network.

    Each connection to ``relay.port`` on 127.0.0.1 is relayed to ``port`` on 127.0.0.1. The faults
    of the n-th connection depend on ``seed`` and n only, and each fault is tied to an offset in the
    stream. So a failure can be repeated. Turning one kind of fault on or off does not change the
    others::

        async with faults(server.port, seed=seed, reset=True) as relay:
            async with await trisock.connect("127.0.0.1", relay.port) as sock:
                ...

    Every program must work with ``split`` and ``delay``, which are on by default. The other faults
    end or damage connections.

    Args:
      port: the server's port.
      seed: selects the faults.
      split: send the bytes in pieces. On average, half of the pieces have 1 to 4 bytes, and the
        others have 1 to 4096 bytes.
      delay: pause once within the first 64 bytes, and then after every 1 to 4096 bytes. A pause is
        1 to 8 checkpoints. One pause out of four also sleeps for 1 to 10 milliseconds. Each
        direction of a connection has at most 16 such sleeps.
      truncate: end one connection out of two in both directions, as if each side had closed it.
        Under TLS, there is no ``close_notify``. This happens after a number of bytes in one of the
        two directions. The number is 0 to 4095, and small numbers are likelier: half of them are
        below 64. A connection that carries fewer bytes is not affected.
      reset: reset one connection out of two, on both sides, after a number of bytes that is drawn
        as for ``truncate``. If both are True, one connection out of two is truncated or reset.
      inject: add the line ``relay.injected``, as an attacker can do before TLS starts. The added
        line follows the client's first line that contains ``TLS`` in upper or lower case
        (``STARTTLS``, ``STLS``, ``AUTH TLS``), in the same segment. In one connection out of two,
        the added line follows the server's next line instead. Nothing is added to a connection that
        starts with TLS.

    Returns: a context manager. Its value has the attributes ``port`` and ``injected``. The end of
    the block closes all connections immediately.

    Raises:
      TypeError: ``port`` or ``seed`` is not an int, or another argument is not a bool.
      OSError: no port can be opened.

    The relay runs in its own nursery. It holds at most one chunk for each direction of a
    connection, so a receiver that does not read blocks the sender. A half-close is passed on. A
    reset of one side is passed on when the relay next reads from that side. While the relay waits
    for a receiver that does not read, it does not read from the sender, so it does not notice that
    the sender has reset its connection. A connection that the server refuses is reset.
    Cancellation closes everything. The pauses follow Trio's clock, so they take no time with
    ``autojump_clock``.
    """
    for name, number in (("port", port), ("seed", seed)):
        if type(number) is not int:
            raise TypeError(f"{name} must be an int, not {type(number).__name__}")
    kinds = {
        "split": split,
        "delay": delay,
        "truncate": truncate,
        "reset": reset,
        "inject": inject,
    }
    for name, value in kinds.items():
        if type(value) is not bool:
            raise TypeError(f"{name} must be a bool, not {type(value).__name__}")

    def plan_of(connection: int) -> ConnectionPlan:
        return ConnectionPlan(seed, connection, **kinds)

    async with await listen(0, host=_HOST) as listener, background_tasks() as nursery:
        nursery.start_soon(_relay, listener, port, plan_of, nursery)
        yield FaultyRelay(listener)


async def _relay(
    listener: Listener,
    port: int,
    plan_of: Callable[[int], ConnectionPlan],
    nursery: trio.Nursery,
) -> None:
    # We do not use bind: Trio starts tasks in random order, but we number them in accept's order.
    number = 0
    while True:
        client = await listener.accept()
        nursery.start_soon(_carry, client, port, plan_of(number))
        number += 1


async def _carry(client: Socket, port: int, plan: ConnectionPlan) -> None:
    """Relay one connection until both directions have ended, or the connection is cut."""
    with contextlib.ExitStack() as stack:
        stack.callback(client.abort)
        try:
            server = await connect(_HOST, port)
        except OSError:
            return
        stack.callback(server.abort)
        if await _copy_both(client, server, plan):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client.close)
                nursery.start_soon(server.close)


async def _copy_both(client: Socket, server: Socket, plan: ConnectionPlan) -> bool:
    """Copy both directions. Return whether to close the connections, rather than reset them."""
    clean = True
    async with trio.open_nursery() as nursery:

        async def copy(source: Socket, target: Socket, direction: Direction) -> None:
            nonlocal clean
            try:
                clean &= await _copy(source, target, direction, plan)
            except trio.BrokenResourceError:  # the source was reset
                clean = False
                nursery.cancel_scope.cancel()
            if plan.is_cut():
                nursery.cancel_scope.cancel()

        nursery.start_soon(copy, client, server, plan.up)
        nursery.start_soon(copy, server, client, plan.down)
    return plan.cut == "truncate" if plan.is_cut() else clean


async def _copy(source: Socket, target: Socket, direction: Direction, plan: ConnectionPlan) -> bool:
    """Copy one direction until it ends or the connection is cut.

    Returns False if the target can receive no more. Data that the target sent before its reset may
    then still be in flight in the other direction. That direction ends with the reset.
    """
    while not plan.is_cut() and (chunk := await source.recv()):
        for piece in direction.feed(chunk):
            for _ in range(piece.passes):
                await trio.lowlevel.checkpoint()
            if piece.seconds:
                await trio.sleep(piece.seconds)
            try:
                await target.send(piece.data)
            except trio.BrokenResourceError:
                return False
    if not plan.is_cut():
        with contextlib.suppress(trio.BrokenResourceError):
            await target.send_eof()
    return True
