"""The decoder of Qwen2, Qwen3 and Llama: pre-norm blocks, grouped-query attention, RoPE, RMSNorm, SwiGLU.

The arithmetic is pure functions of (config, one layer's parameters, activations); `Decoder` is the Flax NNX module that
owns the parameters. Attention is passed in as a function of q, k and v, so training (packed rows) and cached
decoding (sampler.py) share every other line. Statistics, RoPE angles and
the residual's norm are float32; everything else runs in the compute dtype.
Left out: the logits. They are never needed whole; the head is applied to the trained or the last tokens only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from sqlrl_jax.mesh import constrain
from sqlrl_jax.model.config import ModelConfig
from sqlrl_jax.model.fsdp import gather_layer, lookup
from sqlrl_jax.model.lanes import KEPT
from sqlrl_jax.model.norm import rms_norm
from sqlrl_jax.model.params import Params, init_param, nest, param_specs
from sqlrl_jax.model.product import product
from sqlrl_jax.model.sharded_attention import sharded_attention

Rope = tuple[Float[Array, "B S h2"], Float[Array, "B S h2"]]
# (q, k, v) -> attended [B, S, H, h]
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


@dataclass(frozen=True)
class Compute:
    """How the layers are run; none of it changes the result beyond rounding."""

    dtype: str = "float32"
    remat: Literal["none", "attention", "full"] = "none"
    mesh: Mesh | None = None
    positions_below: int | None = None
    """Where known, what all positions are less than: see rope_table."""
    shared_rows: bool = True
    """Sequences of a row may share a beginning. Where that is known not to be, TPUs take another kernel."""


def rope_frequencies(config: ModelConfig) -> np.ndarray:
    """Radians per position for each pair of a head's dimensions: float32 [head_dim / 2].

    Rounded as transformers rounds them, operation by operation. At position 30,000 the last bit of a frequency is a
    thousandth of a radian, which moves a logit by more than 1e-4.
    """
    one = np.float32(1.0)
    exponent = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequency = one / np.power(config.rope_theta, exponent.astype(np.float64)).astype(np.float32)
    scaling = config.rope_scaling
    if scaling is None:
        return frequency
    # Llama 3.1: https://github.com/meta-llama/llama-models, apply_scaling
    low, high, factor = (np.float32(n) for n in (scaling.low_freq_factor, scaling.high_freq_factor, scaling.factor))
    wavelength = np.float32(2 * np.pi) * (one / frequency)
    turns = np.float32(scaling.original_max_position_embeddings) * (one / wavelength)
    kept = np.clip((turns - low) / (high - low), np.float32(0.0), one)
    return (one - kept) * frequency / factor + kept * frequency


def rope_table(config: ModelConfig, positions: Int[Array, "B S"], below: int | None = None) -> Rope:
    """Cosine and sine of every position's angles, float32. If all positions are `below` a number they are looked up in a
    table of so many: otherwise XLA on a CPU computes them anew wherever a head is turned, a fourteenth of a tiny model's
    update."""
    known = positions if below is None else jnp.arange(below)
    angles = known.astype(jnp.float32)[..., None] * rope_frequencies(config)
    table = jnp.cos(angles), jnp.sin(angles)
    return table if below is None else (jnp.take(table[0], positions, axis=0), jnp.take(table[1], positions, axis=0))


def apply_rope(x: Float[Array, "B S N h"], rope: Rope) -> Float[Array, "B S N h"]:
    """Rotate dimension i with dimension i + h/2 (Hugging Face's order of the pairs)."""
    cos, sin = (part[:, :, None, :] for part in rope)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def linear(layer: Params, names: Sequence[str], x: Float[Array, "... I"]) -> list[Float[Array, "... O"]]:
    """x @ W of each named matrix, plus the low-rank adapter's (x @ A) @ B where it has one (see lora.py).

    Adapters come first: the backward pass then adds up the gradients of x from the matrices themselves without a break,
    which over tensor shards are one all-reduce instead of one for each.
    """
    adapted = {
        name: product(product(x, layer[f"{name}_a"].astype(x.dtype)), layer[f"{name}_b"].astype(x.dtype))
        for name in names
        if f"{name}_a" in layer
    }
    out = [product(x, layer[name].astype(x.dtype)) for name in names]
    return [part + adapted[name] if name in adapted else part for name, part in zip(names, out, strict=True)]


def project_qkv(
    config: ModelConfig, layer: Params, x: Float[Array, "B S D"], rope: Rope
) -> tuple[Float[Array, "B S H h"], Float[Array, "B S KV h"], Float[Array, "B S KV h"]]:
    """Queries and keys (normed and rotated) and values of one layer, from the residual stream."""
    normed = rms_norm(x, layer["attention_norm"], config.rms_norm_eps)

    names = ("qkv",) if "qkv" in layer else ("q", "k", "v")
    parts = linear(layer, names, normed)
    if config.attention_bias:
        parts = [part + layer[f"{name}_bias"].astype(x.dtype) for name, part in zip(names, parts, strict=True)]
    if "qkv" in layer:
        ends = np.cumsum([config.num_attention_heads, config.num_key_value_heads]) * config.head_dim
        parts = jnp.split(parts[0], ends, axis=-1)
    q, k, v = (part.reshape(*x.shape[:-1], -1, config.head_dim) for part in parts)
    if config.qk_norm:
        q = rms_norm(q, layer["q_norm"], config.rms_norm_eps)
        k = rms_norm(k, layer["k_norm"], config.rms_norm_eps)
    return apply_rope(q, rope), apply_rope(k, rope), v


def finish_block(
    config: ModelConfig, layer: Params, x: Float[Array, "B S D"], attended: Float[Array, "B S H h"], lean: bool = False
) -> Float[Array, "B S D"]:
    """The rest of a layer after attention: output projection, then the SwiGLU MLP, each added to the residual. A `lean` one
    keeps only two arrays of the MLP's width for the backward pass, which makes the other two of them again: on a CPU writing
    and reading four takes longer."""
    (mixed,) = linear(layer, ("o",), attended.reshape(*x.shape[:-1], -1))
    x = checkpoint_name(x + mixed, KEPT)
    normed = rms_norm(x, layer["mlp_norm"], config.rms_norm_eps)
    if "gate_up" in layer:
        gate, up = jnp.split(linear(layer, ("gate_up",), normed)[0], 2, axis=-1)
    else:
        gate, up = linear(layer, ("gate", "up"), normed)

    def down(gate: jax.Array, up: jax.Array) -> jax.Array:
        return linear(layer, ("down",), jax.nn.silu(gate) * up)[0]

    if lean:  # products are kept: those of adapters
        down = jax.checkpoint(down, policy=jax.checkpoint_policies.dots_saveable)
    return x + down(gate, up)


def run_layers(
    config: ModelConfig, layers: Params, x: Float[Array, "B S D"], rope: Rope, attend: Attend, compute: Compute
) -> Float[Array, "B S D"]:
    """All blocks in order: by one scan where the layers are stacked, one after the other where they lie apart (see
    layout.py)."""
    specs, apart = param_specs(config), isinstance(layers.get("0"), dict)

    def block(x: jax.Array, layer: Params) -> jax.Array:
        layer = gather_layer(specs, layer, compute.mesh, compute.dtype)
        q, k, v = (checkpoint_name(part, KEPT) for part in project_qkv(config, layer, x, rope))
        out = finish_block(config, layer, x, attend(q, k, v), lean=compute.remat == "none")
        return constrain(out, compute.mesh, ("batch", "sequence", None))

    body = block
    if compute.remat != "none":
        policy = jax.checkpoint_policies.save_only_these_names(KEPT) if compute.remat == "attention" else None
        body = jax.checkpoint(block, prevent_cse=apart, policy=policy)
    if not apart:
        return jax.lax.scan(lambda x, layer: (body(x, layer), None), x, layers)[0]
    for i in range(config.num_hidden_layers):
        x = body(x, layers[str(i)])
    return x


def embed(params: Params, tokens: Int[Array, "B S"], compute: Compute) -> Float[Array, "B S D"]:
    """Token embeddings in the compute dtype."""
    x = lookup(params["embedding"], tokens, compute.mesh, compute.dtype)
    return constrain(x, compute.mesh, ("batch", "sequence", None))


def final_norm(config: ModelConfig, params: Params, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """The norm before the output matrix."""
    return rms_norm(x, params["final_norm"], config.rms_norm_eps)


def unembedding(params: Params) -> Float[Array, "D V"]:
    """The output matrix, tied to the embedding or not: logits = hidden @ unembedding."""
    return params["lm_head"] if "lm_head" in params else params["embedding"].T


def forward(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "B S"],
    positions: Int[Array, "B S"],
    reach: Int[Array, "B S"],
    compute: Compute | None = None,
) -> Float[Array, "B S D"]:
    """Hidden states after the final norm. Rows may hold several sequences; each token sees itself and those before it in
    its row whose `reach` is beyond it; `positions` count from 0 inside each sequence. See data/packing.py."""
    compute = compute or Compute()

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return sharded_attention(q, k, v, whole, compute.mesh, compute.shared_rows)

    whole = constrain(reach, compute.mesh, ("batch", None))  # each device attends over whole rows
    x = embed(params, tokens, compute)
    x = run_layers(config, params["layers"], x, rope_table(config, positions, compute.positions_below), attend, compute)
    return final_norm(config, params, x)


class Layers(nnx.Module):
    """The parameters of all blocks, stacked on a leading axis."""


class Decoder(nnx.Module):
    """Owns the parameters; each `nnx.Param` carries its logical axes as `axes`."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        param_dtype: str = "float32",
        compute: Compute | None = None,
    ) -> None:
        self.config = config
        self.compute = compute or Compute()
        self.layers = Layers()
        for path, spec in param_specs(config).items():
            *parents, name = path.split(".")
            value = init_param(spec, rngs.params(), jnp.dtype(param_dtype))
            setattr(self.layers if parents else self, name, nnx.Param(value, axes=spec.axes))

    def params(self) -> Params:
        """The parameters as a nested dict of arrays."""
        return nnx.to_pure_dict(nnx.state(self, nnx.Param))

    def __call__(
        self, tokens: Int[Array, "B S"], positions: Int[Array, "B S"], reach: Int[Array, "B S"]
    ) -> Float[Array, "B S D"]:
        """See `forward`."""
        return forward(self.config, self.params(), tokens, positions, reach, self.compute)

    def unembed(self) -> Float[Array, "D V"]:
        """See `unembedding`."""
        return unembedding(self.params())


def init_params(config: ModelConfig, seed: int, dtype: str = "float32") -> Params:
    """Fresh parameters as a nested dict; jittable, so `jax.jit(…, out_shardings=)` creates them in place."""
    specs = param_specs(config)
    keys = jax.random.split(jax.random.key(seed), len(specs))
    return nest({p: init_param(s, key, jnp.dtype(dtype)) for (p, s), key in zip(specs.items(), keys, strict=True)})
