"""Interrupting trisock.pluto's blocking calls at any moment causes no hang and loses no data."""

from __future__ import annotations

import sys

import pytest

from helpers.deadline import DEADLINE
from helpers.pluto import raw_peer, run_outside, run_program
from trisock.pluto.blocking import background

# Python 3.10 can run a signal handler after a call returns and before the result is stored, so an
# exception from the handler discards the result.
lossless = pytest.mark.skipif(
    sys.version_info < (3, 11), reason="a signal handler can run before the result is stored"
)

PRELUDE = """
import os, random, select, signal, socket as stdlib, sys, threading, time
import trio
from trisock.pluto import socket, trio_thread
from trisock.pluto.blocking import background

class Alarm(BaseException):
    pass

def interrupt(*_):
    raise Alarm

def arm(most=0.0015):
    signal.setitimer(signal.ITIMER_REAL, random.uniform(0.00002, most))

def disarm():
    signal.setitimer(signal.ITIMER_REAL, 0)

interrupts = 0

def attempt(function):
    '''Make a call that a signal may interrupt. Return True if the call completed.'''
    global interrupts
    try:
        function()
        disarm()
        return True
    except Alarm:
        interrupts += 1
        return False

def connected_pair():
    with stdlib.create_server(("127.0.0.1", 0)) as listening:
        client = socket.connect("127.0.0.1", listening.getsockname()[1])
        raw, _ = listening.accept()
    raw.setsockopt(stdlib.IPPROTO_TCP, stdlib.TCP_NODELAY, 1)
    raw.settimeout(20)
    return client, raw

def background_threads():
    return [each for each in threading.enumerate() if each.name == "trisock"]

def check_threads_end():
    background.stop()
    for each in background_threads():  # after an interrupted stop, a thread may still run
        each.join(5)
    assert threading.active_count() == 1, threading.enumerate()

random.seed(7)
# Some interrupts leave a thread or a caller waiting until a timeout, so shorten the timeouts.
trio_thread._MAX_WAKE_SECONDS = 0.01
trio_thread._POLL_SECONDS, trio_thread._MAX_POLLS = 0.01, 100
# An exception that a signal handler raises inside a weakref callback is unraisable.
sys.unraisablehook = lambda unraisable: None
signal.signal(signal.SIGALRM, interrupt)
"""


def run_interrupted(text: str, times: int) -> str:
    return run_program(text, prelude=PRELUDE, timeout=DEADLINE * times)


@lossless
def test_interrupted_recv_and_peek_lose_no_byte(times: int) -> None:
    out = run_interrupted(
        f"""
        client, raw = connected_pair()
        sent = random.randbytes(25_000 * {times})
        def feed():
            for at in range(0, len(sent), 50):
                raw.sendall(sent[at : at + 50])
                time.sleep(0.0005)
        threading.Thread(target=feed, daemon=True).start()
        got = bytearray()
        def receive():
            while len(got) < len(sent):
                arm(0.0003 if interrupts % 2 else 0.0015)
                if interrupts % 3 == 2:
                    client.peek()
                got.extend(client.recv())
        while not attempt(receive):
            pass
        print(got == sent, interrupts > 100 * {times})
        """,
        times,
    )
    assert out == "True True\n"


@lossless
def test_interrupted_recv_and_peek_of_a_udp_socket_lose_no_datagram(times: int) -> None:
    out = run_interrupted(
        f"""
        server = socket.udpserver("127.0.0.1:0")
        raw = stdlib.socket(stdlib.AF_INET, stdlib.SOCK_DGRAM)
        raw.bind(("127.0.0.1", 0))
        count = 500 * {times}
        def feed():
            for number in range(count):
                while number > len(got) + 50:  # the kernel's buffer holds them
                    time.sleep(0.0005)
                raw.sendto(str(number).encode(), ("127.0.0.1", server.port))
                time.sleep(0.0005)
        got = []
        threading.Thread(target=feed, daemon=True).start()
        def receive():
            while len(got) < count:
                arm(0.0003 if interrupts % 2 else 0.0015)
                if interrupts % 3 == 2:
                    server.peek()
                got.append(server.recv())
        while not attempt(receive):
            pass
        print([int(each) for each in got] == list(range(count)), interrupts > 100 * {times})
        """,
        times,
    )
    assert out == "True True\n"


