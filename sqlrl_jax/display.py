"""What a person sees while a run goes on: the plan, one line a step, a live bar inside the step, tables.

Everything printed also goes to the run's log. Without a terminal the live bar is left out and the lines stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table


class Display:
    """Prints to the terminal, unless `quiet`, and to `log`, a function that takes text."""

    def __init__(self, log: Callable[[str], None] = lambda text: None, *, quiet: bool = False) -> None:
        self.console = Console(highlight=False, soft_wrap=True, quiet=quiet)
        self._log = log

    def print(self, what: RenderableType, style: str = "") -> None:
        self.console.print(what, style=style)
        plain = Console(width=120, no_color=True, highlight=False, soft_wrap=True)
        with plain.capture() as capture:
            plain.print(what)
        self._log(capture.get())

    def warn(self, text: str) -> None:
        self.print(f"warning: {text}", style="yellow")

    def plan(self, rows: list[tuple[str, str]]) -> None:
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        for name, value in rows:
            table.add_row(name, value)
        self.print(table)

    @contextmanager
    def bar(self, label: str, total: int) -> Iterator[Callable[[int], None]]:
        """A live bar of `total` episodes; yields a function that takes the number done."""
        if self.console.quiet or not self.console.is_terminal:  # where rich would leave an empty line for each bar
            yield lambda done: None
            return
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total} episodes"))
        with Progress(*columns, TimeElapsedColumn(), console=self.console, transient=True) as progress:
            task = progress.add_task(label, total=total)
            yield lambda done: progress.update(task, completed=done)


def duration(seconds: float) -> str:
    """`75` → `1:15`; hours appear when there are any."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def step_line(step: int, total: int, m: dict[str, float], seconds_left: float) -> str:
    """One line for a training step; what is about queries is left out where there are none."""
    sql = (
        f"looked {m['generate/looked_first']:4.0%}  sql errors {m['sql/error_rate']:4.0%}  " if m["sql/queries"] else ""
    )
    return (
        f"step {step:>4}/{total}  reward {m['reward/avg_raw_reward']:.3f}  turns {m['generate/turns']:.1f}  {sql}"
        f"{m['generate/tokens']:,.0f} tokens at {m['generate/tokens_per_second']:,.0f}/s  "
        f"rollout {m['timing/rollout']:.1f}s  update {m['timing/update']:.1f}s  push {m['timing/push']:.1f}s  "
        f"left {duration(seconds_left)}"
    )


def eval_line(step: int, max_turns: int, m: dict[str, float]) -> str:
    """One line for an evaluation."""
    k = f"  pass@{m['eval/samples']:.0f} {m['eval/all/pass_at_n']:.1%}" if m.get("eval/samples", 1) > 1 else ""
    looked = f"  looked {m['eval/looked_first']:.0%}" if m.get("eval/sql_queries", 1) else ""
    return (
        f"eval at step {step}, up to {max_turns} turns, {m['eval/questions']:.0f} questions: "
        f"accuracy {m['eval/all/avg_score']:.1%}{k}{looked}  turns {m['eval/turns']:.1f}"
    )


def comparison(title: str, columns: list[tuple[str, dict[str, float]]]) -> Table:
    """Accuracy in all and by source, outcomes and habits, one column a measurement."""
    table = Table(title=title, title_justify="left", header_style="bold")
    table.add_column("held-out questions")
    for name, _ in columns:
        table.add_column(name, justify="right")
    keys = [k for k in columns[-1][1] if k.endswith("/avg_score")]
    keys.sort(key=lambda k: k != "eval/all/avg_score")
    rows = [(f"accuracy, {k.split('/')[1]}", k) for k in keys]
    if columns[-1][1]["eval/samples"] > 1:
        rows.append((f"pass@{columns[-1][1]['eval/samples']:.0f}", "eval/all/pass_at_n"))
    rows += [(k.removeprefix("eval/outcome/").replace("_", " "), k) for k in columns[-1][1] if "/outcome/" in k]
    rows += [("looked before answering", "eval/looked_first")]
    for label, key in rows:
        if any(m.get(key) for _, m in columns):
            table.add_row(label, *(f"{m.get(key, 0.0):.1%}" for _, m in columns))
    table.add_row("turns", *(f"{m['eval/turns']:.2f}" for _, m in columns))
    return table
