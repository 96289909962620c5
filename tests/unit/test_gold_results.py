"""Grading by published results (Spider 2): against a plain version of the published comparison, and through an episode."""

import io
import math
from pathlib import Path
from typing import Any

import omnisql_tree as tree
import pandas
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.errors import InfrastructureError
from rollout.sql.gold_results import matches, of
from rollout.text2sql import Text2SQL
from rollout.types import Task
from sqlrl_jax.config import Config
from sqlrl_jax.config_file import override
from sqlrl_jax.data.public.results import GoldResults
from sqlrl_jax.data.tasks import DataError

Row = tuple[Any, ...]


def gold(rows: list[Row], columns: list[int] | None = None, ignore_order: bool = False) -> list[dict[str, Any]]:
    texts = [["" if cell is None else str(cell) for cell in column] for column in zip(*rows, strict=True)]
    chosen = texts if columns is None else [texts[i] for i in columns]
    return [{"names": ["c"] * len(chosen), "columns": chosen, "ignore_order": ignore_order}]


@pytest.mark.parametrize(
    ("predicted", "golds", "right"),
    [
        ([(1, "a"), (2, "b")], gold([(1, "a"), (2, "b")]), True),
        ([("a", 1), ("b", 2)], gold([(1, "a"), (2, "b")]), True),  # columns in any place
        ([("a", 1, 0.5), ("b", 2, 0.5)], gold([(1, "a"), (2, "b")]), True),  # more columns do no harm
        ([("a",), ("b",)], gold([(1, "a"), (2, "b")]), False),
        ([("a",), ("b",)], gold([(1, "a"), (2, "b")], columns=[1]), True),
        ([(2, "b"), (1, "a")], gold([(1, "a"), (2, "b")]), False),
        ([(2, "b"), (1, "a")], gold([(1, "a"), (2, "b")], ignore_order=True), True),
        ([(1, "b"), (2, "a")], gold([(1, "a"), (2, "b")], ignore_order=True), True),  # as published: column by column
        ([(1.009,), (2.0,)], gold([(1.0,), (2.0,)]), True),
        ([(1.015,), (2.0,)], gold([(1.0,), (2.0,)]), False),
        ([(9,), (10,)], gold([(10.0,), (9.0,)], ignore_order=True), True),
        ([("1",), ("2",)], gold([(1,), (2,)]), True),  # a CSV file does not tell numbers from texts
        ([("1",), ("x",)], gold([(1,), ("x",)]), True),
        ([(None,), (1,)], gold([(None,), (1,)]), True),
        ([("NULL",), (1,)], gold([(None,), (1,)]), True),
        ([("NA",), (1.001,)], gold([("n/a",), (1,)]), True),
        ([(0,), (1,)], gold([(None,), (1,)]), False),
        ([(1,), (1,)], gold([(1,)]), False),
        ([], gold([(1,)]), False),
        ([], [{"names": ["c"], "columns": [[]], "ignore_order": False}], True),
        ([(1,)], [{"names": ["c"], "columns": [[]], "ignore_order": False}], False),
        ([(3,)], gold([(1,)]) + gold([(3,)]), True),  # any of several
        ([("1_0",)], gold([(10,)]), False),
        ([("2024-01-02",)], gold([("2024-01-02",)]), True),
    ],
)
def test_verdicts(predicted: list[Row], golds: list[dict[str, Any]], right: bool) -> None:
    assert matches(predicted, golds) is right


def published(predicted: list[Row], wanted: list[Row], columns: list[int], ignore_order: bool) -> bool:
    """The published comparison, written down plainly: both results through CSV files and pandas."""

    def frame(rows: list[Row]) -> pandas.DataFrame:
        names = [f"c{i}" for i in range(len(rows[0]))]
        return pandas.read_csv(io.StringIO(pandas.DataFrame(rows, columns=names, dtype=object).to_csv(index=False)))

    def same(left: list[Any], right: list[Any]) -> bool:
        if ignore_order:
            left, right = (sorted(v, key=lambda x: (pandas.isna(x), isinstance(x, str), x)) for v in (left, right))
        return len(left) == len(right) and all(
            (pandas.isna(a) and pandas.isna(b))
            or (
                math.isclose(float(a), float(b), abs_tol=1e-2)
                if isinstance(a, int | float) and isinstance(b, int | float)
                else a == b
            )
            for a, b in zip(left, right, strict=True)
        )

    theirs, ours = frame(wanted), frame(predicted)
    needed = theirs.iloc[:, columns] if columns else theirs
    return all(any(same(list(needed[n]), list(ours[p])) for p in ours) for n in needed)


CELLS = st.none() | st.integers(-3, 3) | st.sampled_from([0.5, 0.504, -1.25, "a", "b", "1", "x y", "NA", "q,r", "2.5"])


@st.composite
def results(draw: st.DrawFn) -> tuple[list[Row], list[Row], list[int], bool]:
    width, height = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    rows = st.lists(st.tuples(*[CELLS] * width), min_size=height, max_size=height)
    wanted = draw(rows)
    predicted = draw(st.permutations(wanted) | rows)
    order = draw(st.permutations(range(width)))
    predicted = [tuple(row[i] for i in order) + draw(st.just(("extra",))) for row in predicted]
    return predicted, wanted, draw(st.lists(st.integers(0, width - 1), unique=True)), draw(st.booleans())


