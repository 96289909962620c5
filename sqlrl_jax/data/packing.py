"""Episodes of any length → packed rows, in micro-batches of one shape or of a few.

Padding was 40% of the tokens of a padded batch, so several episodes share a row. A token's reach keeps them apart in
attention: the place in the row from which it is not seen any more, the end of its episode, or of the last one that begins
with it (rows.py says which share a row, and what of them is stored once). Positions restart for each episode. Beside the
rows lies a flat list of the trained tokens: where the hidden state is that predicts each, the token itself, and what the
loss needs. The head then runs on those alone. Everything here is NumPy on the host, and the same input always gives the
same arrays.

A token of a long row costs more attention than one of a short row, whatever shares the row with it, so rows may have a few
lengths: each is one more program to compile. All micro-batches hold the same number of tokens, in fewer long rows or more
short ones. Left out: cutting an episode over two rows (its tail would not see its head).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from rollout.types import Trajectory
from sqlrl_jax.config import PolicyConfig
from sqlrl_jax.data.rows import Rows, apart, assign_buckets, check_rows, common_prefix, trie


@dataclass(frozen=True)
class Sample:
    """One sequence to train on. All arrays have the length of `tokens`; the first token has no prediction to train.

    `weights` are the tokens' shares in the loss, before division by the sum of the minibatch's divisors; a sample's is
    the sum of its weights unless `divisor` says otherwise.
    """

    name: str
    tokens: Int[np.ndarray, " n"]
    trained: Bool[np.ndarray, " n"]
    rollout_logprobs: Float[np.ndarray, " n"]
    advantages: Float[np.ndarray, " n"]
    weights: Float[np.ndarray, " n"]
    divisor: float | None = None

    @property
    def own(self) -> int:
        """From where on its tokens are not stored once with another's: the first that is trained."""
        return int(np.argmax(self.trained)) if self.trained.any() else len(self.tokens)


