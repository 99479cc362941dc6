"""Restarts under load lose no request: ``restarts.py`` with fewer requests."""

from __future__ import annotations

import pytest

import restarts
from helpers.cancellation import grid
from restart_ways import WAYS
from trisock.testing import Authority


def is_usual(way: str, tls: bool, stay: bool) -> bool:
    # test_a_hup_replaces_all_workers_and_loses_no_request tests gunicorn in each run.
    return (way, tls, stay) in {("inherited", False, True), ("haproxy", True, True)}


@pytest.mark.needs("haproxy")
@pytest.mark.parametrize(("way", "tls", "stay"), grid(is_usual, WAYS, [False, True], [False, True]))
async def test_restarts_under_load_lose_no_request(
    way: str, tls: bool, stay: bool, authority: Authority
) -> None:
    result = await restarts.run(
        way, authority, tls=tls, stay=stay, requests=300, restarts=2, clients=30
    )
    assert not result.lost
    assert result.answered == 300
    assert min(result.in_flight) > 0