@settings(max_examples=100, deadline=None)
@given(results())
def test_agrees_with_the_published_comparison(case: tuple[list[Row], list[Row], list[int], bool]) -> None:
    predicted, wanted, columns, ignore_order = case
    assert matches(predicted, gold(wanted, columns or None, ignore_order)) == published(
        predicted, wanted, columns, ignore_order
    )


def write(folder: Path, standard: str, **files: str) -> GoldResults:
    folder.mkdir(exist_ok=True)
    (folder / "standard.jsonl").write_text(standard)
    for name, text in files.items():
        (folder / f"{name}.csv").write_bytes(text.encode("latin-1"))
    return GoldResults(folder, folder / "standard.jsonl")


def test_alternatives_and_their_columns(tmp_path: Path) -> None:
    read = write(
        tmp_path,
        '{"instance_id": "local1", "condition_cols": [[1], []], "ignore_order": [true, false]}\n'
        '{"instance_id": "local12", "condition_cols": [0], "ignore_order": false}\n'
        '{"instance_id": "local3", "condition_cols": null, "ignore_order": true}\n',
        local1_a="x,y\n1,2\n",
        local1_b='"x,z"\n"a\nb"\n',
        local12="x,y\n1,2\n",
        local3_a="x\n1\n",
        local3_b="y\n2\n",
    )
    assert read.of("local1", "row 1") == [
        {"names": ["y"], "columns": [["2"]], "ignore_order": True},
        {"names": ["x,z"], "columns": [["a\nb"]], "ignore_order": False},
    ]
    assert [part["names"] for part in read.of("local12", "")] == [["x"]]
    assert [part["names"] for part in read.of("local3", "")] == [["x"], ["y"]]


@pytest.mark.parametrize(
    ("standard", "files", "said"),
    [
        ('{"instance_id": "b", "condition_cols": []}', {"a": "x\n1\n"}, "has no line for instance_id 'a'"),
        ('{"instance_id": "a", "condition_cols": []}', {"b": "x\n1\n"}, "has no a.csv"),
        ('{"instance_id": "a", "condition_cols": [4]}', {"a": "x\n1\n"}, "has 1 columns, but column 4 counts"),
        ('{"instance_id": "a", "condition_cols": [-1]}', {"a": "x\n1\n"}, "has 1 columns, but column -1 counts"),
        ('{"instance_id": "a", "condition_cols": ["x"]}', {"a": "x\n1\n"}, "does not fit its 1 results"),
        ('{"instance_id": "a", "condition_cols": 1}', {"a": "x\n1\n"}, "does not fit its 1 results"),
        ('{"instance_id": "a", "condition_cols": [[0], [0]]}', {"a": "x\n1\n"}, "does not fit its 1 results"),
        ('{"instance_id": "a", "ignore_order": "no"}', {"a": "x\n1\n"}, "does not fit its 1 results"),
        ('{"instance_id": "a"}', {"a": "x,y\n1\n"}, "a.csv: line 2: 1 cells under 2 column names"),
        ('{"instance_id": "a"}', {"a": ""}, "a.csv: is empty"),
        ('{"instance_id": "a"}', {"a": "x\n\xff\n"}, "a.csv: cannot be read as CSV"),
        ('{"instance_id": "a"}', {"a": 'x\n"1\n'}, "a.csv: cannot be read as CSV"),
        ('{"id": "a"}', {}, "standard.jsonl:1: field instance_id is missing"),
        ("[", {}, "standard.jsonl:1: not valid JSON"),
    ],
)
def test_mistakes_are_named(standard: str, files: dict[str, str], said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        write(tmp_path / "gold", standard, **files).of("a", "test.json: row 1")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "golds", [[], {}, "x", [{}], [{"columns": [["1"], []], "ignore_order": True}], [{"columns": []}]]
)
def test_malformed_results_are_the_data_s_fault(golds: Any) -> None:
    with pytest.raises(InfrastructureError, match="task t: field gold_results: expected a list"):
        of(Task("t", "s", {"gold_results": golds}))
    assert of(Task("t", "s", {})) == []


AGES = gold([(30,), (None,)], ignore_order=True)
NOTHING = [{"names": ["age"], "columns": [[]], "ignore_order": True}]


@pytest.mark.parametrize(
    ("sql", "golds", "outcome", "reward"),
    [
        ("SELECT age, name AS who, 1 FROM singer WHERE name != 'Bo' ORDER BY 1", AGES, "correct", 1.0),
        ("SELECT age FROM singer", AGES, "wrong", 0.0),
        ("SELECT nothing FROM singer", NOTHING, "sql_error", 0.0),
    ],
)
def test_an_episode_is_graded_by_results(
    sql: str, golds: list[dict[str, Any]], outcome: str, reward: float, tmp_path: Path
) -> None:
    tree.database(tmp_path / "spider2_sqlite/databases", "E_commerce")
    config = override(Config(), [("environment.text2sql.database_root", str(tmp_path))])
    shared = Text2SQL.open_shared(config)
    try:
        environment = Text2SQL(config, shared)
        fields = {"db_id": "E_commerce", "db_root": "spider2_sqlite/databases", "question": "Ages?"}
        environment.reset(Task("t", "s", {**fields, "gold_results": golds}))
        step = environment.step(f"<think>x</think><solution>{sql}</solution>", 1)
    finally:
        shared.close()
    assert (step.outcome, step.reward, step.done) == (outcome, reward, True)
