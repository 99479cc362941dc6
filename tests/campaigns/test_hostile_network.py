"""Conversations over the worst network there is: whole, or ended by an error that is documented.

A failed test names the seeds of what went wrong; ``HOSTILE_SEED=17`` in the environment runs
the conversation of one seed alone. ``--times`` does as many rounds of all combinations. At the end
the outcomes are printed (``-s`` or ``-rA`` shows them).
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import os
import random
import re
import ssl
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import trio

import hostile_network
import trisock
from helpers.authority import Authority
from helpers.pairs import all_served
from hostile_network import (
    AFTER,
    ANSWER_LINE,
    CLEAR,
    CLOSE,
    COMMAND_LINE,
    CONNECT,
    CONNECT_KINDS,
    CORRUPT,
    DOWN,
    INJECT,
    KINDS,
    MARKER,
    PHASES,
    PLAIN,
    REFUSE,
    RESET,
    SECRET,
    STALL,
    STOP,
    TLS,
    UP,
    UPGRADE,
    VERSIONS,
    HostileNetwork,
    Plan,
    combinations,
)
from trisock import (
    ClientTLS,
    IncompleteReadError,
    LimitExceededError,
    ServerTLS,
    Socket,
    TLSError,
)

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup

# How many conversations there are at once.
AT_ONCE = 30

# How long a side waits, once the network is such that it may wait for ever; how long for a
# handshake, where that is to be what ends it; and after how long it hangs. In seconds.
PATIENCE, HASTE, HANG = 0.4, 0.4, 40

# Modes and versions, as the tests' names have them.
VARIANTS = {
    f"{mode} {version}".strip(): (mode, version)
    for mode, versions in VERSIONS.items()
    for version in versions
}


class WrongBytes(Exception):
    """What came is not what was sent: the application has found it."""


class EndedEarly(Exception):
    """The stream ended before everything had come."""


# ---- one side of a conversation ----


class Side:
    """One end: says what the plan says, and reads what the other says by a random mix of reads.

    Attributes:
      how: how it ended: ``"whole"``, ``"deadline"``, or the name of an error.
      encrypted: whether it was under TLS by then.
      saw_end: whether it saw an end of the connection that looked clean.
      saw_end_of_tls: whether it saw one of TLS, which is a close_notify.
      complaints: what must not be.
    """

    def __init__(
        self,
        plan: Plan,
        direction: str,
        tls: object,
        patience: Callable[[], trio.CancelScope],
    ) -> None:
        self.plan = plan
        self.tls = tls
        self.patience = patience
        self.says, self.hears = (UP, DOWN) if direction == UP else (DOWN, UP)
        self.name = "client" if direction == UP else "server"
        self.rng = random.Random(f"{plan.seed} {self.name}")
        self.how = ""
        self.errors: list[BaseException] = []
        self.encrypted = False
        self.saw_end = False
        self.saw_end_of_tls = False
        self.complaints: list[str] = []
        self.ended = trio.Event()

    @property
    def handshake_timeout(self) -> float:
        return HASTE if self.plan.hasty else 2 * HANG

    async def run(self, converse: Callable[[], object]) -> BaseException | None:
        """Run a side to its end, and return what ended it."""
        failure: BaseException | None = None
        try:
            with self.patience() as scope:
                await converse()  # type: ignore[misc]
            self.how = "deadline" if scope.cancelled_caught else "whole"
        except (Exception, BaseExceptionGroup) as exc:
            failure = exc
            self.errors = errors = list(_leaves(exc))
            own = [each for each in errors if isinstance(each, (WrongBytes, EndedEarly))]
            self.how = type((own or errors)[0]).__name__
            if not self.encrypted and self.how in ("EndedEarly", "IncompleteReadError"):
                self.saw_end = True
            for each in errors:
                if not isinstance(each, DOCUMENTED):
                    text = "".join(traceback.format_exception(each))
                    self.complaints.append(f"the {self.name} got {each!r}\n{text}")
        finally:
            self.ended.set()
        return failure

    async def converse(self, sock: Socket) -> None:
        plan = self.plan
        for phase in (CLEAR, SECRET, AFTER):
            if phase not in PHASES[plan.mode]:
                continue
            if phase == SECRET:
                if plan.mode != TLS:
                    await self.agree(sock)
                if not sock.istls():
                    await self.start_tls(sock)
                self.encrypted = True
                assert sock.tls is not None
                assert sock.tls.version == plan.version
            if phase == AFTER:
                await sock.stoptls()
                self.saw_end_of_tls = True
                self.encrypted = False
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.speak, sock, phase)
                await self.listen(sock, plan.said(phase, self.hears))
        if plan.ending not in (self.name, "both"):
            for _ in range(2):
                trailing = await sock.recv()
                if trailing:
                    raise WrongBytes(f"{trailing[:40]!r} in place of the end")
            if self.encrypted:
                self.saw_end_of_tls = True
            else:
                self.saw_end = True

    async def agree(self, sock: Socket) -> None:
        """Announce TLS, as SMTP does."""
        if self.name == "client":
            await sock.send(COMMAND_LINE)
            line, expected = await sock.recv_until(b"\r\n", max_bytes=64), ANSWER_LINE
        else:
            line, expected = await sock.recv_until(b"\r\n", max_bytes=64), COMMAND_LINE
        if line != expected:
            raise WrongBytes(f"{line!r} in place of {expected!r}")
        if self.name == "server":
            await sock.send(ANSWER_LINE)

    async def start_tls(self, sock: Socket) -> None:
        try:
            await sock.starttls(
                self.tls,  # type: ignore[arg-type]
                server_hostname="example.org" if self.name == "client" else None,
                handshake_timeout=self.handshake_timeout,
            )
        except TLSError:
            # Now nothing must go out in the clear any more. (The network looks for the marker.)
            with pytest.raises(trio.ClosedResourceError):
                await sock.send(MARKER)
            raise

    async def speak(self, sock: Socket, phase: str) -> None:
        """Say everything, in random pieces."""
        data = memoryview(self.plan.said(phase, self.says))
        rng = self.rng
        while data:
            pieces = []
            for _ in range(rng.choice([1, 1, 1, 2, 5])):
                size = rng.choice([1, 10, 1000, 20_000, 100_000, 1_000_000])
                size = rng.randint(max(1, size // 2), size)
                pieces.append(rng.choice([bytes, bytearray, memoryview])(data[:size]))
                data = data[size:]
            await sock.send(*pieces)
        if self.plan.ending == "eof" and phase == (CLEAR if self.plan.mode == PLAIN else AFTER):
            await sock.send_eof()

    # ---- reading ----

    async def listen(self, sock: Socket, expected: bytes) -> None:
        """Read everything that is expected, and compare each byte."""
        ways = [self.by_recv, self.by_number, self.by_delimiter, self.by_line, self.by_peek]
        position = 0
        while position < len(expected):
            way = self.rng.choice([*ways, self.by_pushing_back, self.by_trying])
            data = await way(sock, expected, position)
            if len(data) > len(expected) - position:  # it belongs to what comes next
                sock.unrecv(data[len(expected) - position :])
                data = data[: len(expected) - position]
            if not expected.startswith(data, position):
                raise WrongBytes(f"at {position} of {len(expected)}, by {way.__name__}")
            position += len(data)

    async def by_recv(self, sock: Socket, expected: bytes, position: int) -> bytes:
        data = await sock.recv(self.rng.choice([None, None, 1, 100, 10_000]))
        if not data:
            raise EndedEarly(f"{position} of {len(expected)} bytes")
        return data

    async def by_number(self, sock: Socket, expected: bytes, position: int) -> bytes:
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
            raise EndedEarly(f"{position} of {len(expected)} bytes, and {len(lines)} lines")
        return b""

    async def by_peek(self, sock: Socket, expected: bytes, position: int) -> bytes:
        seen = await sock.peek()
        data = await self.by_recv(sock, expected, position)
        if seen is not None and not seen.startswith(data):
            raise WrongBytes(f"peek gave {seen[:40]!r}, recv {data[:40]!r}")
        return data

    async def by_pushing_back(self, sock: Socket, expected: bytes, position: int) -> bytes:
        data = await self.by_recv(sock, expected, position)
        a, b = sorted(self.rng.choices(range(len(data) + 1), k=2))
        sock.unrecv(data[b:])
        sock.unrecv(data[a:b])
        return data[:a]

    async def by_trying(self, sock: Socket, expected: bytes, position: int) -> bytes:
        """Give up soon: what was not returned is not lost."""
        number = min(len(expected) - position, 5000)
        with trio.move_on_after(self.rng.choice([0, 0.001, 0.01])):
            return await sock.recv_exactly(number)
        return b""


DOCUMENTED = (
    trio.BrokenResourceError,  # also TLSError
    IncompleteReadError,
    LimitExceededError,
    OSError,
    WrongBytes,
    EndedEarly,
)


def _leaves(exc: BaseException) -> Iterator[BaseException]:
    if isinstance(exc, BaseExceptionGroup):
        for each in exc.exceptions:
            yield from _leaves(each)
    else:
        yield exc


# ---- a conversation ----


class Conversation:
    """A client, the network, and a connection of a server.

    Args:
      place: the servers, and what they want to know.
    """

    def __init__(self, place: Place, plan: Plan) -> None:
        self.place = place
        self.plan = plan
        # What bind(tls=) has in place of a user's patience is its timeout.
        self.server = place.servers[plan.mode == TLS and plan.may_hold_up_handshakes()]
        self.scopes: list[trio.CancelScope] = []
        self.client_side = Side(plan, UP, place.client_tls, self.patience)
        self.server_side = Side(plan, DOWN, place.server_tls, self.patience)
        self.deadline = float("inf")
        self.hung = False
        self.network = HostileNetwork(plan, self.server.port, self.expect, self.accepted)

    def expect(self, port: int) -> None:
        self.place.expected[port] = self

    async def accepted(self) -> None:
        """Wait until the server has accepted as many connections as there are by now."""
        self.place.connections[self.server] += 1
        number = self.place.connections[self.server]
        while (stats := self.server.stats()).accepted + stats.dropped < number:
            await trio.lowlevel.checkpoint()

    def patience(self) -> trio.CancelScope:
        """Return the scope of a side, which ends once there is trouble and nothing goes on."""
        self.scopes.append(trio.CancelScope(deadline=self.deadline))
        return self.scopes[-1]

    async def lose_patience(self) -> None:
        await self.network.trouble.wait()
        # Where handshakes have a timeout of their own that comes first.
        self.deadline = trio.current_time() + PATIENCE + (2 * HASTE if self.plan.hasty else 0)
        for scope in self.scopes:
            scope.deadline = self.deadline

    async def run(self, limit: trio.CapacityLimiter) -> None:
        async with limit:
            with trio.move_on_after(HANG) as hang:
                await self._run()
        self.hung = hang.cancelled_caught

    async def _run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.lose_patience)
            nursery.start_soon(self.network.run)
            await self.client_side.run(self.client)
            # A connection that is reset at once may die before the server has it.
            if self.network.reached and not self.dies_at_once:
                await self.server_side.ended.wait()
            await self.network.still.wait()
            nursery.cancel_scope.cancel()

    @property
    def dies_at_once(self) -> bool:
        return any(fault.phase == CONNECT and fault.kind == RESET for fault in self.plan.faults)

    async def client(self) -> None:
        side = self.client_side
        if self.plan.mode == TLS and not self.plan.hasty and side.rng.random() < 0.5:
            sock = await trisock.connect("127.0.0.1", self.network.port, tls=side.tls)  # type: ignore[arg-type]
        else:
            sock = await trisock.connect("127.0.0.1", self.network.port)
        async with sock:
            await side.converse(sock)

    def complaints(self) -> Iterator[str]:
        """Say what must not have been."""
        plan, network = self.plan, self.network
        if self.hung:
            yield "it hangs"
        for side, way in ((self.client_side, network.up), (self.server_side, network.down)):
            yield from side.complaints
            if way.track.complaint:
                yield f"the {side.name} sent {way.track.complaint}"
            if side.how == "" and (side.name == "client" or network.reached):
                if not self.dies_at_once:
                    yield f"the {side.name} has not ended"
            elif not self.may_end(side):
                yield f"the {side.name} ended: {side.how}: {side.errors}"
            if side.saw_end and not way.other.finished:
                yield f"the {side.name} took a connection that broke for one that ended"
            if side.saw_end_of_tls and not way.other.notified:
                yield f"the {side.name} took a connection that was cut for a clean end of TLS"
        # (A machine that is slow may let a handshake time out before.)
        if plan.faults and not network.struck and not plan.may_hold_up_handshakes():
            sides = (self.client_side, self.server_side)
            yield f"the fault did not happen: {[(side.how, side.errors) for side in sides]}"
        injected = any(fault.kind == INJECT for fault in network.struck)
        if injected and "whole" in (self.client_side.how, self.server_side.how):
            yield "clear bytes behind the command, or its answer, were passed over"
        if plan.has(REFUSE) and self.client_side.how != "ConnectionRefusedError":
            yield f"nobody listened, and the client ended: {self.client_side.how}"

    def may_end(self, side: Side) -> bool:
        """Whether a side may end in such a way."""
        plan = self.plan
        if side.how in ("whole", ""):
            return True
        if side.how == "deadline":
            return plan.has(STALL, CORRUPT, INJECT)
        if side.how in ("TLSError", "BrokenResourceError"):
            return bool(plan.faults) and (side.how != "TLSError" or plan.mode != PLAIN)
        if side.how in ("IncompleteReadError", "EndedEarly"):
            return bool(plan.faults) and not side.encrypted
        if side.how in ("WrongBytes", "LimitExceededError"):
            return plan.damages_clear_bytes() and not side.encrypted
        if side.how == "ConnectionRefusedError":
            return plan.has(REFUSE)
        return side.how == "ConnectionResetError" and self.dies_at_once


class Place(logging.Handler):
    """Where conversations are held: the servers, who tell by their log whose handshake failed."""

    def __init__(self, client_tls: object, server_tls: object) -> None:
        super().__init__()
        self.client_tls = client_tls
        self.server_tls = server_tls
        self.servers: list[trisock.Server] = []
        self.expected: dict[int, Conversation] = {}
        self.connections: Counter[trisock.Server] = Counter()
        self.failed_handshakes: Counter[trisock.Server] = Counter()
        self.lost: Counter[trisock.Server] = Counter()
        self.unexpected: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.levelno >= logging.WARNING:
            self.unexpected.append(text)
        elif "closed the connection with " not in text:
            found = re.search(r"127\.0\.0\.1:(\d+)", text)
            assert found is not None, text
            conversation = self.expected.pop(int(found[1]))
            is_tls = text.startswith("TLS handshake")
            conversation.server_side.how = "TLSError" if is_tls else "BrokenResourceError"
            conversation.server_side.ended.set()
            self.failed_handshakes[conversation.server] += 1

    async def serve(self, sock: Socket) -> None:
        conversation = self.expected.pop(sock.getpeer().port)
        side = conversation.server_side

        async def converse() -> None:
            async with sock:
                await side.converse(sock)

        failure = await side.run(converse)
        lost = (trio.BrokenResourceError, IncompleteReadError)
        if failure is not None and all(isinstance(each, lost) for each in _leaves(failure)):
            self.lost[conversation.server] += 1
            raise failure


async def hold(place: Place, plans: list[Plan]) -> list[Conversation]:
    """Hold conversations, many at once, and see that the servers are well afterwards."""
    role = place.server_tls if plans[0].mode == TLS else None
    async with trio.open_nursery() as nursery:
        for timeout in (2 * HANG, HASTE):
            server = await trisock.bind(
                nursery, 0, place.serve, host="127.0.0.1", tls=role, handshake_timeout=timeout
            )
            place.servers.append(server)
        conversations = [Conversation(place, plan) for plan in plans]
        limit = trio.CapacityLimiter(AT_ONCE)
        async with trio.open_nursery() as together:
            for conversation in conversations:
                together.start_soon(conversation.run, limit)
        healthy = Conversation(place, dataclasses.replace(plans[0], faults=(), hasty=False))
        await healthy.run(limit)
        assert (healthy.client_side.how, healthy.server_side.how) == ("whole", "whole")
        for server in place.servers:
            dropped = server.stats().dropped
            await all_served(server, place.connections[server] - dropped)
            server.stop()
            await server.wait_closed()
            assert server.stats() == trisock.ServerStats(
                accepted=place.connections[server] - dropped,
                dropped=dropped,
                failed_handshakes=place.failed_handshakes[server],
                peer_errors=place.lost[server],
            )
    return [*conversations, healthy]


# ---- the tests ----


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make a test for each mode and version, in each round; or one for a seed alone."""
    if "plans" not in metafunc.fixturenames:
        return
    size = len(combinations())
    seeds = range(size * metafunc.config.getoption("--times"))
    if "HOSTILE_SEED" in os.environ:
        seeds = range(int(os.environ["HOSTILE_SEED"]), int(os.environ["HOSTILE_SEED"]) + 1)
    tests: dict[str, list[Plan]] = {}
    for plan in map(hostile_network.plan, seeds):
        tests.setdefault(f"{plan.variant} {plan.seed // size}", []).append(plan)
    metafunc.parametrize("plans", tests.values(), ids=tests.keys())


