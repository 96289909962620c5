"""The worker's side of environments: finds the class, keeps the instances, makes their calls, checks what they return.

Runs in a process of its own (rollout.environment_host is the other end), so it may print, crash, hang or use up its CPU
time. A call's CPU time is limited by the kernel, which ends the process past it. What an environment returns is checked
here, where its name and traceback are known, and leaves as plain values. Left out: limits of memory, files and network,
because the code is the user's own.
"""

from __future__ import annotations

import difflib
import faulthandler
import importlib
import io
import math
import os
import resource
import select
import signal
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsFloat

from rollout.environment import BUILT_IN, END_OUTCOMES, Environment, StepResult
from rollout.errors import UserError
from rollout.sql.guard import limit_cpu
from rollout.text import whole
from rollout.types import Task, Turn
from rollout.worker_process import Frame, serve
from sqlrl_jax.config import Config

MAX_TEXT_CHARS = 1_000_000  # of a prompt or an observation; encoding more would hold up the service


class BadResult(Exception):
    """An environment returned something unusable; the message says what was expected."""


class Worker:
    """The environments of one process by key. Replies are ("ok", value), ("failed", why) or, to `open`, ("unusable", why)."""

    def __init__(self, config_json: str) -> None:
        self._config = Config.model_validate_json(config_json)
        self._name = self._config.environment.env_class
        self._alive: dict[int, Environment] = {}
        self._process = os.getpid()

    def answer(self, method: str, *arguments: Any) -> Frame:
        try:
            if method == "open":
                return self._open()
            count = len(arguments[1]) if method == "replay" else 1
            limit_cpu(self._config.environment.timeout * count)
            return ("ok", getattr(self, f"_{method}")(*arguments))
        except (Exception, SystemExit) as error:
            print(f"environment {self._name}, {method}:", file=sys.stderr)
            traceback.print_exc()
            return ("failed", _reason(error))
        finally:
            if os.getpid() != self._process:
                os._exit(0)  # an environment forked; two must not answer
            _, hard = resource.getrlimit(resource.RLIMIT_CPU)
            resource.setrlimit(resource.RLIMIT_CPU, (hard, hard))
            sys.stdout.flush()

    def _open(self) -> Frame:
        try:
            self._class = load_class(self._name, Path(self._config.environment.path).expanduser().resolve())
        except UserError as error:
            return ("unusable", str(error))
        try:
            self._shared = self._class.open_shared(self._config)
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            return ("unusable", f"environment.env_class = {self._name!r}: open_shared failed: {_reason(error)}")
        return ("ok", None)

    def _reset(self, key: int, task: tuple[str, str, dict[str, Any]]) -> list[tuple[str, str]]:
        environment = self._alive[key] = self._class(self._config, self._shared)
        return checked_messages(environment.reset(Task(*task)))

    def _step(self, key: int, action: str, turn: int) -> Frame:
        return checked_step(self._alive[key].step(action, turn), "step")

    def _finish(self, key: int) -> Frame:
        result = checked_step(self._alive[key].finish(), "finish")
        if not result[2]:
            raise BadResult("finish returned done=False: it is called when the episode has ended")
        return result

    def _close(self, key: int) -> None:
        environment = self._alive.pop(key, None)
        if environment is not None:
            environment.close()

    def _replay(self, key: int, calls: Sequence[Frame]) -> list[Any]:
        """Makes the calls of an episode again that lived in a worker which is no more."""
        return [getattr(self, f"_{method}")(key, *arguments) for method, *arguments in calls]


def checked_messages(prompt: object) -> list[tuple[str, str]]:
    """What `reset` returned, as (role, content) pairs. Raises BadResult."""
    if isinstance(prompt, str):
        return [("user", _sendable(prompt))]
    if not isinstance(prompt, Sequence) or not prompt:
        raise BadResult(f"reset returned {_shown(prompt)}: expected text or a list of messages")
    pairs = []
    for number, message in enumerate(prompt):
        if not isinstance(message, dict) or not all(isinstance(message.get(n), str) for n in ("role", "content")):
            raise BadResult(
                f"reset returned {_shown(message)} as message {number}: expected role and content, both text"
            )
        pairs.append((_sendable(message["role"]), _sendable(message["content"])))
    return pairs


def checked_step(result: object, method: str) -> Frame:
    """What `step` or `finish` returned as (observation, reward, done, outcome, turn, metrics). Raises BadResult."""
    if not isinstance(result, StepResult):
        raise BadResult(f"{method} returned {_shown(result)}: expected a StepResult")
    done, observation, outcome = bool(result.done), result.observation, result.outcome
    if observation is not None and not isinstance(observation, str):
        raise BadResult(f"observation {_shown(observation)}: expected text or None")
    if not done and observation is None:
        raise BadResult("neither an observation nor done=True; what should the model read next?")
    if outcome and (not done or outcome not in END_OUTCOMES):
        known = ", ".join(END_OUTCOMES)
        raise BadResult(
            f"{method}: outcome {outcome!r}: expected one of {known} with done=True; use metrics for your own"
        )
    reward = _number(result.reward, "reward")
    if done and not outcome:
        outcome = "correct" if reward > 0 else "wrong"
    if not isinstance(result.metrics, Mapping):
        raise BadResult(f"metrics {_shown(result.metrics)}: expected a dict of numbers by name")
    metrics = {_sendable(str(name)): _number(value, f"metric {name}") for name, value in result.metrics.items()}
    shown = None if observation is None else _sendable(observation)
    return (shown, reward, done, str(outcome), _checked_turn(result.turn), metrics)


