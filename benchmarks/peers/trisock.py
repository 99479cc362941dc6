"""trisock: ``bind`` and the methods of ``Socket``."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable

import trio

import trisock

from .serving import BLOCK, HOST, Options, announce, parse_options


async def echo(sock: trisock.Socket) -> None:
    while chunk := await sock.recv():
        await sock.send(chunk)


async def line_echo(sock: trisock.Socket) -> None:
    async for line in sock.lines(keep_ends=True):
        await sock.send(line)


async def idle_lines(sock: trisock.Socket) -> None:
    async for line in sock.lines(keep_ends=True, idle=True):
        await sock.send(line)


async def idle_block(sock: trisock.Socket) -> None:
    while True:
        try:
            with sock.idle(timeout=300):
                line = await sock.recv_line()
        except trisock.IncompleteReadError:
            break
        await sock.send(line, b"\n")


async def receive(sock: trisock.Socket) -> None:
    while request := await sock.recv():
        await sock.send(request)
        wanted, received = int(request), 0
        while received < wanted:
            chunk = await sock.recv()
            if not chunk:
                break
            received += len(chunk)
        await sock.send(b"%d" % received)


async def send(sock: trisock.Socket) -> None:
    while request := await sock.recv():
        for _ in range(int(request) // len(BLOCK)):
            await sock.send(BLOCK)


async def lines(sock: trisock.Socket) -> None:
    count = 0
    async for _ in sock.lines():
        count += 1
    await sock.send(b"%d" % count)


async def relay(port: int, sock: trisock.Socket) -> None:
    await trisock.relay(sock, await trisock.connect(HOST, port))


async def batches(sock: trisock.Socket) -> None:
    count = 0
    async for some in sock.lines().batches():
        for _ in some:
            count += 1
    await sock.send(b"%d" % count)


async def frames(sock: trisock.Socket) -> None:
    count = 0
    async for _ in sock.frames():
        count += 1
    await sock.send(b"%d" % count)


async def udp_echo() -> None:
    async with await trisock.open_udp(host=HOST) as udp:
        announce(udp.getlocal().port)
        async for datagram in udp:
            await udp.send(datagram.data, datagram.address)


async def udp_echo_on_all_addresses() -> None:
    async with await trisock.open_udp() as udp:
        announce(udp.getlocal().port)
        async for datagram in udp:
            await udp.send(datagram.data, datagram.address, source=datagram.destination)


async def main(options: Options) -> None:
    if options.work == "udp-echo":
        await (udp_echo_on_all_addresses() if options.flavour else udp_echo())
        return
    handlers: dict[str, Callable[[trisock.Socket], Awaitable[None]]] = {
        "echo": echo,
        "line-echo": line_echo,
        "line-echo idle-lines": idle_lines,
        "line-echo idle-block": idle_block,
        "receive": receive,
        "send": send,
        "lines": lines,
        "batches": batches,
        "frames": frames,
        "relay": functools.partial(relay, options.upstream),
    }
    handler = handlers[f"{options.work} {options.flavour}".strip()]
    tls = None
    if options.tls is not None:
        tls = [trisock.Certificate.from_files(options.tls / "chain.pem", options.tls / "key.pem")]
    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, handler, host=HOST, tls=tls)
        announce(server.port)


if __name__ == "__main__":
    trio.run(main, parse_options())
