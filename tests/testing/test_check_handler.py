"""check_handler passes handlers that have no fault, such as those of the examples."""

from __future__ import annotations

import contextlib
import gc
import os
import time
import tracemalloc
from typing import Any

import pytest
import trio
import trio.testing

import trisock
from helpers.examples import load
from helpers.handlers import STARTTLS, answer_lines, discard, leave_at_once
from helpers.server import echo
from trisock import ClientTLS, ServerTLS, Socket
from trisock.testing import Authority, check_handler

# ---- correct handlers ----


async def answer_long_lines(sock: Socket) -> None:
    """Send an error for a line that is too long, and continue."""
    while True:
        try:
            line = await sock.recv_line(max_bytes=512)
        except trisock.LimitExceededError:
            await sock.skip_until(b"\n")
            await sock.send(b"too long\n")
        except trisock.IncompleteReadError:
            return
        else:
            await sock.send(b"ok " + line + b"\n")


async def answer_frames(sock: Socket) -> None:
    async for frame in sock.frames():
        await sock.send_frame(frame)


async def answer_later(sock: Socket) -> None:
    """Read in one task and send in another, with a bounded queue in between."""
    send, receive = trio.open_memory_channel[bytes](100)

    async def answer() -> None:
        async for line in receive:
            await sock.send(b"ok " + line + b"\n")

    async with trio.open_nursery() as nursery, send:
        nursery.start_soon(answer)
        async for line in sock.lines():
            await send.send(line)


async def greet_with_the_time(sock: Socket) -> None:
    await sock.send(f"{trio.current_time()}\n".encode())
    await answer_lines(sock)


@pytest.mark.parametrize(
    "handler",
    [
        echo,
        discard,
        answer_lines,
        answer_long_lines,
        answer_frames,
        answer_later,
        leave_at_once,
        greet_with_the_time,
    ],
)
async def test_correct_handler_passes(handler: trisock.Handler) -> None:
    await check_handler(handler)


async def upgrade(sock: Socket, tls: ServerTLS) -> None:
    """Speak a line protocol with STARTTLS."""
    await sock.send(b"220 ready\r\n")
    async for line in sock.lines(delimiter=b"\r\n"):
        await sock.send(b"250 " + line + b"\r\n")
        if line == b"STARTTLS" and not sock.istls():
            await sock.starttls(tls)


async def test_correct_handler_with_starttls_passes(server_tls: ServerTLS) -> None:
    await check_handler(
        lambda sock: upgrade(sock, server_tls), greeting=b"220 ready\r\n", starttls=STARTTLS
    )


async def test_correct_handler_that_starts_tls_at_once_passes(
    server_tls: ServerTLS, client_tls: trisock.ClientTLS
) -> None:
    async def handle(sock: Socket) -> None:
        await sock.starttls(server_tls)
        await answer_lines(sock)

    await check_handler(handle, tls=client_tls)


async def test_correct_handler_passes_with_autojump_clock(autojump_clock: object) -> None:
    await check_handler(answer_lines)


async def test_resources_left_by_only_the_first_connection_are_no_leak() -> None:
    left: list[int] = []
    async with trio.open_nursery() as nursery:

        async def handle(sock: Socket) -> None:
            if not left:
                left.append(os.dup(0))
                nursery.start_soon(trio.sleep_forever)
            await echo(sock)

        await check_handler(handle, timeout=0.2)
        nursery.cancel_scope.cancel()
    os.close(left[0])


async def test_descriptor_in_a_reference_cycle_is_no_leak() -> None:
    class Descriptor:
        def __init__(self) -> None:
            self.number = os.dup(0)
            self.cycle = self

        def __del__(self) -> None:
            os.close(self.number)

    async def handle(sock: Socket) -> None:
        Descriptor()
        await echo(sock)

    gc.disable()
    try:
        await check_handler(handle)
    finally:
        gc.enable()


# ---- the examples ----


