"""A worker: a spawned Python process that answers one request at a time over its standard input and output.

For code that must not run in the service's own process because it may use it up, hang or crash it: SQL queries, users'
environments. Frames are an 8-byte length and a marshalled tuple of plain values (put pickled bytes into it for anything
else). The first frame holds the worker's settings and is answered with ("ready",) before the first request.

A worker has no deadline in wall time: on a busy machine that would punish the request. A worker that computes is ended by
the kernel's limit of CPU time, which it sets for itself (rollout.sql.guard.limit_cpu); one that neither answers nor
computes for long stands still. Left out: pools and retries, which are the owner's.
"""

from __future__ import annotations

import io
import marshal
import os
import select
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

PACKAGE_ROOT = str(Path(__file__).resolve().parents[1])
STALL_SECONDS = 30.0  # without an answer and without using CPU time
READ_BYTES = 1 << 16  # what a pipe holds

Frame = tuple[Any, ...]


class Died(Exception):
    """The worker's process ended before it answered; `bury` tells how."""


class Stalled(Exception):
    """The worker neither answers nor computes."""


def boot(module: str, site_packages: bool) -> list[str]:
    """Arguments for a Python that runs `main()` of a module of this project, isolated from the caller's environment.

    Without site-packages it starts in some tens of milliseconds and has the standard library only.
    """
    code = f"import sys; sys.path.insert(0, sys.argv[1]); from {module} import main; main()"
    return ["-I", *([] if site_packages else ["-S"]), "-c", code, PACKAGE_ROOT]


class WorkerProcess:
    """One worker process and its pipes. One thread at a time uses it; `kill` may come from any.

    `arguments` follow the Python program's name (see `boot`). OSError if the process can't be started.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        settings: Frame,
        stall_seconds: float = STALL_SECONDS,
        pass_fds: Sequence[int] = (),
    ) -> None:
        import subprocess  # here, because workers import this file and would pay for it at every start

        self._process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            cwd="/",
            start_new_session=True,  # Ctrl-C is for the parent
            pass_fds=pass_fds,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        os.set_blocking(self._stdin.fileno(), False)  # a worker that stands still may not read what it is asked either
        self._writable, self._poll = select.poll(), select.poll()
        self._writable.register(self._stdin, select.POLLOUT)
        self._poll.register(self._stdout, select.POLLIN)
        self._stall_seconds = stall_seconds
        self._settings: Frame | None = settings

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def started(self) -> bool:
        """Whether it has been ready for a request."""
        return self._settings is None

    def ask(self, request: Frame, patience: float = 0.0, on_silence: Callable[[], None] | None = None) -> Frame:
        """One request, one reply. Raises Died or Stalled; the worker is then of no more use but to be buried.

        `on_silence` is called once if there is no answer after `patience` seconds.
        """
        if self._settings is not None:
            self._send(self._settings)
            self._receive()
            self._settings = None
        self._send(request)
        ready = on_silence is not None and bool(self._poll.poll(patience * 1000))
        if on_silence is not None and not ready:
            on_silence()
        return self._receive(ready)

    def kill(self) -> None:
        """Ends the process at once; a thread that waits for its answer gets Died."""
        self._process.kill()

    def bury(self) -> int:
        """Kills it if it still lives, frees everything, returns how it ended (negative: the signal)."""
        from subprocess import TimeoutExpired

        self._stdin.close()
        self._stdout.close()
        try:
            return self._process.wait(timeout=0.2)  # it ends by itself when its input closes, or has died already
        except TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def _send(self, request: Frame) -> None:
        data = memoryview(frame(request))
        while data:
            try:
                data = data[os.write(self._stdin.fileno(), data) :]
            except BlockingIOError:
                self._wait(self._writable)
            except OSError:
                raise Died from None

    def _receive(self, ready: bool = False) -> Frame:
        reply: bytes | bytearray = self._read(ready)
        while len(reply) < 8:
            reply += self._read()
        size = 8 + int.from_bytes(reply[:8], "little")
        if len(reply) < size:
            reply = bytearray(reply)
            while len(reply) < size:
                reply += self._read()
        content: Frame = marshal.loads(memoryview(reply)[8:])
        return content

    def _read(self, ready: bool = False) -> bytes:
        """What the worker has written."""
        if not ready:
            self._wait(self._poll)
        data = os.read(self._stdout.fileno(), READ_BYTES)
        if not data:
            raise Died
        return data

    def _wait(self, poll: select.poll) -> None:
        """Waits for a pipe for as long as the worker computes."""
        used = -1.0
        while not poll.poll(self._stall_seconds * 1000):
            before, used = used, cpu_seconds(self.pid)
            if used == before:
                raise Stalled


def cpu_seconds(pid: int) -> float:
    """CPU time of a process so far; -1 where the system doesn't tell."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return -1.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def serve(start: Callable[..., Callable[..., Frame]]) -> None:
    """The worker's side: answers until standard input closes. `start(*settings)` returns what answers `(*request)`.

    Whatever prints goes to standard error. An exception ends the process, so what answers should catch its own.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    requests = sys.stdin.buffer
    replies = io.FileIO(os.dup(1), "w")
    os.dup2(2, 1)  # prints must not get between the frames
    settings = read_frame(requests)
    if settings is None:
        return
    answer = start(*settings)
    _send(replies, frame(("ready",)))
    while (request := read_frame(requests)) is not None:
        _send(replies, frame(answer(*request)))


def read_frame(stream: BinaryIO) -> Frame | None:
    """The next frame; None at the end of the stream."""
    head = stream.read(8)
    if len(head) < 8:
        return None
    content: Frame = marshal.loads(stream.read(int.from_bytes(head, "little")))
    return content


def frame(content: Frame) -> bytes:
    """A tuple of plain values as it goes over the pipe."""
    body = marshal.dumps(content, 2)  # the later formats look for equal objects, which takes longer
    return len(body).to_bytes(8, "little") + body


def _send(stream: io.FileIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[stream.write(view) :]
