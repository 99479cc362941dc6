"""trisock.testing.Script: one side of a conversation."""

from __future__ import annotations

import logging
import re
import socket
from collections.abc import AsyncIterator

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from helpers.pairs import closing
from trisock import ClientTLS, ServerTLS, Socket, TLSError
from trisock.testing import Authority, Script, serving, socket_pair
from trisock.testing._expectation import MAX_PATTERN_BYTES, Mismatch, expectation

LINE = re.compile(rb"[^\n]*\n")


@pytest.fixture
async def ends() -> AsyncIterator[tuple[Socket, Socket]]:
    a, b = await socket_pair()
    async with closing(a, b):
        yield a, b


async def failure(script: Script, sock: Socket) -> str:
    """Run a script that fails, and return its error."""
    with pytest.raises(AssertionError) as caught:
        await script(sock)
    return str(caught.value)


# ---- the two sides ----


async def test_a_script_is_a_handler() -> None:
    async with serving(Script().expect(b"EHLO x\r\n").send(b"250 ok\r\n")) as s:
        client = await s.connect()
        await client.send(b"EHLO x\r\n")
        assert await client.recv_line() == b"250 ok\r"
        assert await client.recv() == b""


async def test_a_script_is_a_client() -> None:
    async def handler(sock: Socket) -> None:
        async for line in sock.lines():
            await sock.send(b"you said ", line, b"\n")

    script = Script().send(b"one\ntw").send(b"o\n").expect(b"you said one\nyou said two\n")
    async with serving(handler) as s:
        client = await s.connect()
        await script(client)
        await script(client)  # a script can run again
        await client.send_eof()
        await Script().expect_eof()(client)


async def test_two_scripts_upgrade_to_tls(authority: Authority) -> None:
    server = Script().expect(b"STARTTLS\r\n").send(b"220 go\r\n").starttls(authority.server_tls())
    server.expect(b"QUIT\r\n").send(b"221 bye\r\n").expect_eof()
    client = Script().send(b"STARTTLS\r\n").expect(b"220 go\r\n").starttls(authority.client_tls())
    client.send(b"QUIT\r\n").expect(b"221 bye\r\n")
    async with serving(server) as s:
        sock = await s.connect()
        await client(sock)
        assert sock.istls()


async def test_bytes_injected_before_tls_fail_the_script(authority: Authority) -> None:
    server = Script().expect(b"STARTTLS\r\n").starttls(authority.server_tls()).expect(b"RSET\r\n")
    with pytest.raises(AssertionError, match=r"step 2 of 3, .*: starttls failed: TLS handshake"):
        async with serving(server) as s:
            client = await s.connect()
            await client.send(b"STARTTLS\r\nRSET\r\n")
            await client.recv()


@pytest.mark.parametrize("tls", [False, True])
async def test_the_peer_reads_one_byte_at_a_time(tls: bool) -> None:
    a, b = await socket_pair(tls=tls)
    chunks = []

    async def read() -> None:
        while len(chunks) < 100:
            chunks.append(await b.recv())

    async with closing(a, b), trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await Script(byte_by_byte=True).send(bytes(range(50)), bytes(range(50, 100)))(a)
    assert chunks == [bytes([number]) for number in range(100)]


async def test_many_connections_run_a_script_at_once() -> None:
    server = Script(byte_by_byte=True).expect(LINE).send(b"one\n").expect(LINE).send(b"two\n")
    client = Script().send(b"a\n").expect(b"one\n").send(b"b\n").expect(b"two\n").expect_eof()
    async with serving(server) as s, trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(client, await s.connect())


# ---- frames ----


@pytest.mark.parametrize("header", ["!I", "<H", 3])
async def test_scripts_send_and_expect_frames(header: str | int, a: Socket, b: Socket) -> None:
    script = Script().expect_frame(b"get k", header).send_frame(bytearray(b"+v"), header)
    script.expect_frame(memoryview(b""), header).send_frame(b"", header)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(script, b)
        await a.send_frame(b"get k", header=header)
        assert await a.recv_frame(header) == b"+v"
        await a.send_frame(header=header)
        assert await a.recv_frame(header) == b""


