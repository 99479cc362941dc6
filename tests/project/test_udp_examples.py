"""The examples dns_responder and mdns_listener, with dig and with hostile datagrams."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import textwrap
from collections.abc import AsyncIterator

import pytest
import trio
from hypothesis import example, given
from hypothesis import strategies as st

import trisock
from helpers.examples import Running, command, load, running, started
from helpers.page_snippets import snippets
from helpers.programs import run
from helpers.services import program

dns_responder = load("dns_responder")
mdns_listener = load("mdns_listener")

GROUP = "224.0.0.251"
RECORDS = [
    *("www.example.test=192.0.2.1", "www.example.test=192.0.2.2", "WWW.example.test.=2001:db8::1"),
    "a.test=192.0.2.3",
]


def question(name: str, kind: int = 1, cls: int = 1) -> bytes:
    labels = name.encode().split(b".")
    wire = b"".join(bytes([len(label)]) + label for label in labels)
    return wire + b"\0" + struct.pack("!HH", kind, cls)


def query(
    name: str, kind: int = 1, *, cls: int = 1, flags: int = 0x0100, opt: bytes = b""
) -> bytes:
    head = struct.pack("!6H", 0x1234, flags, 1, 0, 0, 1 if opt else 0)
    return head + question(name, kind, cls) + opt


# An OPT record with ``size`` bytes of padding, which makes room for the answer (RFC 7830).
def padding(size: int, version: int = 0) -> bytes:
    head = b"\0" + struct.pack("!HHBBHH", 41, 1232, 0, version, 0, 4 + size)
    return head + struct.pack("!HH", 12, size) + bytes(size)


@pytest.fixture
async def responder() -> AsyncIterator[Running]:
    async with running("dns_responder", *RECORDS) as server:
        yield server


# ---- docs/datagrams.md ----


async def test_the_pages_server_with_tasks_answers_until_a_signal_stops_it() -> None:
    source = (
        "import contextlib\nlistener.abort()\nasync def answer(data):\n    return data.upper()\n"
        + snippets("docs/datagrams.md")[1]
        + "\nasync def main():\n    async with trisock.open_service() as service:\n"
        "        udp = await service.open_udp()\n        say(udp.getlocal().port)\n"
        "        service.nursery.start_soon(serve, udp)\ntrio.run(main)\n"
    )
    async with program(source) as running:
        port = int(await running.line())
        async with await trisock.connect_udp("::1", port) as udp:
            await udp.send(b"hello")
            assert (await udp.recv()).data == b"HELLO"
        await running.stop()


async def test_the_pages_listener_hears_its_group() -> None:
    listener = snippets("docs/datagrams.md")[3]
    listener = listener.replace("5353, reuse", "0, reuse").replace("eth0", "lo")
    listener = listener.replace('"224.0.0.251"', '"224.0.0.251", "lo"')
    ready = "        say(udp.getlocal().port)\n        async for"
    source = "async def main():\n" + textwrap.indent(listener, "    ")
    source = source.replace("        async for", ready) + "\ntrio.run(main)\n"
    async with program(source.replace("print(", "say(")) as running:
        port = int(await running.line())
        async with await trisock.open_udp(host="127.0.0.1") as udp:
            await udp.send(b"x", (GROUP, port))
            assert await running.line() == f"{udp.getlocal()} to {GROUP}:{port} 1 bytes"
        running.process.kill()


# ---- dns_responder ----


async def dig(server: Running, host: str, *arguments: str) -> str:
    done = await run("dig", f"@{host}", "-p", str(server.port), "+tries=1", *arguments)
    assert done.returncode == 0, done.stdout
    return done.stdout.decode()


@pytest.mark.needs("dig")
@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1"])
async def test_dig_accepts_the_answers(responder: Running, host: str) -> None:
    """dig warns of an answer that is malformed, or comes from another address."""
    shown = await dig(responder, host, "www.EXAMPLE.test", "A")
    assert "status: NOERROR" in shown
    assert "flags: qr aa rd; QUERY: 1, ANSWER: 2, AUTHORITY: 0, ADDITIONAL: 1" in shown
    assert "192.0.2.1" in shown
    assert "192.0.2.2" in shown
    assert ";; Truncated, retrying in TCP mode." in shown
    assert "malformed" not in shown
    assert "unexpected source" not in shown


@pytest.mark.needs("dig")
async def test_dig_gets_an_answer_over_udp_if_its_query_is_long_enough(responder: Running) -> None:
    shown = await dig(responder, "127.0.0.2", "+padding=128", "+ignore", "+notcp", "a.test", "A")
    assert "flags: qr aa rd;" in shown
    assert "192.0.2.3" in shown
    assert "(UDP)" in shown


@pytest.mark.needs("dig")
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["+short", "www.example.test", "AAAA"], "2001:db8::1\n"),
        (["+ignore", "www.example.test", "A"], "flags: qr aa tc rd; QUERY: 1, ANSWER: 0,"),
        (["+noedns", "absent.test", "A"], "status: NXDOMAIN"),
        (["a.test", "TXT"], "status: NOERROR"),
        (["-c", "CH", "version.bind", "TXT"], "status: REFUSED"),
        (["+opcode=NOTIFY", "a.test", "A"], "status: NOTIMP"),
        (["+edns=1", "+noednsneg", "a.test", "A"], "status: BADVERS"),
    ],
)
async def test_dig_shows_the_other_answers(
    responder: Running, arguments: list[str], expected: str
) -> None:
    assert expected in await dig(responder, "127.0.0.1", *arguments)


async def test_no_answer_over_udp_is_longer_than_its_query(responder: Running) -> None:
    async with await trisock.connect_udp("127.0.0.1", responder.port) as client:
        for size in range(100):
            for name in ("www.example.test", "a.test", "absent.test"):
                asked = query(name, 255, opt=padding(size))
                await client.send(asked)
                got = (await client.recv()).data
                assert len(got) <= len(asked)
                assert got[:2] == asked[:2]


async def test_messages_that_deserve_no_answer_get_none(responder: Running) -> None:
    async with await trisock.connect_udp("127.0.0.1", responder.port) as client:
        for silent in (b"", b"\0" * 11, query("a.test", flags=0x8000)):
            await client.send(silent)
        await client.send(query("a.test", opt=padding(99)))
        got = (await client.recv()).data
        assert socket.inet_aton("192.0.2.3") in got


async def test_a_sender_that_nobody_can_answer_does_not_end_the_server(responder: Running) -> None:
    with contextlib.ExitStack() as stack:
        try:
            raw = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_RAW, 17))
        except PermissionError:
            pytest.skip("a raw socket needs root")
        data = query("a.test")
        # A UDP header with the source port 0 and no checksum (RFC 768).
        raw.sendto(struct.pack("!4H", 0, responder.port, 8 + len(data), 0) + data, ("127.0.0.1", 0))
    async with await trisock.connect_udp("127.0.0.1", responder.port) as client:
        await client.send(query("a.test"))
        assert (await client.recv()).data[:2] == b"\x12\x34"


async def test_tcp_answers_several_queries_on_one_connection(responder: Running) -> None:
    async with await trisock.connect("127.0.0.1", responder.port) as sock:
        for _ in range(3):
            await sock.send_frame(query("www.example.test"), header="!H")
        for _ in range(3):
            got = await sock.recv_frame(header="!H")
            assert got[6:8] == b"\0\2"
        await sock.send_frame(query("a.test", flags=0x8000), header="!H")
        assert await sock.recv() == b""


RESPONSES = dns_responder.parse_records(RECORDS)


@given(st.binary(max_size=300))
@example(query("www.example.test"))
@example(query("www.example.test", 255, opt=padding(0)))
@example(query("www.example.test", opt=padding(0, version=1)))
@example(query("www.example.test", flags=0x2000))
@example(query("www.example.test")[:-1])
@example(struct.pack("!6H", 1, 0, 1, 0, 0, 0) + b"\xc0\x0c\0\1\0\1")
@example(struct.pack("!6H", 1, 0, 1, 0, 0, 0) + b"\x3f" + bytes(63) * 5)
@example(struct.pack("!6H", 1, 0, 2, 0, 0, 0) + 2 * question("a.test"))
@example(struct.pack("!6H", 1, 0, 1, 0, 0, 0) + b"\x3fx" * 3)
def test_no_query_makes_the_answer_longer_or_fails(message: bytes) -> None:
    for limit in (len(message), 65535):
        answer = dns_responder.answer(message, RESPONSES, limit)
        if answer is not None and limit == len(message):
            assert len(answer) <= len(message)
            assert answer[:2] == message[:2]
            assert answer[2] & 0x80


def test_wrong_records_are_refused() -> None:
    for record in ("a.test", "a.test=", "=192.0.2.1", "a..test=192.0.2.1", f"{'a' * 64}=::1"):
        with pytest.raises(ValueError, match=r"not NAME=ADDRESS|does not appear to be an IP"):
            dns_responder.parse_records([record])


# ---- mdns_listener ----


async def announce(udp: trisock.UDPSocket, port: int, message: bytes) -> None:
    """Send a message to the group on the loopback interface."""
    await udp.send(message, (GROUP, port))


def response(*records: bytes) -> bytes:
    return struct.pack("!6H", 0, 0x8400, 0, len(records), 0, 0) + b"".join(records)


def record(name: bytes, kind: int, data: bytes) -> bytes:
    return name + struct.pack("!HHIH", kind, 0x8001, 120, len(data)) + data


@pytest.fixture
async def listener() -> AsyncIterator[Running]:
    async with running("mdns_listener", "--interface", "lo") as listener:
        yield listener


async def test_the_listener_shows_questions_and_records(listener: Running) -> None:
    async with await trisock.open_udp(host="127.0.0.1") as udp:
        sender = f"{udp.getlocal()}"
        await announce(udp, listener.port, query("_ipp._tcp.local", 12))
        assert await listener.line() == f"{sender} asks for _ipp._tcp.local PTR"
        host = b"\x07printer\x05local\0"
        pointer = b"\xc0\x0c"
        await announce(
            udp,
            listener.port,
            response(
                record(host, 1, bytes(4)), record(pointer, 28, bytes(16)), record(host, 9, b"")
            ),
        )
        for kind in ("A", "AAAA", "9"):
            assert await listener.line() == f"{sender} tells printer.local {kind}"


async def test_the_listener_survives_hostile_messages(listener: Running) -> None:
    async with await trisock.open_udp(host="127.0.0.1") as udp:
        sender = f"{udp.getlocal()}"
        forged = b"\x13\n\x1b[2J10.0.0.1 tells\0"
        circle = b"\1a\xc0\x0c"
        for name, shown in (
            (forged, "tells \\n\\x1b[2J10.0.0.1 tells A"),
            (circle, "says something malformed"),
            (b"\xc0\x0c", "says something malformed"),
            (b"\xff\xff", "says something malformed"),
            (b"\x3fa", "says something malformed"),
            (b"\2\xff\xfe\0", "tells \ufffd\ufffd A"),
            (b"\0", "tells . A"),
        ):
            await announce(udp, listener.port, response(record(name, 1, bytes(4))))
            assert await listener.line() == f"{sender} {shown}"
        for message in (b"", b"\0" * 11, response(record(b"\1a\0", 1, b""))[:-7]):
            await announce(udp, listener.port, message)
            assert await listener.line() == f"{sender} says something malformed"
        claims = struct.pack("!6H", 0, 0, 0xFFFF, 0xFFFF, 0, 0) + 200 * question("a.test")
        await announce(udp, listener.port, claims)
        for _ in range(mdns_listener.MAX_ITEMS):
            assert await listener.line() == f"{sender} asks for a.test A"
        await announce(udp, listener.port, query("end.test"))
        assert await listener.line() == f"{sender} asks for end.test A"


@given(st.binary(max_size=200))
def test_no_message_makes_the_listener_fail(message: bytes) -> None:
    found = list(mdns_listener.items(message))
    assert len(found) <= mdns_listener.MAX_ITEMS + 1
    assert all(each.isprintable() for each in found)


async def test_two_listeners_share_the_port(listener: Running) -> None:
    again = command("mdns_listener", "--interface", "lo", "--port", str(listener.port))
    async with started(again) as second:
        assert await second.line() == f"listening on port {listener.port}"
        async with await trisock.open_udp(host="127.0.0.1") as udp:
            await announce(udp, listener.port, query("to.both"))
            for each in (listener, second):
                assert (await each.line()).endswith("asks for to.both A")
        await second.stop()


async def test_a_missing_interface_is_reported_in_one_line() -> None:
    done = await run(*command("mdns_listener", "--port", "0", "--interface", "absent"))
    assert done.returncode == 1
    assert done.stderr.decode().splitlines() == [
        f"[Errno 19] cannot join 224.0.0.251 on the interface absent: {os.strerror(19)}"
    ]


async def test_a_signal_stops_the_responder_after_its_answers() -> None:
    async with running("dns_responder", *RECORDS) as server:
        async with await trisock.connect_udp("127.0.0.1", server.port) as client:
            for _ in range(5):
                await client.send(query("a.test"))
            server.ask_to_stop()
            for _ in range(5):
                with trio.fail_after(10):
                    await client.recv()
