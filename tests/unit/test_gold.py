"""The gold check: every kind of problem is found and told, good golds pass, and training leaves the bad ones out."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest

import launch
from rollout.errors import InfrastructureError, UserError
from rollout.types import Task
from sqlrl_jax.config import Config
from sqlrl_jax.data.gold import GoldProblem, check_golds, main, without_bad_golds
from sqlrl_jax.data.tasks import read_tasks, write_tasks

CROSS = "SELECT count(*) FROM p, p, p, p"  # 10,000 rows to count, for every further table ten times as many


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("databases")
    for name in ("people", "sub/people", "broken"):
        (root / name).mkdir(parents=True)
        connection = sqlite3.connect(root / name / f"{name.rpartition('/')[2]}.sqlite")
        connection.executescript("CREATE TABLE p (id INTEGER PRIMARY KEY, team TEXT, age INT)")
        connection.executemany("INSERT INTO p VALUES (?, ?, ?)", [(i, "xyz"[i % 3], i // 2) for i in range(10)])
        connection.commit()
        connection.close()
    with (root / "broken" / "broken.sqlite").open("r+b") as file:
        file.write(b"not a database at all")
    return root


def config(root: Path, **settings: Any) -> Config:
    sql = {"database_root": str(root), "workers": 1, "max_vm_steps": 800_000, "timeout": 4.0}
    return Config.model_validate({"environment": {"text2sql": sql}, **settings})


def task(number: int, sql: str, question: str = "", **fields: Any) -> Task:
    fields = {"db_id": "people", "question": question or f"question {number}", "gold_sql": sql, **fields}
    return Task(f"q{number}", "test", fields)


GOOD = [
    "SELECT team FROM p WHERE age > 1",
    "SELECT id FROM p ORDER BY age",  # ties in the order alone are fine
    "SELECT id FROM p ORDER BY id LIMIT 1",
    "SELECT team, count(*) FROM p GROUP BY team",
    "SELECT date('2024-01-01'), count(*) FROM p",
    "SELECT CAST(age AS 'INT') FROM p ORDER BY age LIMIT 1",  # sqlglot can't read it, so ties aren't looked for
    "SELECT 0",
]
BAD = [
    ("SELECT nix FROM p", "failing", "no such column: nix"),
    ("DELETE FROM p", "failing", "not authorized"),
    ("SELECT 1; SELECT 2", "failing", "one statement"),
    (CROSS + ", p, p", "timeout", "needs more than 800,000 VM steps or 4 s"),
    (CROSS + ", p", "slow", "needs more than 25% of the limits"),
    ("SELECT id FROM p WHERE age > 100", "empty", "no rows"),
    ("SELECT max(age) FROM p WHERE age > 100", "empty", "nothing but NULL"),
    ("SELECT random(), 1", "volatile", "uses random()"),
    ("SELECT id, date('now') FROM p", "volatile", "uses date of now"),
    ("SELECT id FROM p ORDER BY age LIMIT 1", "ambiguous", "a LIMIT cuts through rows that tie: 0 or 1"),
    ("SELECT id, count(*) FROM p GROUP BY team", "ambiguous", "a column is neither grouped by nor aggregated"),
]


def test_good_golds_pass(root: Path) -> None:
    assert check_golds([task(i, sql) for i, sql in enumerate(GOOD)], config(root)) == []


@pytest.mark.parametrize(("sql", "kind", "detail"), BAD)
def test_each_kind_of_problem_is_found(root: Path, sql: str, kind: str, detail: str) -> None:
    (problem,) = check_golds([task(0, GOOD[0]), task(1, sql)], config(root))
    assert (problem.task_id, problem.kind) == ("q1", kind)
    assert detail in problem.detail


def test_missing_and_broken_databases_do_not_hide_the_rest(root: Path) -> None:
    tasks = [
        task(0, GOOD[0], db_id="nowhere"),
        task(1, GOOD[0], db_id="broken"),
        task(2, GOOD[0], db_root="sub"),
        task(3, GOOD[0], db_id="../people"),
        task(4, "SELECT nix FROM p"),
    ]
    problems = check_golds(tasks, config(root))
    assert [(p.task_id, p.kind) for p in problems] == [
        ("q0", "missing_database"),
        ("q1", "missing_database"),
        ("q3", "missing_database"),
        ("q4", "failing"),
    ]
    assert "nowhere.sqlite" in problems[0].detail
    assert "broken.sqlite" in problems[1].detail


def test_a_task_with_given_results_needs_its_database_only(root: Path) -> None:
    tasks = [task(0, "", gold_results=[]), task(1, "", gold_results=[], db_id="nowhere")]
    for each in tasks:
        del each.fields["gold_sql"]
    assert [p.task_id for p in check_golds(tasks, config(root))] == ["q1"]


def test_the_same_question_with_another_result_is_ambiguous(root: Path) -> None:
    tasks = [
        task(0, "SELECT id FROM p WHERE age > 1", "Who is old?"),
        task(1, "SELECT id FROM p WHERE age > 2", "who  is OLD?"),
        task(2, "SELECT id FROM p WHERE age > 3", "Who is old?", evidence="old is above 3"),
        task(3, "SELECT id FROM p WHERE age > 3", "Who is old?", db_root="sub"),
        task(4, "SELECT id FROM p WHERE age >= 2 ORDER BY id", "Who is old?"),  # the result of the first
    ]
    problems = check_golds(tasks, config(root))
    assert [(p.task_id, p.kind) for p in problems] == [("q0", "ambiguous"), ("q1", "ambiguous"), ("q4", "ambiguous")]
    assert problems[0].detail == "question q1 asks the same, with another result"
    assert problems[1].detail == "question q0 asks the same, with another result"


def test_progress_counts_queries(root: Path) -> None:
    seen: list[tuple[int, int]] = []
    tasks = [task(i, f"SELECT id FROM p WHERE age <> {i % 100}") for i in range(150)]
    assert check_golds(tasks, config(root), lambda label, done, total: seen.append((done, total))) == []
    assert seen == [(64, 100), (100, 100)]


def test_no_database_root_is_said(root: Path) -> None:
    with pytest.raises(InfrastructureError, match="no such folder"):
        check_golds([task(0, GOOD[0])], config(root / "nowhere"))


def test_the_command_shows_counts_and_writes_the_good_ones(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = [task(0, GOOD[0]), *(task(i, sql) for i, (sql, _, _) in enumerate(BAD, 1)), task(99, GOOD[1])]
    write_tasks(tmp_path / "questions.jsonl", tasks)
    command = ["prepare", "--check", "--questions", f"{tmp_path}/questions.jsonl", "--databases", str(root)]
    settings = ["environment.text2sql.max_vm_steps=800000", "environment.text2sql.timeout=4"]
    assert launch.main([*command, "--out", f"{tmp_path}/good.jsonl", *settings]) == 1
    shown = capsys.readouterr().out
    lines = {" ".join(line.split()[:-2]): line.split()[-2:] for line in shown.splitlines() if line.endswith("%")}
    assert lines["good"] == ["2", "15.4%"]
    assert lines["empty"] == lines["volatile"] == lines["ambiguous"] == ["2", "15.4%"]
    assert lines["missing database"] == ["0", "0.0%"]
    assert "  q1  failing  no such column: nix" in shown
    assert [t.id for t in read_tasks(tmp_path / "good.jsonl")] == ["q0", "q99"]
    dropped = [json.loads(line) for line in (tmp_path / "good.dropped.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in dropped] == [kind for _, kind, _ in BAD]
    assert launch.main([*command[:3], f"{tmp_path}/good.jsonl", *command[4:]]) == 0
    assert "100.0%" in capsys.readouterr().out


def test_many_problems_are_cut_short_on_screen(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tasks(tmp_path / "q.jsonl", [task(i, f"SELECT x{i} FROM p") for i in range(30)])
    assert main(config(root), tmp_path / "q.jsonl", None) == 1
    shown = capsys.readouterr().out
    assert shown.count("no such column") == 20
    assert "… and 10 more; --out FILE writes them all" in shown


def test_a_missing_database_is_told_once(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tasks(tmp_path / "q.jsonl", [task(i, f"SELECT {i}", db_id="lost") for i in range(30)])
    assert main(config(root), tmp_path / "q.jsonl", None) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "lost" in line] == [line for line in lines if line.startswith("  ")]
    assert lines[-1].startswith("  q0 and 29 more  missing_database  ")


def test_the_command_refuses_what_would_do_harm(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    write_tasks(path, [task(0, "SELECT nix FROM p")])
    before = path.read_bytes()
    with pytest.raises(UserError, match="is the file of --questions"):
        main(config(root), path, tmp_path / "." / "q.jsonl")
    assert path.read_bytes() == before
    with pytest.raises(UserError, match="nowhere: no such folder of databases; name it with --databases"):
        main(config(root / "nowhere"), path, None)


class Ears(list[str]):
    """Hears what is told."""

    def __call__(self, text: str) -> None:
        self.append(text)


def test_training_leaves_bad_ones_out_and_says_so_in_a_line(root: Path, tmp_path: Path) -> None:
    tasks = [task(0, GOOD[0]), *(task(i, sql) for i, (sql, _, _) in enumerate(BAD, 1)), task(99, GOOD[1])]
    record, tell, log = tmp_path / "dropped_questions.jsonl", Ears(), Ears()
    kept = without_bad_golds(tasks, config(root), record, tell, log)
    assert [t.id for t in kept] == ["q0", "q99"]
    assert list(tell) == [
        "11 of 13 training questions left out: 3 failing, 1 timeout, 1 slow, 2 empty, 2 volatile, 2 ambiguous "
        f"({record})"
    ]
    assert len(log) == 11
    assert log[0] == "gold query of q1: failing: no such column: nix"
    assert [GoldProblem(**json.loads(line)).task_id for line in record.read_text().splitlines()][:2] == ["q1", "q2"]


def test_a_resumed_run_follows_its_record(root: Path, tmp_path: Path) -> None:
    tasks = [task(0, GOOD[0]), task(1, GOOD[1]), task(2, "SELECT nix")]
    record = tmp_path / "dropped_questions.jsonl"
    record.write_text(json.dumps({"task_id": "q1", "kind": "slow", "detail": "on that day"}) + "\n")
    resumed = config(root / "nowhere", trainer={"resume_mode": "latest"})
    assert [t.id for t in without_bad_golds(tasks, resumed, record, Ears(), Ears())] == ["q0", "q2"]
    fresh = without_bad_golds(tasks, config(root), record, Ears(), Ears())
    assert [t.id for t in fresh] == ["q0", "q1"]


def test_what_is_not_checked(root: Path, tmp_path: Path) -> None:
    tasks, record = [task(0, "SELECT nix")], tmp_path / "dropped.jsonl"
    for kept in (
        config(root, data={"bad_gold": "keep"}),
        Config.model_validate({"environment": {"env_class": "calculator"}}),
    ):
        tell = Ears()
        assert without_bad_golds(tasks, kept, record, tell, tell) == tasks
        assert list(tell) == []
    assert without_bad_golds(tasks, config(root / "nowhere"), record, tell, tell) == tasks
    assert list(tell) == [f"gold queries were not checked: {root / 'nowhere'} is not on this host"]
    assert not record.exists()


def test_good_questions_are_not_spoken_of(root: Path, tmp_path: Path) -> None:
    tasks, tell = [task(0, GOOD[0])], Ears()
    assert without_bad_golds(tasks, config(root), tmp_path / "dropped.jsonl", tell, tell) == tasks
    assert list(tell) == []


def test_nothing_left_is_an_error(root: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"no training question has a good gold query: 1 failing, as q0: no such column: nix; see .*dropped",
    ):
        without_bad_golds([task(0, "SELECT nix")], config(root), tmp_path / "dropped.jsonl", Ears(), Ears())
