"""The types of ``trisock.pluto`` outside and inside Trio. (``nox -s lint`` checks this file.)"""

from __future__ import annotations

from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, Literal

from trisock.pluto import async_socket, coroutine, listener, scheduler, server, socket

if TYPE_CHECKING:
    from typing_extensions import assert_type

    StartTLSResult = bool | tuple[Literal[True], str | None] | None


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
    serving = socket.udpserver("127.0.0.1:80")
    assert_type(serving, socket | None)
    if serving is not None:
        plain(serving)
    s = socket.connect("localhost", 80, "udp")
    socket.connect("localhost", 80, "sctp")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    scheduler().run()


def plain(s: socket) -> None:
    """Use a socket in a script."""
    assert_type(s.send("data"), bool)
    assert_type(s.send(b"data"), bool)
    assert_type(s.recv(), bytes | None)
    assert_type(s.peek(), bytes | None)
    assert_type(s.starttls("localhost"), StartTLSResult)
    assert_type(s.starttls([{"chain": "", "private_key": b""}]), StartTLSResult)
    assert_type(s.starttls("localhost", {"alpn": ["h2"]}), StartTLSResult)
    assert_type(s.getpeer(), tuple[str, int])
    assert_type(s.setpeer("127.0.0.1", 80), None)
    assert_type(s.isudp(), bool)
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
    bound = socket.bind(sched, 0, handler)
    assert_type(bound, server)
    assert_type(bound.port, int)
    bound.close()
    socket.bind(sched, "127.0.0.1:80", lambda s: s.send("hello"))
    assert_type(sched.add(inside), coroutine)
    assert_type(sched.addloop(lambda: False), coroutine)
    sched.add(bound)
    sched.yieldfunc = lambda: print("yield")
    sched.errorfunc = print
    sched.errorfunc = None
    serving = async_socket.udpserver(80)
    if serving is not None:
        await handler(serving)
    await sched.run()


async def handler(s: async_socket) -> None:
    """Use a socket in a task."""
    assert_type(await s.send("data"), bool)
    assert_type(await s.recv(), bytes | None)
    assert_type(await s.peek(), bytes | None)
    assert_type(await s.starttls("localhost"), StartTLSResult)
    receiving: Coroutine[Any, Any, bytes | None] = s.recv()
    await receiving
    s.send("forgotten")  # type: ignore[unused-coroutine]  # pyright: ignore[reportUnusedCoroutine]
    assert_type(s.istls(), bool)
    await s.close()
    data: bytes = s.recv()  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
    await socket.send(s, data)
