"""Environments of one's own in worker processes: whatever they do, the service lives and says what happened."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tiny_model import TEXTS

from rollout.chat import Chat, load_tokenizer
from rollout.engine.scripted import ScriptedEngine
from rollout.environment import Environment, EnvironmentFactory, StepResult, make_environment_factory
from rollout.environment_host import Host
from rollout.environment_worker import MAX_TEXT_CHARS
from rollout.episode import EpisodeSettings, run_batch
from rollout.errors import InfrastructureError, UserError
from rollout.types import SamplingParams, Task, Turn
from sqlrl_jax.config import Config
from sqlrl_jax.data.demo.tokenizer import train_tokenizer
from sqlrl_jax.metrics import eval_metrics, rollout_metrics

GAME = '''
import ctypes, os, random, subprocess, sys, threading, time
from dataclasses import dataclass

from rollout.environment import Environment, StepResult
from rollout.types import Turn

class Game(Environment):
    """Does what the action says; remembers all actions."""

    @classmethod
    def open_shared(cls, config):
        with open(config.environment.settings["log"], "a") as log:
            log.write(f"open {os.getpid()}\\n")
        return {"calls": 0}

    def reset(self, task):
        self.past = []
        if task.fields.get("reset"):
            return getattr(self, task.fields["reset"])()
        return f"{task.id} {task.source} {task.fields['max_turns']}"

    def step(self, action, turn):
        self.past.append(action)
        self.shared["calls"] += 1
        if action == "win":
            return StepResult(reward=2, done=True)
        if action == "lose":
            return StepResult("no", -1.0, done=True)
        if hasattr(self, action):
            return getattr(self, action)() or StepResult("went on")
        return StepResult(" ".join(self.past), 0.5, metrics={"calls": turn}, turn=Turn(action, status="said"))

    def close(self):
        with open(self.settings["log"], "a") as log:
            log.write(f"close {' '.join(self.past)}\\n")

    def fails(self): return {}["number"]
    def exits(self): os._exit(3)
    def leaves(self): sys.exit("goodbye")
    def crashes(self): ctypes.string_at(0)
    def waits(self): time.sleep(1000)
    def burns(self):
        while True: pass
    def prints(self):
        print("words on standard output" * 10_000)
        os.system("echo from a shell")
        ctypes.CDLL(None).puts(b"from C")
    def reads(self):
        heard = subprocess.run(["cat"], capture_output=True).stdout
        return StepResult(repr((heard, sys.stdin.read())))
    def rolls(self): return StepResult(str(random.random()))
    def shared_calls(self): return StepResult(str(self.shared["calls"]))
    def where(self): return StepResult(os.getcwd())
    def process(self): return StepResult(str(os.getpid()))
    def half(self): return StepResult("\\ud800 half", metrics={"\\ud800": 1})
    def forks(self): os.fork()
    def tells(self):
        error = ValueError("first line\\nsecond line")
        error.add_note("and a note")
        raise error
    def endless(self): return StepResult("x" * 50_000_000)

class Plain:
    pass
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_game.py").write_text(GAME)
    (folder / "own_syntax.py").write_text("def broken(:\n")
    (folder / "own_raises.py").write_text("VALUE = 1 / 0\n")
    (folder / "own_exits.py").write_text("import os\nos._exit(7)\n")
    (folder / "own_needs.py").write_text("import no_such_package_at_all.part\n")
    (folder / "own_opens.py").write_text(
        "from rollout.environment import Environment\n"
        "class Shut(Environment):\n"
        "    @classmethod\n"
        "    def open_shared(cls, config): return open('no/such/file')\n"
    )
    return folder


def config(folder: Path, name: str = "own_game:Game", **environment: Any) -> Config:
    values = {"workers": 1, "timeout": 0.1, "stall_timeout": 20.0, **environment}
    section = {"env_class": name, "path": str(folder), "settings": {"log": str(folder / "log")}, **values}
    return Config.model_validate({"environment": section})


@contextmanager
def games(folder: Path, **environment: Any) -> Iterator[Callable[..., Environment]]:
    """Makes episodes that have been reset."""
    with make_environment_factory(config(folder, **environment)) as factory:

        def start(task_id: str = "t1", **fields: Any) -> Environment:
            game = factory.create()
            game.reset(Task(task_id, "unit", {"max_turns": 9, **fields}))
            return game

        yield start


@pytest.fixture(scope="module")
def start(folder: Path) -> Iterator[Callable[..., Environment]]:
    with games(folder) as start:
        yield start


def host(game: Environment) -> Host:
    assert isinstance(game.shared, Host)
    return game.shared


def test_calls_and_results_cross_the_door(folder: Path) -> None:
    with make_environment_factory(config(folder)) as factory:
        game = factory.create()
        task = Task("t1", "unit", {"max_turns": 9})
        assert game.reset(task) == [{"role": "user", "content": "t1 unit 9"}]
        first = game.step("hello", 1)
        assert first == StepResult("hello", 0.5, turn=Turn("hello", status="said"), metrics={"environment/calls": 1.0})
        assert game.step("again", 2).observation == "hello again"
        win = game.step("win", 3)
        assert (win.reward, win.done, win.outcome) == (2.0, True, "correct")
        lost = factory.create()
        lost.reset(task)
        assert (lost.step("lose", 1).outcome, lost.finish().outcome) == ("wrong", "malformed")


def test_the_service_never_imports_the_users_module(start: Callable[..., Environment]) -> None:
    import sys

    start()
    assert "own_game" not in sys.modules


@pytest.mark.parametrize(
    ("action", "message"),
    [
        ("fails", r"step of task 'q7', turn 4: KeyError: 'number' \(own_game\.py, line \d+, in fails\)"),
        ("tells", r"step of task 'q7', turn 4: ValueError: first line \(own_game\.py, line \d+, in tells\)"),
        ("leaves", r"step of task 'q7', turn 4: SystemExit: goodbye"),
        ("exits", r"step of task 'q7', turn 4: its worker process ended with exit status 3"),
        ("crashes", r"step of task 'q7', turn 4: its worker process ended with signal SIGSEGV"),
    ],
)
def test_a_fault_is_infrastructure_and_its_neighbour_does_not_notice(
    start: Callable[..., Environment], action: str, message: str
) -> None:
    neighbour, game = start("n"), start("q7")
    neighbour.step("one", 1)
    with pytest.raises(InfrastructureError, match=f"^environment own_game:Game: {message}"):
        game.step(action, 4)
    assert neighbour.step("two", 2).observation == "one two"


def test_a_call_past_its_cpu_time_ends_the_episode_as_timeout(start: Callable[..., Environment]) -> None:
    neighbour, game = start(), start()
    neighbour.step("one", 1)
    step = game.step("burns", 1)
    assert (step.done, step.outcome, step.reward) == (True, "timeout", 0.0)
    assert step.turn is not None
    assert (step.turn.action, step.turn.status) == ("burns", "timeout")
    assert "environment.timeout" in step.turn.observation
    assert neighbour.step("two", 2).observation == "one two"


def test_a_reset_past_its_cpu_time_is_not_the_models_fault(start: Callable[..., Environment]) -> None:
    with pytest.raises(InfrastructureError, match=r"reset of task 't1': took more than 0\.1 s of CPU time"):
        start(reset="burns")


def test_a_call_that_stands_still_is_infrastructure(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with games(folder, stall_timeout=0.3) as start:
        neighbour, game = start(), start()
        with pytest.raises(InfrastructureError, match=r"turn 1: neither answers nor computes for 0\.3 s"):
            game.step("waits", 1)
        assert neighbour.step("fine", 1).observation == "fine"
    assert "in waits" in capfd.readouterr().err  # where it stood


def test_standard_input_and_output_are_not_the_pipes(
    start: Callable[..., Environment], capfd: pytest.CaptureFixture[str]
) -> None:
    game = start()
    assert game.step("prints", 1).observation == "went on"
    assert game.step("reads", 2).observation == "(b'', '')"
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "words on standard output" in captured.err
    assert "from a shell" in captured.err


def test_an_environment_that_answers_otherwise_when_repeated_is_told_apart(start: Callable[..., Environment]) -> None:
    dice, game = start("dice"), start()
    dice.step("rolls", 1)
    with pytest.raises(InfrastructureError, match="exit status 3"):
        game.step("exits", 1)
    with pytest.raises(InfrastructureError, match=r"task 'dice' in a new worker.*answered otherwise.*seed"):
        dice.step("hello", 2)


def test_shared_things_are_opened_once_a_worker_and_closed_episodes_are_let_go(folder: Path) -> None:
    log = folder / "log"
    log.unlink(missing_ok=True)
    with games(folder, workers=2) as start:
        playing = [start(str(n)) for n in range(6)]
        for game in playing:
            game.step("hello", 1)
        assert [game.step("shared_calls", 2).observation for game in playing] == ["4", "4", "5", "5", "6", "6"]
        for game in playing:
            game.close()
        lines = log.read_text().splitlines()
        assert len({line for line in lines if line.startswith("open")}) == 2
        assert lines.count("close hello shared_calls") == 6
        assert [slot.environments for slot in host(playing[0])._slots] == [0, 0]
        with pytest.raises(InfrastructureError, match="KeyError"):  # it is gone there
            playing[0].step("hello", 3)


def test_many_episodes_at_once_keep_their_own_state(folder: Path) -> None:
    with games(folder, workers=2) as start, ThreadPoolExecutor(16) as pool:

        def play(number: int) -> str:
            game = start(str(number))
            for turn in range(1, 6):
                if number % 16 == 3 and turn == 3:
                    with pytest.raises(InfrastructureError):
                        game.step("exits", turn)
                    return "gone"
                seen = game.step(f"{number}.{turn}", turn).observation
                assert seen == " ".join(f"{number}.{t}" for t in range(1, turn + 1))
            game.close()
            return "played"

        assert list(pool.map(play, range(48))).count("played") == 45


def test_closing_ends_calls_that_are_still_running(folder: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        with games(folder) as start:
            game = start()
            (pid,) = host(game).worker_pids()
            waiting = pool.submit(game.step, "waits", 1)
            while not waiting.running():
                time.sleep(0.01)
            time.sleep(0.2)
        with pytest.raises(InfrastructureError, match="closed"):
            waiting.result()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with pytest.raises(InfrastructureError, match="closed"):
        game.step("hello", 1)


def test_a_worker_ends_with_the_service_even_in_a_call_that_never_returns(folder: Path) -> None:
    with games(folder) as start:
        game = start()
        worker = host(game)._slots[0].worker
        assert worker is not None
        pid = worker.pid
        os.write(worker._stdin.fileno(), _frame(("step", 0, "waits", 1)))
        worker._stdin.close()  # what the kernel does when the service dies
        assert worker._process.wait(timeout=30) == 0
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def _frame(content: tuple[Any, ...]) -> bytes:
    from rollout.worker_process import frame

    return frame(content)


def test_a_process_that_forks_answers_once(start: Callable[..., Environment]) -> None:
    game = start()
    assert game.step("forks", 1).observation == "went on"
    for turn in range(2, 6):
        assert game.step(f"turn {turn}", turn).metrics == {"environment/calls": turn}


def test_paths_are_the_services(start: Callable[..., Environment]) -> None:
    assert start().step("where", 1).observation == os.getcwd()


def test_text_that_cannot_be_sent_is_mended(start: Callable[..., Environment]) -> None:
    half = start().step("half", 1)
    assert (half.observation, half.metrics) == ("? half", {"environment/?": 1.0})
    assert start().step("endless", 1).observation == "x" * MAX_TEXT_CHARS


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("text2sq", r"expected text2sql or calculator or package\.module:Class; did you mean 'text2sql'\?"),
        ("own_game.Game", r"did you mean 'own_game:Game'\?"),
        ("own_game:", r"expected text2sql or calculator or package\.module:Class$"),
        ("own_game:Gane", r"own_game\.py has no class Gane; did you mean 'own_game:Game'\?"),
        ("own_game:Plain", r"Plain is not a subclass of rollout\.environment\.Environment"),
        ("own_gama:Game", r"no module own_gama in .*own.*\(environment\.path\).*did you mean 'own_game'\?"),
        ("own_syntax:X", r"own_syntax\.py, line 1: "),
        ("own_raises:X", r"importing own_raises failed: ZeroDivisionError: division by zero \(own_raises\.py, line 1"),
        ("own_exits:X", r"its worker process ended with exit status 7 while it was loaded"),
        ("own_needs:X", r"own_needs needs the package no_such_package_at_all, which is not installed"),
        ("own_opens:Shut", r"open_shared failed: FileNotFoundError: .*\(own_opens\.py, line 4, in open_shared\)"),
    ],
)
def test_a_class_that_cannot_be_used_is_told_at_once(folder: Path, name: str, message: str) -> None:
    with pytest.raises(UserError, match=rf"^environment\.env_class = '{name}': .*{message}"):
        make_environment_factory(config(folder, name))


def test_the_module_is_found_by_working_folder_and_pythonpath(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    with make_environment_factory(
        config(Path(".")),
    ):
        pass
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no module own_game"):
        make_environment_factory(config(Path(".")))
    monkeypatch.syspath_prepend(str(folder))  # what PYTHONPATH does to the service
    with make_environment_factory(config(Path("."))):
        pass


def test_an_episode_through_the_door_adds_its_steps_rewards(folder: Path, tmp_path: Path) -> None:
    train_tokenizer(TEXTS, tmp_path, 320)
    chat = Chat(load_tokenizer(tmp_path))
    limits = EpisodeSettings(max_turns=3, max_input_length=400, max_prompt_length=200)
    scripts = [["one", "two", "win"], ["one", "burns"], ["one", "two", "three"], ["one", "fails"]]

    async def play(factory: EnvironmentFactory) -> list[Any]:
        engine = ScriptedEngine([[chat.encode_action(a, end=False) for a in s] for s in scripts], max_context=1000)
        tasks = [Task(str(n), "unit", {}) for n in range(len(scripts))]
        return await run_batch(tasks, 1, engine, factory.create, chat, limits, SamplingParams(max_tokens=50), seed=0)

    with make_environment_factory(config(folder)) as factory:
        won, slow, unfinished, failed = asyncio.run(play(factory))
    assert [turn.reward for turn in won.turns] == [0.5, 0.5, 2.0]
    assert (won.reward, won.outcome, won.stop_reason) == (3.0, "correct", "solution")
    assert [turn.status for turn in won.turns] == ["said", "said", "solution"]
    assert won.metrics["environment/calls"] == 2.0
    assert (slow.reward, slow.outcome, slow.stop_reason) == (0.5, "timeout", "timeout")
    assert (unfinished.reward, unfinished.outcome, unfinished.stop_reason) == (1.5, "malformed", "max_turns")
    assert (failed.reward, failed.outcome) == (0.0, "infrastructure")
    assert "KeyError: 'number'" in failed.error
    metrics = rollout_metrics([won, slow, unfinished])
    assert metrics["reward/avg_raw_reward"] == pytest.approx(5 / 3)
    assert metrics["environment/calls"] == pytest.approx((2 + 1 + 3) / 3)
    assert eval_metrics([won, slow, unfinished])["eval/environment/calls"] == pytest.approx(2.0)
    assert metrics["sql/queries"] == metrics["generate/looked_first"] == 0
