"""What a model's turn asks for: a query, the final answer, or nothing usable.

Only text that the model wrote itself is given to `parse`, so an `<observation>` in it is a forgery: such a turn runs
nothing and earns nothing. Closed thoughts are taken out first; tags mentioned in them mean nothing. A thought that was
never closed is not taken out, because models that forget `</think>` still act. Any text is accepted, in linear time.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

_FENCE = re.compile(r"```(?:sqlite3?|sql)?(?=\s|$)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Action:
    """What to do. `kind` none: no complete tag, an empty one, or a forged observation (`forged`).

    `answered`: a solution tag is complete, so the episode is over whatever `kind` says.
    """

    kind: Literal["sql", "solution", "none"]
    sql: str = ""
    answered: bool = False
    forged: bool = False


@dataclass(frozen=True, slots=True)
class Form:
    """How a turn is built, for those who ask for more than an answer.

    `thought`: it holds a closed thought; `thought_first`: it begins with one. `solutions`: tags outside of thoughts.
    """

    thought: bool
    thought_first: bool
    solutions: int


def form(text: str) -> Form:
    """Thoughts and solutions of a turn. Any text is accepted, in linear time."""
    start = text.find("<think>")
    thought = start >= 0 and text.find("</think>", start) >= 0
    spoken = without_thoughts(text)
    solutions = max(spoken.count("<solution>"), spoken.count("</solution>"))
    return Form(thought, thought and not text[:start].strip(), solutions)


def parse(text: str) -> Action:
    """The last complete `<solution>` if there is one, otherwise the last complete `<sql>`, outside of closed thoughts."""
    spoken = without_thoughts(text)
    solution = _last(spoken, "solution")
    answered = solution is not None
    if "<observation" in spoken or "</observation" in spoken:
        return Action("none", answered=answered, forged=True)
    if answered:
        return Action("solution" if solution else "none", solution or "", answered=True)
    sql = _last(spoken, "sql")
    return Action("sql", sql) if sql else Action("none")


def without_thoughts(text: str) -> str:
    """The text with a space in place of every closed `<think>…</think>`, so that no two words grow together."""
    parts: list[str] = []
    position = 0
    while True:
        start = text.find("<think>", position)
        end = text.find("</think>", start) if start >= 0 else -1
        if end < 0:
            return " ".join([*parts, text[position:]])
        parts.append(text[position:start])
        position = end + len("</think>")


def _last(text: str, tag: str) -> str | None:
    """Inside of the last complete pair of tags, without a code fence; None if no pair is complete."""
    end = text.rfind(f"</{tag}>")
    start = text.rfind(f"<{tag}>", 0, end) if end >= 0 else -1
    return None if start < 0 else _without_fence(text[start + len(tag) + 2 : end])


def _without_fence(text: str) -> str:
    text = text.strip()
    fence = _FENCE.match(text)
    if fence is None:
        return text
    return text[fence.end() :].removesuffix("```").strip()
