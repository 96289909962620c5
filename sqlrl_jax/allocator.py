"""How a process takes memory: on a CPU it keeps what it frees; on an accelerator that two processes share it takes little.

XLA on CPU allocates a program's temporary buffers for each run. glibc maps such large blocks afresh and gives them back,
so every step pays for the kernel's clearing of every page: 42,000 page faults a micro-batch of the quickstart's model, a
quarter of an update's CPU time. What was freed when a program is compiled is given back, 140 MB each time with that model:
little of it was a step's. With another C library nothing is changed.

On a GPU jax takes three quarters of the memory at its start, and the second process on the card finds too little.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
from collections.abc import Callable
from functools import cache
from importlib.metadata import entry_points
from typing import Any

# malloc.h of glibc
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
# Larger blocks are still mapped afresh: clearing pages is nothing beside what a large model computes in them, and kept in
# the heap they would fragment it (a 78M model grew from 3.9 to 9.3 GB).
_KEEP_BYTES = 2**28
_LARGE_HEAP_BYTES = 2**30
_FRAME_BYTES = 2**22
_keeps = False


def keep_freed_memory() -> bool:
    """Makes malloc reuse large blocks instead of mapping them anew. Call it before jax starts its threads.

    Returns whether anything was changed: only with glibc, and only where jax will choose the CPU.
    """
    if platform.libc_ver()[0] != "glibc" or not _cpu_is_chosen():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((_M_ARENA_MAX, 1), (_M_MMAP_THRESHOLD, _KEEP_BYTES), (_M_TRIM_THRESHOLD, 2 * _KEEP_BYTES))
    _give_back_after_compiling()
    global _keeps
    _keeps = all([mallopt(name, value) for name, value in settings])
    return _keeps


def keep_freed_frames() -> bool:
    """The same for blocks up to a few MiB, wherever jax runs: a push of weights takes and frees one for every frame, and
    clearing their pages was half of a service's CPU time. Not after `keep_freed_memory`, which keeps more."""
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all([mallopt(_M_MMAP_THRESHOLD, _FRAME_BYTES), mallopt(_M_TRIM_THRESHOLD, 8 * _FRAME_BYTES)])


def give_back_surplus() -> None:
    """After `keep_freed_memory`, gives back what lies free between blocks of a large heap, which nothing else does; call it
    before each step. There are holes that do not fit what comes next: 600 MB after a 78M model's first step. A small heap
    keeps them, see above."""
    heap = _heap_bytes() if _keeps else None
    if heap is not None and heap() > _LARGE_HEAP_BYTES:
        ctypes.CDLL(None).malloc_trim(0)


class _Mallinfo2(ctypes.Structure):
    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in _names.split()]


@cache
def _heap_bytes() -> Callable[[], int] | None:
    """How large malloc's heap is, free blocks included; None where nobody says (glibc before 2.33, other C libraries)."""
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None) if platform.libc_ver()[0] == "glibc" else None
    if mallinfo2 is None:
        return None
    mallinfo2.restype = _Mallinfo2
    return lambda: mallinfo2().arena


@cache
def _give_back_after_compiling() -> None:
    import jax.monitoring

    def heard(event: str, duration_secs: float, **kwargs: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            ctypes.CDLL(None).malloc_trim(0)

    jax.monitoring.register_event_duration_secs_listener(heard)


def share_devices() -> None:
    """Lets this process and those that it starts take a GPU's memory as they need it, unless the environment says how.
    Call it before jax looks for devices."""
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def _cpu_is_chosen() -> bool:
    """Whether jax will run on the CPU: told so, or no package for an accelerator is there. Asking jax would start it."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms:
        return platforms == "cpu"
    return importlib.util.find_spec("libtpu") is None and not entry_points(group="jax_plugins")
