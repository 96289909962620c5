"""A rollout service as a child process: started, waited for, restarted, never left behind.

The child gets a process group of its own (Ctrl-C reaches only the trainer, which stops it in order) and a pipe as its
standard input: when this process dies, however it dies, the pipe closes and the child stops itself. Its output goes to a
log file, whose last lines are part of any error here.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rollout.errors import InfrastructureError
from rollout.security import PLAIN, Security
from rollout.stub import Stub

LOG_LINES = 15


class ServiceError(InfrastructureError):
    """The service process does not start, or has died; the message ends with its last log lines."""


class ServiceProcess:
    """One service. `command` is `launch.py serve …` without `--port-file`, which is added here; `variables` are set in its
    environment, above this process's own; `security` is how it is asked whether it answers.

    `restarts` counts over the object's life.
    """

    def __init__(
        self,
        command: Sequence[str],
        log_file: Path,
        *,
        start_timeout: float = 180.0,
        variables: Mapping[str, str] | None = None,
        security: Security = PLAIN,
    ) -> None:
        self._command, self._log_file, self._start_timeout = list(command), Path(log_file), start_timeout
        self._variables, self._security = dict(variables or {}), security
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = threading.Event()
        self.address = ""
        self.restarts = 0

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> str:
        """Starts the service and returns its address once it answers. Raises ServiceError."""
        if self.alive():
            return self.address
        with tempfile.TemporaryDirectory(prefix="rollout-") as folder:
            port_file = Path(folder, "address")
            self._spawn([*self._command, "--port-file", str(port_file)])
            try:
                self.address = self._wait_ready(port_file)
            except BaseException:
                self.stop()
                raise
        return self.address

    def restart(self) -> str:
        """Ends whatever is left of the service and starts it again; returns the new address."""
        self.stop(grace=2.0)
        self.restarts += 1
        return self.start()

    def close(self) -> None:
        """Stops the service for good: a `restart` that another thread is in fails."""
        self._closed.set()
        self.stop()

    def stop(self, grace: float = 10.0) -> None:
        """Ends the service and every process it has started: TERM first, KILL after `grace` seconds."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None:
            _signal_group(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace)
        _signal_group(process.pid, signal.SIGKILL)  # also workers that outlived a service that was killed
        process.wait()
        if process.stdin:
            process.stdin.close()

    def last_lines(self) -> str:
        """The end of the log, for error messages."""
        try:
            with self._log_file.open("rb") as log:
                log.seek(max(0, self._log_file.stat().st_size - 65536))
                text = log.read().decode(errors="replace")
        except OSError as error:
            return f"(log {self._log_file}: {error.strerror})"
        return "\n".join("    " + line for line in text.splitlines()[-LOG_LINES:])

    def _spawn(self, command: list[str]) -> None:
        if self._closed.is_set():
            raise ServiceError("the rollout service was stopped for good")
        try:
            self._log_file.parent.mkdir(parents=True, exist_ok=True)
            with self._log_file.open("ab") as log:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    env=os.environ | self._variables,
                )
        except OSError as error:
            raise ServiceError(f"rollout service cannot be started ({' '.join(command)}): {error}") from None

    def _wait_ready(self, port_file: Path) -> str:
        process = self._process
        deadline = time.monotonic() + self._start_timeout
        while time.monotonic() < deadline and process is not None and not self._closed.is_set():
            status = process.poll()
            if status is not None:
                how = f"exit status {status}" if status >= 0 else f"signal {signal.Signals(-status).name}"
                raise ServiceError(
                    f"the rollout service ended with {how} while starting; the end of {self._log_file}:\n{self.last_lines()}"
                )
            if port_file.exists():
                address = port_file.read_text().strip()
                with Stub(address, self._security) as stub:
                    if stub.healthy():
                        return address
            time.sleep(0.05)
        if self._closed.is_set():
            raise ServiceError("the rollout service was stopped for good while it was starting")
        raise ServiceError(
            f"the rollout service was not ready within {self._start_timeout:.0f} s (bridge.start_timeout); the end of "
            f"{self._log_file}:\n{self.last_lines()}"
        )


def _signal_group(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # PermissionError: macOS, when only a zombie is left
        os.killpg(pid, number)
