"""INN's nnrpd (NNTP), and C-Kermit's iksd (Telnet)."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator

from helpers.real_servers import RealServer, _identity, prepared, started
from trisock.testing import Authority

# ---- nnrpd ----

INN = """
mta: "/bin/false"
domain: example.org
hismethod: hisv6
ovmethod: tradindexed
pathhost: localhost
pathnews: /usr/lib/news
readerswhenstopped: true
nnrpdloadlimit: 0
patharticles: {directory}
pathdb: {directory}
pathetc: {directory}
pathoverview: {directory}
pathrun: {directory}
pathspool: {directory}
pathtmp: {directory}
"""

INN_TLS = """
tlscafile: {directory}/ca.pem
tlscertfile: {directory}/server.pem
tlskeyfile: {directory}/server.key
"""

READERS = """
auth all { hosts: "*" default: "reader" }
access all { users: "*" newsgroups: "*" access: "R" }
"""


@contextlib.contextmanager
def nnrpd(authority: Authority, *, tls: bool = True) -> Iterator[RealServer]:
    """Start nnrpd, INN's server for news readers, with or without STARTTLS. It has no articles."""
    with prepared(authority, "nntp", user="news") as (directory, ports):
        shutil.chown(directory, "news")
        with_tls = INN_TLS.format(directory=directory) if tls else ""
        (directory / "inn.conf").write_text(INN.format(directory=directory) + with_tls)
        (directory / "readers.conf").write_text(READERS)
        for name, content in {
            "active": "local.test 0000000000 0000000001 y\n",
            "active.times": "",
            "newsgroups": "",
            "history": "",
            "storage.conf": "method tradspool {\n newsgroups: *\n class: 0\n}\n",
        }.items():
            (directory / name).write_text(content)
        environment = {**os.environ, "INNCONF": f"{directory}/inn.conf"}
        overchan = "/usr/lib/news/bin/overchan"  # creates an empty index, which nnrpd needs
        subprocess.run(
            [overchan], check=True, env=environment, stdin=subprocess.DEVNULL, **_identity("news")
        )
        command = ["/usr/lib/news/bin/nnrpd", "-D", "-f", "-4", "127.0.0.1"]
        command += ["-p", str(ports["nntp"])]
        with started(command, directory, ports, user="news", env=environment) as server:
            yield server


# ---- iksd ----

IKSD = """
set authentication tls rsa-cert-file {directory}/server.pem
set authentication tls rsa-key-file {directory}/server.key
"""

IKSD_WITHOUT_TLS = """
set telopt start-tls refused
"""


@contextlib.contextmanager
def iksd(authority: Authority, *, tls: bool = True) -> Iterator[RealServer]:
    """Start iksd, C-Kermit as a Telnet server, with or without the option START_TLS.

    iksd serves one connection on its standard input, so ``systemd-socket-activate`` listens for it.
    iksd reads only /etc/kermit/iksd.conf, so a private mount replaces this file.
    """
    with prepared(authority, "telnet", rsa=True) as (directory, ports):
        configuration = directory / "iksd.conf"
        configuration.write_text(IKSD.format(directory=directory) if tls else IKSD_WITHOUT_TLS)
        listen = f"systemd-socket-activate -l 127.0.0.1:{ports['telnet']} --inetd --accept"
        mount = f"mount --bind {configuration} /etc/kermit/iksd.conf"
        command = ["unshare", "--mount", "sh", "-c", f"{mount} && exec {listen} iksd -A"]
        with started(command, directory, ports) as server:
            yield server
