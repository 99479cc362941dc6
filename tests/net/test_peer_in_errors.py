"""Every error of a connection names the peer, once, on one printable line."""

from __future__ import annotations

import contextlib
import copy
import io
import os
import pickle
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

import trisock
from helpers.blocked import cancel_when_blocked
from helpers.pairs import closing
from helpers.raw_tls import upgrade
from trisock import ClientTLS, IncompleteReadError, LimitExceededError, ServerTLS, Socket, TLSError
from trisock._text import message_without_peer
from trisock.testing import socket_pair

# A Unix peer chooses its name, which is a path.
HOSTILE_NAME = "\n2025-01-01 INFO sshd Accepted password for root\x1b[2K\u202e"

# Larger than the send buffer of the kernel.
HUGE = b"x" * 50_000_000

# Makes the socket raise an error. The first argument is the socket, and the second its peer.
Case = Callable[[Socket, Socket], Awaitable[object]]


@pytest.fixture
async def ends(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[Socket, Socket]]:
    monkeypatch.chdir(tmp_path)
    if family == "tcp":
        a, b = await socket_pair()
    else:
        async with await trisock.listen_unix("server") as listener:
            raw = trio.socket.socket(socket.AF_UNIX)
            await raw.bind(HOSTILE_NAME)
            await raw.connect("server")
            a, b = Socket(trio.SocketStream(raw)), await listener.accept()
    async with closing(a, b):
        yield a, b


BOTH_FAMILIES = pytest.mark.parametrize("family", ["tcp", "unix"])