@pytest.mark.parametrize("call", ["client.recv()", "listening.accept()", "unanswered()"])
def test_every_interrupt_ends_a_call_that_would_block_forever(call: str, times: int) -> None:
    out = run_interrupted(
        f"""
        client, raw = connected_pair()
        listening = socket.listen(0)
        full = stdlib.create_server(("127.0.0.1", 0), backlog=0)
        others = []
        for _ in range(3):  # overflow the backlog: the kernel drops further SYNs
            others.append(stdlib.socket())
            others[-1].setblocking(False)
            others[-1].connect_ex(full.getsockname())
        select.select([], others[:1], [], 20)
        def unanswered():
            socket.connect(*full.getsockname())
        longest = 0
        for number in range(500 * {times}):
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
        """,
        times,
    )
    assert out == "True\n"


def test_calls_work_after_an_interrupted_send_connect_close_or_starttls(times: int) -> None:
    out = run_interrupted(
        f"""
        host = stdlib.create_server(("127.0.0.1", 0), backlog=128)
        accepted = []
        def accept():
            while True:
                accepted.append(host.accept()[0])
                if len(accepted) > 50:
                    accepted.pop(0).close()
        threading.Thread(target=accept, daemon=True).start()
        def connect_send_close():
            global client
            arm()
            client = socket.connect(*host.getsockname())
            client.send(bytes(1000))
            client.send(bytes(3_000_000))
            client.close()
        def connect_starttls():
            global client
            arm()
            client = client or socket.connect(*host.getsockname())
            client.starttls("localhost")
        def close():
            arm()
            if client is not None:
                client.close()
        while interrupts < 150 * {times}:
            client = None
            for function in (connect_send_close, connect_starttls, close):
                attempt(function)
            if client is not None:
                client.close()
                assert not client.isopen() and client.recv() is None
        client = socket.connect(*host.getsockname())
        assert client.send("x")
        del client
        print(len(background_threads()))
        """,
        times,
    )
    assert out == "1\n"


@lossless
def test_interrupted_accept_loses_no_client(times: int) -> None:
    out = run_interrupted(
        f"""
        clients = 100 * {times}
        listening = socket.listen(0)
        addresses = []
        def connect():
            for _ in range(clients):
                with stdlib.create_connection(("127.0.0.1", listening.port)) as raw:
                    addresses.append(raw.getsockname())
                    raw.recv(1)
        connecting = threading.Thread(target=connect, daemon=True)
        connecting.start()
        served = []
        def serve():
            while len(served) < clients:
                disarm()
                for each in served[-1:]:
                    each.close()
                arm(0.0005)
                if interrupts % 2:
                    listening.hasconnection()
                served.append(listening.accept())
        while not attempt(serve):
            pass
        served[-1].close()
        connecting.join()  # the thread may still have to record the last address
        print([each.getpeer() for each in served] == addresses, interrupts > clients / 6)
        """,
        times,
    )
    assert out == "True True\n"


def test_an_interrupted_stop_or_start_leaves_no_thread(times: int) -> None:
    run_interrupted(
        f"""
        client, raw = connected_pair()
        def stop_and_start():
            arm(0.0006)
            background.stop()
            client.isopen()
            background.stop()
        while interrupts < 300 * {times}:
            attempt(stop_and_start)
            assert len(background_threads()) <= 3
        client.isopen()
        check_threads_end()
        """,
        times,
    )


# ---- exceptions at every line: a trace function raises each exception at a chosen line ----

INJECT = (
    PRELUDE
    + """
OURS = os.path.dirname(sys.modules["trisock"].__file__)

class Injected(BaseException):
    pass

def raise_at(line, call, again_after=None):
    '''Make a call, and raise Injected at the n-th line of trisock that the call runs (n = line).

    Unless again_after is None, raise Injected again that many lines later. Return the result (None
    if Injected was raised) and the number of lines of trisock that the call ran.
    '''
    lines = [line] if again_after is None else [line, line + again_after]
    count = 0
    def trace(frame, event, arg):
        nonlocal count
        if not frame.f_code.co_filename.startswith(OURS):
            return None
        if event == "line":
            count += 1
            if count in lines:
                raise Injected
        return trace
    sys.settrace(trace)
    try:
        return call(), count
    except Injected:
        return None, count
    finally:
        sys.settrace(None)

def check_opens(opens):
    '''Check that the socket stayed open only after an exception at one of the first lines.'''
    first = opens.index(False)
    assert len(opens) > 20 and first < 15 and not any(opens[first:]), opens
"""
)


