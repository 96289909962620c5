"""The connection between processes, here between threads: who meets, what all get, and who is missed."""

import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from sqlrl_jax import link as link_module
from sqlrl_jax.link import Link, LinkError, Peer
from sqlrl_jax.meeting import meet
from sqlrl_jax.relay import Relay

DEADLINE = 20.0


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def join(index: int, count: int, port: int, *, timeout: float = DEADLINE, version: str = "1") -> Any:
    return meet(index, count, "127.0.0.1", port, timeout=timeout, version=version, told=lambda: {"service": 7})


class Process:
    """One thread's place in the run and what it was told."""

    def __init__(self, index: int, count: int, port: int, lost_after: float) -> None:
        self.events: list[tuple[str, str]] = []
        self.told = threading.Event()
        peers, self.lines, self.answer = join(index, count, port)
        self.link = Link(index, peers, self.lines, lost_after=lost_after, on_event=self.note)

    def note(self, event: str, text: str) -> None:
        self.events.append((event, text))
        self.told.set()

    def vanish(self) -> None:
        """As when the process is killed: the system closes its connections."""
        self.link._closed.set()
        for line in self.lines.values():
            line.shutdown(socket.SHUT_RDWR)
            line.close()


def together(*calls: Callable[[], Any]) -> list[Any]:
    with ThreadPoolExecutor(len(calls)) as pool:
        futures: list[Future[Any]] = [pool.submit(call) for call in calls]
        return [future.exception(DEADLINE) or future.result() for future in futures]


@pytest.fixture
def start(monkeypatch):
    monkeypatch.setattr(link_module, "BEAT_SECONDS", 0.1)
    started: list[Process] = []

    def run(count: int, lost_after: float = DEADLINE) -> list[Process]:
        port = free_port()
        started.extend(together(*(lambda i=i: Process(i, count, port, lost_after) for i in range(count))))
        return started

    yield run
    for process in started:
        process.link.close()


def test_all_get_what_each_gives_in_order(start):
    processes = start(3)
    assert all(p.answer == {"service": 7} for p in processes)
    assert [peer.index for peer in processes[2].link.peers] == [0, 1, 2]
    for size in (0, 1, 3_000_000):
        parts = [bytes([p.link.index]) * size for p in processes]
        got = together(
            *(lambda p=p, b=b: p.link.exchange("x", b, DEADLINE) for p, b in zip(processes, parts, strict=True))
        )
        assert got == [parts] * 3


def test_exchanges_of_two_names_may_cross(start):
    first, second = start(2)
    calls = ((first, "a", b"1"), (second, "b", b"4"), (first, "b", b"2"), (second, "a", b"3"))
    got = together(
        *(lambda p=p, name=name, data=data: p.link.exchange(name, data, DEADLINE) for p, name, data in calls)
    )
    assert got == [[b"1", b"3"], [b"2", b"4"], [b"2", b"4"], [b"1", b"3"]]


def test_one_that_does_not_come_is_named(start):
    first, second = start(2)
    with pytest.raises(
        LinkError, match=r"waited at 'x 1' for 0 s .* for process 1 on .*\(pid \d+\): that process hangs"
    ):
        first.link.exchange("x", b"", 0.3)
    with pytest.raises(LinkError, match=r"waited at 'y 1' .*what process 0 says tells who did not come"):
        second.link.exchange("y", b"", 0.1)


@pytest.mark.parametrize("dead", [0, 1])
def test_a_death_is_told_to_all(start, dead):
    processes = start(3)
    processes[dead].vanish()
    for process in processes:
        if process.link.index != dead:
            assert process.told.wait(DEADLINE)
            [(event, text)] = process.events[:1]
            assert event == "end"
            assert f"process {dead} on {socket.gethostname()}" in text
            assert "is gone: its connection has closed" in text


