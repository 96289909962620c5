"""What to change so that a step fits: the nearest settings, computed with cost.py rather than recited.

In order of nearness: settings that change nothing but speed, another mesh of the same devices, a larger slice of the same
generation, and last what trains something else (adapters, shorter episodes). Of each kind the first that fits is
proposed. Estimates are scaled by what the compiler said of the present settings, where it was asked.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sqlrl_jax.config import Config, ConfigError
from sqlrl_jax.config_file import override
from sqlrl_jax.config_file import settings as all_settings
from sqlrl_jax.cost import Cost, Episodes
from sqlrl_jax.mesh import AXES, mesh_sizes
from sqlrl_jax.model.config import ModelConfig
from sqlrl_jax.topology import Slice, slices

Settings = tuple[tuple[str, Any], ...]

# A compiler's heap has holes, and a suggestion should hold.
_USABLE = 0.95
_POLICY = "trainer.policy."
_SHORTEST_ROW = 4096


@dataclass(frozen=True)
class Change:
    """Settings, or a slice, with which the step is estimated to fit."""

    kind: str
    settings: Settings
    where: Slice
    needs: float
    """Estimated bytes on one device."""


def suggest(config: Config, model: ModelConfig, where: Slice, episodes: Episodes, scale: float = 1.0) -> list[Change]:
    """Changes with which the step fits, the nearest first; empty where none was found."""
    found = []
    for kind, options in _kinds(config, model, where):
        for settings, place in options:
            needs = estimate(config, model, place, episodes, settings)
            if needs is not None and needs * scale <= _USABLE * place.generation.hbm:
                found.append(Change(kind, _new(config, settings), place, needs * scale))
                break
    return found


def _new(config: Config, settings: Settings) -> Settings:
    """Those settings that are not so already."""
    present = {setting.key: setting.value for setting in all_settings(config)}
    return tuple((key, value) for key, value in settings if present[key] != value)


def estimate(
    config: Config, model: ModelConfig, where: Slice, episodes: Episodes, settings: Settings = ()
) -> float | None:
    """Bytes on one device with these settings, or None where they do not go together."""
    try:
        changed = override(config, settings) if settings else config
        cost = Cost(changed, model, mesh_sizes(changed.trainer.mesh, where.devices), episodes)
    except ConfigError:
        return None
    if cost.policy.rows_per_micro_batch % cost.shards or cost.policy.row_tokens % cost.sizes["sequence"]:
        return None
    return cost.memory().total


Options = Iterator[tuple[Settings, Slice]]


def _kinds(config: Config, model: ModelConfig, where: Slice) -> list[tuple[str, Options]]:
    larger = [s for s in slices(where.generation) if s.devices > where.devices]
    return [
        ("the same mesh, more computed again or in smaller parts", _with(_frugal(config, where), [where])),
        ("another mesh", _with(_meshes(config, model, where), [where])),
        ("a larger slice", (option for s in larger for option in _with(_all_meshes(config, model, s), [s]))),
        ("adapters in place of all weights", _adapted(config, model, where)),
        ("shorter episodes", _with(_shorter(config, model, where), [where])),
    ]


def _with(settings: Sequence[Settings], places: Sequence[Slice]) -> Options:
    return ((some, place) for some in settings for place in places)


def _frugal(config: Config, where: Slice) -> list[Settings]:
    """Each of the settings that save memory and cost speed alone, then one after another together."""
    policy = config.trainer.policy
    try:
        sizes = mesh_sizes(config.trainer.mesh, where.devices)
    except ConfigError:
        return []
    shards = sizes["data"] * sizes["fsdp"]
    steps: list[tuple[str, Any]] = []
    if policy.rows_per_micro_batch > shards:
        steps.append((_POLICY + "rows_per_micro_batch", shards))
    if policy.remat != "full":
        steps.append((_POLICY + "remat", "full"))
    if policy.logprob_chunk > 256:
        steps.append((_POLICY + "logprob_chunk", 256))
    if policy.compute_dtype == "float32":
        steps.append((_POLICY + "compute_dtype", "bfloat16"))
    if not policy.offload_optimizer:
        steps.append((_POLICY + "offload_optimizer", True))
    return [(step,) for step in steps] + [tuple(steps[:n]) for n in range(2, len(steps) + 1)]


def _all_meshes(config: Config, model: ModelConfig, where: Slice) -> list[Settings]:
    """The present mesh, if it leaves an axis open, then others."""
    sizes = _sizes(config, where)
    present = [_mesh(sizes)] if sizes else []
    return present + _meshes(config, model, where)


def _sizes(config: Config, where: Slice) -> dict[str, int] | None:
    try:
        return mesh_sizes(config.trainer.mesh, where.devices)
    except ConfigError:
        return None


def _mesh(sizes: dict[str, int]) -> Settings:
    """A mesh with as many rows in a micro-batch as it needs, one for each part of the batch."""
    axes = tuple((f"trainer.mesh.{axis}", sizes[axis]) for axis in AXES if sizes[axis] > 1 or axis == "fsdp")
    ones = tuple((f"trainer.mesh.{axis}", 1) for axis in AXES if sizes[axis] == 1 and axis != "fsdp")
    return (*axes, *ones, (_POLICY + "rows_per_micro_batch", sizes["data"] * sizes["fsdp"]))


def _meshes(config: Config, model: ModelConfig, where: Slice) -> list[Settings]:
    """Meshes of fsdp, sequence and tensor, those that send least for a token first; then the same with everything that
    saves memory."""
    n, options = where.devices, []
    for tensor in _divisors(math.gcd(model.num_key_value_heads, n)):
        for sequence in _divisors(n // tensor):
            sizes = {"data": 1, "fsdp": n // tensor // sequence, "sequence": sequence, "tensor": tensor}
            if config.trainer.policy.row_tokens % sequence == 0:
                changed = override(config, _mesh(sizes))
                cost = Cost(changed, model, sizes, Episodes(config.trainer.policy.row_tokens, 0.25))
                options.append((sum(cost.ideal_sent().values()) / cost.tokens, sequence, _mesh(sizes)))
    meshes = [settings for _, _, settings in sorted(options, key=lambda o: o[:2])]
    frugal = _frugal(config, where)
    saving = tuple(s for s in (frugal[-1] if frugal else ()) if not s[0].endswith("rows_per_micro_batch"))
    return meshes + ([m + saving for m in meshes] if saving else [])


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _adapted(config: Config, model: ModelConfig, where: Slice) -> Options:
    if config.trainer.policy.model.lora.rank:
        return iter(())
    rank: Settings = ((_POLICY + "model.lora.rank", 32), (_POLICY + "model.lora.alpha", 64))
    return _with([rank, *(rank + m for m in _meshes(config, model, where))], [where])


def _shorter(config: Config, model: ModelConfig, where: Slice) -> list[Settings]:
    """Rows cut in half again and again, with contexts to match."""
    out = []
    row, turn = config.trainer.policy.row_tokens // 2, config.generator.sampling_params.max_generate_length
    while row >= max(_SHORTEST_ROW, 2 * turn):
        limits: Settings = (("generator.max_input_length", row - turn), (_POLICY + "row_tokens", row))
        if config.trainer.max_prompt_length <= row - turn:
            out += [limits, *(limits + m for m in _meshes(config, model, where))]
        row //= 2
    return out
