"""Helpers for tests of programs that use trisock. Ordinary imports: there is no pytest plugin.

::

    from trisock.testing import Script, serving, socket_pair

    async def test_echo() -> None:
        async with serving(echo) as s:  # raises what the handler raised
            client = await s.connect()
            await client.send(b"hello\\n")
            assert await client.recv_line() == b"hello"

``Authority`` and TLS pairs need trustme: ``pip install 'trisock[testing]'``. Without trustme they
raise ``ImportError``, and everything else works.

Nothing here uses a host name, a file, a thread or another process. So tests can use Trio's
``autojump_clock``.
"""

from ._authority import Authority
from ._script import Script
from ._serving import serving
from ._socket_pair import socket_pair

__all__ = ["Authority", "Script", "serving", "socket_pair"]
