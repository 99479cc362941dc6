"""Fuzzing of certificates: their contents and the text around them.

These tests turn warnings into errors, as ``-W error`` does. Even then, a warning in another library
must not make trisock fail.
"""

from __future__ import annotations

import ssl
import warnings
from collections.abc import Callable, Iterator

import pytest
from hypothesis import strategies as st

from helpers.fuzzing import SOME_CHANGES, Change, Fuzz, changed
from helpers.odd_certificates import BAD_CHAINS, KEY, SERIAL_0, self_signed
from helpers.pem import assert_shows_no_key, chains_and_keys, der_of, encoded
from trisock import Certificate, ClientTLS, ServerTLS, TLSInfo
from trisock._tls.info import new_tls_info
from trisock.testing import Authority


@pytest.fixture(autouse=True)
def warnings_are_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# Text outside the PEM blocks: complete lines, or unprintable bytes just before a block.
AROUND = st.lists(
    st.sampled_from(
        [
            b"",
            b"\xef\xbb\xbf",
            b"\xff\xfe\0",
            b"\n\r\n \t\n",
            "# Zürich\n".encode(),
            "# Zürich\r".encode("latin-1"),
            b"Bag Attributes\n    friendlyName: x\n",
            b"# -----BEGIN CERTIFICATE-----\n# MII\n# -----END CERTIFICATE-----\n",
            b"#-----BEGIN PRIVATE KEY-----\n",
            b"-----END CERTIFICATE-----\n",
            b"-----BEGIN X9.42 DH PARAMETERS-----\n",
            b"-----BEGIN EC PARAMETERS-----\nBggqhkjOPQMBBw==\n-----END EC PARAMETERS-----\n",
        ]
    )
    | st.text(max_size=20).map(lambda text: b"# " + text.encode() + b"\n")
    | st.binary(max_size=20).map(lambda data: bytes(byte | 0x80 for byte in data)),
    max_size=3,
).map(b"".join)


def test_text_around_pem_blocks_changes_nothing(fuzz: Fuzz) -> None:
    chains, keys = chains_and_keys()

    def load(index: int, around: list[bytes], ends: bytes, key_first: bool, text: bool) -> None:
        chain, key = (each.replace(b"\n", ends) for each in (chains[index], keys[index]))
        first, second = (key, chain) if key_first else (chain, key)
        both: bytes | str = around[0] + first + around[1] + second + around[2]
        ca: bytes | str = around[0] + chain + around[1] + chain + around[2]
        if text:
            both, ca = (str(each, "utf-8", "replace") for each in (both, ca))
        loaded = Certificate(both, both)
        for role in (
            ServerTLS(loaded, client_ca=ca),
            ClientTLS("example.org", ca=ca, certificate=loaded),
        ):
            assert role._context().cert_store_stats()["x509"] == 1

    fuzz(
        load,
        60,
        index=st.integers(0, len(chains) - 1),
        around=st.lists(AROUND, min_size=3, max_size=3),
        ends=st.sampled_from([b"\n", b"\r\n", b"\r", b" \n"]),
        key_first=st.booleans(),
        text=st.booleans(),
    )


def failure_of(function: Callable[[], object]) -> Exception | None:
    try:
        function()
    except Exception as exc:
        return exc
    return None


def test_a_mutated_certificate_loads_or_raises_value_error(
    fuzz: Fuzz, authority: Authority
) -> None:
    """The mutation is inside the certificate. The PEM encoding around it is valid."""
    key = encoded(KEY)
    real = [self_signed(), der_of(authority.ca), *BAD_CHAINS.values(), SERIAL_0]

    def load(index: int, changes: list[Change]) -> None:
        der = changed(real[index], changes)
        pem = ssl.DER_cert_to_PEM_cert(der)
        for make, words in (
            (lambda: ServerTLS(Certificate(pem, key)), ("chain", "private_key")),
            (lambda: ClientTLS("example.org", ca=pem), ("ca",)),
        ):
            failure = failure_of(make)
            if failure is not None:
                assert type(failure) is ValueError, repr(failure)
                assert str(failure).startswith(words), str(failure)
                assert_shows_no_key(failure, key)
        info = new_tls_info(
            TLSInfo("TLSv1.3", "x", None, None, der, False), tls_unique=None, server_certificate=der
        )
        failure = failure_of(lambda: info.channel_binding("tls-server-end-point"))
        assert failure is None or "tls-server-end-point" in str(failure)

    fuzz(
        load,
        400,
        index=st.integers(0, len(real) - 1),
        changes=st.just([]) | SOME_CHANGES,
    )
