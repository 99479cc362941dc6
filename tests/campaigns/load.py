"""Load and exhaustion: many connections, fast, slow, silent and failing ones, and no room for more.

    python tests/campaigns/load.py [--quick] [SCENARIO ...]

The server is a process of its own (``load_server.py``). The clients are in this process, and are
bare Trio. Each scenario is done once as a warm-up, which leaves the allocator where it will be, and
then measured: what was offered and what became of it, and what the server holds before,
at most, and after. ``test_load.py`` asserts on the same scenarios, smaller.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import resource
import socket
import ssl
import struct
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import trio

sys.path.append(str(Path(__file__).parents[1]))  # for helpers, when this is run as a program

from load_ground import (
    HEAD,
    LOOK,
    MIB,
    NAME,
    Ground,
    Outcome,
    Report,
    Result,
    Server,
    Wrong,
    ask,
    many,
)
from load_server import payload
from trisock.pluto.blocking import run_trio  # a Ctrl-C comes out as such


async def idle(ground: Ground, count: int, *, tls: bool = False) -> Result:
    """Many connections that do nothing, until each asks something after all."""

    async def work(server: Server, outcome: Outcome) -> None:
        streams: list[trio.abc.Stream] = []

        async def open_one(number: int) -> None:
            streams.append(await server.connect(number))

        async def ask_and_close(number: int) -> None:
            async with streams[number] as stream:
                await ask(stream, number)

        try:
            await many(count, open_one)
            await server.until(lambda stats: stats["active"] == count)
            outcome.facts["idle at once"] = (await server.report()).stats["active"]
            await server.visit()
            await many(count, functools.partial(outcome.count, ask_and_close))
        finally:
            for stream in streams:
                await trio.aclose_forcefully(stream)

    name = f"{count:,} idle {'TLS ' if tls else ''}connections"
    return await ground.measure(name, work, **ground.tls(tls))


async def rate(ground: Ground, per_second: int, seconds: float, *, tls: bool = False) -> Result:
    """So many new connections each second, whether the last ones are done or not."""

    async def offer(server: Server, outcome: Outcome, seconds: float) -> None:
        count = round(per_second * seconds)
        begin = trio.current_time()
        async with trio.open_nursery() as nursery:
            for number in range(count):
                await trio.sleep_until(begin + number / per_second)
                nursery.start_soon(outcome.count, server.visit, number)
            outcome.facts["offered each second"] = round(count / (trio.current_time() - begin))
        outcome.tell_times()

    return await ground.measure(
        f"{per_second:,} {'TLS ' if tls else ''}connections a second, {seconds:g} s",
        functools.partial(offer, seconds=seconds),
        warm_up=functools.partial(offer, seconds=min(seconds, 10)),
        **ground.tls(tls),
    )


async def slowloris(
    ground: Ground, slow: int, others: int, *, handshake_timeout: float | None, every: float
) -> Result:
    """Clients that send a byte of their handshake now and then, while others are served.

    They go on until they are dropped; where there is no timeout, until the others are served.
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
                    async for _ in stream:  # an alert
                        pass
                nursery.cancel_scope.cancel()
            dropped += 1

        hello = client_hello()
        accepted = (await server.report()).stats["accepted"]
        async with trio.open_nursery() as nursery:
            for number in range(slow):
                await nursery.start(be_slow, number)
            await server.until(lambda stats: stats["accepted"] == accepted + slow)
            await many(others, functools.partial(outcome.count, server.visit), at_once=10)
            outcome.facts["dropped meanwhile"] = dropped
            outcome.tell_times()
            if handshake_timeout is None:
                nursery.cancel_scope.cancel()
        outcome.facts["dropped"] = dropped

    return await ground.measure(
        f"{slow} slow handshakes, {others} others",
        work,
        **ground.tls(True),
        handshake_timeout=handshake_timeout,
    )


def client_hello() -> bytes:
    outgoing = ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        ssl.create_default_context().wrap_bio(
            ssl.MemoryBIO(), outgoing, server_hostname=NAME
        ).do_handshake()
    return outgoing.read()


async def out_of_descriptors(ground: Ground, limit: int, clients: int, look: float = 0) -> Result:
    """More clients than the server has descriptors; they stay until no more can come in."""

    async def work(server: Server, outcome: Outcome) -> None:
        leave = trio.Event()
        room = limit - (await server.report()).descriptors
        inside = 0

        async def stay(number: int) -> None:
            nonlocal inside
            async with await server.dial(number) as stream:
                await ask(stream, number)
                inside += 1
                await leave.wait()

        async with trio.open_nursery() as nursery:
            for number in range(clients):
                nursery.start_soon(outcome.count, stay, number)
            out_of_them = await at_its_limit(server, limit)
            while inside < room:
                await trio.sleep(LOOK)
            await trio.sleep(look)
            report = await server.report()
            outcome.facts["descriptors then"] = report.descriptors
            outcome.facts["inside"] = inside
            if look:
                used = report.cpu - out_of_them.cpu
                outcome.facts["CPU while there is none"] = f"{used / look:.1%}"
            leave.set()

    return await ground.measure(
        f"{clients:,} clients, {limit:,} descriptors", work, descriptors=limit
    )


