"""The second built-in environment: sums, episodes through the same door as anybody's, its questions and configuration."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.calculator import Calculator, evaluate, main, make_questions
from rollout.environment import Environment, make_environment_factory
from rollout.environment_host import Hosted
from rollout.types import Task, Trajectory
from sqlrl_jax import config_file
from sqlrl_jax.config import Config
from sqlrl_jax.data.questions import load_questions
from sqlrl_jax.data.tasks import DataError, read_tasks
from sqlrl_jax.run import episode_record

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "calculator.yaml"


@pytest.fixture(scope="module")
def start() -> Iterator[Callable[..., Environment]]:
    with make_environment_factory(config_file.load(CONFIG, ["environment.workers=1"])) as factory:

        def start(**fields: Any) -> Environment:
            game = factory.create()
            game.reset(Task("t", "unit", {"question": "3 times 9?", "answer": "27", "max_turns": 3, **fields}))
            return game

        yield start


def test_an_episode_with_the_tool(start: Callable[..., Environment]) -> None:
    game = start()
    assert isinstance(game, Hosted)
    used = game.step("Let me see. <calc>3 * 9</calc>", 1)
    assert (used.observation, used.reward, used.done) == ("\n<result>27</result>\n", 0.1, False)
    assert game.step("<calc>27 / 2</calc>", 2).reward == 0.0
    last = game.step("<answer>27.0</answer>", 3)
    assert (last.reward, last.done, last.outcome, last.metrics) == (1.0, True, "correct", {"environment/uses": 2.0})


@pytest.mark.parametrize(
    ("action", "status", "observation"),
    [
        ("27", "invalid", "Write <calc>…</calc> or <answer>…</answer>."),
        ("<calc>9**9**9</calc>", "error", "error: only numbers, + - * / and brackets"),
        ("<calc>__import__('os')</calc>", "error", "error: only numbers, + - * / and brackets"),
        ("<calc>1/0</calc>", "error", "error: division by zero"),
        ("<calc>" + "1e308*" * 29 + "1</calc>", "error", "error: too large"),
        ("<answer>1/" + "1e308/" * 29 + "1</answer>", "error", "error: too large"),
        ("<calc>" + "(" * 150 + "</calc>", "error", "error: "),
        ("<calc>" + "-" * 199 + "1</calc>", "ok", "-1"),
        ("<calc></calc>", "error", "error: "),
        ("<answer>what</answer>", "error", "error: only"),
    ],
)
def test_what_is_not_a_sum_is_told_so(
    start: Callable[..., Environment], action: str, status: str, observation: str
) -> None:
    step = start().step(action, 1)
    assert not step.done
    assert step.turn is not None
    assert step.turn.status == status
    assert step.turn.observation.startswith(observation)


def test_a_wrong_answer_and_none(start: Callable[..., Environment]) -> None:
    wrong = start().step("<answer>26</answer>", 1)
    assert (wrong.reward, wrong.done, wrong.outcome) == (0.0, True, "wrong")
    assert start().finish().outcome == "malformed"


numbers = st.integers(0, 99).map(str)
sums = st.recursive(numbers, lambda s: st.builds("({} {} {})".format, s, st.sampled_from("+-*"), s), max_leaves=8)


@given(sums)
def test_sums_are_what_python_says(text: str) -> None:
    assert evaluate(text) == eval(text)


@given(st.text(max_size=300))
def test_any_text_is_a_step(text: str) -> None:
    game = Calculator(Config(), None)
    game.reset(Task("t", "", {"question": "?", "answer": "1"}))
    game.step(f"<calc>{text}</calc>", 1)


def test_decimals_are_exact() -> None:
    assert evaluate("0.1 + 0.2") == Fraction(3, 10)


def test_the_configurations_data_are_what_the_generator_writes(tmp_path: Path) -> None:
    main(tmp_path)
    config = config_file.load(
        CONFIG, [f"data.train_data=[{tmp_path}/train.jsonl]", f"data.val_data=[{tmp_path}/heldout.jsonl]"]
    )
    questions = load_questions(config)
    assert (len(questions.train), len(questions.val)) == (512, 16)
    assert set(questions.train[0].fields) == {"question", "answer"}  # no database, no SQL
    assert make_questions(3, 1, "x") == make_questions(3, 1, "x") != make_questions(3, 2, "x")


def test_other_environments_tasks_need_an_id_alone(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text('{"id": "a", "schema": {"x": [1]}, "evidence": 3}\n')
    assert read_tasks(path, ("id",))[0].fields["schema"] == {"x": [1]}
    path.write_text('{"id": "a"}\n{"word": "b"}\n')
    with pytest.raises(DataError, match=r"own\.jsonl:2: field id is missing; required are id$"):
        read_tasks(path, ("id",))


def test_a_tasks_own_fields_do_not_hide_the_records() -> None:
    fields = {"kind": "sum", "step": "first", "reward": "none", "word": "x"}
    episode = Trajectory("t", "s", 0, [], [], [], [], [], 0.5, "wrong", "done")
    record = episode_record("train", 7, episode, Task("t", "s", fields), lambda ids: "")
    assert (record["kind"], record["step"], record["reward"], record["word"]) == ("train", 7, 0.5, "x")
    json.dumps(record)
