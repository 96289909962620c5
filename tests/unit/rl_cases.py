"""Random trained tokens for the tests of losses and corrections, with garbage wherever the mask is off."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from sqlrl_jax.rl.tokens import Tokens, make_tokens

SHARDS, SLOTS = 2, 12
GARBAGE = st.sampled_from([0.0, math.nan, math.inf, -math.inf, 1e30])


class Token(NamedTuple):
    """Log-probabilities of three policies, and the rest of what a loss reads. `shard` and `episode` say whose it is."""

    new: float
    old: float
    rollout: float
    advantage: float
    weight: float
    selected: bool
    shard: int = 0
    episode: int = 0


def token(logprob: st.SearchStrategy[float]) -> st.SearchStrategy[Token]:
    return st.builds(
        Token,
        new=logprob,
        old=logprob,
        rollout=logprob,
        advantage=st.integers(-12, 12).map(lambda k: k / 4),
        weight=st.integers(0, 16).map(lambda k: k / 8),
        selected=st.booleans(),
    )


def episodes_of(logprob: st.SearchStrategy[float]) -> st.SearchStrategy[list[Token]]:
    """Up to 4 tokens in each of up to 3 episodes in each of 2 shards."""
    some = st.lists(st.lists(token(logprob), min_size=1, max_size=4), max_size=3)
    return st.tuples(some, some).map(
        lambda shards: [
            t._replace(shard=s, episode=e)
            for s, parts in enumerate(shards)
            for e, part in enumerate(parts)
            for t in part
        ]
    )


WILD = st.floats(-60, 0, width=32)
NEAR = st.integers(-24, 0).map(lambda k: k / 8)


def arrays(cases: list[Token], garbage: float) -> dict[str, Any]:
    """The tokens in [SHARDS, SLOTS] arrays, masked places filled with garbage and episode 0."""
    names = ("new", "old", "rollout", "advantage", "weight")
    out: dict[str, Any] = {name: np.full((SHARDS, SLOTS), garbage, np.float32) for name in names}
    out |= {"mask": np.zeros((SHARDS, SLOTS), bool), "selected": np.ones((SHARDS, SLOTS), bool)}
    out["episode"] = np.zeros((SHARDS, SLOTS), np.int32)
    used = [0] * SHARDS
    for case in cases:
        at = (case.shard, used[case.shard])
        used[case.shard] += 1
        out["mask"][at] = True
        for name in (*names, "selected", "episode"):
            out[name][at] = getattr(case, name)
    return {name: jnp.asarray(value) for name, value in out.items()}


def tokens_of(a: dict[str, Any]) -> Tokens:
    return make_tokens(
        a["new"],
        a["rollout"],
        a["advantage"],
        a["weight"],
        a["mask"],
        a["episode"],
        old_logprobs=a["old"],
        selected=a["selected"],
    )


def by_episode(cases: list[Token]) -> list[list[Token]]:
    keys = dict.fromkeys((t.shard, t.episode) for t in cases)
    return [[t for t in cases if (t.shard, t.episode) == key] for key in keys]