async def at_its_limit(server: Server, limit: int) -> Report:
    """Wait until a server has used all of its descriptors."""
    while (report := await server.report()).descriptors < limit:
        await trio.sleep(LOOK)
    return report


async def full(ground: Ground, clients: int, max_connections: int) -> Result:
    """More clients than ``max_connections``; the others wait, and none is lost."""

    async def work(server: Server, outcome: Outcome) -> None:
        await many(clients, functools.partial(outcome.count, server.visit), at_once=clients)
        outcome.facts["at most at once"] = (await server.report()).most_at_once
        outcome.tell_times()

    return await ground.measure(
        f"{clients:,} clients, max_connections {max_connections}",
        work,
        max_connections=max_connections,
    )


async def lingering(ground: Ground, others: int, max_connections: int) -> Result:
    """Clients that send too much and never close, one for each slot, while others are served."""

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
        outcome.tell_times()

    return await ground.measure(
        f"{max_connections} lingering closes, {others} others",
        work,
        max_connections=max_connections,
    )


async def broadcast(
    ground: Ground, readers: int, size: int, messages: int, timeout: float
) -> Result:
    """Broadcasts to clients that read, and one that never does."""

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
                            raise trio.BrokenResourceError("the end, in a broadcast")
                        if left[: len(chunk)] != chunk:
                            raise Wrong("not what was broadcast")
                        left = left[len(chunk) :]

        async with await server.dial(), trio.open_nursery() as nursery:
            for number in range(readers):
                nursery.start_soon(outcome.count, read, number)
            await server.until(lambda now: now["active"] == readers + 1)
            for _ in range(messages):
                delivered.append(await server.broadcast(size, timeout))
            await server.until(lambda now: now["aborted"] > stats["aborted"])
        outcome.facts["delivered"] = delivered if messages < 4 else sum(delivered)

    return await ground.measure(
        f"{messages} broadcasts of {size / MIB:g} MiB to {readers} and a silent one", work
    )


async def raising(ground: Ground, count: int) -> Result:
    """Handlers that raise: an error, a group, out of a nursery, because the connection broke."""
    kinds = ["error", "group", "nursery", "broken", "both"]

    async def work(server: Server, outcome: Outcome) -> None:
        async def provoke(number: int) -> None:
            kind = kinds[number % len(kinds)]
            async with await server.dial(number) as stream:
                await stream.send_all(b"raise %s\n" % kind.encode())
                answer = await stream.receive_some()
                if bool(answer) != (kind in ("broken", "both")):
                    raise Wrong(f"{answer!r} from a handler that raises ({kind})")
                reset = struct.pack("ii", 1, 0)
                stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)

        await many(count, functools.partial(outcome.count, provoke))

    return await ground.measure(f"{count:,} handlers that raise", work)


SCENARIOS: dict[str, Callable[[Ground, bool], Awaitable[Result]]] = {
    "idle": lambda ground, quick: idle(ground, 300 if quick else 10_000),
    "tls-idle": lambda ground, quick: idle(ground, 100 if quick else 2000, tls=True),
    "rate": lambda ground, quick: rate(ground, 200 if quick else 1000, 2 if quick else 60),
    "tls-rate": lambda ground, quick: rate(
        ground, 30 if quick else 100, 2 if quick else 60, tls=True
    ),
    "slowloris": lambda ground, quick: slowloris(
        ground,
        50 if quick else 500,
        20 if quick else 300,
        handshake_timeout=2 if quick else 15,
        every=0.1 if quick else 1,
    ),
    "descriptors": lambda ground, quick: out_of_descriptors(
        ground, 64 if quick else 1024, 100 if quick else 2000, look=0.5 if quick else 5
    ),
    "full": lambda ground, quick: full(ground, 100 if quick else 2000, 10 if quick else 50),
    "lingering": lambda ground, quick: lingering(ground, 20, 10 if quick else 50),
    "broadcast": lambda ground, quick: broadcast(
        ground,
        10 if quick else 200,
        8 * MIB if quick else MIB,
        2 if quick else 20,
        3 if quick else 10,
    ),
    "raising": lambda ground, quick: raising(ground, 100 if quick else 1000),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help=", ".join(SCENARIOS))
    parser.add_argument("--quick", action="store_true", help="small sizes, for a look")
    args = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    run_trio(functools.partial(show, args.scenarios or list(SCENARIOS), args.quick))


async def show(names: list[str], quick: bool) -> None:
    from helpers.authority import Authority  # which the server's process has no use for

    wrongs = []
    ground = Ground(Authority())
    print("| " + " | ".join(HEAD) + " |")
    print("| " + " | ".join("---" for _ in HEAD) + " |", flush=True)
    for name in names:
        result = await SCENARIOS[name](ground, quick)
        print("| " + " | ".join(result.cells()) + " |", flush=True)
        wrongs += [f"{name}: {wrong}" for wrong in result.wrongs()]
    if wrongs:
        sys.exit("\n".join(wrongs))


if __name__ == "__main__":
    main()
