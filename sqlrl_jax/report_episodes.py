"""Episodes for the report page: reading trajectory files, choosing which to show, cutting them to a readable length.

Only the first and last evaluation and a few training steps are read, and token ids are dropped at once, because a long run's
trajectories do not fit in memory. Texts are bounded here; escaping is the template's work, except for highlighted SQL,
which is escaped piece by piece.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup, escape

from rollout.errors import UserError
from rollout.types import OUTCOMES

OUTCOME_LABELS = {
    "correct": "correct",
    "wrong": "wrong answer",
    "malformed": "no well-formed answer",
    "sql_error": "SQL error",
    "timeout": "query too slow",
    "overflow": "context full",
    "infrastructure": "infrastructure failure",
    "prompt_too_long": "prompt too long",
}
STATUS_LABELS = {
    "ok": "ran",
    "denied": "refused",
    "error": "error",
    "timeout": "too slow",
    "invalid": "nothing usable found",
    "solution": "final answer",
}
STOP_LABELS = {
    "max_turns": "turns used up",
    "length": "the turn grew too long",
    "overflow": "context full",
    "timeout": "the environment took too long",
    "done": "the environment ended the episode",
    "error": "something outside the model failed",
}
IMPROVED, STILL_WRONG, WORSE, STEADY = 6, 3, 2, 3  # pairs shown of each kind; steady ones only fill an empty page
SAMPLES_PER_OUTCOME, TRAINING_FILES = 3, 6
_TURNS_SHOWN = 6
_BOUNDS = {"prompt": 4000, "question": 600, "text": 1200, "sql": 1200, "observation": 1000}
_UNREAD = ("prompt_ids", "response_ids", "loss_mask", "logprobs", "spans")

Record = dict[str, Any]


class Pair(NamedTuple):
    """The same question in the first and the last evaluation."""

    before: Record
    after: Record


def read_lines(path: Path) -> tuple[list[Record], str]:
    """The records of a JSON-lines file, and a note when a torn last line was left out.

    Raises UserError naming file and line for any other line that is not a JSON object.
    """
    records: list[Record] = []
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError):
            if number == len(lines):  # no newline after it: the writer was stopped in the middle
                return records, f"The last line of {path.name} is incomplete and was left out."
            raise UserError(f"{path}:{number}: not JSON; mend or remove the line and make the report again") from None
        if not isinstance(record, dict):
            raise UserError(f"{path}:{number}: expected a JSON object, found {type(record).__name__}")
        records.append({key: value for key, value in record.items() if key not in _UNREAD})
    return records, ""


def trajectory_files(run_dir: Path, kind: str) -> list[Path]:
    """Files of one kind in step order, leaving out names of another shape."""
    files = [p for p in (run_dir / "trajectories").glob(f"{kind}_*.jsonl") if p.stem.rpartition("_")[2].isdecimal()]
    return sorted(files, key=lambda p: int(p.stem.rpartition("_")[2]))


def spread(files: Sequence[Path], count: int) -> list[Path]:
    """At most `count` of the files: the first, the last and some evenly between."""
    if len(files) <= count:
        return list(files)
    return [files[round(i * (len(files) - 1) / (count - 1))] for i in range(count)]


def match(before: Iterable[Record], after: Iterable[Record]) -> list[Pair]:
    """Pairs of the same question (first sample of each), in the order of `after`."""
    first = _first_samples(before)
    return [Pair(first[key], record) for key, record in _first_samples(after).items() if key in first]


def choose_pairs(pairs: Iterable[Pair]) -> list[tuple[str, list[Pair]]]:
    """Groups to show, each from as many kinds of question as there are; longer conversations first within a kind."""
    groups: dict[tuple[bool, bool], list[Pair]] = defaultdict(list)
    for pair in pairs:
        groups[_right(pair.before), _right(pair.after)].append(pair)
    chosen = [
        ("Wrong before, correct after", _by_turns_of_source(groups[False, True], IMPROVED)),
        ("Still wrong", _by_turns_of_source(groups[False, False], STILL_WRONG)),
        ("Correct before, wrong after", _by_turns_of_source(groups[True, False], WORSE)),
    ]
    if not any(members for _, members in chosen):
        chosen.append(("Correct before and after", _by_turns_of_source(groups[True, True], STEADY)))
    return [(title, members) for title, members in chosen if members]


def choose_samples(records: Iterable[Record]) -> list[tuple[str, int, list[Record]]]:
    """(outcome, how many were read, a few spread over the run) for each outcome that occurs."""
    by_outcome: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_outcome[str(record.get("outcome", ""))].append(record)
    order = [o for o in OUTCOMES if o in by_outcome] + sorted(o for o in by_outcome if o not in OUTCOMES)
    return [(o, len(by_outcome[o]), _spread_records(by_outcome[o])) for o in order]


def view(record: Record) -> dict[str, Any]:
    """What the template shows of one episode: bounded texts, highlighted SQL, plain words."""
    turns = [t for t in record.get("turns") or [] if isinstance(t, dict)]
    half = _TURNS_SHOWN // 2
    shown = list(enumerate(turns, 1))
    hidden = max(0, len(shown) - _TURNS_SHOWN)
    if hidden:
        shown = shown[:half] + shown[-half:]
    outcome = str(record.get("outcome", ""))
    return {
        "step": record.get("step"),
        "source": str(record.get("source", "")),
        "db_id": str(record.get("db_id", "")),
        "question": bounded(record.get("question") or record.get("task_id"), "question"),
        "evidence": bounded(record.get("evidence"), "question"),
        "prompt": bounded(_prompt_text(record.get("prompt")), "prompt"),
        "gold_sql": highlight(bounded(record.get("gold_sql"), "sql")),
        "outcome": outcome if outcome in OUTCOMES else "other",
        "outcome_label": OUTCOME_LABELS.get(outcome, outcome or "unknown"),
        "ended": _ended(str(record.get("stop_reason") or "solution")),
        "error": bounded(record.get("error"), "question"),
        "turn_count": len(turns),
        "hidden": hidden,
        "gap_after": half if hidden else 0,
        "turns": [_turn_view(number, turn) for number, turn in shown],
    }


def bounded(text: Any, kind: str) -> str:
    """The text, cut where it gets too long for the page, saying how much is missing."""
    whole = "" if text is None else str(text).strip()
    limit = _BOUNDS[kind]
    return whole if len(whole) <= limit else f"{whole[:limit]} … ({len(whole) - limit:,} more characters)"


_TAGGED = re.compile(r"<(think|sql|solution)>(.*?)(?:</\1>|(?=<(?:think|sql|solution)>)|\Z)", re.S)
_OBSERVATION = re.compile(r"\s*<observation>(.*?)</observation>(.*)\Z", re.S)


def split_action(action: str) -> list[tuple[str, str]]:
    """What the model wrote, as (think | sql | solution | text, content) in order; empty pieces are left out."""
    if "</think>" in action and "<think>" not in action:  # the prompt may already have opened the thought
        action = "<think>" + action
    parts, end = [], 0
    for found in _TAGGED.finditer(action):
        parts += [("text", action[end : found.start()]), (found[1], found[2])]
        end = found.end()
    parts.append(("text", action[end:]))
    return [(kind, content.strip()) for kind, content in parts if content.strip()]


_KEYWORD_LIST = """
    select from where join left right inner outer full cross natural on using group by order having limit offset
    distinct as and or not in is null like glob between exists case when then else end union all intersect except with
    recursive asc desc cast over partition values collate escape"""
_KEYWORDS = frozenset(_KEYWORD_LIST.split())
_SQL_TOKEN = re.compile(
    r"""(?P<c>--[^\n]*|/\*.*?\*/)|(?P<s>'(?:[^']|'')*')|(?P<i>"(?:[^"]|"")*"|`[^`]*`)"""
    r"""|(?P<n>\b\d+(?:\.\d+)?\b)|(?P<w>[A-Za-z_]\w*)""",
    re.S,
)


