"""Our TLS client and server talk to OpenSSL, GnuTLS, curl, Go and Node.js programs.

``test_tls_matrix.py`` lists TLS versions, kinds of key, server names, client certificates and ALPN
offers. Each program runs at least once with each of these values. Without a fault, data flows both
ways, and both sides receive close_notify. If there is a fault, both sides report the fault.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio

import trisock
from helpers.certificates import der
from helpers.pairs import closing
from helpers.programs import running
from helpers.server import echo
from helpers.tls_axes import VERSIONS, Authorities, Fault, client_of
from helpers.tls_programs import (
    ALL,
    ANSWER,
    OPENSSL,
    QUESTION,
    REPORTS,
    Case,
    Files,
    Peer,
    cases,
    openssl_client,
    run_client,
    run_server,
)
from trisock import ServerTLS, Socket, TLSError
from trisock.testing import serving


def each(peer: Peer) -> Any:
    return pytest.param(peer, marks=peer.marks(), id=peer.name)


def each_peer_and_case(role: str) -> pytest.MarkDecorator:
    parameters = [
        pytest.param(peer, case, marks=peer.marks(), id=f"{peer.name}, {words}")
        for peer in ALL
        if getattr(peer, role) is not None
        for words, case in cases()
        # A Node.js server cannot verify a client certificate that is optional.
        if (peer.name, role, case.client_certificate.asked) != ("node", "server", "optional")
    ]
    return pytest.mark.parametrize(("peer", "case"), parameters, indirect=["peer"])


# ---- client programs ----


async def answer(sock: Socket) -> None:
    assert await sock.recv_exactly(len(QUESTION)) == QUESTION
    await sock.send(ANSWER)
    assert await sock.recv() == b""  # close_notify
    await sock.close()


async def answer_http(sock: Socket) -> None:
    """Answer a request. The response ends with close_notify."""
    head = await sock.recv_until(b"\r\n\r\n")
    assert b"Content-Length: %d\r\n" % len(QUESTION) in head
    assert await sock.recv_exactly(len(QUESTION)) == QUESTION
    await sock.send(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n", ANSWER)
    await sock.close()


@each_peer_and_case("client")
async def test_our_server_and_each_client_program_report_the_same_result(
    peer: Peer, case: Case, authorities: Authorities, files: Files, ca: Path
) -> None:
    certificate = authorities.server(case.name.certified, case.kind)
    asked, what, client_fault = case.client_certificate
    server_tls = ServerTLS(
        certificate,
        alpn_protocols=[case.alpn.spoken] if case.alpn.spoken else [],
        require_alpn=case.alpn.required,
        client_ca=None if asked == "no" else authorities.right.pem,
        require_client_certificate=asked == "required",
    )
    shown = authorities.client(what, case.kind)
    client_files = None if shown is None else files.certificate("client", shown)
    error: TLSError | trisock.IncompleteReadError | None = None
    async with await trisock.listen(0, host="127.0.0.1") as listener:

        async def serve() -> None:
            nonlocal error
            sock = await listener.accept()
            async with closing(sock):
                try:
                    await sock.starttls(server_tls)
                    info = sock.tls
                    await (answer_http if peer.program == "curl" else answer)(sock)
                except (TLSError, trisock.IncompleteReadError) as exc:
                    error = exc
                    await sock.close()
                    return
            assert info is not None
            assert info.version == case.version
            assert info.alpn_protocol == case.alpn.chosen
            assert info.server_hostname == case.name.on_the_wire
            assert info.peer_certificate == (None if shown is None else der(shown))
            assert not info.session_reused

        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            command = peer.client(case, listener.port, ca, client_files)
            status, output = await run_client(command)

    if case.name.fault is not None:
        assert error is not None
        assert ANSWER not in output.out
        assert re.search(peer.name_error, output.text), output.text
        assert status != 0
    elif client_fault is not None:
        assert isinstance(error, TLSError)
        assert client_fault.words in str(error)
        assert (error.reason, error.verify_code) == (client_fault.reason, client_fault.verify_code)
        reports = REPORTS[alert_of(client_fault, case)]
        assert any(report in output.text for report in reports), output.text
        assert status != 0
    elif case.alpn.required and case.alpn.chosen is None:
        assert "shares no ALPN protocol" in str(error)
        assert ANSWER not in output.out
    else:
        if error is not None:
            raise error
        assert ANSWER in output.out
        assert status == 0, output.text
        if case.alpn.chosen:
            assert f"{peer.alpn_report}{case.alpn.chosen}" in output.text


def alert_of(fault: Fault, case: Case) -> str:
    alert = (case.version == "TLSv1.2" and fault.alert_of_1_2) or fault.alert
    assert alert is not None
    return alert


# ---- server programs ----

# What our client reports if a server program rejects the client's certificate. ``{}`` stands for
# the alert that OpenSSL sends for the certificate's fault. GnuTLS may send another alert. Go before
# 1.21 sends the same alert for every fault. Node.js only closes the connection, with a reset if
# Node.js has unread data.
REFUSED = {
    "openssl": "with the alert '{}'",
    "gnutls": "with the alert '({}|access denied|decode error)'",
    "go": "with the alert '({}|bad certificate)'",
    "node": "with the alert '{}'|closed the connection|without close_notify|reset by peer",
}


async def ask(sock: Socket) -> bytes:
    """Send ``QUESTION``, and return the server's echo (s_server also reverses each line)."""
    await sock.send(QUESTION)
    return await sock.recv_exactly(len(QUESTION))


