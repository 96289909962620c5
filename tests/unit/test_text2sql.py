"""Text-to-SQL's options: gradings and measures, the format check, databases in folders; and any text a model may write."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.environment import Environment, EnvironmentFactory, StepResult, make_environment_factory
from rollout.errors import InfrastructureError
from rollout.sql import actions
from rollout.types import Task
from sqlrl_jax import config_file
from sqlrl_jax.config import Config, ConfigError

GOLD = "SELECT name, age FROM p WHERE age > 20"
STATUSES = {"ok", "denied", "error", "timeout", "solution", "unused", "invalid"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("databases")
    for name in ("sets/one/people", "people", "other"):
        folder = root / name
        folder.mkdir(parents=True)
        connection = sqlite3.connect(folder / f"{folder.name}.sqlite")
        connection.executescript(
            "CREATE TABLE p (name TEXT, age INT); INSERT INTO p VALUES ('a', 20), ('b', 30), ('c', 40), ('c', 40)"
        )
        if name == "people":
            connection.execute("INSERT INTO p VALUES ('d', 50)")
            connection.commit()
        connection.close()
    return root


def make_config(root: Path, **text2sql: Any) -> Config:
    sql = {"database_root": str(root), "workers": 1, "timeout": 2.0, "max_vm_steps": 500_000, **text2sql}
    return Config.model_validate({"environment": {"text2sql": sql}, "generator": {"max_turns": 4}})


def start(factory: EnvironmentFactory, **fields: Any) -> Environment:
    environment = factory.create()
    fields = {"db_id": "people", "question": "Who?", "gold_sql": GOLD, "schema": "p(name, age)", **fields}
    environment.reset(Task("t1", "test", fields))
    return environment


def answer(factory: EnvironmentFactory, sql: str, **fields: Any) -> StepResult:
    return start(factory, **fields).step(f"<solution>{sql}</solution>", 1)


@pytest.fixture(scope="module")
def factory(root: Path) -> Iterator[EnvironmentFactory]:
    config = make_config(
        root,
        measures=["rows", "bird_set", "spider_test_suite"],
        test_suite_root=str(root / "sets" / "one"),
    )
    with make_environment_factory(config) as factory:
        yield factory


def grades(step: StepResult) -> dict[str, float]:
    return {name.removeprefix("grade/"): v for name, v in step.metrics.items() if name.startswith("grade/")}


@pytest.mark.parametrize(
    ("sql", "outcome", "rows", "bird", "suite"),
    [
        (GOLD, "correct", 1, 1, 1),
        ("SELECT DISTINCT name, age FROM p WHERE age > 20", "wrong", 0, 1, 1),
        ("SELECT age, name FROM p WHERE age > 20", "wrong", 0, 0, 1),
        ("SELECT name, age FROM p WHERE age > 20 LIMIT 4", "correct", 1, 1, 1),
        ("SELECT name, age FROM p", "wrong", 0, 0, 0),
        ("SELECT nme FROM p", "sql_error", 0, 0, 0),
    ],
)
def test_every_measure_is_reported(
    factory: EnvironmentFactory, sql: str, outcome: str, rows: int, bird: int, suite: int
) -> None:
    step = answer(factory, sql)
    assert step.outcome == outcome
    assert step.reward == float(outcome == "correct")
    assert grades(step) == {"rows": rows, "bird_set": bird, "spider_test_suite": suite}


def test_an_episode_without_an_answer_is_wrong_by_every_measure(factory: EnvironmentFactory) -> None:
    zero = {"rows": 0.0, "bird_set": 0.0, "spider_test_suite": 0.0}
    assert grades(start(factory).finish()) == zero
    assert grades(start(factory).step("<sql>SELECT 1</sql>", 4)) == zero
    assert grades(answer(factory, "")) == zero


def test_only_measures_that_can_be_taken_are_reported(factory: EnvironmentFactory) -> None:
    results = [{"columns": [["1"]], "ignore_order": True}]
    for fields, reported in (({"db_id": "other"}, {"rows", "bird_set"}), ({"gold_results": results}, set())):
        for step in (
            start(factory, **fields).finish(),
            answer(factory, "", **fields),
            answer(factory, "SELECT nme", **fields),
            answer(factory, "SELECT name FROM p", **fields),
        ):
            assert set(grades(step)) == reported


def test_what_can_not_be_graded_is_told_before_the_model_is_asked(root: Path) -> None:
    options = {"grading": "spider_test_suite", "test_suite_root": str(root / "sets" / "one")}
    with make_environment_factory(make_config(root, **options)) as factory:
        start(factory)
        with pytest.raises(InfrastructureError, match=r"task t1: no databases in .*other .*test_suite_root"):
            start(factory, db_id="other")
        with pytest.raises(InfrastructureError, match="database nowhere"):
            start(factory, db_id="nowhere")


@pytest.mark.parametrize("name", ["db_id", "db_root", "question", "gold_sql", "evidence", "schema"])
@pytest.mark.parametrize("value", [7, ["x"], {"a": 1}, True])
def test_a_field_that_is_no_text_is_named(factory: EnvironmentFactory, name: str, value: Any) -> None:
    with pytest.raises(InfrastructureError, match=f"task t1: field {name}: expected text, found"):
        start(factory, **{name: value})


def test_the_grading_decides_the_reward(root: Path) -> None:
    doubled = "SELECT DISTINCT name, age FROM p WHERE age > 20"
    turned = "SELECT age, name FROM p WHERE age > 20"
    for options, expected in (
        ({}, (0.0, 0.0)),
        ({"column_permutation": True}, (0.0, 1.0)),
        ({"grading": "bird_set"}, (1.0, 0.0)),
        ({"grading": "spider_test_suite", "test_suite_root": str(root)}, (1.0, 1.0)),
        ({"grading": "spider_test_suite", "test_suite_root": str(root), "test_suite_keep_distinct": True}, (0.0, 1.0)),
    ):
        with make_environment_factory(make_config(root, **options)) as factory:
            assert (answer(factory, doubled).reward, answer(factory, turned).reward) == expected, options


def test_a_solution_has_a_hash_to_vote_with(factory: EnvironmentFactory) -> None:
    def vote(sql: str) -> str:
        turn = answer(factory, sql).turn
        assert turn is not None
        return turn.answer

    assert vote(GOLD) == vote("SELECT p.name, age FROM p WHERE age >= 30 ORDER BY 1 DESC") != ""
    assert vote("SELECT name FROM p") not in (vote(GOLD), "")
    assert vote("SELECT nme FROM p") == ""
    looked = start(factory).step(f"<sql>{GOLD}</sql>", 1).turn
    assert looked is not None
    assert looked.answer == ""


def test_a_database_may_lie_in_a_folder(factory: EnvironmentFactory) -> None:
    four = "SELECT name, age FROM p WHERE age > 20 LIMIT 3"
    assert answer(factory, four).outcome == "wrong"  # here there are four
    assert answer(factory, four, db_root="sets/one").outcome == "correct"
    assert answer(factory, four, db_root="sets/one/").outcome == "correct"
    assert answer(factory, four, db_root="").outcome == "wrong"
    with pytest.raises(InfrastructureError, match=r"sets.two"):
        answer(factory, four, db_root="sets/two")
    with pytest.raises(InfrastructureError, match="task t1: field db_root: expected text, found 7"):
        answer(factory, four, db_root=7)
    with pytest.raises(InfrastructureError, match="db_id"):
        answer(factory, four, db_root="../sets/one")
    text = factory.create().reset(
        Task("t", "", {"db_id": "people", "db_root": "sets/one", "question": "Who?", "gold_sql": GOLD})
    )
    assert "name TEXT" in text[-1]["content"]


THINK, LOOK = "<think>hm</think>", "<sql>SELECT 1</sql>"
SOLVE = f"<solution>{GOLD}</solution>"


@pytest.mark.parametrize(
    ("actions_of_episode", "well_formed"),
    [
        ([THINK + SOLVE], True),
        ([SOLVE + THINK], True),
        ([SOLVE], False),  # no thought at all
        ([THINK + LOOK, THINK + SOLVE], True),
        ([THINK + LOOK, SOLVE], False),  # none after the observation
        ([LOOK, THINK + SOLVE], True),
        ([THINK + LOOK, "so " + THINK + SOLVE], False),  # not the first thing after it
        ([THINK + LOOK, " \n" + THINK + SOLVE], True),
        ([THINK + LOOK, LOOK, THINK + SOLVE], False),
        (["<think>hm" + SOLVE], False),
        ([THINK + SOLVE + SOLVE], False),  # two solutions
        ([THINK + SOLVE + "<solution>"], False),
        (["<think>not <solution>SELECT 1</solution></think>" + SOLVE], True),
    ],
)
def test_the_format_is_checked_if_asked(root: Path, actions_of_episode: list[str], well_formed: bool) -> None:
    for options, expected in (({}, True), ({"require_think": True, "malformed_reward": -1.0}, well_formed)):
        with make_environment_factory(make_config(root, **options)) as factory:
            environment = start(factory)
            for number, action in enumerate(actions_of_episode, 1):
                step = environment.step(action, number)
            assert step.done
            assert (step.outcome, step.reward) == (("correct", 1.0) if expected else ("malformed", -1.0))


@pytest.mark.parametrize(
    ("sql", "outcome", "reward"),
    [
        (GOLD, "correct", 1.0),
        ("SELECT name, age FROM p", "wrong", 0.1),
        ("SELECT name, age FROM p WHERE age > 99", "wrong", 0.0),  # no rows
        ("SELECT 1", "wrong", 0.0),  # rows, of no table
        ("WITH c AS (SELECT 1) SELECT * FROM c", "wrong", 0.0),
        ("SELECT name FROM nowhere", "sql_error", 0.0),
        ("DELETE FROM p", "sql_error", 0.0),
        ("", "malformed", 0.0),
    ],
)
def test_a_wrong_answer_that_found_rows_may_earn_a_part(root: Path, sql: str, outcome: str, reward: float) -> None:
    with make_environment_factory(make_config(root, partial_reward=0.1)) as factory:
        environment = start(factory)
        step = environment.step(f"<solution>{sql}</solution>", 4)
        assert (step.outcome, step.reward) == (outcome, reward)


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("", actions.Form(False, False, 0)),
        ("<think>", actions.Form(False, False, 0)),
        ("</think> <think>", actions.Form(False, False, 0)),
        ("\n<think></think>", actions.Form(True, True, 0)),
        ("a <think></think>", actions.Form(True, False, 0)),
        ("<solution><think></solution></think>", actions.Form(True, False, 1)),
    ],
)
def test_forms(text: str, form: actions.Form) -> None:
    assert actions.form(text) == form


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["environment.text2sql.grading=spider_test_suite"], "spider_test_suite needs test_suite_root"),
        (["environment.text2sql.measures=[rows, spider_test_suite]"], "spider_test_suite needs test_suite_root"),
        (
            [
                "environment.text2sql.grading=spider_test_suite",
                "environment.text2sql.test_suite_root=x",
                "environment.text2sql.engine=duckdb",
            ],
            "needs engine sqlite",
        ),
        (["environment.text2sql.grading=bird"], "allowed is rows | bird_set | spider_test_suite"),
        (["environment.text2sql.measures=[bird]"], "allowed is list of rows | bird_set | spider_test_suite"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_file.load(None, settings)
    assert message in str(caught.value)


TAGS = "<think> </think> <sql> </sql> <solution> </solution> <observation> </observation> ```sql ``` ; ' -- SELECT 1"
PIECES = st.sampled_from([*TAGS.split(), " ", "\n", "\0", "\ud800", "😀", "FROM p", GOLD, "WITH x AS (SELECT 1)"])
WRITTEN = st.one_of(
    st.binary(max_size=80).map(lambda b: b.decode("utf-8", "replace")),
    st.binary(max_size=80).map(lambda b: b.decode("utf-8", "surrogateescape")),
    st.lists(PIECES, max_size=12).map("".join),
)


@settings(max_examples=200, deadline=None)
@given(WRITTEN)
def test_any_text_is_an_action(text: str) -> None:
    action = actions.parse(text)
    assert action.kind in ("sql", "solution", "none")
    assert bool(action.sql) == (action.kind != "none")
    assert actions.form(text).solutions >= action.answered


@settings(max_examples=150, deadline=None)
@given(WRITTEN, st.integers(1, 4))
def test_any_text_is_a_step(factory: EnvironmentFactory, text: str, turn: int) -> None:
    check_step(start(factory).step(text, turn))


@settings(max_examples=150, deadline=None)
@given(st.one_of(WRITTEN, st.text(max_size=60)), st.sampled_from(["sql", "solution"]))
def test_any_text_is_a_query_or_an_answer(factory: EnvironmentFactory, sql: str, tag: str) -> None:
    check_step(start(factory).step(f"<{tag}>{sql}</{tag}>", 1))


def check_step(step: StepResult) -> None:
    assert step.turn is not None
    assert step.turn.status in STATUSES
    assert step.done == (step.observation is None)
    assert step.reward == float(step.outcome == "correct")
    assert (step.observation or "").count("</observation>") <= 1
