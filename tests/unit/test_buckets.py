"""Buckets of a push: together they are the Hugging Face tensors of the model, bit for bit, however devices cut them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rollout.types import TensorSpec
from sqlrl_jax.buckets import Converter
from sqlrl_jax.config import MeshConfig
from sqlrl_jax.mesh import make_mesh
from sqlrl_jax.model.hf import hf_manifest, to_hf_tensors
from sqlrl_jax.model.params import param_specs, spec_shardings
from sqlrl_jax.model.transpose import transposed
from tests.unit.tiny_model import model_config, sharp_params


def put_together(weights):
    """Name → array, from all pieces; every byte must come exactly once."""
    out = {cut.name: np.zeros(cut.shape, np.dtype(f"u{4 if cut.dtype == 'float32' else 2}")) for cut in weights.cuts}
    left = {(cut.name, place) for cut in weights.cuts for place in cut.slices}
    for bucket in weights.buckets():
        for piece in bucket:
            cut = weights.cuts[piece.tensor]
            start, size = cut.slices[piece.slice]
            left.remove((cut.name, (start, size)))
            where = tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))
            out[cut.name][where] = piece.data.view(out[cut.name].dtype).reshape(size)
    assert not left
    return out


def bits(array):
    array = np.asarray(array)
    return array.view(f"u{array.itemsize}")


def check(dtype, mesh):
    """Buckets of a small model on `mesh` are its tensors, twice over."""
    config = model_config(300)
    params = sharp_params(config, 0)
    expected = {name: bits(value) for name, value in to_hf_tensors(params, config, dtype).items()}
    params = jax.device_put(params, spec_shardings(param_specs(config), mesh))
    weights = Converter(config, dtype).weights(params)
    assert [TensorSpec(c.name, c.shape, c.dtype) for c in weights.cuts] == hf_manifest(config, dtype)
    assert max(len(cut.slices) for cut in weights.cuts) == mesh.size
    for _ in range(2):
        found = put_together(weights)
        for name, value in expected.items():
            assert np.array_equal(found[name], value), name
    middle = sum(piece.data.nbytes for piece in weights.sample())
    assert middle in [sum(v.nbytes for n, v in expected.items() if f".layers.{i}." in n) for i in range(2)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_buckets_are_the_hf_tensors(dtype):
    """On four devices: test_bridge.py."""
    check(dtype, make_mesh(MeshConfig(), jax.devices()[:1]))


def test_buckets_that_an_accelerator_turns_round_are_the_same(monkeypatch):
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    check("bfloat16", mesh)


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (129, 7), (300, 257)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_matrices_are_turned_round(shape, dtype):
    matrix = np.arange(shape[0] * shape[1]).reshape(shape).astype(jnp.dtype(dtype))
    assert np.array_equal(transposed(matrix), matrix.T)
    assert np.array_equal(transposed(matrix[:, ::2]), matrix[:, ::2].T)
