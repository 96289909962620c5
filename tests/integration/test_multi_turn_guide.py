"""docs/multi-turn-training.md does what it says: its commands run, and print what it shows."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rollout.chat import Chat, load_tokenizer
from sqlrl_jax.rl.advantages import grpo

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs" / "multi-turn-training.md").read_text(encoding="utf-8")
TRAIN, REPORT = re.findall(r"^ {4}(python launch\.py .*)$", GUIDE, re.MULTILINE)
(SCRIPT,) = re.findall(r"^```python\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)


def shown(first: str) -> str:
    """The indented block of the guide that begins with `first`."""
    lines = GUIDE[GUIDE.index(f"    {first}") :].splitlines()
    end = next(number for number, line in enumerate(lines) if not line.startswith("    "))
    return "\n".join(line[4:] for line in lines[:end])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like the repository's, whose runs and data are its own."""
    folder = tmp_path_factory.mktemp("guide")
    for name in ("launch.py", "configs", "models"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def run(folder: Path, command: list[str]) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def output(folder: Path) -> str:
    """What training prints."""
    return run(folder, [sys.executable, *TRAIN.split()[1:]])


def test_an_episode_is_printed_as_shown(output):
    printed = "\n".join(line.rstrip() for line in output.splitlines())
    assert shown("episode    of step 1, train_00090") in printed


def test_the_script_prints_the_trajectory_as_shown(folder, output):
    printed = run(folder, [sys.executable, "-c", SCRIPT])
    assert shown("train_00090-1 sample 0: correct, reward 1, weights") in printed


def test_the_group_and_its_advantages_are_as_shown(folder, output):
    path = folder / "runs/guide/trajectories/train_000001.jsonl"
    episodes = [json.loads(line) for line in path.read_text().splitlines()]
    rewards = np.array([e["reward"] for e in episodes])
    advantages = grpo(rewards, [e["task_id"] for e in episodes])
    names = [f"{e['task_id']} sample {e['sample']}: {e['outcome']}, reward {e['reward']:g}" for e in episodes]
    lines = [f"{name:<48} advantage {a:6.3f}" for name, a in zip(names, advantages, strict=True)]
    assert shown("train_00090-1 sample 0: correct, reward 1        advantage") == "\n".join(lines[8:12])
    assert [round(float(a), 2) for a in advantages] == [0.0] * 8 + [0.87, 0.87, -0.87, -0.87, -0.5, -0.5, -0.5, 1.5]


def test_a_conversation_reads_what_is_shown():
    chat = Chat(load_tokenizer(ROOT / "models/quickstart"), conversation=True)
    observation = re.search(r"read     19 tokens    0.00  '(.*)'", GUIDE)
    assert observation is not None
    text = observation[1].replace("\\n", "\n")
    turn = chat.encode_action("<think>test</think><sql>SELECT MIN(hours) FROM repair</sql>", end=False)
    assert chat.decode(chat.observation_ids(text, turn)).replace("\n", "\\n") == shown("<|im_end|>\\n")


def test_the_report_is_written(folder, output):
    assert run(folder, [sys.executable, *REPORT.split()[1:]]).strip() == "runs/guide/report.html"
