"""Data of one's own: databases as they are found, CSV files value by value, questions by lenient names, mistakes named."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import shutil
import sqlite3
import tracemalloc
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from rollout.errors import UserError
from rollout.sql.executor import Executor
from rollout.types import Task
from sqlrl_jax.config_file import load
from sqlrl_jax.data import own_databases
from sqlrl_jax.data.csv_tables import NUMBER, Table, build_database, column_names
from sqlrl_jax.data.csv_text import detect_encoding, open_csv
from sqlrl_jax.data.own import Prepared, prepare_own
from sqlrl_jax.data.own_databases import find_databases
from sqlrl_jax.data.own_questions import match_columns, read_questions, split
from sqlrl_jax.data.tasks import DataError, read_tasks

Cells = list[tuple[Any, ...]]


def build(folder: Path, content: str | bytes, name: str = "t.csv", **options: Any) -> tuple[Table, Cells]:
    """A CSV file's table and its rows."""
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    target = folder / "built.sqlite"
    target.unlink(missing_ok=True)
    (table,) = build_database([path], target, **options)
    with closing(sqlite3.connect(target)) as connection:
        return table, connection.execute(f'SELECT * FROM "{table.name}" ORDER BY rowid').fetchall()


def refused(folder: Path, content: str | bytes, name: str = "t.csv", **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        build(folder, content, name, **options)
    assert str(folder / name) in str(caught.value)
    return str(caught.value).removeprefix(str(folder / name))


# --------------------------------------------------------------------------------------------------------------- types


@pytest.mark.parametrize(
    ("values", "kind", "read"),
    [
        (["1", "-2", "0"], "INTEGER", [1, -2, 0]),
        (["1", "", "3"], "INTEGER", [1, None, 3]),
        ([" 1", "2 "], "INTEGER", [1, 2]),
        (["9223372036854775807", "-9223372036854775808"], "INTEGER", [2**63 - 1, -(2**63)]),
        (["1.5", "2"], "REAL", [1.5, 2.0]),
        (["2", "-.5", "1e-05", "1.5E3"], "REAL", [2.0, -0.5, 1e-05, 1500.0]),
        (["", "3.25"], "REAL", [None, 3.25]),
        (["00501", "10001"], "TEXT", ["00501", "10001"]),
        (["+4930123456", "1"], "TEXT", ["+4930123456", "1"]),
        (["9223372036854775808"], "TEXT", ["9223372036854775808"]),
        (["9" * 5000], "TEXT", ["9" * 5000]),
        (["9007199254740993", "0.5"], "TEXT", ["9007199254740993", "0.5"]),
        (["0.5", "9007199254740993"], "TEXT", ["0.5", "9007199254740993"]),
        (["1E5", "2E7"], "TEXT", ["1E5", "2E7"]),
        (["1e+999"], "TEXT", ["1e+999"]),
        (["nan", "inf"], "TEXT", ["nan", "inf"]),
        (["2020-01-31", "2021-12-01"], "TEXT", ["2020-01-31", "2021-12-01"]),
        (["1_000", "2"], "TEXT", ["1_000", "2"]),
        (["١٢"], "TEXT", ["١٢"]),
        (["true", "false"], "TEXT", ["true", "false"]),
        (["1 000"], "TEXT", ["1 000"]),
        (["1.", "2"], "TEXT", ["1.", "2"]),
        (["x", " padded "], "TEXT", ["x", " padded "]),
        (["", ""], "TEXT", [None, None]),
        (["NA", "1"], "TEXT", ["NA", "1"]),
    ],
)
def test_types_lose_nothing(tmp_path: Path, values: list[str], kind: str, read: list[Any]) -> None:
    text = io.StringIO()
    csv.writer(text).writerows([["k", "v"], *([str(i), v] for i, v in enumerate(values))])
    table, rows = build(tmp_path, text.getvalue())
    assert table.columns[1] == ("v", kind)
    assert [row[1] for row in rows] == read
    assert [type(row[1]) for row in rows] == [type(value) for value in read]


def test_surprises_are_told(tmp_path: Path) -> None:
    table, rows = build(tmp_path, "a;b\n1;1,50\n2;2,00\n3;x\nNA;y\n", nulls=())
    assert table.notes == (
        "delimiter: semicolon",
        "column a: kept as text because of 'NA' in line 5; the 3 values before it are numbers",
        "column b: kept as text; '1,50' in line 2 looks like a decimal comma",
    )
    table, rows = build(tmp_path, "a,b\n1,x\nNA,NA\n", nulls=["NA"])
    assert rows == [(1, "x"), (None, None)]
    assert build(tmp_path, "1,2\n3,4\n")[0].notes == (
        "its first line has only numbers (1, 2); it should hold the column names",
    )


def expected(cells: Sequence[str | int | float | None]) -> list[str | int | float | None]:
    """What a column comes back as: the documented rule, written a second time over whole columns."""
    texts = ["" if cell is None else str(cell) for cell in cells]
    there = [text for text in texts if text]
    numbers = [NUMBER.fullmatch(text) for text in there]
    if all(numbers):
        whole = [match is not None and match["whole"] is not None for match in numbers]
        if all(whole) and all(-(2**63) <= int(text) < 2**63 for text in there):
            return [int(text) if text else None for text in texts]
        exact = all(abs(int(text)) <= 2**53 for text, is_whole in zip(there, whole, strict=True) if is_whole)
        if not all(whole) and exact and all(math.isfinite(float(text)) for text in there):
            return [float(text) if text else None for text in texts]
    return [text or None for text in texts]


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
NUMERIC = st.integers(-(2**65), 2**65) | st.floats(allow_nan=True) | st.integers(-99, 99)
LOOKALIKE = st.from_regex(r"[ ]?[+-]?[0-9]{0,3}[.,]?[0-9]{0,3}([eE][+-]?[0-9]{1,3})?", fullmatch=True)


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[list[Any]], dict[str, Any], str]:
    """Columns of one kind of value each, a dialect, an encoding."""
    height = draw(st.integers(0, 6))
    kinds = draw(
        st.lists(st.sampled_from([TEXT, NUMERIC, LOOKALIKE, st.integers(-99, 99), st.floats(-9, 9)]), min_size=2)
    )
    columns = [draw(st.lists(st.none() | kind, min_size=height, max_size=height)) for kind in kinds[:6]]
    dialect = {
        "delimiter": draw(st.sampled_from(",;\t|")),
        "lineterminator": draw(st.sampled_from(["\n", "\r\n", "\r"])),
        "quoting": draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])),
    }
    if any(end in cell for column in columns for cell in column if isinstance(cell, str) for end in "\r\n"):
        dialect["quoting"] = csv.QUOTE_ALL  # Python's writer leaves ends of lines bare that are not its own
    return columns, dialect, draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]))


