"""Fetches what public sets need: their members of OmniSQL's archive, and SkyRL-SQL's rows.

The archive has 22.2 GB, 50 GB unpacked; only the wanted members come over the network, unless it lies at
`<data>/data.zip` already. For SkyRL-SQL they are the databases that its rows name: some hundred of SynSQL-2.5M's 16,000.
Left out: the other places where single sets are published, whose layouts differ.
"""

from __future__ import annotations

from pathlib import Path

from sqlrl_jax.data.hub.download import fetch
from sqlrl_jax.data.hub.remote_archive import fetch_members
from sqlrl_jax.data.progress import Progress
from sqlrl_jax.data.public.skyrl import parquet_rows
from sqlrl_jax.data.public.sources import OMNISQL, SKYRL, SKYRL_ROOTS, Source

ARCHIVE = "data.zip"
INSIDE = "data/"
"""The archive's one folder."""


def download(sources: list[Source], data: Path, progress: Progress) -> None:
    """Puts `<data>/data/…` and `<data>/skyrl-sql/*.parquet` in place; what is there already stays."""
    members: list[str] = []
    for source in sources:
        if source.skyrl_data:
            path = fetch(SKYRL, source.questions, data / "skyrl-sql", progress=progress)
            members += skyrl_members(path)
        else:
            members += source.members
    fetch_members(OMNISQL, ARCHIVE, data, tuple(dict.fromkeys(INSIDE + m for m in members)), progress=progress)


def skyrl_members(questions: Path) -> list[str]:
    """Folders of the databases that a file's rows name; a malformed row is named when the file is converted."""
    names = {(row["data"], row["db_id"]) for _, row in parquet_rows(questions)}
    return sorted(f"{SKYRL_ROOTS[data]}/{db_id}/" for data, db_id in names if data in SKYRL_ROOTS)
