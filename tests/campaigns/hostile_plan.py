"""What is said in a conversation, and what the network does to it, as a seed says.

``plan`` draws it: most plans have a fault, and ``combinations`` are all that can come first.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# ---- what can happen ----

# Which way bytes go: from the client to the server, and back.
UP, DOWN = "up", "down"

# The phases of a conversation. Each flight of the handshake goes one way, as do the command that
# announces TLS and its answer. STOP is the close_notify of a TLS that is left again. CLOSE is the
# close_notify (if the conversation ends in TLS) and the FIN.
CONNECT, CLEAR, COMMAND, ANSWER = "connect", "clear talk", "command", "answer"
FLIGHT1, FLIGHT2, FLIGHT3, FLIGHT4 = "flight 1", "flight 2", "flight 3", "flight 4"
SECRET, STOP, AFTER, CLOSE = "TLS talk", "stop", "clear talk after TLS", "close"

UPGRADE = (COMMAND, ANSWER)
HANDSHAKE = (FLIGHT1, FLIGHT2, FLIGHT3, FLIGHT4)
DIRECTIONS = {COMMAND: UP, ANSWER: DOWN, FLIGHT1: UP, FLIGHT2: DOWN, FLIGHT3: UP, FLIGHT4: DOWN}

# The modes of a conversation, and the phases of each after CONNECT.
PLAIN, TLS, UPGRADED, RETURNED = "plain", "tls", "upgraded", "returned"
PHASES = {
    PLAIN: (CLEAR, CLOSE),
    TLS: (*HANDSHAKE, SECRET, CLOSE),
    UPGRADED: (CLEAR, *UPGRADE, *HANDSHAKE, SECRET, CLOSE),
    RETURNED: (CLEAR, *UPGRADE, *HANDSHAKE, SECRET, STOP, AFTER, CLOSE),
}
VERSIONS = {PLAIN: ("",), **dict.fromkeys((TLS, UPGRADED, RETURNED), ("TLSv1.2", "TLSv1.3"))}

# What the network does to a connection: nothing listens; one direction ends, the other goes on;
# both end; both are reset; a byte is changed, lost or added; a clear line is slipped in behind
# another (CVE-2011-0411); one or both go silent for ever.
REFUSE, HALF_CLOSE, TRUNCATE, RESET = "refuse", "half-close", "truncate", "reset"
CORRUPT, INJECT, STALL = "corrupt", "inject", "stall"
CONNECT_KINDS = (REFUSE, TRUNCATE, RESET, STALL)
KINDS = (HALF_CLOSE, TRUNCATE, RESET, CORRUPT, STALL)

COMMAND_LINE = b"STARTTLS\r\n"
ANSWER_LINE = b"220 go ahead\r\n"
INJECTED_LINE = b"DELETE everything\r\n"

# What is said under TLS begins with this, and the network must never see it.
MARKER = b"for your eyes only\n"

# How many bytes of a phase there are at the least, where the plan does not say it. (A client's
# hello; a server's, with a certificate; Finished; the same; a close_notify.)
_LEAST = {FLIGHT1: 150, FLIGHT2: 500, FLIGHT3: 64, FLIGHT4: 51, STOP: 23, CLOSE: 23}


@dataclass(frozen=True)
class Fault:
    """What happens, after how many bytes of which phase, which way."""

    kind: str
    phase: str
    direction: str = UP
    offset: int = 0
    how: int = 0  # a number that decides the rest: which bit, whether both ways, ...


@dataclass(frozen=True)
class Flow:
    """How the bytes of one direction travel when nothing is wrong.

    Attributes:
      tiny: how many bytes at the beginning of each phase travel one to three at a time.
      largest: the most that travel together.
      gather: how many passes of the scheduler to wait for more, to send it on as one.
      pause: how many passes at most between two pieces.
      naps: how many of the pauses are as long as a millisecond.
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
    """A conversation, and what becomes of it. All of it comes from the seed.

    Attributes:
      ending: who closes first: ``client``, ``server``, ``both``, or ``eof`` for both with
        ``send_eof``.
      sizes: how many bytes are said, by phase and direction.
      hasty: whether ``starttls`` has a timeout that is shorter than the user's patience.
    """

    seed: int
    mode: str
    version: str
    ending: str
    sizes: dict[tuple[str, str], int]
    flows: dict[str, Flow]
    faults: tuple[Fault, ...]
    hasty: bool

    def said(self, phase: str, direction: str) -> bytes:
        """Return what is said in a phase."""
        return _said(self.seed, phase, direction, self.sizes[phase, direction])

    @property
    def kind(self) -> str:
        """What becomes of it, in a word."""
        return self.faults[0].kind if self.faults else "clean"

    @property
    def variant(self) -> str:
        return f"{self.mode} {self.version}".strip()

    def has(self, *kinds: str) -> bool:
        """Whether one of its faults is of one of these kinds."""
        return any(fault.kind in kinds for fault in self.faults)

    def may_hold_up_handshakes(self) -> bool:
        """Whether a handshake may come to wait for ever."""
        return _may_hold_up_handshakes(self.faults)

    def damages_clear_bytes(self) -> bool:
        """Whether it changes what only the application can find to be wrong."""
        clear = {CLEAR, *UPGRADE, AFTER} | ({CLOSE} if self.mode in (PLAIN, RETURNED) else set())
        return any(
            fault.kind == INJECT or (fault.kind == CORRUPT and fault.phase in clear)
            for fault in self.faults
        )


