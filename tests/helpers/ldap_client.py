"""The client side of LDAP."""

from __future__ import annotations

from collections.abc import Iterator

from helpers.real_servers import PASSWORD
from trisock import Socket


def ber(tag: int, *contents: bytes) -> bytes:
    content = b"".join(contents)
    size = len(content)
    if size < 128:
        return bytes([tag, size]) + content
    octets = size.to_bytes(4, "big")
    return bytes([tag, 0x80 | len(octets)]) + octets + content


def ber_elements(data: bytes) -> Iterator[tuple[int, bytes]]:
    while data:
        tag, size, start = data[0], data[1], 2
        if size & 0x80:
            start += size & 0x7F
            size = int.from_bytes(data[2:start], "big")
        yield tag, data[start : start + size]
        data = data[start + size :]


def octet_string(value: bytes) -> bytes:
    return ber(0x04, value)


SEQUENCE, INTEGER, ENUMERATED = 0x30, 0x02, 0x0A
SUCCESS, CONFIDENTIALITY_REQUIRED = 0, 13
ADMIN = b"cn=admin,o=example"


async def ldap_send(sock: Socket, operation: bytes) -> None:
    await sock.send(ber(SEQUENCE, ber(INTEGER, b"\x01"), operation))


async def ldap_receive(sock: Socket) -> tuple[int, bytes]:
    """Return the next response: its tag and its content."""
    tag, size = await sock.recv_exactly(2)
    assert tag == SEQUENCE
    if size & 0x80:
        size = int.from_bytes(await sock.recv_exactly(size & 0x7F), "big")
    _, response = ber_elements(await sock.recv_exactly(size))
    return response


async def ldap(sock: Socket, operation: bytes) -> tuple[int, bytes]:
    """Request an operation that has one response. Return the response's result code and content."""
    await ldap_send(sock, operation)
    _, content = await ldap_receive(sock)
    (_, code), *_ = ber_elements(content)
    return code[0], content


def extended(oid: bytes) -> bytes:
    return ber(0x77, ber(0x80, oid))


def bind(name: bytes, password: bytes) -> bytes:
    return ber(0x60, ber(INTEGER, b"\x03"), octet_string(name), ber(0x80, password))


SASL_EXTERNAL = ber(
    0x60,
    ber(INTEGER, b"\x03"),
    octet_string(b""),
    ber(0xA3, octet_string(b"EXTERNAL"), octet_string(b"")),
)


async def ldap_login(sock: Socket) -> None:
    code, _ = await ldap(sock, bind(ADMIN, PASSWORD.encode()))
    assert code == SUCCESS


async def ldap_whoami(sock: Socket) -> bytes:
    code, content = await ldap(sock, extended(b"1.3.6.1.4.1.4203.1.11.3"))
    assert code == SUCCESS
    return dict(ber_elements(content))[0x8B]
