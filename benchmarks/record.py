"""The results as JSON: every figure of every round, and the machine that produced them."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import ssl
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from .contest import Result, Setup
from .peers import PEERS


def machine(setup: Setup) -> dict[str, str]:
    """Describe the machine and the software: without them, the figures mean nothing."""
    return {
        "cpu": _cpu_model(),
        "cores": setup.cores,
        "kernel": platform.release(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "openssl": ssl.OPENSSL_VERSION,
        **versions({name for peer in PEERS.values() for name in peer.packages}),
    }


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of the packages that are installed."""
    found = {}
    for name in sorted(packages):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write(results: list[Result], about: dict[str, str], path: Path) -> None:
    """Write the results to a file."""
    content = {
        "when": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": about,
        "rows": {each.row.name: _result(each) for each in results},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def _result(result: Result) -> dict[str, object]:
    peers: dict[str, object] = {}
    for name, series in result.series.items():
        rounds = [asdict(each) for each in series.measurements]
        if series.failure:
            peers[name] = {"failure": series.failure, "rounds": rounds}
            continue
        ratio = result.ratio(name)
        peers[name] = {
            "ratio": asdict(ratio) if ratio else None,
            "figure": asdict(result.figure(name)),
            "per_second": asdict(result.per_second(name)),
            "rounds": rounds,
        }
    return {
        "title": result.row.title,
        "figure": "bytes / connection"
        if result.row.is_memory
        else f"{result.row.unit} / CPU second",
        "amount": result.amount,
        "target": result.row.target,
        "peers": peers,
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
