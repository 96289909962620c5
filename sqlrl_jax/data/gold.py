"""Tries every gold query before a model is trained on it, because a reward is worth what its gold is worth.

Kinds of problems, the first that applies being told:

    missing_database   the database isn't there or can't be read
    failing            the query fails, is refused, or returns no columns
    timeout            it exceeds the limits of environment.text2sql
    slow               it needs more than a quarter of them, in VM steps or CPU time: a right answer might need more
    empty              no rows, or nothing but NULL: any query with a wrong filter would be right
    volatile           it asks the clock or the dice; both stand still here, but the answer means nothing
    ambiguous          chance decides: a LIMIT cuts through rows that tie, a column is taken from any row of its group,
                       or the same question about the same database has golds with other results

Chance is found by running the query again with ties broken one way and the other (rollout.sql.rewrite). Left out: whether
a gold answers its question, which takes a person.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rollout.errors import InfrastructureError, UserError
from rollout.sql import grader, rewrite, syntax
from rollout.sql.executor import Executor, Result
from rollout.sql.rows import same_multiset
from rollout.text2sql import database_of, open_executor
from rollout.types import Task
from sqlrl_jax.config import Config
from sqlrl_jax.data.progress import Progress, bars, silent
from sqlrl_jax.data.tasks import read_tasks, replacing, write_tasks

KINDS = ("missing_database", "failing", "timeout", "slow", "empty", "volatile", "ambiguous")
SLOW_SHARE = 0.25  # of the limits
BATCH = 64  # questions between two steps of the progress bar
SHOWN = 20  # problems on screen
DETAIL_CHARS = 200


@dataclass(frozen=True)
class GoldProblem:
    """Why a question's gold query is of no use."""

    task_id: str
    kind: str
    detail: str


@dataclass(frozen=True)
class _Finding:
    """What is known of one query on one database: a problem (`kind`), or the hash of its result."""

    kind: str = ""
    detail: str = ""
    fingerprint: str = ""


Query = tuple[str, str]
"""Database, as the executor names it, and SQL."""


def check_golds(tasks: Sequence[Task], config: Config, progress: Progress = silent) -> list[GoldProblem]:
    """Problems of the tasks' gold queries, at most one a task, in the tasks' order. A task without a gold query (its
    results are given) needs its database only. Raises InfrastructureError if there is no database root.
    """
    queries = [(database_of(task), str(task.fields.get("gold_sql") or "")) for task in tasks]
    todo = list(dict.fromkeys(queries))
    findings: dict[Query, _Finding] = {}
    with _Checker(config) as checker:
        for start in range(0, len(todo), BATCH):
            findings |= checker.look(todo[start : start + BATCH])
            progress("checking gold queries", len(findings), len(todo))
    known = [findings[query] for query in queries]
    known = _same_question(tasks, queries, known)
    return [GoldProblem(t.id, f.kind, f.detail) for t, f in zip(tasks, known, strict=True) if f.kind]


