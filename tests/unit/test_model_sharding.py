"""Eight emulated devices give the result of one: log-probabilities and every gradient, for each axis of the mesh."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import json, sys
from functools import cache
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
from sqlrl_jax.config import MeshConfig
from sqlrl_jax.mesh import batch_sharding, make_mesh
from sqlrl_jax.model.config import ModelConfig
from sqlrl_jax.model.decoder import Compute, forward, unembedding
from sqlrl_jax.model.layout import layout_for
from sqlrl_jax.model.params import flatten, nest, param_shardings, param_specs
from sqlrl_jax.rl.logprobs import token_logprobs

MODELS = {
    "tied": ModelConfig("qwen2", 64, 32, 48, 2, 4, 2, 8, attention_bias=True, tie_word_embeddings=True),
    "untied": ModelConfig("qwen3", 64, 32, 48, 2, 8, 2, 8, qk_norm=True),
    "odd": ModelConfig("llama", 61, 30, 45, 1, 6, 3, 8),  # divides by almost nothing
}
ROWS, LENGTH = 8, 16
rng = np.random.default_rng(0)
tokens = rng.integers(0, 61, (ROWS, LENGTH))
positions = np.tile(np.r_[:10, 3:9], (ROWS, 1))  # two sequences that begin with the same three tokens
reach = np.tile(np.repeat([16, 10, 16], [3, 7, 6]), (ROWS, 1))
flat = rng.permutation(ROWS * LENGTH)  # all places are trained, in any order
to = rng.normal(size=(2, ROWS, LENGTH)).astype(np.float32)

def slots(shards):
    index = np.stack([rng.permutation(ROWS * LENGTH // shards) for _ in range(shards)]).astype(np.int32)
    pick = lambda a: np.take_along_axis(a.reshape(shards, -1), index, 1)
    return index, pick(np.roll(tokens, -1, 1)), np.stack([pick(t) for t in to])

@cache
def params_of(name):
    config, rng = MODELS[name], np.random.default_rng(1)
    out = {p: rng.normal(size=s.shape) * 0.2 + (s.stddev is None) for p, s in param_specs(config).items()}
    if name == "untied":  # adapters, as in model/lora.py
        wide = {"q": 64, "o": 32, "down": 32}
        for part, outer in wide.items():
            inner = out[f"layers.{part}"].shape[1]
            out[f"layers.{part}_a"] = rng.normal(size=(2, inner, 4)) * 0.2
            out[f"layers.{part}_b"] = rng.normal(size=(2, 4, outer)) * 0.2
    return nest({p: v.astype(np.float32) for p, v in out.items()})

def run(name, sizes, remat, scan, devices):
    config, mesh = MODELS[name], make_mesh(MeshConfig(**sizes), devices)
    shardings = flatten(param_shardings(config, mesh))
    params = nest({p: jax.device_put(v, shardings.get(p)) for p, v in flatten(params_of(name)).items()})
    inputs = [jax.device_put(x, batch_sharding(mesh)) for x in (tokens, positions, reach)]
    index, targets, weights = slots(mesh.shape["data"] * mesh.shape["fsdp"])
    compute = Compute(mesh=mesh, remat=remat)
    layout = layout_for(param_specs(config), mesh, scan_layers=scan, apart=["q", "o", "down"] if name == "untied" else [])

    @jax.jit
    def loss(params, *inputs):
        def total(params):
            hidden = forward(config, layout.lay(params), *inputs, compute)
            out = token_logprobs(hidden, unembedding(params), index, targets, jnp.int32(index.shape[1]),
                                 temperature=0.7, chunk=16, mesh=mesh)
            return (out.logprobs * weights[0] + out.entropy * weights[1]).sum(), out.greedy.sum()
        return jax.value_and_grad(total, has_aux=True)(params)

    (value, greedy), grads = loss(params, *inputs)
    held = {p: float(np.prod(v.sharding.shard_shape(v.shape)) / v.size) for p, v in flatten(params).items()}
    return float(value), int(greedy), {p: np.asarray(g) for p, g in flatten(grads).items()}, held

report = {}
for title, (name, sizes, remat, scan) in json.loads(sys.argv[1]).items():
    if name not in report:
        report[name] = run(name, {}, "none", True, jax.devices()[:1])
    one, count, expected, _ = report[name]
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    value, greedy, grads, held = run(name, sizes, remat, scan, devices)
    errors = {p: float(np.abs(grads[p] - g).max() / np.abs(g).max()) for p, g in expected.items()}
    worst = max(errors, key=errors.get)
    print(json.dumps([title, abs(value - one) / abs(one), errors[worst], worst, greedy == count, held["layers.gate"]]))
"""
# Model, mesh, remat, scan; and the part of the MLP that a device holds.
CASES = {
    "data": (("tied", {"data": 4}, "none", True), 1),
    "fsdp": (("tied", {"fsdp": 8}, "full", True), 1 / 8),
    "tensor": (("untied", {"tensor": 8}, "full", False), 1 / 8),  # 2 key/value heads for 8 devices: one picked
    "sequence": (("untied", {"sequence": 8}, "attention", True), 1 / 8),  # the same along the sequence
    "heads padded": (("tied", {"sequence": 8}, "full", True), 1 / 8),  # 4 query heads on 8 devices
    "mixed, tied": (("tied", {"data": 2, "fsdp": 2, "tensor": 2}, "attention", True), 1 / 4),
    "mixed, untied": (("untied", {"fsdp": 2, "sequence": 2, "tensor": 2}, "full", True), 1 / 8),
    "little divides": (("odd", {"fsdp": 2, "sequence": 2, "tensor": 2}, "none", True), 1 / 2),
}


@pytest.fixture(scope="module")
def measured() -> dict[str, list]:
    """Relative errors of the loss and of the worst gradient, its name, whether the greedy tokens agree, the part held."""
    cases = json.dumps({title: case for title, (case, _) in CASES.items()})
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", PROGRAM, cases], capture_output=True, text=True, cwd=root, timeout=580)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    return {title: rest for title, *rest in lines}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("title", CASES)
def test_sharded_equals_single(measured: dict[str, list], title: str) -> None:
    loss_error, gradient_error, worst, same_greedy, held = measured[title]
    assert loss_error < 1e-5
    assert gradient_error < 2e-4, worst
    assert same_greedy
    assert held == CASES[title][1]
