"""TrioWorker in a real gunicorn: every signal, and no request is lost."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

import trisock
from helpers.gunicorn_master import Load, gunicorn
from trisock import IncompleteReadError

pytestmark = pytest.mark.interop


async def test_repeated_hups_lose_no_request(tmp_path: Path) -> None:
    async with gunicorn(tmp_path, "--workers", "2") as master:
        load = Load(master)
        async with load.running(clients=8):
            for round in range(1, 6):
                new = (await master.workers(2 * round))[-2:]
                await load.answered(new)
                master.process.send_signal(signal.SIGHUP)
                for pid in new:
                    await master.exited(pid)
    assert len(load.answers) >= 10
