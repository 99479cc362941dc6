"""check_handler finds each planted fault, and names it exactly."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator

import pytest
import trio
import trio.testing

import trisock
from helpers.cancellation import grid
from helpers.handlers import STARTTLS, answer_lines, discard, finds, leave_at_once
from helpers.server import echo
from trisock import ServerTLS, Socket
from trisock.testing import check_handler


@pytest.fixture
def patient_clock() -> trio.testing.MockClock:
    """A clock that jumps only after data in flight over loopback has arrived."""
    return trio.testing.MockClock(autojump_threshold=0.1)


# ---- leaks ----


@pytest.mark.parametrize("place", ["nursery", "system task"])
async def test_leaked_task_is_found(place: str) -> None:
    done = trio.Event()

    async def forgotten() -> None:
        await done.wait()

    async with trio.open_nursery() as nursery:

        async def handle(sock: Socket) -> None:
            start = nursery.start_soon if place == "nursery" else trio.lowlevel.spawn_system_task
            start(forgotten)
            await echo(sock)

        name = f"{__name__}.test_leaked_task_is_found.<locals>.forgotten"
        message = f"silent client: each connection leaves tasks running ({name})"
        await finds(message, handle, timeout=1)
        done.set()


LEAKED_SOCKET = r"^silent client: each connection leaves descriptors open \(1: socket:\[\d+\]\)$"


async def test_leaked_descriptor_is_found() -> None:
    leaked = []

    async def handle(sock: Socket) -> None:
        leaked.append(os.dup(sock.fileno()))
        await echo(sock)

    with pytest.raises(AssertionError, match=LEAKED_SOCKET):
        await check_handler(handle, timeout=1)
    for each in leaked:
        os.close(each)


async def test_leaked_connection_is_found() -> None:
    async with await trisock.listen(0, host="127.0.0.1") as listener:
        leaked = []

        async def handle(sock: Socket) -> None:
            leaked.append(await trisock.connect("127.0.0.1", listener.port))
            await echo(sock)

        with pytest.raises(AssertionError, match=LEAKED_SOCKET):
            await check_handler(handle, timeout=1)
        for each in leaked:
            each.abort()


# ---- handlers that do not end ----

HUNG = "{}: the handler is still running after {} (waited 10 seconds)"


async def test_hang_after_half_close_is_found(patient_clock: object) -> None:
    async def handle(sock: Socket) -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            await sock.recv()
            await sock.recv()
        while sock.isopen():
            await trio.sleep(1)
        try:
            await sock.send(b"bye\n")
            await sock.send(b"bye\n")
            await trio.sleep_forever()
        except trio.BrokenResourceError:
            pass

    # The silent client is no fault: it closes the connection, so its handler's send fails.
    await finds(HUNG.format("half-close", "the client has sent EOF"), handle)


async def test_hang_after_client_has_left_is_found(patient_clock: object) -> None:
    async def handle(sock: Socket) -> None:
        await trio.sleep_forever()

    await finds(HUNG.format("silent client", "the client has left"), handle)


async def test_hang_after_reset_is_found() -> None:
    async def handle(sock: Socket) -> None:
        while True:
            try:
                if not await sock.recv():
                    return
            except trio.BrokenResourceError:
                await trio.lowlevel.checkpoint()

    message = (
        "reset at once: the handler is still running after the client has left (waited 0.8 seconds)"
    )
    await finds(message, handle, timeout=0.8)


async def test_loop_without_checkpoint_at_eof_is_found() -> None:
    async def handle(sock: Socket) -> None:
        data = await sock.recv()
        while data != b"QUIT\n":
            if not data:
                continue
            data = await sock.recv()

    message = "silent client: the handler ran for 0.8 seconds without a checkpoint"
    await finds(message, handle, timeout=0.8)


async def test_loop_without_checkpoint_in_another_task_is_found() -> None:
    async def handle(sock: Socket) -> None:
        async def read() -> None:
            while await sock.recv():
                pass
            while True:
                pass

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)

    message = "silent client: the handler ran for 0.8 seconds without a checkpoint"
    await finds(message, handle, timeout=0.8)


async def test_loop_without_checkpoint_that_catches_everything_is_found() -> None:
    async def handle(sock: Socket) -> None:
        await sock.recv()
        with contextlib.suppress(BaseException):
            while True:
                pass
        while True:
            pass

    message = "silent client: the handler ran for 0.2 seconds without a checkpoint"
    await finds(message, handle, timeout=0.2)


async def test_loop_with_checkpoints_is_found_with_autojump_clock(autojump_clock: object) -> None:
    async def handle(sock: Socket) -> None:
        while await sock.recv() != b"QUIT\n":
            await trio.lowlevel.checkpoint()

    message = (
        "silent client: the handler is still running after the client has closed the connection "
        "(waited 0.8 seconds)"
    )
    await finds(message, handle, timeout=0.8)


async def test_swallowed_cancellation_is_found() -> None:
    async def handle(sock: Socket) -> None:
        while True:
            try:
                if not await sock.recv():
                    return
            except trio.BrokenResourceError:
                return
            except BaseException:
                continue

    message = (
        "cancellation: the handler is still running after it was cancelled (waited 0.8 seconds)"
    )
    await finds(message, handle, timeout=0.8)


async def swallow_in_except(sock: Socket) -> None:
    async with trio.open_nursery():
        while True:
            try:
                if not await sock.recv():
                    return
            except BaseException:
                await trio.lowlevel.cancel_shielded_checkpoint()


async def swallow_and_fail(sock: Socket) -> None:
    while True:
        try:
            if not await sock.recv():
                return
        except BaseException:
            try:
                await trio.lowlevel.cancel_shielded_checkpoint()
            except GeneratorExit:
                raise ValueError from None


async def swallow_everywhere(sock: Socket) -> None:
    while True:
        try:
            if not await sock.recv():
                return
        except BaseException:
            while True:
                try:
                    await trio.lowlevel.cancel_shielded_checkpoint()
                    break
                except BaseException:
                    continue


@pytest.mark.parametrize(
    "handler",
    grid(
        lambda handler: handler is not swallow_in_except,
        [swallow_in_except, swallow_and_fail, swallow_everywhere],
    ),
)
async def test_handler_that_swallows_everything_is_abandoned(handler: trisock.Handler) -> None:
    message = (
        "reset at once: the handler is still running after the client has left (waited 0.8 seconds)"
    )
    await finds(message, handler, timeout=0.8)


def test_a_handler_that_cannot_be_stopped_does_not_prevent_exit() -> None:
    program = """
        import trio
        from trisock.testing import check_handler

        async def handle(sock):
            while True:
                try:
                    await sock.recv()
                except BaseException:
                    continue

        async def main():
            try:
                await check_handler(handle, timeout=0.1)
            except AssertionError as exc:
                print(str(exc).split(":")[0])

        trio.run(main)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    assert (result.stdout, result.stderr) == ("silent client\n", "")