async def test_a_different_frame_is_a_failure_and_stays_unread(a: Socket, b: Socket) -> None:
    await a.send_frame(b"get")
    text = await failure(Script().expect_frame(b"put"), b)
    assert text.endswith(r"expected b'\x00\x00\x00\x03put', but b'\x00\x00\x00\x03get' came")
    assert await b.recv_frame() == b"get"


def test_invalid_frames_are_found_before_the_script_runs() -> None:
    for add in (Script().send_frame, Script().expect_frame):
        with pytest.raises(TypeError, match="the body of a frame must be bytes, not a str"):
            add("text")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="a frame of 256 bytes is too long for its header"):
            add(bytes(256), "B")
        with pytest.raises(ValueError, match="header must be a struct format"):
            add(b"", "!i")


# ---- expect ----


@pytest.mark.parametrize(
    ("expected", "taken"),
    [
        (b"250 ok\r\n", b"250 ok\r\n"),
        (bytearray(b"250"), b"250"),
        (memoryview(b"2"), b"2"),
        (re.compile(rb"\d+"), b"2"),  # the first match wins
        (re.compile(rb"\d+ .*\n"), b"250 ok\r\n"),
        (re.compile(rb"\d+(?= )"), b"250"),  # the lookahead stays unread
        (re.compile(rb"250|250 ok"), b"250"),
        (re.compile(rb"25$"), b"25"),  # $ matches after the bytes received so far
        (re.compile(rb"x*"), b""),
        (re.compile(rb"(?s).*done"), b"250 ok\r\n221 done"),
    ],
)
@pytest.mark.parametrize("byte_by_byte", [False, True])
async def test_what_follows_a_match_stays_unread(
    expected: bytes, taken: bytes, byte_by_byte: bool, a: Socket, b: Socket
) -> None:
    data = b"250 ok\r\n221 done\r\n"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Script(byte_by_byte=byte_by_byte).send(data), a)
        await Script().expect(expected)(b)
    assert await b.recv_exactly(len(data) - len(taken)) == data[len(taken) :]


@given(st.binary(max_size=12).map(lambda data: bytes(each % 4 + 97 for each in data)), st.data())
def test_a_match_does_not_depend_on_the_split(data: bytes, draw: st.DataObject) -> None:
    text = draw.draw(
        st.sampled_from([b"ab", rb"(?:ab)+c", rb"a.*d", rb"[^d]*d", rb"b(?=c)", rb"a*$"])
    )
    wanted = text if text == b"ab" else re.compile(text)
    cuts = draw.draw(st.lists(st.integers(0, len(data)), max_size=5).map(sorted))
    pieces = [data[i:j] for i, j in zip([0, *cuts], [*cuts, len(data)], strict=True)]

    def run(pieces: list[bytes]) -> object:
        received = bytearray()
        for piece in filter(None, pieces):
            received += piece
            try:
                found = expectation(wanted).find(received, len(received) - len(piece))
            except Mismatch:
                return "mismatch"
            if found is not None:
                return found
        return None

    assert run(pieces) == run([data[i : i + 1] for i in range(len(data))])


@pytest.mark.parametrize("expected", ["text", re.compile("text"), None, 7])
def test_only_bytes_can_be_expected(expected: object) -> None:
    with pytest.raises(TypeError, match="bytes or a compiled pattern of bytes"):
        Script().expect(expected)  # type: ignore[arg-type]


def test_wrong_arguments_are_found_before_the_script_runs() -> None:
    with pytest.raises(ValueError, match="at least one byte"):
        Script().expect(b"")
    with pytest.raises(TypeError, match="send takes bytes, not a str"):
        Script().send("text")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="byte_by_byte must be True or False"):
        Script(byte_by_byte=1)  # type: ignore[arg-type]


def test_a_script_shows_its_length() -> None:
    assert repr(Script().send(b"x").expect_eof()) == "<trisock.testing.Script of 2 steps>"


# ---- failures ----


