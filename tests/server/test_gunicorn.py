"""TrioWorker in a real gunicorn. ``interop/test_gunicorn_signals.py`` has the longer tests."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import trisock
from helpers.documents import ROOT
from helpers.gunicorn_master import Load, gunicorn
from trisock import ProxyHeader
from trisock.testing import Authority


async def test_a_hup_replaces_all_workers_and_loses_no_request(tmp_path: Path) -> None:
    async with gunicorn(tmp_path, "--workers", "2") as master:
        load = Load(master)
        async with load.running(clients=4):
            old = await master.workers(2)
            await load.answered(old)
            master.process.send_signal(signal.SIGHUP)
            new = (await master.workers(4))[2:]
            for pid in old:
                await master.exited(pid)
            await load.answered(new)
    assert load.answers.keys() == {*old, *new}
    assert not master.found("RuntimeWarning")  # Trio warns if gunicorn keeps the wakeup descriptor


async def test_an_aborted_worker_logs_where_it_was_and_is_replaced(tmp_path: Path) -> None:
    hooks = tmp_path / "gunicorn.conf.py"
    hooks.write_text("def worker_abort(worker):\n    worker.log.info('hook: %s', worker.pid)\n")
    async with gunicorn(tmp_path) as master:
        pid, _ = await master.ask(b"hello")
        async with await trisock.connect("127.0.0.1", master.port) as sock:
            await sock.send(b"block\n")
            await master.logged("blocks")
            os.kill(pid, signal.SIGABRT)
            await master.logged(r"was aborted \(SIGABRT\) here:")
            await master.logged("in handler")
            await master.logged(f"hook: {pid}")
            await master.logged(rf"Worker \(pid:{pid}\) exited with code 1")
        assert (await master.ask(b"hello"))[0] == (await master.workers(2))[1]


async def test_options_select_tls_and_trusted_proxies(
    pem: Path, authority: Authority, tmp_path: Path
) -> None:
    (tmp_path / "client_ca.pem").write_bytes(authority.ca)
    client = authority.client_tls("localhost", certificate=authority.certificate("me"))
    options = [
        *("--certfile", pem / "chain.pem", "--keyfile", pem / "key.pem"),
        *("--ca-certs", tmp_path / "client_ca.pem", "--cert-reqs", "2"),
        *("--proxy-protocol", "--proxy-allow-from", "127.0.0.1"),
    ]
    source = trisock.Address("192.0.2.1", 1000)
    header = ProxyHeader(version=1, source=source, destination=trisock.Address("192.0.2.2", 25))
    async with gunicorn(tmp_path, *options) as master:
        async with await trisock.connect("127.0.0.1", master.port, proxy_header=header) as sock:
            await sock.starttls(client)
            await sock.send(b"who\n")
            answer = await sock.recv_line()
    assert answer.endswith(b" 192.0.2.1:1000")


async def test_the_program_and_configuration_in_the_docs_run_unchanged(
    pem: Path, authority: Authority
) -> None:
    page = (ROOT / "docs/deploying.md").read_text()
    section = re.split(r"^## ", page, flags=re.MULTILINE)
    (text,) = [each for each in section if each.startswith("gunicorn\n")]
    program, configuration = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    (pem / "gunicorn.conf.py").write_text(configuration)
    async with gunicorn(pem, app=program, target=None) as master:
        tls = authority.client_tls("localhost")
        async with await trisock.connect("127.0.0.1", master.port, tls=tls) as sock:
            await sock.send(b"hello\n")
            assert await sock.recv_line() == b"hello"
            await master.workers(4)
            master.process.send_signal(signal.SIGHUP)
            assert await sock.recv() == b""  # the connection is idle, so it ends at once
