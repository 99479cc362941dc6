"""Check one URL: connect, verify the certificate, and judge the result."""

from __future__ import annotations

import contextlib
import datetime
from dataclasses import dataclass

import trio

from .. import TLSError, TLSInfo
from .certificate import CertificateFacts, read_certificate
from .explain import INJECTABLE, UNREADABLE_DATES, explain, explain_expiry, explain_timeout
from .injected_commands import INJECTED_COMMANDS
from .injection import is_injectable
from .opening import NETWORK_ERRORS, connect_plain, open_target
from .roles import Roles
from .stages import Opening
from .urls import Target

#: The states of a URL. They are also the exit statuses of the command, as for a Nagios plugin.
GOOD, EXPIRES_SOON, BAD = 0, 1, 2


@dataclass(frozen=True)
class Result:
    """What was found out about a URL. All text is safe to show.

    Attributes:
      url: the URL as it was given.
      status: ``GOOD``, ``EXPIRES_SOON`` or ``BAD``.
      error: what is wrong and what to do, or ``None``.
      verified: whether the certificate is valid for the name, and its chain is trusted.
      version, cipher, alpn: what the handshake negotiated; ``None`` if there was no handshake.
      certificate: what the certificate says.
      days_left: whole days until the certificate expires, or ``None`` if that is not known.
      injection: whether the server executes plain-text commands inside TLS, so that an attacker
        can inject commands. ``None``: not tested.
    """

    url: str
    status: int
    error: str | None
    verified: bool
    version: str | None
    cipher: str | None
    alpn: str | None
    certificate: CertificateFacts
    days_left: int | None
    injection: bool | None


@dataclass(frozen=True)
class Options:
    """The options of the checks.

    Attributes:
      roles: the TLS roles.
      timeout: the limit for one URL, in seconds, from the name look-up to the end of the check.
      warn_days: a certificate with fewer days left is ``EXPIRES_SOON``.
      injection: whether to run the injection test.
    """

    roles: Roles
    timeout: float
    warn_days: int
    injection: bool


@dataclass
class _Seen:
    """What the check has found so far. After a timeout, this is incomplete."""

    opening: Opening
    tls: TLSInfo | None = None
    failure: Exception | None = None
    injection: bool | None = None


async def check(target: Target, options: Options) -> Result:
    """Check a URL. Whatever the network does, this returns a result.

    A certificate that fails verification is shown as well: a second connection fetches it without
    verification.
    """
    seen = _Seen(Opening())
    with trio.move_on_after(options.timeout):
        await _look(target, options.roles, seen)
        protocol = target.scheme.protocol
        if options.injection and seen.tls is not None and protocol in INJECTED_COMMANDS:
            await _inject(target, protocol, options.roles, seen)
    result = _judge(target, options, seen)
    seen.failure = None  # its traceback refers to a frame that refers to ``seen``
    return result


async def _look(target: Target, roles: Roles, seen: _Seen) -> None:
    try:
        await _handshake(target, roles, seen, verify=True)
    except NETWORK_ERRORS as exc:
        seen.failure = exc
        if isinstance(exc, TLSError) and exc.verify_code is not None:
            with contextlib.suppress(*NETWORK_ERRORS):
                await _handshake(target, roles, seen, verify=False)


async def _handshake(target: Target, roles: Roles, seen: _Seen, *, verify: bool) -> None:
    sock = await open_target(target, roles, target.scheme.alpn, seen.opening, verify=verify)
    seen.tls = sock.tls
    with contextlib.suppress(*NETWORK_ERRORS):  # a failed close is no fault
        await sock.close()


async def _inject(target: Target, protocol: str, roles: Roles, seen: _Seen) -> None:
    with contextlib.suppress(*NETWORK_ERRORS):  # the second connection may fail
        sock = await connect_plain(target, seen.opening)
        seen.injection = False  # the result if the server does not answer in time
        seen.injection = await is_injectable(sock, protocol, roles.role((), verify=False))


def _judge(target: Target, options: Options, seen: _Seen) -> Result:
    now = datetime.datetime.now(datetime.timezone.utc)
    facts = read_certificate(None if seen.tls is None else seen.tls.peer_certificate)
    days = facts.days_left(now)
    status, error = BAD, None
    if seen.failure is not None:
        name = options.roles.name or target.host
        error = explain(seen.failure, facts, name, target, now)
    elif seen.tls is None:
        text = explain_timeout(seen.opening.stage, options.timeout, target)
        error = f"{text}, or allow more with --timeout"
    elif seen.injection:
        error = INJECTABLE
    elif days is None or facts.not_after is None:
        error = UNREADABLE_DATES
    elif days < options.warn_days:
        status, error = EXPIRES_SOON, explain_expiry(days, facts.not_after)
    else:
        status = GOOD
    return Result(
        url=target.url,
        status=status,
        error=error,
        verified=seen.tls is not None and seen.failure is None,
        version=None if seen.tls is None else seen.tls.version,
        cipher=None if seen.tls is None else seen.tls.cipher,
        alpn=None if seen.tls is None else seen.tls.alpn_protocol,
        certificate=facts,
        days_left=days,
        injection=seen.injection,
    )
