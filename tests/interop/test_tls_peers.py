"""TLS with those that no one here wrote, in both roles: OpenSSL, GnuTLS, curl, Go and Node.js.

Each value of the axes of ``test_tls_matrix.py`` meets each of them at least once, with data both
ways, an end that both sides have seen, and where something is wrong the words of either side.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
from collections.abc import AsyncIterator, Callable

import pytest
import trio

import trisock
from helpers.certificates import der
from helpers.pairs import closing
from helpers.programs import running
from helpers.tls_axes import (
    VERSIONS,
    Authorities,
    Fault,
    client_of,
)
from helpers.tls_programs import (
    ALL,
    ANSWER,
    HEARD,
    OPENSSL,
    QUESTION,
    Case,
    Command,
    Files,
    Peer,
    cases,
    openssl_client,
    run_client,
    run_server,
)
from trisock import ServerTLS, Socket, TLSError

# ---- they are the client ----


def peers_and_cases(role: str) -> list[object]:
    return [
        pytest.param(peer, case, marks=peer.marks(), id=f"{peer.name}, {words}")
        for peer in ALL
        if getattr(peer, role) is not None
        for words, case in cases()
        # Node.js asks for a certificate and has none refused, or all that are not right.
        if (peer.name, role, case.client_certificate.asked) != ("node", "server", "optional")
    ]


async def answer(sock: Socket) -> None:
    assert await sock.recv_exactly(len(QUESTION)) == QUESTION
    await sock.send(ANSWER)
    assert await sock.recv() == b""  # close_notify
    await sock.close()


async def answer_http(sock: Socket) -> None:
    """Answer a request; where the answer ends only close_notify says."""
    head = await sock.recv_until(b"\r\n\r\n")
    assert b"Content-Length: %d\r\n" % len(QUESTION) in head
    assert await sock.recv_exactly(len(QUESTION)) == QUESTION
    await sock.send(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n", ANSWER)
    await sock.close()


@pytest.mark.parametrize(("peer", "case"), peers_and_cases("client"))
async def test_a_server_of_ours_with(
    peer: Peer,
    case: Case,
    authorities: Authorities,
    files: Files,
    built: Callable[[Command], Command],
) -> None:
    right = authorities.right.pem
    certificate = authorities.server(case.name.certified, case.kind)
    asked, what, client_fault = case.client_certificate
    server_tls = ServerTLS(
        certificate,
        alpn_protocols=[case.alpn.spoken] if case.alpn.spoken else [],
        require_alpn=case.alpn.required,
        client_ca=None if asked == "no" else right,
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
            command = peer.client(case, listener.port, files.ca(right), client_files)
            status, output = await run_client(built(command))

    if case.name.fault is not None:
        assert error is not None
        assert ANSWER not in output.out
        assert re.search(peer.says_wrong_name, output.text), output.text
        assert status != 0
    elif client_fault is not None:
        assert isinstance(error, TLSError)
        assert client_fault.words in str(error)
        assert (error.reason, error.verify_code) == (client_fault.reason, client_fault.verify_code)
        assert_heard(client_fault, case, output.text)
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
            assert f"{peer.says_alpn}{case.alpn.chosen}" in output.text


def alert_of(fault: Fault, case: Case) -> str:
    alert = (case.version == "TLSv1.2" and fault.alert_of_1_2) or fault.alert
    assert alert is not None
    return alert


def assert_heard(fault: Fault, case: Case, text: str) -> None:
    assert any(words in text for words in HEARD[alert_of(fault, case)]), text


# ---- they are the server ----

# What they, as servers, say to a client certificate that is not right. Go says the same of all
# (or did, before 1.21), GnuTLS has words of its own. Node.js closes the connection, which is a
# reset if the question is unread.
REFUSED = {
    "openssl": "with the alert '{}'",
    "gnutls": "with the alert '({}|access denied|decode error)'",
    "go": "with the alert '({}|bad certificate)'",
    "node": "with the alert '{}'|closed the connection|without close_notify|reset by peer",
}


async def ask(sock: Socket) -> bytes:
    """Ask, and return the answer: servers give the question back, s_server each line in reverse."""
    await sock.send(QUESTION)
    return await sock.recv_exactly(len(QUESTION))


def in_reverse(lines: bytes) -> bytes:
    return b"".join(line[::-1] + b"\n" for line in lines.splitlines())


@pytest.mark.parametrize(("peer", "case"), peers_and_cases("server"))
async def test_a_client_of_ours_with(
    peer: Peer,
    case: Case,
    authorities: Authorities,
    files: Files,
    built: Callable[[Command], Command],
) -> None:
    right = authorities.right.pem
    certificate = authorities.server(case.name.certified, case.kind)
    _, what, client_fault = case.client_certificate
    shown = authorities.client(what, case.kind)
    client_tls = client_of(
        case.version,
        right,
        alpn=(case.alpn.offered,) if case.alpn.offered else (),
        certificate=shown,
    )
    error: trio.BrokenResourceError | None = None
    assert peer.server is not None
    command = peer.server(case, files.ca(right), files.certificate("server", certificate))
    async with run_server(built(command)) as server:
        sock = await trisock.connect("127.0.0.1", server.port)
        async with closing(sock):
            try:
                info = await sock.starttls(client_tls, server_hostname=case.name.asked)
                answer = await ask(sock)
                await sock.stoptls()  # each side's close_notify, to which it is the answer
            except trio.BrokenResourceError as exc:
                error = exc
            await sock.close()
        if (fault := case.name.fault) is not None:
            assert isinstance(error, TLSError)
            assert fault.words in str(error)
            assert (error.reason, error.verify_code) == (fault.reason, fault.verify_code)
            # OpenSSL sends this alert in the clear, which in TLS 1.3 they do not take.
            in_the_clear = {"go": ["bad record MAC"], "gnutls": ["Error in handshake"]}
            await server.says(
                *map(re.escape, HEARD[alert_of(fault, case)]), *in_the_clear.get(peer.name, [])
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
            assert answer == (in_reverse(QUESTION) if peer is OPENSSL else QUESTION)
            assert info.version == case.version
            assert info.alpn_protocol == case.alpn.chosen
            assert info.server_hostname == case.ascii_name
            assert info.peer_certificate == der(certificate)


# ---- the end that is none ----


@pytest.mark.parametrize("https_compatible", [False, True])
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    "peer", [pytest.param(each, marks=each.marks(), id=each.name) for each in ALL if each.server]
)
async def test_a_server_that_is_killed_has_not_said_goodbye(
    peer: Peer,
    version: str,
    https_compatible: bool,
    authorities: Authorities,
    files: Files,
    built: Callable[[Command], Command],
) -> None:
    right = authorities.right.pem
    certificate = files.certificate("server", authorities.server("example.org", "P-256"))
    assert peer.server is not None
    command = built(peer.server(Case(version), files.ca(right), certificate))
    async with run_server(command) as server:
        sock = await trisock.connect("127.0.0.1", server.port)
        async with closing(sock):
            await sock.starttls(
                client_of(version, right),
                server_hostname="example.org",
                https_compatible=https_compatible,
            )
            await ask(sock)
            server.kill()
            if https_compatible:
                assert await sock.recv() == b""
            else:
                with pytest.raises(TLSError, match="without close_notify: data may be missing"):
                    await sock.recv()


@pytest.mark.parametrize("https_compatible", [False, True])
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    "peer",
    [pytest.param(each, marks=each.marks(), id=each.name) for each in ALL if each.name != "curl"],
)
async def test_a_client_that_is_killed_has_not_said_goodbye(
    peer: Peer,
    version: str,
    https_compatible: bool,
    authorities: Authorities,
    files: Files,
    built: Callable[[Command], Command],
) -> None:
    right = authorities.right.pem
    async with await trisock.listen(0, host="127.0.0.1") as listener:
        command = built(peer.client(Case(version), listener.port, files.ca(right), None))
        pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
        async with running(*command, stdin=pipe, stdout=nowhere, stderr=nowhere) as process:
            assert process.stdin is not None
            async with process.stdin, await listener.accept() as sock:
                await sock.starttls(
                    ServerTLS(authorities.server("example.org", "P-256")),
                    https_compatible=https_compatible,
                )
                await process.stdin.send_all(QUESTION)
                assert await sock.recv_exactly(len(QUESTION)) == QUESTION
                process.kill()
                if https_compatible:
                    assert await sock.recv() == b""
                else:
                    with pytest.raises(TLSError, match="without close_notify: data may be missing"):
                        await sock.recv()


# ---- resumption ----


@contextlib.asynccontextmanager
async def echoing(server_tls: ServerTLS) -> AsyncIterator[tuple[int, list[trisock.TLSInfo]]]:
    """Serve an echo, and tell what was agreed on each connection, and what failed."""
    infos: list[trisock.TLSInfo] = []

    async def echo(sock: Socket) -> None:
        infos.append(await sock.starttls(server_tls))
        async for chunk in sock:
            await sock.send(chunk)

    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, echo, host="127.0.0.1")
        yield server.port, infos
        server.stop()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    "peer",
    [
        pytest.param(each, marks=each.marks(), id=each.name)
        for each in ALL
        if each.program in ("go", "node")
    ],
)
async def test_a_session_is_resumed_by(
    peer: Peer,
    version: str,
    authorities: Authorities,
    files: Files,
    built: Callable[[Command], Command],
) -> None:
    right = authorities.right.pem
    shown = authorities.client("right", "P-256")
    assert shown is not None
    server_tls = ServerTLS(
        authorities.server("example.org", "P-256"),
        client_ca=right,
        require_client_certificate=True,
    )
    async with echoing(server_tls) as (port, infos):
        certificate = files.certificate("client", shown)
        command = peer.client(Case(version), port, files.ca(right), certificate)
        done = await trio.run_process(
            [*built(command), "-visits", "3"], stdin=b"", capture_stderr=True
        )
    assert [info.session_reused for info in infos] == [False, True, True]
    assert {info.peer_certificate for info in infos} == {der(shown)}
    assert re.findall(rb"reused=(\w+)", done.stderr) == [b"false", b"true", b"true"]


@pytest.mark.needs("openssl")
async def test_a_session_is_resumed_by_s_client_again_and_again(
    authorities: Authorities, files: Files
) -> None:
    right = authorities.right.pem
    async with echoing(ServerTLS(authorities.server("example.org", "P-256"))) as (port, infos):
        command = openssl_client(Case("TLSv1.2"), port, files.ca(right), None)
        await trio.run_process([*command, "-reconnect"], stdin=b"", capture_stdout=True)
    assert [info.session_reused for info in infos] == [False] + [True] * 5
