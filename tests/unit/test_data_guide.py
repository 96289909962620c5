"""Every `prepare` command of docs/data.md, run as it stands, in order, in a folder with the files that it speaks of."""

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import omnisql_tree as tree
import pytest
from hub_standin import running

import launch
from sqlrl_jax.data.public.sources import OMNISQL, SKYRL, SOURCES
from sqlrl_jax.data.tasks import read_tasks

GUIDE = (Path(__file__).resolve().parents[2] / "docs/data.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^ {4,}python launch\.py (prepare .*)$", GUIDE, re.MULTILINE)
ROWS = """\
question,sql
How many?,SELECT count(*) FROM singer
Who?,"SELECT name FROM singer WHERE age > 25"
Ages?,SELECT age FROM singer
"""


def test_the_commands_work_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("HF_TOKEN", "HTTPS_PROXY", "HTTP_PROXY", "http_proxy", "https_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    shutil.move(tree.database(tmp_path / "made", "shop"), tmp_path / "shop.sqlite")
    Path("questions.csv").write_text(ROWS)
    Path("tables").mkdir()
    Path("tables/singer.csv").write_text("name,age\nAnn,30\nBo,NA\n")
    root = tree.build(tmp_path / "origin/data")
    shutil.copytree(root, "data/omnisql/data")
    shutil.rmtree("data/omnisql/data/skyrl-sql")
    with running() as hub:
        for name in ("train.parquet", "validation.parquet"):
            hub.put(SKYRL, name, (root / "skyrl-sql" / name).read_bytes(), large=False)
        hub.put(OMNISQL, "data.zip", Path(shutil.make_archive("all", "zip", root.parent, "data")).read_bytes())
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        for command in COMMANDS:
            code = launch.main(shlex.split(command))
            out, error = capfd.readouterr()
            assert code == 0, f"{command}\n{out}\n{error}"
    assert len(COMMANDS) == 9
    for name, rows in (("shop/train", 2), ("shop/validation", 1), ("tables/questions", 3), ("spider/spider-dk", 1)):
        assert len(read_tasks(f"data/{name}.jsonl")) == rows
    assert len(read_tasks("data/synsql/synsql.jsonl")) == 1
    assert len(read_tasks("data/skyrl/skyrl-sql-train.jsonl")) == 2


def test_the_guide_knows_every_set() -> None:
    table = GUIDE.partition("| set |")[2].partition("\n\n")[0]
    for name, source in SOURCES.items():
        row = next(line for line in table.splitlines() if f"`{name}`" in line)
        assert f"{source.rows:,}" in row
        assert source.skyrl_data or f"`{source.databases}`" in row
        assert not source.gold_file or f"`{Path(source.gold_file).name}`" in row
