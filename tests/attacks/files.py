"""Database files that are damaged, in an unusual state, or not what they seem; and db_ids that lead elsewhere."""

from __future__ import annotations

from attacks.attack import BROKEN, CONTAINED, ERROR, OK, Attack, attacks

_READS = (
    "SELECT count(*), sum(a) FROM t",
    "SELECT * FROM t ORDER BY b",
    "SELECT b FROM t WHERE b > 'v3'",
    "PRAGMA table_list",
)


def _read(database: str, expected: str = CONTAINED + "|" + BROKEN) -> list[Attack]:
    return [Attack((statement,), expected, database) for statement in _READS]


KINDS = {
    "header": [
        attack for database in ("not_a_database", "bad_header", "bad_version") for attack in _read(database, BROKEN)[:2]
    ],
    "damaged": [
        attack
        for database in (
            "bad_page_size",
            "bad_page",
            "bad_cells",
            "bad_pointers",
            "bad_freelist",
            "truncated",
            "cut_in_page",
        )
        for attack in _read(database)[:3]
    ],
    "damaged_schema": [
        *_read("bad_schema", BROKEN)[:1],
        *_read("bad_rootpage")[:3],
        *attacks(
            CONTAINED + "|" + BROKEN, "SELECT * FROM f WHERE f MATCH 'common'", "SELECT * FROM r", database="bad_shadow"
        ),
    ],
    "empty_file": [
        Attack(("SELECT 1",), OK, "empty", rows=[(1,)]),
        Attack(("SELECT * FROM t",), ERROR, "empty"),
    ],
    "journal": [
        Attack(("SELECT count(*) FROM t",), BROKEN, "unfinished_wal"),
        Attack(("SELECT count(*) FROM t",), BROKEN, "hot_journal"),
        Attack(("SELECT count(*) FROM t",), OK, "wal", rows=[(500,)]),
    ],
    "lock": [Attack(("SELECT count(*) FROM t",), OK, "locked", rows=[(500,)])],
    "kind_of_file": [
        Attack(("SELECT 1",), BROKEN, "pipe"),  # found by attacking: opening it stopped a worker for good
        Attack(("SELECT 1",), BROKEN, "folder"),
        Attack(("SELECT 1",), BROKEN, "link_out"),
        Attack(("SELECT 1",), BROKEN, "link_to_device"),
        Attack(("SELECT 1",), BROKEN, "link_loop"),
        Attack(("SELECT count(*) FROM t",), OK, "link_in", rows=[(500,)]),
    ],
    "db_id": [
        Attack(("SELECT 1",), BROKEN, db_id)
        for db_id in (
            *(
                "",
                ".",
                "..",
                "../plain",
                "plain/../plain",
                "/etc/passwd",
                "/",
                "plain/",
                "//plain",
                "plain//plain",
                "./plain",
            ),
            *(
                ".hidden",
                "x\0y",
                "a\\b",
                "~",
                "*",
                "%2e%2e/plain",
                "plain?mode=rw",
                "plain#x",
                "nowhere",
                "x" * 5000,
                "\ud800",
            ),
            *("file:plain", ":memory:", "plain.sqlite", "\n", "plain\n", "CON", "-rf"),
        )
    ],
}
