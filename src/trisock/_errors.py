"""The errors that are trisock's own.

Everything else is Trio's (``BrokenResourceError``, ``ClosedResourceError``,
``BusyResourceError``) or the system's (``OSError``).
"""

from __future__ import annotations

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
