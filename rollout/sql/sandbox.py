"""Closes a SQL worker off from everything but the databases: the kernel's own walls behind the guard's rules.

The guard refuses what SQL may not do; this is for what gets past it, such as a fault in SQLite's C code that a damaged
database sets off. After `close` the process reads files below one folder and nothing else: it opens no other file, makes,
changes and runs none, binds and connects no TCP socket and signals nobody outside. It has to be called once everything
is imported. Where the kernel lacks a wall (macOS, an older Linux, a container that forbids it) the others still stand,
and `Walls` says which.

Left out: a seccomp filter. Its tables of system calls differ by architecture and C library, and what it would add here
(UDP sockets, chmod) needs code execution inside the worker first.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import resource
import signal
import sys
from typing import NamedTuple

OPEN_FILES = 128  # 32 databases, pipes, and a reserve

# linux/prctl.h
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
# The numbers are the same on every architecture that Python's wheels exist for.
_MACHINES = {"x86_64", "aarch64", "riscv64", "ppc64le", "s390x"}
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION, _PATH_BENEATH = 1, 1  # linux/landlock.h
_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
# How many rights over files each version of landlock knows, from the first on: execute … make_sym, refer, truncate, ioctl.
_FILE_RIGHTS = (13, 14, 15, 15, 16)
_TCP_RIGHTS, _TCP_VERSION = 0b11, 4  # bind, connect
_SCOPES, _SCOPES_VERSION = 0b11, 6  # abstract sockets, signals


class Walls(NamedTuple):
    """What is in force. `landlock` is the kernel's version of it, 0 where it isn't there."""

    no_new_privileges: bool
    no_new_processes: bool
    dies_with_parent: bool
    landlock: int

    @property
    def files(self) -> bool:
        return self.landlock >= 1

    @property
    def tcp(self) -> bool:
        return self.landlock >= _TCP_VERSION

    @property
    def signals(self) -> bool:
        return self.landlock >= _SCOPES_VERSION


class _Ruleset(ctypes.Structure):
    _fields_ = (("files", ctypes.c_uint64), ("tcp", ctypes.c_uint64), ("scopes", ctypes.c_uint64))


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _layout_ = "ms"
    _fields_ = (("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32))


def close(readable: str) -> Walls:
    """Puts every wall up that the system has, for this process and for good. `readable` is the folder left open.

    Nothing can be imported afterwards. Where the folder is missing, no file at all can be read.
    """
    _lower(resource.RLIMIT_NOFILE, OPEN_FILES)
    linux = sys.platform == "linux"
    dies = linux and _die_with_parent()
    # Without it landlock needs a privilege; with it nobody gains one by running another program.
    bare = linux and _libc().prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    landlock = _landlock(readable) if bare else 0
    return Walls(bare, _lower(resource.RLIMIT_NPROC, 0) and os.geteuid() != 0, dies, landlock)


def _die_with_parent() -> bool:
    """Ends this process when its parent has ended. One that waits for requests sees that anyway, by the closed pipe.

    The kernel sends the signal when the thread that started us ends, so the handler asks whether the process is gone.
    """
    parent = os.getppid()

    def look(_signal: int, _frame: object) -> None:
        if os.getppid() != parent:
            os._exit(0)

    signal.signal(signal.SIGUSR1, look)
    return bool(_libc().prctl(_PR_SET_PDEATHSIG, int(signal.SIGUSR1), 0, 0, 0) == 0)


def _landlock(readable: str) -> int:
    """Forbids everything that landlock can forbid except reading below a folder; its version, 0 if nothing is forbidden."""
    if os.uname().machine not in _MACHINES:
        return 0
    version = _call(_CREATE_RULESET, None, 0, _VERSION)
    if version < 1:
        return 0  # not in this kernel, or switched off
    files = (1 << _FILE_RIGHTS[min(version, len(_FILE_RIGHTS)) - 1]) - 1
    rules = _Ruleset(files, _TCP_RIGHTS if version >= _TCP_VERSION else 0, _SCOPES if version >= _SCOPES_VERSION else 0)
    size = 24 if version >= _SCOPES_VERSION else 16 if version >= _TCP_VERSION else 8  # an older kernel refuses more
    ruleset = _call(_CREATE_RULESET, ctypes.byref(rules), size, 0)
    if ruleset < 0:
        return 0
    try:
        _allow_reading(ruleset, readable)
        return version if _call(_RESTRICT_SELF, ruleset, 0) == 0 else 0
    finally:
        os.close(ruleset)


def _allow_reading(ruleset: int, path: str) -> None:
    try:
        folder = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return
    allowed = _PathBeneath(_READ_FILE | _READ_DIR, folder)
    _call(_ADD_RULE, ruleset, _PATH_BENEATH, ctypes.byref(allowed), 0)
    os.close(folder)


def _call(number: int, *arguments: object) -> int:
    """A system call; below 0 where it fails."""
    words = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    return int(_libc().syscall(ctypes.c_long(number), *words))


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _lower(kind: int, value: int) -> bool:
    try:
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))
    except (ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.EPERM, errno.EINVAL):
            raise
        return False
    return True
