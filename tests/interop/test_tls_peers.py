"""TLS with those that no one here wrote, in both roles: OpenSSL, GnuTLS, curl, Go and Node.js.

Each value of the axes of ``test_tls_matrix.py`` meets each of them at least once, with data both
ways, an end that both sides have seen, and where something is wrong the words of either side.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import ipaddress
import json
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import trio

import trisock
from helpers.certificates import KINDS, der
from helpers.documents import ROOT
from helpers.pairs import closing
from helpers.programs import running
from helpers.tls_axes import (
    CLIENT_CERTIFICATES,
    NAMES,
    VERSIONS,
    Authorities,
    ClientCertificate,
    Fault,
    Name,
    client_of,
)
from trisock import Certificate, ServerTLS, Socket, TLSError

PEERS = Path(__file__).parent / "tls_peers"

# Several records' worth, in lines; no line begins as a command of s_client or s_server does.
QUESTION = b"0123456789\n" * 4000
ANSWER = b"9876543210\n" * 4000


# ---- cases: one value of one axis is another than usual ----


class ALPN(NamedTuple):
    offered: str | None = None
    spoken: str | None = None
    required: bool = False

    @property
    def chosen(self) -> str | None:
        return self.offered if self.offered == self.spoken else None


NO_ALPN = ALPN()
ALPNS = {
    "match": ALPN("http/1.1", "http/1.1"),
    "no match": ALPN("http/1.1", "imap"),
    "no match, required": ALPN("http/1.1", "imap", required=True),
}


@dataclasses.dataclass(frozen=True)
class Case:
    version: str = "TLSv1.3"
    kind: str = "P-256"
    name: Name = NAMES["exact"]
    client_certificate: ClientCertificate = CLIENT_CERTIFICATES["none"]
    alpn: ALPN = NO_ALPN

    @property
    def ascii_name(self) -> str:
        return self.name.on_the_wire or self.name.asked

    @property
    def is_address(self) -> bool:
        with contextlib.suppress(ValueError):
            return bool(ipaddress.ip_address(self.ascii_name))
        return False


def cases() -> Iterator[tuple[str, Case]]:
    for version in VERSIONS:
        usual = Case(version)
        for kind in KINDS:
            yield f"{version}, {kind}", dataclasses.replace(usual, kind=kind)
        for words, name in NAMES.items():
            yield f"{version}, name: {words}", dataclasses.replace(usual, name=name)
        for words, shown in CLIENT_CERTIFICATES.items():
            case = dataclasses.replace(usual, client_certificate=shown)
            yield f"{version}, client certificate: {words}", case
        for words, alpn in ALPNS.items():
            yield f"{version}, ALPN: {words}", dataclasses.replace(usual, alpn=alpn)


class Files:
    """Certificates where programs can read them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def ca(self, pem: bytes) -> Path:
        path = self.directory / "ca.pem"
        path.write_bytes(pem)
        return path

    def certificate(self, name: str, certificate: Certificate) -> tuple[Path, Path]:
        chain, key = self.directory / f"{name}-chain.pem", self.directory / f"{name}-key.pem"
        chain.write_bytes(certificate._chain)
        key.touch(mode=0o600)
        key.write_bytes(certificate._private_key)
        return chain, key


# ---- the peers ----

# What they say of an alert that they have got: OpenSSL (and who is built on it), GnuTLS, Go.
HEARD = {
    "bad certificate": [
        "alert bad certificate",
        "alert [42]",
        "Alert[2|42]",
        "tls: bad certificate",
    ],
    # (And where curl passes on OpenSSL's words without saying whose they are.)
    "certificate expired": [
        "alert certificate expired",
        "TLS alert, certificate expired",
        "alert [45]",
        "tls: expired certificate",
    ],
    "unknown ca": ["alert unknown ca", "alert [48]", "tls: unknown certificate authority"],
    "handshake failure": ["alert handshake failure", "alert [40]", "tls: handshake failure"],
    "certificate required": [
        "alert certificate required",
        "alert number 116",
        "alert [116]",
        "tls: certificate required",
        "tls: alert(116)",
    ],
}

Command = list[str | Path]


class Peer(NamedTuple):
    """A program that speaks TLS."""

    name: str
    program: str
    client: Callable[[Case, int, Path, tuple[Path, Path] | None], Command]
    server: Callable[[Case, Path, tuple[Path, Path]], Command] | None
    says_alpn: str
    says_wrong_name: str
    interop: bool = False

    def marks(self) -> list[pytest.MarkDecorator]:
        return [pytest.mark.needs(self.program)] + [pytest.mark.interop] * self.interop


