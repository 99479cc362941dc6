"""Every protocol that turns to TLS, word by word, and what is slipped in behind its commands."""

from __future__ import annotations

import logging
import socket
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

import trisock
from helpers import starttls_databases as databases
from helpers import starttls_ftp
from helpers import starttls_servers as servers
from helpers.authority import Authority
from helpers.pairs import all_served
from helpers.starttls_databases import ber, ldap_message
from helpers.starttls_servers import Site
from helpers.starttls_sites import Server, serving
from trisock import ClientTLS, Socket, TLSError


@dataclass(frozen=True)
class Dialogue:
    """How a client asks for TLS, and takes its leave once it has that.

    Attributes:
      before: what the client says before, and the end of each answer.
      ask, agreed: what asks for TLS, and the answer to it.
      leave, answer: the last thing that is said, and the answer to it.
    """

    server: Server
    before: tuple[tuple[bytes, bytes], ...]
    ask: bytes
    agreed: bytes
    leave: bytes
    answer: bytes

    async def ask_for_tls(self, sock: Socket, slipped_in: bytes = b"") -> None:
        for said, answer in self.before:
            await sock.send(said)
            await sock.recv_until(answer)
        await sock.send(self.ask + slipped_in)
        assert await sock.recv_exactly(len(self.agreed)) == self.agreed

    async def offer_tls(self, sock: Socket, slipped_in: bytes) -> None:
        for said, answer in self.before:
            assert await sock.recv_exactly(len(said)) == said
            await sock.send(answer)
        assert await sock.recv_exactly(len(self.ask)) == self.ask
        await sock.send(self.agreed + slipped_in)


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
SMTP = Dialogue(
    servers.smtp,
    ((b"", b"220 localhost ready\r\n"), (b"EHLO client\r\n", b"250 STARTTLS\r\n")),
    *(STARTTLS, b"220 go ahead\r\n", QUIT, b"221 goodbye\r\n"),
)
# By the names that openssl gives them.
DIALOGUES = {
    "smtp": SMTP,
    "lmtp": SMTP,
    "pop3": Dialogue(
        servers.pop3,
        ((b"", b"+OK ready\r\n"),),
        *(b"STLS\r\n", b"+OK go ahead\r\n", QUIT, b"+OK goodbye\r\n"),
    ),
    "imap": Dialogue(
        servers.imap,
        ((b"", b"ready\r\n"), (b". CAPABILITY\r\n", b". OK done\r\n")),
        *(b". STARTTLS\r\n", b". OK go ahead\r\n"),
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
        *(b"hello\r\n", b"you said hello\r\n"),
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
        b"\0\0\0\x0e\0\3\0\0user\0\0" + databases.pg(b"X"),
        databases.pg(b"Z", b"I"),
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


@pytest.mark.needs("openssl")
async def test_there_is_a_server_for_each_protocol_that_openssl_knows() -> None:
    done = await trio.run_process(
        ["openssl", "s_client", "-starttls", "?"], capture_stderr=True, check=False
    )
    known = done.stderr.decode().partition("must be one of:")[2].split()
    assert "smtp" in known
    assert set(known) <= set(DIALOGUES)


@pytest.mark.needs("openssl")
@pytest.mark.parametrize("version", ["-tls1_2", "-tls1_3"])
@pytest.mark.parametrize("protocol", DIALOGUES)
async def test_openssl_turns_to_tls_in_every_protocol(
    protocol: str, version: str, site: Site, pem: Path
) -> None:
    dialogue = DIALOGUES[protocol]
    async with serving(dialogue.server, site) as bound:
        done = await trio.run_process(
            [
                *("openssl", "s_client", "-starttls", protocol, version),
                *("-connect", f"127.0.0.1:{bound.port}", "-verify_hostname", "localhost"),
                *("-CAfile", str(pem / "ca.pem"), "-verify_return_error"),
                *("-ign_eof", "-nocommands"),
            ],
            stdin=dialogue.leave,
            capture_stdout=True,
            capture_stderr=True,
        )
    assert b"Verify return code: 0 (ok)" in done.stdout
    assert dialogue.answer in done.stdout
    assert site.heard[-1][0] == {"-tls1_2": "TLSv1.2", "-tls1_3": "TLSv1.3"}[version]
    assert bound.stats().peer_errors == 0


@pytest.mark.needs("gnutls-cli")
@pytest.mark.parametrize(
    "protocol", ["smtp", "lmtp", "imap", "pop3", "nntp", "sieve", "ftp", "xmpp", "ldap", "postgres"]
)
async def test_gnutls_turns_to_tls_in_every_protocol_that_it_knows(
    protocol: str, site: Site, pem: Path
) -> None:
    dialogue = DIALOGUES[protocol]
    async with serving(dialogue.server, site) as bound:
        done = await trio.run_process(
            [
                *("gnutls-cli", f"--starttls-proto={protocol}", f"--x509cafile={pem}/ca.pem"),
                *("-p", str(bound.port), "localhost"),
            ],
            stdin=dialogue.leave,
            capture_stdout=True,
            capture_stderr=True,
        )
    assert b"- Status: The certificate is trusted." in done.stdout
    assert dialogue.answer in done.stdout
    assert site.heard[-1][0] == "TLSv1.3"
    assert bound.stats().peer_errors == 0


each_protocol = pytest.mark.parametrize("protocol", DIALOGUES)


@each_protocol
async def test_commands_slipped_in_before_tls_are_not_obeyed(
    protocol: str, site: Site, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    """CVE-2011-0411, CVE-2021-23214, and "NO STARTTLS" (2021)."""
    caplog.set_level(logging.INFO, "trisock.server")
    dialogue = DIALOGUES[protocol]
    tls = ClientTLS("localhost", ca=authority.pem)
    async with serving(dialogue.server, site) as bound:
        async with await trisock.connect("127.0.0.1", bound.port) as sock:
            where = sock.getlocal()
            await dialogue.ask_for_tls(sock, dialogue.leave)
            heard = site.heard.copy()
            with pytest.raises(TLSError):
                await sock.starttls(tls)
        await all_served(bound, 1)
        assert site.heard == heard
        (message,) = caplog.messages
        assert message.startswith(
            f"closed the connection with {where}: TLS handshake with {where} failed: "
        )
        async with await trisock.connect("127.0.0.1", bound.port) as sock:
            await dialogue.ask_for_tls(sock)
            await sock.starttls(tls)
            await sock.send(dialogue.leave)
            await sock.recv_until(dialogue.answer)
        assert bound.stats().peer_errors == 1


@each_protocol
async def test_answers_slipped_in_before_tls_are_not_believed(
    protocol: str, site: Site, authority: Authority
) -> None:
    """CVE-2021-23222, and "NO STARTTLS" (2021)."""
    dialogue = DIALOGUES[protocol]

    async def serve(site: Site, sock: Socket) -> None:
        await dialogue.offer_tls(sock, slipped_in)
        await sock.starttls(site.tls)
        await sock.recv_exactly(len(dialogue.leave))
        await sock.send(dialogue.answer)

    async with serving(serve, site) as bound:
        for slipped_in in (dialogue.answer, b""):
            async with await trisock.connect("127.0.0.1", bound.port) as sock:
                await dialogue.ask_for_tls(sock)
                if slipped_in:
                    with pytest.raises(TLSError):
                        await sock.starttls(ClientTLS("localhost", ca=authority.pem))
                    assert not sock.isopen()
                else:
                    await sock.starttls(ClientTLS("localhost", ca=authority.pem))
                    await sock.send(dialogue.leave)
                    assert await sock.recv_exactly(len(dialogue.answer)) == dialogue.answer
            await all_served(bound, 1)


async def test_an_upload_that_is_cut_off_leaves_no_file(site: Site, authority: Authority) -> None:
    tls = ClientTLS("localhost", ca=authority.pem)
    async with serving(starttls_ftp.ftp, site) as bound:
        async with await trisock.connect("127.0.0.1", bound.port) as control:
            await DIALOGUES["ftp"].ask_for_tls(control)
            await control.starttls(tls)
            for whole in (False, True):
                await control.send(b"PBSZ 0\r\nPROT P\r\nEPSV\r\nSTOR file\r\n")
                answers = [await control.recv_until(b"\r\n") for _ in range(4)]
                assert [answer[:3] for answer in answers] == [b"200", b"200", b"229", b"150"]
                port = int(answers[2].split(b"|")[3])
                async with await trisock.connect("127.0.0.1", port) as data:
                    await data.starttls(tls)
                    await data.send(b"the first half")
                    if not whole:
                        data.stream.socket.shutdown(socket.SHUT_WR)
                        with pytest.raises(TLSError):  # the server gives it up as well
                            await data.recv()
                answer = await control.recv_until(b"\r\n")
                assert answer.startswith(b"226 " if whole else b"426 TLS with ")
                assert (site.directory / "file").exists() is whole