def highlight(sql: str) -> Markup:
    """SQL as escaped HTML with keywords, strings, numbers and comments marked."""
    out, end = [], 0
    for found in _SQL_TOKEN.finditer(sql):
        kind = found.lastgroup
        if kind == "w":
            kind = "k" if found[0].lower() in _KEYWORDS else None
        out.append(str(escape(sql[end : found.start()])))
        piece = str(escape(found[0]))
        out.append(f'<span class="{kind}">{piece}</span>' if kind and kind != "i" else piece)
        end = found.end()
    return Markup("".join(out) + str(escape(sql[end:])))


def _turn_view(number: int, turn: Record) -> dict[str, Any]:
    parts = []
    for kind, content in split_action(str(turn.get("action", ""))):
        is_sql = kind in ("sql", "solution")
        cut = bounded(content, "sql" if is_sql else "text")
        parts.append((kind, highlight(cut) if is_sql else cut))
    observation, reminder = str(turn.get("observation") or ""), ""
    if found := _OBSERVATION.match(observation):
        observation, reminder = found[1], found[2]
    status, reward = str(turn.get("status", "")), float(turn.get("reward") or 0.0)
    return {
        "number": number,
        "parts": parts,
        "observation": bounded(observation, "observation"),
        "reminder": bounded(re.sub(r"</?reminder>", "", reminder), "question"),
        "reward": f"{reward:+.3g}" if reward not in (0.0, 1.0) else "",
        "status": status if status in STATUS_LABELS else "other",
        "status_label": STATUS_LABELS.get(status, status),
    }


def _ended(reason: str) -> str:
    return "" if reason == "solution" else STOP_LABELS.get(reason, reason.replace("_", " "))


def _prompt_text(prompt: Any) -> str:
    if isinstance(prompt, list):  # chat messages
        return "\n\n".join(f"[{m.get('role', '')}]\n{m.get('content', '')}" for m in prompt if isinstance(m, dict))
    return "" if prompt is None else str(prompt)


def _right(record: Record) -> bool:
    return record.get("outcome") == "correct"


def _first_samples(records: Iterable[Record]) -> dict[str, Record]:
    first: dict[str, Record] = {}
    for record in records:
        key = str(record.get("task_id", ""))
        if key not in first or int(record.get("sample", 0)) < int(first[key].get("sample", 0)):
            first[key] = record
    return first


def _by_turns_of_source(pairs: list[Pair], count: int) -> list[Pair]:
    """Takes one pair of each source in turn, so that no kind of question fills the page."""
    by_source: dict[str, list[Pair]] = defaultdict(list)
    for pair in sorted(pairs, key=lambda p: (-min(4, len(p.after.get("turns") or [])), str(p.after.get("task_id")))):
        by_source[str(pair.after.get("source", ""))].append(pair)
    rows = [by_source[source] for source in sorted(by_source)]
    depth = max((len(row) for row in rows), default=0)
    return [row[i] for i in range(depth) for row in rows if i < len(row)][:count]


def _spread_records(records: list[Record]) -> list[Record]:
    count = min(SAMPLES_PER_OUTCOME, len(records))
    if count <= 1:
        return records[:1]
    return [records[round(i * (len(records) - 1) / (count - 1))] for i in range(count)]