def openssl_client(
    case: Case, port: int, ca: Path, certificate: tuple[Path, Path] | None
) -> Command:
    command: Command = ["openssl", "s_client", "-connect", f"127.0.0.1:{port}"]
    command += [OPENSSL_VERSIONS[case.version], "-CAfile", ca, "-verify_return_error"]
    if case.is_address:
        command += ["-verify_ip", case.ascii_name]
    else:
        command += ["-servername", case.ascii_name, "-verify_hostname", case.ascii_name]
    if case.alpn.offered:
        command += ["-alpn", case.alpn.offered]
    if certificate is not None:
        command += ["-cert", certificate[0], "-key", certificate[1]]
    return command


OPENSSL_VERSIONS = {
    "TLSv1": "-tls1",
    "TLSv1.1": "-tls1_1",
    "TLSv1.2": "-tls1_2",
    "TLSv1.3": "-tls1_3",
}


def openssl_server(case: Case, ca: Path, certificate: tuple[Path, Path]) -> Command:
    command: Command = ["openssl", "s_server", "-accept", "127.0.0.1:0", "-rev"]
    command += [OPENSSL_VERSIONS[case.version], "-cert", certificate[0], "-key", certificate[1]]
    asked = case.client_certificate.asked
    if asked != "no":
        command += ["-verify" if asked == "optional" else "-Verify", "1", "-CAfile", ca]
        command += ["-verify_return_error"]
    if case.alpn.spoken:
        command += ["-alpn", case.alpn.spoken]
    return command


def gnutls_client(
    case: Case, port: int, ca: Path, certificate: tuple[Path, Path] | None
) -> Command:
    command: Command = ["gnutls-cli", "--port", str(port), "--x509cafile", ca]
    command += [GNUTLS_PRIORITIES[case.version], f"--verify-hostname={case.name.asked}"]
    if not case.is_address:
        command += [f"--sni-hostname={case.ascii_name}"]
    if case.alpn.offered:
        command += [f"--alpn={case.alpn.offered}"]
    if certificate is not None:
        command += ["--x509certfile", certificate[0], "--x509keyfile", certificate[1]]
    return [*command, "127.0.0.1"]


GNUTLS_PRIORITIES = {
    version: f"--priority=NORMAL:-VERS-ALL:+VERS-{version.replace('v', '')}" for version in VERSIONS
}


def gnutls_server(case: Case, ca: Path, certificate: tuple[Path, Path]) -> Command:
    command: Command = [
        "gnutls-serv",
        "--debug=5",
        "--echo",
        "--port",
        "0",
        GNUTLS_PRIORITIES[case.version],
    ]
    command += ["--x509certfile", certificate[0], "--x509keyfile", certificate[1]]
    if case.client_certificate.asked == "no":
        command += ["--disable-client-cert"]
    else:
        command += ["--x509cafile", ca, "--verify-client-cert"]
        if case.client_certificate.asked == "required":
            command += ["--require-client-cert"]
    if case.alpn.spoken:
        command += [f"--alpn={case.alpn.spoken}"]
        if case.alpn.required:
            command += ["--alpn-fatal"]
    return command


def curl(case: Case, port: int, ca: Path, certificate: tuple[Path, Path] | None) -> Command:
    version = case.version.replace("TLSv", "")
    command: Command = ["curl", "--verbose", "--no-progress-meter", "--noproxy", "*", "--http1.1"]
    command += [f"--tlsv{version}", "--tls-max", version, "--cacert", ca]
    command += ["--connect-to", f"::127.0.0.1:{port}", "--data-binary", "@-"]
    if not case.alpn.offered:
        command += ["--no-alpn"]
    if certificate is not None:
        command += ["--cert", certificate[0], "--key", certificate[1]]
    return [*command, f"https://{case.name.asked}:{port}/"]


def our_client(
    program: Command, case: Case, port: int, ca: Path, certificate: tuple[Path, Path] | None
) -> Command:
    command = [*program, "client", "-connect", f"127.0.0.1:{port}", "-version", case.version]
    command += ["-ca", ca, "-name", case.ascii_name]
    if case.alpn.offered:
        command += ["-alpn", case.alpn.offered]
    if certificate is not None:
        command += ["-cert", certificate[0], "-key", certificate[1]]
    return command


def our_server(program: Command, case: Case, ca: Path, certificate: tuple[Path, Path]) -> Command:
    command = [*program, "server", "-version", case.version]
    command += ["-cert", certificate[0], "-key", certificate[1]]
    if case.client_certificate.asked != "no":
        command += ["-ca", ca]
        if case.client_certificate.asked == "required":
            command += ["-require"]
    if case.alpn.spoken:
        command += ["-alpn", case.alpn.spoken]
    return command