def reversed_lines(lines: bytes) -> bytes:
    return b"".join(line[::-1] + b"\n" for line in lines.splitlines())


@each_peer_and_case("server")
async def test_our_client_and_each_server_program_report_the_same_result(
    peer: Peer, case: Case, authorities: Authorities, files: Files, ca: Path
) -> None:
    certificate = authorities.server(case.name.certified, case.kind)
    _, what, client_fault = case.client_certificate
    shown = authorities.client(what, case.kind)
    client_tls = client_of(
        case.version,
        authorities.right.pem,
        alpn=(case.alpn.offered,) if case.alpn.offered else (),
        certificate=shown,
    )
    error: trio.BrokenResourceError | None = None
    assert peer.server is not None
    command = peer.server(case, ca, files.certificate("server", certificate))
    async with run_server(command) as server:
        sock = await trisock.connect("127.0.0.1", server.port)
        async with closing(sock):
            try:
                info = await sock.starttls(client_tls, server_hostname=case.name.asked)
                answer = await ask(sock)
                await sock.stoptls()  # exchange close_notify
            except trio.BrokenResourceError as exc:
                error = exc
            await sock.close()
        if (fault := case.name.fault) is not None:
            assert isinstance(error, TLSError)
            assert fault.words in str(error)
            assert (error.reason, error.verify_code) == (fault.reason, fault.verify_code)
            # Our client's OpenSSL sends the alert unencrypted. Go and GnuTLS reject unencrypted
            # alerts in TLS 1.3.
            rejected = {"go": ["bad record MAC"], "gnutls": ["Error in handshake"]}
            await server.printed(
                *map(re.escape, REPORTS[alert_of(fault, case)]), *rejected.get(peer.name, [])
            )
        elif client_fault is not None:
            refused = REFUSED[peer.name].format(alert_of(client_fault, case))
            assert re.search(refused, str(error)), error
        elif case.alpn.offered != case.alpn.chosen and (
            peer.name != "gnutls" or case.alpn.required
        ):
            assert "with the alert 'no application protocol'" in str(error)
        else:
            if error is not None:
                raise error
            assert answer == (reversed_lines(QUESTION) if peer is OPENSSL else QUESTION)
            assert info.version == case.version
            assert info.alpn_protocol == case.alpn.chosen
            assert info.server_hostname == case.ascii_name
            assert info.peer_certificate == der(certificate)


