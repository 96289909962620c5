"""The walls around a SQL worker: what they keep out, what happens where the kernel lacks them, the clock, the memory."""

from __future__ import annotations

import ctypes
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from rollout.errors import InfrastructureError
from rollout.sql import Executor, clock, guard, sandbox
from rollout.sql.memory import Memory

ROOT = Path(__file__).resolve().parents[2]
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="prctl and landlock are Linux")

# What a process tries once its sandbox is closed. `allowed` is the folder left open.
TRIES = {
    "read_allowed": "open(allowed + '/inside').read()",
    "list_allowed": "os.listdir(allowed)",
    "stat_outside": "os.stat('/etc/passwd')",
    "read_outside": "open('/etc/passwd').read()",
    "read_through_link": "open(allowed + '/link').read()",
    "list_outside": "os.listdir('/')",
    "write_allowed": "open(allowed + '/inside', 'w')",
    "append_allowed": "open(allowed + '/inside', 'a')",
    "truncate_allowed": "os.truncate(allowed + '/inside', 0)",
    "create_allowed": "open(allowed + '/new', 'w')",
    "create_outside": "open(outside + '/new', 'w')",
    "remove": "os.unlink(allowed + '/inside')",
    "rename": "os.rename(allowed + '/inside', allowed + '/renamed')",
    "folder": "os.mkdir(allowed + '/folder')",
    "fifo": "os.mkfifo(allowed + '/fifo')",
    "symlink": "os.symlink('/', allowed + '/root')",
    "execute": "os.execv('/bin/true', ['true'])",
    "spawn": "os.posix_spawn('/bin/true', ['true'], {})",
    "connect": "socket.create_connection(('127.0.0.1', port), timeout=5)",
    "bind": "socket.socket().bind(('127.0.0.1', 0))",
    "signal_parent": "os.kill(os.getppid(), 0)",
}
ALLOWED = {"read_allowed", "list_allowed", "stat_outside"}


def tried(tmp_path: Path, name: str) -> str:
    """What came of a try in a child process: `fine` or the name of the error."""
    allowed, outside = tmp_path / "allowed", tmp_path / "outside"
    for folder in (allowed, outside):
        folder.mkdir()
    (allowed / "inside").write_text("x")
    (allowed / "link").symlink_to("/etc/passwd")
    code = f"""
import os, socket, sys
sys.path.insert(0, {str(ROOT)!r})
from rollout.sql import sandbox
listener = socket.create_server(("127.0.0.1", 0))
port = listener.getsockname()[1]
allowed, outside = {str(allowed)!r}, {str(outside)!r}
sandbox.close(allowed)
try:
    {TRIES[name]}
except OSError as error:
    print(type(error).__name__)
else:
    print("fine")
"""
    child = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, timeout=60)
    assert (allowed / "inside").read_text() == "x"
    assert sorted(os.listdir(allowed)) == ["inside", "link"]
    assert os.listdir(outside) == []
    return child.stdout.strip() or child.stderr


def kernel_version() -> int:
    """The kernel's version of landlock, without closing anything."""
    if sys.platform != "linux":
        return 0
    return max(0, int(ctypes.CDLL(None).syscall(444, None, ctypes.c_long(0), ctypes.c_long(1))))


@pytest.mark.parametrize("name", TRIES)
def test_a_closed_process_reads_below_one_folder_and_nothing_else(tmp_path: Path, name: str) -> None:
    needed = {"connect": 4, "bind": 4, "signal_parent": 6, "truncate_allowed": 3}.get(name, 1)
    if kernel_version() < needed:
        pytest.skip(f"the kernel has no landlock of version {needed}")
    assert tried(tmp_path, name) == ("fine" if name in ALLOWED else "PermissionError")


def close_in_child(path: Path, before: str = "") -> str:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from rollout.sql import sandbox\n{before}\n"
    code += f"print(sandbox.close({str(path)!r}))"
    child = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, timeout=60)
    assert child.returncode == 0, child.stderr
    return child.stdout.strip()


