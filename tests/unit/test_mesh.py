"""The mesh and the rules, without devices where possible."""

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from sqlrl_jax.config import ConfigError, MeshConfig
from sqlrl_jax.mesh import AXES, RULES, batch_sharding, make_mesh, partition_spec
from sqlrl_jax.model.config import ModelConfig
from sqlrl_jax.model.params import param_specs


def abstract(data: int, fsdp: int, sequence: int, tensor: int) -> AbstractMesh:
    return AbstractMesh((data, fsdp, sequence, tensor), AXES, axis_types=(AxisType.Auto,) * 4)


def test_one_device_is_a_mesh_too() -> None:
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "sequence": 1, "tensor": 1}
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert batch_sharding(mesh).spec == P(("data", "fsdp"), "sequence")


@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 2}, {"data": 3, "fsdp": -1}])
def test_sizes_that_do_not_fit_are_named(sizes: dict) -> None:
    with pytest.raises(ConfigError, match=r"data . ?.*there are 1"):
        make_mesh(MeshConfig(**sizes), jax.devices()[:1])


def test_rules_use_every_axis_of_the_mesh() -> None:
    assert {a for axes in RULES.values() for a in axes} == set(AXES)


def test_matrices_split_over_fsdp_and_tensor() -> None:
    mesh = abstract(1, 2, 1, 2)
    assert partition_spec(mesh, ("layers", "embed", "mlp"), (2, 32, 48)) == P(None, "fsdp", "tensor")
    assert partition_spec(mesh, ("vocab", "embed"), (61, 32)) == P(None, "fsdp")  # 61 does not divide
    assert partition_spec(mesh, ("batch", "sequence", None), (4, 8, 32)) == P("fsdp")
    assert partition_spec(abstract(2, 2, 2, 1), ("batch", "sequence"), (4, 8)) == P(("data", "fsdp"), "sequence")


def test_heads_are_never_cut_in_two() -> None:
    config = ModelConfig("qwen2", 64, 32, 48, 2, 4, 2, 8, attention_bias=True)
    specs, mesh = param_specs(config), abstract(1, 1, 1, 4)
    assert partition_spec(mesh, specs["layers.q"].axes, specs["layers.q"].units) == P(None, None, "tensor")
    assert partition_spec(mesh, specs["layers.k"].axes, specs["layers.k"].units) == P()


def test_slips_are_refused() -> None:
    mesh = abstract(1, 2, 1, 2)
    with pytest.raises(ValueError, match="no rule"):
        partition_spec(mesh, ("hedas",), (4,))
    with pytest.raises(ValueError, match="twice"):
        partition_spec(mesh, ("heads", "mlp"), (4, 4))
    with pytest.raises(ValueError, match="one length"):
        partition_spec(mesh, ("heads",), (4, 4))
