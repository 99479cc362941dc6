"""Conversations over a hostile network are complete or end in a documented error.

A test that fails prints the seeds of the failed conversations. To run a single seed, set the
environment variable ``HOSTILE_SEED``. ``--times`` is the number of rounds; each round tries all
combinations. The tests print the outcomes at the end (``-s`` or ``-rA`` shows them).
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import itertools
import logging
import os
import re
import ssl
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import trio

import hostile_plan
import trisock
from helpers.exceptions import leaves_of
from helpers.pairs import all_served
from hostile_network import HostileNetwork
from hostile_plan import DOWN, PHASES, UP, VARIANTS, Kind, Mode, Phase, Plan, combinations
from hostile_sides import HANG, HASTE, PATIENCE, Side
from trisock import ClientTLS, IncompleteReadError, ServerTLS, Socket
from trisock.testing import Authority


class Conversation:
    """A client, the network, and a server connection."""

    def __init__(self, env: Environment, plan: Plan) -> None:
        self.env = env
        self.plan = plan
        # With bind(tls=), the handshake runs before the handler creates its cancel scope. If a
        # fault holds up this handshake, only the handshake timeout can end it. The second server
        # has a short handshake timeout for such plans.
        self.server = env.servers[plan.mode == Mode.TLS and plan.may_hold_up_handshakes()]
        self.scopes: list[trio.CancelScope] = []
        self.client_side = Side(plan, UP, env.client_tls, self.patience)
        self.server_side = Side(plan, DOWN, env.server_tls, self.patience)
        self.deadline = float("inf")
        self.hung = False
        self.network = HostileNetwork(plan, self.server.port, self.expect, self.accepted)

    def expect(self, port: int) -> None:
        self.env.expected[port] = self

    async def accepted(self) -> None:
        """Wait until the server has accepted or dropped all connections made so far."""
        self.env.connections[self.server] += 1
        number = self.env.connections[self.server]
        while (stats := self.server.stats()).accepted + stats.dropped < number:
            await trio.lowlevel.checkpoint()

    def patience(self) -> trio.CancelScope:
        """Return a cancel scope. It has no deadline until a fault happens that can block a side."""
        self.scopes.append(trio.CancelScope(deadline=self.deadline))
        return self.scopes[-1]

    async def lose_patience(self) -> None:
        await self.network.trouble.wait()
        # The timeout of a handshake must expire before this deadline.
        self.deadline = trio.current_time() + PATIENCE + (2 * HASTE if self.plan.hasty else 0)
        for scope in self.scopes:
            scope.deadline = self.deadline

    async def run(self) -> None:
        with trio.move_on_after(HANG) as hang:
            await self._run()
        self.hung = hang.cancelled_caught

    async def _run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.lose_patience)
            nursery.start_soon(self.network.run)
            await self.client_side.run(self.client)
            # The server may never see a connection that is reset immediately.
            if self.network.reached and not self.reset_immediately:
                await self.server_side.ended.wait()
            await self.network.still.wait()
            nursery.cancel_scope.cancel()

    @property
    def reset_immediately(self) -> bool:
        faults = self.plan.faults
        return any((each.phase, each.kind) == (Phase.CONNECT, Kind.RESET) for each in faults)

    async def client(self) -> None:
        side = self.client_side
        tls: Any = None
        if self.plan.mode == Mode.TLS and not self.plan.hasty and side.rng.random() < 0.5:
            tls = side.tls
        async with await trisock.connect("127.0.0.1", self.network.port, tls=tls) as sock:
            await side.converse(sock)

    def complaints(self) -> Iterator[str]:
        """Yield a description of each broken promise."""
        plan, network = self.plan, self.network
        if self.hung:
            yield "the conversation hung"
        for side, way in ((self.client_side, network.up), (self.server_side, network.down)):
            yield from side.complaints
            if way.track.complaint:
                yield f"the {side.name} sent {way.track.complaint}"
            if side.how == "" and (side.name == "client" or network.reached):
                if not self.reset_immediately:
                    yield f"the {side.name} has not ended"
            elif not self.may_end(side):
                yield f"the {side.name} ended in a wrong way: {side.how}: {side.errors}"
            if side.saw_eof and not way.other.finished:
                yield f"the {side.name} mistook a broken connection for EOF"
            if side.saw_close_notify and not way.other.notified:
                yield f"the {side.name} mistook a truncated connection for close_notify"
        # On a slow machine, a handshake may time out before the fault.
        if plan.faults and not network.struck and not plan.may_hold_up_handshakes():
            sides = (self.client_side, self.server_side)
            yield f"the fault did not happen: {[(side.how, side.errors) for side in sides]}"
        injected = any(fault.kind == Kind.INJECT for fault in network.struck)
        if injected and "complete" in (self.client_side.how, self.server_side.how):
            yield "a side completed although plain text was injected after the command or response"
        if plan.has(Kind.REFUSE) and self.client_side.how != "ConnectionRefusedError":
            yield f"the connection was refused, but the client ended with {self.client_side.how}"

    def may_end(self, side: Side) -> bool:
        """Return whether the plan allows this outcome of a side."""
        plan = self.plan
        if side.how in ("complete", ""):
            return True
        if side.how == "deadline":
            return plan.has(Kind.STALL, Kind.CORRUPT, Kind.INJECT)
        if side.how in ("TLSError", "BrokenResourceError"):
            return bool(plan.faults) and (side.how != "TLSError" or plan.mode != Mode.PLAIN)
        if side.how in ("IncompleteReadError", "EndedEarly"):
            return bool(plan.faults) and not side.encrypted
        if side.how in ("WrongBytes", "LimitExceededError"):
            return plan.damages_clear_bytes() and not side.encrypted
        if side.how == "ConnectionRefusedError":
            return plan.has(Kind.REFUSE)
        return side.how == "ConnectionResetError" and self.reset_immediately


class Environment(logging.Handler):
    """The servers, and a log handler that notices connections that fail before ``serve`` runs."""

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
        self.failed_handshakes[conversation.server] += side.failed_handshakes
        lost = (trio.BrokenResourceError, IncompleteReadError)
        if failure is not None and all(isinstance(each, lost) for each in leaves_of(failure)):
            # A server does not count EOF between two messages as a lost connection.
            if not all(getattr(each, "at_boundary", False) for each in leaves_of(failure)):
                self.lost[conversation.server] += 1
            raise failure


async def run_conversations(env: Environment, plans: list[Plan]) -> list[Conversation]:
    """Run conversations concurrently, then check that the servers still work."""
    role = env.server_tls if plans[0].mode == Mode.TLS else None
    async with trio.open_nursery() as nursery:
        bind = functools.partial(trisock.bind, nursery, 0, env.serve, host="127.0.0.1", tls=role)
        env.servers = [await bind(handshake_timeout=timeout) for timeout in (2 * HANG, HASTE)]
        conversations = [Conversation(env, plan) for plan in plans]
        async with trio.open_nursery() as together:
            for conversation in conversations:
                together.start_soon(conversation.run)
        healthy = Conversation(env, dataclasses.replace(plans[0], faults=(), hasty=False))
        await healthy.run()
        assert (healthy.client_side.how, healthy.server_side.how) == ("complete", "complete")
        for server in env.servers:
            dropped = server.stats().dropped
            await all_served(server, env.connections[server] - dropped)
            server.stop()
            await server.wait_closed()
            assert server.stats() == trisock.ServerStats(
                accepted=env.connections[server] - dropped,
                dropped=dropped,
                failed_handshakes=env.failed_handshakes[server],
                peer_errors=env.lost[server],
            )
    return [*conversations, healthy]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize by mode, version and round, or run only the seed from the environment."""
    if "plans" not in metafunc.fixturenames:
        return
    size = len(combinations())
    seeds = range(size * metafunc.config.getoption("--times"))
    if seed := os.environ.get("HOSTILE_SEED"):
        seeds = range(int(seed), int(seed) + 1)
    tests: dict[str, list[Plan]] = {}
    for plan in map(hostile_plan.plan, seeds):
        tests.setdefault(f"{plan.variant} {plan.seed // size}", []).append(plan)
    metafunc.parametrize(
        "plans",
        [
            pytest.param(plans, id=name, marks=() if is_usual(plans[0]) else pytest.mark.rare)
            for name, plans in tests.items()
        ],
    )