@pytest.fixture(scope="module")
def outcomes() -> Iterator[Counter[tuple[str, str, str]]]:
    """Count how sides end: by mode and version, by fault, and how; print it at the end."""
    counter: Counter[tuple[str, str, str]] = Counter()
    yield counter
    print(f"\n{sum(counter.values())} sides of conversations ended:")
    rows = dict.fromkeys(key[:2] for key in sorted(counter))
    for variant, kind in rows:
        ends = {how: number for (*row, how), number in counter.items() if row == [variant, kind]}
        text = ", ".join(f"{how} {number}" for how, number in sorted(ends.items()))
        print(f"{variant:17} {kind:11} {text}")


@pytest.fixture
def place(
    authority: Authority, client_tls: ClientTLS, server_tls: ServerTLS, plans: list[Plan]
) -> Iterator[Place]:
    tls: ClientTLS | ssl.SSLContext = client_tls
    if plans[0].version == "TLSv1.2":
        tls = ssl.create_default_context(cadata=authority.pem.decode())
        tls.maximum_version = ssl.TLSVersion.TLSv1_2
    place = Place(tls, server_tls)
    logger = logging.getLogger("trisock.server")
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(place)
    yield place
    logger.removeHandler(place)
    logger.setLevel(level)


# A client's hello whose server name is damaged has CPython print that it cannot decode it, from
# inside the handshake, which fails.
@pytest.mark.filterwarnings(
    "ignore:Exception ignored in. b':pytest.PytestUnraisableExceptionWarning"
)
async def test_each_conversation_is_whole_or_ends_by_a_documented_error(
    place: Place, plans: list[Plan], outcomes: Counter[tuple[str, str, str]]
) -> None:
    tasks = trio.lowlevel.current_statistics().tasks_living
    conversations = await hold(place, plans)
    assert trio.lowlevel.current_statistics().tasks_living == tasks
    assert place.unexpected == []
    gc.collect()  # what is not closed warns now
    for conversation in conversations:
        for side in (conversation.client_side, conversation.server_side):
            how = side.how or "not reached"
            outcomes[conversation.plan.variant, conversation.plan.kind, how] += 1
    failed = {
        conversation.plan: complaints
        for conversation in conversations
        if (complaints := list(conversation.complaints()))
    }
    text = "\n\n".join(f"{plan}:\n" + "\n".join(what) for plan, what in failed.items())
    assert not failed, f"{len(failed)} of {len(conversations)} conversations:\n\n{text}"


