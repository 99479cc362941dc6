"""Old and risky features of TLS: old versions, compression, renegotiation and early data."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import trio

import trisock
from helpers.pairs import closing
from helpers.programs import running
from helpers.tls_axes import VERSIONS, Authorities, client_of
from helpers.tls_programs import (
    ANSWER,
    QUESTION,
    Case,
    openssl_client,
    openssl_server,
    run_client,
    run_server,
)
from trisock import ServerTLS, TLSError

pytestmark = pytest.mark.needs("openssl")


async def s_client(
    server_tls: ServerTLS, ca: Path, version: str, *options: str | Path
) -> tuple[str, bytes, list[TLSError]]:
    """Run s_client against a server.

    Return s_client's output, the data that the server received, and the server's errors.
    """
    received: list[bytes] = []
    errors: list[TLSError] = []
    async with await trisock.listen(0, host="127.0.0.1") as listener:

        async def serve() -> None:
            sock = await listener.accept()
            async with sock:
                try:
                    await sock.starttls(server_tls)
                    while chunk := await sock.recv():
                        received.append(chunk)
                        await sock.send(ANSWER)
                except TLSError as exc:
                    errors.append(exc)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            command = openssl_client(Case(version), listener.port, ca, None)
            _, output = await run_client([*command, *options])
    return output.text, b"".join(received), errors


@pytest.mark.parametrize("version", ["TLSv1", "TLSv1.1"])
async def test_an_old_version_is_refused(version: str, example_org: ServerTLS, ca: Path) -> None:
    output, received, errors = await s_client(
        example_org, ca, version, "-cipher", "ALL:@SECLEVEL=0"
    )
    assert "alert protocol version" in output
    assert received == b""
    (error,) = errors
    assert "supports no TLS version that we accept" in str(error)


async def test_a_downgraded_client_is_refused(example_org: ServerTLS, ca: Path) -> None:
    """RFC 7507: the client signals that it supports a higher version than it offers."""
    output, received, errors = await s_client(example_org, ca, "TLSv1.2", "-fallback_scsv")
    assert "alert inappropriate fallback" in output
    assert received == b""
    (error,) = errors
    assert "inappropriate fallback" in str(error)


@pytest.mark.parametrize("version", VERSIONS)
async def test_tls_compression_is_never_negotiated(
    version: str, example_org: ServerTLS, ca: Path
) -> None:
    output, received, _ = await s_client(example_org, ca, version, "-comp")
    assert "Compression: NONE" in output
    assert received == QUESTION


async def test_a_client_cannot_renegotiate(example_org: ServerTLS, ca: Path) -> None:
    """The server supports RFC 5746 but refuses to renegotiate. s_client then sends an alert."""
    async with await trisock.listen(0, host="127.0.0.1") as listener:
        command = openssl_client(Case("TLSv1.2"), listener.port, ca, None)
        pipe = subprocess.PIPE
        async with running(*command, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            async with process.stdin, process.stdout, await listener.accept() as sock:
                await sock.starttls(example_org)
                await process.stdin.send_all(b"hello\n")
                assert await sock.recv() == b"hello\n"
                await process.stdin.send_all(b"R\n")
                with pytest.raises(TLSError, match="alert 'handshake failure'"):
                    await sock.recv()
                output = b"".join([chunk async for chunk in process.stdout])
    assert b"Secure Renegotiation IS supported" in output
    assert b"no renegotiation" in output


async def test_a_renegotiating_server_loses_no_data(
    authorities: Authorities, ca: Path, server_files: tuple[Path, Path]
) -> None:
    """Some TLS 1.2 servers read a request, then renegotiate to ask for a client certificate."""
    command = openssl_server(Case("TLSv1.2"), ca, server_files)
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
            await server.printed("before\n")
            await server.stdin.send_all(b"r\n")  # the command
            await server.printed("SSL_do_handshake -> 1")
            await server.stdin.send_all(b"from now on\n")
            await server.printed("with new keys\n")


async def test_early_data_is_never_delivered(
    example_org: ServerTLS, ca: Path, server_files: tuple[Path, Path], tmp_path: Path
) -> None:
    """s_client first gets a session from a server that accepts early data.

    With this session, s_client then sends early data to our server.
    """
    session, early = tmp_path / "session.pem", tmp_path / "early"
    early.write_bytes(b"attack at dawn\n")
    command = openssl_server(Case(), ca, server_files)
    command[command.index("-rev")] = "-early_data"
    async with run_server(command) as server:
        # s_client exits at EOF on stdin. It prints a session, and then writes the session file. A
        # closed stdout would kill s_client before it writes the file, so read stdout until EOF.
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
                output = b""
                while b"Max Early Data: 16384" not in output:
                    output += await process.stdout.receive_some()
                await process.stdin.aclose()
                async for _ in process.stdout:
                    pass
    text, received, _ = await s_client(
        example_org, ca, "TLSv1.3", "-sess_in", session, "-early_data", early
    )
    assert "Early data was rejected" in text
    assert received == QUESTION
