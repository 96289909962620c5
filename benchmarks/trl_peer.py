"""The update of benchmarks/update.py by TRL's GRPOTrainer itself: a contender in an environment of its own,

    python -m venv trl && trl/bin/pip install trl==1.16.0 torch==2.13.0

TRL's own trainer, model, loss (dapo: the mean over all trained tokens) and optimizer (fused AdamW) run; generation and
rewards are left out: it is handed the batch that it would have made of the episodes, prompts padded on the left and
completions on the right, observations masked as tool results are. Nothing is recomputed (no gradient checkpointing).
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer
from turns import serve


def make_trainer(folder: Path, episodes: int, size: int, out: str) -> GRPOTrainer:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    words = {"<pad>": 0, "<eos>": 1}  # the episodes come as ids: nothing is tokenized
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")), pad_token="<pad>", eos_token="<eos>"
    )
    config = GRPOConfig(
        output_dir=out,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=episodes // size,
        num_generations=8,
        loss_type="dapo",
        beta=0.0,
        learning_rate=3e-4,
        weight_decay=0.01,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        report_to="none",
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=config,
        train_dataset=Dataset.from_list([{"prompt": "<eos>"}] * episodes),
        processing_class=tokenizer,
    )
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = episodes // size
    trainer.model.train()
    return trainer


def padded(rows: list[list[Any]], dtype: torch.dtype, left: bool) -> torch.Tensor:
    width = max(map(len, rows))
    filled = [[0] * (width - len(r)) + r if left else r + [0] * (width - len(r)) for r in rows]
    return torch.tensor(filled, dtype=dtype)


def make_batch(episodes: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """What GRPOTrainer._generate_and_score_completions returns."""
    prompts, responses = ([e[name] for e in episodes] for name in ("prompt_ids", "response_ids"))
    masks = [e["loss_mask"] for e in episodes]
    return {
        "prompt_ids": padded(prompts, torch.long, left=True),
        "prompt_mask": padded([[1] * len(p) for p in prompts], torch.long, left=True),
        "completion_ids": padded(responses, torch.long, left=False),
        "completion_mask": padded([[1] * len(r) for r in responses], torch.long, left=False),
        "tool_mask": padded(masks, torch.long, left=False),
        "old_per_token_logps": padded([e["logprobs"] for e in episodes], torch.float32, left=False),
        "advantages": torch.tensor([e["advantage"] for e in episodes], dtype=torch.float32),
        "num_items_in_batch": torch.tensor(float(sum(map(sum, masks)))),
    }


def main(folder: Path, size: int) -> None:
    episodes = json.loads((folder / "episodes.json").read_text())
    with tempfile.TemporaryDirectory() as out:
        trainer = make_trainer(folder, len(episodes), size, out)

        def update() -> tuple[float, float]:
            batch, total = make_batch(episodes), 0.0
            trainer.optimizer.zero_grad(set_to_none=True)
            for start in range(0, len(episodes), size):
                rows = slice(start, start + size)
                inputs = {name: value if value.dim() == 0 else value[rows] for name, value in batch.items()}
                loss = trainer.compute_loss(trainer.model, inputs)
                trainer.accelerator.backward(loss)
                total += loss.item()
            norm = trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), 1.0)
            trainer.optimizer.step()
            return total, float(norm)

        serve(update)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
