"""One side of a conversation over a hostile network."""

from __future__ import annotations

import random
import sys
import traceback
from collections.abc import Callable

import pytest
import trio

from helpers.exceptions import leaves_of
from hostile_plan import DOWN, LINES, MARKER, PHASES, UP, Mode, Phase, Plan
from trisock import IncompleteReadError, LimitExceededError, Socket, TLSError

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup

PATIENCE = 0.4  # Seconds until a side gives up after a fault that may block it forever.
HASTE = 0.4  # Seconds until a handshake times out, if only the timeout can end it.
HANG = 40  # Seconds until a conversation counts as hung.

# TLSError is not listed, because it is a BrokenResourceError.
DOCUMENTED = (trio.BrokenResourceError, IncompleteReadError, LimitExceededError, OSError)


class WrongBytes(Exception):
    """The application received something that the peer did not send."""


class EndedEarly(Exception):
    """The stream ended too early."""


class Side:
    """One side. It sends its payload, and reads the peer's payload with a random mix of methods.

    Attributes:
      how: how the side ended: ``"complete"``, ``"deadline"``, or the name of an error.
      encrypted: whether the side used TLS when it ended.
      saw_eof: whether the side saw EOF.
      saw_close_notify: whether the side saw close_notify.
      complaints: errors that are not documented.
    """

    def __init__(
        self, plan: Plan, direction: str, tls: object, patience: Callable[[], trio.CancelScope]
    ) -> None:
        self.plan = plan
        self.tls = tls
        self.patience = patience
        self.sends, self.receives = (UP, DOWN) if direction == UP else (DOWN, UP)
        self.name = "client" if direction == UP else "server"
        self.rng = random.Random(f"{plan.seed} {self.name}")
        self.how = ""
        self.errors: list[BaseException] = []
        self.encrypted = False
        self.saw_eof = False
        self.saw_close_notify = False
        self.failed_handshakes = 0  # those of starttls
        self.complaints: list[str] = []
        self.ended = trio.Event()

    @property
    def handshake_timeout(self) -> float:
        return HASTE if self.plan.hasty else 2 * HANG

    async def run(self, converse: Callable[[], object]) -> BaseException | None:
        """Run this side until it ends. Return its error, or ``None`` if there was no error."""
        try:
            with self.patience() as scope:
                await converse()  # type: ignore[misc]
            self.how = "deadline" if scope.cancelled_caught else "complete"
        except (Exception, BaseExceptionGroup) as exc:
            self.errors = errors = leaves_of(exc)
            own = [each for each in errors if isinstance(each, (WrongBytes, EndedEarly))]
            self.how = type((own or errors)[0]).__name__
            if not self.encrypted and self.how in ("EndedEarly", "IncompleteReadError"):
                self.saw_eof = True
            for each in errors:
                if not isinstance(each, (*DOCUMENTED, WrongBytes, EndedEarly)):
                    text = "".join(traceback.format_exception(each))
                    self.complaints.append(f"the {self.name} got {each!r}\n{text}")
            return exc
        finally:
            self.ended.set()
        return None

    async def converse(self, sock: Socket) -> None:
        plan = self.plan
        for phase in (Phase.CLEAR, Phase.SECRET, Phase.AFTER):
            if phase not in PHASES[plan.mode]:
                continue
            if phase == Phase.SECRET:
                if plan.mode != Mode.TLS:
                    await self.agree(sock)
                if not sock.istls():
                    await self.start_tls(sock)
                self.encrypted = True
                assert sock.tls is not None
                assert sock.tls.version == plan.version
            if phase == Phase.AFTER:
                await sock.stoptls()
                self.saw_close_notify = True
                self.encrypted = False
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.send_all, sock, phase)
                await self.receive_all(sock, plan.payload(phase, self.receives))
        if plan.ending not in (self.name, "both"):
            for _ in range(2):
                trailing = await sock.recv()
                if trailing:
                    raise WrongBytes(f"expected EOF, got {trailing[:40]!r}")
            if self.encrypted:
                self.saw_close_notify = True
            else:
                self.saw_eof = True

    async def agree(self, sock: Socket) -> None:
        """Agree on TLS with a command and a response, as SMTP does."""
        expected = LINES[Phase.COMMAND]
        if self.name == "client":
            await sock.send(expected)
            expected = LINES[Phase.RESPONSE]
        line = await sock.recv_until(b"\r\n", max_bytes=64)
        if line != expected:
            raise WrongBytes(f"{line!r} instead of {expected!r}")
        if self.name == "server":
            await sock.send(LINES[Phase.RESPONSE])

    async def start_tls(self, sock: Socket) -> None:
        try:
            await sock.starttls(
                self.tls,  # type: ignore[arg-type]
                server_hostname="example.org" if self.name == "client" else None,
                handshake_timeout=self.handshake_timeout,
            )
        except TLSError:
            self.failed_handshakes += 1
            # After a failed handshake, sending must fail, or the network would see MARKER.
            with pytest.raises(trio.ClosedResourceError):
                await sock.send(MARKER)
            raise

    async def send_all(self, sock: Socket, phase: str) -> None:
        """Send the payload of a phase in random pieces."""
        data = memoryview(self.plan.payload(phase, self.sends))
        rng = self.rng
        while data:
            pieces = []
            for _ in range(rng.choice([1, 1, 1, 2, 5])):
                size = rng.choice([1, 10, 1000, 20_000, 100_000, 1_000_000])
                size = rng.randint(max(1, size // 2), size)
                pieces.append(rng.choice([bytes, bytearray, memoryview])(data[:size]))
                data = data[size:]
            await sock.send(*pieces)
        last = Phase.CLEAR if self.plan.mode == Mode.PLAIN else Phase.AFTER
        if self.plan.ending == "eof" and phase == last:
            await sock.send_eof()

    # ---- reading ----

    async def receive_all(self, sock: Socket, expected: bytes) -> None:
        """Read the expected bytes and compare them."""
        ways = [self.by_recv, self.by_size, self.by_delimiter, self.by_line, self.by_peek]
        ways += [self.by_frame, self.by_batch]
        position = 0
        while position < len(expected):
            way = self.rng.choice([*ways, self.by_pushing_back, self.by_cancelling])
            data = await way(sock, expected, position)
            if len(data) > len(expected) - position:  # the rest belongs to the next phase
                sock.unrecv(data[len(expected) - position :])
                data = data[: len(expected) - position]
            if not expected.startswith(data, position):
                raise WrongBytes(
                    f"{way.__name__} read wrong bytes at {position} of {len(expected)}"
                )
            position += len(data)

    async def by_recv(self, sock: Socket, expected: bytes, position: int) -> bytes:
        data = await sock.recv(self.rng.choice([None, None, 1, 100, 10_000]))
        if not data:
            raise EndedEarly(f"EOF after {position} of {len(expected)} bytes")
        return data

    async def by_size(self, sock: Socket, expected: bytes, position: int) -> bytes:
        left = len(expected) - position
        return await sock.recv_exactly(self.rng.randint(0, min(left, self.rng.choice([5, 70_000]))))

    async def by_delimiter(self, sock: Socket, expected: bytes, position: int) -> bytes:
        begin = position + self.rng.randint(0, min(len(expected) - position - 1, 60_000))
        delimiter = expected[begin : begin + self.rng.randint(1, 3)]
        end = expected.find(delimiter, position) + len(delimiter)
        data = await sock.recv_until(delimiter, max_bytes=end - position)
        if len(data) < end - position:
            raise WrongBytes(f"{delimiter!r} too early, at {position} of {len(expected)}")
        return data

    async def by_line(self, sock: Socket, expected: bytes, position: int) -> bytes:
        number = self.rng.randint(0, min(expected.count(b"\n", position), 300))
        keep_ends = self.rng.random() < 0.5
        lines: list[bytes] = []
        if number:
            async for line in sock.lines(keep_ends=keep_ends, max_bytes=1_000_000):
                lines.append(line if keep_ends else line + b"\n")
                if len(lines) == number:
                    return b"".join(lines)
            raise EndedEarly(
                f"EOF after {position} of {len(expected)} bytes and {len(lines)} lines"
            )
        return b""

    async def by_batch(self, sock: Socket, expected: bytes, position: int) -> bytes:
        """Read the next lines, if the expected bytes contain the end of a line."""
        if b"\n" not in expected[position:]:
            return b""
        batches = sock.lines(keep_ends=True, max_bytes=1_000_000).batches()
        batch = await anext(batches, None)
        if batch is None:
            raise EndedEarly(f"EOF after {position} of {len(expected)} bytes")
        return b"".join(batch)

    async def by_frame(self, sock: Socket, expected: bytes, position: int) -> bytes:
        """Read a frame with a two-byte header, if the expected bytes contain a whole frame."""
        header = expected[position : position + 2]
        length = int.from_bytes(header, "big")
        if len(header) < 2 or position + 2 + length > len(expected):
            return b""
        if self.rng.random() < 0.5:
            body = await sock.recv_frame(2)
            return len(body).to_bytes(2, "big") + body
        next_body = await anext(sock.frames(2), None)
        if next_body is None:
            raise EndedEarly(f"EOF after {position} of {len(expected)} bytes")
        return len(next_body).to_bytes(2, "big") + next_body

    async def by_peek(self, sock: Socket, expected: bytes, position: int) -> bytes:
        seen = await sock.peek(wait=self.rng.random() < 0.5)
        data = await self.by_recv(sock, expected, position)
        if seen is not None and not seen.startswith(data):
            raise WrongBytes(f"peek returned {seen[:40]!r}, recv returned {data[:40]!r}")
        return data

    async def by_pushing_back(self, sock: Socket, expected: bytes, position: int) -> bytes:
        data = await self.by_recv(sock, expected, position)
        a, b = sorted(self.rng.choices(range(len(data) + 1), k=2))
        sock.unrecv(data[b:])
        sock.unrecv(data[a:b])
        return data[:a]

    async def by_cancelling(self, sock: Socket, expected: bytes, position: int) -> bytes:
        """Read with a short timeout. The read must lose no data if it is cancelled."""
        number = min(len(expected) - position, 5000)
        with trio.move_on_after(self.rng.choice([0, 0.001, 0.01])):
            return await sock.recv_exactly(number)
        return b""
