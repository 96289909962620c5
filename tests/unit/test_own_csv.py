"""CSV files to tables: values come back as they were, formats are found out, and every mistake is named with its line."""

from __future__ import annotations

import csv
import io
import math
import sqlite3
import tracemalloc
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from sqlrl_jax.data.own.csv_tables import NUMBER, Table, build_database, column_names
from sqlrl_jax.data.own.csv_text import detect_encoding, open_csv
from sqlrl_jax.data.tasks import DataError

Cells = list[tuple[Any, ...]]


def build(folder: Path, content: str | bytes, name: str = "t.csv", **options: Any) -> tuple[Table, Cells]:
    """A CSV file's table and its rows."""
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    target = folder / "built.sqlite"
    target.unlink(missing_ok=True)
    (table,) = build_database([path], target, **options)
    with closing(sqlite3.connect(target)) as connection:
        return table, connection.execute(f'SELECT * FROM "{table.name}" ORDER BY rowid').fetchall()


def refused(folder: Path, content: str | bytes, name: str = "t.csv", **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        build(folder, content, name, **options)
    assert str(folder / name) in str(caught.value)
    return str(caught.value).removeprefix(str(folder / name))


# --------------------------------------------------------------------------------------------------------------- types


@pytest.mark.parametrize(
    ("values", "kind", "read"),
    [
        (["1", "-2", "0"], "INTEGER", [1, -2, 0]),
        (["1", "", "3"], "INTEGER", [1, None, 3]),
        ([" 1", "2 "], "INTEGER", [1, 2]),
        (["9223372036854775807", "-9223372036854775808"], "INTEGER", [2**63 - 1, -(2**63)]),
        (["1.5", "2"], "REAL", [1.5, 2.0]),
        (["2", "-.5", "1e-05", "1.5E3"], "REAL", [2.0, -0.5, 1e-05, 1500.0]),
        (["", "3.25"], "REAL", [None, 3.25]),
        (["00501", "10001"], "TEXT", ["00501", "10001"]),
        (["+4930123456", "1"], "TEXT", ["+4930123456", "1"]),
        (["9223372036854775808"], "TEXT", ["9223372036854775808"]),
        (["9" * 5000], "TEXT", ["9" * 5000]),
        (["9007199254740993", "0.5"], "TEXT", ["9007199254740993", "0.5"]),
        (["0.5", "9007199254740993"], "TEXT", ["0.5", "9007199254740993"]),
        (["1E5", "2E7"], "TEXT", ["1E5", "2E7"]),
        (["1e+999"], "TEXT", ["1e+999"]),
        (["nan", "inf"], "TEXT", ["nan", "inf"]),
        (["2020-01-31", "2021-12-01"], "TEXT", ["2020-01-31", "2021-12-01"]),
        (["1_000", "2"], "TEXT", ["1_000", "2"]),
        (["١٢"], "TEXT", ["١٢"]),
        (["true", "false"], "TEXT", ["true", "false"]),
        (["1 000"], "TEXT", ["1 000"]),
        (["1.", "2"], "TEXT", ["1.", "2"]),
        (["x", " padded "], "TEXT", ["x", " padded "]),
        (["", ""], "TEXT", [None, None]),
        (["NA", "1"], "TEXT", ["NA", "1"]),
    ],
)
def test_types_lose_nothing(tmp_path: Path, values: list[str], kind: str, read: list[Any]) -> None:
    text = io.StringIO()
    csv.writer(text).writerows([["k", "v"], *([str(i), v] for i, v in enumerate(values))])
    table, rows = build(tmp_path, text.getvalue())
    assert table.columns[1] == ("v", kind)
    assert [row[1] for row in rows] == read
    assert [type(row[1]) for row in rows] == [type(value) for value in read]


def test_surprises_are_told(tmp_path: Path) -> None:
    table, rows = build(tmp_path, "a;b\n1;1,50\n2;2,00\n3;x\nNA;y\n", nulls=())
    assert table.notes == (
        "delimiter: semicolon",
        "column a: kept as text because of 'NA' in line 5; the 3 values before it are numbers; "
        "if it means NULL, give --null NA",
        "column b: kept as text; '1,50' in line 2 looks like a decimal comma",
    )
    table, rows = build(tmp_path, "a,b\n1,x\nNA,NA\n", nulls=["NA"])
    assert rows == [(1, "x"), (None, None)]
    assert build(tmp_path, "1,2\n3,4\n")[0].notes == (
        "its first line has only numbers (1, 2); it should hold the column names",
    )


def expected(cells: Sequence[str | int | float | None]) -> list[str | int | float | None]:
    """What a column comes back as: the documented rule, written a second time over whole columns."""
    texts = ["" if cell is None else str(cell) for cell in cells]
    there = [text for text in texts if text]
    numbers = [NUMBER.fullmatch(text) for text in there]
    if all(numbers):
        whole = [match is not None and match["whole"] is not None for match in numbers]
        if all(whole) and all(-(2**63) <= int(text) < 2**63 for text in there):
            return [int(text) if text else None for text in texts]
        exact = all(abs(int(text)) <= 2**53 for text, is_whole in zip(there, whole, strict=True) if is_whole)
        if not all(whole) and exact and all(math.isfinite(float(text)) for text in there):
            return [float(text) if text else None for text in texts]
    return [text or None for text in texts]


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
NUMERIC = st.integers(-(2**65), 2**65) | st.floats(allow_nan=True) | st.integers(-99, 99)
LOOKALIKE = st.from_regex(r"[ ]?[+-]?[0-9]{0,3}[.,]?[0-9]{0,3}([eE][+-]?[0-9]{1,3})?", fullmatch=True)


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[list[Any]], dict[str, Any], str]:
    """Columns of one kind of value each, a dialect, an encoding."""
    height = draw(st.integers(0, 6))
    kinds = draw(
        st.lists(st.sampled_from([TEXT, NUMERIC, LOOKALIKE, st.integers(-99, 99), st.floats(-9, 9)]), min_size=2)
    )
    columns = [draw(st.lists(st.none() | kind, min_size=height, max_size=height)) for kind in kinds[:6]]
    dialect = {
        "delimiter": draw(st.sampled_from(",;\t|")),
        "lineterminator": draw(st.sampled_from(["\n", "\r\n", "\r"])),
        "quoting": draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])),
    }
    if any(end in cell for column in columns for cell in column if isinstance(cell, str) for end in "\r\n"):
        dialect["quoting"] = csv.QUOTE_ALL  # Python's writer leaves ends of lines bare that are not its own
    return columns, dialect, draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]))


