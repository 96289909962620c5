"""The file that `launch.py eval --out` writes: every episode, one JSON line each, in the order they ended.

A line is flushed as its episode ends, so an interrupted evaluation keeps what it had and `--resume` goes on with it. What
was there is never overwritten or mixed with other settings: each line carries a fingerprint of those that decide what an
episode is. Questions of which some samples are missing are played again as a whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import IO, Any

from rollout.errors import UserError
from rollout.types import Task, Trajectory, Turn

Key = tuple[int, str, int]
"""Turn limit, question, sample."""
_SAME = ("db_id", "db_root", "question", "gold_sql", "evidence")


class EpisodesFile:
    """The open file. `done` holds the finished episodes that were already in it."""

    def __init__(self, path: Path, settings: dict[str, Any], *, resume: bool) -> None:
        self.path = path
        self.settings = fingerprint(settings)
        self.done: dict[Key, Trajectory] = {}
        self.written = 0
        self._rows: dict[Key, dict[str, Any]] = {}
        if path.exists():
            if not resume and (path.is_dir() or path.stat().st_size):  # Ctrl-C before the first episode leaves it empty
                raise UserError(f"--out {path}: exists already; name another file, or add --resume to go on with it")
            self._read()
        self._file: IO[str] | None = None

    def begin(self, tasks: Sequence[Task], limits: Sequence[int], samples: int) -> None:
        """Opens the file. Keeps of what was found the questions that are complete. Raises UserError if one has changed."""
        by_id = {task.id: task for task in tasks}
        for (_, task_id, _), row in self._rows.items():
            self._check_question(row, by_id.get(task_id))
        whole = {
            (limit, task.id)
            for limit in limits
            for task in tasks
            if all((limit, task.id, sample) in self._rows for sample in range(samples))
        }
        other = {key for key in self._rows if key[1] not in by_id or key[0] not in limits}  # not asked for now
        kept = {key: row for key, row in self._rows.items() if key[:2] in whole or key in other}
        if len(kept) < len(self._rows):
            self._rewrite(kept.values())
        self.done = {key: _trajectory(row) for key, row in kept.items() if key[:2] in whole and key[2] < samples}
        self._rows = {}
        try:
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise UserError(f"--out {self.path}: {error.strerror or error}") from None

    def write(self, row: dict[str, Any]) -> None:
        """Appends one episode, after `begin`. Raises UserError when the disk is full."""
        assert self._file is not None, "begin comes first"
        line = json.dumps({**row, "settings": self.settings}, ensure_ascii=True)
        try:
            self._file.write(line + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(f"--out {self.path}: {error.strerror or error}") from None
        self.written += 1

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _read(self) -> None:
        try:
            lines = self.path.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--out {self.path}: can't be read ({getattr(error, 'strerror', 'not UTF-8')})") from None
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                key = (int(row["max_turns"]), str(row["task_id"]), int(row["sample"]))
                settings = row["settings"]
            except (KeyError, TypeError, ValueError, RecursionError):
                if number == len(lines):  # the process was killed while it wrote
                    self._rewrite(self._rows.values())
                    return
                raise UserError(f"--out {self.path}:{number}: not an episode of `launch.py eval`") from None
            if settings != self.settings:
                raise UserError(
                    f"--out {self.path}:{number}: made with another model, sampling or environment; name another file"
                )
            self._rows[key] = row

    def _check_question(self, row: dict[str, Any], task: Task | None) -> None:
        changed = [n for n in _SAME if task is not None and n in row and row[n] != task.fields.get(n, row[n])]
        if changed:
            what = f"question {row['task_id']!r} had another {changed[0]} when this file was made"
            raise UserError(f"--out {self.path}: {what}; name another file")

    def _rewrite(self, rows: Iterable[dict[str, Any]]) -> None:
        temporary = self.path.with_name(self.path.name + ".partial")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        temporary.replace(self.path)


def fingerprint(settings: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=8).hexdigest()


def _trajectory(row: dict[str, Any]) -> Trajectory:
    values = {field.name: row[field.name] for field in fields(Trajectory) if field.name in row}  # older files lack some
    values["turns"] = [Turn(**turn) for turn in row["turns"]]
    values["spans"] = [tuple(span) for span in row["spans"]]
    return Trajectory(**values)