async def test_a_failure_shows_the_expected_and_the_received_bytes(a: Socket, b: Socket) -> None:
    await a.send(b"HELO x\r\n")
    text = await failure(Script().send(b"220\r\n").expect(b"EHLO x\r\n"), b)
    peer = b.getpeer()
    assert text == f"step 2 of 2, with {peer}: expected b'EHLO x\\r\\n', but b'HELO x\\r\\n' came"
    assert await b.recv_line() == b"HELO x\r"  # the received bytes are still unread


async def test_a_script_fails_at_the_first_different_byte(a: Socket, b: Socket) -> None:
    await a.send(b"5")
    assert "expected b'250 ok', but b'5' came" in await failure(Script().expect(b"250 ok"), b)


async def test_a_late_difference_is_shown_with_the_bytes_around_it(a: Socket, b: Socket) -> None:
    await a.send(b"x" * 5000, b"y" * 5000)
    text = await failure(Script().expect(b"x" * 5001), b)
    assert "the first difference is at byte 5000: expected ... b'xxxxxxxxxxxxxxxxxxxxx'" in text
    assert "but ... b'xxxxxxxxxxxxxxxxxxxxyyy" in text
    assert len(text) < 600


async def test_a_failure_shows_at_most_120_bytes(a: Socket, b: Socket) -> None:
    await a.send(b"y" * 1000)
    text = await failure(Script().expect(b"x" * 500), b)
    assert f"{b'x' * 120!r} and 380 more bytes, but {b'y' * 120!r} and 880 more bytes came" in text


async def test_a_pattern_must_match_within_its_limit(a: Socket, b: Socket) -> None:
    data = b"x" * (MAX_PATTERN_BYTES - 1) + b"\n"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(a.send, data + b"x" * MAX_PATTERN_BYTES + b"\n")
        await Script().expect(LINE)(b)
        text = await failure(Script().expect(LINE), b)
    assert "expected a match of b'[^\\\\n]*\\\\n', but none ended within 16384 bytes: b'xxx" in text


@pytest.mark.parametrize(
    ("sent", "text"),
    [
        (b"", "expected b'x\\n', but the stream ended"),
        (b"x", "expected b'x\\n', but the stream ended after b'x'"),
    ],
)
async def test_the_end_of_the_stream_is_a_failure(
    sent: bytes, text: str, a: Socket, b: Socket
) -> None:
    await a.send(sent)
    await a.send_eof()
    assert (await failure(Script().expect(b"x\n"), b)).endswith(text)


async def test_bytes_instead_of_the_end_are_a_failure(a: Socket, b: Socket) -> None:
    await a.send(b"more")
    text = await failure(Script().expect_eof(), b)
    assert text.endswith("expected the end of the stream, but b'more' came")
    assert await b.recv() == b"more"


@pytest.mark.parametrize(
    ("script", "text"),
    [
        (Script().expect(b"xyz"), "expected b'xyz', but the connection broke after b'x': "),
        (Script().expect(b"x").expect(b"y"), "expected b'y', but the connection broke: "),
        (Script().expect(b"x").expect_eof(), "expect the end of the stream failed: "),
        (Script().expect(b"x").send(b"1"), "send b'1' failed: "),
    ],
)
async def test_a_reset_is_a_failure(script: Script, text: str, a: Socket, b: Socket) -> None:
    await a.send(b"x")
    a.abort()
    assert text in await failure(script, b)


async def test_an_end_that_is_not_clean_can_be_expected(a: Socket, b: Socket) -> None:
    b.abort()
    await Script().expect_eof(clean=False)(a)


async def test_an_end_without_close_notify_can_be_expected() -> None:
    a, b = await socket_pair(tls=True)
    async with closing(a, b):
        b.socket.shutdown(socket.SHUT_WR)
        await Script().expect_eof(clean=False)(a)


async def test_bytes_are_not_accepted_as_an_end(a: Socket, b: Socket) -> None:
    await b.send(b"more")
    message = await failure(Script().expect_eof(clean=False), a)
    assert message.endswith("expected the end of the stream, but b'more' came")


