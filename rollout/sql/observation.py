"""What the model reads after a query: a small text table or one line that says what went wrong.

One line of column names, one line a row, cells between ` | `. Everything a database can hold is shown on one line without
control characters (but for the tab); whatever looks like one of our tags or a chat template's special token is disarmed,
so that a cell can neither close the observation nor start a turn. The text is never longer than it may be.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

Cell = None | int | float | str | bytes

MAX_CELL_CHARS = 400
MAX_NAME_CHARS = 100
MAX_ERROR_CHARS = 500
TIMEOUT = "SQL Timeout"
NO_ROWS = "(no rows)"
SEPARATOR = " | "

_TAGS = "think|sql|solution|observation|reminder|s|unk|pad|bos|eos|cls|sep|mask|start_of_turn|end_of_turn|tool_call"
_MARKUP = re.compile(rf"<(?=\s*/?\s*(?:{_TAGS})\b|\||｜)|\[(?=/?INST\])", re.IGNORECASE)
_UNPRINTABLE = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_SHORT_ESCAPES = {"\n": "\\n", "\r": "\\r"}


def escape(text: str) -> str:
    """Disarms tags and special tokens, and puts the text on one line."""
    if "<" not in text and "[" not in text and text.isascii() and text.isprintable():
        return text  # nearly every cell
    text = _MARKUP.sub(lambda m: "&lt;" if m.group() == "<" else "&#91;", text)
    return _UNPRINTABLE.sub(lambda m: _code(m.group()), text)


def _code(character: str) -> str:
    number = ord(character)
    return _SHORT_ESCAPES.get(character) or (f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}")


def clip(text: str, limit: int) -> str:
    """The first `limit` characters, with the number of those left out."""
    return text if len(text) <= limit else f"{text[:limit]}… (+{len(text) - limit} characters)"


def show_cell(value: Cell) -> str:
    """A cell as SQLite's shell would show it. Text is quoted only where its ends could not be seen."""
    if isinstance(value, str):
        if not value or value == "NULL" or SEPARATOR in value or value[0].isspace() or value[-1].isspace():
            return "'" + escape(clip(value, MAX_CELL_CHARS).replace("'", "''")) + "'"
        return escape(clip(value, MAX_CELL_CHARS))
    if value is None:
        return "NULL"
    if isinstance(value, float):
        return "NULL" if value != value else repr(float(f"{value:.15g}"))
    if isinstance(value, bytes):
        return f"x'{value[:16].hex()}'" if len(value) <= 16 else f"x'{value[:16].hex()}…' ({len(value)} bytes)"
    # Python refuses to write very long integers in decimal.
    return str(value) if value.bit_length() <= 128 else clip(hex(value), MAX_CELL_CHARS)


def render(columns: Sequence[str], rows: Sequence[Sequence[Cell]], total: int, exact: bool, max_chars: int) -> str:
    """The table of `rows`, the first ones of a result of `total` rows (of more than `total` where not `exact`)."""
    room = max_chars - len(_tail(total, False)) - 1
    lines = [_cut(SEPARATOR.join(escape(clip(name, MAX_NAME_CHARS)) for name in columns), room)]
    room -= len(lines[0])
    for row in rows:
        line = SEPARATOR.join(map(show_cell, row))
        if len(line) + 1 > room:
            if len(lines) == 1 and room > 20:  # better a part of the first row than nothing
                lines.append(_cut(line, room - 1))
            break
        lines.append(line)
        room -= len(line) + 1
    hidden = total - (len(lines) - 1)
    if total == 0:
        lines.append(NO_ROWS)
    elif hidden or not exact:
        lines.append(_tail(hidden, exact))
    return "\n".join(lines)


def render_error(message: str, max_chars: int) -> str:
    """One line for a query that failed."""
    return _cut("SQL Error: " + escape(clip(message.strip(), MAX_ERROR_CHARS)), max_chars)


def _tail(hidden: int, exact: bool) -> str:
    if not exact:
        return f"(more than {hidden} more rows)"
    return "(1 more row)" if hidden == 1 else f"({hidden} more rows)"


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: max(0, limit - 1)] + "…"
