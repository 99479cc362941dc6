"""run and open_service: run a program with servers, until a signal stops it."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from types import EllipsisType
from typing import TYPE_CHECKING, TypeAlias, TypedDict, cast

import trio

from .. import _fork, _guard
from .._address import Address
from .._arguments import quoted, seconds_or_inf
from .._not_copyable import NotCopyable
from .._tls.roles import ServerTLS, TLSArgument
from .._udp.opening import open_udp
from .._udp.socket import UDPSocket
from .listener import Listener
from .notify import READY, STOPPING, ServiceManager
from .reloading import reload_all
from .served_udp import ServedUDP
from .server import Handler, Server, bind, server_tls_of
from .signals import SIGHUP, SignalReceiver

if TYPE_CHECKING:
    from typing_extensions import Unpack

OnReload: TypeAlias = "Callable[[Service], object]"

# The open service of this process. The key is ``_fork.count``: a forked child inherits the entry of
# its parent, but looks for an entry with its own key.
_open_services: dict[int, object] = {}


# The seconds that a stop waits for room in systemd's message queue.
_STOPPING_TIMEOUT = 1


class BindOptions(TypedDict, total=False):
    """The keyword arguments of ``bind``, for ``run`` and ``Service.bind``."""

    host: str | None
    tls: TLSArgument | None
    max_connections: int | trio.CapacityLimiter | None
    max_connections_per_host: int | None
    admit: Callable[[Address], bool] | None
    trusted_proxies: Iterable[str] | None
    handshake_timeout: float | None
    https_compatible: bool
    backlog: int | None
    reuse_port: bool


class UDPOptions(TypedDict, total=False):
    """The keyword arguments of ``open_udp``, for ``Service.open_udp``."""

    host: str | None
    reuse_port: bool
    reuse_address: bool
    broadcast: bool


def run(
    port_or_listener: int | Listener,
    handler: Handler,
    *,
    grace: float | None = 30,
    delay: float = 0,
    reload: Iterable[ServerTLS] = (),
    on_reload: OnReload | None = None,
    **options: Unpack[BindOptions],
) -> None:
    """Run a program that consists of one server, until the server stops. Call this outside Trio.

    - SIGTERM or SIGINT (Ctrl-C) stops the server, as ``Server.stop(grace, delay=delay)`` does. A
      second signal stops it immediately. A handler may also stop the server. When the last
      connection is closed, ``run`` returns without a traceback. If the event loop is blocked, a
      third signal of the same kind has the effect that it has without ``run``: it ends the program.
    - SIGHUP reloads the certificates: see ``open_service``.
    - If systemd has started the program with ``Type=notify`` or ``Type=notify-reload``, ``run``
      tells systemd about the program's state. If systemd has a watchdog for the program, ``run``
      also feeds the watchdog.

    ::

        async def handler(sock):
            async for line in sock.lines(idle=True):
                await sock.send(line, b"\\n")

        trisock.run(7777, handler)

    Args:
      port_or_listener, handler: as in ``bind``.
      grace: the seconds for which handlers may continue after a signal. ``None`` means as long as
        they need.
      delay: the seconds for which the server continues to accept after a signal. Meanwhile
        ``Server.ready`` is False, which a health check can show to a load balancer.
      reload, on_reload: as in ``open_service``.
      options: ``host``, ``tls``, ``max_connections`` and the other keyword arguments of ``bind``.

    Raises:
      OSError: as in ``listen``. It is not in an exception group.
      RuntimeError: the caller is inside Trio, or another service runs in this program.
      TypeError, ValueError: an argument is invalid.

    Python allows signal handlers only in the main thread. In another thread, ``run`` handles no
    signals.
    """
    if trio.lowlevel.in_trio_run():
        raise RuntimeError("trisock.run starts Trio itself; inside Trio, use trisock.open_service")
    settings = _Settings(grace, delay, reload, on_reload)

    async def main() -> None:
        async with _open(settings, signals) as service:
            await service.bind(port_or_listener, handler, **options)

    failure: BaseException | None = None
    with _only_service(), SignalReceiver() as signals:
        try:
            trio.run(main)
        except BaseException as exc:
            failure = exc
    if failure is not None:
        # The caller does not know our nursery. So if its group contains a single exception, such as
        # a handler's SystemExit, we raise that exception without the group.
        leaves = _guard.leaves(failure)
        try:
            raise leaves[0] if len(leaves) == 1 else failure
        finally:
            del failure, leaves  # the traceback refers to this frame


@contextlib.asynccontextmanager
async def open_service(
    *,
    grace: float | None = 30,
    delay: float = 0,
    reload: Iterable[ServerTLS] = (),
    on_reload: OnReload | None = None,
) -> AsyncIterator[Service]:
    """Run a program with several servers, or with tasks beside its server, inside Trio.

    ::

        async with trisock.open_service(reload=[tls]) as service:
            await service.bind(25, smtp)  # its handler calls starttls(tls)
            await service.bind(465, smtp, tls=tls)
            service.nursery.start_soon(deliver_mail)

    Start the servers in the block. When the block ends, the program is ready: ``open_service``
    tells systemd, and waits until the service stops, even if it has no server. A signal or
    ``Service.stop`` stops the service. It also stops when each of its servers was stopped by
    ``Server.stop``. Once all servers have closed, the tasks in ``service.nursery`` are cancelled.

    - SIGTERM or SIGINT (Ctrl-C) calls ``Service.stop``. A second signal stops all servers
      immediately. A signal that arrives while the block still runs also cancels the block.
    - SIGHUP calls ``ServerTLS.reload`` for each server's current ``tls`` and for each role in
      ``reload``. Then it calls ``on_reload(service)``. Each ``Exception`` is logged at ERROR on the
      logger ``trisock.server``. If a certificate cannot be reloaded, the old one stays in use.
      Any number of SIGHUPs during a reload cause one more reload. There is no reload before the
      program is ready, and none after the stop has begun.
    - If systemd has set ``NOTIFY_SOCKET``, it gets ``READY=1``, ``RELOADING=1`` (with
      ``MONOTONIC_USEC``) and ``STOPPING=1``. If systemd requests it, it also gets ``WATCHDOG=1``
      (sd_notify(3)). A forked child sends nothing.

    Args:
      grace: the seconds for which handlers may continue after the stop. ``None`` means as long as
        they need.
      delay: the seconds for which servers continue to accept after the stop. Meanwhile
        ``Server.ready`` is False, which a health check can show to a load balancer.
      reload: more roles to reload on SIGHUP: those that handlers pass to ``Socket.starttls``.
      on_reload: a function that takes the ``Service``, sync or async.

    Raises:
      RuntimeError: another service runs in this program.
      TypeError, ValueError: an argument is invalid.

    If only the block fails, its exception is raised without a group. If a task fails, all
    exceptions are raised in a group. An exception or a cancellation ends the servers without grace.

    Signals are handled only in the main thread, which is a rule of Python. When the service ends,
    the previous signal handlers are restored.
    """
    settings = _Settings(grace, delay, reload, on_reload)
    with _only_service(), SignalReceiver() as signals:
        async with _open(settings, signals) as service:
            yield service


class _Settings:
    """The checked arguments of ``open_service``."""

    def __init__(
        self,
        grace: float | None,
        delay: float,
        reload: Iterable[ServerTLS],
        on_reload: OnReload | None,
    ) -> None:
        seconds_or_inf("grace", grace)
        _check_delay(delay)
        if isinstance(reload, ServerTLS):
            raise TypeError("reload must be a list of trisock.ServerTLS, not a single one")
        self.grace = grace
        self.delay = delay
        self.reload = tuple(reload)
        for role in self.reload:
            if not isinstance(role, ServerTLS):
                raise TypeError(f"reload must be a list of trisock.ServerTLS, not {quoted(role)}")
        if on_reload is not None and not callable(on_reload):
            raise TypeError(f"on_reload must be a function, not {quoted(on_reload)}")
        self.on_reload = on_reload


def _check_delay(delay: object) -> None:
    if delay is None:
        raise TypeError("delay must be a number of seconds, not None")
    seconds_or_inf("delay", cast(float, delay))


@contextlib.contextmanager
def _only_service() -> Iterator[None]:
    """Raise RuntimeError if this process already runs another service."""
    me = object()
    if _open_services.setdefault(_fork.count, me) is not me:
        raise RuntimeError(
            "another service runs in this program; one service can have many servers"
        )
    try:
        yield
    finally:
        _open_services.pop(_fork.count, None)


@contextlib.asynccontextmanager
async def _open(settings: _Settings, signals: SignalReceiver) -> AsyncIterator[Service]:
    """Do what ``open_service`` does, with a ``SignalReceiver`` that is already receiving."""
    failure: BaseException | None = None
    try:
        try:
            async with trio.open_nursery() as nursery:
                service = Service(nursery, settings)
                service._start(signals)
                try:
                    with service._block_scope:
                        yield service
                except BaseException as exc:
                    failure = exc
                    raise
                await service._finish()
                nursery.cancel_scope.cancel()
        except BaseException as exc:
            if failure is None or not _same(_guard.leaves(exc), _guard.leaves(failure)):
                raise
        else:
            return  # the nursery may have caught a Cancelled of the block
        raise failure
    finally:
        del failure  # its traceback refers to this frame


def _same(some: list[BaseException], others: list[BaseException]) -> bool:
    return list(map(id, some)) == list(map(id, others))


class Service(NotCopyable):
    """The servers of a program, and the tasks beside them. Made by ``open_service``.

    Attributes:
      nursery: runs the servers. The program may start other tasks in this nursery. These tasks are
        cancelled once all servers have closed.
    """

    # Invariant: _servers contains each server that was bound and has not closed yet. A UDP socket
    # counts as a server.

    def __init__(self, nursery: trio.Nursery, settings: _Settings) -> None:
        self.nursery = nursery
        self._settings = settings
        self._manager = ServiceManager(os.environ)
        self._block_scope = trio.CancelScope()
        self._servers: dict[Server | ServedUDP, None] = {}
        self._has_bound = False
        self._ready = False
        self._stopping = trio.Event()
        self._reload_requested = trio.Event()

    async def bind(
        self, port_or_listener: int | Listener, handler: Handler, **options: Unpack[BindOptions]
    ) -> Server:
        """Start a server, as ``trisock.bind`` does, in the nursery of the service.

        Args:
          port_or_listener, handler, options: as in ``trisock.bind``.

        Returns: the ``Server``.

        Raises:
          RuntimeError: the service was stopped.
          OSError, TypeError, ValueError: as in ``trisock.bind``.

        A cancelled call leaves nothing listening.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        self._check_running()
        server = await bind(self.nursery, port_or_listener, handler, **options)
        if self._stopping.is_set():  # stopped while bind looked up the host
            server.stop(grace=0)
            await trio.lowlevel.checkpoint_if_cancelled()  # a signal also cancels the block
            self._check_running()
        self._watch_over(server)
        return server

    async def open_udp(
        self, port_or_socket: int | UDPSocket = 0, **options: Unpack[UDPOptions]
    ) -> UDPSocket:
        """Open a UDP socket, as ``trisock.open_udp`` does. It stops when the service stops.

        ::

            async def serve(udp):
                async with udp, trio.open_nursery() as nursery:
                    async for datagram in udp:
                        await nursery.start(answer, udp, datagram)

            async with trisock.open_service() as service:
                service.nursery.start_soon(serve, await service.open_udp(7777))

        The socket counts as a server. When the service stops, the socket stops receiving
        (``UDPSocket.stop_receiving``), so the loop above ends. Tasks may still send. The program
        must close the socket once it has sent its answers, as ``async with udp`` does above. At the
        end of the grace, the service closes the socket.

        Args:
          port_or_socket: a port, as in ``trisock.open_udp``, or a ``UDPSocket``, such as one that
            was opened by ``open_udp_nowait`` before the program dropped its privileges.
          options: ``host``, ``reuse_port``, ``reuse_address`` and ``broadcast``, as in
            ``trisock.open_udp``.

        Returns: the ``UDPSocket``.

        Raises:
          RuntimeError: the service was stopped.
          OSError, TypeError, ValueError: as in ``trisock.open_udp``.

        A call that fails or is cancelled leaves nothing open, except a ``UDPSocket`` that was
        passed in.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        self._check_running()
        if isinstance(port_or_socket, UDPSocket):
            if options:
                raise TypeError("a UDPSocket is open already, so it takes no options")
            udp = port_or_socket
            await trio.lowlevel.cancel_shielded_checkpoint()
        else:
            udp = await open_udp(port_or_socket, **options)
        if self._stopping.is_set():  # stopped while open_udp looked up the host
            if udp is not port_or_socket:
                udp.abort()
            await trio.lowlevel.checkpoint_if_cancelled()  # a signal also cancels the block
            self._check_running()
        served = ServedUDP(udp)
        self.nursery.start_soon(served.run)
        self._watch_over(served)
        return udp

    def _watch_over(self, server: Server | ServedUDP) -> None:
        self._servers[server] = None
        self._has_bound = True
        self.nursery.start_soon(self._watch, server)

    def _check_running(self) -> None:
        if self._stopping.is_set():
            raise RuntimeError("this service was stopped, so it starts no more servers")

    def stop(
        self, grace: float | EllipsisType | None = ..., *, delay: float | EllipsisType = ...
    ) -> None:
        """Stop all servers, as ``Server.stop`` does, and then end the service. Synchronous.

        A second call can only shorten the times.

        Args:
          grace: the seconds for which handlers may continue. ``None`` means as long as they need.
            The default is the ``grace`` of ``open_service``.
          delay: for how many seconds the servers still accept clients. The default is the
            ``delay`` of ``open_service``.
        """
        settings = self._settings
        grace = settings.grace if isinstance(grace, EllipsisType) else grace
        delay = settings.delay if isinstance(delay, EllipsisType) else delay
        seconds_or_inf("grace", grace)
        _check_delay(delay)
        for server in self._servers:
            server.stop(grace, delay=delay)
        self._stopping.set()

    # ---- the tasks of the service ----

    def _start(self, signals: SignalReceiver) -> None:
        self.nursery.start_soon(self._receive_signals, signals)
        self.nursery.start_soon(self._manager.feed_watchdog)

    async def _finish(self) -> None:
        """Run the service after the block, until all servers have closed."""
        self._ready = True
        self._stop_if_servers_stop()
        if not self._stopping.is_set():
            await self._manager.notify(READY)
            self.nursery.start_soon(self._reload_on_request)
        await self._stopping.wait()
        await self._manager.notify(STOPPING, _STOPPING_TIMEOUT)
        for server in tuple(self._servers):
            await server.wait_closed()

    async def _watch(self, server: Server | ServedUDP) -> None:
        """Wait until a server stops, for example because a handler has stopped it."""
        await server.closing.wait()
        self._stop_if_servers_stop()
        await server.wait_closed()
        del self._servers[server]

    def _stop_if_servers_stop(self) -> None:
        stopping = all(server.closing.is_set() for server in self._servers)
        if self._ready and self._has_bound and stopping:
            self._stopping.set()

    async def _receive_signals(self, signals: SignalReceiver) -> None:
        stops = 0
        while True:
            if await signals.receive() == SIGHUP:
                self._reload_requested.set()
                continue
            stops += 1
            if stops == 1:
                self.stop()
                self._block_scope.cancel()
            else:
                self.stop(grace=0, delay=0)

    async def _reload_on_request(self) -> None:
        on_reload = self._settings.on_reload
        call = None if on_reload is None else functools.partial(on_reload, self)
        while True:
            await self._reload_requested.wait()
            if self._stopping.is_set():
                return
            self._reload_requested = trio.Event()
            await self._manager.notify_reloading()
            servers = [server for server in self._servers if isinstance(server, Server)]
            roles = [role for server in servers if (role := server_tls_of(server))]
            await reload_all([*roles, *self._settings.reload], call)
            if not self._stopping.is_set():
                await self._manager.notify(READY)