async def test_shielded_read_is_found_and_ended(patient_clock: object) -> None:
    async def handle(sock: Socket) -> None:
        with trio.CancelScope(shield=True):
            await echo(sock)

    await finds(HUNG.format("cancellation", "it was cancelled"), handle)


async def test_missing_greeting_is_found(patient_clock: object) -> None:
    message = "silent client: the handler has not sent its greeting (waited 10 seconds)"
    await finds(message, echo, greeting=b"220 ")


async def test_wrong_greeting_is_found() -> None:
    message = "silent client: the greeting is b'good', not b'220 '"
    await finds(message, leave_at_once, greeting=b"220 ")


async def test_greeting_that_changes_with_the_load_is_found() -> None:
    active = 0

    async def handle(sock: Socket) -> None:
        nonlocal active
        active += 1
        try:
            await sock.send(b"220 ready\n" if active < 10 else b"421 busy\n")
            await answer_lines(sock)
        finally:
            active -= 1

    message = "many connections: the greeting is b'421 ', not b'220 '"
    await finds(message, handle, greeting=b"220 ")


# ---- errors ----


async def test_death_on_text_that_is_not_utf8_is_found() -> None:
    async def handle(sock: Socket) -> None:
        async for line in sock.lines():
            await sock.send(line.decode().upper().encode() + b"\n")

    failure = await finds(
        "garbage: the handler raised UnicodeDecodeError: 'utf-8' codec can't decode byte 0xff in "
        "position 0: invalid start byte",
        handle,
    )
    assert isinstance(failure.__cause__, UnicodeDecodeError)


async def test_death_on_a_bad_number_is_found() -> None:
    async def handle(sock: Socket) -> None:
        async for line in sock.lines(max_bytes=100):
            if line.startswith(b"PUT a-long-name-of-a-value ") and line[27:28] in b"-9":
                int(line[27:], 8)
            await sock.send(b"ok\n")

    with pytest.raises(AssertionError, match=r"^garbage: the handler raised ValueError: "):
        await check_handler(handle, request=b"PUT a-long-name-of-a-value 3\n")


