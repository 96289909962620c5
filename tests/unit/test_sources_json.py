"""Rows of a JSON array read piece by piece are those that the standard library reads whole, wherever the pieces break."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sqlrl_jax.data.public import json_rows as sources_json
from sqlrl_jax.data.public.json_rows import json_rows
from sqlrl_jax.data.tasks import DataError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
ROWS = st.lists(st.dictionaries(st.text(), VALUES, max_size=4), max_size=6)


def in_pieces(path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> list[dict[str, Any]]:
    monkeypatch.setattr(sources_json, "CHUNK", size)
    rows = list(json_rows(path))
    assert [number for number, _ in rows] == list(range(1, len(rows) + 1))
    return [row for _, row in rows]


@settings(max_examples=80, deadline=None)
@given(
    rows=ROWS, size=st.integers(1, 40), indent=st.sampled_from([None, 2, 70]), ascii=st.booleans(), bom=st.booleans()
)
def test_any_rows_in_pieces_of_any_size(rows, size, indent, ascii, bom, tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.json"
    text = json.dumps(rows, indent=indent, ensure_ascii=ascii)
    path.write_bytes((b"\xef\xbb\xbf" if bom else b"") + text.encode())
    with pytest.MonkeyPatch.context() as patch:
        assert in_pieces(path, patch, size) == rows


@settings(max_examples=80, deadline=None)
@given(rows=ROWS.filter(bool), size=st.integers(1, 40), cut=st.floats(0, 1, exclude_max=True))
def test_a_file_cut_anywhere_is_refused(rows, size, cut, tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.json"
    whole = json.dumps(rows).encode()
    path.write_bytes(whole[: int(cut * len(whole))])
    with pytest.MonkeyPatch.context() as patch, pytest.raises(DataError) as caught:
        in_pieces(path, patch, size)
    assert str(caught.value).startswith(str(path))


def test_holds_one_row_at_a_time(tmp_path):
    """The bytes read run ahead of the rows given by no more than a piece and a row, and what was given is let go."""
    row = {"db_id": "d", "cot": "x" * 3000}
    path = tmp_path / "big.json"
    path.write_text(json.dumps([row] * 3000))
    seen: list[int] = []
    size = path.stat().st_size
    tracemalloc.start()
    try:
        for number, _ in json_rows(path, seen.append):
            assert seen[-1] - number * size / 3000 < sources_json.CHUNK + 10_000
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert seen[-1] == size
    assert len(seen) <= size / sources_json.CHUNK + 2
    assert peak < size / 2


@pytest.mark.parametrize("size", [1, 7, 1 << 20])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[" + '{"a": 1} ' * 2 + "]", "after row 1: expected ',' or ']', found '{'"),
        ('[{"a": 1}', "after row 1: expected ',' or ']', the file ends"),
        ('[{"a": 1},', "row 2: expected an object, which starts with '{', the file ends"),
        ('[{"a": 1}, "b"]', "row 2: expected an object, which starts with '{', found '\"'"),
        ('[{"a": 1}, {"b": "' + "x" * 100, "row 2: the file ends inside this row"),
        ('[{"a": 1}, {"b": tru, "c": "' + "x" * 100 + '"}]', "row 2: not valid JSON"),
        ('[{"a": 1}, {"b": "\\q", "c": "' + "x" * 100 + '"}]', "row 2: not valid JSON"),
        ("[" + '{"a": ' * 100_000, "row 1: "),
        ("", "expected a JSON array of objects"),
        ('{"a": 1}\n{"a": 2}\n', "expected a JSON array of objects"),
    ],
)
def test_mistakes_are_named(content, said, size, tmp_path, monkeypatch):
    path = tmp_path / "rows.json"
    path.write_text(content)
    with pytest.raises(DataError) as caught:
        in_pieces(path, monkeypatch, size)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("pad", range(9))
def test_bytes_that_are_no_text_are_named(pad, tmp_path, monkeypatch):
    path = tmp_path / "rows.json"
    content = '[{"a": "é"}, {"a": "'.encode() + b"x" * pad
    path.write_bytes(content + b'\xe9"}]')
    for size in (1, 5, 1 << 20):
        with pytest.raises(DataError, match=rf"after row \d: byte {len(content)} is not UTF-8 text"):
            in_pieces(path, monkeypatch, size)


def test_a_missing_file(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        list(json_rows(tmp_path / "none.json"))
