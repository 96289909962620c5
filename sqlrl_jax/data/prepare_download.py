"""Fetches what public sets need: OmniSQL's archive, of which only their part is unpacked, and SkyRL-SQL's rows.

For SkyRL-SQL only the databases that its rows name are unpacked: some hundred of SynSQL-2.5M's 16,000. Left out: the other
places where single sets are published, whose layouts differ.
"""

from __future__ import annotations

from pathlib import Path

from sqlrl_jax.data.download import fetch, unpack
from sqlrl_jax.data.progress import Progress
from sqlrl_jax.data.sources import OMNISQL, SKYRL, SKYRL_ROOTS, Source
from sqlrl_jax.data.sources_skyrl import parquet_rows

ARCHIVE = "data.zip"
INSIDE = "data/"
"""The archive's one folder."""


def download(sources: list[Source], data: Path, progress: Progress) -> None:
    """Puts `<data>/data.zip`, `<data>/data/…` and `<data>/skyrl-sql/*.parquet` in place; what is there already stays."""
    members: list[str] = []
    for source in sources:
        if source.skyrl_data:
            path = fetch(SKYRL, source.questions, data / "skyrl-sql", progress=progress)
            members += skyrl_members(path)
        else:
            members += source.members
    archive = fetch(OMNISQL, ARCHIVE, data, progress=progress)
    unpack(archive, data, tuple(dict.fromkeys(INSIDE + member for member in members)), progress=progress)


def skyrl_members(questions: Path) -> list[str]:
    """Folders of the databases that a file's rows name; a malformed row is named when the file is converted."""
    names = {(row["data"], row["db_id"]) for _, row in parquet_rows(questions)}
    return sorted(f"{SKYRL_ROOTS[data]}/{db_id}/" for data, db_id in names if data in SKYRL_ROOTS)
