"""The versions of the programs that the interop tests use, as Debian's packages."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path


def package_of(program: str) -> str:
    """Return the package and the version of a program, or say that it belongs to no package."""
    path = _path(program)
    if path is None:
        return f"{program} (not installed)"
    # dpkg knows a path as the package wrote it: without links, and perhaps without /usr.
    names = dict.fromkeys([str(path), str(path.resolve()), str(path).removeprefix("/usr")])
    for name in names:
        package = _dpkg_query("--search", name).partition(": ")[0]
        if package:
            return _dpkg_query("--show", "--showformat=${Package} ${Version}", package)
    return f"{program} (no package)"


def _path(program: str) -> Path | None:
    if program == "pg_ctlcluster":  # it belongs to PostgreSQL of any version
        servers = Path("/usr/lib/postgresql").glob("*/bin/postgres")
        return max(servers, key=lambda path: int(path.parts[-3]), default=None)
    found = shutil.which(program)
    return None if found is None else Path(found)


def _dpkg_query(*arguments: str) -> str:
    if shutil.which("dpkg-query") is None:
        return ""
    done = subprocess.run(["dpkg-query", *arguments], check=False, capture_output=True, text=True)
    return done.stdout.strip()
