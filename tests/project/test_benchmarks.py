"""Each benchmark does the work that it measures, and fails if the server skips part of the work."""

from __future__ import annotations

import os
import resource
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

if sys.platform != "linux":
    pytest.skip("the benchmarks need epoll and /proc", allow_module_level=True)

from benchmarks import record
from benchmarks.against import compare
from benchmarks.client import upstream
from benchmarks.contest import Result, Series, Setup, compete, prepare
from benchmarks.measure import Measurement
from benchmarks.peers import PEERS, Peer
from benchmarks.rows import MIB, ROWS

from helpers.cancellation import grid

# The peers that need no extra packages.
BASIC_PEERS = [PEERS[name] for name in ("trio", "trisock", "asyncio", "epoll")]

SMALL_AMOUNTS = {
    "echo64": 1280,
    "connections": 40,
    "connections1": 20,
    "receive": 4 * MIB,
    "send": 4 * MIB,
    "lines": 10_000,
    "batches": 10_000,
    "frames": 10_000,
    "tls-handshakes": 20,
    "tls-receive": MIB,
    "tls-send": MIB,
    "memory": 20,
}

# The program of a server that returns or counts one byte or line too few.
LOSSY = """
import socket
from benchmarks.peers.serving import BLOCK, HOST, READ_SIZE, announce, parse_options

def serve(work, sock):
    if work == "echo":
        sock.sendall(sock.recv(READ_SIZE)[:-1])
        return
    if work in ("lines", "frames"):
        count = -1
        while chunk := sock.recv(READ_SIZE):
            count += chunk.count(b"\\n" if work == "lines" else b"\\0\\0\\0")
        sock.sendall(b"%d" % count)
        return
    request = sock.recv(READ_SIZE)
    wanted = int(request)
    if work == "send":
        sock.sendall(BLOCK * (wanted // len(BLOCK) - 1) + BLOCK[:-1])
        return
    sock.sendall(request)
    while wanted > 0:
        wanted -= len(sock.recv(READ_SIZE))
    sock.sendall(b"%d" % (int(request) - 1))

options = parse_options()
with socket.create_server((HOST, 0)) as listening:
    announce(listening.getsockname()[1])
    while True:
        sock, _ = listening.accept()
        with sock:
            serve(options.work, sock)
"""


# A relay that loses the last byte.
LOSSY_RELAY = """
import socket
from benchmarks.peers.serving import HOST, announce, parse_options

options = parse_options()
with socket.create_server((HOST, 0)) as listening:
    announce(listening.getsockname()[1])
    sock, _ = listening.accept()
    with sock, socket.create_connection((HOST, options.upstream)) as upstream:
        data = b""
        while chunk := sock.recv(65536):
            data += chunk
        upstream.sendall(data[:-1])
"""


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    cores = os.sched_getaffinity(0)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with upstream():
        yield prepare(tmp_path_factory.mktemp("certificates"))
    upstream.cache_clear()
    os.sched_setaffinity(0, cores)
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize(
    "name", grid(lambda name: name in ("echo64", "frames", "tls-send"), SMALL_AMOUNTS)
)
def test_every_peer_does_all_the_work_of_each_benchmark(name: str, setup: Setup) -> None:
    result = compete(ROWS[name], BASIC_PEERS, setup, amount=SMALL_AMOUNTS[name], rounds=1)
    assert {peer: series.failure for peer, series in result.series.items()} == {
        peer.name: None for peer in BASIC_PEERS
    }
    for series in result.series.values():
        [measured] = series.measurements
        assert measured.amount == SMALL_AMOUNTS[name]
        assert measured.cpu > 0


@pytest.mark.parametrize("peer", ["trio", "trisock", "trisock-all-addresses", "asyncio", "epoll"])
@pytest.mark.parametrize("name", ["udp-echo64", "udp-echo1"])
def test_every_datagram_is_echoed(name: str, peer: str, setup: Setup) -> None:
    result = compete(ROWS[name], [PEERS[peer]], setup, amount=640, rounds=1)
    assert result.series[peer].failure is None
    assert len(result.series[peer].measurements) == 1


@pytest.mark.parametrize("peer", ["trio", "trisock", "haproxy"])
@pytest.mark.parametrize(("name", "amount"), [("relay", 4 * MIB), ("relay-memory", 20)])
def test_a_relay_passes_everything_on(name: str, amount: int, peer: str, setup: Setup) -> None:
    if PEERS[peer].missing:
        pytest.skip(f"the program {peer} is not installed")
    result = compete(ROWS[name], [PEERS[peer]], setup, amount=amount, rounds=1)
    assert result.series[peer].failure is None
    assert len(result.series[peer].measurements) == 1


