"""How TrioWorker interprets gunicorn's options."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from gunicorn.config import Config

import trisock
from helpers.gunicorn_workers import echo_lines as echo
from helpers.gunicorn_workers import worker_maker
from trisock import ServerTLS
from trisock.gunicorn import App, TrioWorker
from trisock.testing import serving


@pytest.fixture
def make_worker() -> Iterator[Callable[..., TrioWorker]]:
    with worker_maker() as make:
        yield make


class Recorded(Exception):
    """Raised instead of serving clients."""


@pytest.fixture
def options_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[TrioWorker], dict[str, Any]]:
    """A function that returns the options that a worker passes to ``bind``."""
    recorded: dict[str, Any] = {}

    async def record(
        nursery: trio.Nursery, listener: trisock.Listener, handler: Any, **options: Any
    ) -> None:
        recorded.update(options)
        listener.abort()
        raise Recorded

    def options(worker: TrioWorker) -> dict[str, Any]:
        worker.load_wsgi()
        with pytest.RaisesGroup(Recorded, flatten_subgroups=True):
            worker.run()
        return recorded

    monkeypatch.setattr(trisock.gunicorn, "bind", record)
    return options


def test_bind_gets_the_options_of_app_and_gunicorn(
    make_worker: Any, options_of: Any, server_tls: ServerTLS
) -> None:
    def admit(address: object) -> bool:
        return True

    app = App(
        echo,
        tls=server_tls,
        max_connections_per_host=5,
        admit=admit,
        handshake_timeout=7,
        https_compatible=True,
    )
    assert options_of(make_worker(app, worker_connections=9)) == {
        "tls": server_tls,
        "max_connections": 9,
        "max_connections_per_host": 5,
        "admit": admit,
        "trusted_proxies": None,
        "handshake_timeout": 7,
        "https_compatible": True,
    }


def test_zero_worker_connections_mean_no_limit(make_worker: Any, options_of: Any) -> None:
    assert options_of(make_worker(echo, worker_connections=0))["max_connections"] is None


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"proxy_protocol": False}, None),
        ({"proxy_protocol": True}, ["127.0.0.1", "::1", "unix"]),
        ({"proxy_protocol": True, "proxy_allow_ips": "192.0.2.1"}, ["192.0.2.1", "unix"]),
        ({"proxy_protocol": True, "proxy_allow_ips": "*"}, ["0.0.0.0/0", "::/0", "unix"]),
    ],
)
def test_proxy_allow_from_names_the_trusted_proxies(
    settings: dict[str, Any], expected: list[str] | None, make_worker: Any, options_of: Any
) -> None:
    assert options_of(make_worker(echo, **settings))["trusted_proxies"] == expected


@pytest.mark.parametrize("cert_reqs", [0, 1, 2])
def test_cert_reqs_controls_client_certificates(
    cert_reqs: int, pem: Path, make_worker: Any, options_of: Any
) -> None:
    files = {"certfile": "chain.pem", "keyfile": "key.pem", "ca_certs": "ca.pem"}
    paths = {name: str(pem / file) for name, file in files.items()}
    tls = options_of(make_worker(echo, cert_reqs=cert_reqs, **paths))["tls"]
    assert (tls.client_ca is not None) == (cert_reqs > 0)
    assert tls.require_client_certificate == (cert_reqs == 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"certfile": "chain.pem", "ciphers": "DEFAULT"}, "--ciphers"),
        (
            {"certfile": "chain.pem", "ssl_context": lambda config, default: default()},
            "ssl_context",
        ),
        ({"keyfile": "key.pem"}, "need --certfile"),
        ({"ca_certs": "ca.pem"}, "need --certfile"),
        ({"cert_reqs": 2}, "need --certfile"),
        ({"certfile": "chain.pem", "keyfile": "key.pem", "cert_reqs": 1}, "needs --ca-certs"),
        ({"certfile": "chain.pem", "ca_certs": "ca.pem", "cert_reqs": 3}, "must be 0, 1 or 2"),
    ],
)
def test_an_option_about_tls_is_never_ignored(
    settings: dict[str, Any], message: str, pem: Path, make_worker: Any
) -> None:
    for name in ("certfile", "keyfile", "ca_certs"):
        if name in settings:
            settings = {**settings, name: str(pem / settings[name])}
    with pytest.raises(ValueError, match=message):
        make_worker(echo, **settings).load_wsgi()


def test_a_certfile_and_the_tls_of_an_app_exclude_each_other(
    pem: Path, server_tls: ServerTLS, make_worker: Any
) -> None:
    worker = make_worker(App(echo, tls=server_tls), certfile=str(pem / "chain.pem"))
    with pytest.raises(ValueError, match="both --certfile and App"):
        worker.load_wsgi()


@pytest.mark.parametrize(
    ("settings", "warning"),
    [({}, None), ({"threads": 2}, "--threads"), ({"reuse_port": True}, "--reuse-port")],
)
def test_the_master_warns_of_unsuitable_options(
    settings: dict[str, Any], warning: str | None
) -> None:
    config = Config()
    for name, value in settings.items():
        config.set(name, value)
    warnings: list[str] = []
    log: Any = logging.Logger("master")
    log.warning = warnings.append
    TrioWorker.check_config(config, log)
    assert [warning in each for each in warnings if warning] == [True] * len(settings)


async def test_an_app_can_be_called_like_its_handler() -> None:
    async with serving(App(echo)) as s:
        client = await s.connect()
        await client.send(b"hello\n")
        assert await client.recv_line() == b"hello"