@given(tables())
@example(([["a\r\nb", ' "q" '], [1, None]], {"delimiter": ",", "lineterminator": "\n", "quoting": 0}, "utf-8"))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_table_comes_back(tmp_path: Path, table: tuple[list[list[Any]], dict[str, Any], str]) -> None:
    columns, dialect, encoding = table
    text = io.StringIO(newline="")
    writer = csv.writer(text, **dialect)
    writer.writerow([f"c{i}" for i in range(len(columns))])
    writer.writerows(zip(*columns, strict=True))
    path = tmp_path / "t.csv"
    path.write_bytes(text.getvalue().encode(encoding))
    file = open_csv(path)
    assert file.delimiter == dialect["delimiter"]
    if file.padded:  # every value begins with a blank: taken for the delimiter's
        return
    _, rows = build(tmp_path, path.read_bytes())
    wanted = list(zip(*map(expected, columns), strict=True))
    assert rows == wanted
    assert [tuple(map(type, row)) for row in rows] == [tuple(map(type, row)) for row in wanted]


# -------------------------------------------------------------------------------------------------------------- format


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_delimiters_are_found(tmp_path: Path, delimiter: str) -> None:
    rows = [["name", "tags, more", "n"], ["Ann; Bob", "a|b", "1"], ["x\ty", "c,d", "2"]]
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter).writerows(rows)
    table, found = build(tmp_path, text.getvalue())
    assert [name for name, _ in table.columns] == rows[0]
    assert found == [("Ann; Bob", "a|b", 1), ("x\ty", "c,d", 2)]