def is_usual(plan: Plan) -> bool:
    """Return whether a normal run tries this plan: with TLS 1.2, only plans without STARTTLS."""
    return plan.version != "TLSv1.2" or plan.mode == Mode.TLS or "HOSTILE_SEED" in os.environ


@pytest.fixture(scope="module")
def outcomes() -> Iterator[Counter[tuple[str, str, str]]]:
    """Count how sides end, by variant and fault. Print the counts at the end."""
    counter: Counter[tuple[str, str, str]] = Counter()
    yield counter
    print(f"\n{sum(counter.values())} sides of conversations ended as follows:")
    rows = dict.fromkeys(key[:2] for key in sorted(counter))
    for variant, kind in rows:
        ends = {how: number for (*row, how), number in counter.items() if row == [variant, kind]}
        text = ", ".join(f"{how} {number}" for how, number in sorted(ends.items()))
        print(f"{variant:17} {kind:11} {text}")


@pytest.fixture
def env(
    authority: Authority,
    client_tls: ClientTLS,
    server_tls: ServerTLS,
    plans: list[Plan],
    caplog: pytest.LogCaptureFixture,
) -> Iterator[Environment]:
    tls: ClientTLS | ssl.SSLContext = client_tls
    if plans[0].version == "TLSv1.2":
        tls = ssl.create_default_context(cadata=authority.ca.decode())
        tls.maximum_version = ssl.TLSVersion.TLSv1_2
    env = Environment(tls, server_tls)
    logger = logging.getLogger("trisock.server")
    logger.addHandler(env)
    with caplog.at_level(logging.INFO, logger.name):
        yield env
    logger.removeHandler(env)


