"""The analytic FLOPs of a micro-batch against what XLA counts in the program it is given."""

from __future__ import annotations

import jax
import pytest

from sqlrl_jax.config_file import load
from sqlrl_jax.cost import Cost, Episodes
from sqlrl_jax.learner import make_program
from sqlrl_jax.mesh import make_mesh
from sqlrl_jax.model.config import ModelConfig

# Wide beside its rows, so that products with weights are nearly all there is to count.
MODEL = ModelConfig("qwen2", 4096, 512, 2048, 3, 8, 2, 64, attention_bias=True)
ROWS, ROW = 4, 32


@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_micro_batch_costs_what_xla_counts(remat: str) -> None:
    """The head's loop has one turn and the layers are unrolled, because XLA counts a loop's body once. What XLA counts
    besides products, norms and the like, is under a hundredth here."""
    settings = {
        "generator.max_input_length": 16,
        "generator.sampling_params.max_generate_length": 1,
        "trainer.policy.row_tokens": ROW,
        "trainer.policy.rows_per_micro_batch": ROWS,
        "trainer.policy.logprob_chunk": ROWS * ROW,
        "trainer.policy.scan_layers": "false",
        "trainer.policy.remat": remat,
    }
    config = load(None, [f"{key}={value}" for key, value in settings.items()])
    mesh = make_mesh(config.trainer.mesh, jax.devices()[:1])
    program = make_program(config, mesh, MODEL)
    batch, params = program.abstract_batches(), program.abstract_params()
    gradients, sums = jax.eval_shape(program.zeros, params, {}, batch)
    counted = program.add.lower(gradients, sums, params, {}, batch, 1).cost_analysis()["flops"]
    assert counted == pytest.approx(Cost(config, MODEL, dict(mesh.shape), Episodes(ROW, 1.0)).flops().spent, rel=0.02)
