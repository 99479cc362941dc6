"""Blocking calls of trisock.pluto, interrupted at each moment: no hang, no loss."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

from helpers.deadline import DEADLINE

# A result that is on the caller's stack is lost to a signal there: CPython 3.10 looks for signals
# when a call has returned, later ones do not.
lossless = pytest.mark.skipif(
    sys.version_info < (3, 11), reason="a signal on the caller's stack loses the result"
)

PRELUDE = """
import os, random, signal, socket as stdlib, sys, threading, time
import trio
from trisock.pluto import socket

class Alarm(BaseException):
    pass

def interrupt(*_):
    raise Alarm

def arm(most=0.0015):
    signal.setitimer(signal.ITIMER_REAL, random.uniform(0.00002, most))

def disarm():
    signal.setitimer(signal.ITIMER_REAL, 0)

def peer_of():
    with stdlib.create_server(("127.0.0.1", 0)) as listening:
        client = socket.connect("127.0.0.1", listening.getsockname()[1])
        raw, _ = listening.accept()
    raw.setsockopt(stdlib.IPPROTO_TCP, stdlib.TCP_NODELAY, 1)
    return client, raw

def background_threads():
    return [each for each in threading.enumerate() if each.name == "trisock"]

random.seed(7)
# CPython drops what a signal handler raises in the callback of a weak reference, and says so.
sys.unraisablehook = lambda unraisable: None
signal.signal(signal.SIGALRM, interrupt)
"""


def program(text: str, timeout: float = DEADLINE) -> str:
    """Run a program in a process of its own; a hang is a failure."""
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(text)],
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@lossless
def test_interrupted_recv_and_peek_lose_no_byte() -> None:
    out = program(
        """
        client, raw = peer_of()
        sent = bytes(random.randrange(256) for _ in range(100_000))
        def feed():
            for at in range(0, len(sent), 50):
                raw.sendall(sent[at : at + 50])
                time.sleep(0.0005)
        feeding = threading.Thread(target=feed, daemon=True)
        feeding.start()
        got, interrupts = bytearray(), 0
        def receive():
            while len(got) < len(sent):
                arm(0.0003 if interrupts % 2 else 0.0015)
                if interrupts % 3 == 2:
                    client.peek()
                got.extend(client.recv())
            disarm()
        while True:
            try:
                receive()
                break
            except Alarm:
                interrupts += 1
        print(got == sent, interrupts > 500)
        """,
        timeout=40,
    )
    assert out == "True True\n"


@pytest.mark.parametrize("call", ["client.recv()", "listening.accept()", "unanswered()"])
def test_a_call_that_would_wait_for_ever_ends_by_each_interrupt(call: str) -> None:
    out = program(
        f"""
        client, raw = peer_of()
        listening = socket.listen(0)
        full = stdlib.create_server(("127.0.0.1", 0), backlog=0)
        others = []
        for _ in range(3):
            others.append(stdlib.socket())
            others[-1].setblocking(False)
            others[-1].connect_ex(full.getsockname())
        time.sleep(0.1)
        def unanswered():
            socket.connect(*full.getsockname())
        longest = 0
        for number in range(2000):
            try:
                began = time.monotonic()
                arm(0.0003 if number % 2 else 0.0015)
                {call}
            except Alarm:
                longest = max(longest, time.monotonic() - began)
        print(longest < 1)
        assert client.send("x") and raw.recv(1) == b"x"
        raw.sendall(b"y")
        assert client.recv() == b"y"
        other = stdlib.create_connection(("127.0.0.1", listening.port))
        assert listening.accept().getpeer() == other.getsockname()
        """
    )
    assert out == "True\n"


def test_interrupted_send_connect_close_and_starttls_leave_the_next_call_working() -> None:
    out = program(
        """
        host = stdlib.create_server(("127.0.0.1", 0), backlog=128)
        taken = []
        def accept():
            while True:
                taken.append(host.accept()[0])
                if len(taken) > 50:
                    taken.pop(0).close()
        threading.Thread(target=accept, daemon=True).start()
        interrupts = 0
        while interrupts < 600:
            client = None
            try:
                arm()
                client = socket.connect(*host.getsockname())
                client.send(bytes(1000))
                client.send(bytes(3_000_000))
                client.close()
                disarm()
            except Alarm:
                interrupts += 1
            try:
                arm()
                client = client or socket.connect(*host.getsockname())
                client.starttls("localhost")
                disarm()
            except Alarm:
                interrupts += 1
            try:
                arm()
                if client is not None:
                    client.close()
                disarm()
            except Alarm:
                interrupts += 1
            if client is not None:
                client.close()
                assert not client.isopen() and client.recv() is None
        client = socket.connect(*host.getsockname())
        assert client.send("x")
        del client
        print(len(background_threads()))
        """,
        timeout=60,
    )
    assert out == "1\n"


@lossless
def test_interrupted_accept_loses_no_client() -> None:
    out = program(
        """
        listening = socket.listen(0)
        addresses = []
        def come():
            for _ in range(300):
                with stdlib.create_connection(("127.0.0.1", listening.port)) as raw:
                    addresses.append(raw.getsockname())
                    raw.recv(1)
        threading.Thread(target=come, daemon=True).start()
        served, interrupts = [], 0
        def serve():
            while len(served) < 300:
                disarm()
                for each in served[-1:]:
                    each.close()
                arm(0.0005)
                if interrupts % 2:
                    listening.hasconnection()
                served.append(listening.accept())
            disarm()
        while True:
            try:
                serve()
                break
            except Alarm:
                interrupts += 1
        print([each.getpeer() for each in served] == addresses, interrupts > 50)
        """,
        timeout=60,
    )
    assert out == "True True\n"


def test_interrupts_in_stop_and_start_leave_no_thread_behind() -> None:
    out = program(
        """
        from trisock.pluto.blocking import background
        client, raw = peer_of()
        interrupts = 0
        while interrupts < 300:
            try:
                arm(0.0006)
                background.stop()
                client.isopen()
                background.stop()
                disarm()
            except Alarm:
                interrupts += 1
            assert len(background_threads()) <= 3
        client.isopen()
        background.stop()
        for each in background_threads():  # of a stop that was interrupted
            each.join(5)
        assert threading.active_count() == 1, threading.enumerate()
        """
    )
    assert out == ""


# ---- at each line: what a signal does at one moment, a trace function does at all of them ----

INJECT = """
import gc
from trisock.pluto.blocking import background