def test_one_column_and_tsv_and_padding(tmp_path: Path) -> None:
    assert build(tmp_path, "name\nAnn\n\nBob\n")[1] == [("Ann",), ("Bob",)]
    assert build(tmp_path, "a,b\tc\n1,2\t3\n", "t.tsv")[1] == [("1,2", 3)]
    table, rows = build(tmp_path, 'id, name, note\n1, Ann, "a, b"\n2, , x\n')
    assert [name for name, _ in table.columns] == ["id", "name", "note"]
    assert rows == [(1, "Ann", "a, b"), (2, None, "x")]
    assert build(tmp_path, "id,name\n1, Ann\n2,Bob\n")[1] == [(1, " Ann"), (2, "Bob")]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_encodings_are_found(tmp_path: Path, encoding: str) -> None:
    _, rows = build(tmp_path, "näme,ort\nJosé,Łódź\n名前,x\n".encode(encoding))
    assert rows == [("José", "Łódź"), ("名前", "x")]


def test_other_encodings_have_to_be_named(tmp_path: Path) -> None:
    content = "id,name\n1,Ann\n2,José\n".encode("cp1252")
    text = refused(tmp_path, content)
    assert text.startswith(":3: byte 19 (0xE9) is not UTF-8")
    assert "cp1252" in text
    assert build(tmp_path, content, encoding="cp1252")[1][1] == (2, "José")
    assert "unknown encoding" in refused(tmp_path, content, encoding="klingon")
    late = b"id,name\n" + b"1,Ann\n" * 50_000 + b"2,Jos\xe9\n"
    assert refused(tmp_path, late).startswith(f":50002: byte {len(late) - 2} (0xE9)")
    assert ":2: byte 14 (0x32) is not UTF-16" in refused(tmp_path, "a,b\n1,2\n".encode("utf-16")[:-3])
    (tmp_path / "empty").write_bytes(b"")
    assert detect_encoding(tmp_path / "empty") == "utf-8-sig"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", ": is empty"),
        ("\n\n", ": is empty"),
        ("a,b\n1,2\n3\n", ":3: row 2 has 1 fields, the header has 2"),
        ('a,b\n"x\ny",2\n1,2,3\n', ":4: row 2 has 3 fields"),
        ('a,b\n1,"x\n2,y\n', ":2: a field begins here with a double quote that is not closed"),
        ('a,b\n1,"x"y\n', ":2: a quoted field is followed by other text"),
        ("a,b\n1,\0\n", ":2: holds a NUL"),
        (",".join(f"c{i}" for i in range(2500)) + "\n", ": SQLite can't hold this table"),
    ],
)
def test_bad_files_are_named_with_the_line(tmp_path: Path, content: str, said: str) -> None:
    assert refused(tmp_path, content).startswith(said)


def test_an_unclosed_quote_in_a_large_file_ends_soon(tmp_path: Path) -> None:
    text = refused(tmp_path, 'a,b\n1,"x\n' + "2,yyyyyyyyyyyyyyyyyyyyy\n" * 800_000)
    assert text.startswith(":2: a field begins here")


def test_column_names_become_usable(tmp_path: Path) -> None:
    names, notes = column_names(["id", "ID", "", " a  b\n", "a b", "id_2", 'q"x'])
    assert names == ["id", "ID_3", "column_3", "a b", "a b_2", "id_2", 'q"x']
    assert len(notes) == 3
    table, _ = build(tmp_path, "a,A,\n1,2,3\n")
    assert table.columns == (("a", "INTEGER"), ("A_2", "INTEGER"), ("column_3", "INTEGER"))
    assert build(tmp_path, "a,b\n")[0].notes == ("has column names but no rows",)


