"""HAProxy in TCP mode: a relay in C with one thread, as the upper limit for all relays."""

from __future__ import annotations

import os
import socket

from .serving import HOST, Options, announce, parse_options

CONFIGURATION = """
global
    nbthread 1
    maxconn 1800
defaults
    mode tcp
    timeout connect 10s
    timeout client 1h
    timeout server 1h
listen relay
    bind fd@{descriptor}
    server upstream {host}:{port}
"""


def main(options: Options) -> None:
    listening = socket.create_server((HOST, 0))
    listening.set_inheritable(True)
    text = CONFIGURATION.format(descriptor=listening.fileno(), host=HOST, port=options.upstream)
    # HAProxy inherits this descriptor, and reads its configuration from the file.
    file = os.memfd_create("haproxy.cfg", flags=0)
    os.write(file, text.encode())
    announce(listening.getsockname()[1])
    os.execvp("haproxy", ["haproxy", "-db", "-f", f"/proc/self/fd/{file}"])


if __name__ == "__main__":
    main(parse_options())
