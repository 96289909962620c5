"""docs/environments.md does what it says: its files, in a folder of their own, train for two steps with its command."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rollout.environment import make_environment_factory
from rollout.types import Task
from sqlrl_jax.config import Config

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs" / "environments.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)
FILES = ("words.py", "train.jsonl", "heldout.jsonl", "words.yaml")


def blocks(language: str) -> list[str]:
    return [text for kind, text in BLOCKS if kind == language]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The guide's files: each is the first block after the sentence that names it."""
    folder = tmp_path_factory.mktemp("words")
    for name in FILES:
        after = GUIDE[GUIDE.index(f"`{name}`") :]
        found = re.search(r"^```\w+\n(.*?)^```$", after, re.MULTILINE | re.DOTALL)
        assert found is not None
        (folder / name).write_text(found[1], encoding="utf-8")
    return folder


def run(folder: Path, command: str, expected: int = 0) -> str:
    """A command of the guide as a person would give it, with this Python as `python`."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"SQLRL": str(ROOT), "PATH": path}
    done = subprocess.run(
        ["sh", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == expected, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    (command,) = blocks("sh")
    run(folder, command)
    return folder / yaml.safe_load((folder / "words.yaml").read_text())["trainer"]["run_dir"]


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_guides_environment_trains_for_two_steps_outside_of_the_repository(trained: Path) -> None:
    assert not trained.is_relative_to(ROOT)
    metrics = records(trained / "metrics.jsonl")
    steps = [m for m in metrics if m["kind"] == "train"]
    assert [m["step"] for m in steps] == [1, 2]
    assert all(m["generate/episodes"] == 16 and m["policy/grad_norm"] > 0 for m in steps)
    assert all(0 <= m["environment/closeness"] <= 1 for m in steps)
    last = [m for m in metrics if m["kind"] == "eval" and m["max_turns"] == 3][-1]
    assert last["eval/questions"] == 2
    assert 0 <= last["eval/environment/closeness"] <= 1


def test_rewards_by_step_add_up_and_reach_the_learner(trained: Path) -> None:
    for step in (1, 2):
        episodes = records(trained / "trajectories" / f"train_{step:06d}.jsonl")
        assert len({e["reward"] for e in episodes}) > 1
        for episode in episodes:
            turns = episode["turns"]
            assert episode["reward"] == pytest.approx(sum(turn["reward"] for turn in turns))
            assert episode["reward"] == pytest.approx(
                episode["metrics"]["environment/closeness"] - 0.01 * len(turns), abs=1e-6
            )
            assert episode["outcome"] in ("correct", "wrong", "overflow")
            assert all(turn["observation"].startswith("\n") and turn["status"] in ("ok", "solution") for turn in turns)
        (line,) = [m for m in records(trained / "metrics.jsonl") if (m["kind"], m["step"]) == ("train", step)]
        assert line["reward/avg_raw_reward"] == pytest.approx(sum(e["reward"] for e in episodes) / len(episodes))


def test_the_report_is_about_the_environment_and_not_about_sql(trained: Path) -> None:
    page = (trained / "report.html").read_text(encoding="utf-8")
    assert "closeness" in page
    assert "Failed queries" not in page
    assert "gold query" not in page


def test_a_misspelt_class_ends_the_run_with_one_sentence(folder: Path) -> None:
    (command,) = blocks("sh")
    output = run(
        folder, f"{command.strip()} environment.env_class=words:Word trainer.run_dir=runs/misspelt", expected=2
    )
    assert "has no class Word; did you mean 'words:Words'?" in output
    assert "Traceback" not in output


def test_trying_it_by_hand_works(folder: Path) -> None:
    (code,) = [text for text in blocks("python") if "game.step" in text]
    output = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert output.returncode == 0, output.stderr
    assert "Guess a word of 5 letters" in output.stdout
    assert "_able" in output.stdout


def test_another_reward_for_sql(tmp_path: Path) -> None:
    import sqlite3

    (code,) = [text for text in blocks("python") if "Text2SQL" in text]
    (tmp_path / "curious.py").write_text(code)
    (tmp_path / "shop").mkdir()
    with sqlite3.connect(tmp_path / "shop" / "shop.sqlite") as database:
        database.executescript("CREATE TABLE t (x); INSERT INTO t VALUES (1)")
    database.close()
    config = Config.model_validate(
        {
            "environment": {
                "env_class": "curious:Curious",
                "path": str(tmp_path),
                "workers": 1,
                "settings": {"bonus": 0.25},
                "text2sql": {"database_root": str(tmp_path), "workers": 1},
            }
        }
    )
    with make_environment_factory(config) as factory:
        episode = factory.create()
        episode.reset(Task("q", "test", {"db_id": "shop", "question": "?", "gold_sql": "SELECT x FROM t"}))
        looks = [episode.step("<sql>SELECT * FROM t</sql>", turn) for turn in (1, 2)]
        assert [look.reward for look in looks] == [0.25, 0.0]
        last = episode.step("<solution>SELECT x FROM t</solution>", 3)
        assert (last.reward, last.outcome, last.done) == (1.0, "correct", True)
        assert last.turn is not None
        assert last.turn.status == "solution"
        assert last.metrics["sql/queries"] == 3
