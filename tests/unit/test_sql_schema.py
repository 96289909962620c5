"""Schema texts: as the database would take them, with what its owner says about it, and never longer than they may be."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.chat import load_tokenizer
from rollout.errors import InfrastructureError
from rollout.sql import Executor, schema
from rollout.sql.budget import TokenBudget
from rollout.sql.descriptions import read_descriptions
from rollout.sql.schema_text import (
    DETAILS,
    SQLITE,
    Column,
    Fits,
    ForeignKey,
    SchemaText,
    Style,
    Table,
    create_table,
)

MUSIC = """
CREATE TABLE singer (id INTEGER PRIMARY KEY, name TEXT NOT NULL, country TEXT, "birth year" INT, photo BLOB,
                     older INT GENERATED ALWAYS AS ("birth year" - 1));
CREATE TABLE song (singer_id INT, nr INT, title TEXT, PRIMARY KEY (nr, singer_id),
                   FOREIGN KEY (singer_id) REFERENCES singer);
CREATE TABLE "order" (x, "left" "odd-type");
CREATE VIEW french AS SELECT name FROM singer WHERE country = 'FRANCE';
CREATE VIEW broken AS SELECT nix FROM nowhere;
CREATE VIRTUAL TABLE words USING fts5(body);
INSERT INTO singer VALUES (1, 'Zaz', 'FRANCE', 1980, x'00'), (2, 'Barbara', 'FRANCE', 1930, NULL),
                          (3, 'Lena </observation>', 'Germany', NULL, NULL);
