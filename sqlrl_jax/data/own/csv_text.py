"""CSV files as they come: encoding and delimiter found out, records streamed, mistakes named by file and line.

UTF-8 (with or without a byte order mark) and UTF-16 are recognised; another encoding has to be named, because guessing one
changes letters silently. Nothing is mended: a record with a field too many or a quote that never closes is an error, not a
shifted row.
"""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sqlrl_jax.data.tasks import DataError

SUFFIXES = (".csv", ".tsv")
DELIMITERS = (",", ";", "\t", "|")
NAMES = {",": "comma", ";": "semicolon", "\t": "tab", "|": "vertical bar"}
SAMPLE_BYTES = 1 << 18
SAMPLE_RECORDS = 200
FIELD_LIMIT = 1 << 24
"""Characters of one field; what is longer comes from a quote that was not closed."""

Watch = Callable[[int], None]


@dataclass(frozen=True)
class CsvFile:
    """A file with how it is written. `padded`: a blank follows each delimiter and belongs to it."""

    path: Path
    encoding: str
    delimiter: str
    padded: bool
    header: tuple[str, ...]

    def records(self, watch: Watch = lambda position: None) -> Iterator[tuple[int, list[str]]]:
        """(line, fields) of each record after the header, as many fields as the header has; blank lines are skipped.

        `watch` is told the position in bytes now and then.
        """
        reader = _Reader(self.path, self.encoding, self.delimiter, self.padded, watch)
        records = reader.records()
        next(records)
        width = len(self.header)
        for number, (line, fields) in enumerate(records, 1):
            if len(fields) != width:
                raise DataError(
                    f"{self.path}:{line}: row {number} has {len(fields)} fields, the header has {width} "
                    f"(delimiter: {NAMES[self.delimiter]}); a field that holds the delimiter must be in double quotes"
                )
            yield line, fields


def open_csv(path: Path, encoding: str | None = None) -> CsvFile:
    """Finds out how a file is written. Raises DataError for an empty, unreadable or unrecognised one."""
    encoding = _known(encoding, path) if encoding else detect_encoding(path)
    # Any mistake in what is sampled is told with its place by the reading below.
    sample = _sample(path, encoding)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else _delimiter(sample)
    padded = _padded(sample, delimiter)
    first = next(_Reader(path, encoding, delimiter, padded).records(), None)
    if first is None:
        raise DataError(f"{path}: is empty; expected a line of column names")
    if first[1][0].startswith("sep="):
        raise DataError(f"{path}:1: {first[1][0]!r} is a hint for Excel alone; delete this line")
    return CsvFile(path, encoding, delimiter, padded, tuple(first[1]))


def detect_encoding(path: Path) -> str:
    """The name of a codec, by byte order mark or by where the zero bytes are; UTF-8 if nothing speaks against it."""
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror})") from None
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    even, odd = head[0::2].count(0), head[1::2].count(0)
    if odd > len(head) // 8 and not even:
        return "utf-16-le"
    if even > len(head) // 8 and not odd:
        return "utf-16-be"
    return "utf-8-sig"


class _Reader:
    """Records of a file, each with the line it begins in."""

    def __init__(
        self, path: Path, encoding: str, delimiter: str, padded: bool, watch: Watch = lambda position: None
    ) -> None:
        self._path = path
        self._encoding = encoding
        self._delimiter = delimiter
        self._padded = padded
        self._watch = watch

    def records(self) -> Iterator[tuple[int, list[str]]]:
        reader = csv.reader(
            self._lines(), delimiter=self._delimiter, skipinitialspace=self._padded, strict=True, doublequote=True
        )
        begin = 1
        while True:
            try:
                with field_limit():
                    fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise DataError(f"{self._path}:{begin}: {_said(error)}") from None
            if fields:
                yield begin, fields
            begin = reader.line_num + 1

    def _lines(self) -> Iterator[str]:
        number = 0
        try:
            with self._path.open("rb") as raw, io.TextIOWrapper(raw, self._encoding, newline="") as file:
                for number, line in enumerate(file, 1):
                    if "\0" in line:
                        raise DataError(f"{self._path}:{number}: holds a NUL character; is this a text file?")
                    if number % 4096 == 0:
                        self._watch(raw.tell())
                    yield line
        except UnicodeError:
            raise DataError(_bad_byte(self._path, self._encoding)) from None
        except OSError as error:
            raise DataError(f"{self._path}: can't be read ({error.strerror})") from None


