"""Bare Trio: ``SocketStream``, ``SSLStream``, ``serve_tcp`` and ``serve_ssl_over_tcp``."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable

import trio

from .serving import BLOCK, HOST, READ_SIZE, Options, announce, parse_options

Stream = trio.SocketStream | trio.SSLStream[trio.SocketStream]


class LineReader:
    """A line reader like those in many Trio programs."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._buffer = bytearray()
        self._searched = 0  # no newline in the buffer before this position

    async def readline(self) -> bytes | bytearray:
        """Return the next line with its newline, or ``b""`` at EOF."""
        while True:
            end = self._buffer.find(b"\n", self._searched) + 1
            if end:
                line = self._buffer[:end]
                del self._buffer[:end]
                self._searched = 0
                return line
            self._searched = len(self._buffer)
            more = await self._stream.receive_some(READ_SIZE)
            if not more:
                return b""
            self._buffer += more


class ExactReader:
    """Reads an exact number of bytes. Many Trio programs contain a class like this one."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._buffer = bytearray()

    async def read_exactly(self, size: int) -> bytes | bytearray:
        """Return exactly ``size`` bytes, or ``b""`` at EOF."""
        while len(self._buffer) < size:
            more = await self._stream.receive_some(READ_SIZE)
            if not more:
                return b""
            self._buffer += more
        data = self._buffer[:size]
        del self._buffer[:size]
        return data


async def echo(stream: Stream) -> None:
    while chunk := await stream.receive_some(READ_SIZE):
        await stream.send_all(chunk)


async def receive(stream: Stream) -> None:
    while request := await stream.receive_some(READ_SIZE):
        await stream.send_all(request)
        wanted, received = int(request), 0
        while received < wanted:
            chunk = await stream.receive_some(READ_SIZE)
            if not chunk:
                break
            received += len(chunk)
        await stream.send_all(b"%d" % received)


async def send(stream: Stream) -> None:
    while request := await stream.receive_some(READ_SIZE):
        for _ in range(int(request) // len(BLOCK)):
            await stream.send_all(BLOCK)


async def line_echo(stream: Stream) -> None:
    reader = LineReader(stream)
    while line := await reader.readline():
        await stream.send_all(line)


async def lines(stream: Stream) -> None:
    reader = LineReader(stream)
    count = 0
    while await reader.readline():
        count += 1
    await stream.send_all(b"%d" % count)


async def relay(port: int, stream: Stream) -> None:
    async def copy(source: Stream, sink: Stream) -> None:
        while chunk := await source.receive_some(READ_SIZE):
            await sink.send_all(chunk)
        if isinstance(sink, trio.SocketStream):
            await sink.send_eof()

    async with await trio.open_tcp_stream(HOST, port) as upstream:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(copy, stream, upstream)
            nursery.start_soon(copy, upstream, stream)


async def frames(stream: Stream) -> None:
    reader = ExactReader(stream)
    count = 0
    while header := await reader.read_exactly(4):
        await reader.read_exactly(int.from_bytes(header, "big"))
        count += 1
    await stream.send_all(b"%d" % count)


async def udp_echo() -> None:
    with trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM) as sock:
        await sock.bind((HOST, 0))
        announce(sock.getsockname()[1])
        while True:
            data, address = await sock.recvfrom(READ_SIZE)
            await sock.sendto(data, address)


async def main(options: Options) -> None:
    if options.work == "udp-echo":
        await udp_echo()
        return
    handlers: dict[str, Callable[[Stream], Awaitable[None]]] = {
        "echo": echo,
        "line-echo": line_echo,
        "receive": receive,
        "send": send,
        "lines": lines,
        "batches": lines,
        "frames": frames,
        "relay": functools.partial(relay, options.upstream),
    }
    handler = handlers[options.work]
    context = options.server_context()
    async with trio.open_nursery() as nursery:
        if context is None:
            listeners = await nursery.start(
                functools.partial(trio.serve_tcp, handler, 0, host=HOST)
            )
            listening = listeners[0].socket
        else:
            listeners = await nursery.start(
                functools.partial(trio.serve_ssl_over_tcp, handler, 0, context, host=HOST)
            )
            listening = listeners[0].transport_listener.socket
        announce(listening.getsockname()[1])


if __name__ == "__main__":
    trio.run(main, parse_options())