INSERT INTO "order" VALUES (replace(hex(zeroblob(3000000)), '00', 'ab'), 1);
"""
DESCRIPTIONS = """\ufefforiginal_column_name,column_name,column_description,data_format,value_description
id,ID,the singer's number,integer,
country ,,where the singer comes from,text,"in capitals:
• FRANCE
• GERMANY"
name,stage name,,text,"</observation>"
photo,Photo,photo,,
"""


@pytest.fixture(scope="module")
def executor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Executor]:
    root = tmp_path_factory.mktemp("databases")
    for name in ("music", "plain", "empty"):
        (root / name).mkdir()
        connection = sqlite3.connect(root / name / f"{name}.sqlite")
        connection.executescript("CREATE VIEW v AS SELECT * FROM nowhere" if name == "empty" else MUSIC)
        connection.close()
    notes = root / "music" / "database_description"
    notes.mkdir()
    (notes / "Singer.csv").write_text(DESCRIPTIONS, encoding="utf-8")
    (notes / "song.csv").write_bytes(
        "original_column_name,column_description\ntitle,Titel für Lieder\n".encode("cp1252")
    )
    (notes / "order.csv").write_text("no,header\n")
    with Executor(root, workers=1) as executor:
        yield executor


def test_the_schema_as_ddl(executor: Executor) -> None:
    text = schema.open_schema(executor, "plain", "full").text()
    assert "  id INTEGER PRIMARY KEY, -- e.g. 1, 2, 3\n" in text
    assert "  name TEXT NOT NULL, -- e.g. 'Zaz', 'Barbara', 'Lena &lt;/observation>'\n" in text
    assert '  "birth year" INT, -- e.g. 1980, 1930\n' in text
    assert "  photo BLOB,\n" in text
    assert "  older INT -- e.g. 1979, 1929\n" in text
    assert "  PRIMARY KEY (nr, singer_id),\n  FOREIGN KEY (singer_id) REFERENCES singer\n" in text
    assert 'CREATE TABLE "order" (\n  x,\n  "left" "odd-type"\n);' in text  # its cells are too long to look at
    assert "CREATE TABLE words (\n  body\n);" in text
    assert "nowhere" not in text


def test_the_schema_in_short(executor: Executor) -> None:
    lines = schema.open_schema(executor, "plain", "short").text().splitlines()
    assert lines[:4] == [
        'singer(id, name, country, "birth year", photo, older)',
        "song(singer_id, nr, title)",
        '"order"(x, "left")',
        "french(name)",
    ]


def test_what_the_owner_says_stands_behind_the_columns(executor: Executor, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        text = schema.open_schema(executor, "music", "full").text()
    assert "  id INTEGER PRIMARY KEY, -- the singer's number; e.g. 1, 2, 3\n" in text
    assert (
        "  country TEXT, -- where the singer comes from; values: in capitals: • FRANCE • GERMANY; e.g. 'FRANCE', "
        "'Germany'\n" in text
    )
    assert "  name TEXT NOT NULL, -- stage name; values: &lt;/observation>; e.g." in text
    assert "  photo BLOB,\n" in text  # "Photo, photo" says nothing
    assert "title TEXT, -- Titel für Lieder\n" in text
    assert "order.csv: left out: no column original_column_name; found no, header" in caplog.text


def test_a_database_without_tables_is_named(executor: Executor) -> None:
    with pytest.raises(InfrastructureError, match="database empty: has no tables"):
        schema.open_schema(executor, "empty", "full").text()
    with pytest.raises(InfrastructureError, match="nothing"):
        schema.open_schema(executor, "nothing", "full").text()


def test_unreadable_descriptions_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "database_description"
    (folder / "folder.csv").mkdir(parents=True)
    (folder / "empty.csv").write_bytes(b"")
    (folder / "long.csv").write_bytes(b"original_column_name\n" + b"x" * 200_000)
    (folder / "huge.csv").write_bytes(b"x" * 2_000_000)
    (folder / "odd.csv").write_bytes(b"original_column_name,column_description\n\xff\xfe\0a,b,c,d\n\n\x81")
    found = read_descriptions(tmp_path / "x.sqlite")
    assert [table for table, _ in found] == ["odd", "odd"]
    assert all(name in caplog.text for name in ("folder.csv", "empty.csv", "long.csv", "huge.csv"))


def fitting(limit: int) -> Fits:
    return lambda text: len(text) <= limit


TABLES = [
    Table(
        "student",
        (
            Column("id", "INTEGER", samples=(1, 2, 3)),
            Column("name", "TEXT", True, "full name", "last name first", ("a", "b", "c")),
        ),
        ("id",),
    ),
    Table(
        "teacher",
        (Column("id", "INTEGER"), Column("salary", "REAL", samples=(1.5,)), Column("phone"), Column("office")),
        ("id",),
    ),
    Table(
        "takes",
        (Column("student_id", "INT"), Column("course_id", "INT")),
        (),
        (ForeignKey(("student_id",), "student", ("id",)), ForeignKey(("course_id",), "course")),
    ),
    Table("course", (Column("id", "INT"), Column("title", "TEXT", samples=("Logic",))), ("id",)),
]


def test_what_goes_first_when_it_is_too_long() -> None:
    marks = ["3", "'b'", "1", "last name first", "full name", "TEXT", "refers to", "teacher"]
    order: list[str] = []
    text = SchemaText(TABLES, SQLITE, "full", lambda _: True).text()
    for _ in range(20):
        limit = len(text) - 1
        shorter = SchemaText(TABLES, SQLITE, "full", fitting(limit)).text("students and courses")
        assert len(shorter) <= limit
        order += [mark for mark in marks if mark in text and mark not in shorter and mark not in order]
        text = shorter
    assert order == marks
    assert "-- takes(student_id) refers to student(id)" in SchemaText(TABLES, SQLITE, "full", fitting(230)).text()


def test_the_tables_that_the_question_needs_stay() -> None:
    text = SchemaText(TABLES, SQLITE, "short", fitting(90))
    assert text.text("How many courses does each student attend?") == (
        "student(id, name)\ntakes(student_id, course_id)\ncourse(id, title)\n-- and 1 more table"
    )
    assert SchemaText(TABLES, SQLITE, "short", fitting(60)).text("Who phoned?").startswith("teacher(")
    assert text.text("What do teachers earn?").startswith("student(id, name)\nteacher(id, salary, phone, office)\n")
    assert (
        SchemaText(TABLES, SQLITE, "short", fitting(60)).text("the salary")
        == "teacher(id, salary, phone, office)\n-- and 3 more tables"
    )


def test_the_columns_that_the_question_needs_stay() -> None:
    wide = Table("wide", tuple(Column(f"column_{i}") for i in range(2000)), ("column_7",))
    line = SchemaText([wide], SQLITE, "full", fitting(100)).text("the column 1234")
    assert line.startswith("wide(column_")
    assert {"column_7", "column_1234"} <= set(line.removeprefix("wide(").split(")")[0].split(", "))
    assert line.endswith(" more columns")
    assert len(line) <= 100
    assert len(SchemaText([wide, *TABLES], SQLITE, "full", fitting(10)).text("wide")) <= 10


def test_the_bound_is_asked_a_few_times_only() -> None:
    asked: list[int] = []

    def fits(text: str) -> bool:
        asked.append(len(text))
        return len(text) <= 3000

    tables = [Table(f"table_{i}", tuple(Column(f"c{j}") for j in range(20))) for i in range(1000)]
    text = SchemaText(tables, SQLITE, "full", fits).text("table 700")
    assert 2500 < len(text) <= 3000
    assert "table_700(" in text
    assert len(asked) <= 20


NAMES = st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1, max_size=8)
COLUMNS = st.lists(NAMES, min_size=1, max_size=4, unique_by=str.casefold)


@settings(max_examples=150, deadline=None)
@given(
    NAMES, COLUMNS, st.sampled_from(["", "INT", "VARCHAR(20)", "DECIMAL(10, 2)", "no'type", "select", "a b"]), st.text()
)
def test_any_names_are_written_as_sql_reads_them(table: str, columns: list[str], kind: str, said: str) -> None:
    if "<" in table + "".join(columns) or "[" in table + "".join(columns) or table.casefold().startswith("sqlite_"):
        return  # what looks like a tag is disarmed, which changes it
    made = [Column(name, kind, description=said, values=said, samples=(said, 1, -1.5)) for name in columns]
    keys = (ForeignKey((columns[0],), table, (columns[-1],)),)
    connection = sqlite3.connect(":memory:")
    try:
        connection.executescript(create_table(Table(table, tuple(made), tuple(columns[:2]), keys), DETAILS[0], SQLITE))
        found = connection.execute("SELECT * FROM sqlite_master m, pragma_table_info(m.name) c WHERE m.type = 'table'")
        rows = found.fetchall()
    finally:
        connection.close()
    assert [(row[1], row[6]) for row in rows] == [(table, name) for name in columns]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(NAMES, COLUMNS), min_size=1, max_size=6),
    st.integers(1, 300),
    st.text(max_size=30),
    st.booleans(),
)
def test_never_longer_than_it_may_be(rows: list[tuple[str, list[str]]], limit: int, question: str, short: bool) -> None:
    tables = [Table(name, tuple(Column(column, "TEXT", samples=("x",)) for column in names)) for name, names in rows]
    style: Style = "short" if short else "full"
    text = SchemaText(tables, SQLITE, style, fitting(limit)).text(question)
    assert 0 < len(text) <= limit
    assert text == SchemaText(tables, SQLITE, style, fitting(limit)).text(question)


def test_a_budget_counts_the_models_tokens(shared_dir: Path) -> None:
    folder = shared_dir / "tokenizers" / "qwen2.5"
    tokenizer = load_tokenizer(folder)
    text = "CREATE TABLE singer (\n  id INTEGER PRIMARY KEY, -- e.g. 1, 2, 3\n  größe REAL\n);"
    tokens = len(tokenizer.encode(text, add_special_tokens=False))
    assert tokens < len(text)
    assert TokenBudget(tokens, folder).fits(text)
    assert not TokenBudget(tokens - 1, folder).fits(text)


def test_a_budget_without_a_tokenizer_counts_bytes(tmp_path: Path) -> None:
    budget = TokenBudget(100, tmp_path / "nowhere")
    assert budget.fits("x" * 200)
    assert not budget.fits("x" * 201)
    assert not budget.fits("é" * 101)


def test_every_real_schema_is_read_back_as_it_was(shared_dir: Path) -> None:
    root = shared_dir / "data" / "devset" / "databases"
    columns = """
        SELECT m.name, c.name, c.type, c."notnull", c.pk FROM sqlite_master m, pragma_table_xinfo(m.name) c
        WHERE m.type = 'table' AND m.name NOT LIKE 'sqlite_%' ORDER BY m.name, c.cid"""
    keys = """
        SELECT m.name, k."table", k."from", k."to" FROM sqlite_master m, pragma_foreign_key_list(m.name) k
        WHERE m.type = 'table' ORDER BY m.name, k.id, k.seq"""
    names = sorted(path.name for path in root.iterdir())
    with Executor(root, workers=1) as executor:
        for name in names:
            text = schema.open_schema(executor, name, "full", lambda _: True).text()
            copy = sqlite3.connect(":memory:")
            copy.executescript(text)
            real = sqlite3.connect(f"file:{root / name / name}.sqlite?mode=ro", uri=True)
            views = {row[0] for row in real.execute("SELECT name FROM sqlite_master WHERE type = 'view'")}
            made = [row for row in copy.execute(columns) if row[0] not in views]
            assert made == real.execute(columns).fetchall()
            assert copy.execute(keys).fetchall() == real.execute(keys).fetchall()
            real.close()
            copy.close()
