"""Runs environments in worker processes: one of the user's may raise, hang, compute for ever or die without harm to others.

Each episode's environment lives in one worker and each worker makes one call at a time. A call past
`environment.timeout` CPU seconds is the model's doing: the episode ends with the outcome `timeout`. A call that neither
returns nor computes for `environment.stall_timeout` seconds, an exception and a crash are infrastructure failures, which
are retried and never scored. A worker that was lost is replaced, and the other environments that lived in it are made
again by repeating their calls so far; one that then answers otherwise is told apart as an infrastructure failure too.

Left out: limits of memory, files and network. An environment is trusted code; only its mistakes are contained.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rollout.environment import Environment, StepResult
from rollout.errors import InfrastructureError
from rollout.types import Message, Task, Turn
from rollout.worker_process import PACKAGE_ROOT, Died, Frame, Stalled, WorkerProcess
from sqlrl_jax.config import Config

_log = logging.getLogger(__name__)
_BOOT = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from rollout.environment_worker import main; main()"
_PLAIN_METRICS = ("sql/", "grade/")  # names that the SQL environment gives; a subclass of it reports as it does


class OutOfTime(Exception):
    """A call used up its CPU time."""


@dataclass
class _Slot:
    """The place of one worker. `generation` counts the processes that have stood there; 0 is none yet."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    worker: WorkerProcess | None = None
    generation: int = 0
    environments: int = 0


class Host:
    """The worker processes of one service. The first is started at once, so that a bad class is told before anything else."""

    def __init__(self, config: Config) -> None:
        environment = config.environment
        self.name, self.timeout = environment.env_class, environment.timeout
        self._stall = environment.stall_timeout
        own = str(Path(environment.path).expanduser().resolve())
        # The user's folder comes last: a file of theirs named like a standard module must not replace that.
        search = dict.fromkeys([*(os.path.abspath(folder) for folder in sys.path), PACKAGE_ROOT, own])
        self._arguments = ["-c", _BOOT, json.dumps(list(search))]
        self._settings = (os.getcwd(), config.model_dump_json())
        self._keys = itertools.count()
        self._lock = threading.Lock()
        self._closed = False
        self._slots = [_Slot() for _ in range(environment.workers)]
        with self._slots[0].lock:
            self._worker(self._slots[0])

    def place(self) -> tuple[int, _Slot]:
        """A key and a slot for a new environment: the slot with the fewest."""
        with self._lock:
            slot = min(self._slots, key=lambda s: s.environments)
            slot.environments += 1
            return next(self._keys), slot

    def leave(self, slot: _Slot) -> None:
        with self._lock:
            slot.environments -= 1

    def ask(self, slot: _Slot, request: Frame, doing: str) -> Any:
        """One call in the slot's worker; the caller holds the slot's lock.

        Raises OutOfTime, and InfrastructureError naming the class, what it was `doing`, and why it failed.
        """
        what = f"environment {self.name}: {doing}"
        worker = self._worker(slot)
        try:
            reply = worker.ask(request)
        except Stalled:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker.pid, signal.SIGUSR1)  # it writes where it stands into the log
                time.sleep(0.1)
            self._bury(slot)
            raise InfrastructureError(
                f"{what}: neither answers nor computes for {self._stall:g} s (environment.stall_timeout)"
            ) from None
        except Died:
            status = self._bury(slot)
            if status == -signal.SIGXCPU:
                raise OutOfTime from None
            raise InfrastructureError(f"{what}: {self._ending(status)}") from None
        if reply[0] != "ok":
            raise InfrastructureError(f"{what}: {reply[1]}; the whole traceback is in the service's log")
        return reply[1]

    def close(self) -> None:
        """Ends all workers. Calls still running end with an InfrastructureError in their threads."""
        self._closed = True
        for slot in self._slots:
            while not slot.lock.acquire(timeout=0.1):  # a call is running
                worker = slot.worker
                if worker is not None:
                    worker.kill()
            try:
                self._bury(slot)
            finally:
                slot.lock.release()

    def worker_pids(self) -> list[int]:
        """Process ids of the workers that live now."""
        return [slot.worker.pid for slot in self._slots if slot.worker is not None]

    def _worker(self, slot: _Slot) -> WorkerProcess:
        """The slot's worker, started if there is none. Raises InfrastructureError if its class can't be used."""
        if self._closed:
            raise InfrastructureError("the environments are closed")
        if slot.worker is not None:
            return slot.worker
        try:
            worker = slot.worker = WorkerProcess(self._arguments, self._settings, self._stall)
        except OSError as error:
            raise InfrastructureError(f"a worker process for environments can't be started: {error}") from None
        slot.generation += 1
        try:
            state, why = worker.ask(("open",))
        except Stalled:
            self._bury(slot)
            state, why = "unusable", f"loading it stands still for {self._stall:g} s (environment.stall_timeout)"
        except Died:
            state, why = "unusable", self._ending(self._bury(slot)) + " while it was loaded"
        if state == "ok":
            return worker
        self._bury(slot)
        key = f"environment.env_class = {self.name!r}"
        raise InfrastructureError(why if why.startswith(key) else f"{key}: {why}")

    def _bury(self, slot: _Slot) -> int:
        worker, slot.worker = slot.worker, None
        return 0 if worker is None else worker.bury()

    def _ending(self, status: int) -> str:
        if self._closed:
            return "the environments were closed"
        how = f"exit status {status}" if status >= 0 else f"signal {signal.Signals(-status).name}"
        if status == -signal.SIGKILL:
            how += " (was there too little memory?)"
        return f"its worker process ended with {how}"


