"""check_handler with a request: it passes handlers of frames, and finds faults planted in them."""

from __future__ import annotations

import struct

import pytest
import trio

import trisock
from helpers.handlers import answer_lines, finds
from trisock import Socket
from trisock.testing import check_handler

GET = b"\0\0\0\5get k"

# ---- correct handlers ----


async def answer_frames(sock: Socket) -> None:
    async for frame in sock.frames(max_bytes=64000):
        await sock.send_frame(b"+" + frame)


async def answer_frames_by_hand(sock: Socket) -> None:
    """Send an error for a frame that is too long, and for one that EOF cuts short."""
    try:
        while True:
            await sock.send_frame(b"+" + await sock.recv_frame(max_bytes=1000))
    except trisock.LimitExceededError:
        await sock.send_frame(b"-too long")
    except trisock.IncompleteReadError as exc:
        if not exc.at_boundary:
            await sock.send_frame(b"-cut short")


async def answer_short_frames(sock: Socket) -> None:
    async for frame in sock.frames("!H"):
        await sock.send_frame(frame, header="!H")


async def answer_typed_messages(sock: Socket) -> None:
    """Read messages like PostgreSQL's: a type byte, and a length that includes its own 4 bytes."""
    while kind := await sock.recv(1):
        try:
            (length,) = struct.unpack("!I", await sock.recv_exactly(4))
            if not 4 <= length <= 10000:
                return
            await sock.send(kind, struct.pack("!I", length), await sock.recv_exactly(length - 4))
        except trisock.IncompleteReadError:
            return


async def answer_http(sock: Socket) -> None:
    try:
        while True:
            await sock.recv_until(b"\r\n\r\n", max_bytes=10000)
            await sock.send(b"HTTP/1.1 204 No Content\r\n\r\n")
    except (trisock.LimitExceededError, trisock.IncompleteReadError):
        return


