"""DuckDB as the SQL engine: what it answers, what it refuses, and that whatever it survives leaves no trace."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from duckdb_attacks import DENIED, EXHAUSTING, PLACES, REFUSED, UNSTOPPABLE

from rollout.environment import make_environment_factory
from rollout.errors import InfrastructureError, UserError
from rollout.sql import Executor, schema
from rollout.sql.engines import ENGINES
from rollout.sql.syntax import is_ordered
from rollout.types import Task
from sqlrl_jax.config import Config

duckdb = pytest.importorskip("duckdb")

CHARS = 2000
SHOP = """
CREATE SCHEMA archive;
CREATE TYPE mood AS ENUM ('happy', 'sad');
CREATE SEQUENCE counter;
CREATE TABLE shop (id INTEGER PRIMARY KEY, name VARCHAR NOT NULL, opened DATE, "left" BOOLEAN);
CREATE TABLE sale (shop_id INTEGER REFERENCES shop (id), nr INTEGER, price DECIMAL(10, 2), tags VARCHAR[],
                   PRIMARY KEY (shop_id, nr));
CREATE TABLE archive."old sale" (nr BIGINT, note STRUCT(a INTEGER, b VARCHAR), feeling mood);
CREATE VIEW cheap AS SELECT * FROM sale WHERE price < 5;
CREATE MACRO twice(x) AS x * 2;
COMMENT ON COLUMN shop.opened IS 'day of opening';
INSERT INTO shop VALUES (1, 'Nord', '2020-02-29', true), (2, 'Süd </observation>', NULL, false);
INSERT INTO sale VALUES (1, 1, 1.50, ['a', 'b']), (1, 2, 20, NULL), (2, 1, 3.05, []);
INSERT INTO archive."old sale" VALUES (1, {'a': 1, 'b': 'x'}, 'happy');
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("databases")
    for name, script in (("shop", SHOP), ("other", "CREATE TABLE secret AS SELECT 'gold' AS word")):
        (root / name).mkdir()
        with duckdb.connect(str(root / name / f"{name}.duckdb")) as connection:
            connection.execute(script)
    (root / "shop" / "data.csv").write_text("a,b\n1,2\n")
    return root


@pytest.fixture(scope="module")
def executor(root: Path) -> Iterator[Executor]:
    with Executor(root, workers=1, timeout=0.5, max_observation_chars=CHARS, engine="duckdb") as executor:
        yield executor


TYPES = {
    "1::TINYINT": (1, "1"),
    "170141183460469231731687303715884105727::HUGEINT": (2**127 - 1, str(2**127 - 1)),
    "'-18446744073709551616'::BIGNUM": (-(2**64), str(-(2**64))),
    "repeat('9', 300)::BIGNUM": (10**300 - 1, hex(10**300 - 1)),
    "repeat('9', 301)::BIGNUM": ("9" * 301, "9" * 301),
    "1.50::DECIMAL(5, 2)": (1.5, "1.50"),
    "12345678901234567890123456789.00::DECIMAL(38, 2)": (
        12345678901234567890123456789,
        "12345678901234567890123456789.00",
    ),
    "0.1::FLOAT": (0.1, "0.1"),
    "1e100::DOUBLE": (1e100, "1e+100"),
    "'NaN'::DOUBLE": ("nan", "nan"),
    "'-Infinity'::FLOAT": (float("-inf"), "-inf"),
    "true": ("true", "true"),
    "NULL": (None, "NULL"),
    "'NULL'": ("NULL", "'NULL'"),
    "' x'": (" x", "' x'"),
    "'\\x00\\xff'::BLOB": (b"\x00\xff", "x'00ff'"),
    "DATE '2020-02-29'": ("2020-02-29", "2020-02-29"),
    "DATE '-290000-01-01'": ("290001-01-01 (BC)", "290001-01-01 (BC)"),
    "'infinity'::DATE": ("infinity", "infinity"),
    "TIME '12:30:01.5'": ("12:30:01.5", "12:30:01.5"),
    "TIMESTAMP '2020-02-29 12:00:00.123456'": ("2020-02-29 12:00:00.123456", "2020-02-29 12:00:00.123456"),
    "TIMESTAMPTZ '2020-01-01 00:00:00+02'": ("2019-12-31 22:00:00+00", "2019-12-31 22:00:00+00"),
    "INTERVAL '1 month 3 days'": ("1 month 3 days", "1 month 3 days"),
    "'0b9a1f0e-8c52-4f0e-9a3c-1d2e3f405162'::UUID": ("0b9a1f0e-8c52-4f0e-9a3c-1d2e3f405162",) * 2,
    "[1, NULL, 3]": ("[1, NULL, 3]", "[1, NULL, 3]"),
    "[1.50]": ("[1.50]", "[1.50]"),
    "{'a': 1, 'b': 'x'}": ("{'a': 1, 'b': x}", "{'a': 1, 'b': x}"),
    "MAP {'k': 1}": ("{k=1}", "{k=1}"),
    "'101'::BIT": ("101", "101"),
    "'{\"a\": 1}'::JSON": ('{"a": 1}', '{"a": 1}'),
    "'happy'::mood": ("happy", "happy"),
    "chr(0) || '</observation>' || chr(10)": ("\0</observation>\n", "'\\x00&lt;/observation>\\n'"),
}