def test_every_fault_is_tried_in_every_phase_of_every_mode_both_ways() -> None:
    plans = [hostile_network.plan(seed) for seed in range(len(combinations()))]
    tried = {
        (plan.variant, fault.phase, fault.direction, fault.kind)
        for plan in plans
        for fault in plan.faults
    }
    for variant, (mode, _) in VARIANTS.items():
        assert sum(plan.variant == variant and not plan.faults for plan in plans) == 8
        assert {(variant, CONNECT, UP, kind) for kind in CONNECT_KINDS} <= tried
        both_ways = {CLEAR, SECRET, STOP, AFTER, CLOSE}.intersection(PHASES[mode])
        assert {
            (variant, phase, direction, kind)
            for phase in both_ways
            for direction in (UP, DOWN)
            for kind in KINDS
        } <= tried
        one_way = set(PHASES[mode]) - both_ways
        assert {(variant, phase, kind) for phase in one_way for kind in KINDS} <= {
            (variant, phase, kind) for variant, phase, _, kind in tried
        }
        for phase in UPGRADE:
            injected = any(each[:2] == (variant, phase) and each[3] == INJECT for each in tried)
            assert injected == (phase in PHASES[mode])
    assert {plan.ending for plan in plans} == {"client", "server", "both", "eof"}