@pytest.mark.parametrize(
    ("handler", "request_bytes"),
    [
        pytest.param(answer_frames_by_hand, GET, marks=pytest.mark.rare),
        pytest.param(answer_short_frames, b"\0\5get k", marks=pytest.mark.rare),
        (answer_typed_messages, b"Q\0\0\0\x0dSELECT 1;"),
        (answer_http, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"),
        pytest.param(answer_frames, b"\0\0\x50\0" + bytes(0x5000), marks=pytest.mark.rare),
        pytest.param(answer_lines, b"\r\n", marks=pytest.mark.rare),
    ],
)
async def test_correct_handler_passes(handler: trisock.Handler, request_bytes: bytes) -> None:
    await check_handler(handler, request=request_bytes)


# ---- planted faults ----


async def test_error_on_a_valid_request_is_found() -> None:
    async def handle(sock: Socket) -> None:
        async for frame in sock.frames(max_bytes=64000):
            if len(frame) > 2:
                raise KeyError(frame)

    await check_handler(handle)  # NOOP is no frame for it
    await finds("half-close: the handler raised KeyError: b'get k'", handle, request=GET)


async def test_death_on_a_frame_that_is_not_utf8_is_found() -> None:
    async def handle(sock: Socket) -> None:
        async for frame in sock.frames(max_bytes=64000):
            await sock.send_frame(frame.decode().encode())

    await check_handler(handle)  # NOOP is no frame for it
    message = (
        "garbage: the handler raised UnicodeDecodeError: 'utf-8' codec can't decode byte 0x97 in "
        "position 5: invalid start byte"
    )
    await finds(message, handle, request=GET)


async def test_death_on_an_empty_frame_is_found() -> None:
    async def handle(sock: Socket) -> None:
        async for frame in sock.frames(max_bytes=64000):
            await sock.send_frame(b"%c" % frame[0])

    await finds("garbage: the handler raised IndexError: index out of range", handle, request=GET)


async def test_death_on_a_longer_frame_is_found() -> None:
    async def handle(sock: Socket) -> None:
        async for frame in sock.frames(max_bytes=64000):
            word, key = frame[:3], frame[4:]
            if len(key) > 20:
                raise ValueError(f"a key of {len(key)} bytes")
            await sock.send_frame(word)

    message = "garbage: the handler raised ValueError: a key of 251 bytes"
    await finds(message, handle, request=GET)


async def test_swallowed_incomplete_read_is_found(autojump_clock: object) -> None:
    async def handle(sock: Socket) -> None:
        while True:
            try:
                await sock.send_frame(await sock.recv_frame())
            except trisock.IncompleteReadError as exc:
                if exc.at_boundary:
                    return
                await trio.lowlevel.checkpoint()
            except trisock.LimitExceededError:
                return

    message = (
        "garbage: the handler is still running after the client has sent EOF (waited 0.8 seconds)"
    )
    await finds(message, handle, request=GET, timeout=0.8)


async def test_death_on_a_header_cut_short_is_found() -> None:
    async def handle(sock: Socket) -> None:
        while header := await sock.recv(4):
            (length,) = struct.unpack("!I", header)
            if length > 1000:
                return
            try:
                await sock.send(header, await sock.recv_exactly(length))
            except trisock.IncompleteReadError:
                return

    message = (
        "reset in the middle of a request: the handler raised error: unpack requires a buffer of "
        "4 bytes"
    )
    await finds(message, handle, request=GET)


async def test_frame_buffered_without_a_bound_is_found() -> None:
    async def handle(sock: Socket) -> None:
        async for frame in sock.frames(max_bytes=2**32):
            await sock.send_frame(frame)

    message = "endless request: the handler holds more than 8 MiB for one client"
    await finds(message, handle, request=GET, timeout=40)


async def test_buffer_of_the_announced_length_is_found() -> None:
    async def handle(sock: Socket) -> None:
        try:
            while True:
                kind, length = struct.unpack("!cI", await sock.recv_exactly(5))
                if kind != b"Q":
                    return
                body = bytearray(min(length, 2**26))
                for number in range(0, length, 1000):
                    part = await sock.recv_exactly(min(1000, length - number))
                    body[number : number + len(part)] = part
                await sock.send(kind, struct.pack("!I", length), body)
        except trisock.IncompleteReadError:
            return

    message = "endless request: the handler holds more than 8 MiB for one client"
    await finds(message, handle, request=b"Q\0\0\0\5get k")


async def test_truncated_frame_treated_as_complete_is_found() -> None:
    async def handle(sock: Socket) -> None:
        try:
            while True:
                (length,) = struct.unpack("!I", await sock.recv_exactly(4))
                if length > 1000:
                    return
                try:
                    body = await sock.recv_exactly(length)
                except trisock.IncompleteReadError as exc:
                    body = exc.partial
                    await sock.recv()
                await sock.send_frame(b"did " + body.split()[0] if body.split() else b"")
        except trisock.IncompleteReadError:
            return

    message = (
        "truncation: the handler took half a request for a whole one: it sent "
        r"b'\x00\x00\x00\x07did get'"
    )
    await finds(message, handle, request=GET)


async def test_chunk_treated_as_a_frame_is_found() -> None:
    async def handle(sock: Socket) -> None:
        while chunk := await sock.recv():
            await sock.send_frame(chunk[4:])

    message = (
        f"byte by byte: the handler sent {bytes(20)!r}, but if the request comes in one piece, it "
        r"sends b'\x00\x00\x00\x01k'"
    )
    await finds(message, handle, request=b"\0\0\0\1k")


@pytest.mark.rare  # the test of a queue of lines always runs
async def test_unbounded_queue_of_answers_is_found() -> None:
    async def handle(sock: Socket) -> None:
        send, receive = trio.open_memory_channel[bytes](1_000_000_000)

        async def answer_all() -> None:
            async for each in receive:
                await sock.send_frame(each)

        async with trio.open_nursery() as nursery, send:
            nursery.start_soon(answer_all)
            try:
                async for frame in sock.frames(max_bytes=1000):
                    await send.send(frame * 10)
            except trisock.LimitExceededError:
                return

    message = "slow reader: the handler holds more than 2 MiB for one client"
    await finds(message, handle, request=GET, timeout=40)


# ---- bind(tls=) ----


async def test_handler_for_a_server_with_tls_passes(
    server_tls: trisock.ServerTLS, client_tls: trisock.ClientTLS
) -> None:
    await check_handler(answer_frames, request=GET, server_tls=server_tls)
    await check_handler(answer_lines, server_tls=server_tls.certificates, tls=client_tls)


async def test_fault_of_a_handler_for_a_server_with_tls_is_found(
    server_tls: trisock.ServerTLS,
) -> None:
    async def handle(sock: Socket) -> None:
        assert sock.istls()
        async for frame in sock.frames():
            raise KeyError(frame)

    message = "half-close under TLS: the handler raised KeyError: b'get k'"
    await finds(message, handle, request=GET, server_tls=server_tls)


async def test_rejected_certificate_is_found(server_tls: trisock.ServerTLS) -> None:
    with pytest.raises(AssertionError) as caught:
        await check_handler(answer_frames, server_tls=server_tls, tls=True)
    text = str(caught.value)
    assert text.startswith("silent client under TLS: TLS did not start: ")
    assert "must call starttls" not in text


async def test_handler_that_never_starts_tls_is_found(client_tls: trisock.ClientTLS) -> None:
    async def handle(sock: Socket) -> None:
        await sock.recv()

    with pytest.raises(AssertionError) as caught:
        await check_handler(handle, tls=client_tls)
    text = str(caught.value)
    assert text.startswith("silent client under TLS: TLS did not start: ")
    assert text.endswith("; the handler itself must call starttls")