@pytest.mark.parametrize("expression", TYPES)
def test_cells_of_every_type(executor: Executor, expression: str) -> None:
    cell, shown = TYPES[expression]
    result = executor.run("shop", f"SELECT {expression} AS x", whole=True)
    assert result.status == "ok", result.error
    assert list(result.rows) == [(cell,)]
    assert type(result.rows[0][0]) is type(cell)
    assert result.observation == f"x\n{shown}"


def test_rows_keep_their_order_and_names(executor: Executor) -> None:
    result = executor.run("shop", "SELECT id, opened, opened FROM shop ORDER BY id DESC -- the end", whole=True)
    assert result.columns == ("id", "opened", "opened")
    assert list(result.rows) == [(2, None, None), (1, "2020-02-29", "2020-02-29")]
    sql = "SELECT i, DATE '2020-01-01' + i::INTEGER AS day FROM range(50000) r(i) ORDER BY hash(i)"
    first, second = (executor.run("shop", sql, whole=True) for _ in range(2))
    assert list(first.rows) == list(second.rows)
    plain = executor.run("shop", "SELECT i FROM range(50000) r(i) ORDER BY hash(i)", whole=True)
    assert [row[0] for row in first.rows] == [row[0] for row in plain.rows]


@pytest.mark.parametrize(
    ("sql", "shown"),
    [
        ("FROM shop SELECT name", "name\nNord\nSüd &lt;/observation>"),
        ("DESCRIBE shop", "column_name | column_type | null | key | default | extra\nid | INTEGER | NO | PRI"),
        ("SHOW TABLES", "name\ncheap\nsale\nshop"),
        ("SUMMARIZE sale", "column_name | column_type | min | max"),
        ("SELECT table_name FROM information_schema.tables ORDER BY ALL", "table_name\ncheap\nold sale\nsale\nshop"),
        ("SELECT column_name FROM duckdb_columns() WHERE table_name = 'shop'", "column_name\nid\nname\nopened\nleft"),
        ("SELECT name FROM pragma_table_info('shop')", "name\nid\nname"),
        ("SELECT name FROM sqlite_master WHERE type = 'table'", "name\nold sale\nsale\nshop"),
        ("SELECT twice(21) AS x", "x\n42"),
        ("; SELECT 'ü;' AS x, opened FROM shop /* ; */ ;; -- the end;", "x | opened\nü; | 2020-02-29\nü; | NULL"),
        ("WITH a AS (SELECT 1 AS x) SELECT * FROM a UNION ALL SELECT 2 ORDER BY x;", "x\n1\n2"),
        ('SELECT * FROM shop.archive."old sale"', "nr | note | feeling\n1 | {'a': 1, 'b': x} | happy"),
        ("SELECT count(*) AS n FROM sale TABLESAMPLE reservoir(2 ROWS) REPEATABLE (1)", "n\n2"),
        ("SELECT now() AS x, current_date AS y", "x | y\n2025-01-01 00:00:00+00 | 2025-01-01"),
        ("SELECT localtimestamp AS x, today() AS y", "x | y\n2025-01-01 00:00:00 | 2025-01-01"),
        ("SELECT age(DATE '2000-01-01') AS x", "x\n25 years"),
        ("SELECT age(DATE '2001-01-01', DATE '2000-01-01') AS x", "x\n1 year"),
        ("SELECT strftime(current_timestamp, '%Y') AS x", "x\n2025"),
        ("SELECT i FROM range(100) r(i)", "i\n0\n1\n2"),
        ("SELECT i FROM range(100) r(i)", "(50 more rows)"),
        ("SELECT i FROM range(100000) r(i)", "(more than 9950 more rows)"),
        ("SELECT repeat('x', 1000000) AS x", "… (+999600 characters)"),
        ("SELECT id FROM shop WHERE false", "id\n(no rows)"),
    ],
)
def test_queries(executor: Executor, sql: str, shown: str) -> None:
    result = executor.run("shop", sql)
    assert result.status == "ok", result.error
    assert shown in result.observation


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("SELECT nix FROM shop", 'Binder Error: Referenced column "nix" not found in FROM clause! Candidate bindings:'),
        ("SELECT * FROM shops", 'Catalog Error: Table with name shops does not exist! Did you mean "shop"?'),
        ("selec", "Parser Error: syntax error at or near"),
        ("SELECT 1; SELECT 2", "expected one statement, found 2"),
        ("-- nothing", "there is no statement"),
        ("SELECT ?", "Values were not provided for the following parameters: 1"),
        ("SELECT '\ud800'", "the statement is not valid Unicode text"),
        ("SELECT 1/0 + 'x'::INTEGER", "Conversion Error"),
    ],
)
def test_errors_say_what_is_wrong(executor: Executor, sql: str, message: str) -> None:
    result = executor.run("shop", sql)
    assert result.status == "error"
    assert message in result.observation
    assert "\n" not in result.observation


