"""A run's folder: what is in it, how a run starts in it, goes on in it, and writes to it.

    config.yaml   metrics.jsonl   trajectories/{train,eval}_<step>.jsonl   checkpoints/   export/   report.html   log.txt
    adapter/      where adapters were trained
    exports/step_<step>/   with trainer.hf_save_interval

A resumed run first forgets everything written after the checkpoint it goes on from, so that nothing is counted twice.
One process writes to a folder at a time: a lock held while it lives refuses a second one. Of a run with several processes
that is process 0; the others write log.process<I>.txt, service.process<I>.log and their parts of the checkpoints, so the
folder must be on a file system that all hosts share.
"""

from __future__ import annotations

import fcntl
import json
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from rollout.errors import UserError
from rollout.types import Task, Trajectory
from sqlrl_jax import config_file
from sqlrl_jax.config import Config
from sqlrl_jax.distributed import World

Decode = Callable[[list[int]], str]
"""Token ids to text, for people."""


_STARTS = ".starts.json"
SHARED_SECONDS = 30.0  # in which a shared file system shows what another host has written


class RunError(UserError):
    """The run folder cannot be used as asked."""


class Run:
    """The open folder of one run. Writes are flushed line by line; a full disk raises RunError naming the file."""

    def __init__(self, config: Config) -> None:
        self._place(config)
        resuming = config.trainer.resume_mode == "latest"
        if self._begun() and not resuming:
            raise RunError(
                f"{self.dir} already holds a run. Go on with it: trainer.resume_mode=latest; "
                f"or start another: trainer.run_dir=FOLDER (or delete this one)"
            )
        try:
            self.trajectories.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(self.dir / ".lock")
            self.id, self.epoch = _count_start(self.dir / _STARTS)
            config_file.save(config, self.dir / "config.yaml")
            self._log: IO[str] = self.log_file.open("a", encoding="utf-8")
        except OSError as error:
            raise RunError(f"run folder {self.dir}: {error.strerror or error}") from None

    def _place(self, config: Config) -> None:
        self.dir = Path(config.trainer.run_dir)
        self.metrics_file = self.dir / "metrics.jsonl"
        self.checkpoints = self.dir / "checkpoints"
        self.trajectories = self.dir / "trajectories"
        self.export = self.dir / "export"
        self.exports = self.dir / "exports"
        self.adapter = self.dir / "adapter"
        self.log_file = self.dir / "log.txt"

    def _begun(self) -> bool:
        """Whether there is something to go on from; a start that ended at once, over a mistyped name say, left nothing."""
        metrics = self.metrics_file.exists() and self.metrics_file.stat().st_size > 0
        return metrics or any(path.name.isdecimal() for path in self.checkpoints.glob("*"))

    def forget_after(self, step: int) -> None:
        """Drops metrics and trajectories of later steps: they are about to be made again. -1 drops all."""
        lines = [entry for entry in read_metrics(self.metrics_file) if entry["step"] <= step]
        temporary = self.metrics_file.with_suffix(".tmp")
        self._guard(temporary, lambda: temporary.write_text("".join(json.dumps(e) + "\n" for e in lines)))
        temporary.replace(self.metrics_file)
        for path in self.trajectories.glob("*_*.jsonl"):
            if int(path.stem.rpartition("_")[2]) > step:
                path.unlink()

    def log_metrics(self, kind: str, step: int, metrics: dict[str, float]) -> None:
        entry = {"kind": kind, "step": step, "time": round(time.time(), 3), **metrics}
        line = json.dumps(entry, allow_nan=True) + "\n"
        self._guard(self.metrics_file, lambda: _append(self.metrics_file, line))

    def log_episodes(
        self, kind: str, step: int, episodes: Iterable[Trajectory], tasks: dict[str, Task], decode: Decode
    ) -> None:
        """Writes a step's episodes, one JSON line each, with the question beside them."""
        path = self.trajectories / f"{kind}_{step:06d}.jsonl"
        lines = (json.dumps(episode_record(kind, step, e, tasks[e.task_id], decode)) + "\n" for e in episodes)
        self._guard(path, lambda: path.write_text("".join(lines)))

    def log(self, text: str) -> None:
        self._guard(self.log_file, lambda: (self._log.write(text.rstrip() + "\n"), self._log.flush()))

    def history(self, kind: str) -> list[dict[str, Any]]:
        return [entry for entry in read_metrics(self.metrics_file) if entry["kind"] == kind]

    def close(self) -> None:
        self._log.close()
        self._lock.close()

    def _guard(self, path: Path, write: Any) -> None:
        try:
            write()
        except OSError as error:
            raise RunError(
                f"{path}: {error.strerror or error}. The last checkpoint is kept; mend this and go on with "
                f"trainer.resume_mode=latest"
            ) from None


class FollowedRun(Run):
    """The folder as the processes other than 0 of a run see it: they log, and leave the rest to process 0."""

    def __init__(self, config: Config, process: int, run_id: str, epoch: int) -> None:
        self._place(config)
        self.id, self.epoch = run_id, epoch
        self.log_file = self.dir / f"log.process{process}.txt"
        deadline = time.monotonic() + SHARED_SECONDS
        while _starts(self.dir / _STARTS) != {"id": run_id, "starts": epoch}:
            if time.monotonic() > deadline:
                raise RunError(
                    f"process {process} does not see in {self.dir.absolute()} what process 0 has written there: put "
                    f"trainer.run_dir on a file system that all hosts mount at the same path (NFS, Lustre)"
                )
            time.sleep(0.2)
        try:
            self._log = self.log_file.open("a", encoding="utf-8")
        except OSError as error:
            raise RunError(f"run folder {self.dir}: {error.strerror or error}") from None

    def forget_after(self, step: int) -> None:
        """Process 0 does that."""

    def log_metrics(self, kind: str, step: int, metrics: dict[str, float]) -> None:
        """Process 0 does that."""

    def log_episodes(
        self, kind: str, step: int, episodes: Iterable[Trajectory], tasks: dict[str, Task], decode: Decode
    ) -> None:
        """Process 0 does that."""

    def close(self) -> None:
        self._log.close()


def open_run(config: Config, world: World) -> Run:
    """The run's folder, which process 0 opens first. Raises RunError."""
    main = Run(config) if world.is_main else None
    run_id, epoch = world.from_main("run", lambda: (main.id, main.epoch) if main else None) or ("", 0)
    return main or FollowedRun(config, world.index, run_id, epoch)


def episode_record(kind: str, step: int, episode: Trajectory, task: Task, decode: Decode) -> dict[str, Any]:
    """One line of a trajectories file: the question, the prompt as the model read it, then the whole trajectory."""
    return {**task.fields, "kind": kind, "step": step, "prompt": decode(episode.prompt_ids), **asdict(episode)}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Reads metrics.jsonl. A torn last line (the process was killed while writing) is left out.

    Raises RunError naming file and line for anything else that is not JSON.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    out = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            out.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                raise RunError(f"{path}:{number}: not a JSON object; remove the line") from None
    return out


def _append(path: Path, line: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(line)


def _lock(path: Path) -> IO[str]:
    file = path.open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RunError(f"{path.parent} is in use by another running process") from None
    return file


def _count_start(path: Path) -> tuple[str, int]:
    """The run's id and how often it was started: the epoch by which services tell a stale learner from the present one."""
    known = _starts(path) or {"id": uuid.uuid4().hex, "starts": 0}
    known["starts"] += 1
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(known))
    temporary.replace(path)
    return known["id"], known["starts"]


def _starts(path: Path) -> dict[str, Any]:
    known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return known
