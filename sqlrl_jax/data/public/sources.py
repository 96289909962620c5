"""The public text-to-SQL sets that `launch.py prepare` knows: where their files lie and what their fields are called.

One table, laid out as OmniSQL's `data.zip` unpacks (`seeklhy/OmniSQL-datasets`, folder `data/`), plus the training rows of
SkyRL-SQL. What differs between sets is data here; the code that reads them is one (sqlrl_jax.data.public.convert). Left
out: the thoughts (`cot`) that some files carry, because nothing here imitates them, and the `tables.json` files, because
schema texts are read from the databases themselves.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rollout.errors import UserError

OMNISQL = "seeklhy/OmniSQL-datasets"
SKYRL = "NovaSky-AI/SkyRL-SQL-653-data-newfmt"

SKYRL_ROOTS = {
    "synsql": "SynSQL-2.5M/databases",
    "spider": "spider/database",
    "bird": "bird/train/train_databases",
}
"""Folder of databases by the `data` column of a SkyRL-SQL row."""


@dataclass(frozen=True)
class Source:
    """One set. Paths are relative to the OmniSQL folder; field names are tried in order."""

    name: str
    title: str
    split: Literal["train", "dev", "test"]
    questions: str
    databases: str
    rows: int
    """Questions in the published set."""
    gold_file: str = ""
    """Lines of `SQL<tab>db_id` beside the questions: what the published evaluation grades by."""
    question: tuple[str, ...] = ("question",)
    gold_sql: tuple[str, ...] = ("query", "SQL")
    evidence: tuple[str, ...] = ()
    id: str = ""
    """Field of the row's own id; without one the row's number is the id."""
    keep: dict[str, str] = field(default_factory=dict)
    """Other fields to keep: their name → ours."""
    gold_results: str = ""
    """Folder of CSV results, for a set that publishes results in place of gold SQL."""
    gold_standard: str = ""
    """JSON lines beside `gold_results`: which columns count, and whether order does."""
    skyrl_data: tuple[str, ...] = ()
    """For the parquet files of SkyRL-SQL: the values of their `data` column, whose databases they need."""

    @property
    def folders(self) -> tuple[str, ...]:
        """Folders of databases below the OmniSQL folder."""
        return tuple(SKYRL_ROOTS[name] for name in self.skyrl_data) or (self.databases,)

    @property
    def members(self) -> tuple[str, ...]:
        """What of OmniSQL's archive this set needs: files, and folders that end in '/'."""
        files = () if self.skyrl_data else (self.questions, self.gold_file, self.gold_standard)
        folders = (*self.folders, self.gold_results)
        return (*(f for f in files if f), *(f + "/" for f in folders if f))


_SPIDER = "spider/database"
_TABLE = (
    Source(
        "skyrl-sql-train",
        "SkyRL-SQL, training rows (540 SynSQL, 113 Spider)",
        "train",
        "train.parquet",
        "",
        653,
        skyrl_data=("synsql", "spider"),
    ),
    Source(
        "skyrl-sql-validation",
        "SkyRL-SQL, validation rows (Spider dev)",
        "dev",
        "validation.parquet",
        "",
        1034,
        skyrl_data=("spider",),
    ),
    Source("spider-train", "Spider", "train", "spider/train_spider_enhanced_with_cot.json", _SPIDER, 7000),
    Source("spider-dev", "Spider", "dev", "spider/dev.json", _SPIDER, 1034, "spider/dev_gold.sql"),
    Source("spider-test", "Spider", "test", "spider/test.json", "spider/test_database", 2147, "spider/test_gold.sql"),
    Source(
        "spider-dk",
        "Spider-DK (domain knowledge)",
        "dev",
        "Spider-DK/Spider-DK.json",
        "Spider-DK/database",
        535,
        "Spider-DK/spider_dk_gold.sql",
        keep={"type": "type"},
    ),
    Source(
        "spider-syn",
        "Spider-Syn (synonyms)",
        "dev",
        "Spider-Syn/dev.json",
        _SPIDER,
        1034,
        "Spider-Syn/spider_syn_gold.sql",
        question=("SpiderSynQuestion",),
    ),
    Source(
        "spider-realistic",
        "Spider-Realistic (columns not named)",
        "dev",
        "spider-realistic/spider-realistic.json",
        _SPIDER,
        508,
        "spider-realistic/spider_realistic_gold.sql",
    ),
    Source(
        "bird-train",
        "BIRD",
        "train",
        "bird/train/train_enhanced_with_cot.json",
        "bird/train/train_databases",
        9428,
        gold_sql=("SQL",),
        evidence=("evidence",),
    ),
    Source(
        "bird-dev",
        "BIRD (2024-06-27)",
        "dev",
        "bird/dev_20240627/dev.json",
        "bird/dev_20240627/dev_databases",
        1534,
        gold_sql=("SQL",),
        evidence=("evidence",),
        id="question_id",
        keep={"difficulty": "difficulty"},
    ),
    Source(
        "synsql",
        "SynSQL-2.5M (synthetic)",
        "train",
        "SynSQL-2.5M/data.json",
        "SynSQL-2.5M/databases",
        2_544_390,
        gold_sql=("sql",),
        evidence=("external_knowledge",),
        keep={"sql_complexity": "difficulty", "question_style": "question_style"},
    ),
    Source("ehrsql", "EHRSQL (hospital records)", "dev", "EHRSQL/dev.json", "EHRSQL/database", 1008),
    Source(
        "sciencebenchmark", "ScienceBenchmark", "dev", "sciencebenchmark/dev.json", "sciencebenchmark/databases", 299
    ),
    Source(
        "spider2-sqlite",
        "Spider2-SQLite (graded by results)",
        "test",
        "spider2_sqlite/test.json",
        "spider2_sqlite/databases",
        135,
        evidence=("external_knowledge",),
        id="instance_id",
        gold_results="spider2_sqlite/gold_exec_result",
        gold_standard="spider2_sqlite/spider2_sqlite_eval.jsonl",
    ),
)
SOURCES = {source.name: source for source in _TABLE}
GROUPS = {
    "skyrl-sql": ("skyrl-sql-train", "skyrl-sql-validation"),
    "spider": ("spider-train", "spider-dev", "spider-test"),
    "bird": ("bird-train", "bird-dev"),
    "published": ("spider-dev", "spider-test", "spider-realistic", "spider-dk", "spider-syn"),
}
"""Names for several sets; `published` are those of the published comparison."""


def resolve(names: Iterable[str]) -> list[Source]:
    """The sets that names and group names stand for, each once. Raises UserError naming the nearest known name."""
    found: dict[str, Source] = {}
    for name in names:
        known = GROUPS.get(name) or ((name,) if name in SOURCES else None)
        if known is None:
            near = difflib.get_close_matches(name, [*SOURCES, *GROUPS], n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise UserError(f"unknown set {name!r}; {hint}`python launch.py prepare --list` shows all")
        found |= {member: SOURCES[member] for member in known}
    return list(found.values())


def root_of(data: Path, sources: Iterable[Source]) -> Path:
    """The OmniSQL folder: `data` itself, or the `data` folder in it that the archive unpacks to."""
    folders = {folder for source in sources for folder in source.folders}
    for root in (data, data / "data", data / "db_files" / "data"):
        if any((root / folder).is_dir() for folder in folders):
            return root
    return data
