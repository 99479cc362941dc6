"""A bare epoll loop, which shows the minimum cost: little more than Python and the kernel."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Generator

from ..loop import READABLE, WRITABLE, Job, Loop
from .serving import BLOCK, HOST, READ_SIZE, Options, announce, parse_options


def echo(sock: socket.socket) -> Job:
    while chunk := (yield from recv(sock)):
        yield from sendall(sock, chunk)
        yield READABLE  # wait first: the client sends the next message only after this echo


def receive(sock: socket.socket) -> Job:
    while request := (yield from recv(sock)):
        yield from sendall(sock, request)
        wanted, received = int(request), 0
        while received < wanted:
            chunk = yield from recv(sock)
            if not chunk:
                break
            received += len(chunk)
        yield from sendall(sock, b"%d" % received)


def send(sock: socket.socket) -> Job:
    while request := (yield from recv(sock)):
        for _ in range(int(request) // len(BLOCK)):
            yield from sendall(sock, BLOCK)


def lines(sock: socket.socket) -> Job:
    count = 0
    rest = b""
    while chunk := (yield from recv(sock)):
        *whole, rest = (rest + chunk).split(b"\n")
        for _ in whole:
            count += 1
    yield from sendall(sock, b"%d" % count)


def frames(sock: socket.socket) -> Job:
    count = 0
    rest = b""
    while chunk := (yield from recv(sock)):
        data = rest + chunk
        start = 0
        while len(data) >= start + 4:
            end = start + 4 + int.from_bytes(data[start : start + 4], "big")
            if len(data) < end:
                break
            _ = data[start + 4 : end]
            count += 1
            start = end
        rest = data[start:]
    yield from sendall(sock, b"%d" % count)


def recv(sock: socket.socket) -> Generator[int, None, bytes]:
    while True:
        try:
            return sock.recv(READ_SIZE)
        except (BlockingIOError, ssl.SSLWantReadError):
            yield READABLE


def sendall(sock: socket.socket, data: bytes) -> Job:
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[sock.send(rest) :]
        except (BlockingIOError, ssl.SSLWantWriteError):
            yield WRITABLE


def udp_echo(sock: socket.socket) -> Job:
    while True:
        try:
            data, address = sock.recvfrom(READ_SIZE)
        except BlockingIOError:
            yield READABLE
        else:
            sock.sendto(data, address)


def main(options: Options) -> None:
    if options.work == "udp-echo":
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock, Loop() as loop:
            sock.bind((HOST, 0))
            sock.setblocking(False)
            announce(sock.getsockname()[1])
            loop.start(sock.fileno(), udp_echo(sock))
            loop.run()
        return
    handlers = {
        "echo": echo,
        "receive": receive,
        "send": send,
        "lines": lines,
        "batches": lines,
        "frames": frames,
    }
    handler = handlers[options.work]
    context = options.server_context()
    loop = Loop()

    def accept(listening: socket.socket) -> Job:
        while True:
            try:
                sock, _ = listening.accept()
            except BlockingIOError:
                yield READABLE
            else:
                sock.setblocking(False)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                loop.start(sock.fileno(), serve(sock) if context is None else secure(sock, context))

    def serve(sock: socket.socket) -> Job:
        with sock:
            yield from handler(sock)

    def secure(sock: socket.socket, context: ssl.SSLContext) -> Job:
        with context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False) as tls:
            while True:
                try:
                    tls.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    yield READABLE
            yield from handler(tls)

    with socket.create_server((HOST, 0)) as listening:
        listening.setblocking(False)
        announce(listening.getsockname()[1])
        loop.start(listening.fileno(), accept(listening))
        loop.run()


if __name__ == "__main__":
    main(parse_options())
