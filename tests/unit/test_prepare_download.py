"""`launch.py prepare --download` against a hub in miniature: what is fetched, and that it is not fetched twice."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import omnisql_tree as tree
import pytest
from hub_standin import Hub, running

import launch
from sqlrl_jax.data.public.sources import OMNISQL, SKYRL
from sqlrl_jax.data.tasks import read_tasks


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    for name in ("HF_TOKEN", "HTTPS_PROXY", "HTTP_PROXY", "http_proxy", "https_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN_PATH", "/nowhere")
    root = tree.build(tmp_path / "origin/data")
    with tree.database(root / "SynSQL-2.5M/databases", "not_asked_for").open("ab") as file:
        file.write(os.urandom(3_000_000))
    with running() as hub:
        for name in ("train.parquet", "validation.parquet"):
            hub.put(SKYRL, name, (root / "skyrl-sql" / name).read_bytes(), large=False)
        shutil.rmtree(root / "skyrl-sql")
        archive = shutil.make_archive(str(tmp_path / "data"), "zip", root.parent, "data")
        hub.put(OMNISQL, "data.zip", Path(archive).read_bytes())
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        yield hub


def run(capfd: Any, *arguments: Any) -> tuple[int, str, str]:
    code = launch.main(["prepare", *map(str, arguments)])
    return code, *capfd.readouterr()


def databases(data: Path) -> set[str]:
    return {path.stem for path in data.rglob("*.sqlite")}


def test_only_the_databases_that_rows_name_are_fetched(hub: Hub, tmp_path: Path, capfd: Any) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    assert run(capfd, "skyrl-sql-train", "--download", "--data", data, "--out", out)[0] == 0
    assert databases(data) == {"shop", "pets_1"}
    assert [task.source for task in read_tasks(out / "skyrl-sql-train.jsonl")] == ["synsql", "spider"]
    asked = len(hub.requests)
    assert run(capfd, "skyrl-sql-train", "--download", "--data", data, "--out", out)[0] == 0
    assert len(hub.requests) == asked
    code, text, _ = run(capfd, "spider-dev", "ehrsql", "--download", "--data", data, "--out", out)
    assert code == 0
    assert databases(data) == {"shop", "pets_1", "concert_singer", "mimic_iii"}
    assert hub.served < 1_000_000
    assert f"environment.text2sql.database_root={data / 'data'}" in text


def test_a_whole_archive_is_used_where_it_lies(hub: Hub, tmp_path: Path, capfd: Any) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "data.zip").write_bytes(hub.files[OMNISQL, "data.zip"])
    assert run(capfd, "spider-dev", "--download", "--data", data, "--out", tmp_path / "out")[0] == 0
    assert not hub.requests


def test_every_set(hub: Hub, tmp_path: Path, capfd: Any) -> None:
    names = ["skyrl-sql", "spider", "published", "bird", "synsql", "ehrsql", "sciencebenchmark", "spider2-sqlite"]
    assert run(capfd, *names, "--download", "--data", tmp_path / "data", "--out", tmp_path / "out")[0] == 0
    assert len(list((tmp_path / "out").iterdir())) == 14
    assert "not_asked_for" in databases(tmp_path / "data")  # SynSQL's are all for SynSQL


def test_another_archive_than_expected(hub: Hub, tmp_path: Path, capfd: Any) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other/readme.txt").write_text("moved")
    archive = shutil.make_archive(str(tmp_path / "other"), "zip", tmp_path, "other")
    hub.put(OMNISQL, "data.zip", Path(archive).read_bytes())
    code, _, error = run(capfd, "spider-dev", "--download", "--data", tmp_path / "data", "--out", tmp_path / "out")
    assert code == 2
    assert "data.zip: nothing in it begins with data/spider/dev.json" in error
