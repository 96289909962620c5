"""The update of benchmarks/update.py by Tunix itself: a contender in an environment of its own,

    python -m venv tunix && tunix/bin/pip install google-tunix==0.1.7

Tunix's own model, GRPO loss and jitted training step run, on the padded layout: prompts padded on the left, completions on
the right, observations masked. Its packed layout is left out, because on a CPU it attends without a causal mask. Its
"token-mean" is that of each micro-batch, and they are averaged; so loss and gradient differ a little from ours.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.models.qwen2.model import ModelConfig
from tunix.models.qwen2.params import create_model_from_safe_tensors
from tunix.rl.algo_core import grpo_loss_fn
from tunix.rl.common import TrainExample
from tunix.rl.grpo.grpo_learner import GRPOConfig
from tunix.rl.trainer import Trainer
from tunix.sft.peft_trainer import TrainingConfig
from turns import serve

PAD = -1  # no id of the episodes; the embedding clips it, and what it gives is masked


def make_trainer(folder: Path, micro_batches: int) -> Trainer:
    given = json.loads((folder / "config.json").read_text())
    config = ModelConfig(
        num_layers=given["num_hidden_layers"],
        vocab_size=given["vocab_size"],
        embed_dim=given["hidden_size"],
        hidden_dim=given["intermediate_size"],
        num_heads=given["num_attention_heads"],
        head_dim=given["hidden_size"] // given["num_attention_heads"],
        num_kv_heads=given["num_key_value_heads"],
        rope_theta=given["rope_theta"],
        norm_eps=given["rms_norm_eps"],
        use_tied_embedding=given["tie_word_embeddings"],
    )
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    with mesh:
        model = create_model_from_safe_tensors(str(folder), config, mesh, dtype=jnp.float32)
        decay = partial(jax.tree.map, lambda p: p.ndim > 1)  # matrices
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-4, weight_decay=0.01, mask=decay))
        training = TrainingConfig(eval_every_n_steps=10**9, gradient_accumulation_steps=micro_batches)
        trainer = Trainer(model, optimizer, training, lambda: {})
    algorithm = GRPOConfig(beta=0.0, epsilon=0.2, loss_agg_mode="token-mean")
    algorithm.temperature = 1.0  # which Tunix's learner sets from its rollout

    def loss(model: nnx.Module, train_example: TrainExample) -> Any:
        return grpo_loss_fn(model, train_example, algo_config=algorithm, pad_id=PAD, eos_id=0)

    trainer.with_loss_fn(loss, has_aux=True)
    trainer.with_gen_model_input_fn(lambda example: {"train_example": example})
    return trainer


def padded(rows: list[list[Any]], fill: float, dtype: type, left: bool = False) -> np.ndarray:
    width = max(map(len, rows))
    return np.array([[fill] * (width - len(r)) + r if left else r + [fill] * (width - len(r)) for r in rows], dtype)


def make_batch(episodes: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    prompts = padded([e["prompt_ids"] for e in episodes], PAD, np.int32, left=True)
    return {
        "prompt_ids": prompts,
        "prompt_mask": prompts != PAD,
        "completion_ids": padded([e["response_ids"] for e in episodes], PAD, np.int32),
        "completion_mask": padded([e["loss_mask"] for e in episodes], 0, np.int32),
        "old_per_token_logps": padded([e["logprobs"] for e in episodes], 0.0, np.float32),
        "advantages": np.array([e["advantage"] for e in episodes], np.float32),
    }


def main(folder: Path, size: int) -> None:
    episodes = json.loads((folder / "episodes.json").read_text())
    trainer = make_trainer(folder, len(episodes) // size)
    step, _ = trainer.jit_train_and_eval_step()

    def update() -> tuple[float, float]:
        batch, losses, norms = make_batch(episodes), [], []
        for start in range(0, len(episodes), size):
            part = {name: jnp.asarray(value[start : start + size]) for name, value in batch.items()}
            loss, _, norm = step(TrainExample(ref_per_token_logps=None, **part))
            losses.append(loss)
            norms.append(norm)
        jax.block_until_ready(nnx.state(trainer.model))
        return float(np.mean(losses)), float(np.mean(norms))

    serve(update)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
