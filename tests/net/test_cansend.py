"""``info().cansend`` is False once sending is over."""

from __future__ import annotations

import pytest
import trio

from helpers.blocked import cancel_when_blocked
from helpers.forks import run_in_child
from helpers.pairs import clog
from trisock import Socket, TLSError
from trisock._net import transport as _transport

LAYERS = pytest.mark.parametrize("layer", ["plain", "tls"])
EVERYWHERE = pytest.mark.parametrize(
    ("family", "layer"), [("tcp", "plain"), ("unix", "plain"), ("tcp", "tls"), ("unix", "tls")]
)


async def assert_cannot_send(sock: Socket) -> None:
    """Check that ``info().cansend`` is False and that a send fails."""
    assert not sock.info().cansend
    with pytest.raises((trio.BrokenResourceError, trio.ClosedResourceError)):
        await sock.send(b"x")
    assert not sock.info().cansend


async def send_until_broken(sock: Socket) -> None:
    with pytest.raises(trio.BrokenResourceError):
        while True:
            await sock.send(b"more")


@EVERYWHERE
async def test_cansend_is_true_while_the_connection_is_open(a: Socket, b: Socket) -> None:
    for sock, peer in ((a, b), (b, a)):
        assert sock.info().cansend
        await sock.send(b"x")
        assert await peer.recv() == b"x"
        assert sock.info().cansend


@EVERYWHERE
async def test_cansend_is_true_while_the_send_buffer_is_full(a: Socket) -> None:
    await clog(a)
    assert a.info().cansend


@EVERYWHERE
@pytest.mark.parametrize("how", ["close", "abort"])
async def test_cansend_is_false_after_this_side_closes(how: str, a: Socket, b: Socket) -> None:
    if how == "abort":
        a.abort()
    else:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(b.close)
            await a.close()
    await assert_cannot_send(a)


async def test_cansend_is_false_after_send_eof(a: Socket, b: Socket) -> None:
    await a.send_eof()
    await assert_cannot_send(a)
    assert a.isopen()
    await b.send(b"the other direction is still open")
    assert b.info().cansend


@pytest.mark.parametrize("family", ["tcp", "unix"])
async def test_cansend_is_true_after_the_peers_eof(a: Socket, b: Socket) -> None:
    await b.send_eof()
    assert await a.recv() == b""
    assert not a.isopen()
    assert a.info().cansend
    await a.send(b"an answer to a half-closed request")


@pytest.mark.parametrize("layer", ["tls"])
async def test_cansend_is_true_after_the_peers_close_notify(a: Socket, b: Socket) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(b.stoptls)  # sends close_notify, but no FIN
        assert await a.recv() == b""
        assert not a.isopen()
        assert a.info().cansend
        nursery.cancel_scope.cancel()


@EVERYWHERE
async def test_cansend_is_false_after_a_reset_that_no_call_has_noticed(
    a: Socket, b: Socket
) -> None:
    b.abort()
    await trio.lowlevel.wait_readable(a.fileno())
    await assert_cannot_send(a)


@EVERYWHERE
async def test_cansend_is_false_after_a_failed_send(a: Socket, b: Socket) -> None:
    b.abort()
    await send_until_broken(a)
    await assert_cannot_send(a)


@LAYERS
async def test_cansend_is_false_after_a_failed_send_without_hangup_report(
    a: Socket, b: Socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Windows, the kernel does not report hangups."""
    monkeypatch.setattr(_transport, "sending_is_over", lambda _: False)
    assert a.info().cansend
    b.abort()
    await send_until_broken(a)
    await assert_cannot_send(a)


@LAYERS
async def test_cansend_is_false_after_a_failed_read(
    a: Socket, b: Socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_transport, "sending_is_over", lambda _: False)
    b.abort()
    with pytest.raises(trio.BrokenResourceError):
        await a.recv()
    await assert_cannot_send(a)


@EVERYWHERE
async def test_cansend_is_false_after_a_send_that_was_cut_short(a: Socket, b: Socket) -> None:
    await cancel_when_blocked(a.send, b"x" * 50_000_000)
    await assert_cannot_send(a)
    assert b.info().cansend


@EVERYWHERE
async def test_cansend_is_false_after_send_file_was_cut_short(a: Socket) -> None:
    class BrokenFile:
        parts = iter([b"the first half"])

        def read(self, size: int) -> bytes:
            for part in self.parts:
                return part
            raise OSError("the disk is broken")

    with pytest.raises(OSError, match="the disk is broken"):
        await a.send_file(BrokenFile())  # type: ignore[arg-type]
    await assert_cannot_send(a)


@pytest.mark.parametrize("layer", ["tls"])
async def test_cansend_is_false_after_tls_has_failed(a: Socket, b: Socket) -> None:
    await b.stream.send_eof()  # without close_notify
    with pytest.raises(TLSError):
        await a.recv()
    await assert_cannot_send(a)


@LAYERS
async def test_cansend_is_false_after_other_code_closed_the_stream(a: Socket) -> None:
    a.stream.socket.close()
    await assert_cannot_send(a)


@pytest.mark.parametrize("layer", ["tls"])
async def test_cansend_is_false_under_tls_in_a_forked_process(a: Socket) -> None:
    def assert_in_child() -> None:
        assert not a.info().cansend

    run_in_child(assert_in_child)
    assert a.info().cansend
