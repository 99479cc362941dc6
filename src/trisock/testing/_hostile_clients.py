"""The hostile clients of ``check_handler``.

Each client is a function that takes a ``Session``. The function returns when the client has
disconnected, and raises ``AssertionError`` if the handler's answer is wrong. The caller checks
whether the handler ends, what it raises, and what it leaves behind.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import re

import trio

from .. import TLSError
from ._expectation import shown
from ._session import Session, send

_MANY = 20  # connections at the same time

_MANY_BYTES = 64  # send at most this many bytes one by one, because each takes 5 ms

# ``garbage`` changes each of the first 8 bytes of a request (the size of a long header), and 24 of
# its other bytes.
_HEADER = 8
_OTHERS = 24

# ``garbage`` replaces each of the first 8 numbers of a request by each of the bad numbers.
_NUMBER = re.compile(rb"[0-9]+")
_NUMBERS = 8
_BAD_NUMBERS = (b"", b"x", b"-1", b"1.5", b"\xb2", b"9" * 30)

_ALERT = re.compile(rb"\x15\x03[\x00-\x04]\x00\x02..", re.DOTALL)  # an unencrypted TLS alert


def _added(answer: bytes, usual: set[bytes]) -> bytes:
    """Return what an answer has in addition to the usual answers, or ``b""``.

    If the usual answers differ (they may contain the time), only a longer answer counts.
    """
    if answer in usual or (len(usual) > 1 and len(answer) <= max(map(len, usual))):
        return b""
    return answer[max(_shared(answer, each) for each in usual) :]


def _shared(one: bytes, other: bytes) -> int:
    """Return the length of the common prefix."""
    differ = (number for number, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differ, min(len(one), len(other)))


# ---- clients that disconnect ----


async def silent(session: Session) -> None:
    """Send nothing, and close the connection."""
    sock = await session.open()
    await session.quiet()
    session.expect("the handler is still running after the client has closed the connection")
    await sock.close()


async def half_close(session: Session) -> None:
    """Send a request and EOF, and read until the handler closes the connection.

    If the handler answers the request only when EOF comes later, it drops requests. (Under TLS, EOF
    without ``close_notify`` is an error, and a handler may then drop everything.)
    """
    answer = b""
    for _ in range(3):  # an answer may also depend on other things, such as the time
        at_once = await session.answers(session.request)
        if session.secure:
            return
        later = await session.answers(session.request, late_fin=True)
        if at_once == later:
            return
        # A handler may also send a greeting, or something at EOF.
        usual = {await session.answers(), await session.answers()}
        answer = _added(later, usual)
        if not answer or _added(at_once, usual):
            return
    raise AssertionError(
        "the handler does not answer a request if the end of the stream follows at once "
        f"(if the end comes later, it sends {shown(answer)})"
    )


async def reset_at_once(session: Session) -> None:
    sock = await session.connect_only()
    sock.abort()


async def reset_after_greeting(session: Session) -> None:
    sock = await session.open()
    await session.quiet()
    sock.abort()


async def reset_in_request(session: Session) -> None:
    for part in (session.request[:2], session.cut_request):
        sock = await session.open()
        await send(sock, part)
        await session.quiet()
        sock.abort()


async def reset_after_request(session: Session) -> None:
    sock = await session.open()
    await send(sock, session.request)
    await session.quiet()
    sock.abort()


async def cancellation(session: Session) -> None:
    """Send nothing while the server cancels the handler."""
    await session.open()
    await session.quiet()
    session.server.stop(grace=0)
    session.expect("the handler is still running after it was cancelled")
    await session.watched.until(lambda: not session.watched.running)


# ---- clients whose answers are compared ----


async def truncation(session: Session) -> None:
    """Send EOF in the middle of a request. The answer must not be that to a whole request."""
    nothing = await session.answers()
    whole = await session.answers(session.request)
    await session.answers(session.request[:2])  # perhaps in the middle of a header
    sock = await session.open()
    await send(sock, session.cut_request)
    await session.quiet()
    if await sock.peek() is not None:
        return  # the handler does not wait for the end of a request
    answer = await session.finish(sock)
    if answer == whole != nothing:
        raise AssertionError(
            f"the handler took half a request for a whole one: it sent {shown(answer)}"
        )


async def byte_by_byte(session: Session) -> None:
    """Send a request byte by byte. The answer must be the same as to a request in one piece."""
    answer = whole = b""
    for _ in range(3):  # an answer may depend on other things, such as the time
        whole = await session.answers(session.request, late_fin=True)
        sock = await session.open()
        first, rest = session.request[:_MANY_BYTES], session.request[_MANY_BYTES:]
        for piece in [*(bytes([each]) for each in first), rest[:-1], rest[-1:]]:
            await send(sock, piece)
            await session.quiet()
        answer = await session.finish(sock)
        if answer == whole or whole != await session.answers(session.request, late_fin=True):
            return
    raise AssertionError(
        f"the handler sent {shown(answer)}, but if the request comes in one piece, it sends "
        f"{shown(whole)}"
    )


# ---- clients that send nonsense ----


def _nonsense() -> list[bytes]:
    rng = random.Random(1)  # noqa: S311 (these numbers are no secrets)
    lines = [b"", b" ", b"\0", b"\xff\xfe\xfd", b"NOOP \xff", b"-1", b"9" * 5000, b"%s{0}:", b":"]
    text = bytes(rng.choice(b"az09 :;,.<>()[]{}=%$\\\"'\t\r\n") for _ in range(5000))
    binary = rng.randbytes(20_000)
    return [*(line + b"\r\n" for line in lines), bytes(64), b"\xff" * 64, text, binary]


def _changed(request: bytes) -> list[bytes]:
    """Return requests that start like this one, and then differ.

    The request should be complete even if the change makes its header promise more bytes. So a byte
    is changed to 0, or it is changed to 255 and 255 more bytes are added at the end.
    """
    rng = random.Random(2)  # noqa: S311 (these numbers are no secrets)
    rest = range(_HEADER, len(request))
    positions = [*range(min(_HEADER, len(request))), *rng.sample(rest, min(_OTHERS, len(rest)))]
    changed = [
        request[: found.start()] + bad + request[found.end() :]
        for found in itertools.islice(_NUMBER.finditer(request), _NUMBERS)
        for bad in _BAD_NUMBERS
    ]
    for number in positions:
        start, end = request[:number], request[number + 1 :]
        changed += [
            start + b"\0" + end,
            start + b"\xff" + end + rng.randbytes(255),
            start + rng.randbytes(1 + len(end)),
        ]
    return changed


async def garbage(session: Session) -> None:
    """Send bytes that fit no protocol, and changed requests."""
    for nonsense in [*_nonsense(), *_changed(session.request)]:
        await session.answers(nonsense)


async def many_connections(session: Session) -> None:
    """Open many connections at the same time."""
    faults: list[AssertionError] = []

    async def exchange() -> None:
        try:
            await session.answers(session.request)
        except AssertionError as exc:
            faults.append(exc)

    async with trio.open_nursery() as nursery:
        for _ in range(_MANY):
            nursery.start_soon(exchange)
    if faults:
        raise faults[0]


# ---- clients that attack STARTTLS ----


async def injection(session: Session) -> None:
    """Send a request right after STARTTLS, as an attacker can. It must get no answer under TLS."""
    usual = {await session.answers(), await session.answers()}
    for injected in (session.request, session.starttls):
        answer = b""
        sock = await session.connect()
        with contextlib.suppress(TLSError):  # if the handshake fails, that is correct
            if await session.ask_for_tls(sock, injected):
                await session.start_tls(sock)
                answer = await session.finish(sock)
        if answer and (added := _added(answer, usual)):
            raise AssertionError(
                f"the handler answered a request under TLS that was sent in plain text behind "
                f"{session.starttls!r}: it sent {shown(added)}"
            )


async def plain_text(session: Session) -> None:
    """Send STARTTLS, and then a request in plain text. The request must not be answered."""
    usual = {
        _ALERT.sub(b"", await _plain_answers(session, b"")),
        _ALERT.sub(b"", await _plain_answers(session, b"")),
    }
    answer = _ALERT.sub(b"", await _plain_answers(session, session.request))
    if added := _added(answer, usual):
        raise AssertionError(f"the handler went on in plain text: it sent {shown(added)}")


async def _plain_answers(session: Session, data: bytes) -> bytes:
    """Send STARTTLS and, after the answer, data in plain text. Return all answers."""
    sock = await session.connect()
    await send(sock, session.starttls)
    if data:
        await session.wait_for_answer(sock)
        await send(sock, data)
    return await session.finish(sock)


async def reset_after_starttls(session: Session) -> None:
    sock = await session.connect()
    await session.ask_for_tls(sock)
    sock.abort()


# The start of a ClientHello. Its record has 512 bytes, but only these few arrive.
_HALF_HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"


async def reset_in_handshake(session: Session) -> None:
    sock = await session.connect()
    if session.starttls:
        await session.ask_for_tls(sock)
    await send(sock, _HALF_HELLO)
    await session.quiet()
    sock.abort()


async def truncated_handshake(session: Session) -> None:
    sock = await session.connect()
    if session.starttls:
        await session.ask_for_tls(sock)
    await send(sock, _HALF_HELLO)
    await session.finish(sock)


async def starttls_twice(session: Session) -> None:
    """Send STARTTLS under TLS."""
    await session.answers(session.starttls)
