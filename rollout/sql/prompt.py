"""The first messages of an episode: what is asked, over which schema, and how to answer.

The texts are templates with four places to fill: {schema}, {question}, {evidence} and {turns}. They are filled in one
pass, so that nothing inside a schema or a question is taken for a place; the places are the only thing in braces that
means anything. A user's own template is a YAML file with `user` and, if wanted, `system`.

Left out: conditions and loops. The one that is needed is built in: a line with {evidence} goes when there is none.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from rollout.errors import UserError
from rollout.sql.schema_text import Style
from rollout.types import Message

ENGINES = {"sqlite": "SQLite", "duckdb": "DuckDB"}
INSTRUCTIONS = """\
You answer questions about a {engine} database. You get its schema and a question, and you have {turns} to find the SQL \
query whose result answers the question. You can run queries and read what they return before you decide.

In every turn:
1. Think inside <think> and </think>: what the question asks for, what the last observation showed, what to do next.
2. Then do exactly one of these:
   - run one query: <sql>SELECT ...</sql>. Its result comes back inside <observation> and </observation>.
   - give the final query: <solution>SELECT ...</solution>. This ends the task.

Rules:
- Always think first, and think again after each observation.
- The database is read-only. Write {engine}'s dialect, one statement at a time.
- Long results are cut. Look at the values that are really stored before you filter on them; use LIMIT.
- If a query fails or its result looks wrong, say why in your next thought and repair it.
- Return the columns that the question asks for, in its order, and no others.
- The solution is run on the database and its rows are compared with the right answer's. Text outside of <solution> is \
not graded. Never write <observation> yourself.

Example:
Question: How many singers come from France?
<think>The table singer has a column country. I should see how France is spelled there.</think>
<sql>SELECT DISTINCT country FROM singer LIMIT 20</sql>
<observation>country
Netherlands
FRANCE
<reminder>You have 4 turns left to complete the task.</reminder></observation>
<think>It is spelled FRANCE. Counting the rows with that country answers the question.</think>
<solution>SELECT count(*) FROM singer WHERE country = 'FRANCE'</solution>"""
FULL_USER = "Database schema:\n{schema}\n\nExternal knowledge: {evidence}\n\nQuestion: {question}"
SHORT_USER = "{schema}\n{evidence}\n{question}"

PLACES = ("schema", "question", "evidence", "turns")
_PLACE = re.compile(r"\{(\w+)\}")
_EVIDENCE_LINE = re.compile(r"[^\n]*\{evidence\}[^\n]*(?:\n+|\Z)")


@dataclass(frozen=True, slots=True)
class Template:
    """Texts of the first messages; an empty `system` makes no message."""

    system: str
    user: str

    def messages(self, schema: str, question: str, evidence: str, max_turns: int) -> list[Message]:
        turns = "1 turn" if max_turns == 1 else f"{max_turns} turns"
        values = {"schema": schema, "question": question, "evidence": evidence.strip(), "turns": turns}
        messages = [Message(role="system", content=_fill(self.system, values))] if self.system else []
        return [*messages, Message(role="user", content=_fill(self.user, values))]


def built_in(style: Style, engine: str = "sqlite") -> Template:
    """Our own template. `short` has no instructions: for models that were taught the format beforehand."""
    if style == "short":
        return Template("", SHORT_USER)
    return Template(INSTRUCTIONS.replace("{engine}", ENGINES[engine]), FULL_USER)


def choose_template(path: str, style: Style, engine: str) -> Template:
    """The user's own template where there is one, otherwise ours."""
    return read_template(path) if path else built_in(style, engine)


def read_template(path: str | Path) -> Template:
    """A user's own template. Raises UserError that names file, key and place."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"environment.text2sql.prompt_template: {path}: can't be read: {reason}") from None
    if not isinstance(content, dict) or not set(content) <= {"system", "user"} or not content.get("user"):
        raise UserError(
            f"environment.text2sql.prompt_template: {path}: expected the keys `user` and, if wanted, `system`"
        )
    for key, text in content.items():
        if not isinstance(text, str):
            raise UserError(f"environment.text2sql.prompt_template: {path}: {key}: expected text, found {text!r}")
        for name in _PLACE.findall(text):
            if name not in PLACES:
                raise UserError(
                    f"environment.text2sql.prompt_template: {path}: {key}: unknown place {{{name}}}; "
                    f"known are {', '.join(f'{{{place}}}' for place in PLACES)}"
                )
        lost = set(_PLACE.findall(text)) - {"evidence"} - set(_PLACE.findall(_without_evidence(text)))
        if lost:
            raise UserError(
                f"environment.text2sql.prompt_template: {path}: {key}: {{{min(lost)}}} stands in a line with {{evidence}}, "
                "which goes where there is none; give {evidence} a line of its own"
            )
    if "{question}" not in content["user"]:
        raise UserError(f"environment.text2sql.prompt_template: {path}: user: {{question}} is missing")
    return Template(content.get("system", "").removesuffix("\n"), content["user"].removesuffix("\n"))


def _fill(template: str, values: dict[str, str]) -> str:
    if not values["evidence"]:
        template = _without_evidence(template)
    return _PLACE.sub(lambda match: values.get(match[1], match[0]), template)


def _without_evidence(template: str) -> str:
    return _EVIDENCE_LINE.sub("", template)
