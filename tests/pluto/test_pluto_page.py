"""The examples on Pluto's page, with servers on this machine."""

from __future__ import annotations

import socket as stdlib

import pytest

from helpers.pluto import Thread, in_thread, serve_once
from trisock.pluto import async_socket, scheduler, socket

pytestmark = pytest.mark.usefixtures("bounded")  # some tests make blocking calls


def test_the_recv_example_on_plutos_page_works() -> None:
    port, peer = serve_once()
    s = socket.connect("localhost", port)
    s.send("GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert s.recv() == b"HTTP/1.1 200 OK\r\n\r\n"
    assert peer.result() == b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


def test_the_unrecv_example_on_plutos_page_works(capsys: pytest.CaptureFixture[str]) -> None:
    with stdlib.create_server(("127.0.0.1", 0)) as listening:
        sock = socket.connect("localhost", listening.getsockname()[1])
        sock.unrecv("World")
        sock.unrecv("Hello")
        print(sock.recv().decode())
        print(sock.recv().decode())
    assert capsys.readouterr().out == "Hello\nWorld\n"


def test_the_bind_and_starttls_examples_on_plutos_page_work(
    certs: list[dict[str, str | bytes]], trusted: None
) -> None:
    """The page's TLS client talks to the page's TLS server."""
    sched = scheduler()

    async def handler(s: async_socket) -> None:
        if await s.starttls(certs):
            content = "Hello, world!"
            await s.send(
                f"HTTP/1.1 200 OK\r\nConnection: Close\r\nContent-Length: {len(content)}\r\n\r\n"
                + content
            )

    server = socket.bind(sched, 0, handler)

    def client() -> bytes:
        s = socket.connect("localhost", server.port)
        assert s.starttls("localhost"), "Failed to establish secure connection."
        s.send("GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        received = b""
        while data := s.recv():
            received += data
        return received

    async def talk() -> None:
        received.append(await in_thread(client))
        server.close()

    received: list[bytes] = []
    sched.add(talk)
    sched.run()
    assert received[0].endswith(b"\r\nContent-Length: 13\r\n\r\nHello, world!")


@pytest.mark.parametrize("tls", [False, True])
def test_the_socket_state_examples_on_plutos_page_work(
    tls: bool, certs: list[dict[str, str | bytes]], trusted: None
) -> None:
    listening = socket.listen(0)
    peer = Thread(lambda: listening.accept().starttls(certs) if tls else listening.accept())
    sock = socket.connect("127.0.0.1", listening.port)
    ip, port = sock.getpeer()
    assert ip == "127.0.0.1"
    assert port == listening.port
    assert sock.getside() == "client"
    assert not sock.istls()
    if tls:
        assert sock.starttls("127.0.0.1")
        assert sock.istls()
    else:
        assert sock.isopen()
        sock.close()
        assert not sock.isopen()
    peer.result()


def test_the_hasconnection_example_on_plutos_page_works() -> None:
    lst = socket.listen(0)
    with stdlib.create_connection(("127.0.0.1", lst.port)) as raw:
        while not lst.hasconnection():
            pass
        raw.sendall(b"GET /")
        assert lst.accept().recv() == b"GET /"
