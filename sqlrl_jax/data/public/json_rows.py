"""Reads a JSON array of objects piece by piece: SynSQL-2.5M's is several GB, so no file is ever held whole.

The standard library's decoder parses one object at a time from a buffer that grows until the object is complete. Left
out: numbers or texts as elements of the array, which no set has.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from sqlrl_jax.data.tasks import DataError

CHUNK = 1 << 20
LONGEST = 64 << 20
"""Characters of one object: far above any real row, so that a file that is no JSON at all ends in an error soon."""
NEAR_END = 16
"""A mistake within this many characters of the buffer's end may be an object cut by it (such as \\uXXXX)."""


def json_rows(path: Path, read: Callable[[int], None] = lambda count: None) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row number from 1, object) for each element; `read` is told the bytes read so far.

    Raises DataError naming file and row: no such file, not UTF-8, not JSON, cut short, not an array of objects.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        file = path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    with file:
        text = _Text(file, path, read)
        if text.next_char() != "[":
            raise DataError(f"{path}: expected a JSON array of objects, which starts with '['")
        text.skip(1)
        if text.next_char() == "]":
            return
        number = 1
        while True:
            yield number, text.read_object(number)
            mark = text.next_char()
            if mark == "]":
                return
            if mark != ",":
                found = f"found {mark!r}" if mark else "the file ends: it is cut short"
                raise DataError(f"{path}: after row {number}: expected ',' or ']', {found}")
            text.skip(1)
            number += 1


class _Text:
    """A window onto the file's text: `_buffer[_at:]` is what was read and not used yet."""

    def __init__(self, file: BinaryIO, path: Path, read: Callable[[int], None]) -> None:
        self._file, self._path, self._read = file, path, read
        self._decode = codecs.getincrementaldecoder("utf-8-sig")("strict")
        self._buffer, self._at, self._bytes, self._row = "", 0, 0, 0
        self._json = json.JSONDecoder()

    def next_char(self) -> str:
        """The next character that is not white space, not taken; empty at the end of the file."""
        while True:
            rest = self._buffer[self._at : self._at + 64].lstrip(" \t\r\n")
            if rest:
                self._at += len(self._buffer[self._at : self._at + 64]) - len(rest)
                return rest[0]
            self._at = min(self._at + 64, len(self._buffer))
            if self._at == len(self._buffer) and not self._more(CHUNK):
                return ""

    def skip(self, count: int) -> None:
        self._at += count

    def read_object(self, number: int) -> dict[str, Any]:
        self._row = number
        where = f"{self._path}: row {number}"
        first = self.next_char()
        if first != "{":
            found = f"found {first!r}" if first else "the file ends: it is cut short"
            raise DataError(f"{where}: expected an object, which starts with '{{', {found}")
        size = CHUNK
        while True:
            try:
                row, self._at = self._json.raw_decode(self._buffer, self._at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or error.pos >= len(self._buffer) - NEAR_END
                if not cut or len(self._buffer) - self._at > LONGEST:
                    near = self._buffer[max(self._at, error.pos - 20) : error.pos + 20]
                    raise DataError(f"{where}: not valid JSON: {error.msg}, near {near!r}") from None
                if not self._more(size):
                    raise DataError(f"{where}: the file ends inside this row: it is cut short") from None
                size *= 2  # so that a long object is not parsed over and over
            except RecursionError:
                raise DataError(f"{where}: nested too deeply") from None
            except ValueError:  # Python's limit on the digits of a number
                raise DataError(f"{where}: holds a number with too many digits; write it as text") from None
            else:
                return row

    def _more(self, size: int) -> bool:
        """Reads on; False at the end of the file."""
        try:
            data = self._file.read(size)
        except OSError as error:
            raise DataError(f"{self._path}: cannot be read: {error.strerror or error}") from None
        try:
            text = self._decode.decode(data, final=not data)
        except UnicodeDecodeError as error:
            byte = self._bytes - (len(error.object) - len(data)) + error.start
            raise DataError(f"{self._path}: after row {self._row}: byte {byte} is not UTF-8 text") from None
        self._bytes += len(data)
        self._read(self._bytes)
        self._buffer, self._at = self._buffer[self._at :] + text, 0
        return bool(data)
