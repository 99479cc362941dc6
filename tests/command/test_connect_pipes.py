"""``trisock connect`` with pipes and files."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing

from helpers.certificates import CertificateAuthority
from helpers.command import Servers
from helpers.local_servers import LocalServer, echo, server_tls, serving
from trisock import Socket, bind, starttls
from trisock.__main__ import main
from trisock._command import connect as connect_module
from trisock._command.connect import Ends, converse
from trisock._command.roles import Roles
from trisock._command.urls import parse

Connect = Callable[..., tuple[int, bytes, str]]


@pytest.fixture
def connect(capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch) -> Connect:
    """Run ``trisock connect`` in this process. Returns the status, stdout and stderr."""

    def run(*arguments: object, stdin: bytes | Path = b"") -> tuple[int, bytes, str]:
        with _opened(stdin) as file:
            monkeypatch.setattr(sys, "stdin", file)
            status = main(["connect", *map(str, arguments)])
        out, err = capfdbinary.readouterr()
        return status, out, err.decode()

    return run


@contextlib.contextmanager
def _opened(stdin: bytes | Path) -> Iterator[object]:
    if isinstance(stdin, Path):
        with stdin.open() as file:
            yield file
        return
    reader, writer = os.pipe()
    os.write(writer, stdin)
    os.close(writer)
    with open(reader) as file:
        yield file


def test_piped_input_is_sent_unchanged_and_followed_by_eof(connect: Connect) -> None:
    """The server answers and closes only after our EOF, and the answer arrives."""

    async def count(sock: Socket) -> None:
        received = b"".join([chunk async for chunk in sock])
        await sock.send(received, b"%d" % len(received))

    with serving(LocalServer(count)) as [port]:
        status, out, err = connect(f"tcp://127.0.0.1:{port}", stdin=b"a\nb\r\n\xff\x1b")
    assert (status, out, err) == (0, b"a\nb\r\n\xff\x1b7", "")


def test_a_file_is_sent(connect: Connect, tmp_path: Path) -> None:
    path = tmp_path / "input"
    path.write_bytes(bytes(range(256)) * 1000)
    with serving(LocalServer(echo)) as [port]:
        status, out, _ = connect(f"tcp://127.0.0.1:{port}", stdin=path)
    assert (status, out) == (0, path.read_bytes())


def test_a_unix_socket_is_connected_to(connect: Connect, tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()

        def answer() -> None:
            peer, _ = listening.accept()
            with peer:
                while data := peer.recv(1000):
                    peer.sendall(data)

        thread = threading.Thread(target=answer)
        thread.start()
        status, out, _ = connect(f"unix:{path}", "--proxy-protocol", stdin=b"hello")
        thread.join(30)
    assert (status, out) == (0, b"PROXY UNKNOWN\r\nhello")


def test_an_absent_unix_socket_is_explained(connect: Connect, tmp_path: Path) -> None:
    status, out, err = connect(f"unix:{tmp_path}/s")
    assert (status, out) == (2, b"")
    assert err == f"trisock: cannot connect to {tmp_path}/s: No such file or directory\n"


def test_a_proxy_header_with_the_connections_addresses_is_sent_first(
    connect: Connect, command_ca: CertificateAuthority, ca_file: Path
) -> None:
    tls = server_tls(command_ca)

    async def handler(sock: Socket) -> None:
        header = await sock.recv_line(delimiter=b"\r\n")
        expected = b"PROXY TCP4 127.0.0.1 127.0.0.1 %d %d"
        assert header == expected % (sock.getpeer().port, sock.getlocal().port)
        await starttls.accept(sock, "imap", tls)
        await sock.send(await sock.recv())

    with serving(LocalServer(handler)) as [port]:
        url = f"imap://127.0.0.1:{port}"
        status, out, _ = connect(url, "--ca", ca_file, "--proxy-protocol", stdin=b"hello")
    assert (status, out) == (0, b"hello")


@pytest.mark.parametrize(
    ("server_alpn", "selected"), [(("h2", "http/1.1"), "http/1.1"), (("h2",), None)]
)
def test_http_2_is_not_offered(
    server_alpn: tuple[str, ...],
    selected: str | None,
    connect: Connect,
    command_ca: CertificateAuthority,
    ca_file: Path,
) -> None:
    """A server that prefers HTTP/2 would not understand typed text."""

    async def handler(sock: Socket) -> None:
        assert sock.tls is not None
        await sock.send(str(sock.tls.alpn_protocol).encode())

    tls = server_tls(command_ca, alpn=server_alpn)
    with serving(LocalServer(handler, tls)) as [port]:
        status, out, _ = connect(f"https://localhost:{port}", "--ca", ca_file)
    assert (status, out) == (0, str(selected).encode())


def test_under_tls_the_server_ends_the_connection(
    connect: Connect, command_ca: CertificateAuthority, ca_file: Path
) -> None:
    async def handler(sock: Socket) -> None:
        assert await sock.recv_line() == b"QUIT"
        await sock.send(b"221 bye\r\n")

    with serving(LocalServer(handler, server_tls(command_ca))) as [port]:
        status, out, err = connect(f"tls://localhost:{port}", "--ca", ca_file, stdin=b"QUIT\n")
    assert (status, out, err) == (0, b"221 bye\r\n", "")


def test_under_tls_a_silent_peer_is_disconnected(
    connect: Connect,
    command_ca: CertificateAuthority,
    ca_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """TLS has no half-close. After our input ends, the peer may send until it falls silent."""
    monkeypatch.setattr(connect_module, "_SILENCE", 1)
    told: list[str] = []
    monkeypatch.setattr("trisock._command.output.notify", told.append)
    closed: list[bytes] = []

    async def handler(sock: Socket) -> None:
        data = await sock.recv()
        for _ in range(5):
            await sock.send(data)
        closed.append(await sock.recv())

    with serving(LocalServer(handler, server_tls(command_ca))) as [port]:
        url = f"tls://localhost:{port}"
        status, out, err = connect(url, "--ca", ca_file, stdin=b"hello")
    assert (status, out, closed) == (2, b"hello" * 5, [b""])
    assert told[1:] == ["end of the input; waiting for the peer to close"]
    assert err == (
        "trisock: the peer did not end the connection, and was silent for 1 second: end the input "
        "with a command that makes the peer close, such as QUIT\n"
    )


async def test_a_slow_output_does_not_count_as_a_silent_peer(
    command_ca: CertificateAuthority,
    ca_file: Path,
    mock_clock: trio.testing.MockClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connect_module, "_SILENCE", 1)
    size = 300_000  # more than a pipe holds

    async def answer(sock: Socket) -> None:
        await sock.send(bytes(size))

    reader, writer = os.pipe()
    with open(os.devnull) as null, open(reader, "rb") as end, open(writer, "wb"):
        ends = Ends(null.fileno(), writer, lambda text: None)
        roles = Roles(ca_file.read_bytes(), None)
        async with trio.open_nursery() as nursery:
            tls = server_tls(command_ca)
            server = await bind(nursery, 0, answer, host="127.0.0.1", tls=tls)
            target = parse(f"tls://localhost:{server.port}")
            async with trio.open_nursery() as talking:
                talking.start_soon(
                    partial(converse, target, roles, ends, proxy_protocol=False, keep_lf=False)
                )
                while select.select([], [writer], [], 0)[1]:  # until the pipe is full
                    await trio.lowlevel.checkpoint()
                mock_clock.jump(2)
                await trio.testing.wait_all_tasks_blocked()
                received = await trio.to_thread.run_sync(end.read, size)
            nursery.cancel_scope.cancel()
    assert received == bytes(size)


def test_eof_from_the_peer_ends_the_command(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The input is still open when the peer closes."""

    async def handler(sock: Socket) -> None:
        await sock.send(b"bye\n")

    reader, writer = os.pipe()
    with serving(LocalServer(handler)) as [port], open(reader), open(writer, "wb"):
        status, out, _ = connect(f"tcp://127.0.0.1:{port}", stdin=Path(f"/proc/self/fd/{reader}"))
    assert (status, out) == (0, b"bye\n")