def test_a_relay_that_loses_data_gets_no_result(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lossy.py").write_text(LOSSY_RELAY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    lossy = Peer("lossy", "", "lossy", works=("relay",))
    result = compete(ROWS["relay"], [lossy], setup, amount=MIB, rounds=1)
    assert "of 131072 bytes" in str(result.series["lossy"].failure)


def test_a_peer_without_a_server_for_the_row_is_skipped(setup: Setup) -> None:
    result = compete(ROWS["relay"], [PEERS["asyncio"]], setup, amount=MIB, rounds=1)
    assert not result.series
    assert result.ratio("asyncio") is None


@pytest.mark.parametrize("name", ["echo1", "connections", "receive", "send", "lines", "frames"])
def test_a_server_that_loses_data_gets_no_result(
    name: str, setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lossy.py").write_text(LOSSY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    amount = SMALL_AMOUNTS.get(name, 100)
    result = compete(ROWS[name], [Peer("lossy", "", "lossy")], setup, amount=amount, rounds=2)
    lossy = result.series["lossy"]
    assert lossy.failure
    assert not lossy.measurements


def test_a_peer_whose_library_is_not_installed_is_reported(setup: Setup) -> None:
    absent = Peer("absent", "", "benchmarks.peers.trio", packages=("no_such_library",))
    result = compete(ROWS["echo1"], [absent], setup, amount=10, rounds=1)
    assert result.series["absent"].failure == "not installed: no_such_library"


def test_the_error_of_a_failed_server_start_is_reported(setup: Setup) -> None:
    broken = Peer("broken", "", "benchmarks.peers.no_such_peer")
    result = compete(ROWS["echo1"], [broken], setup, amount=10, rounds=1)
    assert "No module named benchmarks.peers.no_such_peer" in str(result.series["broken"].failure)


def test_killing_the_driver_stops_its_server() -> None:
    driver = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import os, time\n"
            "from benchmarks.server import Server\n"
            "server = Server(['benchmarks.peers.epoll', 'echo'], min(os.sched_getaffinity(0)))\n"
            "server.wait_ready()\n"
            "print(server.pid, flush=True)\n"
            "time.sleep(3600)\n",
        ],
        stdout=subprocess.PIPE,
    )
    assert driver.stdout is not None
    with driver, driver.stdout:
        server = os.pidfd_open(int(driver.stdout.readline()))
        try:
            driver.send_signal(signal.SIGKILL)
            ended = select.poll()
            ended.register(server, select.POLLIN)
            assert ended.poll(60_000)
        finally:
            os.close(server)


def test_ratios_compare_figures_of_the_same_round() -> None:
    def series(*seconds: float) -> Series:
        return Series([Measurement(100, each, each, 0) for each in seconds])

    # In the second round, the machine is half as fast for both peers.
    result = Result(ROWS["echo1"], 100, {"trio": series(1, 2), "trisock": series(0.5, 1)})
    ratio = result.ratio("trisock")
    assert ratio is not None
    assert (ratio.low, ratio.median, ratio.high) == (2, 2, 2)
    assert ROWS["echo1"].meets_target(2)
    assert not ROWS["memory"].meets_target(2)


def test_the_record_contains_the_figures_of_every_round(setup: Setup, tmp_path: Path) -> None:
    import json

    result = compete(ROWS["echo1"], BASIC_PEERS[:2], setup, amount=100, rounds=2)
    record.write([result], record.machine(setup), tmp_path / "new" / "latest.json")
    written = json.loads((tmp_path / "new" / "latest.json").read_text())
    assert written["machine"]["trio"]
    for name in ("trio", "trisock"):
        rounds = written["rows"]["echo1"]["peers"][name]["rounds"]
        assert [each["amount"] for each in rounds] == [100, 100]


@pytest.mark.parametrize(
    ("row", "before", "verdict"),
    [
        ("echo1", 1.0, "equal"),
        ("echo1", 1.1, "slower"),
        ("echo1", 0.9, "faster"),
        ("memory", 0.9, "slower"),
        ("memory", 1.1, "faster"),
    ],
)
def test_a_difference_within_the_noise_counts_as_equal(
    row: str, before: float, verdict: str
) -> None:
    def series(figures: list[float]) -> Series:
        if ROWS[row].is_memory:
            return Series([Measurement(100, 1, 1, round(100_000 * each)) for each in figures])
        return Series([Measurement(1000, 1 / each, 1, 0) for each in figures])

    # Two equal builds differ by up to 5 % in these rounds.
    result = Result(
        ROWS[row],
        1000,
        {
            "now": series([1.0, 1.0, 1.0]),
            "now again": series([0.96, 1.0, 1.05]),
            "before": series([before] * 3),
        },
    )
    assert compare(result)[1] == verdict
