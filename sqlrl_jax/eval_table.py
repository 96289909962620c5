"""The table that `launch.py eval` prints: a row a set of questions, for the terminal or as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from rollout.types import OUTCOMES
from sqlrl_jax.metrics import GRADE
from sqlrl_jax.voting import ks

Rows = list[list[str]]


def sets_of(m: dict[str, float]) -> list[str]:
    """The sets of questions that the metrics are about."""
    names = [key.removeprefix("eval/").removesuffix("/avg_score") for key in m if key.endswith("/avg_score")]
    return [name for name in names if name != "all"]


def set_rows(m: dict[str, float]) -> tuple[list[str], Rows]:
    """Header and rows: every set, all questions together, the plain mean of the sets."""
    samples = int(m["eval/samples"])
    extra = _extra_columns(m, samples)
    header = ["set", "questions", "accuracy", "95% interval", *(title for title, _ in extra), "turns"]
    sets = sets_of(m)
    rows = [_row(name, f"eval/{name}", m, extra) for name in sets]
    if len(sets) == 1:
        return header, rows
    rows.append(_row("all questions", "eval/all", m, extra))
    interval = _interval(m["eval/mean_over_sets_ci_low"], m["eval/mean_over_sets_ci_high"])
    means = [_percent(sum(m[f"eval/{name}/{key}"] for name in sets) / len(sets)) for _, key in extra]
    rows.append(["mean of sets", "", _percent(m["eval/mean_over_sets"]), interval, *means, ""])
    return header, rows


def _extra_columns(m: dict[str, float], samples: int) -> list[tuple[str, str]]:
    """Title and key of the columns that not every evaluation has."""
    columns = [(f"pass@{k}", f"pass_at_{k}") for k in ks(samples) if k > 1] if samples > 1 else []
    if "eval/all/maj_at_n" in m:
        columns.append((f"maj@{samples}", "maj_at_n"))
    gradings = [key.removeprefix("eval/all/") for key in m if key.startswith(f"eval/all/{GRADE}")]
    return columns + [(name.removeprefix(GRADE), name) for name in gradings]


def _row(label: str, prefix: str, m: dict[str, float], extra: Sequence[tuple[str, str]]) -> list[str]:
    interval = _interval(m[f"{prefix}/ci_low"], m[f"{prefix}/ci_high"])
    figures = []
    for _, key in extra:
        graded = m.get(f"{prefix}/graded/{key.removeprefix(GRADE)}", m[f"{prefix}/questions"])
        few = f" ({graded:.0f})" if graded < m[f"{prefix}/questions"] else ""
        figures.append(_percent(m[f"{prefix}/{key}"]) + few)
    return [
        label,
        f"{m[f'{prefix}/questions']:.0f}",
        _percent(m[f"{prefix}/avg_score"]),
        interval,
        *figures,
        f"{m[f'{prefix}/turns']:.2f}",
    ]


def set_line(name: str, m: dict[str, float]) -> str:
    """One line for a set that is done while others still run."""
    header, rows = set_rows(m)
    cells = dict(zip(header, rows[0], strict=True))
    shown = [f"{title} {cell}" for title, cell in cells.items() if title not in ("set", "questions", "95% interval")]
    shown[0] += f" ({cells['95% interval']})"
    return f"{name}, {cells['questions']} questions: " + "  ".join(shown)


def habits(m: dict[str, float]) -> str:
    """How the episodes ended and what the queries came to, on one line."""
    shares = [f"{o.replace('_', ' ')} {m[f'eval/outcome/{o}']:.1%}" for o in OUTCOMES if m[f"eval/outcome/{o}"]]
    ended = f"outcomes: {', '.join(shares)}"
    if not m["eval/sql_queries"]:
        return ended
    return (
        f"{ended}; looked before answering {m['eval/looked_first']:.1%}; "
        f"of the queries {m['eval/sql_errors']:.1%} failed and {m['eval/sql_timeouts']:.1%} timed out"
    )


def as_text(title: str, header: Sequence[str], rows: Rows) -> Text:
    """Aligned columns that keep their width in a narrow terminal and in a pipe, which rich's tables would cut."""
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(w) if not place else cell.rjust(w) for place, (cell, w) in enumerate(pairs)).rstrip()
        for pairs in (list(zip(row, widths, strict=True)) for row in [list(header), *rows])
    ]
    return Text.assemble("\n", (title, "italic"), "\n\n", (lines[0], "bold"), "\n", "\n".join(lines[1:]), "\n")


def as_markdown(header: Sequence[str], rows: Rows) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [list(header), rule, *cells])


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _interval(low: float, high: float) -> str:
    return f"{100 * low:.1f}–{100 * high:.1f}"
