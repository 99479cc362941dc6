"""A server under load and at its limits: ``load.py`` in small sizes."""

from __future__ import annotations

import pytest

import load
from helpers.authority import Authority
from load_ground import MIB, Ground, Result


@pytest.fixture(scope="session")
def ground(authority: Authority) -> Ground:
    return Ground(authority)


def check(result: Result, served: int) -> None:
    assert result.outcome.served == served
    assert result.wrongs() == []


@pytest.mark.parametrize("tls", [False, True])
async def test_idle_connections(tls: bool, ground: Ground) -> None:
    count = 30 if tls else 200
    result = await load.idle(ground, count, tls=tls)
    check(result, count)
    assert result.outcome.facts["idle at once"] == count
    assert result.counted("accepted") == count + 2


@pytest.mark.parametrize("tls", [False, True])
async def test_connections_at_a_rate(tls: bool, ground: Ground) -> None:
    count = 30 if tls else 200
    result = await load.rate(ground, 4 * count, 0.25, tls=tls)
    check(result, count)
    assert result.counted("accepted") == count + 1
    assert result.counted("failed_handshakes") == result.counted("peer_errors") == 0


async def test_others_are_served_during_slow_handshakes(ground: Ground) -> None:
    result = await load.slowloris(ground, 20, 10, handshake_timeout=None, every=0.01)
    check(result, 10)
    assert result.outcome.facts["dropped meanwhile"] == 0
    assert result.counted("failed_handshakes") == 20  # the clients left


async def test_slow_handshakes_are_dropped(ground: Ground) -> None:
    result = await load.slowloris(ground, 20, 0, handshake_timeout=0.5, every=0.01)
    check(result, 0)
    assert result.outcome.facts["dropped"] == 20
    assert result.counted("failed_handshakes") == 20


async def test_the_server_recovers_when_descriptors_run_out(ground: Ground) -> None:
    result = await load.out_of_descriptors(ground, limit=50, clients=80)
    check(result, 80)
    assert result.outcome.facts["descriptors then"] == 50
    assert result.outcome.facts["inside"] == 50 - result.before.descriptors
    # The warm-up logged it, and there is at most one entry a minute.
    assert result.logged("accept failed") <= 1


async def test_clients_beyond_max_connections_wait(ground: Ground) -> None:
    result = await load.full(ground, 60, max_connections=5)
    check(result, 60)
    assert result.outcome.facts["at most at once"] == 5


async def test_lingering_closes_block_no_other_client(ground: Ground) -> None:
    result = await load.lingering(ground, others=3, max_connections=5)
    check(result, 3)
    assert result.outcome.facts["still closing"] == 5


async def test_a_broadcast_reaches_others_past_a_silent_client(ground: Ground) -> None:
    result = await load.broadcast(ground, 6, 8 * MIB, messages=1, timeout=1.5)
    check(result, 6)
    assert result.outcome.facts["delivered"] == [6]
    assert result.counted("aborted") == 1
    assert result.after.peak - result.before.resident < 4 * 8 * MIB  # no copy for each


async def test_handlers_that_raise(ground: Ground) -> None:
    result = await load.raising(ground, 100)
    check(result, 100)
    assert result.counted("handler_errors") == result.logged("the handler of %s failed") == 80
    assert result.counted("peer_errors") == result.logged("closed the connection with %s") == 20
