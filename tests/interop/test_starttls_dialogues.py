"""Each protocol's upgrade to TLS, message by message, and attacks that inject messages."""

from __future__ import annotations

import logging
import re
import socket
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

import trisock
from helpers import starttls_databases as databases
from helpers import starttls_ftp
from helpers import starttls_servers as servers
from helpers.ldap_client import ber
from helpers.pairs import all_served
from helpers.postgres_client import message
from helpers.programs import run
from helpers.starttls_databases import ldap_message
from helpers.starttls_servers import Site
from helpers.starttls_sites import Server, serving
from helpers.tls_clients import usually_the_newest
from helpers.tls_programs import OPENSSL_VERSIONS
from trisock import IncompleteReadError, Socket, TLSError
from trisock.testing import Authority


@dataclass(frozen=True)
class Dialogue:
    """The messages of a client that upgrades to TLS, and the server's replies.

    Attributes:
      before: the client's messages before STARTTLS, each paired with the end of the server's reply.
      starttls: the client's request for TLS.
      go_ahead: the server's reply to this request.
      last: the client's last message, sent after the upgrade.
      reply: the end of the server's reply to the last message.
    """

    server: Server
    before: tuple[tuple[bytes, bytes], ...]
    starttls: bytes
    go_ahead: bytes
    last: bytes
    reply: bytes

    async def request_tls(self, sock: Socket, injected: bytes = b"") -> None:
        for command, end_of_reply in self.before:
            await sock.send(command)
            await sock.recv_until(end_of_reply)
        await sock.send(self.starttls + injected)
        assert await sock.recv_exactly(len(self.go_ahead)) == self.go_ahead

    async def grant_tls(self, sock: Socket, injected: bytes) -> None:
        for command, reply in self.before:
            assert await sock.recv_exactly(len(command)) == command
            await sock.send(reply)
        assert await sock.recv_exactly(len(self.starttls)) == self.starttls
        await sock.send(self.go_ahead + injected)


STARTTLS = b"STARTTLS\r\n"
QUIT = b"QUIT\r\n"
OPEN_STREAM = b"<stream:stream to='localhost'>"
XMPP = Dialogue(
    servers.xmpp,
    ((OPEN_STREAM, b"</stream:features>"),),
    b"<starttls xmlns='urn:ietf:params:xml:ns:xmpp-tls'/>",
    b"<proceed xmlns='urn:ietf:params:xml:ns:xmpp-tls'/>",
    OPEN_STREAM + b"</stream:stream>",
    b"</stream:features></stream:stream>",
)
# The keys are OpenSSL's names of the protocols.
DIALOGUES = {
    "smtp": Dialogue(
        servers.smtp,
        ((b"", b"220 localhost ESMTP\r\n"), (b"EHLO client\r\n", b"250 STARTTLS\r\n")),
        *(STARTTLS, b"220 Go ahead\r\n", QUIT, b"221 goodbye\r\n"),
    ),
    "lmtp": Dialogue(
        servers.lmtp,
        ((b"", b"220 localhost LMTP\r\n"), (b"LHLO client\r\n", b"250 STARTTLS\r\n")),
        *(STARTTLS, b"220 Go ahead\r\n", QUIT, b"221 goodbye\r\n"),
    ),
    "pop3": Dialogue(
        servers.pop3,
        ((b"", b"+OK ready\r\n"),),
        *(b"STLS\r\n", b"+OK begin TLS\r\n", QUIT, b"+OK goodbye\r\n"),
    ),
    "imap": Dialogue(
        servers.imap,
        ((b"", b"ready\r\n"), (b". CAPABILITY\r\n", b". OK done\r\n")),
        *(b". STARTTLS\r\n", b". OK begin TLS\r\n"),
        *(b". LOGOUT\r\n", b"* BYE goodbye\r\n. OK done\r\n"),
    ),
    "ftp": Dialogue(
        starttls_ftp.ftp,
        ((b"", b"220 ready\r\n"),),
        *(b"AUTH TLS\r\n", b"234 go ahead\r\n", QUIT, b"221 goodbye\r\n"),
    ),
    "nntp": Dialogue(
        servers.nntp,
        ((b"", b"200 ready\r\n"), (b"CAPABILITIES\r\n", b"\r\n.\r\n")),
        *(STARTTLS, b"382 go ahead\r\n", QUIT, b"205 goodbye\r\n"),
    ),
    "sieve": Dialogue(
        servers.sieve,
        ((b"", b'OK "ready"\r\n'),),
        *(STARTTLS, b'OK "go ahead"\r\n', b"LOGOUT\r\n", b'OK "goodbye"\r\n'),
    ),
    "irc": Dialogue(
        servers.irc,
        (),
        *(STARTTLS, b":localhost 670 * :go ahead\r\n", QUIT, b"ERROR :goodbye\r\n"),
    ),
    "telnet": Dialogue(
        servers.telnet,
        ((b"", servers.DO_START_TLS),),
        *(servers.WILL_START_TLS + servers.TLS_FOLLOWS, servers.TLS_FOLLOWS),
        *(b"hello\r\n", b"received hello\r\n"),
    ),
    "xmpp": XMPP,
    "xmpp-server": XMPP,
    "ldap": Dialogue(
        databases.ldap,
        (),
        ldap_message(b"\1", 0x77, ber(0x80, databases.START_TLS)),
        ldap_message(b"\1", 0x78, *databases.SUCCESS),
        ldap_message(b"\2", 0x63) + ldap_message(b"\3", 0x42),
        ldap_message(b"\2", 0x65, *databases.SUCCESS),
    ),
    "postgres": Dialogue(
        databases.postgres,
        (),
        *(databases.SSL_REQUEST, b"S"),
        b"\0\0\0\x0e\0\3\0\0user\0\0" + message(b"X"),
        message(b"Z", b"I"),
    ),
    "mysql": Dialogue(
        databases.mysql,
        ((b"", databases.MYSQL_GREETING),),
        databases.mysql_packet(1, b"\0\x8a" + bytes(30)),
        b"",
        databases.mysql_packet(2, b"let me in") + databases.mysql_packet(0, b"\1"),
        databases.mysql_packet(3, b"\0\0\0\2\0\0\0"),
    ),
}


