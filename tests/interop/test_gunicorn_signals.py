"""TrioWorker in a real gunicorn: its signals and options, and no request is lost."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import trio

import trisock
from helpers.gunicorn_master import APP, Load, gunicorn
from trisock import IncompleteReadError
from trisock.testing import Authority

pytestmark = pytest.mark.interop


async def test_repeated_hups_lose_no_request(tmp_path: Path) -> None:
    async with gunicorn(tmp_path, "--workers", "2") as master:
        load = Load(master)
        async with load.running(clients=8):
            for number in range(1, 6):
                new = (await master.workers(2 * number))[-2:]
                await load.answered(new)
                master.process.send_signal(signal.SIGHUP)
                for pid in new:
                    await master.exited(pid)
    assert len(load.answers) >= 10


async def test_hups_in_quick_succession_lose_no_request(tmp_path: Path) -> None:
    async with gunicorn(tmp_path, "--workers", "2") as master:
        load = Load(master)
        async with load.running(clients=8):
            await load.answered(await master.workers(2))
            for number in range(1, 6):
                master.process.send_signal(signal.SIGHUP)
                await master.logged("Hang up", number)
            await load.answered((await master.workers(12))[-2:])


async def test_ttin_and_ttou_change_the_number_of_workers(tmp_path: Path) -> None:
    async with gunicorn(tmp_path, "--workers", "1") as master:
        load = Load(master)
        async with load.running(clients=4):
            first = await master.workers(1)
            await load.answered(first)
            master.process.send_signal(signal.SIGTTIN)
            both = await master.workers(2)
            await load.answered(both)
            master.process.send_signal(signal.SIGTTOU)
            await master.exited(both[0])  # the older one
            await load.answered(both[1:])


async def test_usr2_starts_a_second_master_that_takes_over(tmp_path: Path, free_port: int) -> None:
    async with gunicorn(tmp_path, "--workers", "1", port=free_port) as master:
        load = Load(master)
        async with load.running(clients=4):
            old = await master.workers(1)
            await load.answered(old)
            master.process.send_signal(signal.SIGUSR2)
            new = (await master.workers(2))[1:]
            await load.answered(new)
            master.process.terminate()
            await master.exited(old[0])
            await master.logged("Master has been promoted")
            await load.answered(new)
        os.killpg(master.process.pid, signal.SIGTERM)  # the second master's group, too
        await master.exited(new[0])


async def test_a_killed_worker_is_replaced(tmp_path: Path) -> None:
    async with gunicorn(tmp_path, "--workers", "1") as master:
        (first,) = await master.workers(1)
        assert await master.ask(b"hello") == (first, b"hello")
        os.kill(first, signal.SIGKILL)
        second = (await master.workers(2))[1]
        assert await master.ask(b"hello") == (second, b"hello")


async def test_a_worker_whose_event_loop_blocks_is_replaced(tmp_path: Path) -> None:
    async with gunicorn(tmp_path, "--workers", "1", "--timeout", "1") as master:
        (first,) = await master.workers(1)
        async with await trisock.connect("127.0.0.1", master.port) as sock:
            await sock.send(b"block\n")
            await master.logged("WORKER TIMEOUT")
            await master.logged(r"time\.sleep\(60\)")
            second = (await master.workers(2))[1]
        assert await master.ask(b"hello") == (second, b"hello")
        assert master.found(rf"Worker exiting \(pid: {first}\)")


async def test_a_waiting_worker_outlives_the_timeout(tmp_path: Path) -> None:
    app = "import trio\n" + APP.replace("raise SystemExit", "await trio.sleep(2.5)")
    async with gunicorn(tmp_path, "--workers", "1", "--timeout", "1", app=app) as master:
        (first,) = await master.workers(1)
        assert await master.ask(b"exit") == (first, b"exit")
        assert not master.found("WORKER TIMEOUT")


async def test_a_handler_that_ignores_its_cancellation_is_killed(tmp_path: Path) -> None:
    app = "import trio\n" + APP.replace(
        "raise SystemExit", "with trio.CancelScope(shield=True): await trio.sleep_forever()"
    )
    options = ["--workers", "1", "--timeout", "1", "--graceful-timeout", "0"]
    async with gunicorn(tmp_path, *options, app=app) as master:
        (first,) = await master.workers(1)
        async with await trisock.connect("127.0.0.1", master.port) as sock:
            await sock.send(b"hello\nexit\n")
            await sock.recv()
            os.kill(first, signal.SIGTERM)
            await master.logged("WORKER TIMEOUT")
            second = (await master.workers(2))[1]
            assert await master.ask(b"hello") == (second, b"hello")


async def test_handlers_clean_up_before_the_master_kills_the_worker(tmp_path: Path) -> None:
    app = "import trio\n" + APP.replace(
        "raise SystemExit",
        """
            try:
                await trio.sleep_forever()
            finally:
                logging.getLogger("trisock.server").error("cleaned up")
        """,
    )
    async with gunicorn(tmp_path, "--graceful-timeout", "1", app=app) as master:
        async with await trisock.connect("127.0.0.1", master.port) as sock:
            await sock.send(b"hello\nexit\n")
            await sock.recv()
            master.process.terminate()
            await master.logged("cleaned up")
            await master.logged("Worker exiting")


@pytest.mark.parametrize("name", ["SIGINT", "SIGQUIT"])
async def test_a_quick_stop_of_the_master_cancels_handlers(name: str, tmp_path: Path) -> None:
    hooks = "def worker_int(worker):\n    worker.log.info('hook: %s', worker.pid)\n"
    (tmp_path / "gunicorn.conf.py").write_text(hooks)
    async with gunicorn(tmp_path) as master:
        async with await trisock.connect("127.0.0.1", master.port) as sock:
            await sock.send(b"hello\n")
            await sock.recv()
            master.process.send_signal(getattr(signal, name))
            assert await sock.recv() == b""
        (pid,) = await master.workers(1)
        await master.logged(f"hook: {pid}")


async def test_a_handler_that_exits_ends_only_its_worker(tmp_path: Path) -> None:
    async with gunicorn(tmp_path, "--workers", "1") as master:
        with pytest.raises((IncompleteReadError, trio.BrokenResourceError)):
            await master.ask(b"exit")
        second = (await master.workers(2))[1]
        assert await master.ask(b"hello") == (second, b"hello")


async def test_workers_end_when_their_master_is_killed(tmp_path: Path) -> None:
    async with gunicorn(tmp_path, "--workers", "2", status=-signal.SIGKILL) as master:
        workers = await master.workers(2)
        assert (await master.ask(b"hello"))[0] in workers
        master.process.kill()
        for pid in workers:
            await master.exited(pid)
        assert len(master.found("the master is gone")) == 2


async def test_max_requests_renews_workers_and_loses_no_request(tmp_path: Path) -> None:
    options = ["--workers", "2", "--max-requests", "50", "--max-requests-jitter", "10"]
    async with gunicorn(tmp_path, *options) as master:
        load = Load(master)
        async with load.running(clients=4):
            await master.workers(6)
    assert len(load.answers) >= 4


async def test_a_preloaded_program_serves_in_each_worker(
    tmp_path: Path, pem: Path, authority: Authority
) -> None:
    app = (
        APP
        + f"""

