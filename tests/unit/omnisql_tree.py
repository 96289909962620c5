"""A small OmniSQL folder: every set with its real file names and field names, over databases of two tables."""

import json
import sqlite3
from pathlib import Path
from typing import Any

SYSTEM = "Schema: {db_details}. Knowledge: {external_knowledge}. Question: {question}."
COUNT = "SELECT count(*) FROM singer"
NAMES = "SELECT name FROM singer ORDER BY age"
SPIDER = {"query_toks": ["SELECT"], "query_toks_no_value": ["select"], "question_toks": ["How"], "sql": {"limit": None}}


def database(folder: Path, db_id: str) -> Path:
    path = folder / db_id / f"{db_id}.sqlite"
    path.parent.mkdir(parents=True)
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE singer (name TEXT, age INTEGER)")
        connection.executemany("INSERT INTO singer VALUES (?, ?)", [("Ann", 30), ("Bo", 20), ("Cy", None)])
    connection.close()
    return path


def write_json(path: Path, rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=2), encoding="utf-8")
    return path


def write_gold(path: Path, *golds: tuple[str, str]) -> Path:
    path.write_text("".join(f"{sql}\t{db_id}\n" for sql, db_id in golds), encoding="utf-8")
    return path


def spider_row(db_id: str, **fields: Any) -> dict[str, Any]:
    return {"db_id": db_id, "query": COUNT, **SPIDER, "question": "How many singers do we have?", **fields}


def skyrl_row(**fields: Any) -> dict[str, Any]:
    user = (
        "{db_details}:CREATE TABLE singer (name TEXT);\n {external_knowledge}: old is above 25;\n {question}: How many?"
    )
    prompt = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": user}]
    row = {"data_source": "synsql", "prompt": prompt, "env_class": "text2sql", "db_id": "shop", "data": "synsql"}
    return {**row, "reward_spec": {"method": "rule", "ground_truth": COUNT}, **fields}


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def build(root: Path) -> Path:
    """The whole tree under `root`, which is returned."""
    for folder, names in {
        "spider/database": ("concert_singer", "pets_1"),
        "spider/test_database": ("soccer_3",),
        "Spider-DK/database": ("new_concert_singer",),
        "bird/train/train_databases": ("movies",),
        "bird/dev_20240627/dev_databases": ("california_schools",),
        "SynSQL-2.5M/databases": ("shop",),
        "EHRSQL/database": ("mimic_iii",),
        "sciencebenchmark/databases": ("cordis",),
        "spider2_sqlite/databases": ("E_commerce",),
    }.items():
        for name in names:
            database(root / folder, name)
    _spiders(root)
    bird = {"db_id": "movies", "question": "How many?", "evidence": "a singer sings", "SQL": COUNT}
    write_json(root / "bird/train/train_enhanced_with_cot.json", [{**bird, "cot": "Let us count."}])
    dev = {**bird, "db_id": "california_schools", "difficulty": "simple"}
    write_json(root / "bird/dev_20240627/dev.json", [{"question_id": i, **dev} for i in (0, 17)])
    synsql = {"db_id": "shop", "sql_complexity": "Highly Complex", "question_style": "Vague", "question": "Who?"}
    write_json(root / "SynSQL-2.5M/data.json", [{**synsql, "external_knowledge": "", "cot": "…", "sql": NAMES}])
    write_json(root / "EHRSQL/dev.json", [{"db_id": "mimic_iii", "question": "Which drugs?", "query": NAMES}])
    write_json(root / "sciencebenchmark/dev.json", [{"db_id": "cordis", "question": "Größe?", "query": NAMES}])
    write_parquet(root / "skyrl-sql/train.parquet", [skyrl_row(), skyrl_row(db_id="pets_1", data="spider")])
    write_parquet(root / "skyrl-sql/validation.parquet", [skyrl_row(db_id="pets_1", data="spider")])
    spider2 = {"instance_id": "local002", "db_id": "E_commerce", "question": "Ages?", "external_knowledge": None}
    write_json(root / "spider2_sqlite/test.json", [spider2])
    standard = {"instance_id": "local002", "condition_cols": [1], "ignore_order": True, "toks": "12"}
    (root / "spider2_sqlite/spider2_sqlite_eval.jsonl").write_text(json.dumps(standard) + "\n")
    (root / "spider2_sqlite/gold_exec_result").mkdir()
    (root / "spider2_sqlite/gold_exec_result/local002.csv").write_text("name,age\nAnn,30\nCy,\n")
    return root


def _spiders(root: Path) -> None:
    write_json(root / "spider/train_spider_enhanced_with_cot.json", [spider_row("pets_1", cot="Think.")])
    write_json(root / "spider/dev.json", [spider_row("concert_singer"), spider_row("pets_1", query=NAMES)])
    write_gold(root / "spider/dev_gold.sql", (COUNT, "concert_singer"), (NAMES, "pets_1"))
    write_json(root / "spider/test.json", [spider_row("soccer_3")])
    write_gold(root / "spider/test_gold.sql", (COUNT, "soccer_3"))
    dk = {"type": 2, "db_id": "new_concert_singer", "query": COUNT, "question": "How many vocalists?"}
    write_json(root / "Spider-DK/Spider-DK.json", [dk])
    write_gold(root / "Spider-DK/spider_dk_gold.sql", (COUNT, "new_concert_singer"))
    syn = {"db_id": "pets_1", "SpiderQuestion": "How many pets?", "SpiderSynQuestion": "How many animals?"}
    write_json(root / "Spider-Syn/dev.json", [{**syn, "query": COUNT}])
    write_gold(root / "Spider-Syn/spider_syn_gold.sql", (COUNT, "pets_1"))
    write_json(root / "spider-realistic/spider-realistic.json", [spider_row("concert_singer")])
    write_gold(root / "spider-realistic/spider_realistic_gold.sql", (COUNT, "concert_singer"))
