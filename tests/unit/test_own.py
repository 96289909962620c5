"""Data of one's own: databases as they are found, questions by lenient names, a folder written once and for all."""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from own_files import questions_file, sqlite_file

from rollout.errors import UserError
from rollout.sql.executor import Executor
from sqlrl_jax.config_file import load
from sqlrl_jax.data.own import databases as own_databases
from sqlrl_jax.data.own.databases import find_databases
from sqlrl_jax.data.own.prepare import Prepared, prepare_own
from sqlrl_jax.data.prepare import argument
from sqlrl_jax.data.tasks import DataError, read_tasks

# ----------------------------------------------------------------------------------------------------------- databases


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
    copies = (tmp_path / "out" / "databases").rglob("*.sqlite")
    assert {copy.read_bytes()[18:20] for copy in copies} == {b"\1\1"}, "without a log that would be written beside them"
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
    journal = tmp_path / "busy.db-journal"
    journal.write_bytes(bytes(512))
    assert count(prepare(tmp_path, path), "busy") == 3, "a journal that is kept and does not count"
    journal.write_bytes(bytes.fromhex("d9d505f920a163d7") + bytes(504))
    assert "is writing to it" in said(path)


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
    config = load(None, [shlex.split(argument(key, value))[0] for key, value in prepared.settings.items()])
    parts = [read_tasks(path) for path in (*config.data.train_data, *config.data.val_data)]
    assert sorted(t.id for part in parts for t in part) == [t.id for t in tasks]
    assert config.environment.text2sql.database_root == str(tmp_path / "out" / "databases")


def test_questions_may_lie_among_the_data(tmp_path: Path, shop: Path) -> None:
    assert prepare_own(shop, questions_file(shop / "asked.csv", SHOP), tmp_path / "a").databases == ("shop",)
    with closing(sqlite3.connect(tmp_path / "a/databases/shop/shop.sqlite")) as connection:
        names = [row[0] for row in connection.execute("SELECT name FROM sqlite_master")]
    assert names == ["customers", "orders"]
    path = sqlite_file(tmp_path / "pets" / "pets.db")
    asked = questions_file(tmp_path / "pets" / "asked.csv", ASKED)
    assert prepare_own(path.parent, asked, tmp_path / "b").databases == ("pets",)
    assert prepare_own(tmp_path / "pets", asked, tmp_path / "b").databases == ("pets",)


def test_settings_survive_odd_paths(tmp_path: Path, shop: Path) -> None:
    out = tmp_path / "a, b: [c] 'd'"
    prepared = prepare_own(shop, questions_file(tmp_path / "q.csv", SHOP), out)
    config = load(None, [shlex.split(argument(key, value))[0] for key, value in prepared.settings.items()])
    assert config.data.train_data == (str(out / "train.jsonl"),)
    assert config.environment.text2sql.database_root == str(out / "databases")


def test_names_that_are_no_text_are_refused(tmp_path: Path, shop: Path) -> None:
    asked = questions_file(tmp_path / "q.csv", SHOP)
    for name in (os.fsdecode(b"l\xe4den"), "two\nlines"):
        with pytest.raises(DataError, match="can't be a database's name"):
            prepare_own(shop.rename(tmp_path / name), asked, tmp_path / "out")
        (tmp_path / name).rename(shop)
        with pytest.raises(DataError, match="can't be part of the questions' ids"):
            prepare_own(shop, questions_file(tmp_path / f"{name}.csv", SHOP), tmp_path / "out")
    assert not (tmp_path / "out").exists()


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
    assert prepared.settings["data.val_data"] == [str(tmp_path / "out" / "train.jsonl")]
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
        with pytest.raises(DataError, match="--valid"):
            prepare(tmp_path, shop, SHOP, valid=share)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(100, 100, 10))
    with pytest.raises(UserError, match="copying the databases needs"):
        prepare(tmp_path, shop, SHOP)
    assert not (tmp_path / "out").exists()
    size = sqlite_file(tmp_path / "dbs" / "a.db").stat().st_size
    sqlite_file(tmp_path / "dbs" / "b.db")
    asked = questions_file(tmp_path / "q.csv", [("q", "SELECT 1", "a")], "question,sql,db")
    free = 2 * size
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(100, 100, free))
    prepare_own(tmp_path / "dbs", asked, tmp_path / "out")
    (tmp_path / "out" / "databases" / ".part-killed").mkdir()
    free = size  # for one database at a time, as the old ones go
    prepare_own(tmp_path / "dbs", asked, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out" / "databases").iterdir()) == ["a", "b"]


def test_what_is_missing_is_told(tmp_path: Path) -> None:
    for name in "abc":
        sqlite_file(tmp_path / "dbs" / f"{name}.db")
    asked = questions_file(tmp_path / "q.csv", [("q", "SELECT 1", "a")], "question,sql,db")
    prepared = prepare_own(tmp_path / "dbs", asked, tmp_path / "out")
    assert prepared.notes == (
        "too few questions for a validation part: all are for training",
        "2 of 3 databases have no question: b, c",
    )
