"""Packing: nothing lost, nothing doubled, whatever the lengths."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.types import Trajectory
from sqlrl_jax.config import ConfigError
from sqlrl_jax.data.packing import PackedBatch, Sample, pack, samples_of

ROW = 16


def trajectory(prompt: int, mask: list[int], task: str = "t", sample: int = 0) -> Trajectory:
    rng = np.random.default_rng([prompt, len(mask), sample])
    logprobs = [float(np.float32(-rng.random())) * m for m in mask]
    ids = rng.integers(1, 50, prompt + len(mask)).tolist()
    return Trajectory(task, "s", sample, ids[:prompt], ids[prompt:], mask, logprobs, [], 0.0, "wrong", "solution")


EPISODE = st.integers(1, 8).flatmap(
    lambda prompt: st.lists(st.integers(0, 1), min_size=0, max_size=ROW - prompt).map(lambda mask: (prompt, mask))
)
EPISODES = st.lists(EPISODE, max_size=14)


def make(
    episodes: list[tuple[int, list[int]]], shards: int, reduction: str = "token_mean", buckets: tuple[int, ...] = ()
) -> tuple[list[Sample], PackedBatch]:
    trajectories = [trajectory(p, m, f"t{i}", i) for i, (p, m) in enumerate(episodes)]
    samples = samples_of(trajectories, np.arange(len(episodes)) + 1.0, reduction)
    return samples, pack(
        samples, row_tokens=ROW, rows_per_micro_batch=4, slot_multiple=8, shards=shards, buckets=buckets
    )


@settings(max_examples=150, deadline=None)
@given(EPISODES, st.sampled_from([1, 2, 4]), st.sampled_from([(), (8,), (8, 4)]))
def test_every_token_once_and_every_prediction_from_the_token_before(
    episodes: list[tuple[int, list[int]]], shards: int, buckets: tuple[int, ...]
) -> None:
    samples, packed = make(episodes, shards, buckets=buckets)
    seen, found = [], []
    for arrays, owner in zip(packed.micro_batches, packed.owners, strict=True):
        assert arrays["tokens"].shape in [(4 * ROW // length, length) for length in (ROW, *buckets)]
        assert arrays["mask"].shape == (shards, -(-4 // shards * ROW // 8) * 8)
        assert int(arrays["count"]) == arrays["mask"].sum(1).max()
        rows = arrays["tokens"].reshape(shards, -1)
        reach, positions = (arrays[k].reshape(shards, -1) for k in ("reach", "positions"))
        for row, ends in zip(arrays["tokens"], arrays["reach"], strict=True):
            start = 0
            for end in dict.fromkeys(ends.tolist()):  # a sample lies in one piece; the last may be padding, of zeros
                assert (ends[start:end] == end).all()
                seen.append(tuple(row[start:end]))
                start = end
        for shard in range(shards):
            used = np.flatnonzero(arrays["mask"][shard])
            assert (used == np.arange(len(used))).all()
            assert len(set(arrays["index"][shard][used])) == len(used)
            for slot in used:
                place, sample = arrays["index"][shard, slot], samples[owner[shard, slot]]
                token = positions[shard, place] + 1  # the position of the token that is predicted
                assert reach[shard, place] == reach[shard, place + 1]
                assert rows[shard, place + 1] == arrays["targets"][shard, slot] == sample.tokens[token]
                assert arrays["rollout_logprobs"][shard, slot] == sample.rollout_logprobs[token]
                assert arrays["advantages"][shard, slot] == owner[shard, slot] + 1
                found.append((int(owner[shard, slot]), int(token)))
    assert sorted(s for s in seen if any(s)) == sorted(tuple(s.tokens) for s in samples)
    assert sorted(found) == [(i, int(t)) for i, s in enumerate(samples) for t in np.flatnonzero(s.trained)]
    assert packed.trained_tokens == len(found)
    assert packed.tokens == sum(len(s.tokens) for s in samples)


ALIKE = st.lists(
    st.tuples(st.integers(1, 4), st.integers(0, 3), st.lists(st.integers(0, 1), max_size=9), st.integers(0, 2)),
    max_size=14,
)


@settings(max_examples=200, deadline=None)
@given(ALIKE, st.sampled_from([1, 2]), st.sampled_from([(), (8,)]))
def test_where_samples_share_a_beginning_each_token_sees_what_it_would_alone(
    alike: list[tuple[int, int, list[int], int]], shards: int, buckets: tuple[int, ...]
) -> None:
    """Prompts of one or two ids (of a chat's beginning, say, or earlier turns) and responses drawn from few."""
    trajectories = []
    for i, (prompt, other, mask, seed) in enumerate(alike):
        ids = np.random.default_rng(seed).integers(1, 3, len(mask)).tolist()
        logprobs = [float(-i - n - 1) * m for n, m in enumerate(mask)]
        trajectories.append(
            Trajectory(
                *("t", "s", i, [7] * prompt + [other + 1] * (other > 0), ids, mask, logprobs),
                *([], 0.0, "wrong", "solution"),
            )
        )
    samples = samples_of(trajectories, np.arange(len(alike)) + 1.0, "token_mean")
    packed = pack(
        samples,
        row_tokens=ROW,
        rows_per_micro_batch=2,
        slot_multiple=8,
        shards=shards,
        buckets=buckets,
        share=True,
    )
    found = []
    for arrays, owner in zip(packed.micro_batches, packed.owners, strict=True):
        length = arrays["tokens"].shape[1]
        places = np.arange(length)
        seen = (places[:, None] >= places) & (places[:, None] < arrays["reach"][:, None, :])  # [row, query, key]
        assert seen[:, places, places].all()
        for shard, slot in zip(*np.nonzero(arrays["mask"]), strict=True):
            sample = samples[owner[shard, slot]]
            row, place = divmod(int(arrays["index"][shard, slot]), length)
            row += shard * (len(seen) // shards)
            before = np.flatnonzero(seen[row, place])
            token = len(before)
            assert arrays["tokens"][row, before].tolist() == sample.tokens[:token].tolist()
            assert arrays["positions"][row, before].tolist() == list(range(token))
            assert arrays["targets"][shard, slot] == sample.tokens[token]
            assert arrays["rollout_logprobs"][shard, slot] == sample.rollout_logprobs[token]
            found.append((int(owner[shard, slot]), token))
    assert sorted(found) == [(i, int(t)) for i, s in enumerate(samples) for t in np.flatnonzero(s.trained)]
    assert packed.trained_tokens <= packed.stored <= packed.tokens
    again = packed.per_sample([m["rollout_logprobs"] for m in packed.micro_batches])
    for got, sample in zip(again, samples, strict=True):
        np.testing.assert_array_equal(got, sample.rollout_logprobs[sample.trained])


def test_a_prompt_is_stored_once_for_the_episodes_of_its_question() -> None:
    prompt = trajectory(6, []).prompt_ids
    group = [Trajectory("t", "s", i, prompt, [i + 1] * 3, [1] * 3, [-1.0] * 3, [], 0.0, "", "") for i in range(3)]
    samples = samples_of(group, [0.0] * 3, "token_mean")
    how = {"row_tokens": ROW, "rows_per_micro_batch": 1, "slot_multiple": 8}
    shared, alone = (pack(samples, share=share, **how) for share in (True, False))
    assert (shared.stored, shared.tokens, len(shared.micro_batches)) == (15, 27, 1)
    assert (alone.stored, alone.tokens, len(alone.micro_batches)) == (27, 27, 3)


def test_what_is_sampled_is_stored_for_each_though_it_be_the_same() -> None:
    """So a row never trains more tokens than it has: equal answers are common late in training."""
    group = [Trajectory("t", "s", i, [1, 2], [3, 4, 5], [1, 0, 1], [-1.0] * 3, [], 0.0, "", "") for i in range(4)]
    packed = pack(
        samples_of(group, [0.0] * 4, "token_mean"),
        row_tokens=ROW,
        rows_per_micro_batch=1,
        slot_multiple=8,
        share=True,
    )
    assert (packed.stored, packed.trained_tokens) == (2 + 4 * 3, 8)


@settings(max_examples=50, deadline=None)
@given(EPISODES, st.sampled_from([(), (8, 4)]))
def test_per_sample_is_the_inverse(episodes: list[tuple[int, list[int]]], buckets: tuple[int, ...]) -> None:
    samples, packed = make(episodes, 2, buckets=buckets)
    flat = packed.in_order([m["rollout_logprobs"] for m in packed.micro_batches])
    for arrays, again in zip(packed.micro_batches, packed.in_slots(flat), strict=True):
        np.testing.assert_array_equal(arrays["rollout_logprobs"], again)
    back = packed.per_sample([m["rollout_logprobs"] for m in packed.micro_batches])
    assert len(back) == len(samples)
    for got, sample in zip(back, samples, strict=True):
        np.testing.assert_array_equal(got, sample.rollout_logprobs[sample.trained])


def test_weights_make_the_reduction() -> None:
    episodes = [(2, [1, 1, 0, 1]), (3, [1])]
    _, tokens = make(episodes, 1, "token_mean")
    assert tokens.total_weight == 4
    samples, sequences = make(episodes, 1, "sequence_mean")
    assert sequences.total_weight == pytest.approx(2)
    np.testing.assert_allclose(samples[0].weights[samples[0].trained], 1 / 3)


def test_trained_tokens_are_balanced_over_shards() -> None:
    _, packed = make([(2, [1] * n) for n in (14, 13, 12, 11, 2, 3, 1, 2) * 2], 4)
    for arrays in packed.micro_batches:
        counts = arrays["mask"].sum(1)
        assert counts.max() - counts.min() <= 14


def test_errors_name_the_episode() -> None:
    with pytest.raises(
        ValueError, match=r"task t0 sample 0: 21 tokens do not fit a row of trainer.policy.row_tokens 16"
    ):
        make([(20, [1])], 1)
    broken = trajectory(2, [1, 0])
    broken.logprobs.pop()
    with pytest.raises(ValueError, match="task t sample 0: prompt 2, response 2, loss_mask 2, logprobs 1"):
        samples_of([broken], [0.0], "token_mean")
    with pytest.raises(ConfigError, match="must be a multiple of the 3 parts"):
        make([(2, [1])], 3)
    with pytest.raises(ConfigError, match=r"row_buckets: 12 must be less than row_tokens 16 and divide the tokens"):
        make([(2, [1])], 1, buckets=(12,))
    with pytest.raises(ConfigError, match="row_buckets: 16 must be less than"):
        make([(2, [1])], 1, buckets=(16,))