@LINUX
def test_it_tells_what_is_in_force(tmp_path: Path) -> None:
    told = close_in_child(tmp_path)
    assert told.startswith("Walls(no_new_privileges=True, ")
    assert f"landlock={kernel_version()}" in told
    assert f"no_new_processes={os.geteuid() != 0}" in told  # the limit does not bind root
    assert close_in_child(tmp_path / "missing") == told


@pytest.mark.parametrize(
    "lacking", ["sys.platform = 'darwin'", "sandbox._MACHINES = set()", "sandbox._call = lambda *_: -1"]
)
def test_what_the_system_lacks_is_told_and_does_no_harm(tmp_path: Path, lacking: str) -> None:
    told = close_in_child(tmp_path, lacking)
    assert told.endswith("landlock=0)")
    assert ("no_new_privileges=True" in told) == (sys.platform == "linux" and "darwin" not in lacking)


def test_a_kernel_is_asked_for_no_more_than_it_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int, int, int]] = []
    version = 0

    def kernel(number: int, *arguments: Any) -> int:
        if number == 444 and arguments[0] is None:
            return version
        if number == 444:
            rules = arguments[0]._obj
            asked.append((rules.files, rules.tcp, rules.scopes, arguments[1]))
            return os.open(os.devnull, os.O_RDONLY)
        return 0

    monkeypatch.setattr(sandbox, "_call", kernel)
    monkeypatch.setattr(sandbox, "_MACHINES", {os.uname().machine})
    for version in range(1, 9):
        assert sandbox._landlock(str(tmp_path)) == version
    assert [rules[0].bit_length() for rules in asked] == [13, 14, 15, 15, 16, 16, 16, 16]
    assert [rules[1:] for rules in asked] == [(0, 0, 8)] * 3 + [(3, 0, 16)] * 2 + [(3, 3, 24)] * 3


PARENT = """
import subprocess, sys, threading, time
child = [None]
def start():
    child[0] = subprocess.Popen([sys.executable, "-I", "-S", "-c", sys.argv[1]], stdout=subprocess.PIPE)
    child[0].stdout.readline()
thread = threading.Thread(target=start)
thread.start()
thread.join()
time.sleep(0.2)
print(child[0].pid, child[0].poll(), flush=True)
time.sleep(600)
"""