def run_injected(text: str) -> str:
    return run_program(text, prelude=INJECT)


@pytest.mark.parametrize("stopped", [False, pytest.param(True, marks=pytest.mark.rare)])
def test_an_exception_at_any_line_of_recv_loses_no_byte(stopped: bool) -> None:
    run_injected(
        f"""
        client, raw = connected_pair()
        for second in (None, 1, 2, 3, 4, 5, 6, 7):
            interrupted = 0
            for line in range(1, 1000):
                if {stopped}:
                    background.stop()
                raw.sendall(b"%d." % line)
                if {stopped} and line % 2:
                    client.peek()
                result, count = raise_at(line, client.recv, second)
                interrupted += result is None
                received = result or b""
                while not received.endswith(b"."):
                    received += client.recv()
                assert received == b"%d." % line, (second, line, received)
                if count < line:
                    break
            assert interrupted == line - 1 > 19, (second, line, interrupted)
        check_threads_end()
        """
    )


def test_an_exception_at_any_line_of_close_still_closes() -> None:
    run_injected(
        """
        opens = []
        for line in range(1, 1000):
            client, raw = connected_pair()
            result, count = raise_at(line, client.close)
            if count < line:
                break
            opens.append(client.isopen())
            assert opens[-1] or client.send("x") is False
            if not opens[-1]:
                try:
                    assert raw.recv(1) == b""
                except ConnectionResetError:
                    pass
            raw.close()
        check_opens(opens)
        """
    )


def test_an_exception_at_any_line_of_starttls_leaves_nothing_open() -> None:
    run_injected(
        """
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
        for line in range(1, 1000):
            client, raw = connected_pair()
            peer = threading.Thread(target=handshake, args=(raw,))
            peer.start()
            result, count = raise_at(line, lambda: client.starttls([certificate]))
            opens.append(client.isopen())
            client.close()
            peer.join()
            if count < line:
                assert opens.pop() and result is True
                break
        check_opens(opens)
        """
    )


def test_calls_work_after_an_exception_at_any_line() -> None:
    run_injected(
        """
        def check(name, call):
            for line in range(1, 1000):
                other = stdlib.create_connection(("127.0.0.1", listening.port))
                raw.sendall(b"y")
                result, count = raise_at(line, call, line % 5 or None)
                if name != "accept" or result is None:
                    result = listening.accept()
                result.close()
                client.unrecv("z")
                while client.peek():
                    client.recv()
                other.close()
                if count < line:
                    break
            assert line > 3, name
            assert client.send("x"), name
            check_threads_end()

        for name, call in {
            "send": lambda: client.send("x"),
            "peek": lambda: client.peek(),
            "isopen": lambda: client.isopen(),
            "unrecv": lambda: client.unrecv(""),
            "hasconnection": lambda: listening.hasconnection(),
            "accept": lambda: listening.accept(),
            "connect": lambda: socket.connect("127.0.0.1", listening.port),
            "stop": background.stop,
            "recv": lambda: client.recv(),
        }.items():
            client, raw = connected_pair()
            listening = socket.listen(0)
            check(name, call)
        """
    )


@pytest.mark.usefixtures("bounded")
def test_starttls_interrupted_before_it_starts_closes_the_socket(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(_: object) -> None:  # runs just before the thread receives the call
        raise KeyboardInterrupt

    client, raw = run_outside(raw_peer())
    with raw:
        with monkeypatch.context() as patched:
            patched.setattr(background, "result_of", interrupt)
            with pytest.raises(KeyboardInterrupt):
                client.starttls("localhost")
        assert not client.isopen()
        assert client.send("PASS hunter2") is False
        assert client.recv() is None
        assert not client.istls()
        with pytest.raises(ConnectionResetError):
            raw.recv(100)
