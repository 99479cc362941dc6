"""The command line: the commands, their options and their help."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias, cast

import click

from .. import ClientTLS, __version__
from .._text import printable
from . import actions
from .check import Options
from .roles import Roles
from .url_list import parse_all
from .urls import SCHEMES, Target, check_host, parse

Action: TypeAlias = Callable[[], int]


# Callbacks for click. Each converts an argument as typed into the value that the command needs. Its
# errors name the option, and quote what was typed.


def _target(ctx: click.Context, param: click.Parameter, url: str) -> Target:
    try:
        return parse(url)
    except ValueError as exc:
        raise click.BadParameter(str(exc), ctx, param) from None


def _targets(
    ctx: click.Context, param: click.Parameter, urls: tuple[str, ...]
) -> tuple[Target, ...]:
    if ctx.resilient_parsing:  # for a shell's completion, which must not read standard input
        return ()
    try:
        return parse_all(urls, sys.stdin)
    except ValueError as exc:
        raise click.BadParameter(str(exc), ctx, param) from None


def _positive(ctx: click.Context, param: click.Parameter, seconds: float) -> float:
    if not seconds > 0:  # this also rejects NaN
        raise click.BadParameter(f"{seconds:g} is not a number of seconds above 0", ctx, param)
    return seconds


def _name(ctx: click.Context, param: click.Parameter, name: str | None) -> str | None:
    try:
        if name is not None:
            check_host(name, tls=True)
    except ValueError as exc:
        raise click.BadParameter(str(exc), ctx, param) from None
    return name


def _authorities(ctx: click.Context, param: click.Parameter, path: Path | None) -> bytes | None:
    """Read the certificates of a file. Returns them in PEM."""
    if path is None:
        return None
    shown = printable(str(path))
    try:
        return cast("bytes", ClientTLS(ca=path).ca)
    except OSError as exc:
        raise click.BadParameter(f"'{shown}' cannot be read: {exc.strerror}", ctx, param) from None
    except ValueError as exc:
        text = str(exc).removeprefix("ca ")  # the name of the argument
        raise click.BadParameter(f"'{shown}' {text}", ctx, param) from None


_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)

_CA = click.option(
    "--ca",
    type=_FILE,
    callback=_authorities,
    help="Trust only the certificates in this PEM file.",
)
_NAME = click.option(
    "--name", callback=_name, metavar="NAME", help="Verify this name instead of the URL's host."
)


def _protocols() -> str:
    starttls = sorted(name for name, scheme in SCHEMES.items() if scheme.protocol)
    implicit = sorted(name for name, each in SCHEMES.items() if each.tls and not each.protocol)
    return (
        f"A URL is SCHEME://HOST[:PORT]. With STARTTLS: {', '.join(starttls)}. "
        f"TLS from the start: {', '.join(implicit)} (tls needs a port)."
    )


@click.group(
    "trisock",
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Try:  trisock check imap://mail.example.org https://example.org",
)
@click.version_option(__version__, prog_name="trisock", message="%(prog)s %(version)s")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Check the TLS of servers, and talk to servers, with or without STARTTLS.

    "trisock COMMAND --help" tells more about a command.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


@cli.command(
    short_help="Check the certificates and the TLS of servers.",
    epilog=f"""{_protocols()}

\b
Exit status, the worst of all URLs:
  0  good
  1  a certificate expires soon (--warn-days)
  2  a client would refuse the server, or cannot reach it
  3  wrong usage

\b
Examples:
  trisock check imap://mail.example.org imaps://mail.example.org
  trisock check --ca ca.pem --name mail.example.org smtp://10.0.0.5:25
  trisock check --json - < urls | jq '.[] | select(.status > 0)'
""",
)
@click.argument("urls", metavar="URL...", nargs=-1, required=True, callback=_targets)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list of objects.")
@click.option(
    "--warn-days",
    type=click.IntRange(min=0),
    default=14,
    show_default=True,
    metavar="DAYS",
    help="Warn if a certificate has fewer days left.",
)
@_CA
@_NAME
@click.option(
    "--timeout",
    type=float,
    callback=_positive,
    metavar="SECONDS",
    default=10.0,
    show_default=True,
    help="The limit for each URL, from the name look-up to the end of the connection.",
)
@click.option(
    "--parallel",
    type=click.IntRange(min=1),
    default=20,
    show_default=True,
    metavar="NUMBER",
    help="How many URLs to check at once.",
)
@click.option(
    "--injection",
    is_flag=True,
    help="Also test whether an attacker can inject commands along with STARTTLS.",
)
def check(
    urls: tuple[Target, ...],
    as_json: bool,
    warn_days: int,
    ca: bytes | None,
    name: str | None,
    timeout: float,
    parallel: int,
    injection: bool,
) -> Action:
    """Check servers: TLS, and the names, chain and expiry of their certificates.

    The URL "-" reads URLs from standard input, one on each line. Comments begin with "#".
    """
    options = Options(Roles(ca, name), timeout, warn_days, injection)
    return functools.partial(actions.check, urls, options, parallel=parallel, as_json=as_json)


@cli.command(
    short_help="Talk to a server.",
    epilog=f"""{_protocols()} In plain text: tcp://HOST:PORT and unix:PATH.

\b
Examples:
  trisock connect imap://mail.example.org
  printf 'GET / HTTP/1.0\\r\\n\\r\\n' | trisock connect https://example.org
""",
)
@click.argument("url", metavar="URL", callback=_target)
@_CA
@_NAME
@click.option("--proxy-protocol", is_flag=True, help="Send a PROXY header first (version 1).")
@click.option("--lf", is_flag=True, help="End the lines that you type with LF, not with CRLF.")
def connect(
    url: Target, ca: bytes | None, name: str | None, proxy_protocol: bool, lf: bool
) -> Action:
    """Talk to a server: what you type is sent, and what it sends is shown.

    Input from a pipe is sent as it is. After the end of the input, the output continues until the
    server ends the connection.
    """
    for option, given in (("--ca", ca), ("--name", name)):
        if given and not url.scheme.tls:
            raise click.UsageError(f"{option} is for TLS, which '{url.url}' does not use")
    roles = Roles(ca, name)
    return functools.partial(actions.connect, url, roles, proxy_protocol=proxy_protocol, keep_lf=lf)


@cli.command()
def demo() -> Action:
    """Show a conversation over loopback that upgrades to TLS."""
    return actions.demo
