"""anyio, on Trio or on asyncio."""

from __future__ import annotations

import anyio
from anyio.abc import ByteStream, SocketAttribute
from anyio.streams.buffered import BufferedByteReceiveStream
from anyio.streams.tls import TLSListener

from .serving import BLOCK, HOST, READ_SIZE, Options, announce, parse_options


async def echo(stream: ByteStream) -> None:
    async with stream:
        async for chunk in stream:
            await stream.send(chunk)


async def receive(stream: ByteStream) -> None:
    async with stream:
        async for request in stream:
            await stream.send(request)
            wanted, received = int(request), 0
            while received < wanted:
                received += len(await stream.receive(READ_SIZE))
            await stream.send(b"%d" % received)


async def send(stream: ByteStream) -> None:
    async with stream:
        async for request in stream:
            for _ in range(int(request) // len(BLOCK)):
                await stream.send(BLOCK)


async def lines(stream: ByteStream) -> None:
    async with stream:
        buffered = BufferedByteReceiveStream(stream)
        count = 0
        try:
            while True:
                await buffered.receive_until(b"\n", READ_SIZE)
                count += 1
        except anyio.IncompleteRead:
            await stream.send(b"%d" % count)


async def frames(stream: ByteStream) -> None:
    async with stream:
        buffered = BufferedByteReceiveStream(stream)
        count = 0
        try:
            while True:
                header = await buffered.receive_exactly(4)
                await buffered.receive_exactly(int.from_bytes(header, "big"))
                count += 1
        except anyio.IncompleteRead:
            await stream.send(b"%d" % count)


async def main(options: Options) -> None:
    handlers = {
        "echo": echo,
        "receive": receive,
        "send": send,
        "lines": lines,
        "batches": lines,
        "frames": frames,
    }
    handler = handlers[options.work]
    listener = await anyio.create_tcp_listener(local_host=HOST)
    port = listener.extra(SocketAttribute.local_port)
    context = options.server_context()
    announce(port)
    if context is None:
        await listener.serve(handler)
    else:
        await TLSListener(listener, context).serve(handler)


if __name__ == "__main__":
    options = parse_options()
    anyio.run(main, options, backend=options.flavour)
