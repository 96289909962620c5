"""Episodes of any length → packed rows, in micro-batches of one shape or of a few.

Padding was 40% of the tokens of a padded batch, so several episodes share a row: segment ids keep them apart in attention
and positions restart for each. Beside the rows lies a flat list of the trained tokens: where the hidden state is that
predicts each, the token itself, and what the loss needs. The head then runs on those alone. Everything here is NumPy on
the host, and the same input always gives the same arrays.

A token of a long row costs more attention than one of a short row, whatever shares the row with it, so rows may have a few
lengths: each is one more program to compile. All micro-batches hold the same number of tokens, in fewer long rows or more
short ones. Left out: cutting an episode over two rows (its tail would not see its head).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from rollout.types import Trajectory
from sqlrl_jax.config import ConfigError, PolicyConfig


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


# What a compiled step takes: rows [rows, row_tokens] and slots of trained tokens [shards, slots].
Arrays = dict[str, np.ndarray]
# The samples of each row of one length.
Rows = list[list[int]]

# How full the rows of a shorter length must at least be: the first of these with the least attention is taken.
_FILLS = (1.0, 0.98, 0.96, 0.94, 0.92, 0.9, 0.85, 0.8)


@dataclass(frozen=True)
class PackedBatch:
    """A minibatch in micro-batches of one shape for each length of row.

    `owners[m]` [shards, slots] is the sample of each slot of micro-batch m, -1 where padded; inside one sample the slots
    are in the order of its tokens.
    """

    micro_batches: list[Arrays]
    owners: list[Int[np.ndarray, "shards slots"]]
    total_weight: float
    samples: int
    tokens: int
    trained_tokens: int
    capacity: int = field(default=0)

    @property
    def padding_fraction(self) -> float:
        return 1.0 - self.tokens / self.capacity if self.capacity else 0.0

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


def assign_rows(lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    """Which samples share each row: best-fit decreasing, so rows are at most 11/9 of the fewest possible plus one.

    Longest first; each goes into the fullest row that still has room. Ties go by index, so the result is a function of
    the lengths alone.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    rows: Rows = []
    by_room: dict[int, deque[int]] = {}  # open rows with exactly this much room
    rooms: list[int] = []  # its keys in order
    for i in order:
        place = bisect_left(rooms, lengths[i])
        if place == len(rooms):
            row, room = len(rows), row_tokens
            rows.append([])
        else:
            room = rooms[place]
            row = by_room[room].popleft()
            if not by_room[room]:
                del by_room[room], rooms[place]
        rows[row].append(i)
        left = room - lengths[i]
        if left not in by_room:
            by_room[left] = deque()
            insort(rooms, left)
        by_room[left].append(row)
    return rows


