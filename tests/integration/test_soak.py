"""A short soak of the SQL environment, and that the soak would see what it looks for."""

from __future__ import annotations

import importlib.util
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def soak() -> ModuleType:
    path = ROOT / "benchmarks" / "soak.py"
    spec = importlib.util.spec_from_file_location("soak", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["soak"] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def test_thousands_of_mixed_queries_give_the_same_verdicts_alone_and_on_a_busy_machine() -> None:
    command = [sys.executable, "benchmarks/soak.py", "--queries", "2000", "--hostile", "0.03", "--burn"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("queries in") == 2
    assert done.stdout.endswith("all is well\n")
    assert "harmless ok" in done.stdout
    assert "hostile denied" in done.stdout


def test_a_wrong_verdict_is_seen(soak: ModuleType) -> None:
    query = soak.Query("d", "SELECT 1", True, frozenset({"ok"}), reference=b"right")
    ledger = soak.Ledger([query, soak.Query("d", "BEGIN", True, frozenset({"denied"}))])
    ledger.record(0, "ok", b"mark", b"right")
    ledger.record(1, "denied", b"mark", b"")
    assert not ledger.wrong
    ledger.record(0, "ok", b"mark", b"wrong")
    ledger.record(0, "ok", b"other mark", b"right")
    ledger.record(0, "timeout", b"mark", b"right")
    ledger.record(1, "ok", b"mark", b"")
    assert [what.partition(": ")[0] for what in ledger.wrong] == [
        "not what sqlite3 gives",
        "not the first verdict",
        "timeout instead of ok",
        "ok instead of denied",
    ]


def test_memory_that_grows_is_seen(soak: ModuleType) -> None:
    def samples(worker_step: int, parent_step: int) -> list[object]:
        return [
            soak.Sample(i / 100, 50_000_000 + parent_step * i, {1: 20_000_000, 2: 30_000_000 + worker_step * i})
            for i in range(101)
        ]

    for steps, expected in (
        ((0, 0), []),
        ((20_000, 0), []),  # less than a megabyte
        ((200_000, 0), ["worker 2"]),
        ((0, 300_000), ["parent"]),
    ):
        rows = soak.growth(samples(*steps))
        assert [name for name, _, _ in rows] == ["parent", "worker 1", "worker 2"]
        assert [name for name, before, after in rows if soak.grew(before, after)] == expected


def test_bombs_between_do_not_count(soak: ModuleType) -> None:
    samples = [soak.Sample(i / 100, 50_000_000, {1: 400_000_000 if i % 3 else 20_000_000}) for i in range(101)]
    assert soak.growth(samples)[1] == ("worker 1", 20_000_000, 20_000_000)


def test_the_reference_is_a_plain_connection_within_the_same_steps(soak: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "d.sqlite"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE t AS SELECT 1 AS a")
    connection.commit()
    connection.close()
    assert soak.reference(path, "SELECT a FROM t") == ("ok", soak.digest(("a",), [(1,)]))
    assert soak.reference(path, "SELECT b FROM t") == ("error", None)
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"
    assert soak.reference(path, endless) == ("timeout", None)


def test_a_process_is_measured(soak: ModuleType) -> None:
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("needs /proc")
    assert soak.resident(os.getpid()) > 10_000_000
    assert soak.resident(2**22 + 1) == 0
