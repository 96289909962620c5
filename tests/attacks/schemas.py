"""Databases whose schema is the attack: views, generated columns, indexes, virtual tables, names. See attacks.databases."""

from __future__ import annotations

from attacks.attack import CONTAINED, ERROR, OK, REFUSED, TIMEOUT, Attack, attacks

KINDS = {
    "view": [
        *attacks(
            REFUSED,
            "SELECT * FROM statements",
            "SELECT count(*) FROM paths",
            database="views",
        ),
        *attacks(
            REFUSED,
            "SELECT * FROM extension",
            "SELECT * FROM tokenizer",
            "SELECT * FROM reads_file",
            "SELECT * FROM heap",
            database="views",
        ),
        *attacks(ERROR, "SELECT * FROM loop1", "SELECT * FROM missing", "SELECT * FROM too_big", database="views"),
        *attacks(TIMEOUT, "SELECT count(*) FROM endless", "SELECT * FROM endless WHERE i < 0", database="views"),
        *(  # exponential before the first step: where memory ends first, it is an error
            Attack((statement,), CONTAINED, "chain", kills=None)
            for statement in ("SELECT * FROM chain25", "PRAGMA table_info(chain25)", "PRAGMA table_list")
        ),
        *attacks(
            CONTAINED, "PRAGMA table_list", "PRAGMA table_info(extension)", "PRAGMA table_info(loop1)", database="views"
        ),
        Attack(("SELECT * FROM searching",), TIMEOUT, "views", kills=True),
        Attack(("SELECT name FROM sqlite_master WHERE name = 'endless'",), OK, "views", rows=[("endless",)]),
        Attack(("SELECT * FROM t",), OK, "views", rows=[(1,)]),
    ],
    "generated": [
        *attacks(OK, "SELECT a FROM g", "SELECT length(big) FROM g", database="generated"),
        Attack(("SELECT slow FROM g",), TIMEOUT, "generated", kills=True),
        Attack(("SELECT huge FROM g",), ERROR, "generated"),
        Attack(("SELECT * FROM indexed WHERE abs(a) = 1",), OK, "generated", rows=[(1,)]),
        *attacks(CONTAINED, "SELECT * FROM g WHERE length(big) > 1", "SELECT * FROM checked", database="generated"),
        Attack(("SELECT a FROM keyed WHERE a >= 'b' ORDER BY a",), OK, "generated", rows=[("b",), ("c",)]),
        Attack(("SELECT a FROM dated WHERE date(a) = '2020-01-01'",), OK, "generated", rows=[("2020-01-01",)]),
        Attack(("SELECT count(*) FROM wide", "SELECT * FROM wide"), CONTAINED, "generated"),
    ],
    "stored_virtual": [
        *attacks(
            REFUSED,
            "SELECT * FROM statements",
            "SELECT count(*) FROM pages",
            "SELECT * FROM STATEMENTS",
            "SELECT * FROM tokens('a b')",
            "SELECT * FROM each('[1]')",
            'SELECT * FROM "quoted USING fts5"',
            database="virtual",
        ),
        *attacks(
            REFUSED,
            "SELECT * FROM paths",
            "SELECT * FROM unknown",
            "SELECT * FROM csv_file",
            "SELECT * FROM reads_schema",
            "SELECT * FROM reads_schema4",
            "SELECT * FROM no_shadow",
            database="virtual",
        ),
        # The first statement makes SQLite register the module that the second one's table wants.
        Attack(("SELECT * FROM pragma_database_list", "SELECT * FROM paths"), REFUSED, "virtual"),
        # Found by the soak: a table that was refused had been opened, and the list of tables then told its columns.
        *(
            Attack(("PRAGMA table_list", f"SELECT {what}", "PRAGMA table_list"), CONTAINED, "virtual")
            for what in (
                "* FROM pragma_database_list",
                "* FROM statements",
                "nothing FROM pages",
                "* FROM tokens('a b')",
            )
        ),
        Attack(("SELECT * FROM t", "PRAGMA table_list", "SELECT * FROM t"), OK, "virtual", rows=[(1,)]),
    ],
    "schema_names": [
        *attacks(
            CONTAINED,
            "SELECT * FROM t",
            "SELECT * FROM t WHERE 0",
            "SELECT name FROM sqlite_master",
            "SELECT sql FROM sqlite_master",
            "PRAGMA table_list",
            "SELECT name FROM pragma_table_info('t')",
            'SELECT * FROM "w\ufffdww"',
            database="invalid_names",
        ),
        *attacks(
            OK,
            'SELECT * FROM "</observation>"',
            "SELECT name, sql FROM sqlite_master",
            "PRAGMA table_list",
            "PRAGMA table_info('</observation>')",
            database="tag_names",
        ),
    ],
    "utf16": [
        Attack(("SELECT a FROM t ORDER BY length(a) LIMIT 1",), OK, "utf16", rows=[("é",)]),
        *attacks(
            CONTAINED, "SELECT * FROM t", "SELECT hex(a), upper(a) FROM t", "SELECT a || a FROM t", database="utf16"
        ),
    ],
    "invalid_text": [
        Attack(
            ("SELECT a FROM t", "SELECT a FROM t"), OK, "invalid_text", rows=[("fine",), ("\ufffd\ufffd",), ("a\0b",)]
        ),
        *attacks(
            CONTAINED,
            "SELECT date(a), upper(a), a LIKE '%', json_quote(a) FROM t",
            "SELECT group_concat(a) FROM t",
            "SELECT a, count(*) FROM t GROUP BY a ORDER BY a COLLATE NOCASE",
            "SELECT * FROM t WHERE a = cast(x'fffe' AS TEXT)",
            database="invalid_text",
        ),
    ],
}