@given(tables())
@example(([["a\r\nb", ' "q" '], [1, None]], {"delimiter": ",", "lineterminator": "\n", "quoting": 0}, "utf-8"))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_table_comes_back(tmp_path: Path, table: tuple[list[list[Any]], dict[str, Any], str]) -> None:
    columns, dialect, encoding = table
    text = io.StringIO(newline="")
    writer = csv.writer(text, **dialect)
    writer.writerow([f"c{i}" for i in range(len(columns))])
    writer.writerows(zip(*columns, strict=True))
    path = tmp_path / "t.csv"
    path.write_bytes(text.getvalue().encode(encoding))
    file = open_csv(path)
    assert file.delimiter == dialect["delimiter"]
    if file.padded:  # every value begins with a blank: taken for the delimiter's
        return
    _, rows = build(tmp_path, path.read_bytes())
    wanted = list(zip(*map(expected, columns), strict=True))
    assert rows == wanted
    assert [tuple(map(type, row)) for row in rows] == [tuple(map(type, row)) for row in wanted]


# -------------------------------------------------------------------------------------------------------------- format


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_delimiters_are_found(tmp_path: Path, delimiter: str) -> None:
    rows = [["name", "tags, more", "n"], ["Ann; Bob", "a|b", "1"], ["x\ty", "c,d", "2"]]
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter).writerows(rows)
    table, found = build(tmp_path, text.getvalue())
    assert [name for name, _ in table.columns] == rows[0]
    assert found == [("Ann; Bob", "a|b", 1), ("x\ty", "c,d", 2)]


def test_one_column_and_tsv_and_padding(tmp_path: Path) -> None:
    assert build(tmp_path, "name\nAnn\n\nBob\n")[1] == [("Ann",), ("Bob",)]
    assert build(tmp_path, "a,b\tc\n1,2\t3\n", "t.tsv")[1] == [("1,2", 3)]
    table, rows = build(tmp_path, 'id, name, note\n1, Ann, "a, b"\n2, , x\n')
    assert [name for name, _ in table.columns] == ["id", "name", "note"]
    assert rows == [(1, "Ann", "a, b"), (2, None, "x")]
    assert build(tmp_path, "id,name\n1, Ann\n2,Bob\n")[1] == [(1, " Ann"), (2, "Bob")]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_encodings_are_found(tmp_path: Path, encoding: str) -> None:
    _, rows = build(tmp_path, "näme,ort\nJosé,Łódź\n名前,x\n".encode(encoding))
    assert rows == [("José", "Łódź"), ("名前", "x")]


