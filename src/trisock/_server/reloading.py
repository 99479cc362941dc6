"""On SIGHUP, reload the certificates of a service, and call the program's ``on_reload``."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable
from typing import cast

import trio

from .. import _guard
from .._tls.certificate import Certificate, listed
from .._tls.roles import ServerTLS

_logger = logging.getLogger("trisock.server")


async def reload_all(roles: Iterable[ServerTLS], on_reload: Callable[[], object] | None) -> None:
    """Reload each role once, then call ``on_reload``, which may be sync or async.

    Each ``Exception`` is logged. Other exceptions propagate.
    """
    # Tell roles apart by identity: equal roles are separate objects, and each one reads its files.
    each_once = {id(each): each for each in roles}.values()
    changed = failed = 0
    for role in each_once:
        try:
            # Use a thread, because a read of a file may block, for example on a network mount. A
            # stop does not wait for the thread.
            changed += await trio.to_thread.run_sync(role.reload, abandon_on_cancel=True)
        except Exception as exc:
            failed += 1
            message = "SIGHUP: cannot reload the certificate of %s; the old one stays in use: %s"
            # The text of an OSError or ValueError is enough: it names the file and the reason.
            expected = isinstance(exc, (OSError, ValueError))
            _log(message, None if expected else exc, _names(role), _guard.text(exc))
    message = "SIGHUP: %s of %s TLS roles have a new certificate, and %s could not be reloaded"
    _guard.log(_logger, logging.INFO, message, str(changed), str(len(each_once)), str(failed))
    if on_reload is None:
        return

    async def call() -> None:
        result = on_reload()
        if inspect.isawaitable(result):
            await result

    try:
        await _guard.isolated(call)
    except BaseException as exc:
        _log_or_raise(exc)


def _log_or_raise(failure: BaseException) -> None:
    errors, rest = _guard.split_errors(failure)
    if errors is not None:
        end = "; the service goes on" if rest is None else ""
        _log(f"SIGHUP: on_reload failed{end}", errors)
    if rest is not None:
        _guard.raise_again(rest)


def _log(message: str, exc: BaseException | None, *args: object) -> None:
    _guard.log(_logger, logging.ERROR, message, *args, exc_info=exc)


def _names(role: ServerTLS) -> str:
    """Return the first name of each certificate of a role, for the log."""
    certificates = cast("tuple[Certificate, ...]", role.certificates)
    return ", ".join(listed(each.names[:1]) or "no DNS name" for each in certificates)
