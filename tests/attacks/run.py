"""Runs one attack in a process of its own and says everything that is wrong with the outcome.

Left out: whether the verdict was quick. How long an attack may take is only bounded where it would be stuck.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as Stuck
from pathlib import Path

from attacks import databases
from attacks.attack import BROKEN, OK, STOPPED, TIMEOUT, Attack
from rollout.errors import InfrastructureError
from rollout.sql import Executor, Result

STEPS = 1_000_000
CHARS = 2000
CPU_SECONDS = 0.3
STUCK_SECONDS = 90.0
MEMORY_BYTES = 1 << 30  # that a worker may have had resident; its address space is limited to 2 GiB
CHECK = (
    "SELECT count(*), sum(a), (SELECT count(*) FROM v), 'A' LIKE 'a', (SELECT b FROM t LIMIT 1), date('now'), random() "
    "FROM t"
)
CHECKED = (
    ("count(*)", "sum(a)", "(SELECT count(*) FROM v)", "'A' LIKE 'a'"),
    (500, 124750, 500, 1, "v0", "2025-01-01", -7780676995965812401),
)


def wrongs(attack: Attack, folder: Path, plain: Path) -> list[str]:
    """Runs the attack in `folder`, which must be empty; what went wrong, in words. `plain` is a copy of that database."""
    root, scratch, temp = folder / "databases", folder / "scratch", folder / "temp"
    for path in (root, scratch, temp):
        path.mkdir()
    shutil.copytree(plain, root / "plain")
    if attack.database != "plain":
        databases.make(root, attack.database)
    before = _files(folder), sorted(os.listdir("/"))
    with (
        Executor(root, timeout=CPU_SECONDS, workers=1, max_vm_steps=STEPS, max_observation_chars=CHARS) as executor,
        ThreadPoolExecutor(1) as pool,
    ):
        try:
            found = pool.submit(_attack, executor, attack, scratch).result(STUCK_SECONDS)
        except Stuck:
            executor.close()
            return ["stuck"]
    after = _files(folder), sorted(os.listdir("/"))
    if before != after:
        found.append(f"files changed: {set(before[0].items()) ^ set(after[0].items())}")
    return found


def _attack(executor: Executor, attack: Attack, scratch: Path) -> list[str]:
    found: list[str] = []
    _check(executor, found)
    pids = executor.worker_pids()
    first = shown = None
    seen: dict[str, object] = {}
    for statement in attack.statements:
        before = len(found)
        sql = statement.replace("{scratch}", str(scratch))
        status, first = _run(executor, attack, sql, True, found)
        if seen.setdefault(sql, _content(first)) != _content(first):
            found.append(f"not as before: {seen[sql]!r:.300} and {_content(first)!r:.300}")
        if status != TIMEOUT and attack.expected != STOPPED:  # for those, once is dear enough
            shown = _run(executor, attack, sql, False, found)[1]
            again = _run(executor, attack, sql, True, found)[1]
            if _content(first) != _content(again):
                found.append(f"two results: {_content(first)!r:.300} and {_content(again)!r:.300}")
        _check(executor, found)
        found[before:] = [f"{wrong}; after {statement!r:.100}" for wrong in found[before:]]
    if attack.rows is not None and first is not None and not _same(list(first.rows), attack.rows):
        found.append(f"rows {first.rows!r:.300} instead of {attack.rows!r:.300}")
    if attack.shown and (shown is None or attack.shown not in shown.observation):
        found.append(f"not shown: {attack.shown!r}")
    if attack.kills is not None and (executor.worker_pids() != pids) != attack.kills:
        found.append("the worker " + ("was not killed" if attack.kills else "was lost"))
    if _peak_bytes(executor.worker_pids()[0]) > MEMORY_BYTES:
        found.append("too much memory")
    return found


def _run(executor: Executor, attack: Attack, sql: str, whole: bool, found: list[str]) -> tuple[str, Result | None]:
    try:
        result = executor.run(attack.database, sql, whole=whole)
    except InfrastructureError:
        result = None
    status = BROKEN if result is None else result.status
    if status not in attack.expected.split("|"):
        found.append(f"{status} instead of {attack.expected}: {'' if result is None else result.observation!r:.300}")
    if result is not None:
        found += _wrong_text(result, executor)
    return status, result


def _check(executor: Executor, found: list[str]) -> None:
    """The next query works as if nothing had been."""
    result = executor.run("plain", CHECK, whole=True)
    if result.status != OK or (result.columns[:4], result.rows[0]) != CHECKED:
        found.append(f"the next query gave {result.status}, {result.columns}, {result.rows!r:.300}")


def _wrong_text(result: Result, executor: Executor) -> list[str]:
    found = []
    text = result.observation
    if "crashed" in result.error:
        found.append("a crash")
    if len(text) > CHARS:
        found.append(f"an observation of {len(text)} characters")
    if str(executor.locate("plain").parents[1]) in text + result.error:
        found.append(f"a leaked path: {text!r:.300}")
    if any(mark in text for mark in ("</observation", "<sql>", "<solution>", "<|im_end|>")):
        found.append(f"a tag: {text!r:.300}")
    if any(ord(c) < 32 and c not in "\n\t" for c in text) or text.encode("utf-8", "replace").decode() != text:
        found.append(f"an unprintable character: {text!r:.300}")
    return found


def _content(result: Result | None) -> object:
    return result and (result.status, result.columns, repr(result.rows), result.observation)


def _same(rows: list[tuple[object, ...]], expected: list[tuple[object, ...]]) -> bool:
    return rows == expected and [[type(c) for c in row] for row in rows] == [[type(c) for c in row] for row in expected]


def _files(folder: Path) -> dict[str, str]:
    """What is in a folder: every file's content, every other thing's kind."""
    found = {}
    for path in sorted(folder.rglob("*")):
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() and not path.is_symlink() else ""
        found[str(path.relative_to(folder))] = f"{path.lstat().st_mode:o} {path.lstat().st_mtime_ns} {content}"
    return found


def _peak_bytes(pid: int) -> int:
    """The most memory that a process has had resident; 0 where the system doesn't tell."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024
