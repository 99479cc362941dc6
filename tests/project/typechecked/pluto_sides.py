"""The types of ``trisock.pluto`` outside and inside Trio. (``nox -s lint`` checks this file.)"""

from __future__ import annotations

from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, Literal

from trisock.pluto import async_socket, listener, scheduler, socket

if TYPE_CHECKING:
    from typing_extensions import assert_type


def outside() -> None:
    """In a script, a call returns its result."""
    s = socket.connect("localhost", 80)
    assert s
    plain(s)
    listening = socket.listen(0)
    assert_type(listening, listener | None)
    if listening is not None:
        plain(listening.accept())
        assert_type(listening.hasconnection(), bool)
        assert_type(listening.port, int)
        listening.close()
    scheduler().run()


def plain(s: socket) -> None:
    """Use a socket in a script."""
    assert_type(s.send("data"), bool)
    assert_type(s.send(b"data"), bool)
    assert_type(s.recv(), bytes | None)
    assert_type(s.peek(), bytes | None)
    assert_type(s.starttls("localhost"), bool | None)
    assert_type(s.starttls([{"chain": "", "private_key": b""}]), bool | None)
    assert_type(s.getpeer(), tuple[str, int])
    assert_type(s.getside(), Literal["client", "server"])
    assert_type(s.isopen(), bool)
    s.close()
    s.unrecv("data")
    s.recv(1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    s.send(1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


async def inside() -> None:
    """In a task, a call returns an awaitable of its result."""
    s = await socket.connect("localhost", 80)
    assert_type(s, async_socket | None)
    s.recv()  # type: ignore[union-attr]  # pyright: ignore[reportOptionalMemberAccess, reportUnusedCoroutine]
    if s is not None:
        await handler(s)
    listening = socket.listen(0)
    if listening is not None:
        assert_type(await listening.accept(), async_socket | None)
        await listening.close()
    sched = scheduler()
    assert_type(socket.bind(sched, 0, handler), listener)
    socket.bind(sched, 0, lambda s: s.send("hello"))
    sched.add(inside)
    await sched.run()


async def handler(s: async_socket) -> None:
    """Use a socket in a task."""
    assert_type(await s.send("data"), bool)
    assert_type(await s.recv(), bytes | None)
    assert_type(await s.peek(), bytes | None)
    assert_type(await s.starttls("localhost"), bool | None)
    receiving: Coroutine[Any, Any, bytes | None] = s.recv()
    await receiving
    s.send("forgotten")  # type: ignore[unused-coroutine]  # pyright: ignore[reportUnusedCoroutine]
    assert_type(s.istls(), bool)
    await s.close()
    data: bytes = s.recv()  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
    await socket.send(s, data)
