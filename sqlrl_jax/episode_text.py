"""An episode as a person reads it in a terminal or a log: question, turns with their SQL and what came back, how it ended.

Texts were written by a model or lie in somebody's database: they are bounded, nothing in them is markup, and control
characters, which could move the cursor, are shown and not obeyed. The report page has its own, longer view (report_episodes).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from rich.text import Text

from rollout.types import Task, Trajectory, Turn
from sqlrl_jax.report_episodes import OUTCOME_LABELS, split_action

TURNS_SHOWN = 6
_LINES, _CHARACTERS = 8, 600
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_WIDTH = 10  # of the names at the left


def pick(episodes: Sequence[Trajectory], seed: int, step: int) -> Trajectory:
    """Any episode of a step, the same whenever the step is repeated: what is shown is typical, not the best."""
    return episodes[int(np.random.default_rng([seed, step]).integers(len(episodes)))]


def episode_text(episode: Trajectory, task: Task, step: int) -> Text:
    """The episode in lines of name and content."""
    text = Text()
    _line(text, "episode", f"of step {step}, {task.fields.get('db_id') or episode.source}", "bold")
    _line(text, "question", str(task.fields.get("question") or task.id), "bold")
    shown, hidden = episode.turns[:TURNS_SHOWN], len(episode.turns) - TURNS_SHOWN
    for number, turn in enumerate(shown, 1):
        _turn(text, number, turn)
    if hidden > 0:
        _line(text, "…", f"{hidden} more turn(s)", "dim")
    colour = "green" if episode.outcome == "correct" else "red"
    label = OUTCOME_LABELS.get(episode.outcome, episode.outcome)
    _line(text, "outcome", f"{label}, reward {episode.reward:g}", colour)
    if episode.outcome != "correct" and task.fields.get("gold_sql"):
        _line(text, "gold", str(task.fields["gold_sql"]), "dim")
    return text


def _turn(text: Text, number: int, turn: Turn) -> None:
    for place, (kind, content) in enumerate(split_action(turn.action)):
        style = {"sql": "cyan", "solution": "cyan bold"}.get(kind, "")
        _line(text, f"{number} {kind}" if place == 0 else f"  {kind}", content, style)
    if turn.observation:
        _line(text, f"  {turn.status}", turn.observation, "dim")


def _line(text: Text, name: str, content: str, style: str) -> None:
    """A name and its content, whose further lines are indented below it."""
    lines = bounded(content).split("\n")
    text.append(f"{name:<{_WIDTH}} ", "dim")
    text.append(("\n" + " " * (_WIDTH + 1)).join(lines) + "\n", style)


def bounded(content: str) -> str:
    """The text in a few lines of plain characters; says how much more there is."""
    plain = _CONTROL.sub(
        lambda found: f"\\x{ord(found[0]):02x}", content.strip().replace("\r\n", "\n").replace("\t", "  ")
    )
    cut = "\n".join(plain[:_CHARACTERS].split("\n")[:_LINES])
    left = len(plain) - len(cut)
    return f"{cut} … ({left:,} more characters)" if left > 0 else cut
