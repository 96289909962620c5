"""A run in an environment that misbehaves: what fails is played again, what computes too long is scored, nothing stops."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rollout.calculator import main as write_questions

ROOT = Path(__file__).resolve().parents[2]
DEADLINE = 300

FLAKY = '''
import os
from pathlib import Path

from rollout.calculator import Calculator


class Flaky(Calculator):
    """The calculator, but one call crashes its process, one raises and one never ends computing."""

    def step(self, action, turn):
        if self.once("crash"):
            os._exit(3)
        if self.once("raise"):
            raise ValueError("a bug")
        if self.once("burn"):
            while True:
                pass
        return super().step(action, turn)

    def once(self, name):
        try:
            os.close(os.open(Path(self.settings["folder"]) / name, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True


class Broken(Calculator):
    def reset(self, task):
        return task.fields["no such field"]
'''


def launch(folder: Path, run_dir: str, *more: str) -> subprocess.CompletedProcess[str]:
    """Trains for one step in `folder`; the environment's module is on PYTHONPATH only."""
    (folder / "modules").mkdir(exist_ok=True)
    (folder / "modules" / "misbehaving.py").write_text(FLAKY)
    write_questions(folder / "data" / "calculator")
    settings = {
        "trainer.run_dir": run_dir,
        "trainer.max_steps": 1,
        "trainer.policy.model.path": ROOT / "models" / "quickstart",
        "generator.max_turns": 1,
        "data.max_val_questions": 4,
        "environment.timeout": 0.5,
        "environment.settings.folder": folder,
    }
    command = [sys.executable, str(ROOT / "launch.py"), "--config", str(ROOT / "configs" / "calculator.yaml")]
    environment = os.environ | {"PYTHONPATH": str(folder / "modules")}
    return subprocess.run(
        [*command, *(f"{key}={value}" for key, value in settings.items()), *more],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )


def test_failures_are_played_again_and_a_timeout_is_an_outcome(tmp_path: Path) -> None:
    done = launch(tmp_path, "run", "environment.env_class=misbehaving:Flaky", "generator.sampling_params.stop=[]")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {"crash", "raise", "burn"} <= {path.name for path in tmp_path.iterdir()}
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (step,) = [line for line in lines if line["kind"] == "train"]
    assert step["generate/episodes"] == 32
    assert step["outcome/infrastructure"] == 0
    assert step["outcome/timeout"] == pytest.approx(1 / 32)
    episodes = [
        json.loads(line) for line in (tmp_path / "run/trajectories/train_000001.jsonl").read_text().splitlines()
    ]
    assert len({(episode["task_id"], episode["sample"]) for episode in episodes}) == 32
    log = (tmp_path / "run" / "service.log").read_text()
    assert "ValueError: a bug" in log
    assert "misbehaving.py" in log


def test_what_always_fails_ends_the_run_and_is_named(tmp_path: Path) -> None:
    done = launch(tmp_path, "run", "environment.env_class=misbehaving:Broken")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "episodes failed 3 times each for reasons other than the model" in done.stderr
    assert "environment misbehaving:Broken: reset of task 'train" in done.stderr
    assert "KeyError: 'no such field' (misbehaving.py, line" in done.stderr
    assert "Traceback" not in done.stderr