GO: Command = ["tls-peer-in-go"]
NODE: Command = ["node", PEERS / "peer.js"]

OPENSSL = Peer(
    "openssl",
    "openssl",
    openssl_client,
    openssl_server,
    "ALPN protocol: ",
    "(hostname|IP address) mismatch",
)

ALL = [
    OPENSSL,
    Peer(
        "gnutls",
        "gnutls-cli",
        gnutls_client,
        gnutls_server,
        "- Application protocol: ",
        "name in the certificate does not match",
        interop=True,
    ),
    Peer("curl", "curl", curl, None, "ALPN: server accepted ", "no alternative certificate"),
    Peer(
        "go",
        "go",
        functools.partial(our_client, GO),
        functools.partial(our_server, GO),
        "alpn=",
        "x509: certificate is valid for",
        interop=True,
    ),
    Peer(
        "node",
        "node",
        functools.partial(our_client, NODE),
        functools.partial(our_server, NODE),
        "alpn=",
        "ERR_TLS_CERT_ALTNAME_INVALID",
        interop=True,
    ),
]


# ---- running them ----


@pytest.fixture(scope="session", name="authorities")
def fixture_authorities() -> Authorities:
    return Authorities()


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


@pytest.fixture(scope="session")
def go_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("go") / "peer"
    subprocess.run(["go", "build", "-o", path, PEERS / "peer.go"], check=True, timeout=300)
    return path


@pytest.fixture
def built(request: pytest.FixtureRequest) -> Callable[[Command], Command]:
    """Give commands with Go's program built, if it is Go's that they name."""

    def build(command: Command) -> Command:
        if command[0] == GO[0]:
            return [request.getfixturevalue("go_program"), *command[1:]]
        return command

    return build


@dataclasses.dataclass
class Output:
    out: bytes = b""
    err: bytes = b""

    @property
    def text(self) -> str:
        return (self.out + self.err).decode(errors="replace")