async def test_own_limit_error_is_explained() -> None:
    async def handle(sock: Socket) -> None:
        async for line in sock.lines(max_bytes=100):
            if line != b"NOOP\r":
                raise trisock.LimitExceededError(3)
            await sock.send(b"ok\n")

    explained = "not raised by this connection, so bind logs it as a handler's error"
    with pytest.raises(AssertionError, match=explained):
        await check_handler(handle)


async def test_request_that_is_dropped_at_the_end_is_found() -> None:
    async def handle(sock: Socket) -> None:
        async for line in sock.lines(max_bytes=100):
            for _ in range(10):  # FIN follows the request, but has not arrived yet
                await trio.lowlevel.checkpoint()
            if await sock.peek() == b"":
                return
            await sock.send(line, b"\n")

    with pytest.raises(AssertionError) as caught:
        await check_handler(handle)
    assert str(caught.value) == (
        "half-close: the handler does not answer a request if the end of the stream follows at "
        "once (if the end comes later, it sends b'NOOP\\r\\n')"
    )


async def drop_at_end(sock: Socket) -> None:
    """Greet, drop a request if EOF follows at once, and say goodbye."""
    await sock.send(b"220 ready\n")
    async for line in sock.lines(max_bytes=100):
        for _ in range(10):
            await trio.lowlevel.checkpoint()
        if await sock.peek() == b"":
            break
        await sock.send(line, b"\n")
    await sock.send(b"bye\n")


@pytest.mark.parametrize("greeting", [None, b"220 "])
async def test_request_that_is_dropped_after_a_greeting_is_found(greeting: bytes | None) -> None:
    fault = "^half-close: the handler does not answer a request if the end of the stream follows"
    with pytest.raises(AssertionError, match=fault):
        await check_handler(drop_at_end, greeting=greeting)


async def test_death_on_unexpected_word_is_found() -> None:
    async def handle(sock: Socket) -> None:
        async for line in sock.lines():
            if line.strip() != b"NOOP":
                await sock.send(b"%d\n" % (int(line) + 1))

    message = (
        "garbage: the handler raised ValueError: invalid literal for int() with base 10: b'\\r'"
    )
    await finds(message, handle)


async def test_error_on_disconnect_is_found() -> None:
    async def handle(sock: Socket) -> None:
        line = await sock.recv()
        await sock.send(b"%c" % line[0])

    await finds("silent client: the handler raised IndexError: index out of range", handle)


async def test_foreign_await_is_found() -> None:
    class Foreign:
        def __await__(self) -> Iterator[str]:
            yield "something that Trio does not know"

    async def handle(sock: Socket) -> None:
        await Foreign()

    with pytest.raises(AssertionError, match="silent client: the handler raised TypeError: "):
        await check_handler(handle)


# ---- buffering ----


async def test_unbounded_line_is_found() -> None:
    async def handle(sock: Socket) -> None:
        data = bytearray()
        async for chunk in sock:
            data += chunk
            while b"\n" in chunk and b"\n" in data:
                line, _, data = data.partition(b"\n")
                await sock.send(b"ok " + line + b"\n")

    message = "endless request: the handler holds more than 8 MiB for one client"
    await finds(message, handle, timeout=40)


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(b"ok\n", marks=pytest.mark.rare),
        b"a longer answer, which fills the buffers sooner" * 20 + b"\n",
    ],
)
async def test_unbounded_queue_of_answers_is_found(answer: bytes) -> None:
    async def handle(sock: Socket) -> None:
        send, receive = trio.open_memory_channel[bytes](1_000_000_000)

        async def answer_all() -> None:
            async for each in receive:
                await sock.send(each)

        async with trio.open_nursery() as nursery, send:
            nursery.start_soon(answer_all)
            async for line in sock.lines(delimiter=b"\r\n"):
                await send.send(answer + line)

    message = "slow reader: the handler holds more than 2 MiB for one client"
    await finds(message, handle, timeout=40)


async def test_client_that_blocks_other_clients_is_found(patient_clock: object) -> None:
    lock = trio.Lock()

    async def handle(sock: Socket) -> None:
        async for line in sock.lines():
            async with lock:
                await sock.send(b"ok " + line + b"\n")

    message = (
        "slow reader: the handler serves no other client while one client does not read "
        "(waited 10 seconds)"
    )
    await finds(message, handle)


# ---- lines ----


async def test_truncated_line_treated_as_complete_is_found() -> None:
    async def handle(sock: Socket) -> None:
        while True:
            try:
                line = await sock.recv_line()
            except trisock.LimitExceededError:
                return
            except trisock.IncompleteReadError as exc:
                if exc.partial:
                    await sock.send(b"did " + exc.partial.strip() + b"\n")
                return
            await sock.send(b"did " + line.strip() + b"\n")

    message = "truncation: the handler took half a request for a whole one: it sent b'did NOOP\\n'"
    await finds(message, handle)


