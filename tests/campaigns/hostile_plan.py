"""Draw a plan from a seed: the content of a conversation, and the faults of the network.

Most plans have one fault, and a few have two. ``combinations`` lists every possible first fault.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# ---- phases, modes and faults ----

# The two directions: from the client to the server, and from the server to the client.
UP, DOWN = "up", "down"


class Phase:
    """The phases of a conversation.

    The command that announces TLS, the response to it, and each flight of the handshake have only
    one direction. STOP is the close_notify of ``stoptls``. CLOSE is the FIN. If the conversation
    ends under TLS, CLOSE includes the close_notify before the FIN.
    """

    CONNECT, CLEAR, COMMAND, RESPONSE = "connect", "plain text", "command", "response"
    FLIGHT1, FLIGHT2, FLIGHT3, FLIGHT4 = "flight 1", "flight 2", "flight 3", "flight 4"
    SECRET, STOP, AFTER, CLOSE = "TLS data", "stop", "plain text after TLS", "close"
    UPGRADE = (COMMAND, RESPONSE)
    HANDSHAKE = (FLIGHT1, FLIGHT2, FLIGHT3, FLIGHT4)


class Mode:
    """Plain text only, TLS only, an upgrade to TLS, or an upgrade and a return to plain text."""

    PLAIN, TLS, UPGRADED, RETURNED = "plain", "tls", "upgraded", "returned"


class Kind:
    """What the network does to a connection.

    REFUSE: the port is closed. HALF_CLOSE: one direction ends. TRUNCATE: both directions end.
    RESET: the connection is reset. CORRUPT: a byte is changed, lost or added. INJECT: a plain text
    line is added after the command or its response (CVE-2011-0411). STALL: one or both directions
    go silent forever.
    """

    REFUSE, HALF_CLOSE, TRUNCATE, RESET = "refuse", "half-close", "truncate", "reset"
    CORRUPT, INJECT, STALL = "corrupt", "inject", "stall"
    AT_CONNECT = (REFUSE, TRUNCATE, RESET, STALL)
    LATER = (HALF_CLOSE, TRUNCATE, RESET, CORRUPT, STALL)


_ONE_WAY = {
    **dict.fromkeys((Phase.COMMAND, Phase.FLIGHT1, Phase.FLIGHT3), UP),
    **dict.fromkeys((Phase.RESPONSE, Phase.FLIGHT2, Phase.FLIGHT4), DOWN),
}

# The phases of each mode after CONNECT.
_UPGRADED = (Phase.CLEAR, *Phase.UPGRADE, *Phase.HANDSHAKE, Phase.SECRET)
PHASES = {
    Mode.PLAIN: (Phase.CLEAR, Phase.CLOSE),
    Mode.TLS: (*Phase.HANDSHAKE, Phase.SECRET, Phase.CLOSE),
    Mode.UPGRADED: (*_UPGRADED, Phase.CLOSE),
    Mode.RETURNED: (*_UPGRADED, Phase.STOP, Phase.AFTER, Phase.CLOSE),
}
VARIANTS = [
    (mode, version)
    for mode in PHASES
    for version in ([""] if mode == Mode.PLAIN else ["TLSv1.2", "TLSv1.3"])
]

LINES = {Phase.COMMAND: b"STARTTLS\r\n", Phase.RESPONSE: b"220 go ahead\r\n"}
INJECTED_LINE = b"DELETE everything\r\n"

# TLS data begins with this marker. The network must never see it.
MARKER = b"for your eyes only\n"

# The minimum size in bytes of each phase whose size is not in the plan. FLIGHT1 contains the
# ClientHello. FLIGHT2 contains the ServerHello and the certificate. FLIGHT3 and FLIGHT4 contain a
# Finished message each, and STOP and CLOSE contain a close_notify each.
_LEAST = {
    Phase.FLIGHT1: 150,
    Phase.FLIGHT2: 500,
    Phase.FLIGHT3: 64,
    Phase.FLIGHT4: 51,
    Phase.STOP: 23,
    Phase.CLOSE: 23,
}


@dataclass(frozen=True)
class Fault:
    """A fault that strikes after ``offset`` bytes of a phase in one direction."""

    kind: str
    phase: str
    direction: str = UP
    offset: int = 0
    how: int = 0  # selects details, such as the bit to flip or the directions to stall


@dataclass(frozen=True)
class Flow:
    """How the network splits, coalesces and delays the bytes of one direction.

    Attributes:
      tiny: number of bytes at the start of each phase that go out in pieces of one to three bytes.
      largest: maximum size of a piece.
      gather: number of scheduler passes to wait for more data to coalesce.
      pause: maximum number of scheduler passes between two pieces.
      naps: number of pauses that last a millisecond.
      narrow: whether the kernel's buffers are small.
    """

    tiny: int
    largest: int
    gather: int
    pause: int
    naps: int
    narrow: bool


@dataclass(frozen=True, eq=False)
class Plan:
    """A conversation and its faults. Everything is derived from the seed.

    Attributes:
      ending: the side that closes first: ``client``, ``server``, ``both``, or ``eof`` (both call
        ``send_eof``).
      sizes: the number of bytes sent, by phase and direction.
      hasty: whether ``starttls`` times out before its caller gives up.
    """

    seed: int
    mode: str
    version: str
    ending: str
    sizes: dict[tuple[str, str], int]
    flows: dict[str, Flow]
    faults: tuple[Fault, ...]
    hasty: bool

    def payload(self, phase: str, direction: str) -> bytes:
        return _payload(self.seed, phase, direction, self.sizes[phase, direction])

    @property
    def kind(self) -> str:
        return self.faults[0].kind if self.faults else "clean"

    @property
    def variant(self) -> str:
        return f"{self.mode} {self.version}".strip()

    def has(self, *kinds: str) -> bool:
        return any(fault.kind in kinds for fault in self.faults)

    def may_hold_up_handshakes(self) -> bool:
        """Return whether a fault may make a handshake wait forever."""
        return _may_hold_up_handshakes(self.faults)

    def damages_clear_bytes(self) -> bool:
        """Return whether a fault damages plain text, so that TLS cannot detect the damage."""
        clear = {Phase.CLEAR, *Phase.UPGRADE, Phase.AFTER}
        if self.mode in (Mode.PLAIN, Mode.RETURNED):
            clear.add(Phase.CLOSE)
        return any(
            fault.kind == Kind.INJECT or (fault.kind == Kind.CORRUPT and fault.phase in clear)
            for fault in self.faults
        )


@functools.lru_cache(maxsize=256)
def _payload(seed: int, phase: str, direction: str, size: int) -> bytes:
    data = random.Random(f"{seed} {phase} {direction}").randbytes(size)
    return MARKER + data[len(MARKER) :] if phase == Phase.SECRET else data


# ---- the plan ----


@functools.cache
def combinations() -> tuple[tuple[str, str, Fault | None], ...]:
    """Return tuples of a mode, a version, and the first fault.

    Each mode and version has one tuple for each possible fault, and 8 tuples without a fault.
    """
    return tuple(
        (*variant, fault) for variant in VARIANTS for fault in (*[None] * 8, *_faults(variant[0]))
    )


def _faults(mode: str) -> Iterator[Fault]:
    for kind in Kind.AT_CONNECT:
        yield Fault(kind, Phase.CONNECT)
    for phase in PHASES[mode]:
        for direction in (UP, DOWN):
            if _ONE_WAY.get(phase, direction) == direction:
                for kind in Kind.LATER:
                    yield Fault(kind, phase, direction)
                if phase in Phase.UPGRADE:
                    yield Fault(Kind.INJECT, phase, direction)


def plan(seed: int) -> Plan:
    """Draw a plan. Successive seeds go through all the combinations."""
    mode, version, fault = combinations()[seed % len(combinations())]
    rng = random.Random(seed)
    flows = {direction: _flow(rng) for direction in (UP, DOWN)}
    sizes = {}
    for phase in sorted({Phase.CLEAR, Phase.SECRET, Phase.AFTER}.intersection(PHASES[mode])):
        least = len(MARKER) if phase == Phase.SECRET else 1
        for direction in (UP, DOWN):
            sizes[phase, direction] = rng.randint(least, _most(rng, flows[direction]))
    faults = [] if fault is None else [_placed(fault, rng, sizes)]
    if fault is not None and seed >= len(combinations()) and rng.random() < 0.2:
        others = [each for each in _faults(mode) if each.phase != Phase.CONNECT]
        faults.append(_placed(rng.choice(others), rng, sizes))
    endings = ["client", "server", "both"] + (
        ["eof"] if mode in (Mode.PLAIN, Mode.RETURNED) else []
    )
    ending = rng.choice(endings)
    hasty = rng.random() < 0.5 and _may_hold_up_handshakes(faults)
    return Plan(seed, mode, version, ending, sizes, flows, tuple(faults), hasty)


def _may_hold_up_handshakes(faults: Sequence[Fault]) -> bool:
    # With two faults, the second may strike during the handshake.
    return any(
        fault.kind in (Kind.STALL, Kind.CORRUPT, Kind.INJECT)
        and (fault.phase in (Phase.CONNECT, *Phase.UPGRADE, *Phase.HANDSHAKE) or len(faults) > 1)
        for fault in faults
    )


def _flow(rng: random.Random) -> Flow:
    return Flow(
        tiny=rng.choice([0, 0, 6, 100]),
        largest=rng.choice([65536, 65536, 5000, 1000, 100]),
        gather=rng.choice([0, 0, 1, 5, 30]),
        pause=rng.choice([0, 0, 1, 4]),
        naps=rng.choice([0, 0, 0, 10]),
        narrow=rng.random() < 0.2,
    )


def _most(rng: random.Random, flow: Flow) -> int:
    """Choose the maximum size of a payload. Some sizes exceed the kernel's buffers."""
    return min(rng.choice([30, 300, 3000, 3000, 30_000, 100_000, 800_000]), 300 * flow.largest)


def _placed(fault: Fault, rng: random.Random, sizes: dict[tuple[str, str], int]) -> Fault:
    """Choose the offset of a fault in its phase: any byte, but often near the start or the end."""
    if fault.phase in Phase.UPGRADE:
        length = len(LINES[fault.phase])
    else:
        length = sizes.get((fault.phase, fault.direction)) or _LEAST.get(fault.phase, 1)
    last = length - 1
    offset = min(last, rng.choice([0, 1, 4, 5, last, *[rng.randrange(length) for _ in range(5)]]))
    if fault.kind == Kind.INJECT:  # inject after the whole line
        offset = last
    if fault.phase == Phase.CLOSE and rng.random() < 0.3:  # between close_notify and FIN
        offset = 1_000_000
    return dataclasses.replace(fault, offset=offset, how=rng.getrandbits(16))