@given(st.lists(st.text(max_size=4), min_size=1, max_size=8))
def test_column_names_always_differ(header: list[str]) -> None:
    names, _ = column_names(header)
    assert len({name.lower() for name in names}) == len(header)
    assert all(name.strip() for name in names)


def test_table_names(tmp_path: Path) -> None:
    for name in ("Order Details.csv", "a.csv", "a.tsv", "sqlite_x.csv"):
        (tmp_path / name).write_text("x\ty\n1\t2\n")
    assert build(tmp_path, "x,y\n1,2\n", "Order Details.csv")[0].name == "Order Details"
    with pytest.raises(DataError, match=r"a\.tsv: a\.csv would give a table of the same name"):
        build_database([tmp_path / "a.csv", tmp_path / "a.tsv"], tmp_path / "x.sqlite")
    with pytest.raises(DataError, match="sqlite_"):
        build_database([tmp_path / "sqlite_x.csv"], tmp_path / "y.sqlite")


def test_large_files_are_streamed(tmp_path: Path) -> None:
    with (tmp_path / "big.csv").open("w") as file:
        file.write("id,name,price\n")
        file.writelines(f"{i},customer number {i},{i / 7}\n" for i in range(60_000))
    steps: list[tuple[str, int, int]] = []
    tracemalloc.start()
    (table,) = build_database(
        [tmp_path / "big.csv"], tmp_path / "big.sqlite", progress=lambda *step: steps.append(step)
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert table.rows == 60_000
    assert peak < 6e6  # a batch; all the rows as objects take four times as much
    assert {label for label, _, _ in steps} == {"reading big.csv", "writing big.csv"}
    assert all(0 < done <= total for _, done, total in steps)


# ----------------------------------------------------------------------------------------------------------- databases


def sqlite_file(path: Path, rows: int = 3, mode: str = "delete") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA journal_mode = {mode}")
        connection.execute("CREATE TABLE pets (id INTEGER PRIMARY KEY, name TEXT)")
        connection.executemany("INSERT INTO pets VALUES (?, ?)", [(i, f"pet {i}") for i in range(rows)])
        connection.commit()
    return path


def questions_file(path: Path, rows: Sequence[tuple[str, ...]], header: str = "question,sql") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header.split(","), *rows])
    return path