async def test_chunk_treated_as_a_message_is_found() -> None:
    async def handle(sock: Socket) -> None:
        async for chunk in sock:
            await sock.send(b"did " + chunk.strip() + b"\n")

    message = (
        "byte by byte: the handler sent b'did N\\ndid O\\ndid O\\ndid P\\ndid \\ndid \\n', "
        "but if the request comes in one piece, it sends b'did NOOP\\n'"
    )
    await finds(message, handle)


# ---- STARTTLS ----


class OwnBuffer:
    """A handler's own receive buffer, which it wrongly keeps across starttls."""

    def __init__(self, sock: Socket) -> None:
        self.sock = sock
        self.data = b""

    async def line(self) -> bytes | None:
        while b"\n" not in self.data:
            if len(self.data) > 1000 or not (chunk := await self.sock.recv()):
                return None
            self.data += chunk
        line, _, self.data = self.data.partition(b"\n")
        return line.strip()


def injectable(tls: ServerTLS, known: Callable[[bytes], bool]) -> trisock.Handler:
    """Return a handler that answers only the lines that it knows."""

    async def handle(sock: Socket) -> None:
        received = OwnBuffer(sock)
        while (line := await received.line()) is not None:
            if known(line):
                await sock.send(b"250 " + line[:20] + b"\r\n")
            if line == b"STARTTLS" and not sock.istls():
                await sock.starttls(tls)

    return handle


async def test_injected_line_is_found(server_tls: ServerTLS) -> None:
    message = (
        "injection: the handler answered a request under TLS that was sent in plain text behind "
        "b'STARTTLS\\r\\n': it sent b'250 {}\\r\\n'"
    )
    handle = injectable(server_tls, lambda line: True)
    await finds(message.format("NOOP"), handle, starttls=STARTTLS)
    handle = injectable(server_tls, lambda line: line == b"STARTTLS")
    await finds(message.format("STARTTLS"), handle, starttls=STARTTLS)


async def test_handler_that_continues_in_plain_text_is_found(server_tls: ServerTLS) -> None:
    async def handle(sock: Socket) -> None:
        async for line in sock.lines():
            await sock.send(b"250 " + line.strip() + b"\r\n")
            if line.strip() == b"STARTTLS" and (await sock.peek(wait=True))[:1] == b"\x16":
                await sock.starttls(server_tls)

    message = (
        "plain text after STARTTLS: the handler went on in plain text: it sent b'250 NOOP\\r\\n'"
    )
    await finds(message, handle, starttls=STARTTLS)


async def test_missing_answer_to_starttls_is_found(patient_clock: object) -> None:
    message = (
        "plain text after STARTTLS: the handler has not answered b'STARTTLS\\r\\n' "
        "(waited 10 seconds)"
    )
    await finds(message, discard, starttls=STARTTLS)


async def test_second_starttls_that_raises_is_found(server_tls: ServerTLS) -> None:
    async def handle(sock: Socket) -> None:
        async for line in sock.lines():
            await sock.send(b"250 " + line.strip() + b"\r\n")
            if line.strip() == b"STARTTLS":
                await sock.starttls(server_tls)

    with pytest.raises(AssertionError) as caught:
        await check_handler(handle, starttls=STARTTLS)
    text = str(caught.value)
    assert text.startswith("STARTTLS twice: the handler raised RuntimeError: the connection with")
    assert text.endswith("is already using TLS")
    assert isinstance(caught.value.__cause__, RuntimeError)


async def test_handler_that_knows_no_tls_is_found() -> None:
    message = (
        "plain text after STARTTLS: the handler went on in plain text: it sent b'ok NOOP\\r\\n'"
    )
    await finds(message, answer_lines, starttls=STARTTLS)


async def test_failed_handshake_is_found(server_tls: ServerTLS) -> None:
    async def handle(sock: Socket) -> None:
        await sock.starttls(server_tls)

    with pytest.raises(AssertionError, match=r"^silent client under TLS: TLS did not start: "):
        await check_handler(handle, tls=True)


async def test_handler_that_ends_the_connection_at_starttls_is_found() -> None:
    async def handle(sock: Socket) -> None:
        await sock.recv_line()

    message = "injection: the handler ended the connection after b'STARTTLS\\r\\n'"
    await finds(message, handle, starttls=STARTTLS)
