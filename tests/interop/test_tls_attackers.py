"""What attackers and the past ask of TLS: old versions, compression, renegotiation, early data."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import trio

import trisock
from helpers.pairs import closing
from helpers.programs import running
from helpers.tls_axes import (
    VERSIONS,
    Authorities,
    client_of,
)
from helpers.tls_programs import (
    ANSWER,
    QUESTION,
    Case,
    Files,
    openssl_client,
    openssl_server,
    run_client,
    run_server,
)
from trisock import ServerTLS, TLSError


async def s_client(
    authorities: Authorities, files: Files, version: str, *options: str | Path
) -> tuple[str, list[object]]:
    """Have s_client say something; return what it says of the connection, and what came of it."""
    heard: list[object] = []
    async with await trisock.listen(0, host="127.0.0.1") as listener:

        async def serve() -> None:
            sock = await listener.accept()
            async with sock:
                try:
                    await sock.starttls(ServerTLS(authorities.server("example.org", "P-256")))
                    while chunk := await sock.recv():
                        heard.append(chunk)
                        await sock.send(ANSWER)
                except TLSError as exc:
                    heard.append(exc)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            ca = files.ca(authorities.right.pem)
            command = openssl_client(Case(version), listener.port, ca, None)
            _, output = await run_client([*command, *options])
    return output.text, heard


@pytest.mark.needs("openssl")
@pytest.mark.parametrize("version", ["TLSv1", "TLSv1.1"])
async def test_a_client_of_the_past_is_refused(
    version: str, authorities: Authorities, files: Files
) -> None:
    said, heard = await s_client(authorities, files, version, "-cipher", "ALL:@SECLEVEL=0")
    assert "alert protocol version" in said
    assert len(heard) == 1
    assert "speaks no TLS version that is accepted here" in str(heard[0])


@pytest.mark.needs("openssl")
async def test_a_client_talked_into_a_lower_version_is_refused(
    authorities: Authorities, files: Files
) -> None:
    """RFC 7507"""
    said, heard = await s_client(authorities, files, "TLSv1.2", "-fallback_scsv")
    assert "alert inappropriate fallback" in said
    assert len(heard) == 1
    assert "inappropriate fallback" in str(heard[0])


@pytest.mark.needs("openssl")
@pytest.mark.parametrize("version", VERSIONS)
async def test_nothing_is_compressed(version: str, authorities: Authorities, files: Files) -> None:
    said, heard = await s_client(authorities, files, version, "-comp")
    assert "Compression: NONE" in said
    assert b"".join(chunk for chunk in heard if isinstance(chunk, bytes)) == QUESTION


@pytest.mark.needs("openssl")
async def test_no_client_renegotiates(authorities: Authorities, files: Files) -> None:
    """RFC 5746 is spoken, and the wish is refused; s_client gives up then, as it must."""
    async with await trisock.listen(0, host="127.0.0.1") as listener:
        ca = files.ca(authorities.right.pem)
        command = openssl_client(Case("TLSv1.2"), listener.port, ca, None)
        pipe = subprocess.PIPE
        async with running(*command, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            async with process.stdin, process.stdout, await listener.accept() as sock:
                await sock.starttls(ServerTLS(authorities.server("example.org", "P-256")))
                await process.stdin.send_all(b"hello\n")
                assert await sock.recv() == b"hello\n"
                await process.stdin.send_all(b"R\n")
                with pytest.raises(TLSError, match="alert 'handshake failure'"):
                    await sock.recv()
                said = b"".join([chunk async for chunk in process.stdout])
    assert b"Secure Renegotiation IS supported" in said
    assert b"no renegotiation" in said


@pytest.mark.needs("openssl")
async def test_a_server_that_renegotiates_is_followed_and_nothing_is_lost(
    authorities: Authorities, files: Files
) -> None:
    """Before TLS 1.3 some servers ask for a certificate that way, when they know the request."""
    certificate = files.certificate("server", authorities.server("example.org", "P-256"))
    command = openssl_server(Case("TLSv1.2"), files.ca(authorities.right.pem), certificate)
    command.remove("-rev")
    async with run_server(command) as server:
        client_tls = client_of("TLSv1.2", authorities.right.pem)
        sock = await trisock.connect("127.0.0.1", server.port)
        async with closing(sock), trio.open_nursery() as nursery:
            await sock.starttls(client_tls, server_hostname="example.org")

            async def read() -> None:
                assert await sock.recv() == b"from now on\n"
                await sock.send(b"with new keys\n")

            nursery.start_soon(read)
            await sock.send(b"before\n")
            await server.says("before\n")
            await server.stdin.send_all(b"r\n")  # the command
            await server.says("SSL_do_handshake -> 1")
            await server.stdin.send_all(b"from now on\n")
            await server.says("with new keys\n")


@pytest.mark.needs("openssl")
async def test_early_data_is_never_delivered(
    authorities: Authorities, files: Files, tmp_path: Path
) -> None:
    """A session of another server, which takes early data, makes s_client send some to ours."""
    certificate = files.certificate("server", authorities.server("example.org", "P-256"))
    ca = files.ca(authorities.right.pem)
    session, early = tmp_path / "session.pem", tmp_path / "early"
    early.write_bytes(b"attack at dawn\n")
    command = openssl_server(Case(), ca, certificate)
    command[command.index("-rev") :] = ["-early_data", *command[command.index("-rev") + 1 :]]
    async with run_server(command) as server:
        # It ends with its input. It prints a session before it writes the file, and a closed
        # stdout kills it in between: so its output is read to the end.
        client = ["stdbuf", "--output=L", *openssl_client(Case(), server.port, ca, None)]
        async with running(
            *(*client, "-sess_out", session),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            async with process.stdout:
                said = b""
                while b"Max Early Data: 16384" not in said:
                    said += await process.stdout.receive_some()
                await process.stdin.aclose()
                async for _ in process.stdout:
                    pass
    said_then, heard = await s_client(
        authorities, files, "TLSv1.3", "-sess_in", session, "-early_data", early
    )
    assert "Early data was rejected" in said_then
    assert b"".join(chunk for chunk in heard if isinstance(chunk, bytes)) == QUESTION
