"""docs/command.md: every scheme, option and key of the command."""

from __future__ import annotations

import dataclasses
import re

from helpers.documents import ROOT
from trisock._command.arguments import cli
from trisock._command.certificate import CertificateFacts
from trisock._command.check import Result
from trisock._command.report import to_json
from trisock._command.urls import SCHEMES

PAGE = (ROOT / "docs/command.md").read_text()


def test_the_page_has_every_scheme_with_its_port() -> None:
    row = "\n".join(line for line in PAGE.splitlines() if line.startswith(("| STARTTLS", "| TLS")))
    found: dict[str, int] = {}
    for names, port in re.findall(r"((?:`[a-z0-9-]+`(?: and )?)+) (\d+)", row):
        found.update({name: int(port) for name in re.findall(r"`([^`]+)`", names)})
    assert found == {name: each.port for name, each in SCHEMES.items() if each.port}


def test_the_page_has_every_option() -> None:
    for command in cli.commands.values():
        for option in command.params:
            for name in option.opts:
                assert f"`{name}" in PAGE or not name.startswith("--"), name


def test_the_page_has_every_key() -> None:
    values = dict.fromkeys((field.name for field in dataclasses.fields(Result)), None)
    result = Result(**{**values, "certificate": CertificateFacts()})  # type: ignore[arg-type]
    for key in re.findall(r'"(\w+)":', to_json([result])):
        assert f"`{key}`" in PAGE.partition("objects of `--json`")[2]
