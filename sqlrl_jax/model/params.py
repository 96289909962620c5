"""The one declaration of the decoder's parameters: shape, logical axes and initialisation of each.

The module, its sharding, abstract versions for restoring checkpoints and the Hugging Face table all derive from it.
Matrices are stored [in, out] for `x @ w`, and all layers of one kind lie stacked on a leading axis, so that one
`lax.scan` runs them. Query, key and value (and gate and up) stay apart: names map one to one to Hugging Face's and each
splits over tensor shards by whole heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sqlrl_jax.mesh import param_sharding
from sqlrl_jax.model.config import ModelConfig

# A nested dict of arrays: {"embedding": …, "final_norm": …, "layers": {"q": …, …}} and "lm_head" when untied.
Params = dict[str, Any]

_STDDEV = 0.02


@dataclass(frozen=True)
class ParamSpec:
    """One parameter. `units` is the shape with heads x head_dim counted in heads: what sharding may divide."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    units: tuple[int, ...]
    stddev: float | None
    """None: ones (norms); 0: zeros (biases); otherwise a normal distribution."""

    @property
    def is_matrix(self) -> bool:
        """Whether it is a matrix, or a stack of them: what weight decay and Muon act on."""
        return len(self.shape) - ("layers" in self.axes) == 2


class _Dim(NamedTuple):
    size: int
    axis: str | None
    units: int


def _dim(size: int, axis: str | None = None) -> _Dim:
    return _Dim(size, axis, size)


def _spec(stddev: float | None, *dims: _Dim) -> ParamSpec:
    return ParamSpec(tuple(d.size for d in dims), tuple(d.axis for d in dims), tuple(d.units for d in dims), stddev)


def param_specs(config: ModelConfig) -> dict[str, ParamSpec]:
    """Every parameter by its dotted path, in a fixed order."""
    c = config
    layers, embed, norm = _dim(c.num_hidden_layers, "layers"), _dim(c.hidden_size, "embed"), _dim(c.hidden_size)
    heads = _Dim(c.num_attention_heads * c.head_dim, "heads", c.num_attention_heads)
    kv_heads = _Dim(c.num_key_value_heads * c.head_dim, "kv_heads", c.num_key_value_heads)
    mlp, vocab = _dim(c.intermediate_size, "mlp"), _dim(c.vocab_size, "vocab")
    scaled = _STDDEV / (2 * c.num_hidden_layers) ** 0.5  # into the residual stream, as in GPT-2
    specs = {
        "embedding": _spec(_STDDEV, vocab, embed),
        "layers.attention_norm": _spec(None, layers, norm),
        "layers.q": _spec(_STDDEV, layers, embed, heads),
        "layers.k": _spec(_STDDEV, layers, embed, kv_heads),
        "layers.v": _spec(_STDDEV, layers, embed, kv_heads),
        "layers.o": _spec(scaled, layers, heads, embed),
        "layers.mlp_norm": _spec(None, layers, norm),
        "layers.gate": _spec(_STDDEV, layers, embed, mlp),
        "layers.up": _spec(_STDDEV, layers, embed, mlp),
        "layers.down": _spec(scaled, layers, mlp, embed),
        "final_norm": _spec(None, norm),
    }
    if c.attention_bias:
        specs |= {
            "layers.q_bias": _spec(0.0, layers, heads),
            "layers.k_bias": _spec(0.0, layers, kv_heads),
            "layers.v_bias": _spec(0.0, layers, kv_heads),
        }
    if c.qk_norm:
        specs |= {f"layers.{name}": _spec(None, layers, _dim(c.head_dim)) for name in ("q_norm", "k_norm")}
    if not c.tie_word_embeddings:
        specs["lm_head"] = _spec(_STDDEV, embed, vocab)
    return specs


def nest(flat: dict[str, Any]) -> Params:
    """{"layers.q": x} → {"layers": {"q": x}}."""
    out: Params = {}
    for path, value in flat.items():
        *parents, name = path.split(".")
        node = out
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return out


def flatten(params: Params, prefix: str = "") -> dict[str, Any]:
    """The inverse of `nest`."""
    out: dict[str, Any] = {}
    for name, value in params.items():
        if isinstance(value, dict):
            out |= flatten(value, f"{prefix}{name}.")
        else:
            out[prefix + name] = value
    return out


def parameter_count(config: ModelConfig) -> int:
    """Trained numbers in the model; a tied output matrix counts once."""
    return sum(jax.ShapeDtypeStruct(s.shape, jnp.float32).size for s in param_specs(config).values())


def init_param(spec: ParamSpec, key: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """A fresh parameter."""
    if spec.stddev is None:
        return jnp.ones(spec.shape, dtype)
    if spec.stddev == 0:
        return jnp.zeros(spec.shape, dtype)
    return (jax.random.normal(key, spec.shape, jnp.float32) * spec.stddev).astype(dtype)


def spec_shardings(specs: Mapping[str, ParamSpec], mesh: Mesh) -> Params:
    """A NamedSharding for every parameter of `specs`, nested as the parameters are."""
    return nest({path: param_sharding(mesh, spec.axes, spec.units) for path, spec in specs.items()})


def param_shardings(config: ModelConfig, mesh: Mesh) -> Params:
    """A NamedSharding for every parameter of the decoder."""
    return spec_shardings(param_specs(config), mesh)


def abstract_specs(specs: Mapping[str, ParamSpec], dtype: jnp.dtype | str, mesh: Mesh | None = None) -> Params:
    """Shapes, dtypes and (with a mesh) shardings, without values: for ahead-of-time compiling and for restoring."""

    def of(spec: ParamSpec) -> jax.ShapeDtypeStruct:
        sharding = None if mesh is None else param_sharding(mesh, spec.axes, spec.units)
        return jax.ShapeDtypeStruct(spec.shape, jnp.dtype(dtype), sharding=sharding)

    return nest({path: of(spec) for path, spec in specs.items()})


def abstract_params(config: ModelConfig, dtype: jnp.dtype | str = "float32", mesh: Mesh | None = None) -> Params:
    """The decoder's parameters without values."""
    return abstract_specs(param_specs(config), dtype, mesh)