def test_other_encodings_have_to_be_named(tmp_path: Path) -> None:
    content = "id,name\n1,Ann\n2,José\n".encode("cp1252")
    text = refused(tmp_path, content)
    assert text.startswith(":3: byte 19 (0xE9) is not UTF-8")
    assert "cp1252" in text
    assert build(tmp_path, content, encoding="cp1252")[1][1] == (2, "José")
    assert "unknown encoding" in refused(tmp_path, content, encoding="klingon")
    late = b"id,name\n" + b"1,Ann\n" * 50_000 + b"2,Jos\xe9\n"
    assert refused(tmp_path, late).startswith(f":50002: byte {len(late) - 2} (0xE9)")
    assert ":2: byte 14 (0x32) is not UTF-16" in refused(tmp_path, "a,b\n1,2\n".encode("utf-16")[:-3])
    (tmp_path / "empty").write_bytes(b"")
    assert detect_encoding(tmp_path / "empty") == "utf-8-sig"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", ": is empty"),
        ("\n\n", ": is empty"),
        ("a,b\n1,2\n3\n", ":3: row 2 has 1 fields, the header has 2"),
        ('a,b\n"x\ny",2\n1,2,3\n', ":4: row 2 has 3 fields"),
        ('a,b\n1,"x\n2,y\n', ":2: a field begins here with a double quote that is not closed"),
        ('a,b\n1,"x"y\n', ":2: a quoted field is followed by other text"),
        ("sep=;\na;b\n1;2\n", ":1: 'sep=' is a hint for Excel alone"),
        ("a,b\n1,\0\n", ":2: holds a NUL"),
        (",".join(f"c{i}" for i in range(2500)) + "\n", ": SQLite can't hold this table"),
    ],
)
def test_bad_files_are_named_with_the_line(tmp_path: Path, content: str, said: str) -> None:
    assert refused(tmp_path, content).startswith(said)


def test_an_unclosed_quote_in_a_large_file_ends_soon(tmp_path: Path) -> None:
    text = refused(tmp_path, 'a,b\n1,"x\n' + "2,yyyyyyyyyyyyyyyyyyyyy\n" * 800_000)
    assert text.startswith(":2: a field begins here")


def test_column_names_become_usable(tmp_path: Path) -> None:
    names, notes = column_names(["id", "ID", "", " a  b\n", "a b", "id_2", 'q"x'])
    assert names == ["id", "ID_3", "column_3", "a b", "a b_2", "id_2", 'q"x']
    assert len(notes) == 3
    table, _ = build(tmp_path, "a,A,\n1,2,3\n")
    assert table.columns == (("a", "INTEGER"), ("A_2", "INTEGER"), ("column_3", "INTEGER"))
    assert build(tmp_path, "a,b\n")[0].notes == ("has column names but no rows",)


@given(st.lists(st.text(max_size=4), min_size=1, max_size=8))
def test_column_names_always_differ(header: list[str]) -> None:
    names, _ = column_names(header)
    assert len({name.lower() for name in names}) == len(header)
    assert all(name.strip() for name in names)


def test_table_names(tmp_path: Path) -> None:
    for name in ("Order Details.csv", "a.csv", "a.tsv", "sqlite_x.csv"):
        (tmp_path / name).write_text("x\ty\n1\t2\n")
    assert build(tmp_path, "x,y\n1,2\n", "Order Details.csv")[0].name == "Order Details"
    with pytest.raises(DataError, match=r"a\.tsv: a\.csv would give a table of the same name"):
        build_database([tmp_path / "a.csv", tmp_path / "a.tsv"], tmp_path / "x.sqlite")
    with pytest.raises(DataError, match="sqlite_"):
        build_database([tmp_path / "sqlite_x.csv"], tmp_path / "y.sqlite")


def test_large_files_are_streamed(tmp_path: Path) -> None:
    with (tmp_path / "big.csv").open("w") as file:
        file.write("id,name,price\n")
        file.writelines(f"{i},customer number {i},{i / 7}\n" for i in range(60_000))
    steps: list[tuple[str, int, int]] = []
    tracemalloc.start()
    (table,) = build_database(
        [tmp_path / "big.csv"], tmp_path / "big.sqlite", progress=lambda *step: steps.append(step)
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert table.rows == 60_000
    assert peak < 6e6  # a batch; all the rows as objects take four times as much
    assert {label for label, _, _ in steps} == {"reading big.csv", "writing big.csv"}
    assert all(0 < done <= total for _, done, total in steps)
