"""Databases and questions of one's own, brought into the layout that training and evaluation read.

`<out>/databases/<db_id>/<db_id>.sqlite`, `questions.jsonl`, and its split into `train.jsonl` and `validation.jsonl`. The
originals are only read. The same input gives the same bytes, and a folder that this file did not write is left alone.
Left out: checking that the SQL runs (`launch.py prepare --check`).
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from sqlrl_jax.data.disk import check_space, disk_errors
from sqlrl_jax.data.own.databases import Original, copy_database, find_databases
from sqlrl_jax.data.own.questions import read_questions, split
from sqlrl_jax.data.progress import Progress, silent
from sqlrl_jax.data.tasks import DataError, write_tasks

MARKER = "prepared.json"
FORMAT = 1
FILES = ("questions.jsonl", "train.jsonl", "validation.jsonl")
GROWTH = 2
"""A database of CSV files takes up to this many times their size."""


@dataclass(frozen=True)
class Prepared:
    """What was written; `notes` are for the person."""

    out: Path
    databases: tuple[str, ...]
    questions: int
    train: int
    validation: int
    notes: tuple[str, ...]

    @property
    def settings(self) -> dict[str, str | list[str]]:
        """What the configuration needs to use it; without validation questions the training ones are measured on."""
        return {
            "data.train_data": [str(self.out / "train.jsonl")],
            "data.val_data": [str(self.out / ("validation.jsonl" if self.validation else "train.jsonl"))],
            "environment.text2sql.database_root": str(self.out / "databases"),
        }


@dataclass(frozen=True)
class _Marker:
    """Says that this file wrote the folder, and which databases in it."""

    prepared: str
    format: int
    databases: list[str]


def prepare_own(
    databases: str | Path,
    questions: str | Path,
    out: str | Path,
    *,
    valid: float = 0.2,
    seed: int = 0,
    encoding: str | None = None,
    nulls: Collection[str] = (),
    progress: Progress = silent,
) -> Prepared:
    """Copies databases (own_databases.find_databases says which) and questions (own_questions) to `out`.

    `valid` is the share of questions kept for validation, by whole databases if there are several. `encoding` is that of CSV
    files that are neither UTF-8 nor UTF-16; `nulls` are texts in them that mean NULL, such as NA. Raises DataError.
    """
    databases, questions, out = Path(databases), Path(questions), Path(out)
    if not 0 <= valid < 1:
        raise DataError(f"--valid {valid}: expected the share for validation, 0 or more and less than 1")
    earlier = _earlier(out)
    originals = find_databases(databases, questions)
    _keep_apart(originals, questions, out)
    db_ids = [original.db_id for original in originals]
    tasks, notes = read_questions(questions, db_ids, encoding)
    check_space(out, _needed(originals, out), "copying the databases")
    with disk_errors(out, DataError):
        out.mkdir(parents=True, exist_ok=True)
        # First of all: whatever happens from here on, the next call knows the folder as ours.
        _mark(out, sorted({*earlier, *db_ids}))
        notes += _write_databases(originals, out / "databases", encoding, nulls, progress)
        for stale in set(earlier) - set(db_ids):
            shutil.rmtree(out / "databases" / stale, ignore_errors=True)
        train, validation = split(tasks, valid, seed)
        for name, part in zip(FILES, (tasks, train, validation), strict=True):
            if part:
                write_tasks(out / name, part)
            else:
                (out / name).unlink(missing_ok=True)
        _mark(out, db_ids)
    if valid and not validation:
        notes.append("too few questions for a validation part: all are for training")
    unused = sorted(set(db_ids) - {task.fields["db_id"] for task in tasks})
    if unused:
        shown = ", ".join(unused[:5]) + (" …" if len(unused) > 5 else "")
        notes.append(f"{len(unused)} of {len(db_ids)} databases have no question: {shown}")
    return Prepared(out, tuple(db_ids), len(tasks), len(train), len(validation), tuple(notes))


def _needed(originals: Sequence[Original], out: Path) -> int:
    """Bytes that have to be free: an earlier call's copies go one by one, as the new ones come."""
    sizes = [o.size * (GROWTH if o.kind == "csv" else 1) for o in originals]
    earlier = sum(p.stat().st_size for p in (out / "databases").rglob("*") if p.is_file())
    return max(sum(sizes) - earlier, max(sizes))


def _write_databases(
    originals: Sequence[Original], folder: Path, encoding: str | None, nulls: Collection[str], progress: Progress
) -> list[str]:
    """Each database is written aside and then put in place whole."""
    folder.mkdir(exist_ok=True)
    for killed in folder.glob(".part-*"):  # the scratch folder of a call that could not clean up
        shutil.rmtree(killed)
    notes: list[str] = []
    with tempfile.TemporaryDirectory(prefix=".part-", dir=folder) as scratch:
        for original in originals:
            fresh = Path(scratch, original.db_id)
            fresh.mkdir()
            target = fresh / f"{original.db_id}.sqlite"
            notes += copy_database(original, target, encoding=encoding, nulls=nulls, progress=progress)
            if (folder / original.db_id).exists():
                shutil.rmtree(folder / original.db_id)
            fresh.rename(folder / original.db_id)
    return notes


def _earlier(out: Path) -> list[str]:
    """The databases that an earlier call wrote there. Raises DataError if the folder is somebody else's."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return []
    try:
        marker = _Marker(**json.loads((out / MARKER).read_text(encoding="utf-8")))
        if marker.prepared == "own":
            return [name for name in marker.databases if Path(name).name == name not in ("", "..")]
    except (OSError, ValueError, TypeError):
        marker = None
    raise DataError(f"{out}: exists and was not written by this command; choose a new folder")


def _mark(out: Path, db_ids: Sequence[str]) -> None:
    text = json.dumps(asdict(_Marker("own", FORMAT, list(db_ids))), ensure_ascii=False)
    (out / MARKER).write_text(text + "\n", encoding="utf-8")


def _keep_apart(originals: Sequence[Original], questions: Path, out: Path) -> None:
    """What is read must not lie in what is written."""
    for file in (questions, *(file for original in originals for file in original.files)):
        if file.resolve().is_relative_to(out.resolve()):
            raise DataError(f"{file}: lies in {out}, which is to be written; choose another folder to write")
