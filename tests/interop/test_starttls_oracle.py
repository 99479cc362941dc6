"""Our client and ``openssl s_client`` with the same scripted servers.

Either both clients start the TLS handshake, or both stop before it. ``DIFFERENCES`` lists the
exceptions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable

import pytest
import trio

import trisock
from helpers.programs import run
from helpers.starttls_scripts import GOOD_BEHAVIOURS, PROTOCOLS, behaviours, script
from trisock import Socket, StartTLSError, TLSError
from trisock.testing import Authority, serving

pytestmark = pytest.mark.interop

# The cases in which s_client starts TLS and our client stops, and why.
DIFFERENCES: dict[str, dict[str, str]] = {
    "unwelcome": {
        "smtp lmtp": "after 554, the server accepts only QUIT (RFC 5321, section 3.1)",
        "imap": "BYE: the server does not want this connection (RFC 9051, section 7.1.5)",
        "pop3": "the greeting must be positive (RFC 1939, section 4)",
        "sieve": "BYE: the server closes the connection (RFC 5804, section 4)",
        "ftp": "421: the server closes the connection (RFC 959, section 4.2)",
        "nntp": "502: the service is permanently unavailable (RFC 3977, section 5.1)",
    },
    "authenticated": {
        "imap": "STARTTLS is valid only before authentication (RFC 9051, section 6.2.1)",
    },
    "not offered": {
        "smtp lmtp": "the keyword STARTTLS announces TLS (RFC 3207, section 2)",
        "imap": "the capability STARTTLS announces TLS (RFC 9051, section 6.1.1)",
        "sieve": "the capability STARTTLS announces TLS (RFC 5804, section 1.7)",
    },
    "offered in other words": {
        "smtp lmtp": "a keyword is a whole word (RFC 5321, section 4.1.1.1)",
        "imap": "a capability is a whole atom (RFC 9051, section 7.2.2)",
        "sieve": "a capability's name is the first string of a line (RFC 5804, section 1.7)",
    },
    "refused": {
        "smtp lmtp": "TLS begins only after 220 (RFC 3207, section 4)",
        "imap": "TLS begins only after OK (RFC 9051, section 6.2.1)",
        "pop3": "TLS begins only after +OK (RFC 2595, section 4)",
        "ftp": "TLS begins only after 234 (RFC 4217, section 4)",
    },
    "garbage": {
        "smtp lmtp": "a reply begins with a code (RFC 5321, section 4.2)",
        "imap": "a response begins with a tag, * or + (RFC 9051, section 2.2.2)",
        "pop3": "a response begins with +OK or -ERR (RFC 1939, section 3)",
        "ftp": "a reply begins with a code (RFC 959, section 4.2)",
    },
    "early close": {
        "smtp lmtp imap pop3 ftp": "the server has not permitted TLS",
    },
    "injected": {
        "smtp lmtp imap pop3 sieve ftp nntp ldap xmpp xmpp-server irc": (
            "the byte after the go-ahead belongs to TLS (as RFC 3207, section 4, says)"
        ),
    },
    "other message": {
        "ldap": "a response has the message ID of its request (RFC 4511, section 4.1.1.1)",
    },
    "comment": {
        "xmpp xmpp-server": "a stream contains no comments (RFC 6120, section 11.1)",
    },
}


def difference(protocol: str, behaviour: str) -> str | None:
    """Return why only our client stops, or ``None`` if both clients must do the same."""
    for protocols, why in DIFFERENCES.get(behaviour, {}).items():
        if protocol in protocols.split():
            return why
    return None


async def goes_on(
    protocol: str,
    behaviour: str,
    client: Callable[[str, int], Awaitable[None]],
    *,
    is_s_client: bool,
) -> bool:
    """Return whether a client begins a TLS handshake with the scripted server."""
    received = b""

    async def serve(sock: Socket) -> None:
        nonlocal received
        with contextlib.suppress(AssertionError):  # the client has stopped
            await script(protocol, behaviour, s_client=is_s_client)(sock)
        with contextlib.suppress(trio.BrokenResourceError):
            if behaviour not in GOOD_BEHAVIOURS:
                await sock.send_eof()
            received = await sock.recv()
        sock.abort()

    async with serving(serve) as s:
        await client(protocol, s.server.port)
    return received.startswith(b"\x16\x03")  # a handshake record of TLS


async def s_client(protocol: str, port: int) -> None:
    await run("openssl", "s_client", "-starttls", protocol, "-connect", f"127.0.0.1:{port}")


@pytest.mark.needs("openssl")
@pytest.mark.parametrize(
    ("protocol", "behaviour"),
    [(protocol, behaviour) for protocol in PROTOCOLS for behaviour in behaviours(protocol)],
)
async def test_our_client_and_s_client_agree(
    protocol: str, behaviour: str, authority: Authority
) -> None:
    async def our_client(protocol: str, port: int) -> None:
        async with await trisock.connect("127.0.0.1", port) as sock:
            with pytest.raises(TLSError) as raised:
                await trisock.starttls.upgrade(sock, protocol, authority.client_tls())
        assert isinstance(raised.value, StartTLSError) is (behaviour not in GOOD_BEHAVIOURS)

    ours = await goes_on(protocol, behaviour, our_client, is_s_client=False)
    assert ours is (behaviour in GOOD_BEHAVIOURS)
    theirs = await goes_on(protocol, behaviour, s_client, is_s_client=True)
    assert theirs is (ours or difference(protocol, behaviour) is not None)