# A damaged server name makes the handshake fail, and CPython warns that it cannot decode the name.
@pytest.mark.filterwarnings(
    "ignore:Exception ignored in. b':pytest.PytestUnraisableExceptionWarning"
)
async def test_each_conversation_is_complete_or_ends_in_a_documented_error(
    env: Environment, plans: list[Plan], outcomes: Counter[tuple[str, str, str]]
) -> None:
    tasks = trio.lowlevel.current_statistics().tasks_living
    conversations = await run_conversations(env, plans)
    assert trio.lowlevel.current_statistics().tasks_living == tasks
    assert env.unexpected == []
    gc.collect()  # emit the warnings about unclosed sockets now
    failed = []
    for conversation in conversations:
        plan = conversation.plan
        for side in (conversation.client_side, conversation.server_side):
            outcomes[plan.variant, plan.kind, side.how or "not reached"] += 1
        if complaints := list(conversation.complaints()):
            failed.append("\n".join([f"{plan}:", *complaints]))
    text = "\n\n".join(failed)
    assert not failed, f"{len(failed)} of {len(conversations)} conversations failed:\n\n{text}"


def test_every_fault_is_tried_in_every_phase_and_direction() -> None:
    plans = [hostile_plan.plan(seed) for seed in range(len(combinations()))]
    for mode, version in VARIANTS:
        mine = [plan for plan in plans if (plan.mode, plan.version) == (mode, version)]
        assert sum(not plan.faults for plan in mine) == 8
        tried = {
            (fault.phase, fault.direction, fault.kind) for plan in mine for fault in plan.faults
        }
        assert {(Phase.CONNECT, UP, kind) for kind in Kind.AT_CONNECT} <= tried
        one_way = {*Phase.UPGRADE, *Phase.HANDSHAKE}.intersection(PHASES[mode])
        both_ways = set(PHASES[mode]) - one_way
        assert set(itertools.product(both_ways, (UP, DOWN), Kind.LATER)) <= tried
        tried_in_phase = {(phase, kind) for phase, _, kind in tried}
        assert set(itertools.product(one_way, Kind.LATER)) <= tried_in_phase
        for phase in Phase.UPGRADE:
            assert ((phase, Kind.INJECT) in tried_in_phase) == (phase in PHASES[mode])
    assert {plan.ending for plan in plans} == {"client", "server", "both", "eof"}
