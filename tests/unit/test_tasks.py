"""Questions on disk: what is read back is what was written, and every complaint names file, line and field."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.types import Task
from sqlrl_jax.data.tasks import OPTIONAL, DataError, read_tasks, write_tasks

GOOD = {"id": "a", "db_id": "d", "question": "How many?", "gold_sql": "SELECT 1"}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n", encoding="utf-8")
    return path


def test_reads_fields_and_keeps_what_it_does_not_know(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.jsonl", {**GOOD, "source": "s", "difficulty": 3}, "", {**GOOD, "id": "b"})
    first, second = read_tasks(path)
    assert first == Task("a", "s", {"db_id": "d", "question": "How many?", "gold_sql": "SELECT 1", "difficulty": 3})
    assert second.source == "mine"


@given(
    st.lists(
        st.tuples(st.text(min_size=1), st.dictionaries(st.text(min_size=1), st.integers())),
        min_size=1,
        unique_by=lambda pair: pair[0].strip(),
    )
)
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, dict[str, int]]]) -> None:
    reserved = {*GOOD, *OPTIONAL, "gold_results"}
    tasks = [
        Task(f"x{name}", "s", {"db_id": "d", "question": name + "?", "gold_sql": "q"} | _without(extra, reserved))
        for name, extra in rows
    ]
    path = tmp_path_factory.mktemp("tasks") / "t.jsonl"
    write_tasks(path, tasks)
    assert read_tasks(path) == tasks


def test_half_a_character_in_a_field_of_ones_own_is_kept(tmp_path: Path) -> None:
    tasks = [Task("a", "s", {**_without(GOOD, {"id"}), "note": "\ud83d ä"})]
    write_tasks(tmp_path / "t.jsonl", tasks)
    assert read_tasks(tmp_path / "t.jsonl") == tasks


def _without(extra: dict[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in extra.items() if name not in names}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("{", "not valid JSON"),
        ([1], "expected a JSON object, found list"),
        ('{"id": ' + "[" * 100_000, "nested too deeply"),
        ('{"id": ' + "9" * 5000 + "}", "too many digits"),
        ({**GOOD, "question": None}, "field question: expected text, found NoneType"),
        ({**GOOD, "gold_sql": "  "}, "field gold_sql is empty"),
        ({**GOOD, "schema": 3}, "field schema: expected text, found int"),
        ({**GOOD, "db_root": ["spider"]}, "field db_root: expected text, found list"),
        ({**GOOD, "id": "b", "question": "\ud83d?"}, "field question: holds half of a surrogate pair"),
        ({"id": "b", "db_id": "d", "question": "q"}, "field gold_sql is missing"),
        (GOOD, "field id: 'a' was already used in line 1"),
    ],
)
def test_complaints_name_file_line_and_field(tmp_path: Path, row: Any, said: str) -> None:
    path = write(tmp_path / "t.jsonl", GOOD, row)
    with pytest.raises(DataError) as caught:
        read_tasks(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert said in str(caught.value)


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_tasks(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="holds no questions"):
        read_tasks(write(tmp_path / "empty.jsonl", ""))


def test_files_as_other_programs_write_them(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n\r\n" + json.dumps(GOOD | {"id": "b"}).encode()
    )
    assert [task.id for task in read_tasks(path)] == ["a", "b"]
    with pytest.raises(DataError, match="prepare own"):
        read_tasks(write(tmp_path / "t.CSV", "question,sql"))


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n" + b'{"id": "\xff"}\n')
    with pytest.raises(DataError, match=r"t\.jsonl: after line \d: not UTF-8 text"):
        read_tasks(path)


def test_published_results_stand_in_for_gold_sql(tmp_path: Path) -> None:
    row = {name: value for name, value in GOOD.items() if name != "gold_sql"}
    assert read_tasks(write(tmp_path / "t.jsonl", {**row, "gold_results": []}))[0].fields["gold_results"] == []
    with pytest.raises(DataError, match="field gold_sql is missing"):
        read_tasks(write(tmp_path / "t.jsonl", {**row, "gold_results": None}))


def test_a_file_takes_its_place_only_when_whole(tmp_path: Path) -> None:
    def broken() -> Iterator[Task]:
        yield Task("b", "s", GOOD)
        raise DataError("row 2")

    path = tmp_path / "made" / "t.jsonl"
    assert write_tasks(path, [Task("a", "s", {"db_id": "d", "question": "q", "gold_sql": "SELECT 1"})]) == 1
    before = path.read_bytes()
    with pytest.raises(DataError, match="row 2"):
        write_tasks(path, broken())
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["t.jsonl"]
    with pytest.raises(DataError, match="can't be written"):
        write_tasks(path / "below" / "a.jsonl", [])


def test_prompt_may_be_messages(tmp_path: Path) -> None:
    prompt = [{"role": "user", "content": "hi"}]
    assert read_tasks(write(tmp_path / "t.jsonl", {**GOOD, "prompt": prompt}))[0].fields["prompt"] == prompt


def test_reads_the_real_questions(shared_dir: Path) -> None:
    tasks = read_tasks(shared_dir / "data" / "devset" / "questions.jsonl")
    assert len(tasks) == 6653
    assert tasks[0].source == "spider-train"
