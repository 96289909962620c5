"""A worker process: frames of any size, silence, death of every kind, and nothing left behind."""

from __future__ import annotations

import io
import os
import signal
import threading
from collections.abc import Iterator

import pytest

from rollout import worker_process
from rollout.worker_process import Died, Stalled, WorkerProcess, boot, frame, read_frame

CODE = """
import os, signal, sys, time
sys.path.insert(0, sys.argv[1])
from rollout.worker_process import serve

def start(*settings):
    print("started", settings)
    def answer(command, *values):
        if command == "echo":
            return values
        if command == "settings":
            return settings
        if command == "print":
            print("x" * 100_000)
        if command == "exit":
            sys.exit(values[0])
        if command == "raise":
            raise ValueError("a fault of its own")
        if command == "signal":
            os.kill(os.getpid(), values[0])
        if command == "sleep":
            time.sleep(values[0])
        if command == "compute":
            end = time.process_time() + values[0]
            while time.process_time() < end:
                pass
        return ("done",)
    return answer

serve(start)
"""
ARGUMENTS = ["-I", "-S", "-c", CODE, worker_process.PACKAGE_ROOT]


@pytest.fixture
def worker() -> Iterator[WorkerProcess]:
    worker = WorkerProcess(ARGUMENTS, (1, "two", b"\0"), stall_seconds=0.2)
    yield worker
    worker.bury()


def test_settings_and_requests_arrive_whole(worker: WorkerProcess) -> None:
    assert worker.ask(("settings",)) == (1, "two", b"\0")
    for value in ("", None, 2**70, -0.0, "\ud800", b"x" * 65_528, "y" * 5_000_000, [(1, None)] * 100_000):
        assert worker.ask(("echo", value)) == (value,)
    assert worker.ask(("echo",)) == ()


def test_what_a_worker_prints_stays_out_of_its_answers(capfd: pytest.CaptureFixture[str]) -> None:
    worker = WorkerProcess(ARGUMENTS, (1, "two"))
    assert worker.ask(("print",)) == ("done",)
    assert worker.ask(("echo", 3)) == (3,)
    assert worker.bury() == 0
    assert capfd.readouterr().err.startswith("started (1, 'two')")


@pytest.mark.parametrize(
    ("request_", "code"),
    [(("exit", 7), 7), (("exit", 0), 0), (("raise",), 1), (("signal", int(signal.SIGXCPU)), -signal.SIGXCPU)],
)
def test_a_death_is_told_with_its_cause(worker: WorkerProcess, request_: tuple[object, ...], code: int) -> None:
    with pytest.raises(Died):
        worker.ask(request_)
    assert worker.bury() == code
    assert worker.bury() == code


def test_a_dead_worker_takes_no_request(worker: WorkerProcess) -> None:
    assert worker.ask(("echo", 1)) == (1,)
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(Died):
        worker.ask(("echo", "x" * 1_000_000))
    assert worker.bury() == -signal.SIGKILL
    assert not os.path.exists(f"/proc/{worker.pid}")


def test_a_worker_can_be_killed_while_one_waits_for_it(worker: WorkerProcess) -> None:
    worker.ask(("echo",))
    killer = threading.Timer(0.1, worker.kill)
    killer.start()
    with pytest.raises(Died):
        worker.ask(("compute", 60))
    killer.join()


def test_who_computes_is_waited_for_and_who_stands_still_is_not(worker: WorkerProcess) -> None:
    assert worker.ask(("compute", 1.0)) == ("done",)
    with pytest.raises(Stalled):
        worker.ask(("sleep", 60))


def test_a_worker_that_does_not_even_read_stands_still(worker: WorkerProcess) -> None:
    worker.ask(("echo",))
    os.kill(worker.pid, signal.SIGSTOP)
    with pytest.raises(Stalled):
        worker.ask(("echo", "x" * 1_000_000))  # more than the pipe holds


def test_silence_is_told_once_and_only_when_there_is_some(worker: WorkerProcess) -> None:
    told: list[str] = []
    worker.ask(("echo",))
    assert worker.ask(("echo", 1), 30.0, lambda: told.append("early")) == (1,)
    assert worker.ask(("compute", 0.3), 0.01, lambda: told.append("late")) == ("done",)
    assert told == ["late"]


def test_ctrl_c_is_for_the_parent(worker: WorkerProcess) -> None:
    worker.ask(("echo",))
    os.kill(worker.pid, signal.SIGINT)
    assert worker.ask(("echo", 1)) == (1,)


def test_a_worker_ends_when_its_input_does(worker: WorkerProcess) -> None:
    worker.ask(("echo",))
    assert worker.bury() == 0


def test_frames_end_with_the_stream() -> None:
    stream = io.BytesIO(frame((1,)) + frame(("a", None)) + b"\1\0\0")
    assert [read_frame(stream), read_frame(stream), read_frame(stream)] == [(1,), ("a", None), None]


def test_boot_names_the_module_and_leaves_site_packages_out() -> None:
    assert "-S" in boot("rollout.sql.worker", False)
    assert "-S" not in boot("rollout.sql.worker", True)
    assert any("from rollout.sql.worker import main" in part for part in boot("rollout.sql.worker", True))
