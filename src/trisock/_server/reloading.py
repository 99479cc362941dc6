"""What a service does on SIGHUP: reload the certificates, and call the program's function."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable

import trio

from .. import _guard
from .._tls.roles import ServerTLS

_logger = logging.getLogger("trisock.server")


async def reload_all(roles: Iterable[ServerTLS], on_reload: Callable[[], object] | None) -> None:
    """Reload each role once, then call ``on_reload``, sync or async.

    Each ``Exception`` is logged. Other exceptions propagate.
    """
    # Equal roles are different objects with certificates of their own.
    each_once = {id(each): each for each in roles}.values()
    changed = failed = 0
    for role in each_once:
        try:
            # In a thread, because a file may block, for example on a network mount. A stop does not
            # wait for it.
            changed += await trio.to_thread.run_sync(role.reload, abandon_on_cancel=True)
        except (OSError, ValueError) as exc:  # its text says which file, and why
            failed += 1
            message = "cannot reload a certificate, so the old one stays in use: %s"
            _guard.log(_logger, logging.ERROR, message, _guard.text(exc))
        except Exception as exc:
            failed += 1
            _log("cannot reload a certificate, so the old one stays in use", exc)
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
        _log("on_reload failed", errors)
    if rest is failure:
        raise failure
    if rest is not None:
        raise rest from None


def _log(message: str, exc: BaseException) -> None:
    _guard.log(_logger, logging.ERROR, message, exc_info=exc)