class _Checker:
    """Runs gold queries, first under a share of the limits; the workers for all of them start when one needs more."""

    def __init__(self, config: Config) -> None:
        full = config.environment.text2sql
        steps = max(1000, int(full.max_vm_steps * SLOW_SHARE))
        share = full.model_copy(update={"max_vm_steps": steps, "timeout": full.timeout * SLOW_SHARE})
        self._settings = full
        self._stack = ExitStack()
        self._quick = self._stack.enter_context(open_executor(share, full.database_root))
        self._patient: Executor | None = None

    def __enter__(self) -> _Checker:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def look(self, queries: list[Query]) -> dict[Query, _Finding]:
        """What is to be said of each query."""
        found: dict[Query, _Finding] = {}
        there = []
        for query in queries:
            try:
                self._quick.locate(query[0])
            except InfrastructureError as error:
                found[query] = _Finding("missing_database", str(error))
            else:
                there.append(query)
        with_sql = [query for query in there if query[1].strip()]
        results = {q: self._settle(q, r) for q, r in zip(with_sql, self._run(with_sql), strict=True)}
        found |= {query: _Finding() for query in there if query not in results}
        found |= {q: r for q, r in results.items() if isinstance(r, _Finding)}
        good = {q: r for q, r in results.items() if isinstance(r, Result)}
        chance = self._chance(good)
        for query, result in good.items():
            found[query] = _judged(query[1], result, chance.get(query, ""))
        return found

    def _settle(self, query: Query, result: Result | InfrastructureError) -> Result | _Finding:
        """The result of a query that can be used, or what stands against it. Runs a slow one again with all the time."""
        if isinstance(result, InfrastructureError):
            return _Finding("missing_database", str(result))
        if result.status == "timeout":
            if self._patient is None:
                self._patient = self._stack.enter_context(open_executor(self._settings, self._settings.database_root))
            again = self._patient.run(*query, whole=True)
            if again.status == "ok":
                return _Finding("slow", f"needs more than {SLOW_SHARE:.0%} of the limits ({again.seconds:.1f} s)")
            result = again
        if result.status == "timeout":
            steps, seconds = self._settings.max_vm_steps, self._settings.timeout
            return _Finding("timeout", f"needs more than {steps:,} VM steps or {seconds:g} s")
        return result if result.status == "ok" else _Finding("failing", result.error)

    def _run(self, queries: list[Query]) -> list[Result | InfrastructureError]:
        """All results; one damaged database does not keep the others from theirs."""
        try:
            return list(self._quick.run_many(queries, whole=True))
        except InfrastructureError:
            return [self._run_one(query) for query in queries]

    def _run_one(self, query: Query) -> Result | InfrastructureError:
        try:
            return self._quick.run(*query, whole=True)
        except InfrastructureError as error:
            return error

    def _chance(self, results: dict[Query, Result]) -> dict[Query, str]:
        """The queries whose rows differ when what SQL leaves open goes the one way or the other, and what it was."""
        pairs: list[tuple[Query, str, rewrite.Pair]] = []
        for query, result in results.items():
            limits = rewrite.limits_broken(query[1], len(result.columns))
            groups = rewrite.groups_broken(query[1])
            pairs += [(query, "a LIMIT cuts through rows that tie", limits)] if limits else []
            pairs += [(query, "a column is neither grouped by nor aggregated", groups)] if groups else []
        runs = self._run([(query[0], sql) for query, _, pair in pairs for sql in pair])
        found: dict[Query, str] = {}
        for (query, reason, _), one, other in zip(pairs, runs[::2], runs[1::2], strict=True):
            if not isinstance(one, Result) or not isinstance(other, Result) or {one.status, other.status} != {"ok"}:
                continue  # the query was fine before it was written anew, so this says nothing about it
            if not same_multiset(one.rows, other.rows):
                found.setdefault(query, f"{reason}: {_example(one, other)}")
        return found


def _judged(sql: str, result: Result, chance: str) -> _Finding:
    """What stands against a query that gave a result."""
    if not result.rows:
        return _Finding("empty", "no rows")
    if all(cell is None for row in result.rows for cell in row):
        return _Finding("empty", "nothing but NULL")
    volatile = syntax.volatile_parts(sql)
    if volatile:
        return _Finding("volatile", "uses " + ", ".join(volatile))
    if chance:
        return _Finding("ambiguous", chance)
    return _Finding(fingerprint=grader.fingerprint(result))


def _example(one: Result, other: Result) -> str:
    left, right = Counter(one.rows), Counter(other.rows)
    mine, others = next(iter(left - right), None), next(iter(right - left), None)
    return f"{_row(mine)} or {_row(others)}"


def _row(row: tuple[object, ...] | None) -> str:
    text = "no such row" if row is None else repr(row[0] if len(row) == 1 else row)
    return text if len(text) <= 80 else text[:79] + "…"


def _same_question(tasks: Sequence[Task], queries: list[Query], findings: list[_Finding]) -> list[_Finding]:
    """Marks questions whose words, knowledge and database are another's, but not the gold's result."""
    groups: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for index, (task, (database, _), finding) in enumerate(zip(tasks, queries, findings, strict=True)):
        if finding.fingerprint:
            words = [" ".join(str(task.fields.get(name) or "").lower().split()) for name in ("question", "evidence")]
            groups[database, *words].append(index)
    findings = list(findings)
    for members in groups.values():
        if len({findings[i].fingerprint for i in members}) > 1:
            ids = [tasks[i].id for i in members]
            for i in members:
                other = next(
                    o for o, m in zip(ids, members, strict=True) if findings[m].fingerprint != findings[i].fingerprint
                )
                findings[i] = _Finding("ambiguous", f"question {other} asks the same, with another result")
    return findings