from trisock import Certificate, ServerTLS

certificate = Certificate.from_files({str(pem / "chain.pem")!r}, {str(pem / "key.pem")!r})
app = App(handler, tls=ServerTLS(certificate))
loaded = os.getpid()
logging.getLogger("gunicorn.error").info("loaded in %s", os.getpid())
"""
    )
    async with gunicorn(
        tmp_path, "--workers", "2", "--preload", app=app, target="app:app"
    ) as master:
        pids = set()
        while len(pids) < 2:
            pid, _ = await master.ask(b"hello", tls=authority.client_tls())
            pids.add(pid)
        assert master.found(r"loaded in (\d+)") == [str(master.process.pid)]


async def test_reload_replaces_workers_when_the_program_changes(tmp_path: Path) -> None:
    async with gunicorn(
        tmp_path, "--workers", "1", "--reload", "--reload-engine", "poll"
    ) as master:
        (first,) = await master.workers(1)
        assert await master.ask(b"hello") == (first, b"hello")
        with (tmp_path / "app.py").open("a") as file:
            file.write("\n")
        second = (await master.workers(2))[1]
        assert await master.ask(b"hello") == (second, b"hello")


async def test_usr1_reopens_the_files_of_all_loggers(tmp_path: Path) -> None:
    log = tmp_path / "log"
    app = APP + "\n\nlogging.getLogger('app').addHandler(logging.FileHandler('log'))\n"
    app = app.replace("raise SystemExit", "logging.getLogger('app').error('asked')")
    async with gunicorn(tmp_path, "--workers", "1", app=app) as master:
        await master.ask(b"exit")
        log.rename(tmp_path / "log.1")
        master.process.send_signal(signal.SIGUSR1)
        while not log.exists():
            await master.ask(b"exit")
        await master.ask(b"exit")
        assert "asked" in log.read_text()
        assert len(await master.workers(1)) == 1


async def test_a_unix_socket_is_removed_by_the_master_only(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    async with gunicorn(tmp_path, "--bind", f"unix:{path}") as master:
        (first,) = await master.workers(1)
        async with await trisock.connect_unix(path) as sock:
            await sock.send(b"hello\n")
            assert await sock.recv_line() == b"%d hello" % first
        os.kill(first, signal.SIGTERM)
        await master.exited(first)
        async with await trisock.connect_unix(path) as sock:
            await sock.send(b"hello\n")
            assert await sock.recv_line() != b"%d hello" % first
    assert not path.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can change its user")
async def test_workers_run_as_the_given_user(tmp_path: Path) -> None:
    app = APP.replace("str(sock.getpeer()).encode()", 'b"%d" % os.geteuid()')
    async with gunicorn(tmp_path, "--preload", "--user", "65534", app=app) as master:
        assert (await master.ask(b"who"))[1] == b"65534"


async def test_gunicorn_halts_if_a_worker_cannot_boot(tmp_path: Path) -> None:
    async with gunicorn(tmp_path, "--keyfile", tmp_path / "app.py", status=3) as master:
        await master.process.wait()
        await master.logged("--keyfile, --ca-certs and --cert-reqs need --certfile")
        await master.logged("Worker failed to boot")


async def test_gunicorn_halts_if_a_hup_brings_a_broken_program(tmp_path: Path) -> None:
    async with gunicorn(tmp_path, status=3) as master:
        assert await master.ask(b"hello")
        (tmp_path / "app.py").write_text("handler = 1 / 0")
        master.process.send_signal(signal.SIGHUP)
        await master.process.wait()
        await master.logged("Worker failed to boot")
