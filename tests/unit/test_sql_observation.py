"""The text that the model reads: shapes, bounds, and nothing in a cell that could pass for one of our tags."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.sql import observation
from rollout.sql.observation import render, render_error, show_cell


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "NULL"),
        ("NULL", "'NULL'"),
        ("", "''"),
        (" a'b ", "' a''b '"),
        ("a  b", "a  b"),
        (7, "7"),
        (7.0, "7.0"),
        (0.1 + 0.2, "0.3"),
        (1e100, "1e+100"),
        (float("inf"), "inf"),
        (b"\x01\xff", "x'01ff'"),
        (b"\0" * 40, "x'" + "00" * 16 + "…' (40 bytes)"),
        ("one\ntwo\r\x00\u2028.", "one\\ntwo\\r\\x00\\u2028."),
        ("tab\there", "tab\there"),
        ("\ud800", "\\ud800"),
        ("x" * 1000, "x" * 400 + "… (+600 characters)"),
        ("a < b </observation> <  / SQL>", "a < b &lt;/observation> &lt;  / SQL>"),
        ("<|im_start|>system", "&lt;|im_start|>system"),
        ("<strong>", "<strong>"),
        ("[INST]", "&#91;INST]"),
    ],
)
def test_cells(value: observation.Cell, shown: str) -> None:
    assert show_cell(value) == shown


def test_a_table() -> None:
    assert render(["a", "b"], [(1, "x"), (None, 2.5)], 2, True, 1000) == "a | b\n1 | x\nNULL | 2.5"
    assert render(["a"], [], 0, True, 1000) == "a\n(no rows)"
    assert render(["a"], [(1,)], 2, True, 1000) == "a\n1\n(1 more row)"
    assert render(["a"], [(1,)], 51, True, 1000) == "a\n1\n(50 more rows)"
    assert render(["a"], [(1,)], 10_000, False, 1000) == "a\n1\n(more than 9999 more rows)"


def test_a_row_that_does_not_fit_is_counted_as_hidden() -> None:
    text = render(["a"], [(i, "x" * 30) for i in range(20)], 20, True, 150)
    shown = text.splitlines()
    assert shown[-1] == f"({20 - (len(shown) - 2)} more rows)"
    assert 100 < len(text) <= 150
    assert render(["a"], [("x" * 300,)], 1, True, 100).startswith("a\nxxx")


def test_errors_are_one_bounded_line() -> None:
    assert render_error("no such column: x\n", 100) == "SQL Error: no such column: x"
    assert (
        render_error('near "</observation>\n": syntax error', 100)
        == 'SQL Error: near "&lt;/observation>\\n": syntax error'
    )
    assert len(render_error("x" * 10_000, 9000)) < 600
    assert len(render_error("x" * 10_000, 100)) == 100


CELL = st.one_of(st.none(), st.integers(), st.floats(), st.text(), st.binary())


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(), min_size=1, max_size=4), st.data(), st.integers(0, 20), st.booleans(), st.integers(100, 400))
def test_always_bounded_printable_and_without_tags(
    columns: list[str], data: st.DataObject, hidden: int, exact: bool, limit: int
) -> None:
    tags = st.sampled_from(["<think>", "</sql>", "</observation>", "<|im_end|>", "< solution >", "</REMINDER>"])
    cells = st.one_of(CELL, tags, st.tuples(st.text(), tags, st.text()).map("".join))
    rows = data.draw(st.lists(st.tuples(*[cells] * len(columns)), max_size=6))
    text = render(columns, rows, len(rows) + hidden, exact, limit)
    assert len(text) <= limit
    text.encode()
    assert not re.search(r"<\s*/?\s*(think|sql|solution|observation|reminder)\b|<\|", text, re.IGNORECASE)
    assert len(text.splitlines()) <= len(rows) + 2
