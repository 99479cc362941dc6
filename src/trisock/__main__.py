"""The command line: ``python -m trisock demo``."""

from __future__ import annotations

import argparse
import sys

import trio

from . import Certificate, ClientTLS, Server, Socket, bind, connect

_NAME = "mail.example.org"


async def demo() -> None:
    """Print a conversation over loopback that starts in plain text and upgrades to TLS."""
    import trustme  # installed by `pip install trisock[demo]`

    authority = trustme.CA()
    issued = authority.issue_cert(_NAME)
    certificate = Certificate(issued.cert_chain_pems[0].bytes(), issued.private_key_pem.bytes())

    async def serve(sock: Socket) -> None:
        await _say(sock, "server", "220 ready")
        while (command := await sock.recv_line(delimiter=b"\r\n")) != b"QUIT":
            if command == b"STARTTLS":
                await _say(sock, "server", "220 go ahead")
                await sock.starttls([certificate])
            else:
                await _say(sock, "server", f"250 you said {command.decode()!r}")
        await _say(sock, "server", "221 bye")

    async def talk(server: Server) -> None:
        async with await connect("127.0.0.1", server.port) as sock:
            lines = sock.lines(delimiter=b"\r\n")
            await lines.__anext__()
            for command in ("HELLO", "STARTTLS", "HELLO", "QUIT"):
                await _say(sock, "client", command)
                await lines.__anext__()
                if command == "STARTTLS":
                    tls = await sock.starttls(ClientTLS(_NAME, ca=authority.cert_pem.bytes()))
                    print(f"        -- both sides upgrade to {tls.version}, {tls.cipher};")
                    print(f"        -- the client has verified {tls.server_hostname}")

    async with trio.open_nursery() as nursery:
        server = await bind(nursery, 0, serve, host="127.0.0.1")
        print(f"        -- a server listens on {server.addresses[0]}")
        await talk(server)
        server.stop()
        await server.wait_closed()
        print(
            f"        -- the server has served {server.stats().accepted} connection and is closed"
        )


async def _say(sock: Socket, who: str, text: str) -> None:
    how = sock.tls.cipher if sock.tls else "plain text"
    print(f"{who}: {text:<24} ({how})")
    await sock.send(text.encode(), b"\r\n")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m trisock", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("demo", help="a conversation over loopback that upgrades to TLS")
    parser.parse_args(arguments)
    try:
        trio.run(demo)
    except ModuleNotFoundError as exc:
        print(f"the demo needs {exc.name}: pip install 'trisock[demo]'", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
