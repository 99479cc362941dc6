"""Helpers for tests of programs that use trisock. Import them: there is no pytest plugin.

::

    from trisock.testing import Script, serving, socket_pair

    async def test_echo() -> None:
        async with serving(echo) as s:  # raises what the handler raised
            client = await s.connect()
            await client.send(b"hello\\n")
            assert await client.recv_line() == b"hello"

``Authority`` and TLS pairs need trustme: ``pip install 'trisock[testing]'``. Without trustme they
raise ``ImportError``, and everything else works.

Nothing here uses a host name, a file or another process, and only ``check_handler`` uses a thread.
So tests can use Trio's ``autojump_clock``.
"""

from ._authority import Authority
from ._check_handler import check_handler
from ._faults import FaultyRelay, faults
from ._script import Script
from ._serving import serving
from ._socket_pair import socket_pair

__all__ = [
    "Authority",
    "FaultyRelay",
    "Script",
    "check_handler",
    "faults",
    "serving",
    "socket_pair",
]
