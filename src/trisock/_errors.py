"""The errors that are trisock's own.

Everything else is Trio's (``BrokenResourceError``, ``ClosedResourceError``,
``BusyResourceError``) or the system's (``OSError``).
"""

from __future__ import annotations

import re
import ssl

import trio


class TLSError(trio.BrokenResourceError):
    """TLS failed; the text says in words what was wrong.

    Raised by ``starttls`` and ``stoptls`` (the socket is closed by then), and
    by reads and sends when the peer broke the encrypted stream: an alert, a
    forged record, an end without ``close_notify``.

    Attributes:
      reason: OpenSSL's name for what happened, such as
          ``"CERTIFICATE_VERIFY_FAILED"``, or ``None`` where OpenSSL was not
          what failed (a timeout, a connection that ended).
      verify_code: OpenSSL's X509 verify code (``62`` is a host name that does
          not match), or ``None`` where no certificate was refused here.
    """

    def __init__(
        self, message: str, *, reason: str | None = None, verify_code: int | None = None
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.verify_code = verify_code


class IncompleteReadError(EOFError):
    """The stream ended before everything that was asked for had come.

    The bytes that did come are not lost: the next read returns them. The text and the ``repr`` of
    the error show how many there are, and never the bytes: they may be half a password.

    Attributes:
      partial: the bytes that are there, as ``bytes``.
      expected: how many bytes were asked for, or ``None`` where the read was
          waiting for a delimiter.
    """

    def __init__(self, partial: bytes, expected: int | None) -> None:
        self._partial = partial
        self._entries: list[tuple[bytes, int]] = []
        self.expected = expected
        self._describe(len(partial))

    @classmethod
    def _in_pieces(
        cls, entries: list[tuple[bytes, int]], size: int, expected: int | None
    ) -> IncompleteReadError:
        """Make one whose ``partial`` is in chunks, each with its start.

        They are joined when somebody asks: a program that tries again after each byte that it takes
        would otherwise copy all of them each time.
        """
        error = cls(b"", expected)
        error._entries = entries
        error._describe(size)
        return error

    def _describe(self, size: int) -> None:
        wanted = "the delimiter" if self.expected is None else f"{self.expected} bytes"
        # The text is the only argument: args are what repr() and many log formatters show.
        self.args = (f"the stream ended after {size} bytes, before {wanted} had come",)

    @property
    def partial(self) -> bytes:
        """The bytes that are there."""
        if self._entries:
            self._partial = b"".join(chunk[start:] for chunk, start in self._entries)
            self._entries = []
        return self._partial

    def __reduce__(self) -> tuple[object, ...]:
        own = ("_partial", "_entries", "expected")
        state = {name: value for name, value in self.__dict__.items() if name not in own}
        return type(self), (self.partial, self.expected), state or None


class LimitExceededError(Exception):
    """A delimiter did not come within the limit given to the read.

    No byte is lost: the next read returns them.

    Attributes:
      limit: the ``max_bytes`` that was exceeded.
    """

    def __init__(self, limit: int) -> None:
        super().__init__(limit)
        self.limit = limit

    def __str__(self) -> str:
        return f"no delimiter within {self.limit} bytes"


# ---- what an ssl.SSLError means ----

# OpenSSL's reasons for a peer that does not speak TLS: what its first bytes looked like.
_NOT_TLS = {
    "WRONG_VERSION_NUMBER",
    "HTTP_REQUEST",
    "HTTPS_PROXY_REQUEST",
    "UNKNOWN_PROTOCOL",
    "PACKET_LENGTH_TOO_LONG",
    "RECORD_LENGTH_MISMATCH",
    "UNEXPECTED_MESSAGE",
    "BAD_RECORD_TYPE",
}

_IN_WORDS = {
    "UNSUPPORTED_PROTOCOL": "the peer speaks no TLS version that is accepted here",
    "VERSION_TOO_LOW": "the peer speaks no TLS version that is accepted here",
    "NO_PROTOCOLS_AVAILABLE": "the context allows no TLS version",
    "NO_SHARED_CIPHER": "the two sides share no cipher, or no certificate that fits one",
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "the peer showed no certificate, and one is required",
    "NO_APPLICATION_PROTOCOL": "the two sides share no ALPN protocol",
    "APPLICATION_DATA_AFTER_CLOSE_NOTIFY": "the peer was still sending encrypted data",
    "DECRYPTION_FAILED_OR_BAD_RECORD_MAC": "a record was forged or damaged",
    "UNEXPECTED_EOF_WHILE_READING": "the peer closed the connection",
}


def ssl_reason(exc: ssl.SSLError) -> str:
    """Return OpenSSL's name for it, if there is one.

    Python's table of them has gaps, such as the alert that there is no ALPN protocol: there the
    text alone says it.
    """
    if exc.reason:
        return exc.reason
    found = re.match(r"\[SSL\] (.+) \(", str(exc))
    return found[1].upper().replace(" ", "_") if found else ""


def describe_ssl_error(exc: ssl.SSLError) -> str:
    """Say in words what an SSLError means."""
    if isinstance(exc, ssl.SSLZeroReturnError):
        return "the peer ended it"
    if isinstance(exc, ssl.SSLCertVerificationError):
        return f"the certificate was refused: {exc.verify_message}"
    reason = ssl_reason(exc)
    if reason in _NOT_TLS:
        return f"the peer does not speak TLS ({_spaced(reason)})"
    if reason in _IN_WORDS:
        return _IN_WORDS[reason]
    if alert := re.match(r"(?:SSLV3|TLSV1|TLSV13)_(?:ALERT_)?(.+)", reason):
        return f"the peer refused, with the alert '{_spaced(alert[1])}'"
    return _spaced(reason) or str(exc)


def _spaced(reason: str) -> str:
    return reason.lower().replace("_", " ")
