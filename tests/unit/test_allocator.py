"""A process that keeps freed memory does not fault its pages in again."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from sqlrl_jax import allocator

COUNT = """
import resource, sys, threading
from sqlrl_jax.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def use():
    for _ in range(20):
        bytes(bytearray(1 << 26))
thread = threading.Thread(target=use)  # as XLA, which runs in threads of its own
thread.start(); thread.join()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


def faults(how: str, platforms: str = "cpu") -> int:
    environment = {"PYTHONPATH": str(Path(__file__).parents[2]), "JAX_PLATFORMS": platforms}
    command = [sys.executable, "-c", COUNT, how]
    return int(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_used_again() -> None:
    assert faults("keep") * 4 < faults("leave")


HOLES = """
import sys
from sqlrl_jax.allocator import give_back_surplus, keep_freed_memory
assert keep_freed_memory()
def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")) >> 10
blocks = [bytearray(b"x") * (16 << 20) for _ in range(int(sys.argv[1]))]
del blocks[::2]
before = resident()
give_back_surplus()
print(before - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
@pytest.mark.parametrize(("blocks", "given_back"), [(80, 40 * 16), (16, 0)])
def test_a_large_heap_gives_back_its_holes_and_a_small_one_keeps_them(blocks: int, given_back: int) -> None:
    environment = {"PYTHONPATH": str(Path(__file__).parents[2]), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", HOLES, str(blocks)]
    found = int(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    assert found == pytest.approx(given_back, abs=8)  # MiB


@pytest.mark.parametrize(("platforms", "plugins", "cpu"), [("tpu", [], False), ("", ["cuda"], False), ("", [], True)])
def test_only_where_jax_chooses_the_cpu(
    monkeypatch: pytest.MonkeyPatch, platforms: str, plugins: list[str], cpu: bool
) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    monkeypatch.setattr("sqlrl_jax.allocator.importlib.util.find_spec", lambda _: None)
    monkeypatch.setattr("sqlrl_jax.allocator.entry_points", lambda group: plugins if group == "jax_plugins" else [])
    assert allocator._cpu_is_chosen() == cpu


@pytest.mark.parametrize(
    "given", [{}, {"XLA_PYTHON_CLIENT_PREALLOCATE": "true"}, {"XLA_PYTHON_CLIENT_MEM_FRACTION": ".4"}]
)
def test_a_shared_gpu_is_not_filled_unless_the_environment_says_how(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str]
) -> None:
    for name in ("XLA_PYTHON_CLIENT_PREALLOCATE", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    allocator.share_devices()
    found = {name: value for name, value in os.environ.items() if name.startswith("XLA_PYTHON_CLIENT")}
    assert found == (given or {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"})
