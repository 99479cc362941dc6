"""Our FTP client against two real servers, ProFTPD and vsftpd (see real_ftp_servers.py)."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import ssl
from collections.abc import AsyncIterator, Iterator

import pytest
import trio
import trio.testing

import trisock
from helpers.ftp_client import ftp_login, ftp_transfer
from helpers.mail_client import ask, expect
from helpers.pairs import read_all
from helpers.real_servers import RealServer
from helpers.tls_clients import RefusedError, ResumingContext, both_versions, for_version
from trisock import ClientTLS, Socket, TLSError
from trisock.testing import Authority

pytestmark = pytest.mark.interop


@contextlib.asynccontextmanager
async def ftp_client(
    server: RealServer, port: str, tls: ClientTLS | ssl.SSLContext, user: bytes = b"alice"
) -> AsyncIterator[Socket]:
    async with await trisock.connect(
        "localhost", server.ports[port], tls=tls, starttls="ftp"
    ) as sock:
        await ftp_login(sock, user)
        yield sock


async def test_proftpd_refuses_a_password_in_plain_text(proftpd: RealServer) -> None:
    async with await trisock.connect("127.0.0.1", proftpd.ports["ftp"]) as sock:
        await expect(sock, 220)
        await ask(sock, b"USER alice", 550)


@both_versions
async def test_proftpd_stores_and_returns_files(
    version: str, proftpd: RealServer, authority: Authority
) -> None:
    """Each transferred file, even an empty one, ends with close_notify."""
    tls = for_version(version, authority)
    async with ftp_client(proftpd, "ftp", tls) as sock:
        for data in (secrets.token_bytes(5_000_000), b""):
            async with ftp_transfer(sock, tls, b"STOR a-file") as channel:
                await channel.send(data)
            assert (proftpd.directory / "home/a-file").read_bytes() == data
            async with ftp_transfer(sock, tls, b"RETR a-file") as channel:
                assert await read_all(channel) == data
            async with ftp_transfer(sock, tls, b"LIST") as channel:
                assert b" %d " % len(data) in await read_all(channel)
        await ask(sock, b"QUIT", 221)
        assert await sock.recv() == b""


async def check_session_reuse(
    server: RealServer, port: str, user: bytes, name: bytes, version: str, authority: Authority
) -> None:
    data = secrets.token_bytes(5_000_000)
    tls = for_version(version, authority, ResumingContext)
    async with ftp_client(server, port, tls, user) as sock:
        async with ftp_transfer(sock, tls, b"STOR " + name) as channel:
            assert channel.tls is not None
            assert channel.tls.session_reused
            await channel.send(data)
        async with ftp_transfer(sock, tls, b"RETR " + name) as channel:
            assert await read_all(channel) == data
    tls = for_version(version, authority)
    async with ftp_client(server, port, tls, user) as sock:
        with pytest.raises((trio.BrokenResourceError, RefusedError)):
            async with ftp_transfer(sock, tls, b"STOR " + name) as channel:
                await channel.send(data)


@both_versions
async def test_proftpd_requires_session_reuse_on_data_connections(
    version: str, proftpd: RealServer, authority: Authority
) -> None:
    await check_session_reuse(proftpd, "reuse", b"alice", b"reused", version, authority)


@both_versions
async def test_vsftpd_requires_session_reuse_on_data_connections(
    version: str, vsftpd: RealServer, authority: Authority
) -> None:
    """vsftpd also refuses an upload that ends without ``close_notify``."""
    name = b"upload/" + version.encode()
    await check_session_reuse(vsftpd, "ftp", b"anonymous", name, version, authority)


@both_versions
async def test_an_unencrypted_vsftpd_reply_under_tls_raises_tls_error(
    version: str, vsftpd: RealServer, authority: Authority
) -> None:
    """vsftpd sends fatal errors unencrypted, here ``500 OOPS: cannot change directory``."""
    home = vsftpd.directory / "home"
    tls = for_version(version, authority)
    home.rename(vsftpd.directory / "away")
    try:
        with pytest.raises(TLSError, match="the peer does not speak TLS"):
            async with ftp_client(vsftpd, "ftp", tls, b"anonymous"):
                pass
    finally:
        (vsftpd.directory / "away").rename(home)


@both_versions
async def test_the_accepting_side_can_be_the_tls_client(
    version: str, proftpd: RealServer, authority: Authority
) -> None:
    """In active mode, the FTP server connects, but the FTP client is the TLS client (RFC 4217)."""
    data = secrets.token_bytes(5_000_000)
    (proftpd.directory / "home/active").write_bytes(data)
    tls = for_version(version, authority)
    async with (
        ftp_client(proftpd, "ftp", tls) as sock,
        await trisock.listen(0, host="127.0.0.1") as listener,
    ):
        await ask(sock, b"EPRT |1|127.0.0.1|%d|" % listener.port, 200)
        await ask(sock, b"RETR active", 150)
        async with await listener.accept() as channel:
            assert channel.getside() == "server"
            with pytest.raises(ValueError, match="server_hostname is needed"):
                await channel.starttls(tls)
            info = await channel.starttls(tls, server_hostname="localhost")
            assert info.server_hostname == "localhost"
            assert await read_all(channel) == data
        await expect(sock, 226)


@both_versions
async def test_commands_are_in_plain_text_after_ccc(
    version: str, proftpd: RealServer, authority: Authority
) -> None:
    """After CCC, data connections still use TLS (RFC 4217, section 6)."""
    tls = for_version(version, authority)
    data = secrets.token_bytes(100_000)
    async with ftp_client(proftpd, "ftp", tls) as sock:
        await ask(sock, b"CCC", 200)
        await sock.stoptls()
        assert not sock.istls()
        async with ftp_transfer(sock, tls, b"STOR cleared") as channel:
            await channel.send(data)
        await ask(sock, b"QUIT", 221)
        assert await sock.recv() == b""
    assert (proftpd.directory / "home/cleared").read_bytes() == data


@pytest.fixture
def endless_file(proftpd: RealServer) -> Iterator[bytes]:
    """The command that retrieves a file larger than all buffers."""
    path = proftpd.directory / "home/endless"
    with path.open("wb") as file:
        file.truncate(100_000_000)
    yield b"RETR endless"
    path.unlink()


@both_versions
async def test_an_aborted_transfer_leaves_the_control_connection_usable(
    version: str, proftpd: RealServer, endless_file: bytes, authority: Authority
) -> None:
    tls = for_version(version, authority)
    async with ftp_client(proftpd, "ftp", tls) as sock:
        with pytest.raises(RefusedError, match="b'426 "):
            async with ftp_transfer(sock, tls, endless_file) as channel:
                await channel.recv_exactly(1_000_000)
                channel.abort()
        await ask(sock, b"NOOP", 200)


@both_versions
async def test_killing_the_server_during_a_download_raises_tls_error(
    version: str, proftpd: RealServer, endless_file: bytes, authority: Authority
) -> None:
    """A killed server sends FIN without ``close_notify``."""
    tls = for_version(version, authority)
    async with ftp_client(proftpd, "ftp", tls, b"bob") as sock:
        with pytest.raises(TLSError, match="without close_notify: data may be missing"):
            async with ftp_transfer(sock, tls, endless_file) as channel:
                await channel.recv_exactly(1_000_000)
                os.kill(proftpd.child_called("bob"), signal.SIGKILL)
                await read_all(channel)
        with pytest.raises(TLSError, match="without close_notify"):
            await sock.recv()
