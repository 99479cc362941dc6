"""The reader of PEM, alone: which blocks it finds, and what it calls damaged."""

from __future__ import annotations

import base64

import pytest

from trisock._tls import pem as _pem

CONTENT = bytes([0x30, 3, 2, 1, 5])


def block(label: str, content: bytes = CONTENT) -> bytes:
    text = base64.b64encode(content)
    return b"-----BEGIN %s-----\n%s\n-----END %s-----\n" % (label.encode(), text, label.encode())


@pytest.mark.parametrize(
    "data",
    [
        b"-----BEGIN CERTIFICATE-----\nAAAA\n" + block("CERTIFICATE"),
        block("CERTIFICATE").replace(b"END CERTIFICATE", b"END PUBLIC KEY"),
        b"-----BEGIN CERTIFICATE-----\nAAAA",
        block("CERTIFICATE").replace(b"MAMC", b"MA*C"),
        b"-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n",
        block("PUBLIC KEY"),
        b"",
    ],
    ids=["two begins", "another end", "no end", "no base64", "empty", "another kind", "nothing"],
)
def test_a_damaged_certificate_does_not_go_missing_silently(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"a block is damaged|there is no .* block"):
        _pem.certificates(data)


@pytest.mark.parametrize("size", [1, 5, 127, 200, 70_000])
def test_a_trusted_certificate_ends_before_openssls_own_data(size: int) -> None:
    length = bytes([size]) if size < 128 else bytes([0x83]) + size.to_bytes(3, "big")
    der = b"\x30" + length + bytes(size)
    assert _pem.certificates(block("TRUSTED CERTIFICATE", der + b"trust")) == [der]


def test_a_trusted_certificate_of_one_byte_stays_one() -> None:
    assert _pem.certificates(block("TRUSTED CERTIFICATE", b"\x30")) == [b"\x30"]


def test_a_key_whose_headers_never_end_is_damaged() -> None:
    key = (
        b"-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\n-----END RSA PRIVATE KEY-----\n"
    )
    with pytest.raises(ValueError, match="a block is damaged"):
        _pem.private_key(key)


def test_without_a_key_it_says_so() -> None:
    with pytest.raises(ValueError, match="no private key block"):
        _pem.private_key(block("CERTIFICATE"))


def test_blocks_that_are_commented_out_are_looked_at_once() -> None:
    comment = b"# -----BEGIN CERTIFICATE-----\n"

    class Counted(bytes):
        looks = 0

        def __getitem__(self, index: object) -> object:  # type: ignore[override]
            Counted.looks += 1
            return super().__getitem__(index)  # type: ignore[index]

    data = Counted(comment * 2000)
    assert list(_pem.blocks(data)) == []
    assert Counted.looks <= 4 * 2000 * 2
