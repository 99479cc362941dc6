"""Run a handler in gunicorn's worker processes.

::

    gunicorn --worker-class trisock.gunicorn.TrioWorker --workers 4 --bind :2525 app:handler

gunicorn's master owns the listening sockets, replaces workers that die or hang, and on SIGHUP
starts new workers before the old ones stop. gunicorn is an extra: ``pip install
'trisock[gunicorn]'``.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import socket
import ssl
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import trio
from gunicorn.arbiter import Arbiter
from gunicorn.config import Config, NewSSLContext
from gunicorn.workers.base import Worker

from . import Certificate, Handler, Listener, Server, ServerTLS, Socket, TLSArgument, _guard, bind

if TYPE_CHECKING:
    from gunicorn.glogging import Logger

__all__ = ["App", "TrioWorker"]

_logger = logging.getLogger("trisock.gunicorn")

# The maximum time (seconds) between two notifications that a worker sends to the master.
_NOTIFY_SECONDS = 1

# A stopping master kills its workers at the end of --graceful-timeout. Workers cancel their
# handlers before that, so that the handlers can clean up. The time for this cleanup is a tenth of
# the timeout, but at most this many seconds.
_CLEANUP_SECONDS = 1

# --proxy-allow-from has no name for the peers of a Unix socket. gunicorn trusts all such peers.
_EVERYBODY = ("0.0.0.0/0", "::/0")


def _no_lifespan() -> contextlib.AbstractAsyncContextManager[object]:
    return contextlib.nullcontext()


@dataclass(frozen=True)
class App:
    """A handler, and the settings that no gunicorn option covers. Use it as gunicorn's ``app``.

    Args:
      handler: as in ``bind``. Each worker runs it for the connections that the worker accepts.
      tls: the server's TLS role, as in ``bind``. Use it for what ``--certfile`` cannot express
        (several certificates, ALPN). It cannot be combined with ``--certfile``.
      max_connections_per_host: as in ``bind``. Each worker counts its own connections.
      admit: as in ``bind``.
      handshake_timeout: as in ``bind``, in seconds.
      https_compatible: as in ``bind``.
      lifespan: a function that returns an async context manager. Each worker enters the context
        manager inside Trio before it accepts connections, and exits it after the worker's last
        connection is closed. Use it for a pool of database connections, or for background tasks. If
        entering it raises an error (or ``SystemExit``), gunicorn halts, as after an error while the
        program is imported. But gunicorn does not halt if the worker was asked to stop meanwhile.

    An ``App`` can be called like its handler, so the same object can be passed to ``bind``. A
    cancelled call cancels the handler.
    """

    handler: Handler
    tls: TLSArgument | None = field(default=None, kw_only=True)
    max_connections_per_host: int | None = field(default=None, kw_only=True)
    admit: Callable[[Any], bool] | None = field(default=None, kw_only=True)
    handshake_timeout: float | None = field(default=60, kw_only=True)
    https_compatible: bool = field(default=False, kw_only=True)
    lifespan: Callable[[], contextlib.AbstractAsyncContextManager[object]] = field(
        default=_no_lifespan, kw_only=True
    )

    async def __call__(self, sock: Socket) -> object:
        """Run the handler for one connection."""
        return await self.handler(sock)


class TrioWorker(Worker):
    """A gunicorn worker that serves gunicorn's listening sockets with a ``trisock.Server``.

    It uses these options of gunicorn:

    - ``--certfile``, ``--keyfile``, ``--ca-certs``, ``--cert-reqs``: connections start with TLS.
      Each new worker reads the files. ``--cert-reqs`` needs ``--ca-certs``.
    - ``--worker-connections``: ``max_connections`` of each worker (0: no limit).
    - ``--max-requests``: after this many connections a worker stops gracefully.
    - ``--proxy-protocol`` with ``--proxy-allow-from``: ``trusted_proxies``. Both versions of the
      protocol are accepted, whichever version the option names. As in gunicorn, peers on Unix
      sockets are trusted.
    - ``--graceful-timeout``: how long the handlers of a stopping worker may continue. They are
      cancelled a little earlier (a tenth of the time, at most 1 second), because the master kills
      the worker at the end of this time.
    - ``--timeout``: the master kills a worker whose event loop is blocked for longer than this.
      The worker first logs where it was blocked.

    A worker stops gracefully on SIGTERM, and if its master has died. On SIGINT and SIGQUIT it
    cancels its handlers immediately. In each case it closes its copies of the listening sockets at
    once, so the other workers accept the next clients.

    The logger ``trisock`` writes to gunicorn's error log, unless the program has configured this
    logger.
    """

    # The seconds that the handlers have to finish after a request to stop. Infinity means that no
    # request has arrived. The signal handlers, which run between any two bytecodes, lower this
    # value and set ``alive`` to False.
    _grace = math.inf

    # Whether ``run`` has been called. After that, a signal must not raise SystemExit in Trio's
    # code.
    _running = False

    _token: trio.lowlevel.TrioToken | None = None
    _scope: trio.CancelScope
    _server: Server | None = None
    _notify_until = math.inf  # on Trio's clock
    _app: App
    _tls: TLSArgument | None

    @classmethod
    def check_config(cls, cfg: Config, log: Logger) -> None:
        """Warn of options with an unexpected effect. The master calls this when it starts."""
        if cfg.threads > 1:
            log.warning("TrioWorker does not use --threads; the limit is --worker-connections")
        if cfg.reuse_port:
            log.warning(
                "with --reuse-port, a stopping worker resets connections that it has not accepted"
            )

    # ---- before Trio runs ----

    def init_signals(self) -> None:
        """Install gunicorn's signal handlers, and leave the wakeup descriptor to Trio."""
        super().init_signals()
        signal.set_wakeup_fd(-1)

    def load_wsgi(self) -> None:
        """Load the program's handler or ``App``, and check gunicorn's options."""
        self._log_to_gunicorn()
        super().load_wsgi()
        # With --reload a SyntaxError is only logged, and gunicorn waits until the file changes.
        failed = self.app.callable is None
        loaded: Any = _refuse if failed else self.wsgi  # gunicorn's types know only WSGI and ASGI
        self._app = loaded if isinstance(loaded, App) else App(loaded)
        self._tls = _tls(self.cfg, self._app)

    def _log_to_gunicorn(self) -> None:
        logger = logging.getLogger("trisock")
        errors = getattr(self.log, "error_log", None)  # a --logger-class may lack it
        if isinstance(errors, logging.Logger) and not logger.hasHandlers():
            for handler in errors.handlers:
                logger.addHandler(handler)
            logger.setLevel(errors.level)

    # ---- serving ----

    def run(self) -> None:
        """Serve until the worker is asked to stop."""
        self._running = True
        self.booted = False  # if this is still False when the worker fails, gunicorn halts
        try:
            trio.run(self._main)
        except BaseException as exc:
            # If the worker was asked to stop while it was starting, gunicorn must not halt.
            self.booted = self.booted or not self.alive
            if self.aborted:
                sys.exit(1)
            if isinstance(exc, Exception):
                raise
            # This process is a fork of the master. The master's loop is on the stack, and would
            # treat a KeyboardInterrupt as its own and stop the other workers. So raise SystemExit
            # instead.
            _guard.log(_logger, logging.ERROR, "worker %s ended", self.pid, exc_info=exc)
            sys.exit(1 if self.booted else Arbiter.WORKER_BOOT_ERROR)
        finally:
            self._token = None
        if self.aborted:
            sys.exit(1)

    async def _main(self) -> None:
        async with trio.open_nursery() as nursery:
            self._scope = nursery.cancel_scope
            self._token = trio.lowlevel.current_trio_token()
            if not self.alive:  # a signal arrived earlier
                return
            nursery.start_soon(self._notify_master)
            async with self._app.lifespan():
                await self._serve()
            nursery.cancel_scope.cancel()

    async def _serve(self) -> None:
        app, cfg = self._app, self.cfg
        sockets = [socket.socket(fileno=each.detach()) for each in self.sockets]
        async with Listener(sockets) as listener, trio.open_nursery() as nursery:
            self._server = await bind(
                nursery,
                listener,
                app.handler if self.max_requests == sys.maxsize else self._count_and_handle,
                tls=self._tls,
                max_connections=cfg.worker_connections or None,
                max_connections_per_host=app.max_connections_per_host,
                admit=app.admit,
                trusted_proxies=_trusted_proxies(cfg),
                handshake_timeout=app.handshake_timeout,
                https_compatible=app.https_compatible,
            )
            self.booted = True

    async def _count_and_handle(self, sock: Socket) -> None:
        self.nr += 1
        if self.nr == self.max_requests:
            message = "worker %s stops after %s connections (--max-requests)"
            _guard.log(_logger, logging.INFO, message, self.pid, self.nr)
            self._ask_to_stop(self._graceful())
        await self._app.handler(sock)

    async def _notify_master(self) -> None:
        """Tell the master that the event loop is not blocked, until the grace has ended.

        After that, the master kills the worker if its handlers have ignored their cancellation.
        """
        seconds = min(_NOTIFY_SECONDS, self.timeout / 2) if self.timeout else _NOTIFY_SECONDS
        while trio.current_time() < self._notify_until:
            self.notify()
            if self.ppid != os.getppid() and self.alive:
                _guard.log(_logger, logging.INFO, "worker %s stops: the master is gone", self.pid)
                self.alive = False
            if not self.alive:  # the reloader's thread sets only ``alive``
                self._ask_to_stop(self._graceful())
            await trio.sleep(seconds)

    # ---- stopping ----

    def _graceful(self) -> float:
        seconds = float(self.cfg.graceful_timeout)
        return seconds - min(_CLEANUP_SECONDS, seconds / 10)

    def _ask_to_stop(self, grace: float) -> None:
        """Ask the server to stop soon. A signal handler may call this."""
        self.alive = False
        self._grace = min(self._grace, grace)
        if self._token is not None:
            with contextlib.suppress(trio.RunFinishedError):
                self._token.run_sync_soon(self._stop, idempotent=True)

    def _stop(self) -> None:
        """Stop the server with the requested grace. If aborted or not serving, cancel all tasks."""
        if self._server is None or self.aborted:
            self._scope.cancel()
        else:
            self._server.stop(grace=self._grace)
        self._notify_until = min(self._notify_until, trio.current_time() + self._grace)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop gracefully (SIGTERM). The master may send SIGTERM many times."""
        self._ask_to_stop(self._graceful())

    def handle_quit(self, sig: int, frame: FrameType | None) -> None:
        """Stop immediately (SIGINT, SIGQUIT)."""
        if not self._running:
            super().handle_quit(sig, frame)
        if self._grace > 0:
            self._ask_to_stop(0)
            self._call("worker_int", lambda: self.cfg.worker_int(self))

    def handle_abort(self, sig: int, frame: FrameType | None) -> None:
        """End the worker: its event loop was blocked for longer than ``--timeout`` (SIGABRT)."""
        self.aborted = True
        where = "".join(traceback.format_stack(frame))
        message = "worker %s was aborted (SIGABRT) here:\n%s"
        _guard.log(_logger, logging.ERROR, message, self.pid, where)
        self._ask_to_stop(0)
        self._call("worker_abort", lambda: self.cfg.worker_abort(self))
        # In the program's code, SystemExit ends the block. Do not interrupt Trio's own code, which
        # will soon run _stop.
        if not self._running or not trio.lowlevel.currently_ki_protected():
            sys.exit(1)

    def handle_usr1(self, sig: int, frame: FrameType | None) -> None:
        """Open the log files again (SIGUSR1)."""
        self._call("reopening the logs", lambda: super(TrioWorker, self).handle_usr1(sig, frame))

    def _call(self, what: str, function: Callable[[], object]) -> None:
        """In a signal handler, call code that may raise. An unhandled exception would end Trio."""
        try:
            function()
        except Exception as exc:
            message = "worker %s: %s failed"
            _guard.log(_logger, logging.ERROR, message, self.pid, what, exc_info=exc)


async def _refuse(sock: Socket) -> None:
    sock.abort()


def _tls(cfg: Config, app: App) -> TLSArgument | None:
    """Return the TLS role that gunicorn's options and the ``App`` ask for.

    Raises ValueError, which names the option, instead of ignoring a security option.
    """
    if cfg.ciphers is not None:
        raise ValueError("TrioWorker does not use --ciphers; use App(tls=ssl_context)")
    if cfg.ssl_context is not NewSSLContext.default:
        raise ValueError("TrioWorker does not use the hook ssl_context; use App(tls=ssl_context)")
    if not cfg.certfile:
        if cfg.keyfile or cfg.ca_certs or cfg.cert_reqs:
            raise ValueError("--keyfile, --ca-certs and --cert-reqs need --certfile")
        return app.tls
    if app.tls is not None:
        raise ValueError("both --certfile and App(tls=) are given: give one of them")
    if cfg.cert_reqs not in tuple(ssl.VerifyMode):
        raise ValueError(f"--cert-reqs must be 0, 1 or 2, not {cfg.cert_reqs}")
    if cfg.cert_reqs and not cfg.ca_certs:
        raise ValueError("--cert-reqs needs --ca-certs: the authorities to trust")
    return ServerTLS(
        Certificate.from_files(cfg.certfile, cfg.keyfile),
        client_ca=Path(cfg.ca_certs) if cfg.cert_reqs else None,
        require_client_certificate=cfg.cert_reqs == ssl.CERT_REQUIRED,
    )


def _trusted_proxies(cfg: Config) -> list[str] | None:
    """Return ``bind(trusted_proxies=)`` for ``--proxy-protocol`` and ``--proxy-allow-from``."""
    # The setting is a bool in older releases of gunicorn.
    if cfg.proxy_protocol in (False, "off"):
        return None
    allowed = cfg.proxy_allow_ips
    return [*(_EVERYBODY if "*" in allowed else allowed), "unix"]
