"""The plan of ``faults`` for one connection: random, but determined by a seed. No I/O.

Every fault is tied to an offset in the stream. So the faults do not depend on how the bytes are
split on arrival.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

# The line that ``inject`` adds. Most protocols know the command NOOP, or answer it with an error.
INJECTED = b"NOOP injected\r\n"

# A line with more bytes is not a command that starts TLS.
_MAX_COMMAND = 4096

_TLS_HANDSHAKE = 0x16  # the first byte of a ClientHello


@dataclass(frozen=True)
class Piece:
    """Bytes to send in one call.

    Attributes:
      passes: the number of checkpoints before the send.
      seconds: how long to sleep before the send.
    """

    data: bytes
    passes: int = 0
    seconds: float = 0


def _generator(name: str) -> random.Random:
    """Return a random number generator that is seeded with the name."""
    return random.Random(name)  # noqa: S311 (the numbers are no secrets)


class Direction:
    """What happens to the bytes that one side sends.

    Args:
      seed: the seed of all random numbers.
      split, delay: as in ``faults``.
      cut_at: the number of bytes after which the connection is cut, or ``math.inf``.

    Attributes:
      is_cut: whether the offset of the cut was reached.
      awaits_line: whether ``INJECTED`` follows the next line.
      commands: whether to search for a command that starts TLS (only in what the client sends).
      reply: the direction whose next line is followed by ``INJECTED``. If this is ``None``,
        ``INJECTED`` follows the command.
    """

    def __init__(self, seed: str, *, split: bool, delay: bool, cut_at: float) -> None:
        self._pieces = _generator(f"{seed} split") if split else None
        self._pauses = _generator(f"{seed} delay") if delay else None
        self._cut_at = cut_at
        self._sleeps = 16
        self._line = bytearray()
        self._at = 0
        self._piece_ends = self._next_piece()
        self._pause_at: float = self._pauses.randrange(64) if self._pauses else math.inf
        self.is_cut = cut_at == 0
        self.awaits_line = False
        self.commands = False
        self.reply: Direction | None = None

    def feed(self, data: bytes) -> Iterator[Piece]:
        """Yield the pieces of data to send. After a cut, the rest of the data is dropped."""
        if self._at == 0 and data[0] == _TLS_HANDSHAKE:
            self.commands = False
        start = 0
        while start < len(data) and not self.is_cut:
            passes, seconds = self._pause()
            space = min(self._piece_ends, self._pause_at, self._cut_at) - self._at
            end = int(min(len(data), start + space))
            if self.commands or self.awaits_line:
                newline = data.find(b"\n", start, end)
                end = end if newline < 0 else newline + 1
            piece = data[start:end]
            self._at += len(piece)
            if self._at == self._piece_ends:
                self._piece_ends = self._next_piece()
            self.is_cut = self._at == self._cut_at
            injected = INJECTED if self._is_attacked(piece) else b""
            yield Piece(piece + injected, passes, seconds)
            start = end

    def _next_piece(self) -> float:
        if self._pieces is None:
            return math.inf
        most = self._pieces.choice((4, 4096))
        return self._at + self._pieces.randint(1, most)

    def _pause(self) -> tuple[int, float]:
        if self._pauses is None or self._at < self._pause_at:
            return 0, 0
        self._pause_at = self._at + self._pauses.randint(1, 4096)
        seconds: float = 0
        if self._pauses.random() < 0.25 and self._sleeps:
            self._sleeps -= 1
            seconds = self._pauses.uniform(0.001, 0.01)
        return self._pauses.randint(1, 8), seconds

    def _is_attacked(self, piece: bytes) -> bool:
        """Return whether the injected line follows this piece."""
        if self.awaits_line:
            self.awaits_line = not piece.endswith(b"\n")
            return not self.awaits_line
        if not self.commands:
            return False
        if len(self._line) <= _MAX_COMMAND:
            self._line += piece
        if not piece.endswith(b"\n"):
            return False
        # STARTTLS, STLS and AUTH TLS, in upper or lower case.
        found = len(self._line) <= _MAX_COMMAND and b"TLS" in self._line.upper()
        self._line.clear()
        if not found:
            return False
        self.commands = False
        if self.reply is None:
            return True
        self.reply.awaits_line = True
        return False


class ConnectionPlan:
    """The faults of one connection.

    Attributes:
      up, down: the directions from the client to the server, and from the server to the client.
      cut: how a cut ends the connection: ``"truncate"`` or ``"reset"``.
    """

    def __init__(
        self,
        seed: int,
        number: int,
        *,
        split: bool,
        delay: bool,
        truncate: bool,
        reset: bool,
        inject: bool,
    ) -> None:
        name = f"{seed} {number}"
        rng = _generator(f"{name} cut")
        kinds = [kind for kind, on in (("truncate", truncate), ("reset", reset)) if on]
        self.cut = rng.choice(kinds) if kinds else ""
        offset = int(2 ** rng.uniform(0, 12)) - 1
        where = rng.choice(("up", "down"))
        if not kinds or rng.random() < 0.5:
            where = "nowhere"
        self.up, self.down = (
            Direction(
                f"{name} {direction}",
                split=split,
                delay=delay,
                cut_at=offset if direction == where else math.inf,
            )
            for direction in ("up", "down")
        )
        self.up.commands = inject
        if _generator(f"{name} inject").random() < 0.5:
            self.up.reply = self.down

    def is_cut(self) -> bool:
        """Return whether the connection must be cut now."""
        return self.up.is_cut or self.down.is_cut
