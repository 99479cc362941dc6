"""TLS servers in a thread: the command under test runs its own Trio in the main thread."""

from __future__ import annotations

import contextlib
import datetime
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from queue import Queue

import trio

from helpers.certificates import CertificateAuthority, Dates
from trisock import Handler, ServerTLS, Socket, bind, starttls

LOCAL = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class LocalServer:
    """A handler, the role for implicit TLS (or None), and a port (0: any free port)."""

    handler: Handler
    tls: ServerTLS | None = None
    port: int = 0


@contextlib.contextmanager
def serving(*servers: LocalServer) -> Iterator[list[int]]:
    """Run servers on loopback during a block. Yield their ports."""
    started: Queue[tuple[trio.lowlevel.TrioToken, trio.CancelScope, list[int]]] = Queue()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            bound = [
                await bind(nursery, each.port, each.handler, host="127.0.0.1", tls=each.tls)
                for each in servers
            ]
            token = trio.lowlevel.current_trio_token()
            started.put((token, nursery.cancel_scope, [each.port for each in bound]))

    thread = threading.Thread(target=trio.run, args=(main,), daemon=True)
    thread.start()
    token, scope, ports = started.get(timeout=30)
    try:
        yield ports
    finally:
        with contextlib.suppress(trio.RunFinishedError):  # all servers have stopped
            token.run_sync_soon(scope.cancel)
        thread.join(30)


async def quiet(sock: Socket) -> None:
    """Read until EOF."""
    async for _ in sock:
        pass


async def echo(sock: Socket) -> None:
    async for chunk in sock:
        await sock.send(chunk)


def offering(protocol: str, tls: ServerTLS, *, port: int = 0) -> LocalServer:
    """Return a server with STARTTLS."""

    async def handler(sock: Socket) -> None:
        await starttls.accept(sock, protocol, tls)
        await quiet(sock)

    return LocalServer(handler, port=port)


def days(number: float) -> Dates:
    """Return the dates of a certificate that expires after this many days."""
    now = datetime.datetime.now(datetime.timezone.utc).replace(microsecond=0)
    day = datetime.timedelta(days=1)
    return min(now, now + number * day) - day, now + number * day


def server_tls(
    authority: CertificateAuthority, *names: str, left: float = 90, alpn: tuple[str, ...] = ()
) -> ServerTLS:
    """Return a server's role. Its certificate expires after ``left`` days."""
    # Half a day more, so that the number of whole days is certain.
    certificate = authority.issue(*(names or LOCAL), dates=days(left + 0.5))
    return ServerTLS(certificate, alpn_protocols=alpn)
