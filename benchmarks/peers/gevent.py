"""gevent's ``StreamServer``: blocking code in a greenlet for each connection."""

from __future__ import annotations

from gevent import ssl
from gevent.server import StreamServer
from gevent.socket import socket

from .serving import BLOCK, HOST, READ_SIZE, Options, announce, parse_options


def echo(sock: socket, _address: object) -> None:
    while chunk := sock.recv(READ_SIZE):
        sock.sendall(chunk)


def receive(sock: socket, _address: object) -> None:
    while request := sock.recv(READ_SIZE):
        sock.sendall(request)
        wanted, received = int(request), 0
        while received < wanted:
            chunk = sock.recv(READ_SIZE)
            if not chunk:
                break
            received += len(chunk)
        sock.sendall(b"%d" % received)


def send(sock: socket, _address: object) -> None:
    while request := sock.recv(READ_SIZE):
        for _ in range(int(request) // len(BLOCK)):
            sock.sendall(BLOCK)


def lines(sock: socket, _address: object) -> None:
    count = 0
    with sock.makefile("rb") as file:
        for _ in file:
            count += 1
    sock.sendall(b"%d" % count)


def frames(sock: socket, _address: object) -> None:
    count = 0
    with sock.makefile("rb") as file:
        while header := file.read(4):
            file.read(int.from_bytes(header, "big"))
            count += 1
    sock.sendall(b"%d" % count)


def main(options: Options) -> None:
    handlers = {
        "echo": echo,
        "receive": receive,
        "send": send,
        "lines": lines,
        "batches": lines,
        "frames": frames,
    }
    handler = handlers[options.work]
    secured = {}
    if options.tls is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)  # gevent's class, which does not block
        context.load_cert_chain(options.tls / "chain.pem", options.tls / "key.pem")
        secured = {"ssl_context": context}
    server = StreamServer((HOST, 0), handler, **secured)
    server.start()
    announce(server.server_port)
    server.serve_forever()


if __name__ == "__main__":
    main(parse_options())
