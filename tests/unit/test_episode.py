"""Masks, limits and failures of the multi-turn episode, with a scripted engine and a small environment."""

import asyncio
import threading
from dataclasses import replace

import pytest
from tiny_model import TEXTS

from rollout.chat import Chat, load_tokenizer
from rollout.engine.scripted import ScriptedEngine
from rollout.environment import Environment, StepResult
from rollout.episode import EpisodeSettings, run_batch, sample_seed
from rollout.errors import InfrastructureError
from rollout.types import Generation, SamplingParams, Task, Turn
from sqlrl_jax.data.demo.tokenizer import train_tokenizer

SETTINGS = EpisodeSettings(max_turns=3, max_input_length=200, max_prompt_length=100)
PARAMS = SamplingParams(max_tokens=50)
LOOK, SOLVE = "<sql>SELECT 1</sql>", "<solution>SELECT 2</solution>"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS, folder, 320)
    return load_tokenizer(folder)


class Echo(Environment):
    """Rewards a solution; `observation` follows anything else."""

    def __init__(self, observation: str = "\n<observation>1</observation>\n", fail_at: int = 0) -> None:
        super().__init__(None, None)  # type: ignore[arg-type]
        self.observation, self.fail_at = observation, fail_at
        self.actions: list[str] = []
        self.threads: set[int] = set()

    def reset(self, task: Task):
        return [{"role": "user", "content": task.fields["question"]}]

    def step(self, action: str, turn: int) -> StepResult:
        self.threads.add(threading.get_ident())
        self.actions.append(action)
        if turn == self.fail_at:
            raise InfrastructureError("database gone")
        if self.fail_at == -turn:
            raise ZeroDivisionError("a bug")
        if "<solution>" in action:
            return StepResult(None, 1.0, True, "correct", Turn(action, status="solution"), {"sql/queries": 1.0})
        return StepResult(self.observation, turn=Turn(action, status="ok"))

    def finish(self) -> StepResult:
        return StepResult(None, 0.0, True, "malformed")


def play(tokenizer, turns, environment=None, settings=SETTINGS, params=PARAMS, conversation=False, **chat_options):
    chat = Chat(tokenizer, conversation=conversation, **chat_options)
    scripts = [[chat.encode_action(t, end=False) if isinstance(t, str) else t for t in turns]]
    engine = ScriptedEngine(scripts, max_context=1000)
    environment = environment or Echo()
    task = Task("t1", "unit", {"question": "which?"})
    [trajectory] = asyncio.run(run_batch([task], 1, engine, lambda: environment, chat, settings, params, seed=0))
    return trajectory, chat, environment


@pytest.mark.parametrize("conversation", [False, True])
def test_ids_and_mask_of_two_turns(tokenizer, conversation):
    trajectory, chat, environment = play(tokenizer, [LOOK, SOLVE], conversation=conversation)
    look, solve = (chat.encode_action(t, end=False) for t in (LOOK, SOLVE))
    between = chat.observation_ids(environment.observation, look)
    assert trajectory.prompt_ids == chat.prompt_ids([{"role": "user", "content": "which?"}])
    assert trajectory.response_ids == look + between + solve
    assert trajectory.loss_mask == [1] * len(look) + [0] * len(between) + [1] * len(solve)
    assert len(trajectory.logprobs) == len(trajectory.response_ids)
    assert trajectory.spans == [(-1, 0, len(trajectory.response_ids))]
    assert (trajectory.reward, trajectory.outcome, trajectory.stop_reason) == (1.0, "correct", "solution")
    assert environment.actions == [LOOK, SOLVE]
    assert [t.tokens for t in trajectory.turns] == [len(look), len(solve)]
    assert trajectory.metrics["sql/queries"] == 1.0
    assert threading.get_ident() not in environment.threads  # steps may block


def test_an_appended_end_of_turn_is_not_trained_on(tokenizer):
    trajectory, chat, _ = play(tokenizer, [LOOK, SOLVE], conversation=True)
    position = len(chat.encode_action(LOOK, end=False))
    assert trajectory.response_ids[position] in chat.end_ids
    assert trajectory.loss_mask[position] == 0


def test_a_sampled_end_of_turn_is_trained_on_and_not_shown(tokenizer):
    chat = Chat(tokenizer)
    ended = chat.encode_action(LOOK, end=True)
    trajectory, _, environment = play(tokenizer, [ended, SOLVE], conversation=True)
    assert trajectory.loss_mask[: len(ended)] == [1] * len(ended)
    assert environment.actions[0] == LOOK


