"""Which samples share each row: bin packing in which what several samples begin with is stored once.

The episodes of a question have one prompt, turns of one episode that are trained apart begin with those before them, and
questions about one database often begin with its schema. In a row such a beginning stands once, before everything that
goes on from it; each of its tokens has a reach, the place in the row from which no token sees it any more, and to causal
attention that is all there is to say. So a beginning is computed once for a row, forward and backward (as in Prefix Grouper,
arXiv:2506.05433, for any depth of branching). It does not change the result beyond rounding: a token's hidden state
depends on what comes before it alone.

The sequences form a trie. Rows are filled from its leaves up: where branches meet, those that fit together beside their
common beginning are joined, so that what is alike for longest stays together. Left out: a token that two samples train is
never stored once, so that a row never trains more tokens than it has.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from sqlrl_jax.config import ConfigError

# The samples of each row of one length.
Rows = list[list[int]]

# How full the rows of a shorter length must at least be: the first of these with the least attention is taken.
_FILLS = (1.0, 0.98, 0.96, 0.94, 0.92, 0.9, 0.85, 0.8)


class Unit(NamedTuple):
    """Samples that go into one row, and how many tokens of it they take."""

    tokens: int
    samples: list[int]


class Trie(NamedTuple):
    """Sequences in the order of their tokens. `common[j]` is how many first tokens the j-th shares with the one before it."""

    lengths: Sequence[int]
    order: Sequence[int]
    common: Sequence[int]

    def of(self, chosen: set[int]) -> Trie:
        """The same of some of the sequences."""
        order, common, least = [], [], 0
        for i, shared in zip(self.order, self.common, strict=True):
            least = min(least, shared)
            if i in chosen:
                order.append(i)
                common.append(least)
                least = self.lengths[i]
        return Trie(self.lengths, order, common)


def apart(lengths: Sequence[int]) -> Trie:
    """Sequences of which nothing is stored once."""
    return Trie(lengths, range(len(lengths)), [0] * len(lengths))


def common_prefix(first: Int[np.ndarray, " n"], second: Int[np.ndarray, " m"]) -> int:
    """How many first tokens two sequences share."""
    size = min(len(first), len(second))
    differing = np.flatnonzero(first[:size] != second[:size])
    return int(differing[0]) if len(differing) else size


def trie(tokens: Sequence[Int[np.ndarray, " n"]], own: Sequence[int]) -> Trie:
    """Sequences as a trie; what the i-th has from place `own[i]` on is not shared with those before it."""
    order = sorted(range(len(tokens)), key=lambda i: (tokens[i].astype(">u4").tobytes(), i))  # big-endian: as numbers
    common = [min(common_prefix(tokens[i], tokens[j]), own[j]) for i, j in pairwise(order)]
    return Trie([len(t) for t in tokens], order, [0, *common] if order else [])


def assign_rows(lengths: Sequence[int], row_tokens: int) -> Rows:
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


def assign_sharing(sequences: Trie, row_tokens: int) -> list[Unit]:
    """Rows of at most `row_tokens` with what their samples share stored once, each in the order of its tokens; never more
    rows than `assign_rows`'s, and those where nothing is shared.

    Joined units of a little more than half a row would leave the rest of it empty, so halves are tried too, and none.
    """
    sizes = (row_tokens, row_tokens // 2, 0) if any(sequences.common) else (0,)
    plans = [_from_leaves(sequences, row_tokens, most) for most in sizes]
    return min(plans, key=lambda rows: (len(rows), sum(unit.tokens for unit in rows)))


def _from_leaves(sequences: Trie, row_tokens: int, most: int) -> list[Unit]:
    """Rows by joining branches from the leaves of the trie to its root, to units of at most `most` tokens before that."""
    nodes: list[tuple[int, list[Unit]]] = [(0, [])]  # depth and branches of every node on the way to the present leaf
    for i, shared in zip(sequences.order, [*sequences.common[1:], 0], strict=False):
        units = [Unit(sequences.lengths[i], [i])]
        while nodes[-1][0] > shared:
            depth, branches = nodes.pop()
            units = _joined([*branches, *units], depth, most)
        if nodes[-1][0] < shared:
            nodes.append((shared, []))
        nodes[-1][1].extend(units)
    rank = {i: place for place, i in enumerate(sequences.order)}
    rows = _joined(nodes[0][1], 0, row_tokens)
    return [Unit(tokens, sorted(samples, key=rank.__getitem__)) for tokens, samples in rows]


def _joined(branches: list[Unit], depth: int, most: int) -> list[Unit]:
    """Branches of a node at `depth`, those together that make units of at most `most` tokens with the way to the node."""
    beyond = [unit.tokens - depth for unit in branches]
    return [
        Unit(depth + sum(beyond[b] for b in together), [i for b in together for i in branches[b].samples])
        for together in assign_rows(beyond, most - depth)
    ]


def assign_buckets(
    sequences: Trie, row_tokens: int, rows_per_micro_batch: int, buckets: Sequence[int]
) -> list[tuple[int, Rows]]:
    """Rows of `row_tokens` and of the shorter lengths `buckets`, as (length, rows): as few micro-batches as a plan of this
    kind can have, and among those as short rows as possible.

    A plan fills short rows first, from the shortest length up, and keeps those that make whole micro-batches and are full
    to a threshold; what is left goes on to longer rows. Several thresholds are tried.
    """
    budget = row_tokens * rows_per_micro_batch
    plans = [[(row_tokens, [unit.samples for unit in assign_sharing(sequences, row_tokens)])]]
    plans += [_plan(sequences, row_tokens, budget, sorted(buckets), fill) for fill in _FILLS if buckets]

    def cost(plan: list[tuple[int, Rows]]) -> tuple[int, int]:
        counts = [(length, -(-len(rows) * length // budget)) for length, rows in plan]
        return sum(n for _, n in counts), sum(n * length for length, n in counts)

    return min(plans, key=cost)


def _plan(sequences: Trie, row_tokens: int, budget: int, buckets: Sequence[int], fill: float) -> list[tuple[int, Rows]]:
    rest, plan = set(sequences.order), []
    for length in buckets:
        fitting = {i for i in rest if sequences.lengths[i] <= length}
        units = assign_sharing(sequences.of(fitting), length)
        fullest = sorted((u for u in units if u.tokens >= fill * length), key=lambda u: -u.tokens)
        kept = [unit.samples for unit in fullest[: len(fullest) * length // budget * budget // length]]
        rest -= {i for row in kept for i in row}
        plan.append((length, kept))
    last = [unit.samples for unit in assign_sharing(sequences.of(rest), row_tokens)]
    return [(length, rows) for length, rows in [(row_tokens, last), *reversed(plan)] if rows]


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