async def test_a_script_can_read_after_send_eof(a: Socket, b: Socket) -> None:
    await Script().send(b"last").send_eof()(a)
    await Script().expect(b"last").expect_eof().send(b"answer")(b)
    await Script().expect(b"answer")(a)


async def test_a_failed_send_eof_names_the_step(a: Socket, b: Socket) -> None:
    b.abort()
    with pytest.raises(trio.BrokenResourceError):
        await a.recv()
    assert "send the end of the stream failed: " in await failure(Script().send_eof(), a)


async def test_a_client_that_refuses_the_certificate_can_be_expected(authority: Authority) -> None:
    server = Script().expect(b"STARTTLS\n").starttls(ServerTLS(authority.expired()), refused=True)
    async with serving(server) as s:
        client = await s.connect()
        await client.send(b"STARTTLS\n")
        with pytest.raises(TLSError, match="certificate has expired"):
            await client.starttls(authority.client_tls())


async def test_a_client_that_accepts_a_bad_certificate_is_a_failure(authority: Authority) -> None:
    server = Script().starttls(ServerTLS(authority.expired()), refused=True)
    with pytest.raises(AssertionError, match="expected that the peer refuses the handshake, but"):
        async with serving(server) as s:
            client = await s.connect()
            await client.starttls(ClientTLS("localhost", verify=False))


async def test_a_client_that_closes_without_an_alert_refuses(authority: Authority) -> None:
    server = Script().starttls(authority.server_tls(), refused=True)
    async with serving(server) as s:
        await s.connect()


async def test_a_refusal_by_this_side_does_not_count(a: Socket, b: Socket) -> None:
    mine, theirs = Authority(), Authority()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Script().starttls(theirs.server_tls(), refused=True), b)
        message = await failure(Script().starttls(mine.client_tls(), refused=True), a)
    assert "starttls failed: " in message
    assert "the certificate was refused" in message


async def test_plain_text_does_not_count_as_a_refusal(
    authority: Authority, a: Socket, b: Socket
) -> None:
    await b.send(b"454 not available\r\n")
    message = await failure(Script().starttls(authority.client_tls(), refused=True), a)
    assert "the peer does not speak TLS" in message


async def test_plain_text_under_tls_does_not_count_as_an_end() -> None:
    script = Script().expect_eof(clean=False)
    client, server = await socket_pair(tls=True)
    async with client, server:
        await server.stream.socket.send(b"500 bye\r\n")
        message = await failure(script, client)
        assert re.search("does not speak TLS|a record was invalid", message)  # OpenSSL 3.0, 3.6


async def test_a_failed_script_fails_the_test_that_serves_it() -> None:
    script = Script().expect(b"x").expect(b"y")
    with pytest.raises(AssertionError, match="but the stream ended"):
        async with serving(script) as s:
            await (await s.connect()).send(b"x")


async def test_a_cancelled_script_names_its_step(
    a: Socket, b: Socket, caplog: pytest.LogCaptureFixture
) -> None:
    await a.send(b"25")
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Script().expect(b"250"), b)
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
    text = f"step 1 of 1, with {b.getpeer()}: cancelled at expect b'250'"
    assert caplog.record_tuples == [("trisock.testing", logging.WARNING, text)]
    assert await b.recv() == b"25"


async def test_a_script_on_a_closed_socket_raises_closed_resource_error(
    a: Socket, b: Socket
) -> None:
    await a.send(b"25")

    async def close() -> None:
        await trio.testing.wait_all_tasks_blocked()
        b.abort()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(close)
        with pytest.raises(trio.ClosedResourceError):
            await Script().expect(b"250")(b)


async def test_a_script_waits_on_the_jumping_clock(autojump_clock: object) -> None:
    async def handler(sock: Socket) -> None:
        with trio.move_on_after(30):
            await sock.recv()
        await trio.sleep(4)
        await sock.send(b"421 too slow\r\n")

    started = trio.current_time()
    async with serving(handler) as s:
        await Script(byte_by_byte=True).expect(b"421 too slow\r\n").expect_eof()(await s.connect())
    assert 34 <= trio.current_time() - started < 35
