"""Every PRAGMA that the running SQLite knows, as a statement without and with a value, as a call and as a table."""

from __future__ import annotations

import sqlite3

from attacks.attack import CONTAINED, DENIED, OK, REFUSED, attacks

# What a model may ask, and what full-text tables ask on their own (without a value).
SCHEMA = {"table_info", "table_xinfo", "table_list", "foreign_key_list", "index_list", "index_info", "index_xinfo"}
SILENT = {"data_version", "page_size"}
# What older and newer versions know, and what only acts in debug builds.
MORE = {
    *(
        "vdbe_debug",
        "vdbe_trace",
        "parser_trace",
        "vdbe_listing",
        "sql_trace",
        "lock_status",
        "stats",
        "activate_extensions",
    ),
    *(
        "hexkey",
        "key",
        "rekey",
        "legacy_file_format",
        "temp_store_directory",
        "data_store_directory",
        "lock_proxy_file",
    ),
    *("writable_schema", "hard_heap_limit", "soft_heap_limit", "trusted_schema", "no_such_pragma"),
}


def _names() -> list[str]:
    connection = sqlite3.connect(":memory:")
    names = {name for (name,) in connection.execute("PRAGMA pragma_list")}
    connection.close()
    return sorted((names | MORE) - SCHEMA)


def _every(name: str) -> tuple[str, ...]:
    alone = (f"PRAGMA {name}", f"PRAGMA main.{name}", f"EXPLAIN PRAGMA {name}") if name not in SILENT else ()
    value = (f"PRAGMA {name} = 1", f"PRAGMA {name} = 'main'", f"PRAGMA {name}(1)", f"PRAGMA temp.{name} = OFF")
    tables = (
        f"SELECT * FROM pragma_{name}",
        f"SELECT * FROM pragma_{name}(1)",
        f"SELECT (SELECT 1 FROM pragma_{name})",
    )
    # Some have no table; some names are no pragma of this build.
    return (*alone, *value, *tables)


KINDS = {
    "pragma": attacks(REFUSED, *(statement for name in _names() for statement in _every(name))),
    "pragma_value": attacks(
        DENIED,
        "PRAGMA hard_heap_limit = 1",
        "PRAGMA soft_heap_limit = 1",
        "PRAGMA writable_schema = RESET",
        "PRAGMA query_only = OFF",
        "PRAGMA journal_mode = WAL",
        "PRAGMA temp_store_directory = '{scratch}'",
        "PRAGMA page_size = 512",
        "PRAGMA mmap_size = 1000000000",
        "PRAGMA cache_size = -1000000000",
        "PRAGMA case_sensitive_like = ON",
        "PRAGMA reverse_unordered_selects = ON",
        "PRAGMA full_column_names = ON",
        "PRAGMA encoding = 'UTF-16'",
        "PRAGMA/**/hard_heap_limit/**/=/**/1",
        'pragma "hard_heap_limit" = 1',
        "PRAGMA [writable_schema](1)",
        "SELECT file FROM pragma_database_list",
        "SELECT name FROM pragma_function_list",
        "SELECT * FROM pragma_hard_heap_limit(1)",
        "SELECT * FROM pragma_table_info('t'), pragma_journal_mode",
        "WITH x AS (SELECT * FROM pragma_compile_options) SELECT count(*) FROM x",
    ),
    "pragma_schema": [
        *attacks(
            OK,
            *(
                f"PRAGMA {name}('t')"
                for name in sorted(SCHEMA - {"table_list"} - {"foreign_key_list", "index_list"})
                if "table" in name
            ),
        ),
        *attacks(
            OK,
            "PRAGMA table_list",
            "PRAGMA table_info(t)",
            "SELECT name FROM pragma_table_info('t')",
            "PRAGMA page_size",
        ),
        *attacks(
            CONTAINED,
            *(f"PRAGMA {name}" for name in sorted(SCHEMA)),
            *(f"PRAGMA {name} = 1" for name in sorted(SCHEMA)),
        ),
        *attacks(
            CONTAINED, "PRAGMA temp.table_list", "PRAGMA table_info('" + "x" * 50_000 + "')", "PRAGMA table_info(-1)"
        ),
    ],
}
