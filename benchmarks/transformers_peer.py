"""The update of torch_peer.py with transformers' own model: what people run who write such a loop on it.

Micro-batches sorted by length, each padded to its own longest and given with its attention mask, so that attention is
SDPA with the mask that transformers makes of it; logits of every completion column (`logits_to_keep`), trained or not.
Loss, clipping and optimizer (fused AdamW, the default of transformers' Trainer) are torch_peer.py's.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch_peer import TorchUpdate, first_column, logprobs_of
from transformers import AutoConfig, AutoModelForCausalLM

from sqlrl_jax.model.config import ModelConfig


class TransformersUpdate(TorchUpdate):
    """Parameters in a model of transformers', optimizer and one update over samples in micro-batches of `size`."""

    def __init__(self, tensors: Mapping[str, np.ndarray], config: ModelConfig, *, size: int) -> None:
        super().__init__(tensors, config, size=size, by_length=True)
        given = config.to_hf("float32")
        self.model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(given.pop("model_type"), **given, use_cache=False), attn_implementation="sdpa"
        )
        found = self.model.load_state_dict(self.weights, strict=False, assign=True)
        assert (found.missing_keys, found.unexpected_keys) == (["lm_head.weight"], []), found
        self.model.tie_weights()
        self.model.train()

    def _logprobs(self, tokens: torch.Tensor, lengths: torch.Tensor, trained: torch.Tensor) -> torch.Tensor:
        first = first_column(trained)
        mask = (torch.arange(tokens.shape[1]) < lengths[:, None]).long()
        kept = tokens.shape[1] - first
        logits = self.model(input_ids=tokens, attention_mask=mask, logits_to_keep=kept).logits[:, :-1]
        return logprobs_of(logits, tokens[:, first + 1 :])[trained[:, first:]]