def tree(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


ASKED = [("How many pets?", "SELECT count(*) FROM pets"), ("Names?", "SELECT name FROM pets")]


def prepare(folder: Path, databases: Path, rows: Sequence[tuple[str, ...]] = ASKED, **options: Any) -> Prepared:
    return prepare_own(databases, questions_file(folder / "asked" / "q.csv", rows), folder / "out", **options)


def count(prepared: Prepared, db_id: str) -> int:
    with closing(sqlite3.connect(prepared.out / "databases" / db_id / f"{db_id}.sqlite")) as connection:
        return int(connection.execute("SELECT count(*) FROM pets").fetchone()[0])


def test_databases_are_found_in_every_layout(tmp_path: Path) -> None:
    def found(path: Path) -> list[tuple[str, str]]:
        return [(original.db_id, original.kind) for original in find_databases(path)]

    one = sqlite_file(tmp_path / "a" / "one.db")
    sqlite_file(tmp_path / "a" / "two.SQLITE3")
    sqlite_file(tmp_path / "a" / "three" / "three.sqlite")
    sqlite_file(tmp_path / "a" / "three" / "backup.sqlite")
    sqlite_file(tmp_path / "a" / "four" / "data.sqlite")
    (tmp_path / "a" / "four" / "database_description").mkdir()
    (tmp_path / "a" / "empty").mkdir()
    (tmp_path / "a" / ".hidden.db").write_bytes(b"")
    assert found(one) == [("one", "sqlite")]
    assert found(tmp_path / "a") == [(name, "sqlite") for name in ("four", "one", "three", "two")]
    plain = tmp_path / "b" / "data.bin"
    sqlite_file(plain)
    assert found(plain) == [("data", "sqlite")]
    for name in ("shop/x.csv", "shop/y.tsv", "bank/z.csv"):
        (tmp_path / "c" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "c" / name).write_text("a,b\n1,2\n")
    assert found(tmp_path / "c" / "shop") == [("shop", "csv")]
    assert found(tmp_path / "c") == [("bank", "csv"), ("shop", "csv")]
    assert found(tmp_path / "c" / "shop" / "x.csv") == [("x", "csv")]


def test_unclear_databases_are_refused(tmp_path: Path) -> None:
    def said(path: Path) -> str:
        with pytest.raises(DataError) as caught:
            find_databases(path)
        return str(caught.value)

    assert "no such file" in said(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "found no databases" in said(tmp_path / "empty")
    (tmp_path / "x.txt").write_text("hello")
    assert "neither" in said(tmp_path / "x.txt")
    sqlite_file(tmp_path / "mixed" / "a.db")
    (tmp_path / "mixed" / "b.csv").write_text("a\n1\n")
    assert "one kind" in said(tmp_path / "mixed")
    sqlite_file(tmp_path / "twice" / "a.db")
    sqlite_file(tmp_path / "twice" / "A.sqlite")
    assert "would both be" in said(tmp_path / "twice")
    sqlite_file(tmp_path / "which" / "a" / "x.db")
    sqlite_file(tmp_path / "which" / "a" / "y.db")
    assert "which of x.db, y.db" in said(tmp_path / "which")


def crashed(path: Path) -> None:
    """A database whose log still holds all its rows, as a killed program leaves it, without the log's index."""
    live = sqlite_file(path.parent / "live" / path.name, rows=0, mode="wal")
    with closing(sqlite3.connect(live)) as connection:
        connection.execute("PRAGMA wal_autocheckpoint = 0")
        connection.executemany("INSERT INTO pets VALUES (?, ?)", [(i, "x") for i in range(5)])
        connection.commit()
        for suffix in ("", "-wal"):
            shutil.copyfile(f"{live}{suffix}", f"{path}{suffix}")
    shutil.rmtree(live.parent)


def test_originals_in_every_state_are_copied_and_left_as_they_are(tmp_path: Path) -> None:
    folder = tmp_path / "dbs"
    sqlite_file(folder / "plain.db")
    sqlite_file(folder / "clean_log.db", mode="wal")
    crashed(folder / "left_log.db")
    before = tree(folder)
    asked = questions_file(tmp_path / "q.csv", [("q", "SELECT 1", "plain")], "question,sql,db_id")
    prepared = prepare_own(folder, asked, tmp_path / "out")
    assert tree(folder) == before
    assert [count(prepared, name) for name in ("plain", "clean_log", "left_log")] == [3, 3, 5]
    files = sorted(tree(tmp_path / "out" / "databases"))
    assert files == [f"{name}/{name}.sqlite" for name in ("clean_log", "left_log", "plain")]


def test_a_database_in_use_is_copied_with_what_is_committed(tmp_path: Path) -> None:
    path = sqlite_file(tmp_path / "pets.db", mode="wal")
    with closing(sqlite3.connect(path)) as writer:
        writer.execute("INSERT INTO pets VALUES (50, 'committed')")
        writer.commit()
        writer.execute("INSERT INTO pets VALUES (51, 'not yet')")
        assert count(prepare(tmp_path, path), "pets") == 4
        writer.commit()
        assert {p.name for p in tmp_path.glob("pets.db*")} == {"pets.db", "pets.db-wal", "pets.db-shm"}
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT count(*) FROM pets").fetchone() == (5,)


def locked(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path)
    connection.execute("BEGIN EXCLUSIVE")
    return connection


def test_databases_that_cannot_be_read_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def said(path: Path) -> str:
        with pytest.raises(DataError) as caught:
            prepare(tmp_path, path)
        assert str(path) in str(caught.value)
        return str(caught.value)

    (tmp_path / "empty.db").write_bytes(b"")
    (tmp_path / "noise.db").write_bytes(b"\x17" * 5000)
    (tmp_path / "torn.db").write_bytes(sqlite_file(tmp_path / "whole.db", rows=2000).read_bytes()[:5000])
    sqlite3.connect(tmp_path / "bare.db").execute("PRAGMA user_version = 1")
    assert "is empty" in said(tmp_path / "empty.db")
    assert "not a SQLite database" in said(tmp_path / "noise.db")
    assert "can't be read as a SQLite database" in said(tmp_path / "torn.db")
    assert "has no tables" in said(tmp_path / "bare.db")
    monkeypatch.setattr(own_databases, "LOCKED_SECONDS", 0.05)
    path = sqlite_file(tmp_path / "busy.db")
    with closing(locked(path)):
        assert "locked" in said(path)
    (tmp_path / "busy.db-journal").write_bytes(b"hot")
    assert "is writing to it" in said(path)


# ----------------------------------------------------------------------------------------------------------- questions


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


def test_a_split_is_close_to_its_share() -> None:
    tasks = make_tasks([("a", f"SELECT {i}") for i in range(200)])
    assert len(split(tasks, 0.2, 0)[1]) == 40
    assert split(tasks, 0.2, 0) != split(tasks, 0.2, 1)
    tasks = make_tasks([("abcdefghij"[i % 10], "x") for i in range(200)])
    assert len(split(tasks, 0.2, 0)[1]) == 40


# --------------------------------------------------------------------------------------------------------------- whole


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    folder = tmp_path / "shop"
    folder.mkdir()
    (folder / "customers.csv").write_text("id,name,zip\n1,Ann,01234\n2,Bob,99999\n")
    (folder / "orders.csv").write_text("id;customer_id;total\n1;1;9.5\n2;2;3\n")
    return folder


SHOP = [
    ("How many customers?", "SELECT count(*) FROM customers"),
    ("Who lives in 01234?", "SELECT name FROM customers WHERE zip = '01234'"),
    ("What did Bob spend?", "SELECT total FROM orders JOIN customers c ON c.id = customer_id WHERE name = 'Bob'"),
]


def test_a_folder_of_csv_files_becomes_a_database_that_answers(tmp_path: Path, shop: Path) -> None:
    prepared = prepare(tmp_path, shop, SHOP, valid=0.3)
    assert (prepared.databases, prepared.questions, prepared.train, prepared.validation) == (("shop",), 3, 2, 1)
    assert prepared.notes == ("orders.csv: delimiter: semicolon",)
    tasks = read_tasks(tmp_path / "out" / "questions.jsonl")
    with Executor(tmp_path / "out" / "databases", timeout=5, workers=1) as executor:
        rows = [executor.run(task.fields["db_id"], task.fields["gold_sql"]).rows for task in tasks]
    assert [list(map(list, r)) for r in rows] == [[[2]], [["Ann"]], [[3.0]]]
    config = load(None, [f"{key}={value}" for key, value in prepared.settings.items()])
    parts = [read_tasks(path) for path in (*config.data.train_data, *config.data.val_data)]
    assert sorted(t.id for part in parts for t in part) == [t.id for t in tasks]
    assert config.environment.text2sql.database_root == str(tmp_path / "out" / "databases")


def test_settings_survive_odd_paths(tmp_path: Path, shop: Path) -> None:
    out = tmp_path / "a, b: [c] 'd'"
    prepared = prepare_own(shop, questions_file(tmp_path / "q.csv", SHOP), out)
    config = load(None, [f"{key}={value}" for key, value in prepared.settings.items()])
    assert config.data.train_data == (str(out / "train.jsonl"),)
    assert config.environment.text2sql.database_root == str(out / "databases")


def test_twice_gives_the_same_bytes(tmp_path: Path, shop: Path) -> None:
    dbs = tmp_path / "dbs"
    sqlite_file(dbs / "plain.db")
    sqlite_file(dbs / "log.db", mode="wal")
    asked = questions_file(
        tmp_path / "q2.csv", [("q", "SELECT 1", "plain"), ("r", "SELECT 2", "log")], "question,sql,db"
    )
    inputs: list[Callable[[Path], Prepared]] = [
        lambda out: prepare_own(shop, questions_file(tmp_path / "q.csv", SHOP), out),
        lambda out: prepare_own(dbs, asked, out),
    ]
    for number, make in enumerate(inputs):
        a, b = tmp_path / f"a{number}", tmp_path / f"b{number}"
        make(a)
        first = tree(a)
        make(a)
        make(b)
        assert tree(a) == first == tree(b)


def test_others_folders_and_the_originals_are_left_alone(tmp_path: Path, shop: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="was not written by this command"):
        prepare(tmp_path, shop, SHOP)
    assert [p.name for p in out.iterdir()] == ["thesis.txt"]
    (out / "prepared.json").write_text('{"prepared": "spider", "format": 1, "databases": []}')
    with pytest.raises(DataError, match="was not written"):
        prepare(tmp_path, shop, SHOP)
    shutil.rmtree(out)
    prepare(tmp_path, shop, SHOP)
    with pytest.raises(DataError, match="choose another folder"):
        prepare(tmp_path, out / "databases", SHOP)
    with pytest.raises(DataError, match="choose another folder"):
        prepare_own(shop, out / "questions.jsonl", out)
    assert len(tree(shop)) == 2


def test_a_new_call_takes_away_what_the_last_one_left(tmp_path: Path, shop: Path) -> None:
    sqlite_file(tmp_path / "dbs" / "a.db")
    sqlite_file(tmp_path / "dbs" / "b.db")
    asked = questions_file(tmp_path / "q.csv", [("q", "SELECT 1", "a"), ("r", "SELECT 2", "b")], "question,sql,db")
    prepared = prepare_own(tmp_path / "dbs", asked, tmp_path / "out")
    assert (prepared.train, prepared.validation) == (1, 1)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    prepared = prepare(tmp_path, shop, SHOP, valid=0)
    assert prepared.validation == 0
    assert prepared.settings["data.val_data"] == f"[{tmp_path / 'out' / 'train.jsonl'}]"
    assert sorted(tree(tmp_path / "out")) == [
        "databases/shop/shop.sqlite",
        "notes.txt",
        "prepared.json",
        "questions.jsonl",
        "train.jsonl",
    ]


def test_a_failed_call_can_be_repeated(tmp_path: Path, shop: Path) -> None:
    (shop / "zoo.csv").write_text("a,b\n1\n")
    with pytest.raises(DataError, match="row 1 has 1 fields"):
        prepare(tmp_path, shop, SHOP)
    assert list((tmp_path / "out" / "databases").iterdir()) == []
    (shop / "zoo.csv").unlink()
    assert prepare(tmp_path, shop, SHOP).questions == 3


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_room_and_share_are_checked_first(tmp_path: Path, shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for share in (1.0, -0.1):
        with pytest.raises(DataError, match="share for validation"):
            prepare(tmp_path, shop, SHOP, valid=share)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(100, 100, 10))
    with pytest.raises(UserError, match="copying the databases needs"):
        prepare(tmp_path, shop, SHOP)
    assert not (tmp_path / "out").exists()


def test_what_is_missing_is_told(tmp_path: Path) -> None:
    for name in "abc":
        sqlite_file(tmp_path / "dbs" / f"{name}.db")
    asked = questions_file(tmp_path / "q.csv", [("q", "SELECT 1", "a")], "question,sql,db")
    prepared = prepare_own(tmp_path / "dbs", asked, tmp_path / "out")
    assert prepared.notes == (
        "too few questions for a validation part: all are for training",
        "2 of 3 databases have no question: b, c",
    )
