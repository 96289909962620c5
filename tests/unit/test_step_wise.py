"""Episodes trained on turn by turn: contexts as they were fed, credit by episode, the same step where none was rewritten."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import test_learner
from hypothesis import given
from hypothesis import strategies as st
from shared_programs import shared_programs
from test_episode import LOOK, PARAMS, SETTINGS, SOLVE, Echo
from test_learner import advantages, leaves, on_policy
from tiny_model import TEXTS

from rollout.chat import Chat, load_tokenizer
from rollout.engine.scripted import ScriptedEngine
from rollout.episode import run_batch
from rollout.types import Task, Trajectory, Turn
from rollout.wire import trajectory_from_proto, trajectory_to_proto
from sqlrl_jax.credit import learn
from sqlrl_jax.data.demo.tokenizer import train_tokenizer
from sqlrl_jax.rl.advantages import load_estimator
from sqlrl_jax.rl.steps import Parts, steps_of

# As Qwen3's: of an assistant's earlier message only what follows the thought.
DROPS_THOUGHTS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and '</think>' in m.content %}{{ m.content.split('</think>')[-1].lstrip('\n') }}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
THOUGHT = "<think>\nfirst the tables\n</think>\n\n"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS, folder, 320)
    return load_tokenizer(folder)


def play(tokenizer: Any, chat: Chat, *turns: str) -> tuple[Trajectory, Echo]:
    engine = ScriptedEngine([[chat.encode_action(t, end=False) for t in turns]], max_context=1000)
    environment, task = Echo(), Task("t1", "unit", {"question": "which?"})
    batch = run_batch([task], 1, engine, lambda: environment, chat, SETTINGS, PARAMS, seed=0)
    return asyncio.run(batch)[0], environment  # type: ignore[arg-type]


def test_a_template_that_drops_thoughts_renders_each_turns_context(tokenizer: Any) -> None:
    tokenizer.chat_template, kept = DROPS_THOUGHTS, tokenizer.chat_template
    try:
        chat = Chat(tokenizer, conversation=True, step_wise=True)
        episode, environment = play(tokenizer, chat, THOUGHT + LOOK, THOUGHT + LOOK, THOUGHT + SOLVE)
        messages = [{"role": "user", "content": "which?"}]
        looked = [{"role": "assistant", "content": LOOK}, {"role": "user", "content": environment.observation}]
        wanted = [chat.prompt_ids([*messages, *looked * turn]) for turn in range(3)]  # type: ignore[list-item]
        assert episode.contexts == wanted
        assert "first the tables" not in chat.decode(episode.contexts[2])
        episode.spans = [(0, 0, len(episode.response_ids))]  # the scripted engine's version is none that can be sent
        steps = steps_of(trajectory_from_proto(trajectory_to_proto(episode)))
        assert [step.prompt_ids for step in steps] == wanted
        assert [chat.decode(step.response_ids) for step in steps] == [THOUGHT + LOOK, THOUGHT + LOOK, THOUGHT + SOLVE]
        assert not Chat(tokenizer, conversation=True).rewrites_history
        assert not Chat(tokenizer, step_wise=True).rewrites_history
    finally:
        tokenizer.chat_template = kept


@pytest.mark.parametrize("conversation", [False, True])
def test_where_nothing_is_rewritten_a_context_is_the_beginning_of_the_episode(
    tokenizer: Any, conversation: bool
) -> None:
    chat = Chat(tokenizer, conversation=conversation, step_wise=True)
    episode, _ = play(tokenizer, chat, THOUGHT + LOOK, SOLVE)
    assert episode.contexts == []
    first, second = steps_of(episode)
    assert first.prompt_ids == episode.prompt_ids
    whole = episode.prompt_ids + episode.response_ids
    assert second.prompt_ids + second.response_ids == whole
    assert [sum(step.loss_mask) for step in (first, second)] == [turn.tokens for turn in episode.turns]
    assert (second.reward, second.task_id, second.sample) == (1.0, "t1", 0)


def turned(seed: int = 0) -> list[Trajectory]:
    """test_learner's episodes with their runs of sampled tokens as turns, and rewards."""
    rng, out = np.random.default_rng(seed + 50), []
    for episode in test_learner.episodes(seed=seed):
        runs = "".join(map(str, episode.loss_mask)).split("0")
        turns = [Turn("a", tokens=len(run)) for run in runs if run]
        turns[-1].reward = float(rng.integers(2))
        out.append(dataclasses.replace(episode, turns=turns, reward=turns[-1].reward))
    return out


def test_spans_and_logprobs_go_with_their_tokens() -> None:
    [episode] = turned()[:1]
    size = len(episode.response_ids)
    episode = dataclasses.replace(episode, spans=[(3, 0, 2), (4, 2, size)])
    steps, at = steps_of(episode), np.flatnonzero(episode.loss_mask)
    for name in ("response_ids", "logprobs"):
        joined = [x for step in steps for x in getattr(step, name)]
        assert joined == [getattr(episode, name)[i] for i in at]
    versions = [v for step in steps for v, start, end in step.spans for _ in range(start, end)]
    assert versions == [3 if i < 2 else 4 for i in at]
    with pytest.raises(ValueError, match="1 contexts for"):
        steps_of(dataclasses.replace(episode, contexts=[[1]]))


@given(st.integers(0, 50))
def test_split_undoes_join(seed: int) -> None:
    rng, parts = np.random.default_rng(seed), Parts(turned(seed), True)
    values = [rng.random(sum(sample.loss_mask)) for sample in parts.samples]
    for got, want in zip(parts.split(parts.join(values)), values, strict=True):
        np.testing.assert_array_equal(got, want)
    numbers = rng.random(12)
    assert [float(x) for x in parts.split(numbers)] == [numbers[owner] for owner in parts.owners]


@pytest.fixture(scope="module", autouse=True)
def _compile_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with shared_programs(tmp_path_factory.mktemp("xla")):
        yield


@pytest.mark.parametrize("estimator", ["grpo", "reinforce++"])
def test_prefixes_make_the_step_of_whole_episodes(estimator: str) -> None:
    """Token by token the contexts are the same, so are the gradients; episodes are counted, not their turns."""
    results = []
    for step_wise in (False, True):
        subject = test_learner.learner(
            "trainer.policy.remat=none", f"generator.step_wise_trajectories={str(step_wise).lower()}"
        )
        batch = on_policy(subject, turned())
        results.append((learn(subject, load_estimator(estimator), batch), leaves(subject.state.opt_state[0].mu)))
    (whole, want), (parts, got) = results
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * np.abs(b).max())
    for name in ("policy/episodes", "policy/trained_episodes", "policy/trained_tokens", "policy/loss"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-4, abs=1e-6)  # whitened advantages add up to 0
    assert parts["policy/trained_samples"] > whole["policy/trained_samples"] == whole["policy/trained_episodes"]


def test_episodes_that_ran_out_of_tokens_are_left_out_with_all_their_turns() -> None:
    subject = test_learner.learner(
        "trainer.policy.remat=none",
        "generator.step_wise_trajectories=true",
        "generator.apply_overlong_filtering=true",
        "trainer.algorithm.zero_variance_filter=false",
    )
    cut = [dataclasses.replace(e, stop_reason="length") if i % 3 == 0 else e for i, e in enumerate(turned())]
    metrics = learn(subject, load_estimator("grpo"), cut)
    assert metrics["policy/overlong_filtered"] == 4
    assert metrics["policy/trained_episodes"] == 8
    with pytest.raises(ValueError, match="advantages for"):
        subject.update(cut, advantages(cut)[:3])
