"""A server under load and at its limits: the scenarios of ``load.py`` with fewer clients."""

from __future__ import annotations

import pytest

import load
from load_runner import MIB, Result, Runner
from trisock.testing import Authority


@pytest.fixture(scope="session")
def runner(authority: Authority) -> Runner:
    return Runner(authority)


def check(result: Result, served: int) -> None:
    assert result.outcome.served == served
    assert result.problems() == []


@pytest.mark.parametrize("tls", [False, True])
async def test_idle_connections_stay_open_and_are_served(tls: bool, runner: Runner) -> None:
    count = 30 if tls else 200
    result = await load.idle(runner, count, tls=tls)
    check(result, count)
    assert result.outcome.facts["idle"] == count
    assert result.counted("accepted") == count + 2


@pytest.mark.parametrize("tls", [False, True])
async def test_connections_at_a_constant_rate_are_all_served(tls: bool, runner: Runner) -> None:
    count = 30 if tls else 200
    result = await load.rate(runner, 4 * count, 0.25, tls=tls)
    check(result, count)
    assert result.counted("accepted") == count + 1
    assert result.counted("failed_handshakes") == result.counted("peer_errors") == 0


async def test_other_clients_are_served_during_slow_handshakes(runner: Runner) -> None:
    result = await load.slowloris(runner, 20, 10, handshake_timeout=None, every=0.01)
    check(result, 10)
    assert result.outcome.facts["dropped early"] == 0
    assert result.counted("failed_handshakes") == 20  # the clients disconnected


async def test_slow_handshakes_are_dropped(runner: Runner) -> None:
    result = await load.slowloris(runner, 20, 0, handshake_timeout=0.5, every=0.01)
    check(result, 0)
    assert result.outcome.facts["dropped"] == 20
    assert result.counted("failed_handshakes") == 20


async def test_the_server_recovers_when_descriptors_run_out(runner: Runner) -> None:
    result = await load.out_of_descriptors(runner, limit=50, clients=80)
    check(result, 80)
    assert result.outcome.facts["descriptors in use"] == 50
    assert result.outcome.facts["served then"] == 50 - result.before.descriptors
    # The server logs this failure at most once a minute, and already logged it in the warm-up.
    assert result.logged("accept failed") <= 1


async def test_clients_beyond_max_connections_wait(runner: Runner) -> None:
    result = await load.full(runner, 60, max_connections=5)
    check(result, 60)
    assert result.outcome.facts["handlers at most"] == 5


async def test_a_lingering_close_blocks_no_other_client(runner: Runner) -> None:
    result = await load.lingering(runner, others=3, max_connections=5)
    check(result, 3)
    assert result.outcome.facts["still closing"] == 5


async def test_a_broadcast_reaches_readers_and_drops_a_silent_client(runner: Runner) -> None:
    result = await load.broadcast(runner, 6, 8 * MIB, messages=1, timeout=1)
    check(result, 6)
    assert result.outcome.facts["delivered"] == [6]
    assert result.counted("aborted") == 1
    assert result.after.peak - result.before.resident < 4 * 8 * MIB  # no copy for each client


async def test_handlers_that_raise_are_counted_and_logged(runner: Runner) -> None:
    result = await load.raising(runner, 100)
    check(result, 100)
    assert result.counted("handler_errors") == result.logged("the handler of %s failed") == 80
    assert result.counted("peer_errors") == result.logged("closed the connection with %s") == 20