OURS = os.path.dirname(sys.modules["trisock"].__file__)

class Injected(BaseException):
    pass

def lines_of(call, at, second=None):
    '''Make a call and raise at the at-th line of trisock that this thread comes to.'''
    count = 0
    again = None
    def trace(frame, event, arg):
        nonlocal count, again
        if not frame.f_code.co_filename.startswith(OURS):
            return None
        if event == "line":
            count += 1
            if count == at or (again is not None and count == again):
                if count == at and second is not None:
                    again = at + second
                raise Injected
        return trace
    sys.settrace(trace)
    try:
        return call(), count
    except Injected:
        return None, count
    finally:
        sys.settrace(None)
"""


@pytest.mark.parametrize("second", [None, 1, 2, 3, 4, 5, 6, 7])
@pytest.mark.parametrize("stopped", [False, True])
def test_an_exception_at_any_line_of_recv_loses_no_byte(second: int | None, stopped: bool) -> None:
    out = program(
        INJECT
        + textwrap.dedent(f"""
        client, raw = peer_of()
        interrupted = 0
        for at in range(1, 1000):
            if {stopped}:
                background.stop()
            raw.sendall(b"%d." % at)
            client.peek() if {stopped} and at % 2 else None
            result, count = lines_of(client.recv, at, {second})
            interrupted += result is None
            got = result or b""
            while not got.endswith(b"."):
                got += client.recv()
            assert got == b"%d." % at, (at, got)
            if count < at:
                break
        print(interrupted == at - 1, at > 20)
        background.stop()
        for each in background_threads():  # of a stop that was interrupted
            each.join(5)
        assert threading.active_count() == 1, threading.enumerate()
        """),
        timeout=60,
    )
    assert out == "True True\n"


def test_an_exception_at_any_line_of_close_still_closes() -> None:
    """But for the first lines, which a program cannot tell from those before the call."""
    out = program(
        INJECT
        + textwrap.dedent("""
        opens = []
        for at in range(1, 1000):
            client, raw = peer_of()
            result, count = lines_of(client.close, at, None)
            if count < at:
                break
            opens.append(client.isopen())
            assert opens[-1] or client.send("x") is False
            if not opens[-1]:
                raw.settimeout(20)
                try:
                    assert raw.recv(1) == b""
                except ConnectionResetError:
                    pass
            raw.close()
        first = opens.index(False)
        print(len(opens) > 20, first < 15, opens[first:] == [False] * (len(opens) - first))
        """),
        timeout=60,
    )
    assert out == "True True True\n"


def test_an_exception_at_any_line_of_starttls_leaves_nothing_open() -> None:
    out = program(
        INJECT
        + textwrap.dedent("""
        import ssl, trustme
        authority = trustme.CA()
        issued = authority.issue_cert("localhost", key_type=trustme.KeyType.ECDSA)
        certificate = {
            "chain": b"".join(each.bytes() for each in issued.cert_chain_pems),
            "private_key": issued.private_key_pem.bytes(),
        }
        context = ssl.create_default_context()
        authority.configure_trust(context)

        def handshake(raw):
            try:
                with context.wrap_socket(raw, server_hostname="localhost") as secured:
                    secured.recv(1)
            except OSError:
                pass

        opens = []
        for at in range(1, 1000):
            client, raw = peer_of()
            raw.settimeout(20)
            shaking = threading.Thread(target=handshake, args=(raw,))
            shaking.start()
            result, count = lines_of(lambda: client.starttls([certificate]), at)
            opens.append(client.isopen())
            client.close()
            shaking.join()
            if count < at:
                assert opens.pop() and result is True
                break
        first = opens.index(False)
        print(len(opens) > 20, first < 15, opens[first:] == [False] * (len(opens) - first))
        """),
        timeout=60,
    )
    assert out == "True True True\n"


@pytest.mark.parametrize(
    "call",
    [
        "client.send('x')",
        "client.peek()",
        "client.isopen()",
        "client.unrecv('')",
        "listening.hasconnection()",
        "listening.accept()",
        "socket.connect('127.0.0.1', port)",
        "background.stop()",
        "client.recv()",
    ],
)
def test_an_exception_at_any_line_leaves_the_next_calls_working(call: str) -> None:
    out = program(
        INJECT
        + textwrap.dedent(f"""
        client, raw = peer_of()
        listening = socket.listen(0)
        port = listening.port
        for at in range(1, 1000):
            other = stdlib.create_connection(("127.0.0.1", port))
            raw.sendall(b"y")
            result, count = lines_of(lambda: {call}, at, at % 5 or None)
            if "accept" not in {call!r}:
                result = listening.accept()
            elif result is None:
                result = listening.accept()
            result.close()
            client.unrecv("z")
            while client.peek():
                client.recv()
            other.close()
            if count < at:
                break
        assert at > 3
        assert client.send("x")
        background.stop()
        for each in background_threads():  # of a stop that was interrupted
            each.join(5)
        assert threading.active_count() == 1, threading.enumerate()
        """),
        timeout=60,
    )
    assert out == ""


def test_an_interrupted_starttls_leaves_no_socket_in_plain_text() -> None:
    out = program(
        """
        class Tried(BaseException):
            pass

        import trisock.pluto.blocking as sides
        client, raw = peer_of()
        # The interrupt comes before the call is handed over, at the latest moment.
        hand_over = sides.background.result_of
        def interrupted(call):
            raise Tried
        sides.background.result_of = interrupted
        try:
            client.starttls("localhost")
        except Tried:
            pass
        sides.background.result_of = hand_over
        print(client.isopen(), client.send("PASS hunter2"), client.recv(), client.istls())
        raw.settimeout(20)
        try:
            print(raw.recv(100))
        except ConnectionResetError:
            print("nothing")

        client, raw = peer_of()  # arguments that cannot be used change nothing
        for tls in (1, "no such\\name"):
            try:
                client.starttls(tls)
            except (TypeError, ValueError):
                print(client.isopen(), client.send("still in plain text"))
        client.close()
        """
    )
    assert out.splitlines() == [
        "False False None False",
        "nothing",
        "True True",
        "True True",
    ]
