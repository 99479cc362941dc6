"""Fixtures of the campaigns, for fuzzing and for cancellation."""

from __future__ import annotations

import itertools
import logging
import ssl
import sys
from collections.abc import Iterator

import pytest

from helpers.authority import Authority
from helpers.cancellation import Kit
from helpers.fuzzing import Fuzz
from trisock import ClientTLS, ServerTLS


@pytest.fixture
def fuzz(
    times: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Fuzz]:
    """Run checks on many examples. No log entry and no unraisable exception is allowed."""
    unraisable: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda args: unraisable.append(args.exc_type))
    fuzz = Fuzz(times)
    with caplog.at_level(logging.INFO):
        yield fuzz
    print(f"{fuzz.examples} examples")
    assert not caplog.records
    assert not unraisable


@pytest.fixture(scope="session")
def kit(authority: Authority, client_tls: ClientTLS, server_tls: ServerTLS) -> Kit:
    contexts = {}
    for version, side in itertools.product(["TLSv1_2", "TLSv1_3"], ["client", "server"]):
        if side == "client":  # so the peer is the server
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            authority.issue("example.org").load_into(context)
        else:
            context = ssl.create_default_context(cadata=authority.pem.decode())
        context.maximum_version = ssl.TLSVersion[version]
        contexts[f"{version} {side}"] = context
    return Kit(client_tls, server_tls, contexts)
