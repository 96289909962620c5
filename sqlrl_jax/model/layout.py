"""How the parameters of the layers lie while a step runs: stacked or one dict a layer, small matrices joined or not.

A step's parameters are kept stacked and under their own names; they are laid out once and used many times. `lay` is linear,
so its transpose (`jax.linear_transpose`) brings gradients back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh

from sqlrl_jax.mesh import platform_of
from sqlrl_jax.model.params import Params, ParamSpec

JOINED = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}
# Numbers of a matrix that is joined at most: larger ones fill the cores alone, and the joined one is a copy.
_JOINED_SIZE = 2**19


class Layout(NamedTuple):
    """`layers`: how many there are, where they are taken apart; 0 where they stay stacked. `joined`: of JOINED."""

    layers: int = 0
    joined: tuple[str, ...] = ()

    def lay(self, params: Params) -> Params:
        """`params` in this layout; with layers apart, `params["layers"]` maps "0", "1", … to a dict each. Of adapters, or of
        other parts of the parameters, what is there."""
        if "layers" not in params:
            return params
        layers = join_parts(params["layers"], self.joined)
        return params | {"layers": _by_index(unstack_layers(layers, self.layers)) if self.layers else layers}

    def specs(self, specs: Mapping[str, ParamSpec]) -> dict[str, ParamSpec]:
        """The declarations of the parameters that `lay` makes of those declared by `specs`."""
        out = {path: spec for path, spec in specs.items() if not path.startswith("layers.")}
        stacked = {path.removeprefix("layers."): spec for path, spec in specs.items() if path.startswith("layers.")}
        for name, spec in _join(stacked, self.joined, _joined_spec).items():
            if not self.layers:
                out[f"layers.{name}"] = spec
            for i in range(self.layers):
                out[f"layers.{i}.{name}"] = ParamSpec(spec.shape[1:], spec.axes[1:], spec.units[1:], spec.stddev)
        return out


def layout_for(specs: Mapping[str, ParamSpec], mesh: Mesh, *, scan_layers: bool, apart: Collection[str] = ()) -> Layout:
    """The layout that suits a mesh. On a CPU small matrices are joined, unless they are split over tensor shards or are
    among those kept `apart`, which have adapters: 9% of a tiny model's step. Accelerators fill their units without."""
    depth = specs["layers.q"].shape[0]
    joined = []
    if platform_of(mesh) == "cpu" and mesh.shape["tensor"] == 1:
        for name, parts in JOINED.items():
            size = sum(math.prod(specs[f"layers.{part}"].shape[1:]) for part in parts)
            if size <= _JOINED_SIZE and not set(parts) & set(apart):
                joined.append(name)
    return Layout(0 if scan_layers else depth, tuple(joined))


def join_parts(layer: Params, joined: Collection[str] = tuple(JOINED)) -> Params:
    """One layer, or a stack, with q, k, v joined into `qkv` and gate, up into `gate_up`; the blocks take both forms."""
    return _join(layer, joined, lambda parts: jnp.concatenate(parts, axis=-1))


def _join(layer: Mapping[str, Any], joined: Collection[str], together: Callable[[list[Any]], Any]) -> dict[str, Any]:
    out = dict(layer)
    for name in joined:
        for suffix in ("", "_bias"):
            parts = [f"{part}{suffix}" for part in JOINED[name]]
            if parts[0] in layer:
                out[name + suffix] = together([out.pop(part) for part in parts])
    return out


def _joined_spec(parts: list[ParamSpec]) -> ParamSpec:
    """That of matrices side by side. No axis of the mesh splits the side along which they lie."""
    first, size = parts[0], sum(part.shape[-1] for part in parts)
    return ParamSpec((*first.shape[:-1], size), (*first.axes[:-1], None), (*first.units[:-1], size), first.stddev)


def joined_spec(specs: Mapping[str, ParamSpec], name: str) -> ParamSpec | None:
    """The declaration of a layer's stacked `qkv`, `gate_up` or bias of it; None for any other name."""
    base, suffix = name.removesuffix("_bias"), "_bias" if name.endswith("_bias") else ""
    return _joined_spec([specs[f"layers.{part}{suffix}"] for part in JOINED[base]]) if base in JOINED else None


def unstack_layers(layers: Params, count: int) -> list[Params]:
    """Stacked parameters [L, …] as one dict for each layer."""
    parts = {name: [jnp.squeeze(p, 0) for p in jnp.split(value, count)] for name, value in layers.items()}
    return [{name: parts[name][i] for name in parts} for i in range(count)]


def _by_index(layers: list[Params]) -> Params:
    return {str(i): layer for i, layer in enumerate(layers)}
