"""TLSInfo: channel bindings and copies."""

from __future__ import annotations

import copy
import hashlib
import pickle
import warnings
from unittest import mock

import pytest

from helpers.odd_certificates import BAD_CHAINS, SERIAL_0
from helpers.sni import client_info, trusting
from trisock import TLSInfo
from trisock._tls.info import new_tls_info
from trisock.testing import Authority


def info_about(certificate: bytes) -> TLSInfo:
    """Return the TLSInfo of a client that received this server certificate."""
    info = TLSInfo("TLSv1.3", "x", None, None, certificate, False)
    return new_tls_info(info, tls_unique=None, server_certificate=certificate)


async def test_tls_server_end_point_replaces_weak_hashes() -> None:
    """RFC 5929, section 4.1: SHA-256 replaces MD5 and SHA-1."""
    certificate = mock.Mock()
    certificate.signature_hash_algorithm.name = "sha1"
    certificate.fingerprint = lambda algorithm: hashlib.new(algorithm.name, b"der").digest()
    with mock.patch("trisock._tls.x509.load_certificate", return_value=certificate):
        binding = info_about(b"der").channel_binding("tls-server-end-point")
    assert binding == hashlib.sha256(b"der").digest()


@pytest.mark.parametrize("bad", [*BAD_CHAINS.values(), SERIAL_0], ids=[*BAD_CHAINS, "serial 0"])
def test_channel_binding_with_an_invalid_certificate_raises_only_value_error(bad: bytes) -> None:
    error: ValueError | None = None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            binding = info_about(bad).channel_binding("tls-server-end-point")
        except ValueError as exc:
            error = exc
    if error is None:
        assert len(binding) == 32
    else:
        assert type(error) is ValueError
        assert str(error).startswith("tls-server-end-point is not defined")


async def test_tls_info_can_be_copied_and_pickled(authority: Authority) -> None:
    info = await client_info(
        [authority.certificate("example.org")], "example.org", trusting(authority)
    )
    assert pickle.loads(pickle.dumps(info)) == copy.deepcopy(info) == info