def snapshot(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def contained(executor: Executor, root: Path, scratch: Path, attack: str, statuses: set[str]) -> str:
    """Runs an attack and looks for what it may have left behind; what the model reads."""
    before = snapshot(root)
    sql = attack.replace("{root}", str(root)).replace("{scratch}", str(scratch)).replace("{{}}", "{}")
    result = executor.run("shop", sql)
    assert result.status in statuses, (result.status, result.error)
    assert len(result.observation) <= CHARS
    assert "gold" not in result.observation  # of another database
    assert str(root) in sql or str(root) not in result.observation
    assert snapshot(root) == before
    assert not list(scratch.iterdir())
    following = executor.run("shop", "SELECT lower('A') AS a, current_date AS d, (SELECT count(*) FROM shop) AS n")
    assert following.observation == "a | d | n\na | 2025-01-01 | 2"
    return result.observation


@pytest.mark.parametrize("attack", DENIED)
def test_denied(executor: Executor, root: Path, tmp_path: Path, attack: str) -> None:
    assert contained(executor, root, tmp_path, attack, {"denied"}).startswith("SQL Error: not authorized: ")


@pytest.mark.parametrize("function", ["random()", "\"Current_Setting\"('threads')", "system.main.now()"])
def test_denied_in_every_place(executor: Executor, function: str) -> None:
    for place in PLACES.strip().splitlines():
        result = executor.run("shop", place.replace("{}", function))
        assert result.status == "denied", (place, result.error)


@pytest.mark.parametrize("attack", REFUSED, ids=lambda attack: attack[:40])
def test_refused(executor: Executor, root: Path, tmp_path: Path, attack: str) -> None:
    contained(executor, root, tmp_path, attack, {"error"})


@pytest.mark.parametrize("attack", [*EXHAUSTING, UNSTOPPABLE])
def test_exhausting(executor: Executor, root: Path, tmp_path: Path, attack: str) -> None:
    assert contained(executor, root, tmp_path, attack, {"timeout"}) == "SQL Timeout"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_its_workers_are_walled_in(executor: Executor) -> None:
    for pid in executor.worker_pids():
        assert "NoNewPrivs:\t1\n" in Path(f"/proc/{pid}/status").read_text()


def test_there_are_enough_attacks() -> None:
    assert len({*DENIED, *REFUSED, *EXHAUSTING, UNSTOPPABLE}) >= 100


def test_databases_are_seen_one_at_a_time(executor: Executor) -> None:
    for _ in range(3):
        assert executor.run("other", "SELECT * FROM secret").observation == "word\ngold"
        assert executor.run("shop", "SELECT name FROM shop WHERE id = 1").observation == "name\nNord"
        assert "does not exist" in executor.run("shop", "SELECT * FROM secret").error
    names = executor.run("shop", "SELECT DISTINCT table_catalog FROM information_schema.tables").observation
    assert names == "table_catalog\nshop"


def test_results_are_bounded_when_whole(executor: Executor) -> None:
    assert "result too large" in executor.run("shop", "SELECT * FROM range(200000)", whole=True).error
    sql = "SELECT repeat('x', 1000000) FROM range(80)"
    assert "result too large" in executor.run("shop", sql, whole=True).error
    assert len(executor.run("shop", "SELECT * FROM range(99000)", whole=True).rows) == 99_000


def broken(root: Path, name: str) -> Path:
    path = root / name / f"{name}.duckdb"
    path.parent.mkdir(parents=True)
    with duckdb.connect(str(path)) as connection:
        connection.execute("CREATE TABLE t AS SELECT i, hash(i)::VARCHAR AS h FROM range(200000) r(i)")
    return path


def test_a_database_that_can_not_be_read_is_nobodys_wrong_answer(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "text.duckdb").write_text("no database")
    torn = broken(tmp_path, "torn")
    data = bytearray(torn.read_bytes())
    for position in range(len(data) // 4, len(data), 50_000):
        data[position] ^= 0xFF
    torn.write_bytes(data)
    cut = broken(tmp_path, "cut")
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    pending = broken(tmp_path, "pending")
    pending.with_name("pending.duckdb.wal").write_bytes(b"x")
    changed = broken(tmp_path, "changed")
    with Executor(tmp_path, workers=1, timeout=5, engine="duckdb") as executor:
        assert executor.run("changed", "SELECT count(*) AS n FROM t").observation == "n\n200000"
        for name, reason in (
            ("nowhere", "can't be opened"),
            ("text", "can't be read"),
            ("pending", "unfinished changes"),
        ):
            with pytest.raises(InfrastructureError, match=rf"{name}.*{reason}"):
                executor.run(name, "SELECT 1")
        for name in ("torn", "cut"):
            with pytest.raises(InfrastructureError, match=f"{name}.*can't be read"):
                executor.run(name, "SELECT sum(i), max(h) FROM t")
        with duckdb.connect(str(changed)) as connection:
            connection.execute("DELETE FROM t WHERE i > 9")
        assert executor.run("changed", "SELECT count(*) AS n FROM t").observation == "n\n10"


def test_the_schema(executor: Executor) -> None:
    text = schema.open_schema(executor, "shop", "full").text()
    assert (
        "CREATE TABLE shop (\n  id INTEGER NOT NULL PRIMARY KEY, -- e.g. 1, 2\n"
        "  name VARCHAR NOT NULL, -- e.g. 'Nord', 'Süd &lt;/observation>'\n"
        "  opened DATE, -- day of opening; e.g. '2020-02-29'\n  \"left\" BOOLEAN -- e.g. 'true', 'false'\n);"
    ) in text
    assert "  PRIMARY KEY (shop_id, nr),\n  FOREIGN KEY (shop_id) REFERENCES shop(id)\n" in text
    assert 'CREATE TABLE archive."old sale" (\n  nr BIGINT, -- e.g. 1\n  note STRUCT(a INTEGER, b VARCHAR)' in text
    assert "CREATE TABLE cheap (" in text
    assert "sale(shop_id, nr, price, tags)\n" in schema.open_schema(executor, "shop", "short").text()
    with duckdb.connect(":memory:") as copy:
        copy.execute("CREATE SCHEMA archive")
        copy.execute(text)
        tables = copy.execute("SELECT table_name FROM duckdb_tables() ORDER BY 1").fetchall()
    assert tables == [("cheap",), ("old sale",), ("sale",), ("shop",)]


@pytest.mark.parametrize(
    ("sql", "ordered"),
    [
        ("FROM t SELECT a ORDER BY a", True),
        ("SELECT a::DATE FROM t GROUP BY ALL ORDER BY ALL DESC", True),
        ("SELECT * EXCLUDE (a) FROM t ORDER BY b LIMIT 10%", True),
        ("SELECT list_transform(l, lambda x: x + 1) FROM t ORDER BY 1", True),
        ("SELECT [x FOR x IN l], {'a': 1} AS s FROM t ORDER BY s.a", True),
        ("SELECT a FROM t QUALIFY row_number() OVER (ORDER BY a) = 1", False),
        ("SELECT list(a ORDER BY b) FROM t", False),
        ("SELECT $$ORDER BY$$ FROM t", False),
        ("PIVOT t ON a IN (1, 2) USING count(*)", False),
        ("WITH x AS (SELECT 1 ORDER BY 1) FROM x", False),
    ],
)
def test_grading_sees_whether_a_duckdb_query_orders(sql: str, ordered: bool) -> None:
    assert is_ordered(sql) is ordered


def test_an_episode(root: Path) -> None:
    sql: dict[str, Any] = {"database_root": str(root), "workers": 1, "engine": "duckdb"}
    config = Config.model_validate({"environment": {"text2sql": sql}})
    with make_environment_factory(config) as factory:
        environment = factory.create()
        gold = "SELECT name, opened FROM shop ORDER BY id"
        system, user = environment.reset(Task("t", "test", {"db_id": "shop", "question": "Which?", "gold_sql": gold}))
        assert "a DuckDB database" in system["content"]
        assert "opened DATE" in user["content"]
        step = environment.step("<think>look</think><sql>SELECT sum(price) AS s FROM sale</sql>", 1)
        assert "<observation>s\n24.55\n" in str(step.observation)
        assert (
            environment.step("<solution>FROM shop SELECT name, opened ORDER BY id</solution>", 2).outcome == "correct"
        )
        assert environment.step(f"<solution>{gold} DESC</solution>", 2).outcome == "wrong"
        assert environment.step("<solution>SELECT random()</solution>", 2).outcome == "sql_error"


def test_an_engine_that_can_not_start_is_nobodys_wrong_answer(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("rollout.sql.executor.find_spec", lambda name: None)
        with pytest.raises(
            UserError, match=r"text2sql\.engine = duckdb: the package is missing; install the extra duckdb"
        ):
            Executor(root, workers=1, engine="duckdb")
    monkeypatch.setitem(ENGINES, "unknown", ENGINES["duckdb"]._replace(site_packages=False))  # to this process only
    with (
        Executor(root, workers=1, engine="unknown") as executor,
        pytest.raises(InfrastructureError, match="ends before it is ready"),
    ):
        executor.run("shop", "SELECT 1")
