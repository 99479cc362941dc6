"""Conversations of all kinds for ``soak.py``. They check every byte from trisock's servers."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import random
import socket

import trio

import trisock
from conversation_site import (
    LOCALHOST,
    MORE_THAN_FITS,
    NAME,
    NARROW,
    BrokenPromise,
    Conversation,
    Site,
    cancelled_after,
    check,
    check_line,
    echo,
    lines,
    payload,
    read_all,
    request,
    start_tls,
    steps,
)
from dialect_conversations import (
    a_pluto_server,
    hammerspoon_datagrams,
    hammerspoon_floods,
    hammerspoon_peers_vanish,
    hammerspoon_sockets,
    pluto_datagrams,
    pluto_in_trio,
    pluto_interrupted,
    pluto_outside_trio,
)
from helpers.client_hellos import client_hello
from helpers.pairs import RESET
from trisock import ServerTLS, Socket

_OVER = (trio.BrokenResourceError, trio.ClosedResourceError)


async def plain_text(site: Site, rng: random.Random) -> None:
    async with await site.dial(rng) as sock:
        await echo(site, sock, rng)
        await steps(site, sock, rng)


async def half_closed(site: Site, rng: random.Random) -> None:
    data = payload(rng)
    async with await site.dial(rng) as sock:
        await sock.send(b"rest\n", data)
        await sock.send_eof()
        check(await read_all(sock), data[::-1])
        check(sock.isopen(), False)


async def upgraded_midway(site: Site, rng: random.Random) -> None:
    async with await site.dial(rng) as sock:
        await rng.choice([echo, lines])(site, sock, rng)
        await start_tls(site, sock, rng)
        await steps(site, sock, rng)


async def tls_from_the_start(site: Site, rng: random.Random) -> None:
    async with await site.dial_secure(rng) as sock:
        await steps(site, sock, rng)


FAULTS = [
    *(b"plain", b"group", b"nursery", b"hostile", b"hostile_group"),
    *(b"open_scope", b"abandoned_generator"),
]


async def a_handler_raises(site: Site, rng: random.Random) -> None:
    async with await site.dial_any(rng) as sock:
        await sock.send(b"raise %s\n" % rng.choice(FAULTS))
        await check_line(sock, b"last words\n")
        if sock.istls():  # after a fault, the server sends no close_notify
            with contextlib.suppress(trisock.TLSError):
                raise BrokenPromise(f"no TLSError after a fault: {await sock.recv()!r}")
        else:
            check(await sock.recv(), b"")


async def another_process_has_the_descriptor(site: Site, rng: random.Random) -> None:
    """The server drops a closed client, even while a copy of the client's descriptor is open.

    Such a copy may be in a child process of the client.
    """
    sock = await site.dial_any(rng)
    others = os.dup(sock.fileno())
    try:
        await echo(site, sock, rng)
        if rng.random() < 0.3:
            sock.abort()
        else:
            await cancelled_after(rng.randrange(5), sock.close)
        with trio.fail_after(10):
            while sock.getlocal() in [
                each.getpeer() for server in site.servers for each in server.connections
            ]:
                await trio.sleep(0.01)
    finally:
        os.close(others)


async def a_cancelled_send(site: Site, rng: random.Random) -> None:
    async with await site.dial_any(rng) as sock:
        await sock.send(b"echo %d\n" % 10**9)
        await cancelled_after(rng.randrange(30), sock.send, MORE_THAN_FITS)
        if rng.random() < 0.5:
            with contextlib.suppress(trio.BrokenResourceError):
                await cancelled_after(1, sock.send, b"more")
        sock.abort()


async def a_cancelled_handshake(site: Site, rng: random.Random) -> None:
    async with await site.dial(rng) as sock:
        passes = rng.randrange(20)
        if rng.random() < 0.5:
            await request(sock, b"starttls server\n")
            if not await cancelled_after(passes, sock.starttls, site.trusting):
                check((sock.isopen(), sock.fileno()), (False, -1))
        else:
            await request(sock, b"give_up %d\n" % passes)
            with contextlib.suppress(*_OVER):
                await sock.starttls(site.trusting)
                check(await sock.recv(), b"")


async def a_cancelled_connect_or_close(site: Site, rng: random.Random) -> None:
    port = rng.choice([site.plain, site.secure]).port
    sock = await cancelled_after(rng.randrange(10), trisock.connect, LOCALHOST, port)
    if sock is not None:
        await cancelled_after(rng.randrange(5), sock.close)
        check(sock.fileno(), -1)


async def a_peer_resets(site: Site, rng: random.Random) -> None:
    sock = await site.dial_any(rng)
    command = rng.choice([b"echo 1000000\n", b"lines 1000\n", b"file 0 700000\n"])
    await sock.send(command, payload(rng, 60_000))
    await cancelled_after(rng.randrange(5), sock.recv)
    sock.abort()


async def a_peer_truncates(site: Site, rng: random.Random) -> None:
    """The peer sends EOF without close_notify."""
    sock = await site.dial_secure(rng)
    await sock.send(b"echo 5\nhello")
    check(await sock.recv_exactly(5), b"hello")
    await sock.stream.send_eof()
    with contextlib.suppress(trio.BrokenResourceError):
        check(await sock.recv(), b"")
    sock.abort()


async def a_peer_sends_garbage(site: Site, rng: random.Random) -> None:
    """Send garbage, a ClientHello followed by garbage, or an incomplete ClientHello."""
    garbage = rng.choice([payload(rng, 1000), client_hello(NAME) + payload(rng, 1000)])
    silent = rng.random() < 0.05
    async with await trio.open_tcp_stream(LOCALHOST, site.secure.port) as stream:
        await stream.send_all(client_hello(NAME)[:-1] if silent else garbage)
        if not silent:
            await stream.send_eof()
        with contextlib.suppress(trio.BrokenResourceError):
            async for _ in stream:  # read until EOF; an alert may come first
                pass


async def a_peer_vanishes_in_the_handshake(site: Site, rng: random.Random) -> None:
    hello = client_hello(NAME)
    async with await trio.open_tcp_stream(LOCALHOST, site.secure.port) as stream:
        await stream.send_all(hello[: rng.randrange(1, len(hello) + 1)])
        if rng.random() < 0.5:
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)


async def plain_text_after_starttls(site: Site, rng: random.Random) -> None:
    async with await trisock.connect(LOCALHOST, site.plain.port) as sock:
        await sock.send(b"starttls server\necho 5\nhello")
        with contextlib.suppress(trio.BrokenResourceError):
            await check_line(sock, b"go ahead\n")
            check(b"hello" in await read_all(sock), False)


async def an_untrusted_certificate(site: Site, rng: random.Random) -> None:
    tls = site.stranger.client_tls(NAME)
    with contextlib.suppress(trisock.TLSError):
        (await trisock.connect(LOCALHOST, site.secure.port, tls=tls)).abort()
        raise BrokenPromise("an untrusted certificate was accepted")


async def a_client_certificate(site: Site, rng: random.Random) -> None:
    """The server requires a client certificate.

    A client without one completes its side of the handshake before the server refuses the client.
    """
    requiring = ServerTLS(
        site.identity, client_ca=site.authority.ca, require_client_certificate=True
    )
    identity = rng.choice([site.identity, None])
    tls = site.authority.client_tls(NAME, certificate=identity)

    async def handler(sock: Socket) -> None:
        check(sock.tls is not None and sock.tls.peer_certificate is not None, True)
        await site.serve(sock)

    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, handler, host=LOCALHOST, tls=requiring)
        async with await trisock.connect(LOCALHOST, server.port, tls=tls) as sock:
            try:
                await sock.send(b"echo 5\nhello")
                check(await sock.recv_exactly(5), b"hello")
            except trisock.TLSError:
                check(identity, None)
            else:
                check(identity is None, False)
        server.stop()
        await server.wait_closed()
        check(server.stats().failed_handshakes, int(identity is None))


async def new_certificates(site: Site, rng: random.Random) -> None:
    site.tls = site.new_tls()
    site.secure.set_tls(site.tls)
    async with await site.dial_secure(rng) as sock:
        await echo(site, sock, rng)


async def more_than_max_connections(site: Site, rng: random.Random) -> None:
    async def visit() -> None:
        async with await trisock.connect(LOCALHOST, site.narrow.port) as sock:
            await echo(site, sock, rng)
            check(len(site.narrow.connections) <= NARROW, True)

    async with trio.open_nursery() as nursery:
        for _ in range(3 * NARROW):
            nursery.start_soon(visit)


async def a_broadcast(site: Site, rng: random.Random) -> None:
    """Broadcast to peers that read, to one that has disconnected, and to one that does not read."""
    message = payload(rng) if rng.random() < 0.97 else MORE_THAN_FITS

    async def handler(sock: Socket) -> None:
        await sock.send(b"welcome\n")
        await read_all(sock)

    async def read(sock: Socket) -> None:
        async with sock:
            check(await sock.recv_exactly(len(message)), message)

    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, handler, host=LOCALHOST)
        socks = [await trisock.connect(LOCALHOST, server.port) for _ in range(5)]
        for sock in socks:
            await check_line(sock, b"welcome\n")
        left, silent, *others = socks
        left.abort()
        async with trio.open_nursery() as readers:
            for sock in others:
                readers.start_soon(read, sock)
            delivered = await server.broadcast(message, timeout=5)
            check(3 <= delivered <= 5, True)
        silent.abort()
        server.stop()


async def a_broadcast_during_an_upgrade(site: Site, rng: random.Random) -> None:
    """A broadcast during starttls is sent in plain text or not at all.

    A broadcast during stoptls is sent under TLS or not at all.
    """
    under_tls = rng.random() < 0.5
    passes = rng.randrange(8)
    news = b"NEWS\n"
    returned = trio.Event()

    async def handler(sock: Socket) -> None:
        await check_line(sock, b"change\n")
        async with trio.open_nursery() as inner:

            async def broadcast() -> None:
                try:
                    await server.broadcast(news, timeout=0.02)
                finally:
                    returned.set()

            inner.start_soon(broadcast)
            for _ in range(passes):
                await trio.lowlevel.checkpoint()
            if not under_tls:
                await sock.starttls(site.tls)
            else:
                try:
                    await sock.stoptls()
                except trisock.TLSError:
                    return  # the client received the news instead of close_notify
        await sock.send(b"done\n")

    async with trio.open_nursery() as nursery:
        tls = site.tls if under_tls else None
        server = await trisock.bind(nursery, 0, handler, host=LOCALHOST, tls=tls)
        trusting = site.trusting if under_tls else None
        async with await trisock.connect(LOCALHOST, server.port, tls=trusting) as sock:
            await sock.send(b"change\n")
            await returned.wait()  # start or stop TLS only after the broadcast
            if under_tls:
                with contextlib.suppress(trisock.TLSError):
                    await sock.stoptls()
                    check(await read_all(sock), b"done\n")
            else:
                if await sock.peek() is not None:
                    check(await sock.recv_exactly(len(news)), news)
                await sock.starttls(site.trusting)
                await check_line(sock, b"done\n")
        server.stop()
        await server.wait_closed()
        check(server.stats().handler_errors, 0)


async def a_server_starts_and_stops(site: Site, rng: random.Random) -> None:
    """Stop a server that has clients, with or without a grace period.

    Either a handler calls ``stop``, or a task outside the handlers does.
    """
    grace = rng.choice([None, 0, 0.01])

    async def handler(sock: Socket) -> None:
        await sock.send(b"welcome\n")
        if await sock.recv() == b"stop":
            server.stop(grace)
        await server.closing.wait()
        await sock.send(b"bye\n")
        if grace is not None:
            await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        tls = rng.choice([None, site.tls])
        server = await trisock.bind(nursery, 0, handler, host=LOCALHOST, tls=tls)
        connect = functools.partial(
            trisock.connect, LOCALHOST, server.port, tls=None if tls is None else site.trusting
        )
        may_break = () if grace is None else (trio.BrokenResourceError,)
        with trio.socket.socket() as waiting:  # this client never begins a handshake
            await waiting.connect((LOCALHOST, server.port))
            socks = [await connect() for _ in range(3)]
            for sock in socks:
                await check_line(sock, b"welcome\n")
            if rng.random() < 0.5:
                await socks[0].send(b"stop")
                await server.closing.wait()
            else:
                server.stop(grace)
                with contextlib.suppress(*may_break):
                    await socks[0].send(b"go on")
            for sock in socks[1:]:
                with contextlib.suppress(*may_break):
                    await sock.send(b"go on")
        for sock in socks:
            with contextlib.suppress(*may_break):
                got = await read_all(sock)
                check(got, b"bye\n" if grace is None or got else b"")
            await sock.close()
        await server.wait_closed()
    with contextlib.suppress(OSError):
        (await trisock.connect(LOCALHOST, server.port)).abort()
        raise BrokenPromise("a stopped server still listens")


async def a_stale_path(site: Site, rng: random.Random) -> None:
    path = site.directory / f"stale-{rng.randrange(10**9)}"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    async with await trisock.listen_unix(path) as listener:
        try:
            await (await trisock.listen_unix(path)).close()
        except OSError as exc:
            check(exc.errno, errno.EADDRINUSE)
        else:
            raise BrokenPromise("two listeners on one path")
        async with await trisock.connect_unix(path) as client, await listener.accept() as server:
            await client.send(b"hello")
            check(await server.recv(), b"hello")
            check(listener.hasconnection(), False)
    check(path.exists(), False)


async def a_cancelled_accept(site: Site, rng: random.Random) -> None:
    """A cancelled accept loses no connection."""
    async with await trisock.listen(0, host=LOCALHOST) as listener:
        clients = [await trisock.connect(LOCALHOST, listener.port) for _ in range(3)]
        accepted: list[Socket] = []
        while len(accepted) < len(clients):
            if rng.random() < 0.3:
                listener.hasconnection()
            sock = await cancelled_after(rng.randrange(3), listener.accept)
            if sock is not None:
                accepted.append(sock)
        check({each.getpeer() for each in accepted}, {each.getlocal() for each in clients})
        for sock in clients + accepted:
            await sock.close()


# The conversations by group. Each group has a column in the table of results.
KINDS: dict[str, list[Conversation]] = {
    "plain text": [plain_text, half_closed],
    "TLS": [upgraded_midway, tls_from_the_start],
    "cancelled": [
        *(a_cancelled_send, a_cancelled_handshake),
        *(a_cancelled_connect_or_close, a_cancelled_accept),
    ],
    "bad peers": [
        *(a_peer_resets, a_peer_truncates, a_peer_sends_garbage),
        *(a_peer_vanishes_in_the_handshake, plain_text_after_starttls, an_untrusted_certificate),
    ],
    "servers": [
        *(a_handler_raises, another_process_has_the_descriptor, a_client_certificate),
        *(new_certificates, more_than_max_connections, a_broadcast, a_broadcast_during_an_upgrade),
        *(a_server_starts_and_stops, a_stale_path),
    ],
    "dialects": [
        *(pluto_in_trio, pluto_outside_trio, pluto_interrupted, pluto_datagrams, a_pluto_server),
        *(hammerspoon_sockets, hammerspoon_peers_vanish, hammerspoon_floods),
        hammerspoon_datagrams,
    ],
}
