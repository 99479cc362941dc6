"""The project's checks and tools: ``nox -l`` lists them, ``nox -s NAME`` runs one of them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import nox

PYTHONS = ["3.10", "3.11", "3.12", "3.13", "3.14"]

nox.options.sessions = ["tests", "lint", "examples"]
nox.options.error_on_missing_interpreters = False
nox.needs_version = ">= 2024.10.9"

PROJECT = nox.project.load_toml("pyproject.toml")

if shutil.which("pyenv"):
    # By default, pyenv makes only one version available.
    installed = subprocess.run(
        ["pyenv", "versions", "--bare"], capture_output=True, text=True, check=True
    ).stdout.split()
    newest = {".".join(each.split(".")[:2]): each for each in installed if each[0].isdigit()}
    os.environ["PYENV_VERSION"] = ":".join(newest[each] for each in PYTHONS if each in newest)

# The coverage session skips campaigns (docs/reliability.md) and tests that run whole programs.
NOT_FOR_COVERAGE = [
    "tests/campaigns/test_cancel*.py",
    "tests/campaigns/test_datagram_flow.py",
    "tests/campaigns/test_hostile_network.py",
    "tests/campaigns/test_fuzz_addresses.py",
    "tests/campaigns/test_fuzz_lines.py",
    "tests/campaigns/test_fuzz_pem.py",
    "tests/campaigns/test_fuzz_proxy_headers.py",
    "tests/campaigns/test_fuzz_tls.py",
    "tests/campaigns/test_load.py",
    "tests/campaigns/test_restarts.py",
    "tests/campaigns/test_starttls_conversations.py",
    "tests/interop/test_haproxy.py",
    "tests/interop/test_haproxy_fuzz.py",
    "tests/interop/test_nginx_proxy.py",
    "tests/interop/test_starttls_clients.py",
    "tests/interop/test_starttls_dialogues.py",
    "tests/interop/test_tls_attackers.py",
    "tests/interop/test_tls_peers.py",
    "tests/interop/test_tls_scanners.py",
    "tests/project/test_benchmarks.py",
    "tests/project/test_*example*.py",
    "tests/project/test_recipes_*.py",
]

# The tests that need nothing of Unix. The others use Unix sockets, forks, signals or /proc.
SMOKE = [
    "tests/command/test_explain.py",
    "tests/command/test_urls.py",
    "tests/hammerspoon/test_hammerspoon_reads_and_writes.py",
    "tests/net/test_buffer.py",
    "tests/net/test_frames.py",
    "tests/net/test_idle.py",
    "tests/net/test_lines.py",
    "tests/net/test_protocol_reads.py",
    "tests/net/test_send_checkpoints.py",
    "tests/net/test_socket.py",
    "tests/net/test_streams.py",
    "tests/pluto/test_pluto_sockets.py",
    "tests/starttls/test_handshakes.py",
    "tests/starttls/test_starttls.py",
    "tests/testing/test_serving.py",
    "tests/testing/test_socket_pair.py",
    "tests/tls/test_client_hello.py",
    "tests/tls/test_engine.py",
    "tests/tls/test_pem.py",
    "tests/tls/test_records.py",
]

# mypy checks the snippets of the documentation.
SNIPPETS = "tests/project/test_page_snippets.py"

INSTALLED = [each for each in PYTHONS if shutil.which(f"python{each}")]


def lowest_trio() -> str:
    """Return the lowest Trio that pyproject.toml allows."""
    for requirement in PROJECT["project"]["dependencies"]:
        if match := re.fullmatch(r"trio\s*>=\s*([\d.]+)", requirement):
            return match[1]
    raise LookupError("pyproject.toml has no lowest Trio version")


@nox.session
def tests(session: nox.Session) -> None:
    """The tests, on the Python that runs nox, with the newest Trio."""
    session.install(".[tests]")
    session.run("python", "-m", "pytest", *session.posargs)


@nox.session
def smoke(session: nox.Session) -> None:
    """A selection of the tests that should pass on macOS and Windows too."""
    session.install(".[tests]")
    session.run("python", "-m", "pytest", "-k", "not unix", *SMOKE, *session.posargs)


@nox.session(python=PYTHONS)
@nox.parametrize("trio", ["lowest", "newest"])
def versions(session: nox.Session, trio: str) -> None:
    """The tests, on each installed Python, with the lowest and the newest Trio."""
    session.install(".[tests]")
    session.install(f"trio=={lowest_trio()}.*" if trio == "lowest" else "trio", "--upgrade")
    session.run("python", "-m", "pytest", *session.posargs)


@nox.session(python=INSTALLED[-1] if INSTALLED else None)
def coverage(session: nox.Session) -> None:
    """The tests on the newest installed Python, with coverage: 100 % of lines and branches.

    It skips campaigns and tests of whole programs: dedicated tests must cover each line.
    """
    session.install("-e", ".[tests]")
    session.run("coverage", "erase")
    ignored = [f"--ignore-glob={each}" for each in NOT_FOR_COVERAGE]
    ignored.append(
        "--deselect=tests/campaigns/test_tls_matrix.py::test_every_combination_gives_the_expected_result"
    )
    session.run("coverage", "run", "-m", "pytest", "tests", *ignored, *session.posargs)
    session.run("coverage", "combine", "--quiet")
    session.run("coverage", "report")


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff, mypy (also for snippets in the docs), pyright, and schemas of configuration files."""
    session.install(
        "-e", ".[tests]", "nox", *nox.project.dependency_groups(PROJECT, "lint", "bench")
    )
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("mypy")
    for platform in ("darwin", "win32"):
        session.run("mypy", "--platform", platform, "src")
    session.run("pyright")
    session.run("python", "-m", "pytest", "-n", "0", "-k", "type_check", SNIPPETS)
    github = Path(".github")
    forms = [path for path in github.glob("ISSUE_TEMPLATE/*.yml") if path.stem != "config"]
    for schema, files in [
        ("github-workflows", [*github.glob("workflows/*.yml")]),
        ("github-issue-forms", forms),
        ("github-issue-config", [github / "ISSUE_TEMPLATE/config.yml"]),
        ("readthedocs", [Path(".readthedocs.yaml")]),
    ]:
        session.run("check-jsonschema", f"--builtin-schema=vendor.{schema}", *map(str, files))


