"""The PEM reader: which blocks it finds, and which blocks it refuses as damaged."""

from __future__ import annotations

import base64

import pytest

from trisock._tls import pem

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
    ids=["two begins", "another end", "no end", "not base64", "empty", "another kind", "nothing"],
)
def test_a_damaged_or_missing_certificate_raises_value_error(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"a block is damaged|there is no .* block"):
        pem.certificates(data)


@pytest.mark.parametrize("size", [1, 5, 127, 200, 70_000])
def test_openssls_extra_data_in_a_trusted_certificate_is_dropped(size: int) -> None:
    length = bytes([size]) if size < 128 else bytes([0x83]) + size.to_bytes(3, "big")
    der = b"\x30" + length + bytes(size)
    assert pem.certificates(block("TRUSTED CERTIFICATE", der + b"trust")) == [der]


def test_a_trusted_certificate_of_one_byte_is_kept_whole() -> None:
    assert pem.certificates(block("TRUSTED CERTIFICATE", b"\x30")) == [b"\x30"]


def test_a_key_whose_headers_never_end_is_refused() -> None:
    key = (
        b"-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\n-----END RSA PRIVATE KEY-----\n"
    )
    with pytest.raises(ValueError, match="a block is damaged"):
        pem.private_key(key)


def test_a_missing_key_raises_value_error() -> None:
    with pytest.raises(ValueError, match="no private key block"):
        pem.private_key(block("CERTIFICATE"))


def test_commented_out_blocks_are_skipped_in_linear_time() -> None:
    comment = b"# -----BEGIN CERTIFICATE-----\n"

    class Counted(bytes):
        reads = 0

        def __getitem__(self, index: object) -> object:  # type: ignore[override]
            Counted.reads += 1
            return super().__getitem__(index)  # type: ignore[index]

    data = Counted(comment * 2000)
    assert list(pem.blocks(data)) == []
    assert Counted.reads <= 4 * 2000 * 2
