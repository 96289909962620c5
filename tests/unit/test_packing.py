"""Packing: nothing lost, nothing doubled, whatever the lengths."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.types import Trajectory
from sqlrl_jax.config import ConfigError
from sqlrl_jax.data.packing import PackedBatch, Sample, assign_buckets, assign_rows, pack, samples_of

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
        segments, positions = (arrays[k].reshape(shards, -1) for k in ("segment_ids", "positions"))
        for row, segment in zip(arrays["tokens"], arrays["segment_ids"], strict=True):
            for k in range(1, segment.max(initial=0) + 1):
                at = np.flatnonzero(segment == k)
                assert (np.diff(at) == 1).all()  # a segment lies in one piece
                seen.append(tuple(row[at]))
        for shard in range(shards):
            used = np.flatnonzero(arrays["mask"][shard])
            assert (used == np.arange(len(used))).all()
            assert len(set(arrays["index"][shard][used])) == len(used)
            for slot in used:
                place, sample = arrays["index"][shard, slot], samples[owner[shard, slot]]
                token = positions[shard, place] + 1  # the position of the token that is predicted
                assert segments[shard, place] == segments[shard, place + 1] > 0
                assert rows[shard, place + 1] == arrays["targets"][shard, slot] == sample.tokens[token]
                assert arrays["rollout_logprobs"][shard, slot] == sample.rollout_logprobs[token]
                assert arrays["advantages"][shard, slot] == owner[shard, slot] + 1
                found.append((int(owner[shard, slot]), int(token)))
    assert sorted(seen) == sorted(tuple(s.tokens) for s in samples)
    assert sorted(found) == [(i, int(t)) for i, s in enumerate(samples) for t in np.flatnonzero(s.trained)]
    assert packed.trained_tokens == len(found)
    assert packed.tokens == sum(len(s.tokens) for s in samples)


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


@given(st.lists(st.integers(1, 64), max_size=60))
def test_rows_are_few_and_never_overfull(lengths: list[int]) -> None:
    rows = assign_rows(lengths, 64)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 64 for row in rows)
    assert len(rows) <= 11 / 9 * -(-sum(lengths) // 64) + 1 or sum(n > 32 for n in lengths) > sum(lengths) / 64
    assert rows == assign_rows(list(lengths), 64)


def slowly_assigned(lengths: list[int], row_tokens: int) -> list[list[int]]:
    """Best fit by looking at every open row; of equally full ones the one that has been so for longest."""
    rows: list[list[int]] = []
    room: dict[int, tuple[int, int]] = {}  # row → (room, when it became so)
    for time, i in enumerate(sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))):
        fitting = [(*room[r], r) for r in room if room[r][0] >= lengths[i]]
        left, _, row = min(fitting, default=(row_tokens, time, len(rows)))
        if row == len(rows):
            rows.append([])
        rows[row].append(i)
        room[row] = left - lengths[i], time
    return rows


@given(st.lists(st.integers(1, 64), max_size=60))
def test_rows_are_those_of_the_plain_algorithm(lengths: list[int]) -> None:
    assert assign_rows(lengths, 64) == slowly_assigned(lengths, 64)


@given(st.lists(st.integers(1, 64), max_size=150), st.sampled_from([(32,), (16, 32), (32, 16, 8)]))
def test_short_rows_never_cost_a_micro_batch_more(lengths: list[int], buckets: tuple[int, ...]) -> None:
    plan = assign_buckets(lengths, 64, 2, buckets)
    assert plan == assign_buckets(list(lengths), 64, 2, buckets)
    assert sorted(i for _, rows in plan for row in rows for i in row) == list(range(len(lengths)))
    for length, rows in plan:
        assert all(sum(lengths[i] for i in row) <= length for row in rows)
        assert length == 64 or len(rows) * length % 128 == 0  # only whole micro-batches of short rows
    count = sum(-(-len(rows) * length // 128) for length, rows in plan)
    assert count <= -(-len(assign_rows(lengths, 64)) // 2)


def test_short_episodes_go_to_short_rows() -> None:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(8, 0.5, 1280), 500, 29000).astype(int).tolist()
    plan = assign_buckets(lengths, 32768, 4, (16384, 8192, 4096))
    tokens = {length: len(rows) * length for length, rows in plan}
    assert sum(lengths) / sum(tokens.values()) > 0.95
    assert sum(n * length for length, n in tokens.items()) / sum(tokens.values()) < 12_000


def test_realistic_episodes_fill_their_rows() -> None:
    lengths = np.random.default_rng(0).triangular(40, 60, 184, 256).astype(int).tolist()
    rows = assign_rows(lengths, 256)
    assert sum(lengths) / (len(rows) * 256) > 0.95


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