def test_silence_counts_as_death(start, monkeypatch):
    first, second = start(2, lost_after=1.0)
    monkeypatch.setattr(
        link_module, "send_message", lambda connection, kind, data=b"": None
    )  # a network that swallows all
    assert first.told.wait(DEADLINE)
    assert second.told.wait(DEADLINE)
    assert "nothing was heard of it for 1 s" in first.events[0][1]


def test_stop_and_faults_reach_all_others(start):
    processes = start(3)
    processes[1].link.stop("SIGTERM")
    processes[2].link.fault("the disk is full")
    for index, expected in ((0, 2), (1, 1), (2, 1)):
        deadline = time.monotonic() + DEADLINE
        while len(processes[index].events) < expected and time.monotonic() < deadline:
            time.sleep(0.01)
    assert sorted(processes[0].events) == [("end", "the disk is full"), ("stop", "SIGTERM")]
    assert processes[1].events == [("end", "the disk is full")]
    assert processes[2].events == [("stop", "SIGTERM")]


def test_leaving_in_order_alarms_nobody(start):
    first, second = start(2)
    second.link.close()
    second.vanish()
    assert not first.told.wait(1.0)


def test_process_0_says_who_is_missing():
    port = free_port()
    first, second = together(lambda: join(0, 3, port, timeout=1), lambda: join(1, 3, port, timeout=1))
    for error in (first, second):  # the one that came is told too
        assert isinstance(error, LinkError)
        assert "for process 2 of 3" in str(error)


def test_a_process_alone_says_where_it_looked():
    port = free_port()
    with pytest.raises(LinkError, match=rf"process 1 could not reach process 0 at 127.0.0.1:{port} within 0 s"):
        join(1, 2, port, timeout=0.3)


def test_a_port_in_use_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(LinkError, match=f"cannot listen on port {port}"):
            join(0, 2, port)


@pytest.mark.parametrize(
    ("index", "count", "version", "message"),
    [
        (1, 4, "1", "was started as one of 4, process 0 as one of 3"),
        (0, 3, "1", "process 0 was started twice"),
        (1, 3, "2", "runs 2, process 0 1: install the same"),
    ],
)
def test_one_that_does_not_belong_is_refused(index, count, version, message):
    port = free_port()

    def stranger() -> Any:
        if index:
            return join(index, count, port, version=version)
        hello = '{"magic": "sqlrl_jax run", "index": 0, "count": 3, "version": "1", "host": "h", "pid": 1}'
        return say(port, link_module.HELLO, hello.encode())

    first, refused = together(lambda: join(0, 3, port, timeout=1.5), stranger)
    assert message in str(refused)
    assert "for process 1, 2 of 3" in str(first)


def say(port: int, kind: bytes, data: bytes) -> bytes:
    deadline = time.monotonic() + DEADLINE
    while True:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE) as connection:
                link_module.send_message(connection, kind, data)
                return link_module.read_message(connection)[1]
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_rubbish_does_not_keep_the_others_from_meeting():
    port = free_port()

    def rubbish() -> Any:
        answers = [say(port, link_module.HELLO, data) for data in (b"GET / HTTP/1.1", b"[]", b'{"index": 1}')]
        return answers, join(1, 2, port)

    first, (answers, second) = together(lambda: join(0, 2, port), rubbish)
    assert answers == [b"this is not a process of the run"] * 3
    assert first[0] == second[0]
    assert first[0][1] == Peer(1, socket.gethostname(), first[0][1].pid, "127.0.0.1")


def test_a_relay_stays_open_when_the_other_end_goes():
    with socket.create_server(("127.0.0.1", 0)) as server:
        relay = Relay("127.0.0.1", server.getsockname()[1])
        near = socket.create_connection(("127.0.0.1", relay.port), timeout=DEADLINE)
        far, _ = server.accept()
        near.sendall(b"ping")
        assert far.recv(4) == b"ping"
        far.sendall(b"pong")
        assert near.recv(4) == b"pong"
        far.close()
    near.settimeout(0.5)
    with pytest.raises(TimeoutError):
        near.recv(1)
    near.close()
