"""One run in several real processes: stopped, robbed of a process, gone on with by other numbers of processes. Every step
must have the metrics and the episodes of the same run in one process.

The first part has a service for each process, the others share one that outlives them: starting services costs most here.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from rollout.stub import Stub
from rollout.supervisor import ServiceProcess

ROOT = Path(__file__).resolve().parents[2]
STEPS = 5
CONFIG = ["--config", "configs/quickstart.yaml"]
DEADLINE = 600.0
TOLERANCE = 1e-5
# What depends on the clock, or on how many processes there are.
NOT_COMPARED = ("kind", "time", "timing/", "bridge/", "async/", "generate/tokens_per_second", "policy/compiles")
LOST = 75
pytestmark = pytest.mark.timeout(1200)


class Runs:
    """Starts runs that differ in their folder and their number of processes alone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        demo = folder / "demo"
        settings = {
            "trainer.max_steps": STEPS,
            "trainer.train_batch_size": 4,
            "trainer.policy_mini_batch_size": 4,
            "trainer.policy.rows_per_micro_batch": 4,
            "trainer.policy.scan_layers": "true",
            "trainer.eval_before_train": "false",
            "trainer.eval_interval": 0,
            "trainer.ckpt_interval": 1,
            "trainer.max_ckpts_to_keep": STEPS,
            "trainer.compile_cache": folder / "compiled",
            "trainer.resume_mode": "latest",
            "trainer.distributed.lost_after": 20,
            "generator.n_samples_per_prompt": 4,
            "generator.inference_engine.max_sequences": 16,
            "data.max_val_questions": 6,
            "data.demo.directory": demo,
            "data.demo.train_databases": 4,
            "data.demo.heldout_databases": 2,
            "data.train_data": f"[{demo}/train.jsonl]",
            "data.val_data": f"[{demo}/heldout.jsonl]",
            "environment.text2sql.database_root": demo / "databases",
        }
        self.settings = [f"{key}={value}" for key, value in settings.items()]
        serve = [sys.executable, str(ROOT / "launch.py"), "serve", *CONFIG, *self.settings]
        self.service = ServiceProcess(serve, folder / "service.log")

    def start(self, run_dir: Path, count: int, *more: str) -> list[subprocess.Popen[str]]:
        command = [sys.executable, "launch.py", *CONFIG, *self.settings, *more]
        command += [f"trainer.run_dir={run_dir}"]
        places: list[list[str]] = [[]]
        if count > 1:
            with socket.create_server(("127.0.0.1", 0)) as free:
                coordinator = f"127.0.0.1:{free.getsockname()[1]}"
            flags = ["--coordinator", coordinator, "--process-count", str(count), "--process-id"]
            places = [[*flags, str(index)] for index in range(count)]
        environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1", "JAX_PLATFORMS": "cpu"}
        return [
            subprocess.Popen(
                [*command, *place],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for place in places
        ]


def ended(processes: list[subprocess.Popen[str]], *statuses: int) -> list[str]:
    deadline = time.monotonic() + DEADLINE
    outputs = []
    try:
        for process in processes:
            outputs.append(process.communicate(timeout=max(1.0, deadline - time.monotonic()))[0])
    finally:
        for process in processes:
            process.kill()
    assert [p.returncode for p in processes] == list(statuses), "\n----\n".join(outputs)
    return outputs


def entries(run_dir: Path, kind: str) -> list[dict]:
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [entry for entry in map(json.loads, lines) if entry["kind"] == kind]


def wait_for(processes: list[subprocess.Popen[str]], run_dir: Path, steps: int) -> None:
    """Returns when that many steps are done and the last is on its way to disk."""
    deadline = time.monotonic() + DEADLINE
    while len(entries(run_dir, "train")) < steps:
        for process in processes:
            assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"no step {steps} in time"
        time.sleep(0.05)


def kill_service(run_dir: Path, process: int) -> None:
    log = (run_dir / f"service.process{process}.log").read_text()
    with Stub(log.rpartition("listening on ")[2].split()[0]) as stub:
        os.kill(stub.status().pid, signal.SIGKILL)


def compared(entry: dict) -> dict:
    return {key: value for key, value in entry.items() if not key.startswith(NOT_COMPARED)}


def assert_same_numbers(run_dir: Path, reference: Path) -> None:
    for kind in ("train", "eval"):
        mine, theirs = entries(run_dir, kind), entries(reference, kind)
        assert [e["step"] for e in mine] == [e["step"] for e in theirs]
        for one, other in zip(map(compared, mine), map(compared, theirs), strict=True):
            assert one == pytest.approx(other, rel=TOLERANCE, abs=TOLERANCE)


def assert_same_episodes(run_dir: Path, reference: Path) -> None:
    for path in sorted((reference / "trajectories").iterdir()):
        mine = map(json.loads, (run_dir / "trajectories" / path.name).read_text().splitlines())
        theirs = map(json.loads, path.read_text().splitlines())
        for one, other in zip(mine, theirs, strict=True):
            for key in ("task_id", "sample", "response_ids", "loss_mask", "reward", "outcome"):
                assert one[key] == other[key]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Iterator[Runs]:
    runs = Runs(tmp_path_factory.mktemp("processes"))
    yield runs
    runs.service.stop()


@pytest.fixture(scope="module")
def shared(runs) -> str:
    """The setting that names a service for all."""
    subprocess.run([sys.executable, "launch.py", "demo", *CONFIG, *runs.settings], cwd=ROOT, check=True)
    return f"generator.services=[{runs.service.start()}]"


@pytest.fixture(scope="module")
def reference(runs, shared) -> Path:
    run_dir = runs.folder / "one"
    ended(runs.start(run_dir, 1, shared), 0)
    return run_dir


@pytest.fixture(scope="module")
def run_dir(runs) -> Path:
    return runs.folder / "several"


@pytest.fixture(scope="module")
def stopped(runs, reference, run_dir) -> list[str]:
    """Two processes; the service of the second dies, then the second gets a signal."""
    processes = runs.start(run_dir, 2)
    wait_for(processes, run_dir, 1)
    kill_service(run_dir, 1)
    wait_for(processes, run_dir, 2)
    processes[1].send_signal(signal.SIGTERM)
    return ended(processes, 130, 130)


@pytest.fixture(scope="module")
def second_killed(runs, shared, run_dir, stopped) -> list[str]:
    """Two processes go on; the second is killed."""
    processes = runs.start(run_dir, 2, shared)
    wait_for(processes, run_dir, 3)
    processes[1].kill()
    return ended(processes, LOST, -signal.SIGKILL)


@pytest.fixture(scope="module")
def first_killed(runs, shared, run_dir, second_killed) -> list[str]:
    """Two processes go on; the first, which the others meet at, is killed."""
    processes = runs.start(run_dir, 2, shared)
    wait_for(processes, run_dir, 4)
    processes[0].kill()
    return ended(processes, -signal.SIGKILL, LOST)


@pytest.fixture(scope="module")
def finished(runs, shared, run_dir, first_killed) -> list[str]:
    """Four processes go on to the end."""
    return ended(runs.start(run_dir, 4, shared), 0, 0, 0, 0)


def test_a_signal_to_one_process_stops_all_after_the_same_step(stopped, run_dir):
    assert "stopped by SIGTERM to process 1 after step" in stopped[0]
    assert "stopped by SIGTERM to process 1" in (run_dir / "log.process1.txt").read_text()
    assert "is lost" in stopped[0]


@pytest.mark.parametrize(("fixture", "survivor", "dead"), [("second_killed", 0, 1), ("first_killed", 1, 0)])
def test_a_killed_process_ends_the_others_with_one_sentence(request, run_dir, fixture, survivor, dead):
    output = request.getfixturevalue(fixture)[survivor]
    assert f"error: process {survivor}: process {dead} on {socket.gethostname()} (pid " in output
    assert "is gone: its connection has closed" in output
    assert "trainer.resume_mode=latest" in output
    assert "Traceback" not in output
    assert "*** Check failure stack trace" not in output
    log = "log.txt" if survivor == 0 else f"log.process{survivor}.txt"
    assert "is gone" in (run_dir / log).read_text()


def test_any_number_of_processes_makes_the_same_run(reference, run_dir, finished):
    assert "resuming after step" in finished[0]
    assert "greedy, up to 5 turns" in finished[0]
    assert not any(said in output for output in finished[1:] for said in ("resuming", "greedy", "step ")), (
        "only process 0 speaks"
    )
    assert_same_numbers(run_dir, reference)
    assert_same_episodes(run_dir, reference)
    mine, theirs = (load_file(folder / "export" / "model.safetensors") for folder in (run_dir, reference))
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_allclose(mine[name], value, atol=TOLERANCE)