def assign_buckets(
    lengths: Sequence[int], row_tokens: int, rows_per_micro_batch: int, buckets: Sequence[int]
) -> list[tuple[int, Rows]]:
    """Rows of `row_tokens` and of the shorter lengths `buckets`, as (length, rows): as few micro-batches as a plan of this
    kind can have, and among those as short rows as possible.

    A plan fills short rows first, from the shortest length up, and keeps those that make whole micro-batches and are full
    to a threshold; what is left goes on to longer rows. Several thresholds are tried.
    """
    budget = row_tokens * rows_per_micro_batch
    plans = [[(row_tokens, assign_rows(lengths, row_tokens))]]
    plans += [_plan(lengths, row_tokens, budget, sorted(buckets), fill) for fill in _FILLS if buckets]

    def cost(plan: list[tuple[int, Rows]]) -> tuple[int, int]:
        counts = [(length, -(-len(rows) * length // budget)) for length, rows in plan]
        return sum(n for _, n in counts), sum(n * length for length, n in counts)

    return min(plans, key=cost)


def _plan(
    lengths: Sequence[int], row_tokens: int, budget: int, buckets: Sequence[int], fill: float
) -> list[tuple[int, Rows]]:
    rest, plan = list(range(len(lengths))), []
    for length in buckets:
        fitting = [i for i in rest if lengths[i] <= length]
        rows = [[fitting[j] for j in row] for row in assign_rows([lengths[i] for i in fitting], length)]
        used = [sum(lengths[i] for i in row) for row in rows]
        fullest = sorted((r for r in range(len(rows)) if used[r] >= fill * length), key=lambda r: (-used[r], r))
        kept = [rows[r] for r in fullest[: len(fullest) * length // budget * budget // length]]
        taken = {i for row in kept for i in row}
        rest = [i for i in rest if i not in taken]
        plan.append((length, kept))
    last = [[rest[j] for j in row] for row in assign_rows([lengths[i] for i in rest], row_tokens)]
    return [(length, rows) for length, rows in [(row_tokens, last), *reversed(plan)] if rows]


def pack(
    samples: Sequence[Sample],
    *,
    row_tokens: int,
    rows_per_micro_batch: int,
    slot_multiple: int,
    shards: int = 1,
    buckets: Sequence[int] = (),
    rows: Rows | None = None,
) -> PackedBatch:
    """Packs samples into micro-batches of `rows_per_micro_batch` rows, spread evenly over `shards` parts of the devices.

    Every micro-batch has the same shapes whatever the samples: the slots can hold every token of a shard's rows, rounded
    up to `slot_multiple` (the chunk of rl/logprobs.py); `count` says how many are used. `buckets` are shorter lengths that
    rows may have, as many rows more to a micro-batch. `rows` are the samples of each row where the caller has assigned
    them. Raises ValueError naming the sample when one is longer than a row.
    """
    check_rows(row_tokens, rows_per_micro_batch, shards, buckets)
    for sample in samples:
        if len(sample.tokens) > row_tokens:
            raise ValueError(
                f"{sample.name}: {len(sample.tokens)} tokens do not fit a row of trainer.policy.row_tokens {row_tokens}; "
                f"raise it to at least the prompt plus the response (generator.max_input_length + max_generate_length)"
            )
    if rows is None:
        plan = assign_buckets([len(s.tokens) for s in samples], row_tokens, rows_per_micro_batch, buckets)
    else:
        plan = [(row_tokens, rows)]
    micro_batches, owners = [], []
    for length, of_length in plan:
        count = row_tokens * rows_per_micro_batch // length
        for part in _deal(of_length, samples, count, shards):
            arrays, owner = _fill(part, samples, length, count, slot_multiple)
            micro_batches.append(arrays)
            owners.append(owner)
    return PackedBatch(
        micro_batches=micro_batches,
        owners=owners,
        total_weight=float(sum(_divisor(s) for s in samples)),
        samples=len(samples),
        tokens=sum(len(s.tokens) for s in samples),
        trained_tokens=sum(int(m["mask"].sum()) for m in micro_batches),
        capacity=len(micro_batches) * rows_per_micro_batch * row_tokens,
    )


def pack_for(policy: PolicyConfig, samples: Sequence[Sample], shards: int, rows: Rows | None = None) -> PackedBatch:
    """`pack` into the rows of the configuration."""
    return pack(
        samples,
        row_tokens=policy.row_tokens,
        rows_per_micro_batch=policy.rows_per_micro_batch,
        slot_multiple=policy.logprob_chunk,
        shards=shards,
        buckets=policy.buckets if rows is None else (),
        rows=rows,
    )


def check_rows(row_tokens: int, rows: int, shards: int, buckets: Sequence[int], sequence: int = 1) -> None:
    """Raises ConfigError where rows of these lengths cannot be dealt evenly to `shards` parts of a batch, or a row's tokens
    to the `sequence` devices that share it."""
    parts = f"the {shards} parts the mesh splits a batch into (data x fsdp)"
    if rows % shards:
        raise ConfigError(f"trainer.policy.rows_per_micro_batch {rows} must be a multiple of {parts}")
    for length in buckets:
        if not 0 < length < row_tokens or rows * row_tokens % (length * shards):
            raise ConfigError(
                f"trainer.policy.row_buckets: {length} must be less than row_tokens {row_tokens} and divide the tokens of "
                f"a micro-batch, {rows} x {row_tokens}, into a number of rows that is a multiple of {parts}"
            )
    for name, length in [("row_tokens", row_tokens), *(("row_buckets", length) for length in buckets)]:
        if length % sequence:
            raise ConfigError(f"trainer.policy.{name}: {length} must be a multiple of trainer.mesh.sequence {sequence}")


def batch_shapes(
    rows: int, row_tokens: int, slot_multiple: int, shards: int
) -> dict[str, tuple[tuple[int, ...], type[np.generic]]]:
    """Shape and dtype of every array of a micro-batch as `pack` makes it."""
    slots = (shards, -(-(rows // shards) * row_tokens // slot_multiple) * slot_multiple)
    return {
        **dict.fromkeys(("tokens", "positions", "segment_ids"), ((rows, row_tokens), np.int32)),
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
    part: list[list[list[int]]], samples: Sequence[Sample], row_tokens: int, n_rows: int, slot_multiple: int
) -> tuple[Arrays, np.ndarray]:
    shards = len(part)
    per_shard = n_rows // shards
    shapes = batch_shapes(n_rows, row_tokens, slot_multiple, shards)
    arrays: Arrays = {name: np.zeros(shape, dtype) for name, (shape, dtype) in shapes.items()}
    owner = np.full(arrays["index"].shape, -1, np.int32)
    used = [0] * shards
    for shard, shard_rows in enumerate(part):
        episode = 0
        for r, row in enumerate(shard_rows):
            start = 0
            for segment, i in enumerate(row, start=1):
                sample = samples[i]
                n = len(sample.tokens)
                span = (shard * per_shard + r, slice(start, start + n))
                arrays["tokens"][span] = sample.tokens
                arrays["positions"][span] = np.arange(n)
                arrays["segment_ids"][span] = segment
                at = np.flatnonzero(sample.trained[1:]) + 1  # the token at `at` is predicted one place before
                to = (shard, slice(used[shard], used[shard] + len(at)))
                arrays["index"][to] = r * row_tokens + start + at - 1
                arrays["targets"][to] = sample.tokens[at]
                for name in ("rollout_logprobs", "advantages", "weights"):
                    arrays[name][to] = getattr(sample, name)[at]
                arrays["mask"][to] = True
                arrays["episodes"][to] = episode
                owner[to] = i
                episode += 1
                used[shard] += len(at)
                start += n
    return arrays | {"count": np.asarray(max(used), np.int32)}, owner
