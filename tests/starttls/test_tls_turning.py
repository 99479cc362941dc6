"""From the call of starttls or stoptls on, nobody else reads: not even what was split already."""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import trio
import trio.testing

import trisock
from helpers.authority import Authority
from helpers.raw_tls import RawTLS
from trisock import ServerTLS, Socket, TLSError
from trisock._net.lines import Lines

# Every way to read. Each is called with a socket and an iterator that has given one line of three.
READS: dict[str, Callable[[Socket, Lines], Awaitable[object]]] = {
    "lines": lambda sock, lines: anext(lines),
    "other lines": lambda sock, lines: anext(sock.lines()),
    "recv": lambda sock, lines: sock.recv(),
    "receive_some": lambda sock, lines: sock.receive_some(),
    "chunks": lambda sock, lines: anext(sock),
    "peek": lambda sock, lines: sock.peek(),
    "recv_exactly": lambda sock, lines: sock.recv_exactly(1),
    "recv_until": lambda sock, lines: sock.recv_until(b"\n"),
}


@contextlib.asynccontextmanager
async def stuck(
    text: bytes, server_tls: ServerTLS | None = None, authority: Authority | None = None
) -> AsyncIterator[tuple[Socket, Lines, Callable[[], None]]]:
    """Give one of a server's sockets to which a broadcast is stuck, and a function that frees it.

    The first line of the text was read by the iterator, which has split the others.
    """
    got: list[tuple[Socket, Lines]] = []
    handling = trio.Event()

    async def handler(sock: Socket) -> None:
        lines = sock.lines()
        await anext(lines)
        got.append((sock, lines))
        handling.set()
        await trio.sleep_forever()

    def drain() -> None:
        with contextlib.suppress(OSError):
            while raw.recv(1_000_000):
                pass

    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, handler, host="127.0.0.1", tls=server_tls)
        with socket.socket() as raw:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            raw.connect(server.addresses[0])
            if authority is None:
                raw.sendall(text)
            else:
                context = ssl.create_default_context(cadata=authority.pem.decode())
                peer = RawTLS(raw, context, server_hostname="example.org")
                await trio.to_thread.run_sync(peer.run, peer.ssl.do_handshake)
                peer.run(lambda: peer.ssl.write(text))
            await handling.wait()
            nursery.start_soon(server.broadcast, bytes(8_000_000))
            await trio.testing.wait_all_tasks_blocked(0.01)
            yield *got[0], lambda: nursery.start_soon(trio.to_thread.run_sync, drain)
            raw.shutdown(socket.SHUT_RDWR)
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("read", READS.values(), ids=READS)
async def test_lines_injected_behind_starttls_are_never_read(
    read: Callable[[Socket, Lines], Awaitable[object]], server_tls: ServerTLS
) -> None:
    async def turn() -> None:
        with pytest.raises(TLSError, match="does not speak TLS"):
            await sock.starttls(server_tls)

    text = b"STARTTLS\nDELETE all\nDELETE the rest\n"
    async with stuck(text) as (sock, lines, free), trio.open_nursery() as turning:
        turning.start_soon(turn)
        await trio.testing.wait_all_tasks_blocked(0.01)
        for _ in range(2):
            with pytest.raises(trio.BusyResourceError):
                await read(sock, lines)
        with pytest.raises(trio.BusyResourceError):
            sock.unrecv(b"x")
        free()


async def test_lines_split_before_stoptls_are_not_read_while_it_waits(
    authority: Authority, server_tls: ServerTLS
) -> None:
    async def turn() -> None:
        with pytest.raises(RuntimeError, match="decrypted bytes are waiting"):
            await sock.stoptls()

    text = b"CCC\ntwo\nthree\n"
    async with stuck(text, server_tls, authority) as (sock, lines, free):
        async with trio.open_nursery() as turning:
            turning.start_soon(turn)
            await trio.testing.wait_all_tasks_blocked(0.01)
            for _ in range(2):
                with pytest.raises(trio.BusyResourceError):
                    await anext(lines)
            free()
        assert [await anext(lines), await anext(lines)] == [b"two", b"three"]  # nothing is lost
