"""Stops SQLite's clock in a worker process, so that 'now' and CURRENT_TIMESTAMP give the same rows every time.

SQLite asks its layer over the operating system (the VFS) for the time. `stop` registers a copy of that layer that always
answers NOW; the date functions stay SQLite's own, at their speed. Where SQLite's C interface can't be reached (a Python
that has it compiled in and hidden), `replace_functions` puts Python functions in their place, some twenty times slower.

Left out: random numbers, which rollout.sql.guard replaces: rarely used, and simple.
"""

from __future__ import annotations

import _sqlite3
import contextlib
import ctypes
import functools
import sqlite3
from collections.abc import Callable
from typing import Any

NOW = "2025-01-01 00:00:00"  # what 'now' and CURRENT_TIMESTAMP are
_NOW_MILLISECONDS = (
    1_735_689_600_000 + 210_866_760_000_000
)  # since the Unix epoch, and from noon of 24 November 4714 BC

FUNCTIONS = ("date", "time", "datetime", "julianday", "unixepoch", "strftime", "timediff")
KEYWORDS = {"current_timestamp": NOW, "current_date": NOW[:10], "current_time": NOW[11:]}
_NOWS = {"now": (NOW,), "subsec": (NOW, "subsec"), "subsecond": (NOW, "subsec")}  # the last two since SQLite 3.42
_CACHED_CHARS = 200  # of all arguments of a call; longer ones would fill the memory

_TIME_FUNCTION = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_int64))
_NAME = ctypes.create_string_buffer(b"stopped-clock")


class _VFS(ctypes.Structure):
    """sqlite3_vfs, version 2; the later versions only add members at the end."""

    _fields_ = (
        ("version", ctypes.c_int),
        ("file_size", ctypes.c_int),
        ("path_size", ctypes.c_int),
        ("next", ctypes.c_void_p),
        ("name", ctypes.c_void_p),
        ("data", ctypes.c_void_p),
        ("functions", ctypes.c_void_p * 12),
        ("current_time", ctypes.c_void_p),
    )


@_TIME_FUNCTION
def _tell(_vfs: object, time: Any) -> int:
    time[0] = _NOW_MILLISECONDS
    return 0


_copy = _VFS()  # SQLite keeps the address


def stop() -> bool:
    """Stops the clock of all connections that this process opens from now on. Whether it could."""
    if _copy.name:
        return True
    library = _library()
    if library is None:
        return False
    find, register = library.sqlite3_vfs_find, library.sqlite3_vfs_register
    find.restype = ctypes.POINTER(_VFS)
    default = find(None)
    if not default or default.contents.version < 2:
        return False
    ctypes.memmove(ctypes.byref(_copy), default, ctypes.sizeof(_VFS))
    _copy.version = 2
    _copy.next = None
    _copy.name = ctypes.addressof(_NAME)
    _copy.current_time = ctypes.cast(_tell, ctypes.c_void_p)
    return bool(register(ctypes.byref(_copy), 1) == 0)


def _library() -> ctypes.CDLL | None:
    """The SQLite that Python's module uses, or another of the same version, which does no harm; None if it is hidden."""
    for name in (None, getattr(_sqlite3, "__file__", None)):  # in the order in which the linker looks
        with contextlib.suppress(OSError, AttributeError):
            library = ctypes.CDLL(name)
            library.sqlite3_libversion.restype = ctypes.c_char_p
            if library.sqlite3_libversion() == sqlite3.sqlite_version.encode():
                return library
    return None


def stands_still(connection: sqlite3.Connection) -> bool:
    """Whether `stop` has had its effect on a connection."""
    return connection.execute("SELECT datetime('now') || current_timestamp").fetchone() == (NOW + NOW,)


def replace_functions(connection: sqlite3.Connection, ask: sqlite3.Connection) -> None:
    """Replaces a connection's date functions by ones that put NOW for 'now' and ask another connection."""
    known = {name for (name,) in ask.execute("SELECT DISTINCT name FROM pragma_function_list")}
    for name in FUNCTIONS:
        if name in known:
            connection.create_function(name, -1, _function(ask, name), deterministic=True)
    for name, value in KEYWORDS.items():
        connection.create_function(name, 0, functools.partial(str, value), deterministic=True)


def _function(connection: sqlite3.Connection, name: str) -> Callable[..., Any]:
    def compute(*arguments: object) -> Any:
        marks = ",".join("?" * len(arguments))
        return connection.execute(f"SELECT {name}({marks})", arguments).fetchone()[0]

    cached = functools.lru_cache(maxsize=4096, typed=True)(compute)
    formats = 1 if name == "strftime" else 0  # arguments before the time

    def at_now(*arguments: object) -> Any:
        values = with_now(arguments[formats:], pair=name == "timediff")
        if len(arguments) < formats:
            values = ()
        size = sum(len(value) for value in arguments if isinstance(value, str | bytes))
        return (cached if size <= _CACHED_CHARS else compute)(*arguments[:formats], *values)

    return at_now


def with_now(values: tuple[object, ...], pair: bool = False) -> tuple[object, ...]:
    """A date function's arguments from the time on, with NOW in the place of 'now' or of nothing. `pair`: two times."""
    if pair:
        return tuple(_time(value)[0] for value in values)
    if not values:
        return (NOW,)
    return (*_time(values[0]), *values[1:])


def _time(value: object) -> tuple[object, ...]:
    """As SQLite sees it: text up to the first NUL, in any case; a blob is read as text."""
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) and len(value) < 100 else value
    if isinstance(text, str) and len(text) < 100:
        return _NOWS.get(text.split("\0")[0].lower(), (value,))
    return (value,)
