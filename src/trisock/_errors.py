"""trisock's own exceptions.

trisock also raises Trio's exceptions (``BrokenResourceError``, ``ClosedResourceError``,
``BusyResourceError``) and the system's (``OSError``).
"""

from __future__ import annotations

import re
import ssl
import weakref
from typing import Any, Literal, TypeAlias

import trio

from ._address import Address
from ._text import message_without_peer, set_message


class TLSError(trio.BrokenResourceError):
    """TLS failed; the message says why in plain words.

    ``starttls`` and ``stoptls`` close the socket before they raise this error. A read or a send
    raises it if the peer has broken the encrypted stream with an alert, a forged record, or an EOF
    without ``close_notify``.

    Attributes:
      reason: OpenSSL's name for the error, such as ``"CERTIFICATE_VERIFY_FAILED"``. ``None`` if the
        error did not come from OpenSSL (such as a timeout or an EOF).
      verify_code: OpenSSL's verify code (an ``X509_V_ERR`` constant): 9 means not yet valid, 10
        means expired, 2 and 18 to 21 mean an untrusted issuer, 62 means a wrong host name, 64 means
        a wrong IP address. ``None`` unless this side rejected the peer's certificate.
    """

    def __init__(
        self, message: str, *, reason: str | None = None, verify_code: int | None = None
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.verify_code = verify_code


#: Why a negotiation failed. ``StartTLSError.kind`` explains each value.
StartTLSFailure: TypeAlias = Literal["not offered", "refused", "violation", "timeout", "closed"]


class StartTLSError(TLSError):
    """The negotiation before TLS failed (``trisock.starttls``). The socket is closed.

    Attributes:
      protocol: the protocol, such as ``"smtp"``.
      kind: why it failed.

        - ``"not offered"``: the server does not support STARTTLS, or has disabled it.
        - ``"refused"``: the peer refused. For a client: the server rejected the connection in its
          greeting, or refused the request. For a server: the client quit, or continued without TLS.
        - ``"violation"``: the peer broke the protocol's rules, exceeded a limit, or sent extra
          bytes where TLS must begin.
        - ``"timeout"``: the negotiation timed out. (A handshake that times out raises a plain
          ``TLSError``.)
        - ``"closed"``: the peer ended the session, or the connection broke.
      offered: whether the server offered STARTTLS. ``None`` if the negotiation failed before this
        was known, or if the protocol has no way to ask.
      reply: the server's reply, or ``None``. The reply is not authenticated. The error's message
        shows the beginning of the reply, with control characters escaped.
    """

    def __init__(
        self,
        message: str,
        *,
        protocol: str = "",
        kind: StartTLSFailure = "violation",
        offered: bool | None = None,
        reply: bytes | None = None,
    ) -> None:
        super().__init__(message)
        self.protocol = protocol
        self.kind: StartTLSFailure = kind
        self.offered = offered
        self.reply = reply

    def __reduce__(self) -> tuple[Any, ...]:
        state = {name: value for name, value in vars(self).items() if name != "_socket"}
        return type(self), self.args, state


def blame_peer(error: StartTLSError, socket: trio.socket.SocketType) -> None:
    """Record that this socket's peer caused the error, so a server does not blame its handler."""
    vars(error)["_socket"] = weakref.ref(socket)


def is_peer_to_blame(error: StartTLSError, socket: trio.socket.SocketType) -> bool:
    """Return whether ``blame_peer`` was called with this error and this socket."""
    noted = vars(error).get("_socket")
    return noted is not None and noted() is socket


class IncompleteReadError(EOFError):
    """The stream ended before all of the requested data had arrived.

    The bytes that did arrive are not lost: the next read returns them. The message and ``repr``
    show only how many bytes arrived, because the bytes may contain part of a password.

    Attributes:
      partial: the bytes that arrived.
      expected: how many bytes were requested, or ``None`` if the read was waiting for a delimiter.
      at_boundary: whether the stream ended between two lines, frames or messages: no byte of the
        requested data had arrived.
    """

    def __init__(self, partial: bytes, expected: int | None) -> None:
        self._partial = partial
        self._entries: list[tuple[bytes, int]] = []
        self.expected = expected
        self._describe(len(partial))

    def _describe(self, size: int, sender: str = "") -> None:
        wanted = "the delimiter" if self.expected is None else f"{self.expected} bytes"
        self.at_boundary = size == 0
        # Only the message is in args, because repr() and many log formatters show args.
        end = f" ended after {size} bytes, before {wanted} arrived"
        set_message(self, f"the stream{sender}{end}", without_peer=f"the stream{end}")

    @property
    def partial(self) -> bytes:
        """The bytes that arrived."""
        if self._entries:
            self._partial = b"".join(chunk[start:] for chunk, start in self._entries)
            self._entries = []
        return self._partial

    def __reduce__(self) -> tuple[object, ...]:
        own = ("_partial", "_entries", "expected")
        state = {name: value for name, value in self.__dict__.items() if name not in own}
        # After skip_until, the message and at_boundary cannot be derived from partial.
        return type(self), (self.partial, self.expected), {**state, "args": self.args}


def new_incomplete_read_error(
    entries: list[tuple[bytes, int]], size: int, expected: int | None, peer: Address
) -> IncompleteReadError:
    """Return an error whose ``partial`` is the unread bytes of the given entries.

    ``size``: how many bytes of the requested data arrived. This is the total size of the entries,
    unless the read has dropped bytes (``skip_until``).

    The chunks are joined only when ``partial`` is read. A program may get this error, read one byte
    and retry, again and again. If the chunks were joined here, each retry would copy all of them.
    """
    error = IncompleteReadError(b"", expected)
    error._entries = entries
    error._describe(size, f" from {peer}")
    return error


class LimitExceededError(Exception):
    """A read found no delimiter within its limit, or a frame is longer than its limit.

    No data is lost: the next read returns the data. To continue after a line that is too long, a
    server can drop the line with ``skip_until``.

    Attributes:
      limit: the ``max_bytes`` that was exceeded.
      frame_length: the length of the frame's body, or ``None`` if the read was waiting for a
        delimiter.
    """

    def __init__(self, limit: int, *, frame_length: int | None = None) -> None:
        self.limit = limit
        self.frame_length = frame_length
        self._describe()

    def _describe(self, sender: str = "", advice: str = "") -> None:
        if self.frame_length is None:
            what, why = f"no delimiter within {self.limit} bytes", ""
        else:
            what = f"a frame of {self.frame_length} bytes"
            why = f" exceeds the limit of {self.limit} bytes"
        set_message(self, what + sender + why + advice, without_peer=what + why + advice)

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.limit,), {**self.__dict__, "args": self.args}


