"""The hostile clients of ``check_handler`` that send a lot of data."""

from __future__ import annotations

import contextlib
import gc
import time
import tracemalloc
from collections.abc import Awaitable, Callable, Iterator

import trio
import trio.testing

from .. import Socket
from ._background_tasks import background_tasks
from ._session import QUIET, Session, send

_CERTAINLY_QUIET = 0.05  # seconds; an acknowledgement may be delayed by 40 ms

_MIB = 1024 * 1024

# A handler may hold at most this much for one client, in MiB: data of a request, and answers. A
# request may be a large message. Answers to short requests are small, so a queue of answers fills
# slowly.
MAX_REQUEST, MAX_ANSWERS = 8, 2

_ROUND = 64 * 1024  # bytes to send between two checks of how much the handler holds
_FILL = 640 * 1024  # bytes of requests; their answers do not fit into the kernel's buffers
_PIECE = 16 * 1024

_HEADER = 8  # bytes; frame headers are rarely longer


async def endless_request(session: Session) -> None:
    """Send requests that do not end, and read the answers.

    A line does not end because no line end comes. A frame is as long as its header says. The length
    may be anywhere near the start of the request. So, for each of the first bytes, we send a
    request in which this byte and all later bytes are 0xFF.
    """
    await _endless(session, b"", b"x")
    if session.is_line:
        return
    for number in range(min(_HEADER, len(session.request))):
        await _endless(session, session.request[:number], b"\xff")
    await _endless(session, session.cut_request, b"x")


async def _endless(session: Session, start: bytes, byte: bytes) -> None:
    sock = await session.open()

    async def read() -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            while await sock.recv():
                pass

    async with background_tasks() as nursery:
        nursery.start_soon(read)
        await _flood(session, sock, byte * _PIECE, MAX_REQUEST, start)


async def slow_reader(session: Session) -> None:
    """Send requests and read nothing. Another client must be served meanwhile."""
    request = session.request
    if session.is_line:  # lengthen it: short answers would take long to fill the buffers
        request = b"NOOP 0123456" + request[4:]
    requests = request * max(1, _PIECE // len(request))
    # With small buffers in the kernel, the answers soon have to wait for the client.
    session.watched.narrow = True
    sock = await session.open()
    session.watched.narrow = False
    await send(sock, requests)
    if not await _is_answered(sock) or not await _fill(session, sock, requests):
        await _flood(session, sock, requests, MAX_ANSWERS)
    other = await session.open()
    await send(other, session.request)
    await session.finish(other, "the handler serves no other client while one client does not read")
    await session.quiet()
    sock.abort()


async def _is_answered(sock: Socket) -> bool:
    """Return whether an answer has arrived. Leave it unread."""
    return await _unless_stuck(QUIET, trio.lowlevel.wait_readable, sock.stream.socket)


async def _fill(session: Session, sock: Socket, piece: bytes) -> bool:
    """Send requests until the kernel's buffers are full of answers.

    Returns whether the handler has stopped reading, because it cannot send its answers.
    """
    with _time_to_send(session) as has_time:
        for _ in range(max(1, _FILL // len(piece))):
            if not has_time() or not await _send_unless_stuck(sock, piece, _CERTAINLY_QUIET):
                return True
    return False


async def _flood(
    session: Session, sock: Socket, piece: bytes, most: int, start: bytes = b""
) -> None:
    """Send until the handler stops reading, or clearly holds little of what it has read.

    Args:
      start: what to send before the first piece.

    Raises AssertionError if the handler holds more than ``most`` MiB.
    """
    sent = 0
    with _memory() as memory, _time_to_send(session) as has_time:
        before = memory()

        def held() -> int:
            if memory() - before > most * _MIB:
                gc.collect()
            if memory() - before > most * _MIB:
                raise AssertionError(f"the handler holds more than {most} MiB for one client")
            return memory() - before

        await _send_unless_stuck(sock, start + piece)
        await session.quiet()
        before += held()  # only growth from now on is caused by the pieces
        while has_time() and await _send_unless_stuck(sock, piece):
            sent += len(piece)
            held()
            if sent % _ROUND < len(piece):
                await session.quiet()
                if held() < sent / 8:
                    return


@contextlib.contextmanager
def _time_to_send(session: Session) -> Iterator[Callable[[], bool]]:
    """Cancel the block after ``timeout`` seconds: a handler may read slowly.

    The value is a function, which returns False once this much real time has passed.
    """
    session.expect("the handler reads slowly", 2 * session.timeout)
    end = time.monotonic() + session.timeout
    with trio.move_on_after(session.timeout):
        yield lambda: time.monotonic() < end


async def _send_unless_stuck(sock: Socket, data: bytes, quiet: float = QUIET) -> bool:
    """Send data. Return False if the peer does not read, or if the connection has ended."""
    try:
        return await _unless_stuck(quiet, sock.send, data)
    except trio.BrokenResourceError:
        return False


async def _unless_stuck(
    quiet: float, function: Callable[..., Awaitable[object]], *args: object
) -> bool:
    """Call an async function. If all tasks are blocked, cancel the call and return False."""
    scope = trio.CancelScope()

    async def give_up() -> None:
        await trio.testing.wait_all_tasks_blocked(quiet)
        scope.cancel()

    async with background_tasks() as nursery:
        nursery.start_soon(give_up)
        with scope:
            await function(*args)
    return not scope.cancelled_caught


@contextlib.contextmanager
def _memory() -> Iterator[Callable[[], int]]:
    """Measure memory. The value is a function that returns the bytes in use by Python's objects."""
    was_tracing = tracemalloc.is_tracing()
    if not was_tracing:
        tracemalloc.start()
    try:
        yield lambda: tracemalloc.get_traced_memory()[0]
    finally:
        if not was_tracing:
            tracemalloc.stop()
