"""Conversations in the dialects, for ``soak.py``.

In some of these conversations, peers vanish or callbacks are slow.
"""

from __future__ import annotations

import random
import socket
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import trio

import trisock
from conversation_site import LOCALHOST, Site, check, payload
from helpers.pairs import RESET
from trisock import ClientTLS, ServerTLS, hammerspoon, pluto

# Hammerspoon sockets drop a connection 2 seconds after its peer has left. The other 8 seconds allow
# for a busy machine.
_DROPPED_WITHIN = 2 + 8

# ---- pluto ----


async def pluto_in_trio(site: Site, rng: random.Random) -> None:
    data = payload(rng, 10_000)
    listener = pluto.socket.listen(0)
    assert listener is not None
    check(listener.hasconnection(), False)
    client = await pluto.socket.connect(LOCALHOST, listener.port)
    server = await listener.accept()
    assert client is not None
    assert server is not None
    await client.send(data)
    check(await received(server, len(data)), data)

    async def secure(s: pluto.async_socket, tls: ServerTLS | ClientTLS) -> None:
        check(await s.starttls(tls), True)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(secure, server, site.tls)
        nursery.start_soon(secure, client, site.trusting)
    check((client.istls(), await client.starttls(site.trusting)), (True, None))
    await server.send(data)
    check(await received(client, len(data)), data)
    check(await client.peek(), None)
    if rng.random() < 0.5:  # otherwise garbage collection closes them
        await client.close()
        check((await server.recv(), server.isopen()), (None, False))
        await server.close()
        await listener.close()


async def received(s: pluto.async_socket, size: int) -> bytes:
    got = b""
    while len(got) < size:
        got += await s.recv() or b"(EOF)"
    return got


async def pluto_outside_trio(site: Site, rng: random.Random) -> None:
    """In a thread without Trio, Pluto's calls block while a background thread does the work."""
    data = payload(rng, 10_000)

    def script() -> None:
        s = pluto.socket.connect(LOCALHOST, site.plain.port)
        assert s is not None
        s.send("starttls server\n")
        check(s.recv(), b"go ahead\n")
        check(s.starttls(site.trusting), True)
        s.send(b"echo %d\n" % len(data) + data)
        got = b""
        while len(got) < len(data):
            got += s.recv() or b"(EOF)"
        s.unrecv("x")
        check((got, s.peek(), s.recv(), s.isopen()), (data, b"x", b"x", True))
        if rng.random() < 0.5:  # otherwise garbage collection closes it
            s.close()
        check(pluto.socket.connect(LOCALHOST, unused), None)

    with socket.socket() as not_listening:
        not_listening.bind((LOCALHOST, 0))
        unused = not_listening.getsockname()[1]
        await trio.to_thread.run_sync(script)


async def pluto_interrupted(site: Site, rng: random.Random) -> None:
    """A ``recv`` outside Trio loses no byte, whichever line of trisock is interrupted.

    A trace function raises an exception at that line, as a signal handler might in the main thread.
    """
    data = payload(rng, 2000)

    def talk() -> None:
        s = pluto.socket.connect(LOCALHOST, site.plain.port)
        assert s is not None
        s.send(b"echo %d\n" % len(data) + data)
        got = b""
        while len(got) < len(data):
            got += interrupted_at(rng.randrange(1, 60), s.recv) or b""
        check(got, data)
        s.close()

    await trio.to_thread.run_sync(talk)


class InterruptedCall(BaseException):
    pass


def interrupted_at(line: int, call: Callable[[], bytes | None]) -> bytes | None:
    """Call a function, and interrupt the call at the ``line``-th line of trisock that runs.

    Returns ``None`` if the call was interrupted.
    """
    count = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.startswith(str(Path(trisock.__file__).parent)):
            return None
        if event == "line":
            count += 1
            if count == line:
                raise InterruptedCall
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        return call()
    except InterruptedCall:
        return None
    finally:
        sys.settrace(before)