def new_limit_exceeded_error(
    limit: int, peer: Address, *, frame_length: int | None = None
) -> LimitExceededError:
    """Return an error whose text names the peer."""
    error = LimitExceededError(limit, frame_length=frame_length)
    instead = "drop the data with skip_until" if frame_length is None else "close the connection"
    error._describe(f" from {peer}", f": raise max_bytes, or {instead}")
    return error


class IdleTimeoutError(trio.TooSlowError):
    """The peer sent nothing for the ``timeout`` of ``Socket.idle``.

    No data is lost, and the socket stays open: the handler may send a last message before it
    returns.

    Attributes:
      at_boundary: whether no byte of a request had arrived.
    """

    def __init__(self, *args: object, at_boundary: bool = True) -> None:
        super().__init__(*args)
        self.at_boundary = at_boundary


class ServerClosing(Exception):
    """The server is stopping, and the peer has not begun a request (see ``Socket.idle``).

    ``bind`` treats this error as a normal end of the handler. The socket is still open, so a
    handler can catch the error and send a last message.
    """


def unraised_copy(failure: trio.BrokenResourceError) -> trio.BrokenResourceError:
    """Return an equal error that was never raised.

    A connection stores one copy of an error and raises another copy. A raised error refers to the
    connection, through the frames of its traceback. If the connection also stored the raised copy,
    the error and the connection would form a reference cycle.
    """
    copied = trio.BrokenResourceError()
    if isinstance(failure, TLSError):
        copied = TLSError("", reason=failure.reason, verify_code=failure.verify_code)
    without_peer = message_without_peer(failure) or str(failure)
    return set_message(copied, str(failure), without_peer=without_peer)