def test_turns_used_up(tokenizer):
    trajectory, _, _ = play(tokenizer, [LOOK] * 3)
    assert (trajectory.outcome, trajectory.stop_reason, len(trajectory.turns)) == ("malformed", "max_turns", 3)
    assert trajectory.loss_mask[-1] == 1  # no observation after the last turn


def test_overflow_is_scored_and_labelled(tokenizer):
    environment = Echo(observation="x" * 300)
    trajectory, chat, _ = play(tokenizer, [LOOK, SOLVE], environment)
    assert (trajectory.outcome, trajectory.stop_reason, trajectory.reward) == ("overflow", "overflow", 0.0)
    assert trajectory.response_ids == chat.encode_action(LOOK, end=False)


def test_a_turn_at_the_length_limit_goes_to_the_environment_as_it_is(tokenizer):
    params = replace(PARAMS, max_tokens=3)
    trajectory, chat, environment = play(tokenizer, [LOOK] * 3, params=params)
    assert environment.actions[0] == chat.decode(chat.encode_action(LOOK, end=False)[:3])
    assert trajectory.stop_reason == "length"


def test_prompt_too_long(tokenizer):
    trajectory, _, environment = play(tokenizer, [SOLVE], settings=replace(SETTINGS, max_prompt_length=2))
    assert (trajectory.outcome, trajectory.response_ids, environment.actions) == ("prompt_too_long", [], [])


@pytest.mark.parametrize(("fail_at", "text"), [(2, "database gone"), (-2, "ZeroDivisionError: a bug")])
def test_failures_of_the_environment_are_told_apart(tokenizer, fail_at, text):
    trajectory, _, _ = play(tokenizer, [LOOK, SOLVE], Echo(fail_at=fail_at))
    assert (trajectory.outcome, trajectory.stop_reason, trajectory.error) == ("infrastructure", "error", text)
    assert len(trajectory.turns) == 1


class AbortingEngine(ScriptedEngine):
    def session(self, order):
        inner = super().session(order)

        async def generate(input_ids, params, seed):
            return Generation([5], [-1.0], "abort", [(0, 0, 1)])

        inner.generate = generate  # type: ignore[method-assign]
        return inner


def test_an_aborted_turn_is_never_scored(tokenizer):
    chat = Chat(tokenizer)
    engine = AbortingEngine([[]], max_context=1000)
    task = Task("t", "unit", {"question": "which?"})
    [trajectory] = asyncio.run(run_batch([task], 1, engine, Echo, chat, SETTINGS, PARAMS, seed=0))
    assert trajectory.outcome == "infrastructure"


def test_batch_order_callback_and_seeds(tokenizer):
    chat = Chat(tokenizer)
    solve = chat.encode_action(SOLVE, end=False)
    engine = ScriptedEngine([[solve]] * 6, max_context=1000)
    tasks = [Task(f"t{i}", "unit", {"question": "which?"}) for i in range(2)]
    seen: list[tuple[str, int]] = []
    out = asyncio.run(
        run_batch(tasks, 3, engine, Echo, chat, SETTINGS, PARAMS, 7, lambda t: seen.append((t.task_id, t.sample)))
    )
    pairs = [(f"t{i}", s) for i in range(2) for s in range(3)]
    assert [(t.task_id, t.sample) for t in out] == pairs
    assert sorted(seen) == pairs
    assert len({sample_seed(7, *pair) for pair in pairs}) == 6
    assert sample_seed(7, "t0", 1) == sample_seed(7, "t0", 1) != sample_seed(8, "t0", 1)
    assert all(0 <= sample_seed(s, "x", 0) < 2**63 for s in range(50))


def test_cancelling_a_batch_closes_every_session(tokenizer):
    closed: list[int] = []

    class Waiting(ScriptedEngine):
        def session(self, order):
            inner = super().session(order)

            async def generate(input_ids, params, seed):
                await asyncio.sleep(3600)

            inner.generate = generate  # type: ignore[method-assign]
            inner.close = lambda: closed.append(order)  # type: ignore[method-assign]
            return inner

    async def main():
        engine = Waiting([[]] * 3, max_context=1000)
        tasks = [Task("t", "unit", {"question": "which?"})]
        job = asyncio.ensure_future(run_batch(tasks, 3, engine, Echo, Chat(tokenizer), SETTINGS, PARAMS, 0))
        await asyncio.sleep(0)
        job.cancel()
        with pytest.raises(asyncio.CancelledError):
            await job

    asyncio.run(main())
    assert set(closed) == {0, 1, 2}
