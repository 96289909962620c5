"""`launch.py ask`: a question to one's own database, from the command line to the answer's rows."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest

import launch
from rollout.environment import EnvironmentFactory
from rollout.types import Task
from sqlrl_jax.config import Config
from tests.unit.chat_server import ChatServer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "zoo.sqlite"
    with sqlite3.connect(path) as connection:
        connection.executescript("CREATE TABLE ship (id, region, level); INSERT INTO ship VALUES (1, 'north', 'base*')")
    connection.close()
    return path


def test_a_question_is_answered_by_looking_first(database: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = database.read_bytes()
    settings = ["generator.max_turns=3", "generator.sampling_params.max_generate_length=48"]
    command = ["ask", "--config", str(ROOT / "configs/quickstart.yaml"), "--model", str(ROOT / "models/quickstart")]
    question = "List the region of ship rows with level 'base'."
    status = launch.main([*command, "--database", str(database), question, *settings])
    printed = capfd.readouterr().out.strip().splitlines()
    answer = json.loads(printed[-1])
    assert status == (0 if answer["outcome"] == "answered" else 1)
    if answer["outcome"] == "answered":
        assert answer["sql"] in printed
    assert 1 <= answer["turns"] <= 3
    assert database.read_bytes() == before
    assert [p.name for p in database.parent.iterdir()] == ["zoo.sqlite"]


def test_a_served_model_is_asked_by_its_address_alone(database: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def policy(request: dict[str, Any]) -> str:
        looked = "<observation>" in request["messages"][-1]["content"]
        tag = "solution" if looked else "sql"
        return f"<think>so</think><{tag}>SELECT region FROM ship</{tag}>"

    with ChatServer(policy) as server:
        status = launch.main(["ask", "--server", server.url, "--database", str(database), "Which region?"])
    printed = capfd.readouterr().out.strip().splitlines()
    assert status == 0, printed
    assert json.loads(printed[-1]) == {"sql": "SELECT region FROM ship", "outcome": "answered", "turns": 2}
    assert "north" in printed


def test_mistakes_are_told_in_one_sentence(tmp_path: Path, database: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(*arguments: str) -> str:
        assert launch.main(["ask", *arguments, "How many?"]) == 2
        return capsys.readouterr().err

    assert "--model DIR" in error("--database", str(database))
    model = ["--model", str(ROOT / "models/quickstart")]
    assert "nowhere.sqlite: no such file" in error("--database", str(tmp_path / "nowhere.sqlite"), *model)
    assert launch.main(["ask", "--database", str(database), *model, " "]) == 2
    assert "the question is empty" in capsys.readouterr().err
    assert launch.main(["ask", "--database", str(database), *model, "How", "many?"]) == 2
    assert capsys.readouterr().err == "error: put the question in quotes: 'How many?'\n"
    (tmp_path / "second.db").write_bytes(database.read_bytes())
    assert "holds 2 databases (second, zoo)" in error("--database", str(tmp_path), *model)
    assert "no-model: no such model folder" in error("--database", str(database), "--model", str(tmp_path / "no-model"))


def test_asking_needs_no_gold_query_and_shows_the_result(tmp_path: Path, database: Path) -> None:
    from rollout.ask import Ask

    (tmp_path / "root" / "zoo").mkdir(parents=True)
    database.rename(tmp_path / "root" / "zoo" / "zoo.sqlite")
    sql = {"database_root": str(tmp_path / "root"), "workers": 1}
    config = Config.model_validate({"environment": {"text2sql": sql}})
    with EnvironmentFactory(Ask, config) as factory:
        for action, outcome, shown in (
            ("<solution>SELECT region FROM ship</solution>", "correct", "region\nnorth"),
            ("<solution>SELECT width FROM ship</solution>", "sql_error", "no such column: width"),
        ):
            environment = factory.create()
            environment.reset(Task("q", "ask", {"db_id": "zoo", "question": "Which region?", "max_turns": 3}))
            result = environment.step(action, 1)
            assert (result.done, result.outcome) == (True, outcome)
            assert result.turn is not None
            assert result.turn.observation == shown
