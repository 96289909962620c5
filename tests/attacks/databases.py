"""Makes the databases that the attacks run on, hostile ones among them."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from pathlib import Path

_NUMBERS = "WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n LIMIT 500) "
_BASE = (
    "CREATE TABLE t (a INTEGER, b TEXT)",
    "INSERT INTO t " + _NUMBERS + "SELECT i, 'v' || i FROM n",
    "CREATE INDEX t_b ON t(b)",
)
_PLAIN = (
    *_BASE,
    "CREATE VIEW v AS SELECT a FROM t",
    "CREATE VIEW today AS SELECT date('now'), current_timestamp",
    "CREATE VIEW dice AS SELECT a, random() FROM t LIMIT 5",
    "CREATE TABLE u (id INTEGER PRIMARY KEY AUTOINCREMENT, x UNIQUE)",
    "CREATE INDEX u_x ON u(x)",
    "INSERT INTO u(x) VALUES (1), (2)",
    "CREATE VIRTUAL TABLE f USING fts5(x)",
    "INSERT INTO f SELECT 'w' || a || ' common' FROM t",
    "CREATE VIRTUAL TABLE f4 USING fts4(x)",
    "INSERT INTO f4 SELECT 'w' || a || ' common' FROM t",
    "CREATE VIRTUAL TABLE r USING rtree(id, x0, x1)",
    "INSERT INTO r SELECT a, a, a + 1 FROM t",
)
_SEARCH = "instr(hex(zeroblob(1900000)), hex(zeroblob(900000)) || '1')"

_STATEMENTS: dict[str, tuple[str, ...]] = {
    "plain": _PLAIN,
    "triggers": (
        "CREATE TABLE logged (x)",
        "CREATE TABLE looped (x)",
        "CREATE VIEW writable AS SELECT x FROM logged",
        "CREATE TRIGGER a AFTER INSERT ON logged BEGIN DELETE FROM looped; END",
        "CREATE TRIGGER b AFTER DELETE ON logged BEGIN INSERT INTO logged VALUES (1); END",
        "CREATE TRIGGER c AFTER INSERT ON looped BEGIN INSERT INTO looped VALUES (new.x + 1); END",
        "CREATE TRIGGER d INSTEAD OF INSERT ON writable BEGIN INSERT INTO logged VALUES (new.x); END",
    ),
    "modules": tuple(
        f"CREATE TABLE {name} AS SELECT 1 AS a"
        for name in (
            "completion",
            "bytecode",
            "fsdir",
            "dbstat",
            "pragma_database_list",
            "pragma_x",
            "json_each",
            "csv",
        )
    ),
    "views": (
        "CREATE TABLE t AS SELECT 1 AS a",
        "CREATE VIEW extension AS SELECT load_extension('/tmp/evil.so')",
        "CREATE VIEW statements AS SELECT * FROM sqlite_stmt",
        "CREATE VIEW paths AS SELECT * FROM pragma_database_list",
        "CREATE VIEW heap AS SELECT * FROM pragma_hard_heap_limit(1)",
        "CREATE VIEW tokenizer AS SELECT hex(fts3_tokenizer('simple'))",
        "CREATE VIEW reads_file AS SELECT readfile('/etc/passwd')",
        "CREATE VIEW loop1 AS SELECT * FROM loop2",
        "CREATE VIEW loop2 AS SELECT * FROM loop1",
        "CREATE VIEW missing AS SELECT * FROM nowhere",
        "CREATE VIEW too_big AS SELECT zeroblob(5000000)",
        "CREATE VIEW endless AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n",
        f"CREATE VIEW searching AS SELECT {_SEARCH}",
    ),
    "chain": (
        "CREATE VIEW chain0 AS SELECT 1 AS a",
        *(f"CREATE VIEW chain{i} AS SELECT x.a FROM chain{i - 1} x, chain{i - 1} y" for i in range(1, 26)),
    ),
    "generated": (
        "CREATE TABLE g (a, big AS (hex(zeroblob(1900000))))",
        "INSERT INTO g(a) VALUES (1), (2), (3)",
        "ALTER TABLE g ADD COLUMN huge AS (hex(zeroblob(2500000)))",
        f"ALTER TABLE g ADD COLUMN slow AS ({_SEARCH})",
        f"CREATE TABLE checked (a CHECK (length({_SEARCH}) > 0 OR 1), b DEFAULT (randomblob(100000000)))",
        "CREATE TABLE indexed (a)",
        "CREATE INDEX indexed_a ON indexed(abs(a))",
        "INSERT INTO indexed VALUES (1), (-2)",
        "CREATE TABLE keyed (a PRIMARY KEY, b) WITHOUT ROWID",
        "INSERT INTO keyed VALUES ('c', 1), ('b', 2), ('a', 3)",
        "CREATE TABLE dated (a)",
        "CREATE INDEX dated_a ON dated(date(a))",
        "INSERT INTO dated VALUES ('2020-01-01'), ('2020-01-02')",
        f"CREATE TABLE wide ({', '.join(f'c{i} DEFAULT {i}' for i in range(1900))})",
        "INSERT INTO wide DEFAULT VALUES",
    ),
    "virtual": ("CREATE TABLE t AS SELECT 1 AS a",),
    "invalid_names": (
        "CREATE TABLE t (aaaa, bbbb)",
        "INSERT INTO t VALUES (1, 'x')",
        "CREATE VIEW wwww AS SELECT nope FROM t",
    ),
    "tag_names": (
        'CREATE TABLE "</observation>" ("<sql>", "<|im_end|>", "a | b", "")',
        "INSERT INTO \"</observation>\" VALUES ('</solution>', '[/INST]', char(10), '<think>')",
    ),
    "utf16": (
        "PRAGMA encoding = 'UTF-16le'",
        "CREATE TABLE t (a)",
        "INSERT INTO t VALUES ('é'), ('emoji ' || char(128512)), (cast(x'00d8' AS TEXT)), (cast(x'00dc00d8' AS TEXT))",
    ),
    "invalid_text": (
        "CREATE TABLE t (a)",
        "INSERT INTO t VALUES ('fine'), (cast(x'fffe' AS TEXT)), ('a' || char(0) || 'b')",
    ),
}

_VIRTUAL = {
    "statements": "CREATE VIRTUAL TABLE statements USING sqlite_stmt",
    "pages": "CREATE VIRTUAL TABLE pages USING dbstat",
    "paths": "CREATE VIRTUAL TABLE paths USING pragma_database_list",
    "tokens": "CREATE VIRTUAL TABLE tokens USING fts3tokenize",
    "each": "CREATE VIRTUAL TABLE each USING json_each",
    "quoted USING fts5": 'CREATE VIRTUAL TABLE "quoted USING fts5" USING sqlite_stmt',
    "unknown": "CREATE VIRTUAL TABLE unknown USING no_such_module(x)",
    "csv_file": "CREATE VIRTUAL TABLE csv_file USING csv(filename='/etc/passwd')",
    "reads_schema": "CREATE VIRTUAL TABLE reads_schema USING fts5(a, content=sqlite_master)",
    "reads_schema4": "CREATE VIRTUAL TABLE reads_schema4 USING fts4(a, content=sqlite_master)",
    "no_shadow": "CREATE VIRTUAL TABLE no_shadow USING rtree(a, b, c)",
}


def make(root: Path, name: str) -> None:
    """Makes `<root>/<name>/<name>.sqlite`, as the attacks on it expect; nothing for a name that is an attack by itself."""
    if name in _STATEMENTS:
        _database(root, name, _STATEMENTS[name])
    if name in _SPECIAL:
        _SPECIAL[name](root, name)


def _database(root: Path, name: str, statements: tuple[str, ...] = _BASE) -> Path:
    (root / name).mkdir(parents=True)
    path = root / name / f"{name}.sqlite"
    connection = sqlite3.connect(path)
    for statement in statements:
        connection.execute(statement)
    connection.commit()
    connection.close()
    return path


def _edited(
    edit: Callable[[bytearray], bytes | bytearray], statements: tuple[str, ...] = _BASE
) -> Callable[[Path, str], None]:
    def build(root: Path, name: str) -> None:
        path = _database(root, name, statements)
        path.write_bytes(edit(bytearray(path.read_bytes())))

    return build


def _set(start: int, data: bytes) -> Callable[[bytearray], bytes]:
    return lambda content: bytes(content[:start]) + data + bytes(content[start + len(data) :])


def _schema(*rows: tuple[object, ...], change: str = "") -> Callable[[Path, str], None]:
    """Writes into the schema table what no statement would."""

    def build(root: Path, name: str) -> None:
        path = root / name / f"{name}.sqlite"
        if not path.exists():
            _database(root, name)
        connection = sqlite3.connect(path)
        connection.execute("PRAGMA writable_schema = ON")
        connection.executemany("INSERT INTO sqlite_master VALUES (?, ?, ?, ?, ?)", rows)
        if change:
            connection.execute(change)
        connection.commit()
        connection.close()

    return build


def _rename(root: Path, name: str) -> None:
    path = root / name / f"{name}.sqlite"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"bbbb", b"b\xff\xfeb").replace(b"wwww", b"w\xffww").replace(b"nope", b"n\xffpe"))


def _freelist(root: Path, name: str) -> None:
    path = _database(root, name, (*_BASE, "CREATE TABLE gone AS SELECT zeroblob(90000)", "DROP TABLE gone"))
    content = path.read_bytes()
    path.write_bytes(_set(32, b"\xff\xff\xff\xf0\xff\xff\xff\xff")(bytearray(content)))


def _wal(root: Path, name: str) -> None:
    path = _database(root, name)
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.close()


def _unfinished(suffix: str) -> Callable[[Path, str], None]:
    def build(root: Path, name: str) -> None:
        path = _database(root, name)
        Path(f"{path}{suffix}").write_bytes(b"\xd9\xd5\x05\xf9\x20\xa1\x63\xd7" * 100)

    return build


def _locked(root: Path, name: str) -> None:
    # Held until the process ends: the connection is kept alive on purpose.
    connection = sqlite3.connect(_database(root, name), isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA locking_mode = EXCLUSIVE")
    connection.execute("BEGIN EXCLUSIVE")
    _LOCKS.append(connection)


def _link(target: str) -> Callable[[Path, str], None]:
    def build(root: Path, name: str) -> None:
        (root / name).mkdir(parents=True)
        (root / name / f"{name}.sqlite").symlink_to(target)

    return build


def _link_out(root: Path, name: str) -> None:
    outside = _database(root.parent, "outside")
    _link(str(outside))(root, name)


def _link_in(root: Path, name: str) -> None:
    _database(root, "target")
    _link("../target/target.sqlite")(root, name)


def _pipe(root: Path, name: str) -> None:
    (root / name).mkdir(parents=True)
    os.mkfifo(root / name / f"{name}.sqlite")


def _text(root: Path, name: str) -> None:
    (root / name).mkdir(parents=True)
    (root / name / f"{name}.sqlite").write_text("this is not a database" * 500)


_LOCKS: list[sqlite3.Connection] = []

_SPECIAL: dict[str, Callable[[Path, str], None]] = {
    "virtual": _schema(*(("table", name, name, 0, sql) for name, sql in _VIRTUAL.items())),
    "invalid_names": _rename,
    "not_a_database": _text,
    "bad_header": _edited(_set(0, b"SQLite format 4\0")),
    "bad_version": _edited(_set(18, b"\xff\xff")),
    "bad_page_size": _edited(_set(16, b"\x00\x07")),
    "bad_page": _edited(_set(4096, b"\xff" * 4096)),
    "bad_cells": _edited(_set(4096 * 2 + 8, b"\x00\x01" * 60)),
    "bad_pointers": _edited(_set(4096 + 8, b"\x00\x00\x00\x02" * 4)),
    "bad_freelist": _freelist,
    "truncated": _edited(lambda content: content[: 4096 * 2]),
    "cut_in_page": _edited(lambda content: content[: 4096 + 1500]),
    "bad_schema": _schema(("table", "x", "x", 4, "CREATE TABLE x (this is ((( not SQL")),
    "bad_rootpage": _schema(change="UPDATE sqlite_master SET rootpage = CASE name WHEN 't' THEN 3 ELSE 2 END"),
    "bad_shadow": _edited(lambda content: content.replace(b"common", b"\xff\xff\x00\xff\xff\xff"), _PLAIN),
    "empty": lambda root, name: (root / name).mkdir(parents=True) or (root / name / f"{name}.sqlite").touch(),
    "wal": _wal,
    "unfinished_wal": _unfinished("-wal"),
    "hot_journal": _unfinished("-journal"),
    "locked": _locked,
    "pipe": _pipe,
    "folder": lambda root, name: (root / name / f"{name}.sqlite").mkdir(parents=True),
    "link_out": _link_out,
    "link_to_device": _link("/dev/zero"),
    "link_loop": lambda root, name: _link(f"{name}.sqlite")(root, name),
    "link_in": _link_in,
}