class Hosted(Environment):
    """An environment that lives in a worker process; the episode can't tell the difference."""

    shared: Host

    @classmethod
    def open_shared(cls, config: Config) -> Host:
        return Host(config)

    def __init__(self, config: Config, shared: Host) -> None:
        super().__init__(config, shared)
        self._key, self._slot = shared.place()
        self._generation = 0
        self._past: list[tuple[Frame, Any]] = []  # calls so far without the key, and what they returned
        self._task = ""

    def reset(self, task: Task) -> list[Message]:
        self._task = task.id
        try:
            pairs = self._call("reset", (task.id, task.source, task.fields))
        except OutOfTime:
            raise InfrastructureError(
                f"environment {self.shared.name}: reset of task {task.id!r}: {self._too_long()}"
            ) from None
        return [Message(role=role, content=content) for role, content in pairs]

    def step(self, action: str, turn: int) -> StepResult:
        try:
            return self._result(self._call("step", action, turn), action)
        except OutOfTime:
            record = Turn(action=action, status="timeout", observation=self._too_long())
            return StepResult(done=True, outcome="timeout", turn=record)

    def finish(self) -> StepResult:
        try:
            return self._result(self._call("finish"), "")
        except OutOfTime:
            return StepResult(done=True, outcome="timeout")

    def close(self) -> None:
        try:
            with self._slot.lock:
                if self._slot.worker is not None and self._generation == self._slot.generation:
                    self.shared.ask(self._slot, ("close", self._key), f"close after task {self._task!r}")
        except (InfrastructureError, OutOfTime) as error:
            _log.warning("%s", error or f"close after task {self._task!r}: {self._too_long()}")
        finally:
            self.shared.leave(self._slot)

    def _call(self, method: str, *arguments: Any) -> Any:
        turn = f", turn {arguments[1]}" if method == "step" else ""
        with self._slot.lock:
            if self._past and (self._slot.worker is None or self._generation != self._slot.generation):
                self._live_again()
            reply = self.shared.ask(
                self._slot, (method, self._key, *arguments), f"{method} of task {self._task!r}{turn}"
            )
            self._generation = self._slot.generation
        self._past.append(((method, *arguments), reply))
        return reply

    def _live_again(self) -> None:
        """Repeats the calls so far in the worker that has taken the place of a lost one."""
        doing = f"repeating {len(self._past)} calls of task {self._task!r} in a new worker, since the old one was lost"
        try:
            replies = self.shared.ask(self._slot, ("replay", self._key, [call for call, _ in self._past]), doing)
        except OutOfTime:
            raise InfrastructureError(f"environment {self.shared.name}: {doing}: {self._too_long()}") from None
        if replies != [reply for _, reply in self._past]:
            raise InfrastructureError(
                f"environment {self.shared.name}: {doing}: it answered otherwise than before; "
                f"use task.fields['seed'] for what is random"
            )

    def _too_long(self) -> str:
        return f"took more than {self.shared.timeout:g} s of CPU time (environment.timeout)"

    def _result(self, reply: Frame, action: str) -> StepResult:
        observation, reward, done, outcome, turn, metrics = reply
        record = None
        if turn is not None:
            said, sql, status, seen, answer = turn
            record = Turn(action=said or action, sql=sql, status=status, observation=seen, answer=answer)
        named = {n if n.startswith(_PLAIN_METRICS) else f"environment/{n}": v for n, v in metrics.items()}
        return StepResult(observation, reward, done, outcome, record, named)
