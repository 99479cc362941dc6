"""A key-value store over TLS, with its client and its tests.

    python -m trustme && python examples/key_value.py serve
    python examples/key_value.py put KEY VALUE
    python examples/key_value.py get KEY
Its tests: python -m pytest examples/key_value.py
"""

import sys
from pathlib import Path

import trio
import trio.testing

import trisock
from trisock.testing import Authority, check_handler, serving

PORT, MAX_BYTES, MAX_KEYS, IDLE_SECONDS = 7117, 64_000, 10_000, 60


class Store(dict[bytes, bytes]):
    def answer(self, request: bytes) -> bytes:
        match request.split(b" ", 2):
            case [b"put", key, value] if len(self) < MAX_KEYS:
                self[key] = value
                return b"+"
            case [b"get", key] if key in self:
                return b"+" + self[key]
        return b"-refused"

    async def handle(self, sock: trisock.Socket) -> None:
        with trio.move_on_after(IDLE_SECONDS) as idle:  # the client is silent, or does not read
            try:
                async for request in sock.frames(max_bytes=MAX_BYTES):  # length prefix: 4 bytes
                    await sock.send_frame(self.answer(request))
                    idle.deadline = trio.current_time() + IDLE_SECONDS
            except trisock.LimitExceededError as exc:
                await sock.send_frame(b"-more than %d bytes" % exc.limit)


def serve(tls: trisock.Certificate) -> None:
    trisock.run(PORT, Store().handle, tls=tls, max_connections=100, grace=1)


async def ask(request: bytes, port: int, tls: trisock.ClientTLS) -> bytes:
    async with await trisock.connect("localhost", port, tls=tls) as sock:
        await sock.send_frame(request)
        return await sock.recv_frame(max_bytes=MAX_BYTES)


async def test_get_returns_the_value_that_put_stored() -> None:
    authority = Authority()
    async with serving(Store().handle, tls=authority.server_tls()) as s:
        for request, answer in (b"put k v w", b"+"), (b"get k", b"+v w"), (b"get x", b"-refused"):
            assert await ask(request, s.server.port, authority.client_tls()) == answer


async def test_long_frames_are_refused_and_cut_frames_are_peer_errors() -> None:
    async with serving(Store().handle) as s, await s.connect() as rude, await s.connect() as gone:
        await rude.send((MAX_BYTES + 1).to_bytes(4, "big"))
        assert await rude.recv_frame() + await rude.recv() == b"-more than 64000 bytes"
        await gone.send(b"\0\0\0\x08put k v")  # 7 of 8 bytes
    assert s.server.stats().peer_errors == 1


async def test_no_silent_or_hostile_client_remains(autojump_clock: trio.testing.MockClock) -> None:
    async with serving(Store().handle) as s, await s.connect() as silent:
        assert await silent.recv() == b""
    await check_handler(Store().handle, request=b"\0\0\0\5get k")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["serve"]:
            serve(trisock.Certificate.from_files("server.pem", "server.key"))
        case ["get", _] | ["put", _, _]:
            tls = trisock.ClientTLS("localhost", ca=Path("client.pem").read_text())
            print(trio.run(ask, " ".join(sys.argv[1:]).encode(), PORT, tls).decode())
        case _:
            sys.exit(__doc__)