@nox.session
def examples(session: nox.Session) -> None:
    """Each example and recipe, against real peers."""
    session.install(".[tests]")
    folder = Path("tests/project")
    files = [*folder.glob("test_*example*.py"), *folder.glob("test_recipes_*.py")]
    session.run(
        "python",
        "-m",
        "pytest",
        *map(str, sorted(files)),
        *session.posargs,
    )


@nox.session
def interop(session: nox.Session) -> None:
    """Real programs as peers, including third-party servers. A missing program is a failure."""
    session.install(".[tests]", *nox.project.dependency_groups(PROJECT, "interop"))
    session.run(
        "python",
        "-m",
        "pytest",
        "-n",
        "0",  # a scanner and third-party servers need the machine to themselves
        "-m",
        "",
        "--all-programs",
        "tests/interop",
        *session.posargs,
    )


@nox.session
def campaigns(session: nox.Session) -> None:
    """Fuzzing, cancellation at every step, a hostile network, load: the small run of each."""
    session.install(".[tests]")
    session.run("python", "-m", "pytest", "tests/campaigns", *session.posargs)


@nox.session
def chance(session: nox.Session) -> None:
    """The randomized tests with 20 times as many rounds, and all cases of cancellation."""
    session.install(".[tests]")
    options = ["-n", "0", "-m", "chance or rare", "--times", "20", "--capture=no", "tests"]
    session.run("python", "-m", "pytest", *options, *session.posargs)


@nox.session
def load(session: nox.Session) -> None:
    """10,000 connections, 1,000 a second, and exhausted servers (shorter: ``-- --quick``)."""
    session.install(".[tests]")
    session.run("python", "tests/campaigns/load.py", *session.posargs)


@nox.session
def restarts(session: nox.Session) -> None:
    """20 restarts of a server under load, in three ways, lose no request (``-- --quick``)."""
    session.install(".[tests]")
    session.run("python", "tests/campaigns/restarts.py", *session.posargs)


@nox.session
def datagrams(session: nox.Session) -> None:
    """A million datagrams over loopback: none is lost, changed or mixed up."""
    session.install(".[tests]")
    session.run("python", "tests/campaigns/datagrams.py", *session.posargs)


@nox.session
def soak(session: nox.Session) -> None:
    """An hour of mixed work that must not leak anything (shorter: ``-- --minutes 1``)."""
    session.install(".[tests]")
    session.run("python", "-X", "dev", "-W", "error", "tests/campaigns/soak.py", *session.posargs)


@nox.session
def demo(session: nox.Session) -> None:
    """The demo, as in the README."""
    session.install(".[demo]")
    session.run("python", "-m", "trisock", "demo")


@nox.session
def docs(session: nox.Session) -> None:
    """The docs, as HTML in docs/_build."""
    session.install("-e", ".[gunicorn]", *nox.project.dependency_groups(PROJECT, "docs"))
    shutil.rmtree(Path("docs/_build"), ignore_errors=True)
    session.run("sphinx-build", "-W", "--keep-going", "docs", "docs/_build")


@nox.session
def build(session: nox.Session) -> None:
    """The wheel and the sdist in dist/, and checks of both, on each installed Python."""
    session.install("build", "twine")
    shutil.rmtree("dist", ignore_errors=True)
    session.run("python", "-m", "build")
    session.run("twine", "check", "--strict", *map(str, Path("dist").iterdir()))
    pythons = [f"python{each}" for each in INSTALLED]
    session.run("python", "tests/distribution/check.py", *pythons)


@nox.session
def bench(session: nox.Session) -> None:
    """The benchmarks (docs/benchmarks.md). Shorter: ``nox -s bench -- --quick``."""
    session.install(".", *nox.project.dependency_groups(PROJECT, "bench"))
    session.run("python", "-m", "benchmarks", *session.posargs)