# ---- ssl.SSLError in plain words ----

# If the peer does not speak TLS, OpenSSL takes the peer's first bytes for a TLS record and reports
# one of these reasons.
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

# OpenSSL's verify codes (x509_vfy.h): the certificate is not yet valid or has expired; the chain
# does not end in a trusted certificate; the certificate has other host names or IP addresses.
_NOT_VALID_NOW = {9, 10}
_UNTRUSTED_ISSUER = {18, 19, 20, 21}
_OTHER_NAME = {62, 64}

#: Appended to the message about a certificate that is not yet valid or has expired.
CHECK_CLOCK = " (or this machine's clock is wrong)"

# Explanations of alerts whose names say too little.
_ALERTS = {
    "unknown ca": " (it does not trust our certificate, or our chain lacks an intermediate)",
    "certificate required": " (it wants a client certificate: pass ClientTLS(certificate=...))",
}

_DESCRIPTIONS = {
    "UNSUPPORTED_PROTOCOL": "the peer supports no TLS version that we accept",
    "VERSION_TOO_LOW": "the peer supports no TLS version that we accept",
    "NO_PROTOCOLS_AVAILABLE": "the context allows no TLS version",
    "NO_SHARED_CIPHER": "the two sides share no cipher that fits the server's certificate",
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "the peer sent no certificate, but one is required",
    "NO_APPLICATION_PROTOCOL": "the two sides share no ALPN protocol",
    "APPLICATION_DATA_AFTER_CLOSE_NOTIFY": "the peer was still sending encrypted data",
    "DECRYPTION_FAILED_OR_BAD_RECORD_MAC": "a record was forged or damaged",
    # OpenSSL 3.6 reports this in place of the reason, such as a wrong MAC or an empty record.
    "RECORD_LAYER_FAILURE": "a record was invalid, forged or damaged",
    "UNEXPECTED_EOF_WHILE_READING": "the peer closed the connection",
}


def ssl_reason(exc: ssl.SSLError) -> str:
    """Return OpenSSL's name for the error, or ``""``.

    Python's table of names has gaps, such as the no_application_protocol alert. If an error is
    missing in the table, we take the name from the message.
    """
    if exc.reason:
        return exc.reason
    found = re.match(r"\[SSL\] (.+) \(", str(exc))
    return found[1].upper().replace(" ", "_") if found else ""


def describe_ssl_error(exc: ssl.SSLError, *, server_side: bool = False) -> str:
    """Describe an SSLError in plain words. ``server_side``: whether this side is the TLS server."""
    if isinstance(exc, ssl.SSLZeroReturnError):
        return "the peer ended TLS"
    if isinstance(exc, ssl.SSLCertVerificationError):
        text = f"the certificate was refused: {exc.verify_message}"
        if exc.verify_code in _NOT_VALID_NOW:
            text += CHECK_CLOCK
        elif exc.verify_code in _UNTRUSTED_ISSUER:
            argument = "ServerTLS(client_ca=...)" if server_side else "ClientTLS(ca=...)"
            text += f" (if you trust its issuer, pass the issuer to {argument})"
        elif exc.verify_code in _OTHER_NAME:
            text += " (the name must be in its subjectAltName)"
        return text
    reason = ssl_reason(exc)
    if reason in _NOT_TLS:
        return f"the peer does not speak TLS ({_to_words(reason)})"
    if reason in _DESCRIPTIONS:
        return _DESCRIPTIONS[reason]
    if alert := re.match(r"(?:SSLV3|TLSV1|TLSV13)_(?:ALERT_)?(.+)", reason):
        name = _to_words(alert[1])
        return f"the peer refused, with the alert '{name}'{_ALERTS.get(name, '')}"
    return _to_words(reason) or str(exc)


def _to_words(reason: str) -> str:
    return reason.lower().replace("_", " ")
