"""The device mesh and the one table that says which tensor axis is split over which mesh axis.

Parameters and activations name their axes ("embed", "heads", "batch" …); RULES maps the names to mesh axes, so a model
file never mentions a mesh. An axis that does not divide evenly is replicated instead, as with 2 key/value heads on 4
tensor shards. Parameters are split over the sequence axis too: its devices are there because rows are long, and the
memory that long rows take must come from somewhere. Left out: placing several hosts' devices by hand, because jax orders
them well itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from sqlrl_jax.config import ConfigError, MeshConfig

AXES = ("data", "fsdp", "sequence", "tensor")

_HOST = "pinned_host"

RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "sequence": ("sequence",),
    "embed": ("fsdp", "sequence"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "layers": (),
}


def mesh_sizes(config: MeshConfig, devices: int) -> dict[str, int]:
    """The size of each axis on this many devices. Raises ConfigError when the sizes do not fit them."""
    sizes = {name: getattr(config, name) for name in AXES}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    free = [name for name, size in sizes.items() if size == -1]
    if free and devices % fixed == 0:
        sizes[free[0]] = devices // fixed
    elif free or fixed != devices:
        asked = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise ConfigError(
            f"trainer.mesh ({asked}) needs {'a multiple of ' if free else ''}{fixed} device(s), but there are"
            f" {devices}: change the sizes, or give one axis -1 to take what is left"
        )
    return sizes


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes AXES over `devices` (default: all). Raises ConfigError when the sizes do not fit them."""
    devices = jax.devices() if devices is None else list(devices)
    sizes = mesh_sizes(config, len(devices))
    grid = mesh_utils.create_device_mesh(tuple(sizes.values()), devices=devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def split_axes(mesh: Mesh | AbstractMesh, name: str | None, units: int) -> tuple[str, ...]:
    """The mesh axes, of more than one device each, that an axis called `name` with `units` whole parts is divided over:
    those of its rule, without the last ones where all together do not divide it. Raises ValueError for a name without a
    rule."""
    if name is None:
        return ()
    if name not in RULES:
        raise ValueError(f"logical axis {name!r} has no rule in sqlrl_jax.mesh.RULES")
    parts = tuple(axis for axis in RULES[name] if mesh.shape[axis] > 1)
    while units % math.prod(mesh.shape[axis] for axis in parts):
        parts = parts[:-1]
    return parts


def partition_spec(mesh: Mesh | AbstractMesh, axes: Sequence[str | None], units: Sequence[int]) -> PartitionSpec:
    """How an array with logical `axes` is split. `units[i]` is what axis i must be divided into whole parts of: its
    length, or its number of heads. Raises ValueError for an unknown name and for two axes on one mesh axis."""
    if len(axes) != len(units):
        raise ValueError(f"axes {tuple(axes)} and sizes {tuple(units)} must have one length")
    entries: list[tuple[str, ...] | str | None] = []
    used: set[str] = set()
    for name, size in zip(axes, units, strict=True):
        parts = split_axes(mesh, name, size)
        if used & set(parts):
            raise ValueError(f"axes {tuple(axes)} would be split over mesh axis {sorted(used & set(parts))} twice")
        used |= set(parts)
        entries.append(None if not parts else parts[0] if len(parts) == 1 else parts)
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)


def param_sharding(mesh: Mesh, axes: Sequence[str | None], shape: Sequence[int]) -> NamedSharding:
    """The sharding of an array with these logical axes; see `partition_spec`."""
    return NamedSharding(mesh, partition_spec(mesh, axes, shape))


def platform_of(mesh: Mesh | None) -> str:
    """ "cpu", "gpu" or "tpu": what the mesh's devices are, which may be those of a topology that is not here."""
    return "cpu" if mesh is None else mesh.devices.flat[0].platform


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of [rows, tokens] arrays: rows over data and fsdp, tokens over sequence."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"], *RULES["sequence"]))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds all of it."""
    return NamedSharding(mesh, PartitionSpec())


def in_host_memory(shardings: Any) -> Any:
    """The same shardings, but in the host's memory, from where devices fetch over their bus; scalars and what else every
    device holds stay. Raises ConfigError where the devices have no such memory."""

    def of(sharding: NamedSharding) -> NamedSharding:
        if sharding.mesh.size > 1 and sharding.is_fully_replicated:
            return sharding
        device = sharding.mesh.devices.flat[0]
        kinds = {memory.kind for memory in device.addressable_memories()}
        if _HOST not in kinds:
            raise ConfigError(
                f"trainer.policy.offload_optimizer: {device.device_kind} devices have no {_HOST} memory, only"
                f" {', '.join(sorted(kinds))}: set it to false"
            )
        return sharding.with_memory_kind(_HOST)

    return jax.tree.map(of, shardings)


def constrain(x: jax.Array, mesh: Mesh | None, axes: Sequence[str | None]) -> jax.Array:
    """Keep an intermediate value split by its logical axes; nothing to do without a mesh or on one device."""
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, param_sharding(mesh, axes, x.shape))
