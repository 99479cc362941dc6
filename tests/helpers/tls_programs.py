"""Programs that use other TLS libraries, functions that run them, and the cases to test."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import ipaddress
import os
import re
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import trio

from helpers.certificates import KINDS
from helpers.documents import ROOT
from helpers.programs import running
from helpers.tls_axes import (
    CLIENT_CERTIFICATES,
    NAMES,
    VERSIONS,
    ClientCertificate,
    Name,
)
from trisock import Certificate

PEERS = ROOT / "tests" / "interop" / "tls_peers"

# Lines that fill several records. No line is a command of s_client or s_server.
QUESTION = b"0123456789\n" * 4000
ANSWER = b"9876543210\n" * 4000


# ---- cases: each case changes one setting of the default case of a TLS version ----


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
    """Writes certificates to files, for other programs."""

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

# How OpenSSL (which curl and Node.js use), GnuTLS and Go report an alert from their peer.
REPORTS = {
    "bad certificate": [
        "alert bad certificate",
        "alert [42]",
        "Alert[2|42]",
        "tls: bad certificate",
    ],
    "certificate expired": [
        "alert certificate expired",
        "TLS alert, certificate expired",  # curl
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
    """A program that speaks TLS.

    Attributes:
      client, server: functions that return the command line of a client or server.
      alpn_report: the text that a client prints before the negotiated protocol.
      name_error: a pattern that matches a client's error if the server's name is wrong.
    """

    name: str
    program: str
    client: Callable[[Case, int, Path, tuple[Path, Path] | None], Command]
    server: Callable[[Case, Path, tuple[Path, Path]], Command] | None
    alpn_report: str
    name_error: str
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
    command: Command = ["gnutls-serv", "--debug=5", "--echo", "--port", "0"]
    command += [GNUTLS_PRIORITIES[case.version]]
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


def our_peer(name: str, *program: str | Path, name_error: str) -> Peer:
    """Return a peer that runs a program from the directory tls_peers."""
    return Peer(
        name=name,
        program=name,
        client=functools.partial(our_client, [*program]),
        server=functools.partial(our_server, [*program]),
        alpn_report="alpn=",
        name_error=name_error,
        interop=True,
    )


GO_NAME_ERROR = "x509: certificate is valid for"

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
    our_peer("go", "not built yet", name_error=GO_NAME_ERROR),
    our_peer("node", "node", PEERS / "peer.js", name_error="ERR_TLS_CERT_ALTNAME_INVALID"),
]


# ---- running the programs ----


@dataclasses.dataclass
class Output:
    out: bytes = b""
    err: bytes = b""

    @property
    def text(self) -> str:
        return (self.out + self.err).decode(errors="replace")


async def run_client(command: Command, *, end_when: bytes = ANSWER) -> tuple[int, Output]:
    """Run a client that sends what it reads from stdin. Close stdin when the answer is complete."""
    output = Output()
    pipe = subprocess.PIPE
    environment = {**os.environ, "LC_ALL": "C.UTF-8"}  # for internationalized names
    async with running(*command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None

        async def feed(stdin: trio.abc.SendStream) -> None:
            with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                await stdin.send_all(QUESTION)
                if command[0] == "curl":  # curl sends nothing before EOF on stdin
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
    """A program that runs as a server, and its output so far."""

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

    async def read_output(self) -> None:
        """Read all output, because a full pipe would block the program."""
        async for chunk in self.output:
            self.text += chunk.decode(errors="replace")
            self._wake()
        self._ended = True
        self._wake()

    def _wake(self) -> None:
        self._more.set()
        self._more = trio.Event()

    async def printed(self, *patterns: str) -> re.Match[str]:
        """Wait until the program has printed a text that matches one of these patterns."""
        while True:
            if found := re.search("|".join(patterns), self.text):
                return found
            assert not self._ended, f"the program exited without printing {patterns}: {self.text}"
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
            nursery.start_soon(server.read_output)
            port = int((await server.printed(LISTENS))[1])
            server.port = port or listening_port(process.pid)
            yield server
            process.terminate()


def listening_port(pid: int) -> int:
    """Return the IPv4 port that a process listens on."""
    sockets = {os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()}
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, _, state, *_, inode = line.split()[:10]
        if state == "0A" and f"socket:[{inode}]" in sockets:
            return int(local.rpartition(":")[2], 16)
    raise AssertionError("the process listens on no port")
