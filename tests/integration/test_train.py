"""Whole runs of launch.py: two processes, the real bridge, real databases. Killed, cut and resumed on purpose.

One uninterrupted run is the reference; every run that was disturbed must end with the same episodes and metrics.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STEPS, QUESTIONS, SAMPLES = 4, 4, 4
DEADLINE = 300.0
# What may differ between two runs of the same thing: seconds, and bytes that were sent again.
NOT_COMPARED = ("time", "timing/", "bridge/", "async/", "generate/tokens_per_second", "policy/compiles")


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    bad = {"id": "bad", "db_id": "nowhere", "question": "Who?", "gold_sql": "SELECT 1"}
    (folder / "bad.jsonl").write_text(json.dumps(bad) + "\n")
    return folder / "demo"


def command(run_dir: Path, demo: Path, *more: str) -> list[str]:
    settings = {
        "trainer.run_dir": run_dir,
        "trainer.max_steps": STEPS,
        "trainer.train_batch_size": QUESTIONS,
        "trainer.policy_mini_batch_size": QUESTIONS,
        "trainer.policy.rows_per_micro_batch": 4,
        "trainer.eval_interval": 0,
        "trainer.ckpt_interval": 1,
        "generator.n_samples_per_prompt": SAMPLES,
        "generator.inference_engine.max_sequences": 16,
        "data.max_val_questions": 8,
        "data.demo.directory": demo,
        "data.demo.train_databases": 1,  # two epochs in four steps
        "data.order": "learnable_first",  # the second one hangs on what the first measured
        "data.demo.heldout_databases": 2,
        "data.train_data": f"[{demo}/train.jsonl, {demo.parent}/bad.jsonl]",
        "data.val_data": f"[{demo}/heldout.jsonl]",
        "environment.text2sql.database_root": demo / "databases",
    }
    arguments = [f"{key}={value}" for key, value in settings.items()]
    return [sys.executable, "launch.py", "--config", "configs/quickstart.yaml", *arguments, *more]


def start(*arguments) -> subprocess.Popen:
    pipe = subprocess.PIPE
    return subprocess.Popen(command(*arguments), cwd=ROOT, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen, status: int = 0) -> str:
    output, _ = process.communicate(timeout=DEADLINE)
    assert process.returncode == status, output
    return output


def train_lines(run_dir: Path) -> list[dict]:
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [entry for entry in map(json.loads, lines) if entry["kind"] == "train"]


def wait_for_steps(process: subprocess.Popen, run_dir: Path, steps: int) -> None:
    deadline = time.monotonic() + DEADLINE
    while len(train_lines(run_dir)) < steps:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"no step {steps} in time"
        time.sleep(0.05)


def outcome(run_dir: Path) -> tuple[list[dict], list[dict]]:
    """Metrics and episodes of a run, without what depends on the clock."""
    metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    metrics = [{k: v for k, v in m.items() if not k.startswith(NOT_COMPARED)} for m in metrics]
    episodes = []
    for path in sorted((run_dir / "trajectories").iterdir()):
        for line in path.read_text().splitlines():
            episode = json.loads(line)
            for turn in episode["turns"]:
                turn.pop("seconds")
            episode["metrics"] = {}
            episodes.append(episode)
    return metrics, episodes


@pytest.fixture(scope="module")
def reference(tmp_path_factory, demo) -> Path:
    run_dir = tmp_path_factory.mktemp("reference") / "run"
    output = finish(start(run_dir, demo, f"trainer.hf_save_interval={STEPS - 1}"))
    assert "before (step 0)" in output
    assert f"after (step {STEPS})" in output
    assert "1 of 9 training questions left out: 1 missing database" in output
    best = re.search(r"checkpoints/best:\s+step\s+(\d+),\s+accuracy", output)
    assert best is not None
    assert int(best[1]) == STEPS  # the only one that was evaluated and saved
    assert [p.name for p in (run_dir / "exports").iterdir()] == [f"step_{STEPS - 1}"]
    assert (run_dir / "exports" / f"step_{STEPS - 1}" / "tokenizer.json").exists()
    return run_dir


def test_a_run_leaves_everything_in_its_folder(reference):
    names = {p.name for p in reference.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "trajectories", "checkpoints", "export", "report.html", "log.txt"} <= names
    assert json.loads((reference / "dropped_questions.jsonl").read_text())["task_id"] == "bad"
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= {p.name for p in (reference / "export").iterdir()}
    metrics, episodes = outcome(reference)
    assert [m["step"] for m in metrics if m["kind"] == "train"] == list(range(1, STEPS + 1))
    assert [(m["step"], m["max_turns"]) for m in metrics if m["kind"] == "eval"] == [
        (0, 5),
        (0, 1),
        (STEPS, 5),
        (STEPS, 1),
    ]
    keys = [(e["kind"], e["step"], e["task_id"], e["sample"]) for e in episodes]
    assert len(keys) == len(set(keys)) == STEPS * QUESTIONS * SAMPLES + 2 * 8
    assert any(m.get("policy/grad_norm", 0) > 0 for m in metrics)
    assert all(m["policy/logprob_diff_max"] < 1e-3 for m in metrics if "policy/logprob_diff_max" in m)
    lines = map(json.loads, (reference / "metrics.jsonl").read_text().splitlines())
    train = [m for m in lines if m["kind"] == "train"]
    assert all(0 < m["bridge/probe_logprob_diff_max"] < 1e-3 for m in train)
    compiles = [m["policy/compiles"] for m in train]
    assert (
        compiles[1] == compiles[2]
    )  # checkpoints and pushes compile nothing new; the first export, after step 3, does


def test_killed_and_resumed_equals_uninterrupted(reference, demo, tmp_path):
    run_dir = tmp_path / "run"
    process = start(run_dir, demo)
    wait_for_steps(process, run_dir, 2)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=DEADLINE)
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step"')  # what a kill in the middle of a write leaves
    output = finish(start(run_dir, demo, "trainer.resume_mode=latest"))
    assert "resuming after step" in output
    assert outcome(run_dir) == outcome(reference)


def test_a_killed_service_is_restarted_and_no_episode_is_lost_or_doubled(reference, demo, tmp_path):
    run_dir = tmp_path / "run"
    process = start(run_dir, demo)
    wait_for_steps(process, run_dir, 1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    services = [c for c in children if b"serve" in Path(f"/proc/{c}/cmdline").read_bytes().split(b"\0")]
    os.kill(int(services[0]), signal.SIGKILL)
    output = finish(process)
    assert "starting it again" in output
    assert "is back with the present weights" in output
    assert outcome(run_dir) == outcome(reference)


def test_ctrl_c_saves_and_says_how_to_go_on(reference, demo, tmp_path):
    run_dir = tmp_path / "run"
    process = start(run_dir, demo)
    wait_for_steps(process, run_dir, 1)
    process.send_signal(signal.SIGINT)
    output = finish(process, status=130)
    assert f"python launch.py --config {run_dir}/config.yaml trainer.resume_mode=latest" in output
    finish(start(run_dir, demo, "trainer.resume_mode=latest"))
    assert outcome(run_dir) == outcome(reference)


def test_a_second_start_in_the_same_folder_is_refused(reference, demo):
    output = finish(start(reference, demo), status=2)
    assert "trainer.resume_mode=latest" in output


def test_the_export_evaluates_like_the_run_it_came_from(reference, demo):
    after = [m for m in outcome(reference)[0] if m["kind"] == "eval" and m["max_turns"] == 5][-1]
    arguments = command(reference, demo)
    arguments[2:2] = ["eval"]
    result = subprocess.run(
        [*arguments, "--model", str(reference / "export"), "--turns", "5"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout.splitlines()[-1])
    assert summary["eval/all/avg_score"] == after["eval/all/avg_score"]