async def test_echo_server_passes() -> None:
    await check_handler(load("echo_server").echo)


async def test_smtp_server_passes(server_tls: ServerTLS) -> None:
    example = load("smtp_server")
    await check_handler(
        lambda sock: example.handle(server_tls, sock), greeting=b"220 ", starttls=STARTTLS
    )


async def test_chat_room_passes() -> None:
    room = load("chat_room").ChatRoom()
    async with trio.open_nursery() as nursery:
        room.server = await trisock.bind(nursery, 0, room.visit)
        nursery.start_soon(room.tell_all)
        await check_handler(room.visit, greeting=b"* who are you?\n")
        nursery.cancel_scope.cancel()


async def test_https_server_passes() -> None:
    converse = load("https_server").converse
    await check_handler(converse)


@pytest.mark.parametrize("tls", [False, True])
async def test_server_of_http_and_https_passes(
    tls: bool, client_tls: trisock.ClientTLS, server_tls: ServerTLS
) -> None:
    example = load("http_and_https")
    await check_handler(
        lambda sock: example.handle(server_tls, sock), tls=client_tls if tls else None
    )


# ---- the program around it ----


async def test_another_task_may_block_the_event_loop() -> None:
    done = trio.Event()

    async def block() -> None:
        time.sleep(0.5)
        done.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(block)
        with contextlib.suppress(AssertionError):  # no handler runs while ``block`` sleeps
            await check_handler(echo, timeout=0.1)
    assert done.is_set()


async def test_tracemalloc_keeps_running_if_it_ran_before() -> None:
    tracemalloc.start()
    try:
        await check_handler(echo)
        assert tracemalloc.is_tracing()
    finally:
        tracemalloc.stop()
    await check_handler(discard)
    assert not tracemalloc.is_tracing()


async def test_cancelled_check_leaves_nothing() -> None:
    for checkpoints in range(0, 400, 37):
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(check_handler, echo)
                for _ in range(checkpoints):
                    await trio.lowlevel.checkpoint()
                scope.cancel()
        assert scope.cancelled_caught


# ---- arguments ----


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("a handler must be an async function, not int", {"handler": 1}),
        ("greeting must be bytes or None, not str", {"greeting": "220 "}),
        ("starttls must be bytes or None, not bool", {"starttls": True}),
        ("starttls must not be empty", {"starttls": b""}),
        ("tls must be the role of a TLS client, not bool", {"tls": False}),
        ("server_tls must be the role of a TLS server, not ClientTLS", {"server_tls": ClientTLS()}),
        ("request must be bytes or None, not str", {"request": "get k"}),
        ("request must have at least 2 bytes, not 1", {"request": b"x"}),
        (
            "server_tls and starttls exclude each other: TLS can start only once",
            {"server_tls": ServerTLS(Authority().certificate()), "starttls": STARTTLS},
        ),
        ("timeout must be a number of seconds, not bool", {"timeout": True}),
        ("timeout must be positive and finite, not inf", {"timeout": float("inf")}),
        ("timeout must be positive and finite, not 0", {"timeout": 0}),
    ],
)
async def test_invalid_argument_is_rejected(message: str, arguments: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        await check_handler(**{"handler": echo, **arguments})
    assert str(caught.value) == message


async def test_errors_that_end_a_server_end_the_check() -> None:
    async def handle(sock: Socket) -> None:
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        await check_handler(handle)


async def test_request_may_be_dropped_at_an_end_without_close_notify(
    server_tls: ServerTLS,
) -> None:
    async def handle(sock: Socket) -> None:
        sends, answers = trio.open_memory_channel[bytes](4)

        async def answer_all() -> None:
            async for answer in answers:
                await trio.lowlevel.checkpoint()
                await sock.send(answer)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer_all)
            async with sends:
                async for line in sock.lines(max_bytes=512):
                    await sends.send(line + b"\n")

    for _ in range(3):
        await check_handler(handle, server_tls=server_tls)
