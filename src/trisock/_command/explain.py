"""Say in plain English what is wrong with a server, and what to do (no I/O)."""

from __future__ import annotations

import datetime
import errno
import socket

from .. import StartTLSError, TLSError
from .._text import format_seconds, printable
from .certificate import CertificateFacts
from .stages import Stage
from .urls import Target, implicit_scheme

# The verify codes of OpenSSL (x509_vfy.h).
_NOT_YET_VALID, _EXPIRED, _SELF_SIGNED = 9, 10, 18
_UNTRUSTED = (19, 20, 21)
_WRONG_NAME, _WRONG_ADDRESS = 62, 64

# OpenSSL's reasons for a peer whose first bytes are not TLS.
_NOT_TLS = ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "PACKET_LENGTH_TOO_LONG")

_CHECK_RESOLVER = "check the name, and the resolver of this machine"

# Advice for a server that sends nothing before TLS.
_IMPLICIT_TLS = "check the port, or write {}:// if it expects TLS from the start"

_ADVICE_BY_ERRNO = {
    errno.ECONNREFUSED: "nothing listens there, or a firewall refuses: check the host and the port",
    errno.ETIMEDOUT: "check the host and the port",
    errno.EHOSTUNREACH: "check the address and the network",
    errno.ENETUNREACH: "check the address and the network",
    errno.EMFILE: "this program cannot open more files: use a lower --parallel",
}

#: A message shows at most this many names of a certificate.
MAX_NAMES = 3


def explain(
    error: Exception, facts: CertificateFacts, name: str, target: Target, now: datetime.datetime
) -> str:
    """Say what an error means, and what to do.

    Args:
      error: why the connection failed.
      facts: the server's certificate, if it is known.
      name: the name that the certificate must have.
      target: the URL.
      now: the current time.
    """
    if isinstance(error, TLSError) and error.verify_code is not None:
        return explain_verification(error.verify_code, str(error), facts, name, now)
    text, advice = printable(_text(error)), _advice(error, target)
    return f"{text}: {advice}" if advice else text


def _text(error: Exception) -> str:
    if isinstance(error, OSError):
        text = error.strerror or str(error)
        if error.filename is None:
            return text
        return f"cannot connect to {error.filename}: {text.removeprefix('cannot connect: ')}"
    return str(error) or type(error).__name__


def _advice(error: Exception, target: Target) -> str | None:
    """Return what to do, or ``None`` if there is no advice for this error."""
    if isinstance(error, StartTLSError):
        if error.kind == "not offered":
            return "turn it on in the server, or check the port"
        if error.kind == "closed" and error.offered is None:
            return _IMPLICIT_TLS.format(implicit_scheme(target))
    elif isinstance(error, TLSError):
        if error.reason in _NOT_TLS and target.scheme.protocol is None:
            return "if its protocol begins in plain text, name the protocol, as in imap://HOST"
    elif isinstance(error, socket.gaierror):
        # EAI_AGAIN: no name server has answered.
        return _CHECK_RESOLVER if error.errno == socket.EAI_AGAIN else "check the name"
    elif isinstance(error, OSError):
        return _ADVICE_BY_ERRNO.get(error.errno or 0)
    return None


def explain_verification(
    code: int, text: str, facts: CertificateFacts, name: str, now: datetime.datetime
) -> str:
    """Say why a certificate was refused.

    Args:
      code: OpenSSL's verify code.
      text: OpenSSL's text, which is used for rare codes.
      facts, name, now: as in ``explain``.
    """
    name = printable(name)
    if code in (_WRONG_NAME, _WRONG_ADDRESS):
        return _explain_wrong_name(facts, name)
    if code == _EXPIRED and facts.not_after is not None and facts.not_after < now:
        return (
            f"the certificate expired on {facts.not_after:%Y-%m-%d}: renew it, and make the server "
            "load it"
        )
    if code == _EXPIRED and facts.not_after is not None:
        return "a certificate of the chain has expired: replace it in the chain of the server"
    if code == _EXPIRED:
        return "a certificate has expired: renew the server's, or replace the one in its chain"
    if code == _NOT_YET_VALID and facts.not_before is not None and facts.not_before > now:
        return (
            f"the certificate is not valid before {facts.not_before:%Y-%m-%d %H:%M} UTC: check the "
            "clocks of both machines"
        )
    if code == _SELF_SIGNED:
        return (
            "the certificate is self-signed, and not trusted here: get one from an authority, or "
            "trust it with --ca FILE"
        )
    if code in _UNTRUSTED:
        issuer = f"was issued by {facts.issuer}, which" if facts.issuer else "has an issuer that"
        return (
            f"the certificate {issuer} is not trusted here: make the server send its intermediate "
            "certificates too, or trust the authority with --ca FILE"
        )
    return printable(text)


def _explain_wrong_name(facts: CertificateFacts, name: str) -> str:
    names, where = "", " in its subjectAltName"
    if facts.names:
        names, where = f"for {listed(facts.names)}, ", ""
    elif facts.not_after is not None:  # the certificate is known
        return (
            "the certificate has no subjectAltName with a host name, and clients ignore a common "
            f"name: get one that has {name} in its subjectAltName"
        )
    return (
        f"the certificate is {names}not for {name}: get one that also names it{where}, or check "
        "the name that clients use (--name)"
    )


def explain_expiry(days: int, not_after: datetime.datetime) -> str:
    """Say that a valid certificate expires soon."""
    when = {0: "today", 1: "in 1 day"}.get(days, f"in {days} days")
    return (
        f"the certificate expires {when}, on {not_after:%Y-%m-%d}: renew it, and make the server "
        "load it"
    )


def explain_timeout(stage: Stage, seconds: float, target: Target) -> str:
    """Say that a server did not answer in time, and what to do.

    Args:
      stage: how far the opening of the connection had come.
      seconds: the limit.
      target: the URL.
    """
    advice = "check the host and the port"
    if stage is Stage.LOOK_UP:
        advice = _CHECK_RESOLVER
    elif stage is Stage.GREETING:
        advice = _IMPLICIT_TLS.format(implicit_scheme(target))
    return f"no answer within {format_seconds(seconds)}, {stage.value}: {advice}"


UNREADABLE_DATES = "the dates of the certificate cannot be read: replace it"

INJECTABLE = (
    "inside TLS, the server executes a command that came in plain text with STARTTLS: an attacker "
    "can inject commands (CVE-2011-0411), so update the server"
)


def listed(names: tuple[str, ...]) -> str:
    """Return the names of a certificate as text: at most ``MAX_NAMES``, and how many more."""
    if not names:
        return "no name"
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more
