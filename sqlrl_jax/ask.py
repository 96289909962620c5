"""`launch.py ask`: a question to a person's own database, answered by a trained model that looks before it answers.

The database (SQLite, or CSV files) is copied, so that nothing the model does can reach it. Every turn is printed: what
the model thought, what it ran and what came back, then the final query and its result.
"""

from __future__ import annotations

import asyncio
import json
import re
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.text import Text

from rollout.chat_client import ServerOptions, with_model
from rollout.errors import UserError
from rollout.types import Task, Trajectory, Turn
from sqlrl_jax import config_file
from sqlrl_jax.config import Config
from sqlrl_jax.data.disk import check_space
from sqlrl_jax.data.own.databases import copy_database, find_databases
from sqlrl_jax.data.progress import bars
from sqlrl_jax.data.tasks import DataError
from sqlrl_jax.display import Display
from sqlrl_jax.players import hosted, served

_TAGS = re.compile(r"</?(?:think|sql|solution)>")
NO_ANSWER = {
    "malformed": "the model gave no answer",
    "overflow": "the conversation grew past generator.max_input_length",
    "sql_error": "the model's final query failed",
    "timeout": "the model's final query took too long",
    "prompt_too_long": "the database's schema and the question do not fit trainer.max_prompt_length or max_input_length",
}


@dataclass(frozen=True)
class Question:
    """What a person asks. `database` is a SQLite or CSV file or a folder of CSV files."""

    database: str
    text: str
    evidence: str = ""
    model: str | None = None
    server: ServerOptions | None = None


def main(config: Config, question: Question) -> int:
    """Prints the episode and, as the last line, JSON with the final query. Exit status 1 when there is no answer."""
    if not question.text.strip():
        raise UserError("the question is empty")
    server = asyncio.run(with_model(question.server)) if question.server else None
    display = Display()
    with ExitStack() as stack:
        folder = stack.enter_context(TemporaryDirectory(prefix="ask-"))
        db_id = _copy(Path(question.database), Path(folder))
        config = _with(config, question.model, folder)
        player = served(config, server) if server else hosted(config, display, False)
        play = stack.enter_context(player)
        fields = {"db_id": db_id, "question": question.text, "evidence": question.evidence}
        episodes: list[Trajectory] = []
        with display.bar("asking", 1):
            play([Task("question", "ask", fields)], config.generator.max_turns, lambda e, _: episodes.append(e))
    return _show(display, episodes[0])


def _copy(database: Path, folder: Path) -> str:
    """Copies the one database at `database` to `<folder>/<db_id>/<db_id>.sqlite`; returns its id. Raises DataError."""
    found = find_databases(database)
    if len(found) > 1:
        names = ", ".join(original.db_id for original in found[:5]) + (", …" if len(found) > 5 else "")
        raise DataError(f"{database}: holds {len(found)} databases ({names}); name one of them")
    (original,) = found
    check_space(folder, 2 * original.size, f"copying {database}")
    (folder / original.db_id).mkdir()
    with bars() as progress:
        copy_database(original, folder / original.db_id / f"{original.db_id}.sqlite", progress=progress)
    return original.db_id


def _with(config: Config, model: str | None, databases: str) -> Config:
    overrides: list[tuple[str, Any]] = [
        ("environment.env_class", "rollout.ask:Ask"),
        ("environment.workers", 1),
        ("environment.text2sql.database_root", databases),
        ("environment.text2sql.workers", 1),
        ("environment.text2sql.measures", []),
        ("environment.text2sql.grading", "rows"),
        ("generator.eval_n_samples_per_prompt", 1),
        ("generator.services", []),
        ("generator.inference_engine.max_sequences", 1),
    ]
    if model is not None:
        if not Path(model).is_dir():
            raise UserError(f"{model}: no such model folder")
        overrides.append(("trainer.policy.model.path", model))
    return config_file.override(config, overrides)


def config_of(model: str) -> str | None:
    """The configuration of the run that a model folder was exported by: the one beside it."""
    beside = Path(model).resolve().parent / "config.yaml"
    return str(beside) if beside.is_file() else None


def _show(display: Display, episode: Trajectory) -> int:
    for number, turn in enumerate(episode.turns, 1):
        _show_turn(display, number, turn)
    answered = episode.outcome == "correct"
    if episode.outcome == "infrastructure":
        raise UserError(episode.error)
    if not answered:
        display.warn(NO_ANSWER.get(episode.outcome, episode.outcome) + (f": {episode.error}" if episode.error else ""))
    sql = episode.turns[-1].sql if answered else ""
    print(json.dumps({"sql": sql, "outcome": "answered" if answered else episode.outcome, "turns": len(episode.turns)}))
    return 0 if answered else 1


def _show_turn(display: Display, number: int, turn: Turn) -> None:
    said = _TAGS.sub("", turn.action.partition(turn.sql)[0] if turn.sql else turn.action).strip()
    if said:
        display.print(Text(said), style="dim")
    if turn.sql:
        display.print(Text(turn.sql), style="bold" if turn.status == "solution" else "cyan")
    if turn.observation:
        display.print(Text(turn.observation + "\n"))
