"""Fuzzing of PEM: certificates, keys and authorities."""

from __future__ import annotations

from pathlib import Path

from hypothesis import strategies as st

from helpers.fuzzing import SOME_CHANGES, Change, Fuzz, changed
from helpers.pem import assert_shows_no_key, chains_and_keys, der_of
from trisock import Certificate, ClientTLS, ServerTLS


def some_pem(pems: list[bytes]) -> st.SearchStrategy[bytes]:
    """Generate valid, mutated and concatenated PEM, and bytes that are not PEM."""
    real = st.sampled_from(pems)
    return (
        real
        | st.builds(changed, real, SOME_CHANGES)
        | st.builds(changed, real.map(der_of), SOME_CHANGES)
        | st.lists(real, max_size=3).map(b"\n".join)
        | st.binary(max_size=100)
        | st.binary(max_size=100).map(lambda data: pems[0][:40] + b"\n" + data)
        | st.builds(lambda pem, data: pem + data * 10_000, real, st.binary(max_size=10))
    )


def as_text(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def test_errors_for_any_certificate_do_not_reveal_the_key(fuzz: Fuzz, tmp_path: Path) -> None:
    chains, keys = chains_and_keys()
    chain_file, key_file = tmp_path / "chain.pem", tmp_path / "key.pem"

    def load(chain: bytes, key: bytes, password: bytes | None, how: str) -> None:
        try:
            if how == "files":
                chain_file.write_bytes(chain)
                key_file.write_bytes(key)
                loaded = Certificate.from_files(chain_file, key_file, password)
            elif how == "mapping":
                given = {"chain": as_text(chain), "private_key": as_text(key)}
                ServerTLS(given if password is None else {**given, "password": as_text(password)})
                return
            elif how == "one file":
                chain_file.write_bytes(key + chain)
                loaded = Certificate.from_files(chain_file, None, password)
            else:
                loaded = Certificate(chain, key, password)
            ServerTLS(loaded)
        except (ValueError, TypeError) as exc:
            assert_shows_no_key(exc, key)
        else:
            assert key.decode("latin-1") not in repr(loaded)

    fuzz(
        load,
        150,
        chain=some_pem(chains),
        key=some_pem(keys),
        password=st.none() | st.just(b"secret") | st.binary(max_size=20),
        how=st.sampled_from(["class", "files", "one file", "mapping"]),
    )


def test_errors_for_a_mutated_key_do_not_reveal_the_key(fuzz: Fuzz) -> None:
    chains, keys = chains_and_keys()

    def load(index: int, changes: list[Change], password: bytes | None) -> None:
        key = changed(keys[index], changes)
        try:
            loaded = Certificate(chains[index % len(chains)], key, password)
            ServerTLS(loaded)
        except (ValueError, TypeError) as exc:
            assert_shows_no_key(exc, key)

    fuzz(
        load,
        100,
        index=st.integers(0, len(keys) - 1),
        changes=st.just([]) | SOME_CHANGES,
        password=st.none() | st.just(b"secret"),
    )


def test_errors_for_any_ca_do_not_reveal_a_key(fuzz: Fuzz) -> None:
    chains, keys = chains_and_keys()

    def load(ca: bytes, text: bool, role: str) -> None:
        given = as_text(ca) if text else ca
        try:
            if role == "client":
                ClientTLS("example.org", ca=given)
            else:
                ServerTLS(Certificate(chains[1], keys[1]), client_ca=given)
        except (ValueError, TypeError) as exc:
            assert_shows_no_key(exc, ca if b"PRIVATE" in ca else b"")

    fuzz(
        load,
        100,
        ca=some_pem([*chains, keys[0]]),
        text=st.booleans(),
        role=st.sampled_from(["client", "server"]),
    )
