"""Check the wheel and the sdist in ``dist``: what they contain, and that they work.

    python tests/distribution/check.py [PYTHON ...]

``nox -s build`` makes the two files and runs this program with each installed Python. The wheel is
installed in a fresh environment on each Python, without an extra and with each extra, and
``installed.py`` runs in each environment. The sdist is unpacked. On the last Python, all tests of
the sdist are collected and some of them run, with the wheel.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

ROOT = Path(__file__).parents[2]
INSTALLED = Path(__file__).parent / "installed.py"
PACKAGE = ROOT / "src"

LINK = re.compile(r"\]\(([^)]+)\)")

# Fast tests. Some need files that are not in the wheel, such as the documentation.
SOME_TESTS = [
    "tests/net/test_address.py",
    "tests/net/test_lines.py",
    "tests/tls/test_engine.py",
    "tests/project/test_api.py",
    "tests/project/test_floors.py",
    "tests/project/test_promises.py",
]

# This program and its children must not find the trisock of this directory.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("pythons", nargs="*", default=[sys.executable])
    pythons: list[str] = parser.parse_args().pythons
    (wheel,) = (ROOT / "dist").glob("*.whl")
    (sdist,) = (ROOT / "dist").glob("*.tar.gz")
    check_wheel(wheel)
    check_sdist(sdist)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for python in pythons:
            download(wheel, python, folder)
        jobs = [
            functools.partial(check_installed, wheel, python, extra, folder)
            for python in pythons
            for extra in ["", *extras_of(wheel)]
        ]
        jobs.append(functools.partial(check_tests, wheel, sdist, pythons[-1], folder))
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as executor:
            try:
                for job in concurrent.futures.as_completed(map(executor.submit, jobs)):
                    print(job.result(), flush=True)
            except SystemExit:
                executor.shutdown(cancel_futures=True)
                raise


# ---- what they contain ----


def check_wheel(wheel: Path) -> None:
    """The wheel contains the package, and nothing else. The links of its README lead to its tag."""
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    package = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert "trisock/py.typed" in found
    assert found == package, f"{wheel.name}: {sorted(found ^ package)}"
    metadata = metadata_of(wheel)
    shown = LINK.findall(str(metadata.get_payload()))
    written = LINK.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(written) > 20
    assert shown == [_on_pypi(link, f"v{metadata['Version']}") for link in written]


def _on_pypi(link: str, tag: str) -> str:
    """Return a README link as it must be on PyPI, where relative links lead nowhere."""
    if link.startswith("https://"):
        return link
    if link.endswith(".svg"):
        return f"https://raw.githubusercontent.com/trisock/trisock/{tag}/{link}"
    return f"https://github.com/trisock/trisock/blob/{tag}/{link}"


def check_sdist(sdist: Path) -> None:
    """The sdist contains the files that git tracks, and nothing else."""
    with tarfile.open(sdist) as archive:
        members = [Path(member.name) for member in archive if member.isfile()]
    found = {path.relative_to(path.parts[0]).as_posix() for path in members} - {"PKG-INFO"}
    if (ROOT / ".git").exists():
        listed = run(["git", "ls-files", "-z"], ROOT).split("\0")
        known = {name for name in listed if name and (ROOT / name).exists()}
        assert found == known, f"{sdist.name}: {sorted(found ^ known)}"


def extras_of(wheel: Path) -> list[str]:
    """Return the extras of the wheel, without ``tests``."""
    extras = metadata_of(wheel).get_all("Provides-Extra", [])
    return [extra for extra in extras if extra != "tests"]


def metadata_of(wheel: Path) -> Message:
    """Return the metadata of the wheel. The payload is the README."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


# ---- whether they work ----


def download(wheel: Path, python: str, folder: Path) -> None:
    """Download the wheel's requirements for this Python, once for all environments."""
    environment = new_environment(python, folder / f"download-{python}")
    extras = ",".join(["tests", *extras_of(wheel)])
    pip(environment, "download", "--dest", str(folder / "wheels"), f"{wheel}[{extras}]")


def check_installed(wheel: Path, python: str, extra: str, folder: Path) -> str:
    """The wheel works with this extra, and its errors name the extras that are missing."""
    environment = new_environment(python, folder / f"{python}-{extra}")
    install(environment, f"{wheel}[{extra}]" if extra else str(wheel), folder)
    run([str(environment), "-I", str(INSTALLED), extra], folder)
    return f"{python}, {f'the extra {extra}' if extra else 'no extra'}: works"


def check_tests(wheel: Path, sdist: Path, python: str, folder: Path) -> str:
    """The sdist can run its tests."""
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "sdist")
    (unpacked,) = (folder / "sdist").iterdir()
    environment = new_environment(python, folder / f"{python}-tests")
    install(environment, f"{wheel}[tests]", folder)
    pytest = [str(environment), "-m", "pytest", "-q", "-n", "0"]
    collected = run([*pytest, "--collect-only", "-m", ""], unpacked).splitlines()[-1]
    passed = run([*pytest, *SOME_TESTS], unpacked).splitlines()[-1]
    return f"{python}, the tests of the sdist: {collected.strip('= ')}; {passed.strip('= ')}"


def new_environment(python: str, folder: Path) -> Path:
    """Make a virtual environment and return its Python."""
    run([python, "-m", "venv", "--without-pip", str(folder)], ROOT)
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def install(environment: Path, requirement: str, folder: Path) -> None:
    options = ["--no-compile", "--no-index", "--find-links", str(folder / "wheels")]
    pip(environment, "install", *options, requirement)


def pip(environment: Path, *arguments: str) -> None:
    run([sys.executable, "-m", "pip", "--quiet", "--python", str(environment), *arguments], ROOT)


def run(command: list[str], folder: Path) -> str:
    """Run a command, and return its output. If it fails, end this program and show the output."""
    done = subprocess.run(
        command,
        cwd=folder,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"failed: {' '.join(command)}\n{done.stdout}")
    return done.stdout


if __name__ == "__main__":
    main()