async def a_pluto_server(site: Site, rng: random.Random) -> None:
    async def handler(s: pluto.async_socket) -> None:
        await s.send(await s.recv() or b"")

    sched = pluto.scheduler()
    listener = pluto.socket.bind(sched, 0, handler)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sched.run)
        async with await trisock.connect(LOCALHOST, listener.port) as sock:
            await sock.send(b"hello")
            check(b"".join([chunk async for chunk in sock]), b"hello")
        listener.close()


async def pluto_datagrams(site: Site, rng: random.Random) -> None:
    """A UDP server inside Trio, and a client in a thread that waits for each answer."""
    messages = [payload(rng, 10_000) for _ in range(rng.randrange(1, 20))]
    server = pluto.async_socket.udpserver(f"{LOCALHOST}:0")
    assert server is not None

    async def echo() -> None:
        while data := await server.recv():
            check(await server.send(data), True)

    def script() -> None:
        s = pluto.socket.connect(LOCALHOST, server.port, "udp")
        assert s is not None
        for message in messages:
            check((s.send(message), s.recv(), s.isopen()), (True, message, True))
        if rng.random() < 0.5:  # otherwise garbage collection closes it
            s.close()

    sched = pluto.scheduler()
    serving = sched.add(echo)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sched.run)
        await trio.to_thread.run_sync(script)
        if rng.random() < 0.5:
            await server.close()
        else:
            serving.close()


# ---- hammerspoon ----


def _server(hs: hammerspoon.Sockets, site: Site, rng: random.Random, fn: Any) -> hammerspoon.Socket:
    if rng.random() < 0.5:
        return hs.server(str(site.directory / f"hs-{rng.randrange(10**9)}"), fn)
    return hs.server(0, fn)


def _address(server: hammerspoon.Socket) -> tuple[str, int] | tuple[str]:
    info = server.info()
    path = info["unixSocketPath"]
    return (path,) if path else (LOCALHOST, info["localPort"])


def _client(server: hammerspoon.Socket) -> socket.socket:
    address = _address(server)
    if len(address) == 2:
        return socket.create_connection(address)
    raw = socket.socket(socket.AF_UNIX)
    raw.connect(*address)
    return raw


async def _connected(server: hammerspoon.Socket, count: int = 1) -> None:
    while server.connections() < count:
        await trio.lowlevel.checkpoint()


async def _disconnected(server: hammerspoon.Socket) -> None:
    with trio.fail_after(_DROPPED_WITHIN):
        while server.connections():
            await trio.sleep(0.001)


async def hammerspoon_sockets(site: Site, rng: random.Random) -> None:
    """A client queues lines while it starts TLS, and the server echoes them."""
    sent = [payload(rng, 1000).replace(b"\n", b"") + b"\n" for _ in range(5)]
    got: list[object] = []
    done = trio.Event()

    def serve(data: bytes, tag: int) -> None:
        if data == b"STARTTLS\n":
            server.write("go ahead\n").startTLS(site.tls)
        else:
            server.write(data)
        server.read("\n")

    def receive(data: bytes, tag: int) -> None:
        got.append((data, tag))
        if len(got) == len(sent) + 1:
            done.set()

    async with hammerspoon.open_sockets() as hs:
        server = _server(hs, site, rng, serve)
        client = hs.new(receive)
        client.connect(*_address(server))
        await _connected(server)
        server.read("\n")
        client.write("STARTTLS\n").read("\n", 0)
        client.startTLS(site.trusting)
        for tag, line in enumerate(sent, 1):
            client.write(line, tag).read(b"\n", tag)
        await done.wait()
        check(got, [(b"go ahead\n", 0), *((line, tag) for tag, line in enumerate(sent, 1))])
        check((client.connected(), client.info()["isSecure"]), (True, True))
        if rng.random() < 0.5:
            client.disconnect()
            await _disconnected(server)


