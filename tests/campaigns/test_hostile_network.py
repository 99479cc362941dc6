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
import re
import ssl
from collections import Counter
from collections.abc import Iterator

import pytest
import trio

import hostile_plan
import trisock
from helpers.authority import Authority
from helpers.pairs import all_served
from hostile_network import HostileNetwork
from hostile_plan import (
    AFTER,
    CLEAR,
    CLOSE,
    CONNECT,
    CONNECT_KINDS,
    CORRUPT,
    DOWN,
    INJECT,
    KINDS,
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
    Plan,
    combinations,
)
from hostile_sides import HANG, HASTE, PATIENCE, Side, leaves_of
from trisock import (
    ClientTLS,
    IncompleteReadError,
    ServerTLS,
    Socket,
)

# How many conversations there are at once.
AT_ONCE = 30

# Modes and versions, as the tests' names have them.
VARIANTS = {
    f"{mode} {version}".strip(): (mode, version)
    for mode, versions in VERSIONS.items()
    for version in versions
}


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
        if failure is not None and all(isinstance(each, lost) for each in leaves_of(failure)):
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
    for plan in map(hostile_plan.plan, seeds):
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


def test_every_fault_is_tried_in_every_phase_both_ways() -> None:
    plans = [hostile_plan.plan(seed) for seed in range(len(combinations()))]
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