async def run_client(command: Command, *, end_when: bytes = ANSWER) -> tuple[int, Output]:
    """Run a client that passes on its standard input; end that when it has got the answer."""
    output = Output()
    pipe = subprocess.PIPE
    environment = {**os.environ, "LC_ALL": "C.UTF-8"}  # for international names
    async with running(*command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None

        async def feed(stdin: trio.abc.SendStream) -> None:
            with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                await stdin.send_all(QUESTION)
                if command[0] == "curl":  # it sends when it has all
                    await stdin.aclose()

        async def read_errors(stderr: trio.abc.ReceiveStream) -> None:
            async for chunk in stderr:
                output.err += chunk

        async with process.stdin, process.stdout, process.stderr, trio.open_nursery() as nursery:
            nursery.start_soon(feed, process.stdin)
            nursery.start_soon(read_errors, process.stderr)
            async for chunk in process.stdout:
                output.out += chunk
                if end_when in output.out:
                    await process.stdin.aclose()
        status = await process.wait()
    return status, output


class Server:
    """A program that runs as a server, and what it has said so far."""

    def __init__(self, process: trio.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self.stdin = process.stdin
        self.output = process.stdout
        self.kill = process.kill
        self._more = trio.Event()
        self._ended = False
        self.port = 0
        self.text = ""

    async def listen_to_it(self) -> None:
        """Read all that it says: a program whose pipe is full stands still."""
        async for chunk in self.output:
            self.text += chunk.decode(errors="replace")
            self._tell()
        self._ended = True
        self._tell()

    def _tell(self) -> None:
        self._more.set()
        self._more = trio.Event()

    async def says(self, *patterns: str) -> re.Match[str]:
        """Wait until it says one of these."""
        while True:
            if found := re.search("|".join(patterns), self.text):
                return found
            assert not self._ended, f"it has ended, and not said {patterns}, but {self.text}"
            await self._more.wait()


LISTENS = r"(?:ACCEPT .*:|port |listening on IPv4 .* port )(\d+)(?:\n|\.\.\.done)"


@contextlib.asynccontextmanager
async def run_server(command: Command) -> AsyncIterator[Server]:
    pipe = subprocess.PIPE
    if command[0] == "gnutls-serv":
        command = ["stdbuf", "--output=L", *command]
    async with running(*command, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT) as process:
        server = Server(process)
        async with server.stdin, server.output, trio.open_nursery() as nursery:
            nursery.start_soon(server.listen_to_it)
            port = int((await server.says(LISTENS))[1])
            server.port = port or listening_port(process.pid)
            yield server
            process.terminate()


def listening_port(pid: int) -> int:
    """Return the IPv4 port that a process listens on, which does not say which it got."""
    sockets = {os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()}
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, _, state, *_, inode = line.split()[:10]
        if state == "0A" and f"socket:[{inode}]" in sockets:
            return int(local.rpartition(":")[2], 16)
    raise AssertionError("it listens nowhere")


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
    async with await trisock.listen(0, "127.0.0.1") as listener:

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
# (or did, before 1.21), GnuTLS has words of its own, and Node.js hangs up.
REFUSED = {
    "openssl": "with the alert '{}'",
    "gnutls": "with the alert '({}|access denied|decode error)'",
    "go": "with the alert '({}|bad certificate)'",
    "node": "with the alert '{}'|closed the connection|without close_notify",
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
    error: TLSError | None = None
    assert peer.server is not None
    command = peer.server(case, files.ca(right), files.certificate("server", certificate))
    async with run_server(built(command)) as server:
        sock = await trisock.connect("127.0.0.1", server.port)
        async with closing(sock):
            try:
                info = await sock.starttls(client_tls, server_hostname=case.name.asked)
                answer = await ask(sock)
                await sock.stoptls()  # each side's close_notify, to which it is the answer
            except TLSError as exc:
                error = exc
            await sock.close()
        if (fault := case.name.fault) is not None:
            assert error is not None
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
    async with await trisock.listen(0, "127.0.0.1") as listener:
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


# ---- what attackers and the past ask for ----


async def s_client(
    authorities: Authorities, files: Files, version: str, *options: str | Path
) -> tuple[str, list[object]]:
    """Have s_client say something; return what it says of the connection, and what came of it."""
    heard: list[object] = []
    async with await trisock.listen(0, "127.0.0.1") as listener:

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
async def test_a_client_that_was_talked_into_a_lower_version_is_refused(
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
    async with await trisock.listen(0, "127.0.0.1") as listener:
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


# ---- scanners ----


@pytest.fixture
def scanned_example(authorities: Authorities, files: Files) -> Command:
    """Give the example with a certificate that is as good as one can be on a private network."""
    certificate = authorities.right.issue(
        "localhost", "127.0.0.1", revocation_list="http://localhost/revoked"
    )
    chain, key = files.certificate("server", certificate)
    example = ROOT / "examples" / "https_server.py"
    return [sys.executable, example, "--port", "0", "--cert", chain, "--key", key]


@pytest.mark.interop
@pytest.mark.needs("testssl")
def test_testssl_finds_nothing(
    scanned_example: Command, authorities: Authorities, files: Files, tmp_path: Path
) -> None:
    findings = tmp_path / "findings.json"
    with example(scanned_example) as port:
        command: Command = ["testssl", "--warnings=off", "--quiet", "--color", "0"]
        command += ["--nodns", "none", "--add-ca", files.ca(authorities.right.pem)]
        command += ["--jsonfile", findings, f"localhost:{port}"]
        subprocess.run(command, check=False, stdout=subprocess.DEVNULL, timeout=900)
    found = json.loads(findings.read_text())
    assert len(found) > 100
    assert {"cert_chain_of_trust", "heartbleed", "LUCKY13", "HSTS_time"} <= {
        each["id"] for each in found
    }
    # (WARN is about the scanner itself: what its OpenSSL cannot do.)
    severe = ("LOW", "MEDIUM", "HIGH", "CRITICAL", "FATAL")
    assert [each for each in found if each["severity"] in severe] == []


@pytest.mark.interop
@pytest.mark.needs("sslyze")
def test_sslyze_finds_nothing(
    scanned_example: Command, authorities: Authorities, files: Files
) -> None:
    """Mozilla's "intermediate" configuration, but for two more curves that are as good."""
    with example(scanned_example) as port:
        command: Command = ["sslyze", "--mozilla_config=intermediate"]
        command += ["--certinfo_ca_file", files.ca(authorities.right.pem), f"localhost:{port}"]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    _, _, verdict = done.stdout.partition("COMPLIANCE AGAINST TLS CONFIGURATION")
    complaints = re.findall(r"^ +\* (.*)", verdict, re.MULTILINE)
    curves = [each for each in complaints if each.startswith("tls_curves: ")]
    assert verdict
    assert complaints == curves
    assert set(re.findall(r"'(\w+)'", "".join(curves))) <= {"secp521r1", "X448"}


@contextlib.contextmanager
def example(command: Command) -> Iterator[int]:
    """Run an example that says on which port it listens."""
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline().split()[-1])
        finally:
            process.terminate()
