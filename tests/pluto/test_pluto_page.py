"""The examples on Pluto's pages "Socket" and "Scheduler", with servers on this machine."""

from __future__ import annotations

import socket as stdlib
import traceback

import pytest
import trio

from helpers.deadline import DEADLINE
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


def test_the_udpserver_example_on_plutos_page_works() -> None:
    with stdlib.socket(stdlib.AF_INET, stdlib.SOCK_DGRAM) as raw:
        raw.settimeout(DEADLINE)
        serv = socket.udpserver(0)
        raw.connect(("127.0.0.1", serv.port))
        for data in (b"not a ping", b"ping", b"end"):
            raw.send(data)
        while data := serv.recv():
            if data == b"ping":
                serv.send("pong")
            if data == b"end":
                serv.close()
        assert raw.recv(100) == b"pong"


def test_the_early_data_example_on_plutos_page_works(
    certs: list[dict[str, str | bytes]], trusted: None
) -> None:
    listening = socket.listen(0)

    def serve() -> bytes:
        peer = listening.accept()
        assert peer.starttls(certs)
        request = peer.recv()
        peer.send("HTTP/1.1 200 OK\r\n\r\n")
        peer.close()
        return request

    peer = Thread(serve)
    s = socket.connect("localhost", listening.port)
    request = "GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    assert s.starttls("localhost", {"early_data": request})
    received = b""
    while data := s.recv():
        received += data
    assert received == b"HTTP/1.1 200 OK\r\n\r\n"
    assert peer.result() == request.encode()


def test_the_alpn_example_on_plutos_page_works(
    certs: list[dict[str, str | bytes]], trusted: None
) -> None:
    listening = socket.listen("127.0.0.1:0")
    peer = Thread(lambda: listening.accept().starttls(certs, {"alpn": ["http/1.1"]}))
    s = socket.connect("127.0.0.1", listening.port)
    ok, protocol = s.starttls("localhost", {"alpn": ["h2", "http/1.1"]})
    assert (ok, protocol) == (True, "http/1.1")
    assert peer.result() == (True, "http/1.1")


def test_the_isudp_example_on_plutos_page_works() -> None:
    listening = socket.listen(0)
    sock = socket.connect("127.0.0.1", listening.port, "tcp")
    assert not sock.isudp()
    sock = socket.connect("127.0.0.1", 53, "udp")
    assert sock.isudp()


@pytest.mark.parametrize("has_yieldfunc", [False, True])
def test_the_addloop_and_run_examples_on_plutos_page_work(has_yieldfunc: bool) -> None:
    sched = scheduler()
    if has_yieldfunc:
        sched.yieldfunc = lambda: trio.sleep(0.001)
    printed: list[object] = []
    loops = 0

    def loop() -> bool:
        nonlocal loops
        loops += 1
        printed.append(loops)
        return loops != 5

    sched.addloop(loop)
    sched.run()
    assert printed == [1, 2, 3, 4, 5]

    async def count_down() -> None:
        for number in (3, 2, 1):
            printed.append(f"{number}...")
            await trio.sleep(0.001)
        printed.append("Boom!")

    sched.add(count_down)
    sched.run()
    assert printed[5:] == ["3...", "2...", "1...", "Boom!"]


def test_the_errorfunc_example_on_plutos_page_works() -> None:
    sched = scheduler()
    printed: list[str] = []
    sched.errorfunc = lambda err: printed.append("".join(traceback.format_exception(err)))

    def fail() -> None:
        raise RuntimeError("this is urgent: fatal error")

    sched.add(fail)
    sched.run()
    (text,) = printed
    assert "RuntimeError: this is urgent: fatal error" in text
    assert "in fail" in text