each_protocol = pytest.mark.parametrize("protocol", DIALOGUES)


async def output_of(dialogue: Dialogue, *command: str) -> bytes:
    """Run a program that upgrades to TLS and sends ``dialogue.last``. Return its output."""
    done = await run(*command, stdin=dialogue.last)
    assert done.returncode == 0, done.stderr
    assert dialogue.reply in done.stdout
    return done.stdout


@pytest.mark.needs("openssl")
async def test_every_starttls_protocol_of_openssl_is_covered() -> None:
    done = await run("openssl", "s_client", "-starttls", "?")
    known = done.stderr.decode().partition("must be one of:")[2].split()
    assert "smtp" in known
    assert set(known) <= set(DIALOGUES)


@pytest.mark.needs("openssl")
@usually_the_newest
@each_protocol
async def test_openssl_upgrades_in_each_protocol(
    protocol: str, version: str, site: Site, pem: Path
) -> None:
    dialogue = DIALOGUES[protocol]
    async with serving(dialogue.server, site) as bound:
        output = await output_of(
            dialogue,
            *("openssl", "s_client", "-starttls", protocol, OPENSSL_VERSIONS[version]),
            *("-connect", f"127.0.0.1:{bound.port}", "-verify_hostname", "localhost"),
            *("-CAfile", f"{pem}/ca.pem", "-verify_return_error", "-ign_eof", "-nocommands"),
        )
    assert b"Verify return code: 0 (ok)" in output
    assert site.commands[-1][0] == version
    assert bound.stats().peer_errors == 0


@pytest.mark.needs("gnutls-cli")
@pytest.mark.parametrize(
    "protocol", ["smtp", "lmtp", "imap", "pop3", "nntp", "sieve", "ftp", "xmpp", "ldap", "postgres"]
)
async def test_gnutls_upgrades_in_each_protocol_it_supports(
    protocol: str, site: Site, pem: Path
) -> None:
    dialogue = DIALOGUES[protocol]
    async with serving(dialogue.server, site) as bound:
        output = await output_of(
            dialogue,
            *("gnutls-cli", f"--starttls-proto={protocol}", f"--x509cafile={pem}/ca.pem"),
            *("-p", str(bound.port), "localhost"),
        )
    assert b"- Status: The certificate is trusted." in output
    assert site.commands[-1][0] == "TLSv1.3"
    assert bound.stats().peer_errors == 0