# What a compiled step takes: rows [rows, row_tokens] and slots of trained tokens [shards, slots].
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class PackedBatch:
    """A minibatch in micro-batches of one shape for each length of row.

    `owners[m]` [shards, slots] is the sample of each slot of micro-batch m, -1 where padded; inside one sample the slots
    are in the order of its tokens. `tokens` are those of the samples, `stored` those of the rows, where what samples begin
    with may stand once.
    """

    micro_batches: list[Arrays]
    owners: list[Int[np.ndarray, "shards slots"]]
    total_weight: float
    samples: int
    tokens: int
    stored: int
    trained_tokens: int
    capacity: int

    def per_sample(self, values: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Values of trained tokens, one [shards, slots] array a micro-batch, back to one array a sample."""
        owner = self._flat_owners()
        edges = np.searchsorted(owner[self._order()], np.arange(self.samples + 1))
        flat = self.in_order(values)
        return [flat[a:b] for a, b in pairwise(edges)]

    def in_order(self, values: Sequence[np.ndarray]) -> np.ndarray:
        """The same as one flat array: sample by sample, token by token, however they were packed."""
        flat = np.concatenate([np.asarray(v).ravel() for v in values]) if self.owners else np.zeros(0)
        return flat[self._order()]

    def in_slots(self, flat: np.ndarray) -> list[np.ndarray]:
        """The inverse of `in_order`: one [shards, slots] array a micro-batch, zeros where padded."""
        out = np.zeros(self._flat_owners().shape, flat.dtype)
        out[self._order()] = flat
        shapes = [o.shape for o in self.owners]
        parts = np.split(out, np.cumsum([a * b for a, b in shapes])[:-1]) if shapes else []
        return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]

    def put(self, name: str, values: Sequence[Any]) -> None:
        """Adds to each micro-batch what became known only after packing: arrays [shards, slots], here or on devices."""
        for arrays, part in zip(self.micro_batches, values, strict=True):
            arrays[name] = part

    def _flat_owners(self) -> np.ndarray:
        return np.concatenate([o.ravel() for o in self.owners]) if self.owners else np.zeros(0, int)

    def _order(self) -> np.ndarray:
        """Used slots, flat over all micro-batches, in the order of their samples."""
        owner = self._flat_owners()
        return np.argsort(owner, kind="stable")[np.count_nonzero(owner < 0) :]


def by_question(trajectories: Sequence[Trajectory], size: int) -> list[list[list[int]]]:
    """Minibatches of `size` questions in order of appearance: [minibatch][question][index of an episode]."""
    questions: dict[str, list[int]] = {}
    for i, trajectory in enumerate(trajectories):
        questions.setdefault(trajectory.task_id, []).append(i)
    groups = list(questions.values())
    return [groups[start : start + size] for start in range(0, len(groups), size)]


def samples_of(
    trajectories: Sequence[Trajectory],
    advantages: Sequence[float | np.ndarray] | np.ndarray,
    loss_reduction: str,
    max_seq_len: int | None = None,
) -> list[Sample]:
    """A minibatch of episodes as training samples: the sampled tokens are trained.

    An advantage is one number an episode or one number a sampled token. Weights make the reduction, which divides by the
    number of what it is a mean over: token_mean gives each token 1, sequence_mean 1 / (tokens of its episode),
    prompt_mean 1 / (tokens of all episodes of its question), seq_mean_token_sum_norm 1 / max_seq_len.
    """
    if len(trajectories) != len(advantages):
        raise ValueError(f"{len(advantages)} advantages for {len(trajectories)} trajectories: expected one each")
    tokens_of: Counter[str] = Counter()
    for trajectory in trajectories:
        tokens_of[trajectory.task_id] += sum(trajectory.loss_mask)
    out = []
    for trajectory, advantage in zip(trajectories, advantages, strict=True):
        length, divisor = sum(trajectory.loss_mask), None
        if loss_reduction == "token_mean":
            weight = 1.0
        elif loss_reduction == "sequence_mean":
            weight = 1.0 / max(length, 1)
        elif loss_reduction == "prompt_mean":
            weight = 1.0 / max(tokens_of[trajectory.task_id], 1)
        elif loss_reduction == "seq_mean_token_sum_norm" and max_seq_len:
            weight, divisor = 1.0 / max_seq_len, float(length > 0)
        else:
            raise ValueError(f"no loss reduction {loss_reduction!r} with max_seq_len {max_seq_len}")
        out.append(_sample(trajectory, advantage, weight, divisor))
    return out


def _sample(trajectory: Trajectory, advantage: float | np.ndarray, weight: float, divisor: float | None) -> Sample:
    _check(trajectory)
    prompt = len(trajectory.prompt_ids)
    tokens = np.asarray([*trajectory.prompt_ids, *trajectory.response_ids], np.int32)
    trained, rollout = np.zeros(len(tokens), bool), np.zeros(len(tokens), np.float32)
    trained[prompt:] = np.asarray(trajectory.loss_mask, bool)
    rollout[prompt:] = trajectory.logprobs
    spread = np.zeros(len(tokens), np.float32)
    spread[trained] = advantage
    return Sample(
        name=f"task {trajectory.task_id} sample {trajectory.sample}",
        tokens=tokens,
        trained=trained,
        rollout_logprobs=rollout,
        advantages=spread,
        weights=np.where(trained, np.float32(weight), np.float32(0.0)),
        divisor=divisor,
    )


def _check(trajectory: Trajectory) -> None:
    sizes = {len(trajectory.response_ids), len(trajectory.loss_mask), len(trajectory.logprobs)}
    if len(sizes) != 1 or not trajectory.prompt_ids:
        raise ValueError(
            f"task {trajectory.task_id} sample {trajectory.sample}: prompt {len(trajectory.prompt_ids)}, response "
            f"{len(trajectory.response_ids)}, loss_mask {len(trajectory.loss_mask)}, logprobs "
            f"{len(trajectory.logprobs)} entries: expected a prompt, and one mask and logprob for each response token"
        )


def pack(
    samples: Sequence[Sample],
    *,
    row_tokens: int,
    rows_per_micro_batch: int,
    slot_multiple: int,
    shards: int = 1,
    buckets: Sequence[int] = (),
    share: bool = False,
    rows: Rows | None = None,
) -> PackedBatch:
    """Packs samples into micro-batches of `rows_per_micro_batch` rows, spread evenly over `shards` parts of the devices.

    Every micro-batch has the same shapes whatever the samples: the slots can hold every token of a shard's rows, rounded
    up to `slot_multiple` (the chunk of rl/logprobs.py); `count` says how many are used. `buckets` are shorter lengths that
    rows may have, as many rows more to a micro-batch. With `share`, what samples of a row begin with is stored once. `rows`
    are the samples of each row where the caller has assigned them; nothing is shared there. Raises ValueError naming the
    sample when one is longer than a row.
    """
    check_rows(row_tokens, rows_per_micro_batch, shards, buckets)
    for sample in samples:
        if len(sample.tokens) > row_tokens:
            raise ValueError(
                f"{sample.name}: {len(sample.tokens)} tokens do not fit a row of trainer.policy.row_tokens {row_tokens}; "
                f"raise it to at least the prompt plus the response (generator.max_input_length + max_generate_length)"
            )
    share = share and rows is None
    if rows is not None:
        plan = [(row_tokens, rows)]
    else:
        tokens = [s.tokens for s in samples]
        sequences = trie(tokens, [s.own for s in samples]) if share else apart([len(t) for t in tokens])
        plan = assign_buckets(sequences, row_tokens, rows_per_micro_batch, buckets)
    micro_batches, owners, stored = [], [], 0
    for length, of_length in plan:
        count = row_tokens * rows_per_micro_batch // length
        for part in _deal(of_length, samples, count, shards):
            arrays, owner, used = _fill(part, samples, length, count, slot_multiple, share)
            stored += used
            micro_batches.append(arrays)
            owners.append(owner)
    return PackedBatch(
        micro_batches=micro_batches,
        owners=owners,
        total_weight=float(sum(_divisor(s) for s in samples)),
        samples=len(samples),
        tokens=sum(len(s.tokens) for s in samples),
        stored=stored,
        trained_tokens=sum(int(m["mask"].sum()) for m in micro_batches),
        capacity=len(micro_batches) * rows_per_micro_batch * row_tokens,
    )


def pack_for(
    policy: PolicyConfig, samples: Sequence[Sample], shards: int, share: bool = False, rows: Rows | None = None
) -> PackedBatch:
    """`pack` into the rows of the configuration."""
    return pack(
        samples,
        row_tokens=policy.row_tokens,
        rows_per_micro_batch=policy.rows_per_micro_batch,
        slot_multiple=policy.logprob_chunk,
        shards=shards,
        buckets=policy.buckets if rows is None else (),
        share=share,
        rows=rows,
    )


def batch_shapes(
    rows: int, row_tokens: int, slot_multiple: int, shards: int
) -> dict[str, tuple[tuple[int, ...], type[np.generic]]]:
    """Shape and dtype of every array of a micro-batch as `pack` makes it."""
    slots = (shards, -(-(rows // shards) * row_tokens // slot_multiple) * slot_multiple)
    return {
        **dict.fromkeys(("tokens", "positions", "reach"), ((rows, row_tokens), np.int32)),
        **dict.fromkeys(("index", "targets", "episodes"), (slots, np.int32)),
        **dict.fromkeys(("rollout_logprobs", "advantages", "weights"), (slots, np.float32)),
        "mask": (slots, np.bool_),
        "count": ((), np.int32),
    }


def _divisor(sample: Sample) -> float:
    if sample.divisor is not None:
        return sample.divisor
    return float(sample.weights[1:][sample.trained[1:]].sum(dtype=np.float64))


def _trained_count(sample: Sample) -> int:
    return int(np.count_nonzero(sample.trained[1:]))


def _deal(
    rows: list[list[int]], samples: Sequence[Sample], rows_per_micro_batch: int, shards: int
) -> list[list[list[list[int]]]]:
    """Rows → [micro-batch][shard][row][sample], trained tokens balanced: most first, each to the emptiest with room."""
    per_shard = rows_per_micro_batch // shards
    n_parts = -(-len(rows) // rows_per_micro_batch) * shards
    parts: list[list[list[int]]] = [[] for _ in range(n_parts)]
    load = [0] * n_parts
    work = [sum(_trained_count(samples[i]) for i in row) for row in rows]
    for r in sorted(range(len(rows)), key=lambda r: (-work[r], r)):
        target = min((p for p in range(n_parts) if len(parts[p]) < per_shard), key=lambda p: (load[p], p))
        parts[target].append(rows[r])
        load[target] += work[r]
    return [parts[i : i + shards] for i in range(0, n_parts, shards)]


def _fill(
    part: list[list[list[int]]],
    samples: Sequence[Sample],
    row_tokens: int,
    n_rows: int,
    slot_multiple: int,
    share: bool,
) -> tuple[Arrays, np.ndarray, int]:
    """The arrays of a micro-batch, the owners of its slots, and how many tokens its rows hold."""
    shards = len(part)
    per_shard = n_rows // shards
    shapes = batch_shapes(n_rows, row_tokens, slot_multiple, shards)
    arrays: Arrays = {name: np.zeros(shape, dtype) for name, (shape, dtype) in shapes.items()}
    arrays["reach"][:] = row_tokens  # padding sees padding, so that it stays finite
    owner = np.full(arrays["index"].shape, -1, np.int32)
    used, stored = [0] * shards, 0
    for shard, shard_rows in enumerate(part):
        episode = 0
        for r, row in enumerate(shard_rows):
            here = {name: arrays[name][shard * per_shard + r] for name in ("tokens", "positions", "reach")}
            paths, end = _store(here, [samples[i] for i in row], share)
            stored += end
            for i, path in zip(row, paths, strict=True):
                sample = samples[i]
                at = np.flatnonzero(sample.trained[1:]) + 1  # the token at `at` is predicted one place before
                to = (shard, slice(used[shard], used[shard] + len(at)))
                arrays["index"][to] = r * row_tokens + path[at - 1]
                arrays["targets"][to] = sample.tokens[at]
                for name in ("rollout_logprobs", "advantages", "weights"):
                    arrays[name][to] = getattr(sample, name)[at]
                arrays["mask"][to] = True
                arrays["episodes"][to] = episode
                owner[to] = i
                episode += 1
                used[shard] += len(at)
    return arrays | {"count": np.asarray(max(used), np.int32)}, owner, stored


def _store(row: Arrays, samples: Sequence[Sample], share: bool) -> tuple[list[np.ndarray], int]:
    """Writes samples into a row, with `share` each without what it and the one before it begin with. Returns the place in
    the row of each token of each sample, and how many places are taken."""
    start, paths = 0, [np.zeros(0, np.int32)]
    for before, sample in zip([None, *samples], samples, strict=False):
        common = min(common_prefix(before.tokens, sample.tokens), sample.own) if share and before else 0
        row["reach"][paths[-1][common:]] = start
        end = start + len(sample.tokens) - common
        row["tokens"][start:end] = sample.tokens[common:]
        row["positions"][start:end] = np.arange(common, len(sample.tokens))
        paths.append(np.concatenate([paths[-1][:common], np.arange(start, end, dtype=np.int32)]))
        start = end
    row["reach"][paths[-1]] = start
    return paths[1:], start