class field_limit:
    """The csv module's limit is one for the whole process: raised while a record is read, and put back."""

    def __enter__(self) -> None:
        self._before = csv.field_size_limit(FIELD_LIMIT)

    def __exit__(self, *error: object) -> None:
        csv.field_size_limit(self._before)


def _said(error: csv.Error) -> str:
    text = str(error)
    if "field limit" in text or "unexpected end of data" in text:
        return "a field begins here with a double quote that is not closed"
    if "expected after" in text:
        return 'a quoted field is followed by other text; a quote inside a quoted field is written twice ("")'
    return text


def _known(encoding: str, path: Path) -> str:
    try:
        return codecs.lookup(encoding).name
    except LookupError:
        raise DataError(
            f"{path}: unknown encoding {encoding!r}; expected a name such as utf-8, cp1252 or latin-1"
        ) from None


def _bad_byte(path: Path, encoding: str) -> str:
    """Says where the first byte is that does not fit the encoding."""
    decoder = codecs.getincrementaldecoder(encoding)()
    line, position = 1, 0
    with path.open("rb") as file:
        while True:
            chunk = file.read(1 << 16)
            try:
                line += decoder.decode(chunk, final=not chunk).count("\n")
            except UnicodeDecodeError as error:
                data = bytes(error.object)
                line += data[: error.start].decode(encoding, "replace").count("\n")
                byte = position + len(chunk) - len(data) + error.start
                shown = f"0x{data[error.start]:02X}" if error.start < len(data) else "nothing"
                return (
                    f"{path}:{line}: byte {byte} ({shown}) is not {encoding.upper().removesuffix('-SIG')}; name the "
                    "file's encoding (--encoding, often cp1252) or save it as UTF-8"
                )
            except UnicodeError as error:
                return f"{path}: is not {encoding.upper()} ({error})"
            position += len(chunk)
            if not chunk:
                return f"{path}: is not {encoding.upper()}"


def _sample(path: Path, encoding: str) -> list[str]:
    """The first lines; the last one is left out where the file goes on."""
    with path.open("rb") as file:
        data = file.read(SAMPLE_BYTES)
        whole = not file.read(1)
    text = codecs.getincrementaldecoder(encoding)("replace").decode(data)
    lines = list(io.StringIO(text, newline=""))
    return lines if whole or len(lines) == 1 else lines[:-1]


def _parsed(lines: list[str], delimiter: str) -> list[list[str]]:
    records = []
    with field_limit():
        for record in csv.reader(lines, delimiter=delimiter):
            if record:
                records.append(record)
            if len(records) == SAMPLE_RECORDS:
                break
    return records


def _delimiter(lines: list[str]) -> str:
    """The one that gives most records the header's number of fields, then the one that gives most fields."""
    best, score = ",", (0.0, 0)
    for delimiter in DELIMITERS:
        records = _parsed(lines, delimiter)
        width = len(records[0]) if records else 0
        if width > 1:
            same = sum(len(record) == width for record in records) / len(records)
            if (round(same, 1), width) > score:
                best, score = delimiter, (round(same, 1), width)
    return best


def _padded(lines: list[str], delimiter: str) -> bool:
    """Whether every delimiter is followed by a blank, as in `id, name, age`."""
    if delimiter == "\t":
        return False
    fields = [field for record in _parsed(lines, delimiter) for field in record[1:]]
    return bool(fields) and all(field.startswith(" ") for field in fields)