@LINUX
def test_a_worker_dies_with_its_parent_but_not_with_the_thread_that_started_it(tmp_path: Path) -> None:
    child = f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); from rollout.sql import sandbox\n"
    child += f"sandbox.close({str(tmp_path)!r}); print(flush=True)\nwhile True: time.sleep(1)"
    parent = subprocess.Popen([sys.executable, "-c", PARENT, child], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid, ended = parent.stdout.readline().split()
    assert ended == "None"
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 60
    while running(int(pid)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@LINUX
def test_every_worker_is_closed_and_limited(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    sqlite3.connect(tmp_path / "d" / "d.sqlite").close()
    with Executor(tmp_path, workers=2) as executor:
        threads = [threading.Thread(target=executor.run, args=("d", "SELECT 1")) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        executor.run_many([("d", "SELECT 1")] * 50)
        pids = executor.worker_pids()
        assert pids
        for pid in pids:
            status = Path(f"/proc/{pid}/status").read_text()
            limits = {
                line[:25].strip(): line[25:].split()[:2]
                for line in Path(f"/proc/{pid}/limits").read_text().splitlines()
            }
            assert "NoNewPrivs:\t1" in status
            assert limits["Max file size"] == limits["Max core file size"] == ["0", "0"]
            assert limits["Max open files"] == [str(sandbox.OPEN_FILES)] * 2
            assert limits["Max address space"] == [str(guard.ADDRESS_SPACE_BYTES)] * 2
            assert limits["Max cpu time"][0] != "unlimited"


def test_a_link_put_in_the_place_of_a_database_leads_nowhere(tmp_path: Path) -> None:
    """The executor has found the path good before; only the worker's walls can refuse it now."""
    if kernel_version() < 1:
        pytest.skip("needs landlock")
    root, outside = tmp_path / "root", tmp_path / "outside"
    for folder in (root / "d", outside):
        folder.mkdir(parents=True)
        connection = sqlite3.connect(folder / "d.sqlite")
        connection.execute(f"CREATE TABLE t AS SELECT '{folder.name}' AS a")
        connection.commit()
        connection.close()
    with Executor(root, workers=1) as executor:
        assert executor.run("d", "SELECT a FROM t").rows == [("d",)]
        (root / "d").rename(root / "old")
        (root / "d").symlink_to(outside)
        with pytest.raises(InfrastructureError, match="can't be read"):
            executor.run("d", "SELECT a FROM t")
        (root / "d").unlink()
        (root / "d").symlink_to(root / "old")
        assert executor.run("d", "SELECT a FROM t").rows == [("d",)]


CLOCK = [
    "date()", "time()", "datetime()", "julianday()", "unixepoch()", "strftime('%Y-%m-%d %H:%M:%f %s %J')",
    "date('now')", "date('NOW', '+1 month')", "datetime('now', 'localtime')", "strftime('%W', 'now', 'weekday 0')",
    "date(x'4e6f77')", "date('now' || char(0) || 'x')", "date(' now')", "date('nowx')", "date(NULL)", "date(1.5)",
    "time('12:00', '+1 hour')", "julianday('2000-01-01')", "strftime('now')", "strftime('%s', 0, 'unixepoch')",
    "date('2020-01-01', 'now')", "current_timestamp", "current_date", "current_time", "date('now', NULL)",
]  # fmt: skip


def test_both_ways_of_stopping_the_clock_agree() -> None:
    code = f"""
import sqlite3, sys
sys.path.insert(0, {str(ROOT)!r})
from rollout.sql import clock
plain = sqlite3.connect(":memory:")
assert not clock.stands_still(plain)
clock.replace_functions(plain, sqlite3.connect(":memory:"))
assert clock.stands_still(plain)
stopped = clock.stop() and clock.stop()
print(stopped)
other = sqlite3.connect(":memory:")
for sql in {CLOCK!r}:
    rows = [c.execute("SELECT " + sql).fetchone()[0] for c in (plain, other if stopped else plain)]
    assert rows[0] == rows[1], (sql, rows)
"""
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert child.returncode == 0, child.stderr


def test_arguments_that_mean_now() -> None:
    now = clock.NOW
    assert clock.with_now(()) == (now,)
    assert clock.with_now(("Now", "+1 day")) == (now, "+1 day")
    assert clock.with_now(("subsec", "+1 day")) == (now, "subsec", "+1 day")
    assert clock.with_now(("2020-01-01", "now")) == ("2020-01-01", "now")
    assert clock.with_now(("now", "subsec"), pair=True) == (now, now)
    assert clock.with_now((b"now\0rest",)) == (now,)
    assert clock.with_now((None, 3, "x" * 1000)) == (None, 3, "x" * 1000)


def test_long_arguments_are_not_remembered() -> None:
    connection, ask = sqlite3.connect(":memory:"), sqlite3.connect(":memory:")
    clock.replace_functions(connection, ask)
    memory = Memory()
    before = memory.resident()
    counter = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 300) "
    sql = counter + "SELECT sum(length(strftime(hex(zeroblob(500000)) || i, 0))) FROM n"
    assert connection.execute(sql).fetchone()[0] > 300_000_000
    assert memory.resident() - before < 100_000_000


@LINUX
def test_memory_that_is_free_goes_back() -> None:
    memory = Memory()
    base = memory.resident()
    assert base > 0
    blocks = [bytes(30_000) for _ in range(5000)]
    del blocks[::2]
    del blocks[:]
    memory.give_back()
    assert memory.resident() < base + 50_000_000
