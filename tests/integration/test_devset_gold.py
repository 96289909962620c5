"""6,653 real questions: gold queries as predictions are all right, and golds changed on purpose get the documented verdicts.

A seeded sample by default; DEVSET=all takes all of them (minutes). What a changed gold should get is worked out here from
its rows, by slow and obvious means, for every grading.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from math import isclose
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from sqlglot import exp

from rollout.environment import make_environment_factory
from rollout.sql import Executor, Result
from rollout.sql.judge import Judge, Suites
from rollout.sql.syntax import is_ordered, parse, without_distinct
from rollout.types import Task
from sqlrl_jax.config import Config
from sqlrl_jax.data.gold import check_golds
from sqlrl_jax.data.tasks import read_tasks

SAMPLE = None if os.environ.get("DEVSET") == "all" else 300
GRADINGS = ("rows", "bird_set", "spider_test_suite")

Rows = list[tuple[Any, ...]]


def sample(path: Path, size: int | None) -> list[Task]:
    tasks = read_tasks(path)
    return tasks if size is None else random.Random(7).sample(tasks, min(size, len(tasks)))


@pytest.fixture(scope="module")
def devset(shared_dir: Path) -> Path:
    return shared_dir / "data" / "devset"


@pytest.fixture(scope="module")
def config(devset: Path) -> Config:
    databases = str(devset / "databases")
    measures = ["bird_set", "spider_test_suite"]
    sql = {"database_root": databases, "measures": measures, "test_suite_root": databases, "timeout": 30.0}
    return Config.model_validate({"environment": {"text2sql": sql}})


def test_gold_queries_as_predictions_are_all_right(devset: Path, config: Config) -> None:
    tasks = sample(devset / "questions.jsonl", SAMPLE)
    with make_environment_factory(config) as factory, ThreadPoolExecutor(8) as pool:

        def play(task: Task) -> tuple[str, float, bool]:
            environment = factory.create()
            environment.reset(Task(task.id, task.source, {**task.fields, "schema": "(left out)"}))
            step = environment.step(f"<think>known</think><solution>{task.fields['gold_sql']}</solution>", 1)
            assert step.turn is not None
            assert len(step.turn.answer) == 16
            measures = [step.metrics["grade/bird_set"], step.metrics["grade/spider_test_suite"]]
            return step.outcome, step.reward, all(measures)

        played = list(pool.map(play, tasks))
    wrong = [task.id for task, found in zip(tasks, played, strict=True) if found != ("correct", 1.0, True)]
    assert wrong == []
    print(f"\n{len(tasks):,} golds as predictions: {len(tasks) - len(wrong):,} right")


def test_the_gold_check_finds_what_is_known(devset: Path, config: Config) -> None:
    known = check_golds(sample(devset / "questions_degenerate_gold.jsonl", SAMPLE), config)
    assert {problem.kind for problem in known} == {"empty"}
    assert len(known) == 239
    tasks = sample(devset / "questions.jsonl", SAMPLE)
    kinds = {problem.kind for problem in check_golds(tasks, config)}
    assert kinds <= {"ambiguous", "slow"}  # the set was made of golds that run, give rows and don't ask the clock


# Golds changed on purpose. Each maker returns the changed query, or None where the gold has nothing to change.


def dropped_distinct(tree: exp.Expr, gold: Result) -> exp.Expr | None:
    if not isinstance(tree, exp.Select) or tree.args.get("distinct") is None or tree.args.get("limit"):
        return None
    tree.set("distinct", None)
    return tree


def other_columns(tree: exp.Expr, gold: Result) -> exp.Expr | None:
    if not isinstance(tree, exp.Select) or tree.is_star or len(tree.expressions) < 2 or by_number(tree):
        return None
    tree.set("expressions", tree.expressions[::-1])
    return tree


def dropped_order(tree: exp.Expr, gold: Result) -> exp.Expr | None:
    if tree.args.get("order") is None or tree.args.get("limit") or keys(tree) is None:
        return None
    tree.set("order", None)
    return tree


def changed_constant(tree: exp.Expr, gold: Result) -> exp.Expr | None:
    where = tree.args.get("where")
    literal = where.find(exp.Literal) if where is not None else None
    if literal is None or literal.find_ancestor(exp.Group, exp.Order, exp.Limit) is not None:
        return None
    literal.replace(
        exp.Literal.string(literal.this + "x") if literal.is_string else exp.Literal.number(f"1{literal.this}")
    )
    return tree


def doubled_row(tree: exp.Expr, gold: Result) -> str:
    return (
        f"SELECT * FROM ({tree.sql('sqlite')}) UNION ALL SELECT * FROM (SELECT * FROM ({tree.sql('sqlite')}) LIMIT 1)"
    )


def lost_row(tree: exp.Expr, gold: Result) -> str | None:
    return f"SELECT * FROM ({tree.sql('sqlite')}) LIMIT {len(gold.rows) - 1}" if len(gold.rows) > 1 else None


def by_number(tree: exp.Expr) -> bool:
    parts = [tree.args.get("order"), tree.args.get("group")]
    return any(isinstance(term, exp.Literal) for p in parts if p for o in p.expressions for term in (o, o.this))


def keys(tree: exp.Expr) -> list[int] | None:
    """Places of the ORDER BY's columns among the results; None if one isn't there."""
    names = [result.alias_or_name.lower() for result in getattr(tree, "selects", [])]
    terms = [term.this for term in tree.args["order"].expressions]
    if not all(isinstance(term, exp.Column) and names.count(term.name.lower()) == 1 for term in terms):
        return None
    return [names.index(term.name.lower()) for term in terms]


def near(a: Any, b: Any) -> bool:
    if isinstance(a, float) or isinstance(b, float):
        return isinstance(a, int | float) and isinstance(b, int | float) and isclose(a, b, rel_tol=1e-6)
    return type(a) is type(b) and a == b


def sortable(row: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple((isinstance(c, int | float), c if isinstance(c, int | float) else 0, repr(c)) for c in row)


def same_list(one: Rows, other: Rows) -> bool:
    pairs = zip(one, other, strict=True)
    return len(one) == len(other) and all(len(a) == len(b) and all(map(near, a, b)) for a, b in pairs)


def same_bag(one: Rows, other: Rows) -> bool:
    return len(one) == len(other) and same_list(sorted(one, key=sortable), sorted(other, key=sortable))


class Case(NamedTuple):
    """A gold and its change, with what is needed to say what each grading should find."""

    gold: Rows
    changed: Rows
    ordered: bool
    order: list[int] | None


def rows_expected(case: Case) -> bool:
    if not case.ordered:
        return same_bag(case.changed, case.gold)
    if case.order is not None and same_bag(case.changed, case.gold):  # ties may come in any order
        key = [[tuple(row[i] for i in case.order) for row in rows] for rows in (case.gold, case.changed)]
        return key[0] == key[1]
    return len(case.changed) == len(case.gold) and same_list(case.changed, case.gold)


def bird_expected(case: Case) -> bool:
    return set(case.changed) == set(case.gold)


Expected = Callable[[Case], bool]
CHANGES: dict[str, tuple[Callable[[exp.Expr, Result], Any], tuple[Expected, Expected, Expected]]] = {
    "dropped DISTINCT": (dropped_distinct, (rows_expected, lambda _: True, lambda _: True)),
    "other columns": (other_columns, (rows_expected, bird_expected, lambda _: True)),
    "dropped ORDER BY": (dropped_order, (rows_expected, lambda _: True, lambda c: c.changed == c.gold)),
    "changed constant": (changed_constant, (rows_expected, bird_expected, rows_expected)),
    "a row doubled": (doubled_row, (lambda _: False, lambda _: True, lambda _: False)),
    "a row lost": (lost_row, (lambda _: False, bird_expected, lambda _: False)),
}


@pytest.fixture(scope="module")
def executor(devset: Path) -> Iterator[Executor]:
    with Executor(devset / "databases", timeout=30.0) as executor:
        yield executor


@pytest.mark.parametrize("change", CHANGES)
def test_changed_golds_get_the_documented_verdicts(devset: Path, executor: Executor, change: str) -> None:
    maker, expectations = CHANGES[change]
    judge = Judge(executor, "rows", GRADINGS[1:], suites=Suites(devset / "databases", executor, keep_distinct=False))
    tasks = sample(devset / "questions.jsonl", SAMPLE)
    golds = executor.run_many([(t.fields["db_id"], t.fields["gold_sql"]) for t in tasks], whole=True)
    tried, surprises = 0, []
    right = dict.fromkeys(GRADINGS, 0)
    lenient = Judge(executor, column_permutation=True)
    for task, gold in zip(tasks, golds, strict=True):
        sql, database = task.fields["gold_sql"], task.fields["db_id"]
        tree = parse(sql)
        assert tree is not None, sql
        order = keys(tree) if tree.args.get("order") is not None else None
        made = maker(tree.copy(), gold)
        if made is None:
            continue
        text = made if isinstance(made, str) else made.sql(dialect="sqlite")
        changed = executor.run(database, text, whole=True)
        assert changed.status == "ok", (text, changed.error)
        tried += 1
        case = Case(list(gold.rows), list(changed.rows), is_ordered(sql), order)
        plain = case
        if "distinct" in sql.lower():  # which the test suite drops
            one, other = executor.run_many([(database, without_distinct(text)) for text in (sql, text)], whole=True)
            plain = case._replace(gold=list(one.rows), changed=list(other.rows))
        found = judge.verdicts(task.id, database, text, changed, sql)
        for grading, expected in zip(GRADINGS, expectations, strict=True):
            right[grading] += found[grading]
            if found[grading] != expected(plain if grading == "spider_test_suite" else case):
                surprises.append((task.id, grading, found[grading], text))
        if change == "other columns" and not lenient.verdicts(task.id, database, text, changed, sql)["rows"]:
            surprises.append((task.id, "rows with column_permutation", False, text))
    print(f"\n{change}: {tried:,} golds; still right: " + ", ".join(f"{name} {n}" for name, n in right.items()))
    assert surprises == []
    assert tried >= 10
    assert right["rows"] < tried