def main(config: Config, questions: Path, out: Path | None) -> int:
    """`launch.py prepare --check`: a table of the problems; good questions to `out`. Returns 0 if there are none, else 1."""
    if out is not None and out.resolve() == questions.resolve():
        raise UserError(f"--out {out}: is the file of --questions, which is only read; name another one")
    root = Path(config.environment.text2sql.database_root)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder of databases; name it with --databases")
    tasks = read_tasks(questions)
    console = Console(highlight=False)
    with bars(unit="items") as progress:
        problems = check_golds(tasks, config, progress)
    console.print(table(problems, len(tasks)))
    for line in _lines(problems, "" if out else "; --out FILE writes them all"):
        console.print(line, markup=False, soft_wrap=True)
    if out is not None:
        bad = {problem.task_id for problem in problems}
        kept = write_tasks(out, (task for task in tasks if task.id not in bad))
        listed = out.with_suffix(".dropped.jsonl")
        _write(listed, problems)
        console.print(f"{kept:,} good questions in {out}, the others' problems in {listed}", soft_wrap=True)
    return 1 if problems else 0


def _lines(problems: Sequence[GoldProblem], where: str) -> list[str]:
    """The first problems in words; questions that have the very same one, such as a missing database, share a line."""
    same: dict[tuple[str, str], list[str]] = defaultdict(list)
    for problem in problems:
        same[problem.kind, problem.detail].append(problem.task_id)
    first = list(same.items())[:SHOWN]
    lines = [
        f"  {ids[0]}{f' and {len(ids) - 1:,} more' if len(ids) > 1 else ''}  {kind}  {_short(detail)}"
        for (kind, detail), ids in first
    ]
    rest = len(problems) - sum(len(ids) for _, ids in first)
    return lines + ([f"  … and {rest:,} more{where}"] if rest else [])


def table(problems: Sequence[GoldProblem], questions: int) -> Table:
    """How many questions have which kind of problem."""
    counts = Counter(problem.kind for problem in problems)
    shown = Table(box=None, pad_edge=False, header_style="bold")
    shown.add_column("gold queries")
    shown.add_column("questions", justify="right")
    shown.add_column("share", justify="right")
    for kind, count in [("good", questions - len(problems)), *((kind, counts[kind]) for kind in KINDS)]:
        shown.add_row(kind.replace("_", " "), f"{count:,}", f"{count / max(1, questions):.1%}")
    return shown


def without_bad_golds(
    tasks: list[Task], config: Config, record: Path, tell: Callable[[str], None], log: Callable[[str], None]
) -> list[Task]:
    """The training questions with a good gold query, said in one line; each problem goes to the log and to `record`.

    A record that is there already is followed, so that a resumed run trains on the same questions in the same order.
    Nothing is done with data.bad_gold: keep, for other environments, and where the databases are not on this host.
    Raises UserError if no question is left.
    """
    if config.data.bad_gold == "keep" or config.environment.env_class != "text2sql":
        return tasks
    root = Path(config.environment.text2sql.database_root)
    if config.trainer.resume_mode == "latest" and record.exists():
        problems = [GoldProblem(**json.loads(line)) for line in record.read_text(encoding="utf-8").splitlines()]
    elif not root.is_dir():
        tell(f"gold queries were not checked: {root} is not on this host")
        return tasks
    else:
        screen = Console(highlight=False, stderr=True)
        with bars(screen, unit="items") if screen.is_terminal else nullcontext(silent) as progress:
            problems = check_golds(tasks, config, progress)
        _write(record, problems)
        for problem in problems:
            log(f"gold query of {problem.task_id}: {problem.kind}: {problem.detail}")
    bad = {problem.task_id for problem in problems}
    kept = [task for task in tasks if task.id not in bad]
    if not kept:
        first = f"{problems[0].task_id}: {_short(problems[0].detail)}"
        raise UserError(f"no training question has a good gold query: {_counts(problems)}, as {first}; see {record}")
    if len(kept) < len(tasks):
        tell(
            f"{len(tasks) - len(kept):,} of {len(tasks):,} training questions left out: {_counts(problems)} ({record})"
        )
    return kept


def _counts(problems: Sequence[GoldProblem]) -> str:
    counts = Counter(problem.kind for problem in problems)
    return ", ".join(f"{counts[kind]:,} {kind.replace('_', ' ')}" for kind in KINDS if counts[kind])


def _write(path: Path, problems: Sequence[GoldProblem]) -> None:
    with replacing(path) as part:
        lines = (json.dumps(asdict(p), ensure_ascii=False) + "\n" for p in problems)
        part.write_text("".join(lines), encoding="utf-8", errors="backslashreplace")


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= DETAIL_CHARS else text[: DETAIL_CHARS - 1] + "…"