def test_a_certificate_that_does_not_verify_ends_the_command(
    connect: Connect, servers: Servers
) -> None:
    status, out, err = connect(servers.wrong, "--ca", servers.ca, stdin=b"secret")
    assert (status, out) == (2, b"")
    assert err == (
        "trisock: the certificate is not for localhost: get one that also names it in its "
        "subjectAltName, or check the name that clients use (--name)\n"
    )
    status, _, err = connect(servers.wrong, "--ca", servers.ca, "--name", "b.example")
    assert (status, "not for b.example" in err) == (2, True)


@pytest.mark.parametrize("scheme", ["tcp", "tls"])
def test_a_connection_that_breaks_after_the_input_is_an_error(
    scheme: str, connect: Connect, command_ca: CertificateAuthority, ca_file: Path
) -> None:
    async def handler(sock: Socket) -> None:
        await sock.send(b"half an ans")
        assert await sock.recv() == b"hello"
        if not sock.istls():
            assert await sock.recv() == b""  # EOF, because the input has ended
        sock.abort()

    tls, ca = (server_tls(command_ca), ("--ca", ca_file)) if scheme == "tls" else (None, ())
    with serving(LocalServer(handler, tls)) as [port]:
        status, out, err = connect(f"{scheme}://127.0.0.1:{port}", *ca, stdin=b"hello")
    assert (status, out) == (2, b"half an ans")
    assert err.startswith("trisock: ")
    assert "Traceback" not in err


def test_connect_works_without_an_input_or_an_output(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shell has closed the input and the output (``<&- >&-``)."""
    received: list[bytes] = []

    async def handler(sock: Socket) -> None:
        await sock.send(b"hello")
        received.append(await sock.recv())

    with serving(LocalServer(handler)) as [port]:
        monkeypatch.setattr(sys, "stdin", None)
        monkeypatch.setattr(sys, "stdout", None)
        assert main(["connect", f"tcp://127.0.0.1:{port}"]) == 0
    assert received == [b""]


def test_a_closed_output_pipe_ends_the_command(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    async def handler(sock: Socket) -> None:
        await sock.send(b"hello")
        await sock.recv()

    reader, writer = os.pipe()
    os.close(reader)
    with (
        serving(LocalServer(handler)) as [port],
        open(writer, "w") as out,
        open(os.devnull) as null,
    ):
        monkeypatch.setattr(sys, "stdin", null)
        monkeypatch.setattr(sys, "stdout", out)
        status = main(["connect", f"tcp://127.0.0.1:{port}"])
    assert (status, capfd.readouterr().err) == (141, "")


def test_an_input_that_cannot_be_read_is_explained(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """For example, standard input is a directory."""

    class Directory:
        def fileno(self) -> int:
            return descriptor

    descriptor = os.open(tmp_path, os.O_RDONLY)
    try:
        with serving(LocalServer(echo)) as [port]:
            monkeypatch.setattr(sys, "stdin", Directory())
            status = main(["connect", f"tcp://127.0.0.1:{port}"])
    finally:
        os.close(descriptor)
    assert status == 3
    assert capfd.readouterr().err == "trisock: input or output failed: [Errno 21] Is a directory\n"
