"""Ciphertext is split into records, and plain text is split into pieces. No test does I/O."""

from __future__ import annotations

from trisock._tls.records import IncomingCiphertext, pieces

RECORD = b"\x17\x03\x03\x00\x02ab"


def test_ciphertext_is_taken_record_by_record_in_order() -> None:
    incoming = IncomingCiphertext()
    incoming.write(RECORD[:3])
    incoming.write(RECORD[3:] + RECORD)
    assert incoming.pending == 2 * len(RECORD)
    assert bytes(incoming.take()) == RECORD
    assert bytes(incoming.take()) == RECORD
    assert not incoming.pending


def test_take_many_returns_the_rest_of_a_split_record() -> None:
    incoming = IncomingCiphertext()
    incoming.write(RECORD[:3])
    assert bytes(incoming.take()) == RECORD[:3]
    incoming.write(RECORD[3:])
    data, count = incoming.take_many()
    assert (bytes(data), count) == (RECORD[3:], 1)


def test_plain_text_is_encrypted_in_bounded_pieces() -> None:
    views = [memoryview(b"a" * 10)] * 1000 + [memoryview(b"b" * 1_000_000)] + [memoryview(b"c")] * 5
    found = list(pieces(views))
    assert b"".join(found) == b"".join(views)
    assert max(map(len, found)) <= 65536
    assert len(found) <= 20