# ---- no close_notify ----


async def assert_end_without_close_notify(sock: Socket, *, https_compatible: bool) -> None:
    if https_compatible:
        assert await sock.recv() == b""
    else:
        with pytest.raises(TLSError, match="without close_notify: data may be missing"):
            await sock.recv()


@pytest.mark.parametrize("https_compatible", [False, True])
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("peer", [each(peer) for peer in ALL if peer.server], indirect=True)
async def test_a_killed_server_causes_a_tls_error_unless_https_compatible(
    peer: Peer,
    version: str,
    https_compatible: bool,
    authorities: Authorities,
    ca: Path,
    server_files: tuple[Path, Path],
) -> None:
    assert peer.server is not None
    async with run_server(peer.server(Case(version), ca, server_files)) as server:
        sock = await trisock.connect("127.0.0.1", server.port)
        async with closing(sock):
            await sock.starttls(
                client_of(version, authorities.right.pem),
                server_hostname="example.org",
                https_compatible=https_compatible,
            )
            await ask(sock)
            server.kill()
            await assert_end_without_close_notify(sock, https_compatible=https_compatible)


@pytest.mark.parametrize("https_compatible", [False, True])
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("peer", [each(peer) for peer in ALL if peer.name != "curl"], indirect=True)
async def test_a_killed_client_causes_a_tls_error_unless_https_compatible(
    peer: Peer, version: str, https_compatible: bool, example_org: ServerTLS, ca: Path
) -> None:
    async with await trisock.listen(0, host="127.0.0.1") as listener:
        command = peer.client(Case(version), listener.port, ca, None)
        pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
        async with running(*command, stdin=pipe, stdout=nowhere, stderr=nowhere) as process:
            assert process.stdin is not None
            async with process.stdin, await listener.accept() as sock:
                await sock.starttls(example_org, https_compatible=https_compatible)
                await process.stdin.send_all(QUESTION)
                assert await sock.recv_exactly(len(QUESTION)) == QUESTION
                process.kill()
                await assert_end_without_close_notify(sock, https_compatible=https_compatible)


# ---- resumption ----


@contextlib.asynccontextmanager
async def echoing(server_tls: ServerTLS) -> AsyncIterator[tuple[int, list[trisock.TLSInfo]]]:
    """Run an echo server. Yield its port and a list with one TLSInfo per connection."""
    infos: list[trisock.TLSInfo] = []

    async def upgrade_and_echo(sock: Socket) -> None:
        infos.append(await sock.starttls(server_tls))
        await echo(sock)

    async with serving(upgrade_and_echo) as s:
        yield s.server.port, infos


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    "peer", [each(peer) for peer in ALL if peer.name in ("go", "node")], indirect=True
)
async def test_a_client_program_resumes_its_session(
    peer: Peer, version: str, authorities: Authorities, files: Files, ca: Path
) -> None:
    shown = authorities.client("right", "P-256")
    assert shown is not None
    server_tls = ServerTLS(
        authorities.server("example.org", "P-256"),
        client_ca=authorities.right.pem,
        require_client_certificate=True,
    )
    async with echoing(server_tls) as (port, infos):
        command = peer.client(Case(version), port, ca, files.certificate("client", shown))
        done = await trio.run_process([*command, "-visits", "3"], stdin=b"", capture_stderr=True)
    assert [info.session_reused for info in infos] == [False, True, True]
    assert {info.peer_certificate for info in infos} == {der(shown)}
    assert re.findall(rb"reused=(\w+)", done.stderr) == [b"false", b"true", b"true"]


@pytest.mark.needs("openssl")
async def test_s_client_resumes_its_session_five_times(example_org: ServerTLS, ca: Path) -> None:
    async with echoing(example_org) as (port, infos):
        command = openssl_client(Case("TLSv1.2"), port, ca, None)
        await trio.run_process([*command, "-reconnect"], stdin=b"", capture_stdout=True)
    assert [info.session_reused for info in infos] == [False] + [True] * 5