@each_protocol
async def test_commands_injected_before_tls_are_never_executed(
    protocol: str, site: Site, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    """The attacks of CVE-2011-0411, CVE-2021-23214 and "NO STARTTLS" (2021)."""
    caplog.set_level(logging.INFO, "trisock.server")
    dialogue = DIALOGUES[protocol]
    tls = authority.client_tls("localhost")
    async with serving(dialogue.server, site) as bound:
        async with await trisock.connect("127.0.0.1", bound.port) as sock:
            await dialogue.request_tls(sock)
            commands = site.commands.copy()
            await sock.starttls(tls)
            await sock.send(dialogue.last)
            await sock.recv_until(dialogue.reply)
        assert bound.stats().peer_errors == 0
        site.commands.clear()
        async with await trisock.connect("127.0.0.1", bound.port) as sock:
            address = sock.getlocal()
            with pytest.raises((trio.BrokenResourceError, IncompleteReadError)):
                await dialogue.request_tls(sock, injected=dialogue.last)
                await sock.starttls(tls)
        await all_served(bound, 2)
        assert site.commands == commands
        assert bound.stats().peer_errors == 1
    (logged,) = caplog.messages
    start = re.escape(f"closed the connection with {address}: ")
    assert re.match(rf"{start}(STARTTLS \(\S+\)|TLS handshake) failed: ", logged)


@each_protocol
async def test_replies_injected_before_tls_fail_the_handshake(
    protocol: str, site: Site, authority: Authority
) -> None:
    """The attacks of CVE-2021-23222 and "NO STARTTLS" (2021)."""
    dialogue = DIALOGUES[protocol]
    tls = authority.client_tls("localhost")

    async def serve(site: Site, sock: Socket) -> None:
        await dialogue.grant_tls(sock, injected)
        await sock.starttls(site.tls)
        await sock.recv_exactly(len(dialogue.last))
        await sock.send(dialogue.reply)

    async with serving(serve, site) as bound:
        injected = dialogue.reply
        async with await trisock.connect("127.0.0.1", bound.port) as sock:
            await dialogue.request_tls(sock)
            with pytest.raises(TLSError):
                await sock.starttls(tls)
            assert not sock.isopen()
        await all_served(bound, 1)
        injected = b""
        async with await trisock.connect("127.0.0.1", bound.port) as sock:
            await dialogue.request_tls(sock)
            await sock.starttls(tls)
            await sock.send(dialogue.last)
            assert await sock.recv_exactly(len(dialogue.reply)) == dialogue.reply


async def test_a_truncated_upload_leaves_no_file(site: Site, authority: Authority) -> None:
    tls = authority.client_tls("localhost")
    async with serving(starttls_ftp.ftp, site) as bound:
        async with await trisock.connect("127.0.0.1", bound.port) as control:
            await DIALOGUES["ftp"].request_tls(control)
            await control.starttls(tls)
            for whole in (False, True):
                await control.send(b"PBSZ 0\r\nPROT P\r\nEPSV\r\nSTOR file\r\n")
                replies = [await control.recv_until(b"\r\n") for _ in range(4)]
                assert [reply[:3] for reply in replies] == [b"200", b"200", b"229", b"150"]
                port = int(replies[2].split(b"|")[3])
                async with await trisock.connect("127.0.0.1", port) as data:
                    await data.starttls(tls)
                    await data.send(b"the first half")
                    if not whole:
                        data.stream.socket.shutdown(socket.SHUT_WR)
                        with pytest.raises(TLSError):  # the server closes the connection
                            await data.recv()
                reply = await control.recv_until(b"\r\n")
                assert reply.startswith(b"226 " if whole else b"426 TLS with ")
                assert (site.directory / "file").exists() is whole
