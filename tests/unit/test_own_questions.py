"""Questions of one's own: columns by lenient names, every bad row named, splits that do not leak."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from own_files import questions_file

from rollout.types import Task
from sqlrl_jax.data.own.questions import match_columns, read_questions, split
from sqlrl_jax.data.tasks import DataError


def test_columns_are_matched_leniently(tmp_path: Path) -> None:
    def columns(**row: Any) -> dict[str, str]:
        return match_columns(row, tmp_path, False)[0]

    assert columns(**{"Question": "", "SQL": ""}) == {"question": "Question", "gold_sql": "SQL"}
    assert columns(**{"question": "", "query": "SELECT", "sql": {"select": []}})["gold_sql"] == "query"
    assert columns(**{" NL-Question ": "", "Gold Query": "", "External Knowledge": ""}) == {
        "question": " NL-Question ",
        "gold_sql": "Gold Query",
        "evidence": "External Knowledge",
    }
    row = {"question_id": 3, "db_id": "x", "question": "", "evidence": "", "SQL": "", "difficulty": "simple"}
    assert match_columns(row, tmp_path, True)[1] == ["difficulty"]
    with pytest.raises(DataError, match=r"no column for gold_sql; expected one of gold_sql, sql, .* found question, x"):
        columns(question="", x="")
    with pytest.raises(DataError, match="several databases"):
        match_columns({"question": "", "sql": ""}, tmp_path, True)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json"])
def test_questions_in_every_format(tmp_path: Path, suffix: str) -> None:
    rows = [
        {"id": "a", "question": "How many?", "sql": 'SELECT "x, y"\nFROM pets', "hint": "pets: all"},
        {"id": "b", "question": "Who?", "sql": "SELECT 1", "hint": ""},
    ]
    path = tmp_path / f"q{suffix}"
    with path.open("w", newline="") as file:
        if suffix in (".csv", ".tsv"):
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.write(json.dumps(rows) if suffix == ".json" else "\n\n".join(map(json.dumps, rows)))
    tasks, notes = read_questions(path, ["pets"])
    assert notes == []
    assert [(t.id, t.source, t.fields["evidence"]) for t in tasks] == [("a", "q", "pets: all"), ("b", "q", "")]
    assert tasks[0].fields["gold_sql"] == 'SELECT "x, y"\nFROM pets'
    assert {t.fields["db_id"] for t in tasks} == {"pets"}


def test_all_bad_rows_are_named_together(tmp_path: Path) -> None:
    rows = [
        ("1", "pets", "", "SELECT 1"),
        ("2", "pets", "Q?", " "),
        ("3", "Pets", "fine", "SELECT 1"),
        ("3", "shops", "double", "SELECT 1"),
        ("5", "pet", "Q?", "SELECT 1"),
        ("6", "", "Q?", "SELECT 1"),
    ]
    path = questions_file(tmp_path / "q.csv", rows, "id,db,question,query")
    with pytest.raises(DataError) as caught:
        read_questions(path, ["pets", "shops"])
    assert str(caught.value).splitlines() == [
        f"{path}:2: field question is empty",
        f"{path}:3: field query (gold_sql) is empty",
        f"{path}:5: field id: '3' is already that of {path}:4",
        f"{path}:6: field db_id: there is no database 'pet'; did you mean pets?",
        f"{path}:7: field db_id is empty, and there are several databases",
    ]
    many = questions_file(tmp_path / "many.csv", [("", "SELECT 1")] * 25)
    with pytest.raises(DataError, match="and 15 more"):
        read_questions(many, ["pets"])


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("q.jsonl", '{"question": "a", "sql": "b"}\n{"question": 1', r":2: not valid JSON"),
        ("q.jsonl", "[1]\n", ":1: expected a JSON object, found list"),
        ("q.jsonl", '{"question": ' + "[" * 100_000, ":1: nested too deeply"),
        ("q.json", '[{"question": ' + "9" * 5000 + "}]", "row 1: holds a number with too many digits"),
        ("q.jsonl", "\n", ": holds no questions"),
        ("q.jsonl", b'{"question": "a\xe9"}', "not UTF-8"),
        ("q.jsonl", '{"question": 5, "sql": "x"}', r":1: field question: expected text, found int"),
        ("q.json", '[{"question": "a", "sql": null}]', r"row 1: field sql \(gold_sql\) is empty"),
        ("q.csv", "question,sql\n", ": holds no questions"),
        ("q.csv", "question,sql,sql\na,b,c\n", "two columns named sql"),
        ("q.xlsx", "PK", "expected questions as .csv"),
    ],
)
def test_bad_question_files(tmp_path: Path, name: str, content: str | bytes, said: str) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=said) as caught:
        read_questions(path, ["pets"])
    assert str(path) in str(caught.value)
    with pytest.raises(DataError, match="no such file"):
        read_questions(tmp_path / "none.csv", ["pets"])


def make_tasks(groups: list[tuple[str, str]]) -> list[Task]:
    return [Task(id=str(i), source="", fields={"db_id": d, "gold_sql": s}) for i, (d, s) in enumerate(groups)]


@given(
    st.lists(
        st.tuples(st.sampled_from("abcde"), st.sampled_from(["SELECT 1", "select 1;", "x", "y", "z"])), max_size=40
    ),
    st.floats(0.01, 0.99),
    st.integers(0, 5),
)
def test_splits_are_disjoint_whole_and_repeatable(groups: list[tuple[str, str]], share: float, seed: int) -> None:
    tasks = make_tasks(groups)
    train, valid = split(tasks, share, seed)
    assert sorted(train + valid, key=lambda t: int(t.id)) == tasks
    assert split(tasks, share, seed) == (train, valid)
    databases = {d for d, _ in groups}
    if len(databases) > 1:
        assert train
        assert valid
        assert not {t.fields["db_id"] for t in train} & {t.fields["db_id"] for t in valid}
    else:
        texts = [{t.fields["gold_sql"].lower().rstrip(";") for t in part} for part in (train, valid)]
        assert not texts[0] & texts[1]
    assert split(tasks, 0, seed) == (tasks, [])


@given(st.lists(st.sampled_from(["SELECT 1", "select  1;", "x", "y", "z"]), min_size=2, max_size=20), st.integers(0, 5))
def test_the_same_sql_stays_together(texts: list[str], seed: int) -> None:
    train, valid = split(make_tasks([("a", text) for text in texts]), 0.4, seed)
    parts = [{" ".join(t.fields["gold_sql"].lower().split()).rstrip(";") for t in part} for part in (train, valid)]
    assert not parts[0] & parts[1]


def test_a_split_is_close_to_its_share() -> None:
    tasks = make_tasks([("a", f"SELECT {i}") for i in range(200)])
    assert len(split(tasks, 0.2, 0)[1]) == 40
    assert split(tasks, 0.2, 0) != split(tasks, 0.2, 1)
    tasks = make_tasks([("abcdefghij"[i % 10], "x") for i in range(200)])
    assert len(split(tasks, 0.2, 0)[1]) == 40
