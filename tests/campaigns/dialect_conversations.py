"""Conversations of the two dialects for the soak: with servers of each, and clients in a thread."""

from __future__ import annotations

import random
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import trio

import trisock
from conversation_site import LOCALHOST, Site, check, payload
from trisock import hammerspoon, pluto


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
    secured: list[object] = []

    async def secure() -> None:
        secured.append(await server.starttls(site.tls))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(secure)
        check(await client.starttls(site.trusting), True)
    check((secured, client.istls(), await client.starttls(site.trusting)), ([True], True, None))
    await server.send(data)
    check(await received(client, len(data)), data)
    check(await client.peek(), None)
    if rng.random() < 0.5:  # else they are collected
        await client.close()
        check((await server.recv(), server.isopen()), (None, False))
        await server.close()
        await listener.close()


async def received(s: pluto.async_socket, size: int) -> bytes:
    got = b""
    while len(got) < size:
        got += await s.recv() or b"the end"
    return got


async def pluto_outside_trio(site: Site, rng: random.Random) -> None:
    """In a thread, where its calls block: its background thread does them."""
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
            got += s.recv() or b"the end"
        s.unrecv("x")
        check((got, s.peek(), s.recv(), s.isopen()), (data, b"x", b"x", True))
        if rng.random() < 0.5:  # else it is collected
            s.close()
        check(pluto.socket.connect(LOCALHOST, unused), None)

    with socket.socket() as bound:  # and does not listen
        bound.bind((LOCALHOST, 0))
        unused = bound.getsockname()[1]
        await trio.to_thread.run_sync(script)


async def pluto_interrupted(site: Site, rng: random.Random) -> None:
    """Calls outside Trio that an exception ends at some line of trisock lose no byte.

    A trace function of the thread raises it, as a signal handler would in the main thread.
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
    """Make a call that an exception ends at a line of trisock's code, if it comes so far."""
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


async def a_server_of_pluto(site: Site, rng: random.Random) -> None:
    async def handler(s: pluto.async_socket) -> None:
        await s.send(await s.recv() or b"")

    sched = pluto.scheduler()
    listener = pluto.socket.bind(sched, 0, handler)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sched.run)
        async with await trisock.connect(LOCALHOST, listener.port) as sock:
            await sock.send(b"hello")
            check(b"".join([chunk async for chunk in sock]), b"hello")
        await listener.close()


async def hammerspoon_sockets(site: Site, rng: random.Random) -> None:
    """A server that echoes lines, a client that turns to TLS, and what is queued meanwhile."""
    said = [payload(rng, 1000).replace(b"\n", b"") + b"\n" for _ in range(5)]
    heard: list[object] = []
    done = trio.Event()

    def serve(data: bytes, tag: int) -> None:
        if data == b"STARTTLS\n":
            server.write("go ahead\n").startTLS(site.tls)
        else:
            server.write(data)
        server.read("\n")

    def hear(data: bytes, tag: int) -> None:
        heard.append((data, tag))
        if len(heard) == len(said) + 1:
            done.set()

    async with hammerspoon.open_sockets() as hs:
        client = hs.new(hear)
        if rng.random() < 0.5:
            path = str(site.directory / f"hs-{rng.randrange(10**9)}")
            server = hs.server(path, serve)
            client.connect(path)
        else:
            server = hs.server(0, serve)
            client.connect(LOCALHOST, server.info()["localPort"])
        while not server.connections():
            await trio.lowlevel.checkpoint()
        server.read("\n")
        client.write("STARTTLS\n").read("\n", 0)
        client.startTLS(site.trusting)
        for tag, line in enumerate(said, 1):
            client.write(line, tag).read(b"\n", tag)
        await done.wait()
        check(heard, [(b"go ahead\n", 0), *((line, tag) for tag, line in enumerate(said, 1))])
        check((client.connected(), client.info()["isSecure"]), (True, True))
        if rng.random() < 0.5:
            client.disconnect()
            while server.connections():
                await trio.lowlevel.checkpoint()
