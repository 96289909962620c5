"""Which sequences are computed together: the cache's slots, batches of few shapes, and threads.

Between the pure functions of sampler.py and an engine that knows about episodes. All shapes come from short lists of
buckets, because every shape is compiled once, which takes seconds. Calls hold few rows (their keys and values then stay
in a CPU's cache) and run side by side in threads (a tiny model's operations do not fill two cores).

What is computed together depends on the sequences given and their order alone, never on time, so results repeat bit for
bit. Left out: moving or evicting slots; whoever owns a sequence gives its slot back.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from sqlrl_jax import sampler
from sqlrl_jax.model.config import ModelConfig
from sqlrl_jax.model.params import Params

A = TypeVar("A")
R = TypeVar("R")

_EXTEND_TOKENS = 512  # tokens, padding included, in one call that fills the cache
_EXTEND_SIZES = (32, 128, 512)
_DECODE_ROWS = (8, 32)
_COPIES = 32
_SCORED = 256  # tokens, padding included, of a sequence that is scored: one shape for all that a push is tried out with


@dataclass
class Sequence:
    """A sequence and its place: the first `cached` of `ids` are in the cache, at most all but the last."""

    slot: int
    ids: list[int]
    cached: int = 0
    limit: int = 0
    """Tokens that may still be sampled."""
    seed: tuple[int, int] = (0, 0)
    """Two words of 32 bits."""
    temperature: float = 1.0
    top_p: float = 1.0

    @property
    def missing(self) -> int:
        """Tokens to be computed before the next one can be sampled (the last one is fed to the decoding loop)."""
        return len(self.ids) - 1 - self.cached


@dataclass
class Counters:
    """What was done so far."""

    generated_tokens: int = 0
    prefill_tokens: int = 0
    shared_tokens: int = 0
    """Tokens whose keys and values were copied from a sequence with the same prompt."""
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    shapes: set[tuple[str, int, int]] = field(default_factory=set)
    """Distinct calls compiled: kind, rows or new tokens, cached length."""


def length_bucket(length: int) -> int:
    """The smallest of 64, 128, 192, 256, 384, 512, 768, 1024 … that holds `length`."""
    if length <= 256:
        return max(64, -(-length // 64) * 64)
    power = 1 << (length - 1).bit_length()
    return power * 3 // 4 if length <= power * 3 // 4 else power


def power_bucket(length: int, least: int) -> int:
    """0, or the smallest power of two from `least` on that holds `length`."""
    return 0 if length == 0 else max(least, 1 << (length - 1).bit_length())


def extend_size(missing: int) -> int:
    """How many tokens the next pass over a sequence takes: the largest size that is at least half used."""
    return next((size for size in reversed(_EXTEND_SIZES) if missing >= size // 2), _EXTEND_SIZES[0])


def decode_groups(count: int) -> list[int]:
    """Rows of each decoding call for `count` sequences: full batches, then one more or a few small ones."""
    small, large = _DECODE_ROWS
    full, rest = divmod(count, large)
    return [large] * full + ([large] if rest > large // 2 else [small] * -(-rest // small))


class Slots:
    """The weights, the cache and the calls. Not thread-safe: one caller at a time."""

    def __init__(self, config: ModelConfig, dtype: str, chunk: int) -> None:
        self.config, self.dtype, self.chunk = config, dtype, chunk
        self.counters = Counters()
        self._params: Params | None = None
        self._cache: sampler.Cache | None = None
        on_cpu = jax.default_backend() == "cpu"
        self._pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1) if on_cpu else 1, thread_name_prefix="decode")

    def prepare(self, params: Params) -> Params:
        """Weights as `load` takes them: what takes time, and may be done while others call."""
        return jax.block_until_ready(sampler.prepare(self.config, params, self.dtype))

    def load(self, prepared: Params) -> None:
        """Takes new weights. Keys and values of the old ones stay in the cache: set `cached` of every sequence to 0."""
        self._params = prepared

    def score(self, ids: Seq[int]) -> list[float]:
        """Log-probabilities of all ids but the first, without the cache."""
        assert self._params is not None
        tokens = np.zeros((1, power_bucket(len(ids), _SCORED)), np.int32)
        tokens[0, : len(ids)] = ids
        return np.asarray(sampler.score(self.config, self._params, jnp.asarray(tokens)))[: len(ids) - 1].tolist()

    def close(self) -> None:
        """Frees the cache and the threads."""
        self._pool.shutdown(wait=True)
        self._cache = None

    def run(self, sequences: Seq[Sequence], end_ids: Seq[int]) -> list[tuple[list[int], list[float]]]:
        """Fills the cache as needed, then samples up to `chunk` tokens for each sequence: ids and log-probabilities.

        A sequence stops early at its limit or after one of `end_ids`. The caller appends to `ids`; `cached` already counts
        all that was fed in, so cutting sampled tokens off means cutting `cached` down to len(ids) - 1.
        """
        self._reserve(sequences)
        started = time.monotonic()
        self._fill(sequences)
        filled = time.monotonic()
        out = self._decode(sequences, end_ids)
        self.counters.prefill_seconds += filled - started
        self.counters.decode_seconds += time.monotonic() - filled
        self.counters.generated_tokens += sum(len(ids) for ids, _ in out)
        return out

    def _reserve(self, sequences: Seq[Sequence]) -> None:
        """Grows the cache, in powers of two so that it seldom happens."""
        slots = power_bucket(max(s.slot for s in sequences) + 1, 8)
        longest = max(len(s.ids) for s in sequences) + self.chunk
        length = power_bucket(longest, 256)
        if self._cache is None:
            self._cache = sampler.make_cache(self.config, slots, length, self.dtype)
            return
        have = self._cache[0].k.shape
        if slots > have[0] or length > have[2]:
            self._cache = sampler.grow_cache(self._cache, max(slots, have[0]), max(length, have[2]))

    def _fill(self, sequences: Seq[Sequence]) -> None:
        leaders: dict[tuple[int, ...], Sequence] = {}
        followers: list[tuple[Sequence, Sequence]] = []
        pending = []
        for s in sequences:
            if s.missing and not s.cached:
                leader = leaders.setdefault(tuple(s.ids[:-1]), s)
                if leader is not s:
                    followers.append((leader, s))
                    continue
            if s.missing:
                pending.append(s)
        while pending:
            calls = []
            for size in _EXTEND_SIZES:
                members = sorted((s for s in pending if extend_size(s.missing) == size), key=lambda s: s.cached)
                rows = _EXTEND_TOKENS // size
                calls += [(size, members[i : i + rows]) for i in range(0, len(members), rows)]
            for (size, members), new in zip(calls, self._parallel(self._extend, calls), strict=True):
                self._put(members, new, [s.cached for s in members])
                for s in members:
                    done = min(size, s.missing)
                    s.cached += done
                    self.counters.prefill_tokens += done
            pending = [s for s in pending if s.missing]
        self._copy(followers)

    def _extend(self, call: tuple[int, list[Sequence]]) -> sampler.Cache:
        size, members = call
        rows = _EXTEND_TOKENS // size
        tokens = np.zeros((rows, size), np.int32)
        for row, s in enumerate(members):
            part = s.ids[s.cached : s.cached + min(size, s.missing)]
            tokens[row, : len(part)] = part
        lengths = _column([s.cached for s in members], rows, np.int32)
        length = power_bucket(max(s.cached for s in members), 128)
        self.counters.shapes.add(("extend", size, length))
        view = self._view(members, rows, length)
        assert self._params is not None
        return jax.block_until_ready(sampler.extend(self.config, self._params, view, jnp.asarray(tokens), lengths))

    def _copy(self, pairs: list[tuple[Sequence, Sequence]]) -> None:
        for i in range(0, len(pairs), _COPIES):
            part = pairs[i : i + _COPIES]
            sources = _column([leader.slot for leader, _ in part], _COPIES, np.int32)
            targets = _column([s.slot for _, s in part], _COPIES, np.int32)
            length = power_bucket(max(leader.cached for leader, _ in part), 128)
            assert self._cache is not None
            self._cache = sampler.copy_rows(self._cache, sources, targets, jnp.int32(len(part)), length)
            for leader, s in part:
                s.cached = leader.cached
                self.counters.shared_tokens += leader.cached

    def _decode(self, sequences: Seq[Sequence], end_ids: Seq[int]) -> list[tuple[list[int], list[float]]]:
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i].ids))  # like lengths share a short view
        ends = _column(list(end_ids), -(-max(1, len(end_ids)) // 8) * 8, np.int32, -1)
        calls, start = [], 0
        for rows in decode_groups(len(order)):
            calls.append((rows, [sequences[i] for i in order[start : start + rows]], ends))
            start += rows
        out: list[tuple[list[int], list[float]]] = []
        for (_, members, _), decoded in zip(calls, self._parallel(self._decode_call, calls), strict=True):
            self._put(members, decoded.new, [s.cached for s in members])
            tokens, logprobs = np.asarray(decoded.tokens), np.asarray(decoded.logprobs)
            counts = np.asarray(decoded.counts)
            for row, s in enumerate(members):
                count = int(counts[row])
                s.cached += count
                out.append((tokens[:count, row].tolist(), logprobs[:count, row].tolist()))
        return [result for _, result in sorted(zip(order, out, strict=True), key=lambda pair: pair[0])]

    def _decode_call(self, call: tuple[int, list[Sequence], jax.Array]) -> sampler.Decoded:
        rows, members, ends = call
        state = sampler.Rows(
            token=_column([s.ids[-1] for s in members], rows, np.int32),
            length=_column([s.cached for s in members], rows, np.int32),
            limit=_column([s.limit for s in members], rows, np.int32),
            seed=jnp.asarray(np.array([s.seed for s in members] + [(0, 0)] * (rows - len(members)), np.uint32)),
            temperature=_column([s.temperature for s in members], rows, np.float32),
            top_p=_column([s.top_p for s in members], rows, np.float32, 1),
        )
        length = length_bucket(max(s.cached for s in members))
        self.counters.shapes.add(("decode", rows, length))
        view = self._view(members, rows, length)
        assert self._params is not None
        return jax.block_until_ready(sampler.decode(self.config, self._params, view, state, ends, self.chunk))

    def _view(self, members: list[Sequence], rows: int, length: int) -> sampler.Cache:
        assert self._cache is not None
        return sampler.take(self._cache, _column([s.slot for s in members], rows, np.int32), length)

    def _put(self, members: list[Sequence], new: sampler.Cache, starts: list[int]) -> None:
        rows = new[0].k.shape[0]
        slots = _column([s.slot for s in members], rows, np.int32)
        assert self._cache is not None
        self._cache = sampler.put(self._cache, new, slots, _column(starts, rows, np.int32), jnp.int32(len(members)))

    def _parallel(self, function: Callable[[A], R], calls: list[A]) -> list[R]:
        return [function(calls[0])] if len(calls) == 1 else list(self._pool.map(function, calls))


def _column(values: Seq[Any], rows: int, dtype: Any, fill: float = 0) -> jax.Array:
    """One value a row, filled up to `rows`."""
    out = np.full(rows, fill, dtype)
    out[: len(values)] = values
    return jnp.asarray(out)