async def error_of(case: Case, sock: Socket, peer: Socket) -> Exception:
    """Check the text of a case's error, and return the error."""
    with pytest.raises(Exception, match=r".") as caught:
        await case(sock, peer)
    error: Exception = caught.value
    assert str(error).isprintable()
    assert str(error).count(str(sock.getpeer())) == 1, str(error)
    caused = isinstance(error, (trio.BrokenResourceError, IncompleteReadError, LimitExceededError))
    short = message_without_peer(error)
    if caused:  # the log line of such an error already names the peer
        assert short
        assert str(sock.getpeer()) not in short
        assert repr(error) == f"{type(error).__name__}({str(error)!r})"
    for copied in (copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert (type(copied), str(copied)) == (type(error), str(error))
        assert message_without_peer(copied) == short
    return error


async def recv_after_reset(sock: Socket, peer: Socket) -> None:
    peer.abort()
    await sock.recv()
    await sock.send(b"a reset looks like EOF on a Unix socket")


async def send_forever(sock: Socket, peer: Socket) -> None:
    peer.abort()
    while True:
        await sock.send(b"x", b"y")


async def send_file_forever(sock: Socket, peer: Socket) -> None:
    peer.abort()
    while True:
        await sock.send_file(io.BytesIO(b"x"))


async def send_eof_after_reset(sock: Socket, peer: Socket) -> None:
    with contextlib.suppress(trio.BrokenResourceError):
        await send_forever(sock, peer)
    await sock.send_eof()
    await sock.send(b"a Unix socket can be half-closed after a reset")


async def send_after_a_cancelled_send(sock: Socket, _: Socket) -> None:
    await cancel_when_blocked(sock.send, HUGE)
    await sock.send(b"x")


async def send_after_send_eof(sock: Socket, _: Socket) -> None:
    await sock.send_eof()
    await sock.send(b"x")


async def recv_after_close(sock: Socket, _: Socket) -> None:
    await sock.close()
    await sock.recv()


async def send_file_after_close(sock: Socket, _: Socket) -> None:
    await sock.close()
    await sock.send_file(io.BytesIO(b"x"))


async def recv_after_the_stream_was_closed(sock: Socket, _: Socket) -> None:
    sock.stream.socket.close()
    await sock.recv()


async def send_eof_during_close(sock: Socket, _: Socket) -> None:
    send_eof = sock.stream.send_eof

    async def close_first() -> None:
        sock.abort()  # as another task might do before send_eof calls shutdown(2)
        await send_eof()

    sock.stream.send_eof = close_first  # type: ignore[method-assign]
    await sock.send_eof()


def woken_by_close(function: Callable[[Socket], Awaitable[object]]) -> Case:
    async def case(sock: Socket, _: Socket) -> None:
        failure: list[Exception] = []

        async def call() -> None:
            try:
                await function(sock)
            except trio.ClosedResourceError as exc:
                failure.append(exc)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(call)
            await trio.testing.wait_all_tasks_blocked()
            sock.abort()
        raise failure[0]

    return case


def during(first: Callable[[Socket], Any], second: Callable[[Socket], Any]) -> Case:
    """Call the second function while the first one is blocked."""

    async def case(sock: Socket, _: Socket) -> None:
        failure: list[Exception] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(first, sock)
            await trio.testing.wait_all_tasks_blocked()
            try:
                await second(sock)
            except trio.BusyResourceError as exc:
                failure.append(exc)
            nursery.cancel_scope.cancel()
        raise failure[0]

    return case


def at_the_end(data: bytes, function: Callable[[Socket], Awaitable[object]]) -> Case:
    async def case(sock: Socket, peer: Socket) -> None:
        await peer.send(data)
        await peer.send_eof()
        await function(sock)

    return case


def after(data: bytes, function: Callable[[Socket], Awaitable[object]]) -> Case:
    async def case(sock: Socket, peer: Socket) -> None:
        await peer.send(data)
        await function(sock)

    return case


async def send_a_short_file(sock: Socket, _: Socket) -> None:
    await sock.send_file(io.BytesIO(b"abc"), count=5)


async def stoptls_without_tls(sock: Socket, _: Socket) -> None:
    await sock.stoptls()


BUSY = "another task is (reading from|sending on) .*: only one task may do this at a time"
CLOSED = "this side has already closed the connection with "
BROKEN = "the connection with .* is broken: "
ENDED = r"the stream from .* ended after \d+ bytes, before "

PLAIN_CASES: dict[str, tuple[Case, str]] = {
    "reset": (recv_after_reset, BROKEN),
    "failed send": (send_forever, BROKEN),
    "failed send_file": (send_file_forever, f"{BROKEN}.*, after 0 bytes of the file"),
    "failed send_eof": (send_eof_after_reset, f"{BROKEN}|.*after send_eof"),
    "send cut short": (
        send_after_a_cancelled_send,
        f"{BROKEN}an earlier send was cut short, so nothing more can be sent",
    ),
    "send_eof": (
        send_after_send_eof,
        "nothing can be sent after send_eof on the connection with ",
    ),
    "short file": (send_a_short_file, "the file ended after 3 of 5 bytes were sent to "),
    "recv after close": (recv_after_close, CLOSED),
    "send_file after close": (send_file_after_close, CLOSED),
    "recv after the stream was closed": (recv_after_the_stream_was_closed, CLOSED),
    "recv during close": (woken_by_close(lambda sock: sock.recv()), CLOSED),
    "send during close": (woken_by_close(lambda sock: sock.send(HUGE)), CLOSED),
    "send_eof during close": (send_eof_during_close, CLOSED),
    "two readers": (during(Socket.recv, lambda sock: sock.recv()), BUSY),
    "lines and a reader": (during(Socket.recv, lambda sock: anext(sock.lines())), BUSY),
    "two senders": (during(lambda sock: sock.send(HUGE), lambda sock: sock.send(b"")), BUSY),
    "starttls during recv": (during(Socket.recv, lambda sock: sock.starttls("a")), BUSY),
    "recv_exactly": (at_the_end(b"abc", lambda sock: sock.recv_exactly(5)), f"{ENDED}5 bytes"),
    "recv_until": (at_the_end(b"abc", lambda sock: sock.recv_until(b"\n")), f"{ENDED}the delim"),
    "recv_line": (at_the_end(b"", lambda sock: sock.recv_line()), f"{ENDED}the delimiter"),
    "lines": (at_the_end(b"abc", lambda sock: anext(sock.lines())), f"{ENDED}the delimiter"),
    "skip_until": (at_the_end(b"abc", lambda sock: sock.skip_until(b"\n")), f"{ENDED}the delim"),
    "recv_frame": (at_the_end(b"abc", lambda sock: sock.recv_frame()), f"{ENDED}4 bytes"),
    "long line": (
        after(b"x" * 9, lambda sock: sock.recv_line(max_bytes=9)),
        "no delimiter within 9 bytes from .*: raise max_bytes, or drop the data with skip_until",
    ),
    "long frame": (
        after(b"\xff" * 4, lambda sock: sock.recv_frame()),
        "a frame of 4294967295 bytes from .* exceeds the limit of 1048576 bytes: raise max_bytes",
    ),
    "stoptls without TLS": (
        stoptls_without_tls,
        "the connection with .* is not using TLS: call starttls first",
    ),
    "not TLS": (
        after(b"220 ready\r\n", lambda sock: sock.starttls("example.org")),
        r"TLS handshake with 'example.org' \(.*\) failed: the peer does not speak TLS",
    ),
}


@BOTH_FAMILIES
@pytest.mark.parametrize("name", PLAIN_CASES)
async def test_an_error_in_plain_text_names_the_peer(name: str, a: Socket, b: Socket) -> None:
    case, text = PLAIN_CASES[name]
    error = await error_of(case, b, a)
    assert re.match(text, str(error)), str(error)


# ---- TLS ----


async def recv_without_close_notify(sock: Socket, peer: Socket) -> None:
    await peer.stream.send_eof()
    await sock.recv()


async def recv_a_forged_record(sock: Socket, peer: Socket) -> None:
    os.write(peer.fileno(), b"not TLS" * 10)
    await sock.recv()


async def starttls_again(sock: Socket, _: Socket) -> None:
    await sock.starttls("example.org")


async def stoptls_with_unread_data(sock: Socket, peer: Socket) -> None:
    await peer.send(b"unread")
    await sock.peek(wait=True)
    await sock.stoptls()


async def send_eof(sock: Socket, _: Socket) -> None:
    await sock.send_eof()


async def stoptls_after_a_cancelled_send(sock: Socket, _: Socket) -> None:
    await cancel_when_blocked(sock.send, HUGE)
    await sock.stoptls()


async def stoptls_after_reset(sock: Socket, peer: Socket) -> None:
    peer.abort()
    await sock.stoptls()


TLS_CASES: dict[str, tuple[Case, str]] = {
    "reset": (recv_after_reset, f"{BROKEN}|TLS with .* failed: the peer ended the connection"),
    "failed send": (send_forever, BROKEN),
    "send cut short": (
        send_after_a_cancelled_send,
        f"{BROKEN}an earlier send was cut short, so nothing more can be sent",
    ),
    "recv after close": (recv_after_close, CLOSED),
    "recv during close": (woken_by_close(lambda sock: sock.recv()), CLOSED),
    "send during close": (woken_by_close(lambda sock: sock.send(HUGE)), CLOSED),
    "no close_notify": (
        recv_without_close_notify,
        "TLS with .* failed: the peer ended the connection without close_notify: data may be "
        r"missing \(https_compatible=True accepts this\)",
    ),
    "forged record": (recv_a_forged_record, "TLS with .* failed: "),
    "starttls again": (starttls_again, "the connection with .* is already using TLS"),
    "stoptls with unread data": (
        stoptls_with_unread_data,
        "the connection with .* cannot end TLS while decrypted bytes are unread: read them first",
    ),
    "stoptls after a cancelled send": (
        stoptls_after_a_cancelled_send,
        "TLS with .* failed: an earlier send was cut short",
    ),
    "stoptls after a reset": (stoptls_after_reset, "TLS with .* failed: the "),
    "send_eof": (
        send_eof,
        "the connection with .* uses TLS, which has no half-closed state: call close, or mark",
    ),
}


@BOTH_FAMILIES
@pytest.mark.parametrize("name", TLS_CASES)
async def test_an_error_under_tls_names_the_peer(
    name: str, a: Socket, b: Socket, client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    await upgrade(a, client_tls, b, server_tls)
    case, text = TLS_CASES[name]
    error = await error_of(case, b, a)
    assert re.match(text, str(error)), str(error)


@BOTH_FAMILIES
async def test_an_error_of_a_broken_handshake_names_the_peer_once(
    a: Socket, b: Socket, server_tls: ServerTLS
) -> None:
    async def handshake(sock: Socket, peer: Socket) -> None:
        await peer.send(b"\x16\x03\x01")
        await sock.peek(wait=True)
        peer.abort()
        await sock.starttls(server_tls)

    error = await error_of(handshake, b, a)
    assert isinstance(error, TLSError)
    reason = "the connection is broken: Connection reset by peer|the peer closed the connection"
    assert re.fullmatch(f"TLS handshake with .* failed: ({reason})", str(error)), str(error)


async def test_a_reason_may_contain_the_peers_address(a: Socket) -> None:
    why = f"a proxy says that the connection with {a.getpeer()}8080 is broken"
    error = a._connection.transport.broken(why)
    assert str(error) == f"the connection with {a.getpeer()} is broken: {why}"
    assert message_without_peer(error) == f"the connection is broken: {why}"


# ---- errors that programs raise themselves ----


def test_errors_raised_by_programs_need_no_peer() -> None:
    assert str(LimitExceededError(9)) == "no delimiter within 9 bytes"
    long = LimitExceededError(9, frame_length=10)
    assert str(long) == "a frame of 10 bytes exceeds the limit of 9 bytes"
    assert repr(long) == "LimitExceededError('a frame of 10 bytes exceeds the limit of 9 bytes')"
    assert str(trisock.IncompleteReadError(b"abc", 5)) == (
        "the stream ended after 3 bytes, before 5 bytes arrived"
    )
