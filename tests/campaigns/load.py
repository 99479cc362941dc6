"""Load a server up to its limits, with many fast, slow, silent and failing connections.

    python tests/campaigns/load.py [--quick] [SCENARIO ...]

The server has its own process (``load_server.py``). The clients run in this process and use only
Trio. Each scenario first runs as a warm-up, to settle the allocator. The second run is measured.
The table shows how many connections were offered and served. It also shows the server's resources
before the run, at their peak, and after the run. ``test_load.py`` runs the same scenarios in small
sizes and checks the results.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import resource
import socket
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import trio

sys.path.append(str(Path(__file__).parents[1]))  # a program needs this to import tests/helpers

from helpers.client_hellos import client_hello
from helpers.pairs import RESET
from load_runner import (
    MIB,
    NAME,
    POLL_INTERVAL,
    Outcome,
    Result,
    Runner,
    Server,
    WrongResponse,
    check_echo,
    many,
)
from load_server import payload
from trisock.pluto.blocking import run_trio  # raises a bare KeyboardInterrupt, not a group


async def idle(runner: Runner, count: int, *, tls: bool = False) -> Result:
    """Many connections that stay idle until all are open. Then each sends a request."""

    async def work(server: Server, outcome: Outcome) -> None:
        streams: list[trio.abc.Stream] = []

        async def open_one(number: int) -> None:
            streams.append(await server.connect(number))

        async def finish(number: int) -> None:
            async with streams[number] as stream:
                await check_echo(stream, number)

        try:
            await many(count, open_one)
            await server.until(lambda stats: stats["active"] == count)
            outcome.facts["idle"] = (await server.report()).stats["active"]
            await server.visit()
            await many(count, functools.partial(outcome.count, finish))
        finally:
            for stream in streams:
                await trio.aclose_forcefully(stream)

    name = f"{count:,} idle {'TLS ' if tls else ''}connections"
    return await runner.measure(name, work, **runner.tls(tls))


async def rate(runner: Runner, per_second: int, seconds: float, *, tls: bool = False) -> Result:
    """Open connections at a constant rate, even while earlier connections are still open."""

    async def offer(server: Server, outcome: Outcome, seconds: float) -> None:
        count = round(per_second * seconds)
        begin = trio.current_time()
        async with trio.open_nursery() as nursery:
            for number in range(count):
                await trio.sleep_until(begin + number / per_second)
                nursery.start_soon(outcome.count, server.visit, number)
            outcome.facts["offered each second"] = round(count / (trio.current_time() - begin))
        outcome.add_times()

    return await runner.measure(
        f"{per_second:,} {'TLS ' if tls else ''}connections a second, {seconds:g} s",
        functools.partial(offer, seconds=seconds),
        warm_up=functools.partial(offer, seconds=min(seconds, 10)),
        **runner.tls(tls),
    )


async def slowloris(
    runner: Runner, slow: int, others: int, *, handshake_timeout: float | None, every: float
) -> Result:
    """Slow clients send their handshake byte by byte, while other clients are served.

    The slow clients continue until the server drops them. If there is no handshake timeout, they
    stop when the other clients have been served.
    """

    async def work(server: Server, outcome: Outcome) -> None:
        dropped = 0

        async def dribble(stream: trio.SocketStream) -> None:
            with contextlib.suppress(trio.BrokenResourceError):
                for byte in hello:
                    await stream.send_all(bytes([byte]))
                    await trio.sleep(every)

        async def be_slow(number: int, *, task_status: trio.TaskStatus[None]) -> None:
            nonlocal dropped
            async with await server.dial(number) as stream, trio.open_nursery() as nursery:
                nursery.start_soon(dribble, stream)
                task_status.started()
                with contextlib.suppress(trio.BrokenResourceError):
                    async for _ in stream:  # read until EOF; an alert may come first
                        pass
                nursery.cancel_scope.cancel()
            dropped += 1

        hello = client_hello(NAME)
        accepted = (await server.report()).stats["accepted"]
        async with trio.open_nursery() as nursery:
            for number in range(slow):
                await nursery.start(be_slow, number)
            await server.until(lambda stats: stats["accepted"] == accepted + slow)
            await many(others, functools.partial(outcome.count, server.visit), at_once=10)
            outcome.facts["dropped early"] = dropped
            outcome.add_times()
            if handshake_timeout is None:
                nursery.cancel_scope.cancel()
        outcome.facts["dropped"] = dropped

    return await runner.measure(
        f"{slow} slow handshakes, {others} other clients",
        work,
        **runner.tls(True),
        handshake_timeout=handshake_timeout,
    )


async def out_of_descriptors(runner: Runner, limit: int, clients: int, look: float = 0) -> Result:
    """More clients than the server has descriptors.

    The clients stay connected until no descriptor is free.

    ``look``: seconds for which to measure the server's CPU while no descriptor is free.
    """

    async def work(server: Server, outcome: Outcome) -> None:
        leave = trio.Event()
        room = limit - (await server.report()).descriptors
        inside = 0

        async def stay(number: int) -> None:
            nonlocal inside
            async with await server.dial(number) as stream:
                await check_echo(stream, number)
                inside += 1
                await leave.wait()

        async with trio.open_nursery() as nursery:
            for number in range(clients):
                nursery.start_soon(outcome.count, stay, number)
            while (exhausted := await server.report()).descriptors < limit:
                await trio.sleep(POLL_INTERVAL)
            while inside < room:
                await trio.sleep(POLL_INTERVAL)
            await trio.sleep(look)
            report = await server.report()
            outcome.facts |= {"descriptors in use": report.descriptors, "served then": inside}
            if look:
                used = report.cpu - exhausted.cpu
                outcome.facts["CPU while exhausted"] = f"{used / look:.1%}"
            leave.set()

    return await runner.measure(
        f"{clients:,} clients, {limit:,} descriptors", work, descriptors=limit
    )


async def full(runner: Runner, clients: int, max_connections: int) -> Result:
    """More clients than ``max_connections``. The surplus waits, and every client is served."""

    async def work(server: Server, outcome: Outcome) -> None:
        await many(clients, functools.partial(outcome.count, server.visit), at_once=clients)
        outcome.facts["handlers at most"] = (await server.report()).most_handlers
        outcome.add_times()

    return await runner.measure(
        f"{clients:,} clients, max_connections {max_connections}",
        work,
        max_connections=max_connections,
    )


async def lingering(runner: Runner, others: int, max_connections: int) -> Result:
    """``max_connections`` clients send data that the server does not read, and never close.

    Other clients are still served.
    """

    async def work(server: Server, outcome: Outcome) -> None:
        async def linger(number: int, *, task_status: trio.TaskStatus[None]) -> None:
            async with await server.dial(number) as stream:
                await stream.send_all(b"bye\n" + bytes(200_000))
                assert await stream.receive_some() == b""
                task_status.started()
                await trio.sleep_forever()

        async with trio.open_nursery() as nursery:
            for number in range(max_connections):
                await nursery.start(linger, number)
            await many(others, functools.partial(outcome.count, server.visit), at_once=1)
            await server.until(lambda stats: stats["active"] <= max_connections)
            outcome.facts["still closing"] = (await server.report()).stats["active"]
            nursery.cancel_scope.cancel()
        outcome.add_times()

    return await runner.measure(
        f"{max_connections} lingering closes, {others} other clients",
        work,
        max_connections=max_connections,
    )


async def broadcast(
    runner: Runner, readers: int, size: int, messages: int, timeout: float
) -> Result:
    """Broadcasts to clients that read, and to one client that does not read."""

    async def work(server: Server, outcome: Outcome) -> None:
        message = payload(size)
        stats = (await server.report()).stats
        delivered: list[int] = []

        async def read(number: int) -> None:
            async with await server.dial(number) as stream:
                for _ in range(messages):
                    left = memoryview(message)
                    while left:
                        chunk = await stream.receive_some(len(left))
                        if not chunk:
                            raise trio.BrokenResourceError("disconnected during a broadcast")
                        if left[: len(chunk)] != chunk:
                            raise WrongResponse("not the broadcast")
                        left = left[len(chunk) :]

        async with await server.dial(), trio.open_nursery() as nursery:
            for number in range(readers):
                nursery.start_soon(outcome.count, read, number)
            await server.until(lambda now: now["active"] == readers + 1)
            for _ in range(messages):
                delivered.append(await server.broadcast(size, timeout))
            # The silent client is disconnected, although it has not closed its side.
            await server.until(lambda now: now["aborted"] > stats["aborted"] and not now["active"])
        outcome.facts["delivered"] = delivered if messages < 4 else sum(delivered)

    return await runner.measure(
        f"{messages} broadcasts of {size / MIB:g} MiB to {readers} clients and a silent one", work
    )


async def raising(runner: Runner, count: int) -> Result:
    """Handlers raise an error, a group, an error in a nursery, or an error caused by a reset."""
    kinds = ["error", "group", "nursery", "broken", "both"]

    async def work(server: Server, outcome: Outcome) -> None:
        async def provoke(number: int) -> None:
            kind = kinds[number % len(kinds)]
            async with await server.dial(number) as stream:
                await stream.send_all(b"raise %s\n" % kind.encode())
                response = await stream.receive_some()
                if bool(response) != (kind in ("broken", "both")):
                    raise WrongResponse(f"{response!r} from a handler that raises ({kind})")
                stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)

        await many(count, functools.partial(outcome.count, provoke))

    return await runner.measure(f"{count:,} handlers that raise", work)


# Each scenario, with its arguments for a full run and for a quick run.
SCENARIOS: dict[str, tuple[Callable[..., Awaitable[Result]], dict[str, Any], dict[str, Any]]] = {
    "idle": (idle, {"count": 10_000}, {"count": 300}),
    "tls-idle": (idle, {"count": 2000, "tls": True}, {"count": 100, "tls": True}),
    "rate": (rate, {"per_second": 1000, "seconds": 60}, {"per_second": 200, "seconds": 2}),
    "tls-rate": (
        rate,
        {"per_second": 100, "seconds": 60, "tls": True},
        {"per_second": 30, "seconds": 2, "tls": True},
    ),
    "slowloris": (
        slowloris,
        {"slow": 500, "others": 300, "handshake_timeout": 15, "every": 1},
        {"slow": 50, "others": 20, "handshake_timeout": 2, "every": 0.1},
    ),
    "descriptors": (
        out_of_descriptors,
        {"limit": 1024, "clients": 2000, "look": 5},
        {"limit": 64, "clients": 100, "look": 0.5},
    ),
    "full": (
        full,
        {"clients": 2000, "max_connections": 50},
        {"clients": 100, "max_connections": 10},
    ),
    "lingering": (
        lingering,
        {"others": 20, "max_connections": 50},
        {"others": 20, "max_connections": 10},
    ),
    "broadcast": (
        broadcast,
        {"readers": 200, "size": MIB, "messages": 20, "timeout": 10},
        {"readers": 10, "size": 8 * MIB, "messages": 2, "timeout": 3},
    ),
    "raising": (raising, {"count": 1000}, {"count": 100}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help=", ".join(SCENARIOS))
    parser.add_argument("--quick", action="store_true", help="small sizes")
    args = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    run_trio(functools.partial(show, args.scenarios or list(SCENARIOS), args.quick))


async def show(names: list[str], quick: bool) -> None:
    from trisock.testing import Authority  # only this function needs it

    problems = []
    runner = Runner(Authority())
    show_row(Result.HEAD)
    show_row(["---"] * len(Result.HEAD))
    for name in names:
        scenario, full_size, quick_size = SCENARIOS[name]
        result = await scenario(runner, **(quick_size if quick else full_size))
        show_row(result.cells())
        problems += [f"{name}: {problem}" for problem in result.problems()]
    if problems:
        sys.exit("\n".join(problems))


def show_row(cells: list[str]) -> None:
    print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
