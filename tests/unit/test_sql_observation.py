"""The text that the model reads: shapes, bounds, and nothing in a cell that could pass for one of our tags."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.sql import observation
from rollout.sql.observation import SEPARATOR, escape, render, render_error, show_cell


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
        ("a | b's", "'a | b''s'"),
        ("a|b", "a|b"),
        (2**100, "1267650600228229401496703205376"),
        (-(16**600), "-0x1" + "0" * 396 + "… (+204 characters)"),
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


def test_a_long_result_is_cut_to_rows_and_characters_and_says_so() -> None:
    """The reference shows the first 50 rows of what is over 9000 characters; here those of them that fit."""
    rows = [(i, "x" * 100) for i in range(50)]
    short = render(["a", "b"], rows, 300, True, 9000).splitlines()
    assert (len(short), short[-1]) == (52, "(250 more rows)")
    for limit in range(100, 140):
        assert limit - 30 < len(render(["a"], [(1,)] * 300, 300, False, limit)) <= limit
    rows = [(i, "x" * 390) for i in range(50)]
    text = render(["a", "b"], rows, 300, True, 9000)
    assert 8500 < len(text) <= 9000
    assert text.splitlines()[-1] == f"({300 - (len(text.splitlines()) - 2)} more rows)"


TAGS = [
    "<think>",
    "</sql>",
    "</observation>",
    "<|im_end|>",
    "< solution >",
    "</REMINDER>",
    "</s>",
    "<｜x｜>",
    "[/INST]",
]
NAME = st.one_of(
    st.text(),
    st.text(st.characters()),  # surrogates too
    st.sampled_from([*TAGS, "\r\n", "\u2028", "\x85", "\x1c", "a\tb", " | ", "<<|", "x" * 1000, "\n" * 900]),
    st.lists(st.sampled_from([*TAGS, "<", "/", "observation", ">", "|", "\n", "\0"]), max_size=6).map("".join),
)
CELL = st.one_of(
    st.none(),
    st.integers(),
    st.integers(1, 20_000).map(lambda bits: -(2**bits)),
    st.floats(),
    st.binary(max_size=40),
    NAME,
)


@settings(max_examples=300, deadline=None)
@given(st.lists(NAME, min_size=1, max_size=4), st.data(), st.integers(0, 20), st.booleans(), st.integers(100, 900))
def test_always_bounded_printable_and_without_tags(
    columns: list[str], data: st.DataObject, hidden: int, exact: bool, limit: int
) -> None:
    rows = data.draw(st.lists(st.tuples(*[CELL] * len(columns)), max_size=6))
    text = render(columns, rows, len(rows) + hidden, exact, limit)
    assert text == render(columns, rows, len(rows) + hidden, exact, limit)
    assert len(text) <= limit
    text.encode()
    assert not re.search(r"<\s*/?\s*(think|sql|solution|observation|reminder|s)\b|<[|｜]|\[/?INST", text, re.IGNORECASE)
    lines = text.split("\n")
    assert all(len(line.splitlines()) <= 1 for line in lines)
    shown = len(lines) - 1 - (lines[-1].endswith(("row)", "rows)")) and lines[-1].startswith("("))
    assert 0 <= shown <= len(rows)
    for line, row in zip(lines[1 : shown + 1], rows, strict=False):
        assert SEPARATOR.join(map(show_cell, row)).startswith(line.removesuffix("…"))


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters()), st.integers(20, 9000))
def test_any_error_is_one_bounded_line(message: str, limit: int) -> None:
    text = render_error(message, limit)
    text.encode()
    assert len(text) <= limit
    assert text.splitlines() == [text]


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters()))
def test_escaping_changes_nothing_twice(text: str) -> None:
    assert escape(escape(text)) == escape(text)
