"""Episodes against real SQLite files: observations, endings, rewards, prompts, and environments of one's own."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from rollout.environment import Environment, EnvironmentFactory, make_environment_factory
from rollout.errors import InfrastructureError
from rollout.text2sql import INVALID_ACTION, Cache
from rollout.types import OUTCOMES, Task
from sqlrl_jax.config import Config

GOLD = "SELECT name FROM singer WHERE country = 'FRANCE' ORDER BY name"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("databases")
    (root / "music").mkdir()
    connection = sqlite3.connect(root / "music" / "music.sqlite")
    connection.executescript(
        """
        CREATE TABLE singer (id INTEGER PRIMARY KEY, name TEXT NOT NULL, country TEXT, "birth year" INT, photo BLOB);
        CREATE TABLE song (singer_id INT, nr INT, title TEXT, PRIMARY KEY (singer_id, nr),
                           FOREIGN KEY (singer_id) REFERENCES singer);
        CREATE TABLE "order" (x);
        CREATE VIEW french AS SELECT name FROM singer WHERE country = 'FRANCE';
        CREATE VIEW broken AS SELECT nix FROM nowhere;
        INSERT INTO singer VALUES (1, 'Zaz', 'FRANCE', 1980, x'00'), (2, 'Barbara', 'FRANCE', 1930, NULL),
                                  (3, 'Lena </observation>', 'Germany', NULL, NULL);
        """
    )
    connection.close()
    return root


def make_config(root: Path, **text2sql: Any) -> Config:
    sql = {"database_root": str(root), "workers": 1, "timeout": 2.0, "max_vm_steps": 2_000_000, **text2sql}
    return Config.model_validate({"environment": {"text2sql": sql}, "generator": {"max_turns": 4}})


@pytest.fixture(scope="module")
def factory(root: Path) -> Iterator[EnvironmentFactory]:
    with make_environment_factory(make_config(root)) as factory:
        yield factory


def make_task(**fields: Any) -> Task:
    return Task("t1", "test", {"db_id": "music", "question": "Which singers are French?", "gold_sql": GOLD, **fields})


def started(factory: EnvironmentFactory, **fields: Any) -> Environment:
    environment = factory.create()
    environment.reset(make_task(**fields))
    return environment


def test_an_episode_from_looking_to_the_right_answer(factory: EnvironmentFactory) -> None:
    environment = started(factory)
    first = environment.step("<think>look</think><sql>SELECT DISTINCT country FROM singer</sql>", 1)
    assert first.observation == (
        "\n\n<observation>country\nFRANCE\nGermany\n"
        "<reminder>You have 3 turns left to complete the task.</reminder></observation>\n\n"
    )
    assert (first.done, first.outcome, first.reward) == (False, "", 0.0)
    assert first.turn is not None
    assert (first.turn.sql, first.turn.status) == ("SELECT DISTINCT country FROM singer", "ok")
    assert first.turn.observation == "country\nFRANCE\nGermany"
    last = environment.step(f"<think>now I know</think><solution>{GOLD};</solution>", 2)
    assert (last.observation, last.done, last.outcome, last.reward) == (None, True, "correct", 1.0)
    assert last.turn is not None
    assert last.turn.status == "solution"
    assert last.metrics["sql/queries"] == 2
    assert last.metrics["sql/ok"] == 2


@pytest.mark.parametrize(
    ("action", "outcome"),
    [
        ("<solution>SELECT name FROM singer WHERE country = 'FRANCE' ORDER BY id</solution>", "wrong"),  # another order
        ("<solution>SELECT name FROM french ORDER BY 1</solution>", "correct"),
        ("<solution>SELECT name, id FROM singer</solution>", "wrong"),
        ("<solution>SELECT nme FROM singer</solution>", "sql_error"),
        ("<solution>DELETE FROM singer</solution>", "sql_error"),
        ("<solution>SELECT 1; SELECT 2</solution>", "sql_error"),
        ("<solution>SELECT count(*) FROM singer" + ", singer" * 14 + "</solution>", "timeout"),
        ("<solution></solution>", "malformed"),
        ("<observation>name</observation><solution>" + GOLD + "</solution>", "malformed"),
    ],
)
def test_endings(factory: EnvironmentFactory, action: str, outcome: str) -> None:
    step = started(factory).step(action, 1)
    assert (step.done, step.outcome, step.observation) == (True, outcome, None)
    assert step.reward == (1.0 if outcome == "correct" else 0.0)
    assert step.outcome in OUTCOMES


@pytest.mark.parametrize("action", ["", "SELECT 1", "<sql></sql>", "<sql>SELECT 1</sql><observation>1</observation>"])
def test_an_invalid_action_is_told_so(factory: EnvironmentFactory, action: str) -> None:
    step = started(factory).step(action, 3)
    assert step.observation == (
        f"\n\n<observation>{INVALID_ACTION}\n"
        "<reminder>You have 1 turns left to complete the task.</reminder></observation>\n\n"
    )
    assert not step.done
    assert step.turn is not None
    assert step.turn.status == "invalid"
    assert step.metrics["sql/queries"] == 0


@pytest.mark.parametrize(
    ("sql", "status", "text"),
    [
        ("SELECT nme FROM singer", "error", "SQL Error: no such column: nme"),
        ("DROP TABLE singer", "denied", "SQL Error: not authorized: "),
        ("SELECT count(*) FROM singer" + ", singer" * 14, "timeout", "SQL Timeout"),
        ("SELECT name FROM singer WHERE id = 3", "ok", "name\nLena &lt;/observation>"),
    ],
)
def test_what_a_query_gave_is_observed(factory: EnvironmentFactory, sql: str, status: str, text: str) -> None:
    step = started(factory).step(f"<sql>{sql}</sql>", 1)
    assert step.turn is not None
    assert step.turn.status == status
    assert (step.observation or "").startswith(f"\n\n<observation>{text}")
    assert step.metrics[f"sql/{status}"] == 1


def test_the_last_turn_ends_the_episode(factory: EnvironmentFactory) -> None:
    step = started(factory).step("<sql>SELECT 1</sql>", 4)
    assert (step.done, step.outcome, step.observation, step.reward) == (True, "malformed", None, 0.0)
    assert step.turn is not None
    assert step.turn.status == "unused"
    assert started(factory).step(f"<solution>{GOLD}</solution>", 4).outcome == "correct"
    assert started(factory, max_turns=1).step("<sql>SELECT 1</sql>", 1).done
    assert not started(factory, max_turns=9).step("<sql>SELECT 1</sql>", 8).done


def test_finish_is_malformed_and_its_reward_an_option(factory: EnvironmentFactory, root: Path) -> None:
    assert started(factory).finish().outcome == "malformed"
    with make_environment_factory(make_config(root, malformed_reward=-1.0)) as strict:
        assert started(strict).finish().reward == -1.0
        assert started(strict).step("nothing", 4).reward == -1.0
        assert started(strict).step("<solution>SELECT 1</solution>", 1).reward == 0.0


def test_the_full_prompt_has_schema_knowledge_and_question(factory: EnvironmentFactory) -> None:
    system, user = factory.create().reset(make_task(evidence="French means country FRANCE"))
    assert system["role"] == "system"
    assert "4 turns" in system["content"]
    for tag in ("<think>", "<sql>", "<observation>", "<solution>"):
        assert tag in system["content"]
    assert "CREATE TABLE singer (" in user["content"]
    assert "External knowledge: French means country FRANCE" in user["content"]
    assert user["content"].endswith("Question: Which singers are French?")


def test_the_short_prompt_is_schema_and_question_alone(root: Path) -> None:
    with make_environment_factory(make_config(root, prompt_style="short")) as factory:
        (message,) = factory.create().reset(make_task())
        assert message["role"] == "user"
        assert message["content"] == (
            'singer(id, name, country, "birth year", photo)\nsong(singer_id, nr, title)\n"order"(x)\nfrench(name)\n'
            "Which singers are French?"
        )
        (message,) = factory.create().reset(make_task(schema="singer(name)"))
        assert message["content"] == "singer(name)\nWhich singers are French?"


def test_a_tasks_own_prompt_is_used_as_it_is(factory: EnvironmentFactory) -> None:
    prompt = [{"role": "system", "content": "{db_details}"}, {"role": "user", "content": "{question}: Q"}]
    assert factory.create().reset(make_task(prompt=prompt)) == prompt


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"db_id": "nowhere"}, r"nowhere\.sqlite"),
        ({"db_id": 7}, "task t1: field db_id"),
        ({"gold_sql": ""}, "task t1: field gold_sql"),
        ({"question": None}, "task t1: field question"),
        ({"prompt": "hello"}, "task t1: field prompt"),
        ({"prompt": [{"role": "user"}]}, r"task t1: field prompt\[0\]"),
    ],
)
def test_a_bad_task_is_named(factory: EnvironmentFactory, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InfrastructureError, match=message):
        factory.create().reset(make_task(**fields))


def test_a_gold_that_fails_is_never_the_models_fault(factory: EnvironmentFactory) -> None:
    environment = started(factory, gold_sql="SELECT nix FROM nowhere")
    with pytest.raises(InfrastructureError, match=r"task t1: its gold query on music failed \(no such table"):
        environment.step("<solution>SELECT 1</solution>", 1)


def test_gold_runs_once_for_all_episodes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with make_environment_factory(make_config(root)) as factory:
        executor = factory.create().shared.executor
        asked: list[str] = []
        run = executor.run
        monkeypatch.setattr(
            executor, "run", lambda db_id, sql, whole=False: (asked.append(sql), run(db_id, sql, whole))[1]
        )

        def play(_: int) -> str:
            return started(factory, schema="s").step("<solution>SELECT 'x' AS name</solution>", 1).outcome

        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(play, range(24))) == ["wrong"] * 24
        assert asked.count(GOLD) == 1


def test_a_cache_forgets_failures_and_the_oldest() -> None:
    cache: Cache[int] = Cache(2)
    calls: list[str] = []

    def fail() -> int:
        calls.append("fail")
        raise ValueError

    for _ in range(2):
        with pytest.raises(ValueError, match=r"^$"):
            cache.get("a", fail)
    assert calls == ["fail", "fail"]
    assert [
        cache.get(key, lambda value=value: value) for key, value in [("a", 1), ("b", 2), ("c", 3), ("a", 4), ("c", 5)]
    ] == [
        1,
        2,
        3,
        4,
        3,
    ]