async def hammerspoon_peers_vanish(site: Site, rng: random.Random) -> None:
    """Clients send lines, and close with a FIN or RST. Meanwhile the server may write and read.

    A line that was sent before a FIN is not lost if a read is queued at most two seconds after the
    FIN. In the end, the server has dropped all connections.
    """
    got: Counter[bytes] = Counter()
    sent: Counter[bytes] = Counter()

    async with hammerspoon.open_sockets() as hs:
        server = _server(hs, site, rng, lambda data, tag: got.update([data]))
        clients = [_client(server) for _ in range(rng.randint(1, 5))]
        await _connected(server, len(clients))
        reads = rng.choice([0, 3])
        reads_first = rng.random() < 0.5
        for _ in range(reads if reads_first else 0):
            server.read("\n")
        for number, client in enumerate(clients):
            lines = [b"%d.%d\n" % (number, each) for each in range(rng.randint(0, 3))]
            client.sendall(b"".join(lines))
            if rng.random() < 0.3 and client.family != socket.AF_UNIX:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            else:
                sent.update(lines)
            client.close()
        for _ in range(rng.randint(0, 3)):
            server.write("to all\n")
            await trio.sleep(rng.choice([0, 0.002]))
        for _ in range(0 if reads_first else reads):
            server.read("\n")
        await _disconnected(server)
        check(sent - got if reads else Counter(), Counter())


async def hammerspoon_floods(site: Site, rng: random.Random) -> None:
    """A slow callback receives every line of a flood, in order. Most lines are empty."""
    number = rng.randint(100, 2000)
    got: list[bytes] = []

    async def slow(data: bytes, tag: int) -> None:
        got.append(data)
        if rng.random() < 0.05:
            await trio.sleep(0.001)
        server.read("\n")

    async with hammerspoon.open_sockets() as hs:
        server = _server(hs, site, rng, slow)
        client = _client(server)
        await _connected(server)
        for _ in range(rng.randint(1, 50)):
            server.read("\n")
        lines = [b"\n" if rng.random() < 0.9 else b"x" * 5000 + b"\n" for _ in range(number)]
        await trio.to_thread.run_sync(client.sendall, b"".join(lines))
        client.close()
        while server.connections():
            await trio.sleep(0.001)
        check((len(got), got == lines), (number, True))


async def hammerspoon_datagrams(site: Site, rng: random.Random) -> None:
    """A server object echoes numbered datagrams. Both sides mix ``receive`` and ``receiveOne``."""
    number = rng.randint(10, 300)
    sent = [b"%d " % each + payload(rng, 1000) for each in range(number)]
    got: list[bytes] = []

    def serve(data: bytes, sockaddr: bytes) -> None:
        sender = hs.udp.parseAddress(sockaddr)
        assert sender is not None
        server.send(data, sender["host"], sender["port"])
        if rng.random() < 0.5:
            server.receiveOne()

    async def receive(data: bytes, sockaddr: bytes) -> None:
        got.append(data)
        if rng.random() < 0.3:
            client.pause()
            await trio.lowlevel.checkpoint()
            check(got[-1], data)  # no callback while it is paused
        rng.choice([client.receive, client.receiveOne])()

    async with hammerspoon.open_sockets() as hs:
        server = hs.udp.server(0, serve)
        client = hs.udp.new(receive)
        address = (rng.choice([LOCALHOST, "::1", "localhost"]), server.info()["localPort"])
        is_connected = rng.random() < 0.5
        if is_connected:
            client.connect(*address)
        for count, data in enumerate(sent, 1):
            client.send(data) if is_connected else client.send(data, *address)
            rng.choice([server.receive, server.receiveOne])()
            client.receive()
            while len(got) < count - 10:  # at most 10 datagrams in flight, so the kernel drops none
                server.receive()
                await trio.sleep(0)
        while len(got) < number:
            server.receive()
            await trio.sleep(0)
        check(got, sent)
        if rng.random() < 0.5:
            client.close()
            check(client.closed(), True)
