"""The optimizer and its learning-rate schedule, made from configuration with optax.

Weight decay touches matrices only. Muon (orthogonalised momentum) takes the matrices inside the layers, each layer of a
stacked parameter by itself; embeddings, norms and biases go to Adam with the same learning rate. Clipping is not here:
the learner needs the gradient's norm anyway, to skip steps where it is not finite.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import optax
import optax.contrib

from sqlrl_jax.config import ConfigError, OptimizerConfig
from sqlrl_jax.model.params import ParamSpec, nest

# Muon's steps are scaled to the size of AdamW's, so that one learning rate serves all parameters (arXiv:2502.16982).
MUON_RMS = 0.2


def schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Learning rate of optimizer step 0, 1, …: linear warm-up, then constant or a cosine to zero at `total_steps`.

    Step k of a warm-up over n steps has lr·(k + 1)/n, so no step is wasted at zero. Only the cosine reads `total_steps`.
    """
    warmup = config.num_warmup_steps
    if config.scheduler == "constant":
        after: optax.Schedule = optax.constant_schedule(config.lr)
    else:
        if total_steps <= warmup:
            raise ConfigError(
                f"scheduler cosine: num_warmup_steps {warmup} must be less than the run's {total_steps} optimizer steps"
            )
        after = optax.cosine_decay_schedule(config.lr, total_steps - warmup)
    if warmup == 0:
        return after
    rising = optax.linear_schedule(config.lr / warmup, config.lr, max(warmup - 1, 1))
    return optax.join_schedules([rising, after], [warmup])


def make_optimizer(
    config: OptimizerConfig, specs: Mapping[str, ParamSpec], total_steps: int
) -> optax.GradientTransformation:
    """The optax transformation that `config` asks for, over the parameters that `specs` declares."""
    rate, (b1, b2) = schedule(config, total_steps), config.adam_betas
    if config.name == "adamw":
        decayed = nest({path: spec.is_matrix for path, spec in specs.items()})
        return optax.adamw(rate, b1=b1, b2=b2, weight_decay=config.weight_decay, mask=decayed)
    parts = {
        "matrix": optax.contrib.muon(
            rate,
            weight_decay=config.weight_decay,
            consistent_rms=MUON_RMS,
            muon_weight_dimension_numbers=_last_two_axes,
        ),
        "embedding": optax.adamw(rate, b1=b1, b2=b2, weight_decay=config.weight_decay),
        "vector": optax.adam(rate, b1=b1, b2=b2),
    }
    return optax.partition(parts, nest({path: _kind(path, spec) for path, spec in specs.items()}))


def _kind(path: str, spec: ParamSpec) -> str:
    if not spec.is_matrix:
        return "vector"
    return "matrix" if path.startswith("layers.") else "embedding"


def _last_two_axes(params: Any) -> Any:
    """Stacked matrices [layers, in, out]: the layer axis is a batch, orthogonalised one by one."""
    return jax.tree.map(lambda p: optax.contrib.MuonDimensionNumbers(p.ndim - 2, p.ndim - 1), params)
