"""Low-rank adapters (LoRA, arXiv:2106.09685): W x becomes W x + alpha / rank · B A x, and only A and B are trained.

The adapters are more entries in the dict of the layers: `layers.q_a` [L, in, rank] and `layers.q_b` [L, rank, out] beside
`layers.q`. `join` puts both together, with the scale in B, so the decoder knows neither scale nor rank.
Left out: dropout, and adapters of the embedding and the head, which no recipe here trains.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sqlrl_jax.config_lora import LoraConfig, targets
from sqlrl_jax.model.config import ModelConfig
from sqlrl_jax.model.params import Params, ParamSpec, nest, param_specs, spec_shardings


def adapter_specs(spec: ParamSpec, rank: int) -> tuple[ParamSpec, ParamSpec]:
    """A and B beside the stacked matrix `spec`: each split as the side of the matrix it touches, the rank never."""
    (layers, inner, outer), (stack, into, out) = spec.shape, spec.axes
    a = ParamSpec((layers, inner, rank), (stack, into, None), (*spec.units[:2], rank), (3 * inner) ** -0.5)
    b = ParamSpec((layers, rank, outer), (stack, None, out), (layers, rank, spec.units[2]), 0.0)
    return a, b


def trained_specs(config: ModelConfig, lora: LoraConfig) -> dict[str, ParamSpec]:
    """What an optimizer step changes: every parameter, or with a rank above 0 the adapters alone."""
    specs = param_specs(config)
    if not lora.rank:
        return specs
    out = {}
    for path in (f"layers.{name}" for name in targets(lora)):
        out[f"{path}_a"], out[f"{path}_b"] = adapter_specs(specs[path], lora.rank)
    return out


def frozen_specs(config: ModelConfig, lora: LoraConfig) -> dict[str, ParamSpec]:
    """What no optimizer step changes: nothing, or the whole model under its adapters."""
    return param_specs(config) if lora.rank else {}


def init_adapters(specs: Mapping[str, ParamSpec], mesh: Mesh, seed: int, dtype: str) -> Params:
    """Fresh adapters on the mesh: A uniform within 1/sqrt(in) (Kaiming with a = sqrt(5), as in PEFT), B zero."""

    def make() -> Params:
        keys = jax.random.split(jax.random.key(seed), len(specs))
        return nest({path: one(spec, key) for (path, spec), key in zip(specs.items(), keys, strict=True)})

    def one(spec: ParamSpec, key: jax.Array) -> jax.Array:
        if spec.stddev == 0:
            return jnp.zeros(spec.shape, dtype)
        bound = spec.shape[1] ** -0.5
        return jax.random.uniform(key, spec.shape, jnp.float32, -bound, bound).astype(dtype)

    return jax.jit(make, out_shardings=spec_shardings(specs, mesh))()


def join(frozen: Params, trained: Params, lora: LoraConfig) -> Params:
    """The parameters of a forward pass, of both in one layout: stacked, or each layer apart."""
    if not lora.rank:
        return trained
    scale = lora.alpha / lora.rank

    def beside(base: Params, added: Params) -> Params:
        out = dict(base)
        for name, value in added.items():
            if isinstance(value, dict):
                out[name] = beside(base[name], value)
            else:
                out[name] = value * jnp.asarray(scale, value.dtype) if name.endswith("_b") else value
        return out

    return beside(frozen, trained)


def merge(frozen: Params, trained: Params, lora: LoraConfig) -> Params:
    """Plain weights W + alpha / rank · A B, in the frozen weights' dtypes; the sum is float32."""
    if not lora.rank:
        return trained
    layers, scale = dict(frozen["layers"]), lora.alpha / lora.rank
    for name in targets(lora):
        layers[name] = _merged(layers[name], *(trained["layers"][f"{name}_{part}"] for part in "ab"), scale)
    return frozen | {"layers": layers}


@jax.jit
def _merged(w: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    product = jnp.matmul(a.astype(jnp.float32), b.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    return (w.astype(jnp.float32) + product * scale).astype(w.dtype)
