"""``trisock check`` with several URLs: how many at once, the order, and Ctrl-C between them."""

from __future__ import annotations

import json
import signal
from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing

from helpers.command import Command
from trisock._command.certificate import CertificateFacts
from trisock._command.check import Options, Result
from trisock._command.urls import Target

Check = Callable[[Target, Options], Awaitable[Result]]
UseCheck = Callable[[Check], None]


@pytest.fixture
def use_check(monkeypatch: pytest.MonkeyPatch) -> UseCheck:
    """Replace the check of one URL."""

    def use(check: Check) -> None:
        monkeypatch.setattr("trisock._command.check_all.check", check)

    return use


def good(target: Target) -> Result:
    nothing = CertificateFacts()
    return Result(target.url, 0, None, True, None, None, None, nothing, None, None)


@pytest.mark.parametrize(("parallel", "expected"), [(1, 1), (7, 7), (50, 20)])
def test_parallel_limits_how_many_checks_run_at_once(
    parallel: int, expected: int, command: Command, use_check: UseCheck
) -> None:
    active = most = 0

    async def counted(target: Target, options: Options) -> Result:
        nonlocal active, most
        active += 1
        most = max(most, active)
        await trio.testing.wait_all_tasks_blocked()
        active -= 1
        return good(target)

    use_check(counted)
    done = command("check", "--parallel", parallel, *["tls://host:1"] * 20)
    assert (done.status, most) == (0, expected)


URLS = ("tls://first:1", "tls://silent:1", "tls://third:1", "tls://interrupts:1", "tls://last:1")


@pytest.fixture
def interrupted(use_check: UseCheck) -> None:
    """Ctrl-C arrives while one check waits for a silent server, and later checks have finished."""

    async def check(target: Target, options: Options) -> Result:
        if target.host in ("silent", "interrupts"):
            if target.host == "interrupts":
                await trio.testing.wait_all_tasks_blocked()
                signal.raise_signal(signal.SIGINT)
            await trio.sleep_forever()
        return good(target)

    use_check(check)


def test_ctrl_c_also_shows_the_results_after_a_silent_server(
    command: Command, interrupted: None
) -> None:
    done = command("check", *URLS)
    assert (done.status, done.err) == (130, "interrupted: 3 of 5 checked\n")
    shown = [line.partition(": ")[0] for line in done.out.splitlines()]
    assert shown == ["OK tls://first:1", "OK tls://third:1", "OK tls://last:1"]


def test_ctrl_c_leaves_a_valid_list_in_json(command: Command, interrupted: None) -> None:
    done = command("check", "--json", *URLS)
    assert (done.status, done.err) == (130, "interrupted: 3 of 5 checked\n")
    assert [each["url"] for each in json.loads(done.out)] == [URLS[0], URLS[2], URLS[4]]


def test_ctrl_c_before_the_first_result_leaves_an_empty_list(
    command: Command, interrupted: None
) -> None:
    done = command("check", "--json", "tls://interrupts:1")
    assert (done.status, done.out) == (130, "[]\n")
    assert done.err == "interrupted: 0 of 1 checked\n"
