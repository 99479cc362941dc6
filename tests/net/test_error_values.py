"""trisock's errors show how many bytes were read, but never the bytes. Errors can be copied."""

from __future__ import annotations

import copy
import logging
import pickle
import traceback
from collections.abc import Callable

import pytest

from helpers.pairs import closing, unix_pair
from trisock import IncompleteReadError, LimitExceededError, Socket

SECRET = b"PASS hunter2"


async def error_of(read: str) -> IncompleteReadError:
    a, b = unix_pair()
    async with closing(a, b):
        for part in (b"PA", b"SS hun", b"ter2"):
            await b.send(part)
        await b.send_eof()
        a.unrecv(await a.recv_exactly(5))
        with pytest.raises(IncompleteReadError) as caught:
            await (a.recv_exactly(100) if read == "recv_exactly" else anext(a.lines()))
        assert await a.recv_exactly(len(SECRET)) == SECRET  # the bytes are still unread
        return caught.value


async def error_of_skip() -> IncompleteReadError:
    """Return an error whose message and ``at_boundary`` do not follow from ``partial``."""
    a, b = unix_pair()
    async with closing(a, b):
        await b.send(SECRET)
        await b.send_eof()
        with pytest.raises(IncompleteReadError) as caught:
            await a.skip_until(b"\n")
        return caught.value


@pytest.mark.parametrize("read", ["recv_exactly", "lines"])
async def test_no_representation_of_an_error_shows_the_bytes(read: str) -> None:
    error = await error_of(read)
    record = logging.LogRecord(
        "x", 40, "x", 1, "%r %s %s", (error, error, error.args), (type(error), error, None)
    )
    for shown in (
        str(error),
        repr(error),
        f"{error.args}",
        "".join(traceback.format_exception(error)),
        logging.Formatter().format(record),
    ):
        assert "hunter2" not in shown
        assert "12 bytes" in shown
    assert error.partial == SECRET
    assert error.expected == (100 if read == "recv_exactly" else None)


COPIES: list[Callable[[BaseException], BaseException]] = [
    copy.copy,
    copy.deepcopy,
    lambda error: pickle.loads(pickle.dumps(error)),
    lambda error: copy.copy(pickle.loads(pickle.dumps(copy.deepcopy(error)))),
]


@pytest.mark.parametrize("copied", COPIES, ids=["copy", "deepcopy", "pickle", "all of them"])
async def test_a_copied_or_pickled_error_equals_the_original(
    copied: Callable[[BaseException], BaseException],
) -> None:
    for error in (await error_of("lines"), IncompleteReadError(SECRET, 100)):
        error.__dict__["note"] = "kept"
        twin = copied(error)
        assert isinstance(twin, IncompleteReadError)
        assert type(twin.partial) is bytes
        assert (twin.partial, twin.expected) == (error.partial, error.expected)
        assert twin.at_boundary is error.at_boundary is False
        assert (str(twin), repr(twin), twin.__dict__["note"]) == (str(error), repr(error), "kept")
    skipped = await error_of_skip()
    twin = copied(skipped)
    assert isinstance(twin, IncompleteReadError)
    assert (twin.partial, twin.expected, twin.at_boundary) == (b"", None, False)
    assert str(twin) == str(skipped)
    assert "ended after 12 bytes, before the delimiter arrived" in str(twin)
    twin = copied(LimitExceededError(9))
    assert isinstance(twin, LimitExceededError)
    assert (twin.limit, twin.frame_length) == (9, None)
    assert str(twin) == "no delimiter within 9 bytes"
    assert repr(twin) == "LimitExceededError('no delimiter within 9 bytes')"


@pytest.mark.parametrize("family", ["unix"])
async def test_the_partial_bytes_of_an_error_never_change(a: Socket, b: Socket) -> None:
    a.unrecv(SECRET)
    await b.send_eof()
    with pytest.raises(IncompleteReadError) as caught:
        await a.recv_exactly(100)
    await a.recv_exactly(5)
    a.unrecv(b"other")
    assert caught.value.partial == SECRET
    assert caught.value.partial is caught.value.partial
