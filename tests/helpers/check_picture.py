"""Draw the README's picture: a real run of ``trisock check`` on a terminal.

To draw it::

    cd tests; python -m helpers.check_picture ../docs/check.svg

The servers run on this machine, at fixed ports. rich converts the terminal's output to SVG.
"""

from __future__ import annotations

import io
import re
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

from helpers.certificates import CertificateAuthority
from helpers.local_servers import LocalServer, offering, quiet, server_tls, serving
from helpers.pseudo_terminal import WIDTH, on_terminal, trisock

SUBMISSION, IMAPS = 50587, 50993


def draw(target: str) -> None:
    """Run the command against two servers, and write the SVG."""
    authority = CertificateAuthority("Example CA")
    names = ("localhost", "mail.example.org")
    good = server_tls(authority, *names, left=83)
    soon = server_tls(authority, *names, left=5)
    urls = (f"smtp://localhost:{SUBMISSION}", f"imaps://localhost:{IMAPS}")
    with tempfile.TemporaryDirectory() as folder:
        ca = Path(folder, "ca.pem")
        ca.write_bytes(authority.pem)
        with serving(
            offering("smtp", good, port=SUBMISSION),
            LocalServer(quiet, soon, IMAPS),
        ):
            with on_terminal(*trisock("check", "--ca", ca, *urls)) as terminal:
                terminal.wait()
                shown = terminal.shown
    console = Console(width=WIDTH, record=True, file=io.StringIO())
    console.print(Text(f"$ trisock check --ca ca.pem {' '.join(urls)}", "bold"), soft_wrap=False)
    console.print()
    console.print(Text.from_ansi(shown.replace("\r\n", "\n").rstrip("\n")))
    svg = console.export_svg(title="trisock check", unique_id="check")
    # A picture in a README cannot load fonts: remove rich's links to its fonts.
    svg = re.sub(r"\s*@font-face \{.*?\}", "", svg, flags=re.DOTALL)
    Path(target).write_text("\n".join(line.rstrip() for line in svg.splitlines()) + "\n")


if __name__ == "__main__":
    draw(sys.argv[1])
