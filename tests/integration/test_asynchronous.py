"""A whole asynchronous run of launch.py that loses its service, is killed, and goes on: every question is used as often as
the epochs say, and no episode is older than the bound."""

import json
import os
import signal
import subprocess
from collections import Counter
from pathlib import Path

from test_train import QUESTIONS, SAMPLES, command, finish, train_lines, wait_for_steps

from sqlrl_jax.data.order import Shuffled
from sqlrl_jax.data.tasks import read_tasks

BOUND, STEPS = 2, 7  # of 4 questions; an epoch has 16: the last step is of the second


def start(run_dir, demo, *more):
    settings = [
        f"trainer.max_staleness={BOUND}",
        f"trainer.max_steps={STEPS}",
        "trainer.epochs=3",
        "data.order=shuffled",  # which is known beforehand
        "trainer.eval_before_train=false",
        "data.demo.train_databases=2",
        f"data.train_data=[{demo}/train.jsonl]",
    ]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command(run_dir, demo, *settings, *more),
        cwd=Path(__file__).resolve().parents[2],
        stdout=pipe,
        stderr=subprocess.STDOUT,
        text=True,
    )


def kill_service(pid: int) -> None:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    services = [c for c in children if b"serve" in Path(f"/proc/{c}/cmdline").read_bytes().split(b"\0")]
    os.kill(int(services[0]), signal.SIGKILL)


def test_killed_and_resumed_uses_every_question_as_often_as_the_epochs_say(tmp_path):
    run_dir, demo = tmp_path / "run", tmp_path / "demo"
    process = start(run_dir, demo)
    wait_for_steps(process, run_dir, 1)
    kill_service(process.pid)
    wait_for_steps(process, run_dir, 3)
    process.send_signal(signal.SIGKILL)
    assert "starting it again" in process.communicate()[0]
    output = finish(start(run_dir, demo, "trainer.resume_mode=latest"))
    assert "resuming after step" in output

    lines = train_lines(run_dir)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert all(0 <= line["async/staleness_min"] <= line["async/staleness_max"] <= BOUND for line in lines)
    assert max(line["async/staleness_max"] for line in lines) > 0
    assert all(line["async/queue"] + line["async/in_flight"] <= BOUND * QUESTIONS for line in lines)
    assert all(0 <= line["async/learner_idle"] <= 1 for line in lines)
    assert any(line.get("policy/grad_norm", 0) > 0 for line in lines)

    episodes = {}
    for step in range(1, STEPS + 1):
        path = run_dir / "trajectories" / f"train_{step:06d}.jsonl"
        episodes[step] = [json.loads(line) for line in path.read_text().splitlines()]
        assert len(episodes[step]) == QUESTIONS * SAMPLES
        spans = [span for episode in episodes[step] for span in episode["spans"]]
        assert all(step - 1 - BOUND <= version <= step - 1 for version, _, _ in spans)
    trained = Counter(e["task_id"] for step in episodes for e in episodes[step])
    order = Shuffled(read_tasks(str(demo / "train.jsonl")), QUESTIONS, 0)
    expected = Counter(order.at(i).id for i in range(STEPS * QUESTIONS))
    assert trained == Counter({name: count * SAMPLES for name, count in expected.items()})
