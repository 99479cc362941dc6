"""The examples, run as programs, with independent clients."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess

import pytest
import trio

import trisock
from helpers.cancellation import grid
from helpers.example_clients import codes, reply, trusting
from helpers.examples import EXAMPLES, command, running, started
from helpers.pairs import read_all
from helpers.programs import curl, run
from helpers.shared_examples import SharedServer
from trisock import Socket
from trisock.testing import Authority

# key_value has no options. test_key_value_example.py tests it.
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "key_value")
CLIENTS = {
    "anyio_stream",
    "connection_pool",
    "echo_client",
    "h11_client",
    "hammerspoon_http_client",
    "hammerspoon_ssdp",
    "hammerspoon_wake_on_lan",
    "many_writers",
    "pluto_client",
    "pluto_wake_on_lan",
    "socks_client",
    "websocket_client",
}
SERVERS = [
    name
    for name in NAMES
    # Other files test how these examples stop.
    if name
    not in {*CLIENTS, "hammerspoon_server", "mdns_listener", "tls_proxy", "submission_server"}
]
TLS_SERVERS = ["https_server", "smtp_server", "http_and_https"]


# ---- all examples ----


@pytest.mark.parametrize(
    ("name", "signum"),
    grid(
        lambda name, signum: signum == signal.SIGTERM or name == "echo_server",
        SERVERS,
        [signal.SIGTERM, signal.SIGINT],
    ),
)
async def test_a_signal_stops_a_server_cleanly(name: str, signum: signal.Signals) -> None:
    async with running(name) as server:
        server.ask_to_stop(signum)
        await server.stop()
        with pytest.raises(ConnectionRefusedError):
            await trisock.connect("127.0.0.1", server.port)


@pytest.mark.parametrize("name", grid(lambda name: name.startswith("echo"), NAMES))
async def test_help_shows_how_to_run_the_example(name: str) -> None:
    result = await run(*command(name, "--help"))
    assert result.returncode == 0
    assert f"python examples/{name}.py" in result.stdout.decode()


@pytest.mark.parametrize("name", [*TLS_SERVERS, "pluto_https_server"])
async def test_a_tls_server_without_certificates_says_to_install_trustme(
    name: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "trustme.py").write_text("raise ImportError")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    result = await run(*command(name, "--port", "0"))
    assert result.returncode == 1
    complaint = result.stderr.decode()
    assert complaint.endswith("install trustme to create one\n")
    assert complaint.count("\n") == 1  # no traceback


@pytest.mark.parametrize(
    ("name", "arguments", "status", "complaint"),
    [
        ("connection_pool", ["--port", "PORT", "hello"], 1, "Connection refused"),
        ("echo_client", ["--port", "PORT", "hello"], 1, "Connection refused"),
        ("many_writers", ["--port", "PORT"], 1, "Connection refused"),
        ("h11_client", ["http://127.0.0.1:PORT/"], 1, "Connection refused"),
        ("websocket_client", ["ws://127.0.0.1:PORT/", "hello"], 1, "Connection refused"),
        ("anyio_stream", ["--port", "PORT", "hello"], 1, "Connection refused"),
        ("socks_client", ["--proxy", "socks5://127.0.0.1:PORT", "https://x/"], 1, "not connect"),
        ("pluto_client", ["--port", "PORT"], 1, "Failed to connect.\n"),
        ("hammerspoon_http_client", ["127.0.0.1", "PORT"], 0, "Connection refused"),
    ],
)
async def test_a_client_reports_a_refused_connection_in_one_line(
    name: str, arguments: list[str], status: int, complaint: str, free_port: int
) -> None:
    with_port = [each.replace("PORT", str(free_port)) for each in arguments]
    result = await run(*command(name, *with_port))
    assert (result.returncode, result.stdout) == (status, b"")
    assert complaint in result.stderr.decode()
    assert result.stderr.count(b"\n") == 1  # no traceback


@pytest.mark.parametrize("name", TLS_SERVERS)
async def test_a_tls_server_accepts_certificate_and_key_in_one_file(
    name: str, tmp_path: pathlib.Path, authority: Authority
) -> None:
    path = tmp_path / "both.pem"
    given = authority.certificate("given.example")
    path.write_bytes(given._private_key + given._chain)
    async with running(name, "--cert", str(path)) as server:
        async with await trisock.connect("127.0.0.1", server.port) as sock:
            if name == "smtp_server":
                await reply(sock)
                assert await codes(sock, b"STARTTLS\r\n") == [220]
            await sock.starttls(authority.client_tls("given.example"))


# ---- echo_server, echo_client ----


async def test_echo_server_returns_every_byte_and_then_eof() -> None:
    sent = bytes(range(256)) * 4096
    async with running("echo_server") as server:
        async with await trio.open_tcp_stream("127.0.0.1", server.port) as stream:
            received = bytearray()

            async def send() -> None:
                await stream.send_all(sent)
                await stream.send_eof()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(send)
                async for chunk in stream:
                    received += chunk
        assert received == sent


async def test_echo_client_sends_its_arguments_and_prints_the_replies() -> None:
    async with running("echo_server") as server:
        result = await run(*command("echo_client", "--port", str(server.port), "one", "two"))
    assert (result.returncode, result.stdout, result.stderr) == (0, b"one\ntwo\n", b"")


async def test_echo_client_sends_standard_input_and_prints_the_replies() -> None:
    # The buffers between client and server cannot hold all data, so the client must read while
    # it sends.
    sent = b"".join(b"line %d\n" % number for number in range(500_000))
    async with running("echo_server") as server:
        result = await run(*command("echo_client", "--port", str(server.port)), stdin=sent)
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout == sent


async def test_echo_client_exits_at_server_eof_even_with_stdin_open() -> None:
    async with await trisock.listen(0, host="127.0.0.1") as listener:
        arguments = command("echo_client", "--port", str(listener.port))
        async with started(arguments, stdin=subprocess.PIPE) as client:
            assert client.process.stdin is not None
            await client.process.stdin.send_all(b"hello\n")
            async with await listener.accept() as sock:
                assert await sock.recv_until(b"\n") == b"hello\n"
                await sock.send(b"goodbye\n")
            assert await client.line() == "goodbye"
            assert await client.process.wait() == 0
            assert client._read_stderr() == b""


# ---- https_server ----


@pytest.mark.needs("curl")
async def test_curl_verifies_https_server(https: SharedServer) -> None:
    url = f"https://127.0.0.1:{https.port}/some/path"
    result = await curl("--cacert", https.ca, "--write-out", "%{http_version} %{http_code}", url)
    assert result.stderr == b""
    assert result.returncode == 0
    assert result.stdout == b"Hello! You asked for /some/path\n1.1 200"


@pytest.mark.needs("curl")
async def test_curl_with_another_ca_refuses_https_server(
    https: SharedServer, other_ca: str
) -> None:
    url = f"https://127.0.0.1:{https.port}/"
    assert (await curl("--cacert", other_ca, url)).returncode == 60
    assert (await curl("--cacert", https.ca, url)).returncode == 0  # the server still works


@pytest.mark.needs("curl")
async def test_https_server_keeps_a_connection_for_the_next_request(https: SharedServer) -> None:
    url = f"https://127.0.0.1:{https.port}/"
    result = await curl("--cacert", https.ca, "--write-out", "%{num_connects}\n", url, url, url)
    assert result.stdout.splitlines()[1::2] == [b"1", b"0", b"0"]


@pytest.mark.needs("curl")
async def test_https_server_sends_100_continue(https: SharedServer) -> None:
    body = bytes(range(256)) * 3000
    url = f"https://127.0.0.1:{https.port}/"
    result = await curl(
        "--cacert", https.ca, "--data-binary", "@-", "--header", "Expect: 100-continue",
        "--expect100-timeout", "30", "--verbose", url, stdin=body,
    )  # fmt: skip
    assert result.returncode == 0
    assert result.stdout == body
    assert b"< HTTP/1.1 100 Continue" in result.stderr


@pytest.mark.needs("openssl")
async def test_https_server_negotiates_alpn_with_openssl(https: SharedServer) -> None:
    result = await run(
        "openssl", "s_client", "-connect", f"127.0.0.1:{https.port}", "-CAfile", https.ca,
        "-verify_return_error", "-verify_ip", "127.0.0.1", "-alpn", "h2,http/1.1",
        "-ign_eof", "-nocommands",
        stdin=b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    )  # fmt: skip
    assert result.returncode == 0
    assert b"ALPN protocol: http/1.1" in result.stdout
    assert b"HTTP/1.1 200 OK\r\n" in result.stdout


async def ask(server: SharedServer, request: bytes) -> bytes:
    """Send a request, and return all bytes until EOF."""
    async with await trisock.connect("127.0.0.1", server.port, tls=trusting(server.ca)) as sock:
        await sock.send(request)
        return await read_all(sock)


async def test_https_server_answers_pipelined_requests_in_order(https: SharedServer) -> None:
    answers = await ask(
        https,
        b"GET /one HTTP/1.1\r\nHost: x\r\n\r\n"
        b"\r\nPOST /two HTTP/1.1\r\nHost: x\r\nContent-Length: 7\r\n\r\nGET /no"
        b"GET /three HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        b"GET /never HTTP/1.1\r\nHost: x\r\n\r\n",
    )
    bodies = [part.split(b"\r\n\r\n")[1] for part in answers.split(b"HTTP/1.1 200 OK\r\n")[1:]]
    assert bodies == [
        b"Hello! You asked for /one\n",
        b"GET /no",
        b"Hello! You asked for /three\n",
    ]


async def test_https_server_answers_a_head_request_with_headers_only(https: SharedServer) -> None:
    answer = await ask(https, b"HEAD / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"\r\nContent-Length: 23\r\n" in answer
    assert answer.endswith(b"\r\n\r\n")


async def test_https_server_survives_clients_that_vanish(https: SharedServer) -> None:
    beginnings = [b"", b"GET / HT", b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nx"]
    for sent in beginnings:
        for leave in (Socket.close, Socket.abort):
            sock = await trisock.connect("127.0.0.1", https.port, tls=trusting(https.ca))
            await sock.send(sent)
            if (ending := leave(sock)) is not None:
                await ending
    request = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    assert (await ask(https, request)).startswith(b"HTTP/1.1 200 OK\r\n")


BAD_REQUESTS = [
    (b"SSH-2.0-OpenSSH\r\n\r\n", 400),
    (b"\r\n\r\n", 400),
    (b"GET / HTTP/2.0\r\nHost: x\r\n\r\n", 400),
    (b"GET  / HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost : x\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: x\r\n folded\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: x\nX: y\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: x\x00\r\n\r\n", 400),
    (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\nx", 400),
    (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", 400),
    (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: +1\r\n\r\nx", 400),
    (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1048577\r\n\r\n", 413),
    (b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 20_000 + b"\r\n\r\n", 431),
    (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 501),
    (b"DELETE / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 501),
]


async def test_https_server_answers_a_bad_request_and_closes_the_connection(
    https: SharedServer,
) -> None:
    for request, status in BAD_REQUESTS:
        # The server must not parse the bytes after a bad request as another request.
        answer = await ask(https, request + b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 %d " % status), request
        assert answer.count(b"HTTP/1.1 ") == 1, request
        assert b"\r\nConnection: close\r\n" in answer


async def test_https_server_closes_idle_connections_when_it_stops(ca: str) -> None:
    async with running("https_server", "--write-ca", ca) as server:
        async with await trisock.connect("127.0.0.1", server.port, tls=trusting(ca)) as sock:
            await sock.send(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert await sock.recv_until(b"for /\n")
            server.ask_to_stop()
            assert await sock.recv() == b""  # without close_notify, recv() would raise TLSError


async def test_https_server_finishes_a_request_before_it_stops(ca: str) -> None:
    async with running("https_server", "--write-ca", ca) as server:
        idle = await trisock.connect("127.0.0.1", server.port, tls=trusting(ca))
        async with idle, await trisock.connect("127.0.0.1", server.port, tls=trusting(ca)) as sock:
            await idle.send(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            await idle.recv_until(b"You asked for /\n")  # otherwise it may still send its request
            await sock.send(b"POST / HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n")
            await sock.send(b"Content-Length: 5\r\n\r\n")
            assert await sock.recv_until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            server.ask_to_stop()
            assert await idle.recv() == b""  # EOF shows that the server is stopping
            await sock.send(b"hello")
            answer = await read_all(sock)
            assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
            assert b"\r\nConnection: close\r\n" in answer
            assert answer.endswith(b"\r\n\r\nhello")


# ---- http_and_https ----


@pytest.mark.needs("curl")
async def test_one_port_serves_http_and_https(http_and_https: SharedServer, other_ca: str) -> None:
    address = f"127.0.0.1:{http_and_https.port}/"
    for _ in range(2):
        result = await curl(f"http://{address}")
        assert (result.returncode, result.stdout) == (0, b"HTTP, unencrypted\n")
        result = await curl("--cacert", http_and_https.ca, f"https://{address}")
        assert (result.returncode, result.stdout) == (0, b"HTTPS with TLSv1.3\n")
        result = await curl("--cacert", other_ca, f"https://{address}")
        assert result.returncode == 60


@pytest.mark.parametrize(
    ("sent", "answer"),
    [
        (b"", b""),
        (b"GE", b""),
        (b"hello\r\n\r\n", b"HTTP/1.1 400 Bad Request\r\n"),
        (b"x" * 20_000, b"HTTP/1.1 400 Bad Request\r\n"),
        (b"\x16\x03\x01\x00\x05hello", b"\x15\x03"),  # an alert
    ],
)
async def test_http_and_https_survives_clients_that_speak_neither_protocol(
    sent: bytes, answer: bytes, http_and_https: SharedServer
) -> None:
    async with await trisock.connect("127.0.0.1", http_and_https.port) as sock:
        await sock.send(sent)
        await sock.send_eof()
        received = await read_all(sock)
        assert received.startswith(answer)
        assert bool(received) == bool(answer)
    healthy = await ask(http_and_https, b"GET / HTTP/1.1\r\n\r\n")
    assert healthy.endswith(b"HTTPS with TLSv1.3\n")
