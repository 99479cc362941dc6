"""asyncio's streams, on its own event loop or on uvloop."""

from __future__ import annotations

import asyncio
from asyncio import StreamReader, StreamWriter

from .serving import BLOCK, HOST, READ_SIZE, Options, announce, parse_options


async def echo(reader: StreamReader, writer: StreamWriter) -> None:
    while chunk := await reader.read(READ_SIZE):
        writer.write(chunk)
        await writer.drain()
    writer.close()


async def receive(reader: StreamReader, writer: StreamWriter) -> None:
    while request := await reader.read(READ_SIZE):
        writer.write(request)
        wanted, received = int(request), 0
        while received < wanted:
            chunk = await reader.read(READ_SIZE)
            if not chunk:
                break
            received += len(chunk)
        writer.write(b"%d" % received)
        await writer.drain()
    writer.close()


async def send(reader: StreamReader, writer: StreamWriter) -> None:
    while request := await reader.read(READ_SIZE):
        for _ in range(int(request) // len(BLOCK)):
            writer.write(BLOCK)
            await writer.drain()
    writer.close()


async def lines(reader: StreamReader, writer: StreamWriter) -> None:
    count = 0
    async for _ in reader:
        count += 1
    writer.write(b"%d" % count)
    await writer.drain()
    writer.close()


async def frames(reader: StreamReader, writer: StreamWriter) -> None:
    count = 0
    try:
        while True:
            header = await reader.readexactly(4)
            await reader.readexactly(int.from_bytes(header, "big"))
            count += 1
    except asyncio.IncompleteReadError:
        writer.write(b"%d" % count)
    await writer.drain()
    writer.close()


class UDPEcho(asyncio.DatagramProtocol):
    """Echoes each datagram."""

    def connection_made(self, transport: asyncio.DatagramTransport) -> None:  # type: ignore[override]
        """Keep the transport."""
        self._transport = transport

    def datagram_received(self, data: bytes, address: tuple[str, int]) -> None:
        """Echo a datagram."""
        self._transport.sendto(data, address)


async def main(options: Options) -> None:
    if options.work == "udp-echo":
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_datagram_endpoint(UDPEcho, local_addr=(HOST, 0))
        announce(transport.get_extra_info("sockname")[1])
        await loop.create_future()  # until the driver ends this process
    handlers = {
        "echo": echo,
        "receive": receive,
        "send": send,
        "lines": lines,
        "batches": lines,
        "frames": frames,
    }
    handler = handlers[options.work]
    server = await asyncio.start_server(handler, HOST, 0, ssl=options.server_context())
    announce(server.sockets[0].getsockname()[1])
    await server.serve_forever()


if __name__ == "__main__":
    options = parse_options()
    if options.flavour == "uvloop":
        import uvloop

        uvloop.run(main(options))
    else:
        asyncio.run(main(options))