@functools.lru_cache(maxsize=256)
def _said(seed: int, phase: str, direction: str, size: int) -> bytes:
    data = random.Random(f"{seed} {phase} {direction}").randbytes(size)
    return MARKER + data[len(MARKER) :] if phase == SECRET else data


# ---- the plan ----

Combination = tuple[str, str, "Fault | None"]


@functools.cache
def combinations() -> tuple[Combination, ...]:
    """Return every mode, version and fault that there is, each with and without."""
    return tuple(
        (mode, version, fault)
        for mode, versions in VERSIONS.items()
        for version in versions
        for fault in (*[None] * 8, *_faults(mode))
    )


def _faults(mode: str) -> Iterator[Fault]:
    for kind in CONNECT_KINDS:
        yield Fault(kind, CONNECT)
    for phase in PHASES[mode]:
        for direction in (UP, DOWN):
            if DIRECTIONS.get(phase, direction) == direction:
                for kind in KINDS:
                    yield Fault(kind, phase, direction)
                if phase in UPGRADE:
                    yield Fault(INJECT, phase, direction)


def plan(seed: int) -> Plan:
    """Draw a plan. Seeds that follow each other go through all the combinations."""
    mode, version, fault = combinations()[seed % len(combinations())]
    rng = random.Random(seed)
    flows = {direction: _flow(rng) for direction in (UP, DOWN)}
    talks = {CLEAR, SECRET, AFTER}.intersection(PHASES[mode])
    sizes = {
        (phase, direction): rng.randint(
            len(MARKER) if phase == SECRET else 1, _most(rng, flows[direction])
        )
        for phase in sorted(talks)
        for direction in (UP, DOWN)
    }
    faults = [] if fault is None else [_placed(fault, rng, sizes)]
    if fault is not None and seed >= len(combinations()) and rng.random() < 0.2:
        others = [each for each in _faults(mode) if each.phase != CONNECT]
        faults.append(_placed(rng.choice(others), rng, sizes))
    endings = ["client", "server", "both"] + (["eof"] if mode in (PLAIN, RETURNED) else [])
    return Plan(
        seed=seed,
        mode=mode,
        version=version,
        ending=rng.choice(endings),
        sizes=sizes,
        flows=flows,
        faults=tuple(faults),
        hasty=rng.random() < 0.5 and _may_hold_up_handshakes(faults),
    )


def _may_hold_up_handshakes(faults: Sequence[Fault]) -> bool:
    # After another fault the end may come while it is still the handshake.
    return any(
        fault.kind in (STALL, CORRUPT, INJECT)
        and (fault.phase in (CONNECT, *UPGRADE, *HANDSHAKE) or len(faults) > 1)
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
    """Return the most that is to be said: now and then more than the kernel's buffers hold."""
    return min(rng.choice([30, 300, 3000, 3000, 30_000, 100_000, 800_000]), 300 * flow.largest)


def _placed(fault: Fault, rng: random.Random, sizes: dict[tuple[str, str], int]) -> Fault:
    """Choose the byte: any one, but often one of the first or the last."""
    if fault.phase in UPGRADE:
        length = len(COMMAND_LINE if fault.phase == COMMAND else ANSWER_LINE)
    else:
        length = sizes.get((fault.phase, fault.direction)) or _LEAST.get(fault.phase, 1)
    last = length - 1
    offset = min(last, rng.choice([0, 1, 4, 5, last, *[rng.randrange(length) for _ in range(5)]]))
    if fault.kind == INJECT:  # behind the whole line
        offset = last
    if fault.phase == CLOSE and rng.random() < 0.3:  # behind the close_notify, before the FIN
        offset = 1_000_000
    return dataclasses.replace(fault, offset=offset, how=rng.getrandbits(16))