def _checked_turn(turn: object) -> tuple[str, ...] | None:
    if turn is None:
        return None
    if not isinstance(turn, Turn):
        raise BadResult(f"turn {_shown(turn)}: expected a rollout.types.Turn or None")
    return tuple(_sendable(str(text)) for text in (turn.action, turn.sql, turn.status, turn.observation, turn.answer))


def _number(value: object, name: str) -> float:
    """A finite float; numpy's and JAX's numbers count too, text does not."""
    try:
        number = float(value) if isinstance(value, SupportsFloat) else math.nan
    except (ArithmeticError, TypeError, ValueError):  # too large an integer, an array
        number = math.nan
    if math.isfinite(number):
        return number
    raise BadResult(f"{name} {_shown(value)}: expected a finite number")


def _sendable(text: str) -> str:
    """Whole, plain, and not longer than any context."""
    return str(whole(text[:MAX_TEXT_CHARS]))


def _shown(value: object) -> str:
    text = repr(value)
    return f"{text[:80]}{' …' if len(text) > 80 else ''} ({type(value).__name__})"


def _reason(error: BaseException) -> str:
    """An exception in one line, with the place in the user's code that it comes from."""
    if isinstance(error, BadResult):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename) != Path(__file__)] or frames
    lines = "".join(traceback.format_exception_only(error)).splitlines()
    text = next(line for line in lines if not line.startswith(" "))  # a SyntaxError shows the place first
    return f"{text} ({Path(own[-1].filename).name}, line {own[-1].lineno}, in {own[-1].name})"


def load_class(name: str, folder: Path) -> type[Environment]:
    """The environment class that `environment.env_class` names; `folder` is environment.path.

    Raises UserError saying what is wrong and what is near.
    """
    key = f"environment.env_class = {name!r}"
    module_name, _, class_name = BUILT_IN.get(name, name).partition(":")
    if not module_name or not class_name:
        dotted = ":".join(name.rstrip(":").rsplit(".", 1)) if "." in name else ""
        near = [dotted] if dotted else difflib.get_close_matches(name, BUILT_IN, n=1)
        raise UserError(f"{key}: expected {' or '.join(BUILT_IN)} or package.module:Class{_mean(near)}")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UserError(f"{key}: {_missing(module_name, str(error.name), folder)}") from error
    except SyntaxError as error:
        raise UserError(f"{key}: {error.filename}, line {error.lineno}: {error.msg}") from error
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        raise UserError(f"{key}: importing {module_name} failed: {_reason(error)}") from error
    found = getattr(module, class_name, None)
    if isinstance(found, type) and issubclass(found, Environment):
        return found
    where = f"{key}: {getattr(module, '__file__', None) or module_name}"
    if found is not None:
        raise UserError(f"{where}: {class_name} is not a subclass of rollout.environment.Environment")
    kinds = [n for n, v in vars(module).items() if isinstance(v, type) and issubclass(v, Environment)]
    near = difflib.get_close_matches(class_name, kinds, n=1) or [n for n in kinds if n != "Environment"][:1]
    raise UserError(f"{where} has no class {class_name}{_mean([f'{module_name}:{n}' for n in near])}")


def _missing(module_name: str, missing: str, folder: Path) -> str:
    if module_name != missing and not module_name.startswith(missing + "."):
        return f"{module_name} needs the package {missing}, which is not installed; install it for {sys.executable}"
    parent, _, leaf = missing.rpartition(".")
    folders = [Path(entry, *parent.split(".")) if parent else Path(entry) for entry in sys.path]
    known = {f.stem for d in folders if d.is_dir() for f in d.iterdir() if f.suffix == ".py" or f.is_dir()}
    near = [".".join(filter(None, (parent, n))) for n in difflib.get_close_matches(leaf, known, n=1)]
    return f"there is no module {missing} in {folder} (environment.path), on PYTHONPATH or installed{_mean(near)}"


def _mean(near: Sequence[str]) -> str:
    return f"; did you mean {near[0]!r}?" if near else ""


def _watch_parent(fd: int) -> None:
    """Ends this process when the service has gone, even if a call never returns: nobody would end it then."""
    hangup = select.poll()
    hangup.register(fd, 0)
    hangup.poll()
    os._exit(0)


def _start(folder: str, config_json: str) -> Any:
    sys.stdin = open(os.devnull)  # noqa: SIM115
    os.chdir(folder)
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    faulthandler.enable()  # a crash or a killed call leaves its stack in the service's log
    faulthandler.register(signal.SIGXCPU, all_threads=False, chain=True)
    faulthandler.register(signal.SIGUSR1)
    return Worker(config_json).answer


def main() -> None:
    """Serves until standard input closes. The settings are the folder to work in and the configuration as JSON."""
    requests = os.dup(0)
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)  # programs that an environment starts must not read requests
    sys.stdin = stream = io.TextIOWrapper(os.fdopen(requests, "rb"))
    threading.Thread(target=_watch_parent, args=(requests,), name="parent", daemon=True).start()
    serve(_start)
    stream.close()
