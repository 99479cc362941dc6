"""The first program of the README."""

from __future__ import annotations

import re
from pathlib import Path

import trisock
from helpers.documents import ROOT
from helpers.services import program, systemd


async def test_the_first_program_of_the_readme_serves(tmp_path: Path) -> None:
    found = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert found is not None
    source = found[1].replace("run(7777,", "run(listener,")
    with systemd(tmp_path / "notify") as manager:
        async with program(source, NOTIFY_SOCKET=manager.path) as running:
            assert await manager.receive() == b"READY=1"
            async with await trisock.connect("127.0.0.1", running.port) as client:
                await client.send(b"hello\nworld\n")
                assert [await client.recv_line() for _ in range(2)] == [b"hello", b"world"]
            await running.stop()
