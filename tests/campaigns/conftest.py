"""Fixtures for the campaigns: the fuzzer, and connections on which to cancel calls."""

from __future__ import annotations

import itertools
import logging
import ssl
import sys
from collections.abc import Iterator

import pytest

from helpers.cancellation import Connections
from helpers.fuzzing import Fuzz
from trisock import ClientTLS, ServerTLS
from trisock.testing import Authority


@pytest.fixture
def fuzz(
    times: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Fuzz]:
    """Run checks on many examples. Fail if an example logs anything or has an unraisable error."""
    unraisable: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda args: unraisable.append(args.exc_type))
    fuzz = Fuzz(times)
    with caplog.at_level(logging.INFO):
        yield fuzz
    print(f"{fuzz.examples} examples")
    assert not caplog.records
    assert not unraisable


@pytest.fixture(scope="session")
def connections(authority: Authority, client_tls: ClientTLS, server_tls: ServerTLS) -> Connections:
    peer_contexts = {}
    for version, side in itertools.product(["TLSv1_2", "TLSv1_3"], ["client", "server"]):
        if side == "client":  # our side is the client, so the peer is the server
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            authority.certificate("example.org").load_into(context)
        else:
            context = ssl.create_default_context(cadata=authority.ca.decode())
        context.maximum_version = ssl.TLSVersion[version]
        peer_contexts[f"{version} {side}"] = context
    return Connections(client_tls, server_tls, peer_contexts)
